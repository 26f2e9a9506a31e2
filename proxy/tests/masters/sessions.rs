//! More sessions than sshd gives on one connection, and masters that nobody uses.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    time::{Duration, Instant, SystemTime},
};

use nix::sys::signal::{Signal, kill};
use nix_offload_proxy::master::{CloseWrite, Master, MasterInfo, OpenError, TimedRead};

use crate::world::{BOUND, Echo, Trouble, World, extensions, gone, session_on_any, wait_until};

#[test]
fn as_many_masters_are_made_as_the_sessions_need_and_they_are_used_again() {
    let world = World::with_sshd(|_| "MaxSessions 2".into());
    let open = || {
        let opened = (0..5).map(|_| session_on_any(&world.pool, &world.endpoint(), "cat", BOUND).unwrap());
        let (masters, sessions): (Vec<Master>, Vec<_>) = opened.unzip();
        let mut echoes: Vec<_> = sessions.into_iter().map(Echo::of).collect();
        echoes.iter_mut().enumerate().for_each(|(number, echo)| echo.says(&format!("word {number}")));
        echoes.into_iter().for_each(Echo::ends);
        let mut paths: Vec<_> = masters.iter().map(|master| master.control_path().to_owned()).collect();
        paths.sort();
        paths.dedup();
        paths
    };
    let paths = open();
    assert_eq!((paths.len(), world.logins(), world.pool.list().unwrap().len()), (3, 3, 3));
    let is_idle = |master: &MasterInfo| master.channels == Some(0);
    wait_until("the masters have no clients", || world.pool.list().unwrap().iter().all(is_idle));
    // sshd counts a session until it has cleared it away.
    let count = |words: &str| world.sshd_log().matches(words).count();
    wait_until("sshd has closed all sessions", || count("Close session:") == count("Starting session:"));
    let again = open();
    assert_eq!((again, world.logins()), (paths, 3));
}

#[test]
fn an_sshd_that_gives_no_session_at_all_is_not_logged_in_to_again_and_again() {
    let world = World::with_sshd(|_| "MaxSessions 0".into());
    for most in [2, 4, 8, 8, 8, 8] {
        let begin = Instant::now();
        let error = session_on_any(&world.pool, &world.endpoint(), "true", BOUND).map(drop).unwrap_err();
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        let Trouble::Open(OpenError::Refused { reason }) = error else { panic!("{error:?}") };
        assert!(reason.contains("Session open refused"), "{reason}");
        assert!(world.logins() <= most, "{}", world.logins());
    }
}

#[test]
fn where_no_second_master_can_be_had_it_is_said_that_the_first_is_full() {
    let world = World::with_sshd(|_| "MaxSessions 1".into());
    let (_, only) = session_on_any(&world.pool, &world.endpoint(), "cat", BOUND).unwrap();
    fs::remove_file(world.path("authorized_keys")).unwrap();
    let error = session_on_any(&world.pool, &world.endpoint(), "cat", BOUND).map(drop).unwrap_err();
    assert!(matches!(error, Trouble::Open(OpenError::Refused { .. })), "{error:?}");
    assert_eq!(world.logins(), 1);
    Echo::of(only).ends();
}

#[test]
fn a_master_that_nobody_uses_ends_by_itself_and_not_before() {
    let world = World::new();
    let pool = world.pool_with("[ssh]\nidle = 2\n");
    let master = pool.start(&world.endpoint(), BOUND, "true").unwrap();
    let pid = world.only_master().pid;
    let (mut reader, writer, status) = master.open_session("cat", BOUND).unwrap().split();
    // More than twice as long as it would live without a stream, whose end would be read.
    reader.set_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(!gone(pid));
    drop((reader, writer, status));
    let begin = Instant::now();
    wait_until("the master ends", || gone(pid));
    // Stated: two seconds after its last use, as it was set.
    let took = begin.elapsed();
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(10), "{took:?}");
    wait_until("its socket is gone", || !master.control_path().exists());
    assert!(pool.live(&world.endpoint()).is_none());
    pool.start(&world.endpoint(), BOUND, "true").unwrap().open_session("true", BOUND).unwrap();
    assert_eq!(world.logins(), 2);
}

#[test]
fn of_a_master_that_ended_by_itself_nothing_is_left_but_its_log_and_that_for_a_week() {
    let world = World::new();
    let pool = world.pool_with("[ssh]\nidle = 1\n");
    let mut pinned = world.endpoint();
    pinned.host_keys = Some(world.public_key("host"));
    pool.start(&pinned, BOUND, "echo x").unwrap();
    let info = world.only_master();
    wait_until("the master ends", || gone(info.pid) && !info.control_path.exists());
    assert_eq!(pool.list().unwrap(), []);
    assert_eq!(extensions(pool.directory()), ["log", "pace"]);
    assert_eq!(pool.list().unwrap(), []);
    let log = File::options().write(true).open(&info.log_path).unwrap();
    let age =
        |days: u64| log.set_modified(SystemTime::now() - Duration::from_secs(days * 24 * 3600)).unwrap();
    age(6);
    assert_eq!((pool.list().unwrap(), info.log_path.exists()), (vec![], true));
    // That of a master that lives stays, however long it has said nothing.
    let living = pool.start(&world.endpoint(), BOUND, "true").unwrap();
    let _session = living.open_session("cat", BOUND).unwrap();
    let its_log = File::options().write(true).open(living.log_path()).unwrap();
    its_log.set_modified(SystemTime::now() - Duration::from_secs(8 * 24 * 3600)).unwrap();
    age(8);
    assert_eq!(pool.list().unwrap().len(), 1);
    assert_eq!((info.log_path.exists(), living.log_path().exists()), (false, true));
}

#[test]
fn a_flood_on_stderr_does_not_stop_the_clock() {
    let world = World::new();
    let master = world.start();
    let (mut reader, _writer, mut status) = master.open_session("yes >&2", BOUND).unwrap().split();
    reader.set_timeout(Some(Duration::from_millis(300))).unwrap();
    let begin = Instant::now();
    let error = reader.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    status.keep_stderr();
    let mut heard = 0;
    let ended = status.listen(Some(Duration::from_millis(300)), &mut |bytes| heard += bytes.len()).unwrap();
    assert!(!ended && heard > 0, "{ended} {heard}");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

#[test]
fn a_lasting_session_runs_its_command_to_the_end_of_its_input_or_of_itself() {
    let world = World::with_sshd(|_| "MaxSessions 3".into());
    let master = world.start();
    let open = |command: &str| master.open_lasting_session(command, BOUND).map(|session| session.split());
    let (mut reader, mut writer) = open("echo begun; cat; echo ended; echo lost >&2").unwrap();
    let mut heard = [0; 11];
    reader.read_exact(&mut heard[..6]).unwrap();
    writer.write_all(b"word\n").unwrap();
    reader.read_exact(&mut heard[6..]).unwrap();
    assert_eq!(&heard, b"begun\nword\n");

    let (another, third) = (open("cat").unwrap(), open("cat").unwrap());
    // That costs a process which holds the connection, so the master and the other sessions live.
    let refused = open("cat").map(drop).unwrap_err();
    assert!(matches!(refused, OpenError::Refused { .. }), "{refused:?}");
    drop((another, third));
    let count = |words: &str| world.sshd_log().matches(words).count();
    wait_until("those that were dropped have ended", || count("Close session:") == 3);
    for command in ["", "a\0b"] {
        assert!(matches!(open(command).map(drop), Err(OpenError::Argument { .. })), "{command:?}");
    }

    writer.shutdown().unwrap();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), world.logins()), ("ended\n", 1));
    assert!(master.is_in_place());
}

#[test]
fn a_session_whose_command_is_slow_to_begin_is_waited_for_within_the_bound() {
    let world = World::new();
    let master = world.start();
    let sessions = world.sshd_sessions();
    let all = |number: Signal| sessions.iter().for_each(|pid| kill(*pid, number).unwrap());
    let begin = Instant::now();
    all(Signal::SIGSTOP);
    let late = master.open_lasting_session("cat", Duration::from_millis(500)).map(drop).unwrap_err();
    all(Signal::SIGCONT);
    assert!(matches!(late, OpenError::TimedOut { .. }), "{late:?}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    master.open_lasting_session("cat", BOUND).unwrap();
    assert_eq!(world.logins(), 1);
}
