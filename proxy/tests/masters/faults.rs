//! What can happen to a master, noticed and made good within a stated time. The times here have room for a machine
//! with much to do; the stated ones are in the comments.

use std::{
    net::TcpListener,
    process::Stdio,
    time::{Duration, Instant, SystemTime},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nix_offload_proxy::master::{Endpoint, Pool};

use crate::world::{BOUND, Echo, World, extensions, gone, session_on_any, signal, wait_until};

/// Longer than anything is allowed to take here.
const PATIENCE: Duration = Duration::from_secs(18);
/// What takes no time on an idle machine.
const AT_ONCE: Duration = Duration::from_secs(5);
/// The same with a login, which is a tenth of a second there.
const WITH_A_LOGIN: Duration = Duration::from_secs(12);

/// Processes that stand still: nothing comes over their connections, and nobody says so.
struct Standstill(Vec<Pid>);

impl Standstill {
    fn of(processes: Vec<Pid>) -> Standstill {
        assert!(!processes.is_empty());
        processes.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
        Standstill(processes)
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        self.0.iter().for_each(|pid| {
            let _ = kill(*pid, Signal::SIGKILL);
        });
    }
}

#[test]
fn a_master_that_died_is_replaced_at_once() {
    let world = World::new();
    world.start();
    let old = world.only_master();
    signal(old.pid, Signal::SIGKILL);
    wait_until("the master is gone", || gone(old.pid));
    assert!(old.control_path.exists(), "a stale socket is part of the test");
    let begin = Instant::now();
    let (_, session) = session_on_any(&world.pool, &world.endpoint(), "cat", PATIENCE).unwrap();
    assert!(begin.elapsed() < WITH_A_LOGIN, "{:?}", begin.elapsed());
    Echo::of(session).ends();
    assert_eq!(world.logins(), 2);
}

#[test]
fn a_master_that_dies_while_it_is_asked_is_replaced_at_once() {
    let world = World::new();
    world.start();
    let old = world.only_master();
    let mut opened = 0;
    let begin = Instant::now();
    let number = world.pool.with_master(
        &world.endpoint(),
        Instant::now() + BOUND,
        "true",
        |master| {
            if opened == 0 {
                signal(old.pid, Signal::SIGKILL);
                wait_until("the master is gone", || gone(old.pid));
            }
            opened += 1;
            master.open_session("true", PATIENCE).map(|_| opened).map_err(crate::world::Trouble::Open)
        },
        |error| match error {
            crate::world::Trouble::Open(error) => Some(error),
            crate::world::Trouble::Start(_) => None,
        },
    );
    assert!(begin.elapsed() < WITH_A_LOGIN, "{:?}", begin.elapsed());
    assert_eq!((number.unwrap(), world.logins()), (2, 2));
}

/// Stated: a second for each of two looks at it.
#[test]
fn a_master_that_hangs_is_replaced_by_a_start_within_seconds() {
    let world = World::new();
    world.start();
    let old = world.only_master();
    signal(old.pid, Signal::SIGSTOP);
    let begin = Instant::now();
    world.start().open_session("true", BOUND).unwrap();
    assert!(begin.elapsed() < WITH_A_LOGIN, "{:?}", begin.elapsed());
    assert!(gone(old.pid));
    assert_eq!(world.logins(), 2);
}

/// Stated: the bound that whoever opens a stream gave himself, then a second or two.
#[test]
fn a_master_that_hangs_costs_whoever_opens_a_stream_his_own_bound_once() {
    let world = World::new();
    world.start();
    let old = world.only_master();
    signal(old.pid, Signal::SIGSTOP);
    let begin = Instant::now();
    let bound = Duration::from_secs(1);
    session_on_any(&world.pool, &world.endpoint(), "true", bound).unwrap();
    assert!(begin.elapsed() < WITH_A_LOGIN, "{:?}", begin.elapsed());
    assert!(gone(old.pid));
    let begin = Instant::now();
    session_on_any(&world.pool, &world.endpoint(), "true", PATIENCE).unwrap();
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    assert_eq!(world.logins(), 2);
}

#[test]
fn a_link_that_was_cut_costs_one_bound_of_one_caller() {
    let world = World::new();
    let cut_off = world.start();
    let pid = world.only_master().pid;
    let standstill = Standstill::of(world.sshd_sessions());
    let bound = Duration::from_secs(1);
    let begin = Instant::now();
    let (other, _) = session_on_any(&world.pool, &world.endpoint(), "true", bound).unwrap();
    let took = begin.elapsed();
    assert!((bound..bound + WITH_A_LOGIN).contains(&took), "{took:?}");
    assert_ne!(other.control_path(), cut_off.control_path());
    // It may have streams that are well, so it is not ended.
    assert!(!gone(pid));
    // Nobody else waits for it, in whatever process.
    let begin = Instant::now();
    let (again, _) = session_on_any(&world.pool, &world.endpoint(), "true", PATIENCE).unwrap();
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    assert_eq!(again.control_path(), other.control_path());
    let begin = Instant::now();
    let pool = Pool::open(world.pool.directory()).unwrap();
    session_on_any(&pool, &world.endpoint(), "true", PATIENCE).unwrap();
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    assert_eq!(world.logins(), 2);
    drop(standstill);
}

/// Stated: 40 seconds (see the test of ssh's words in `master::start`). With one second between two questions it is
/// a tenth of that.
#[test]
fn ssh_itself_ends_a_master_whose_link_was_cut() {
    let world = World::new();
    let mut endpoint = world.endpoint();
    endpoint.ssh_options.extend(["-o", "ServerAliveInterval=1"].map(String::from));
    let master = world.pool.start(&endpoint, BOUND, "true").unwrap();
    let pid = world.only_master().pid;
    // Somebody has a stream on it, who is told.
    let session = master.open_session("cat", BOUND).unwrap();
    let _standstill = Standstill::of(world.sshd_sessions());
    let begin = Instant::now();
    wait_until("the master gives up", || gone(pid));
    assert!(begin.elapsed() < Duration::from_secs(12), "{:?}", begin.elapsed());
    let (mut reader, ..) = session.split();
    assert_eq!(std::io::Read::read(&mut reader, &mut [0]).unwrap_or_default(), 0);
    assert!(world.pool.live(&endpoint).is_none());
}

#[test]
fn a_starter_that_is_killed_leaves_a_master_that_can_be_seen_and_ended() {
    let world = World::new();
    let mut starter =
        world.start_command().args(["--command", "exec sleep 15"]).stdout(Stdio::null()).spawn().unwrap();
    wait_until("it takes connections", || world.pool.live(&world.endpoint_of_command()).is_some());
    starter.kill().unwrap();
    starter.wait().unwrap();
    let left = world.only_master();
    assert!(left.alive && !gone(left.pid));
    let list = world.command().arg("list").output().unwrap();
    let text = String::from_utf8(list.stdout).unwrap();
    assert!(text.contains(&left.pid.to_string()) && text.contains("alive"), "{text}");
    assert!(world.command().args(["stop", "--all"]).output().unwrap().status.success());
    wait_until("the master is gone", || gone(left.pid));
    assert_eq!(world.pool.list().unwrap(), []);
    wait_until("sshd has nobody", || world.sshd_sessions().is_empty());
}

#[test]
fn what_one_process_learnt_of_a_host_that_is_down_spares_the_others_the_wait() {
    let world = World::new();
    // Takes connections (the kernel does) and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    silent.set_nonblocking(true).unwrap();
    let endpoint =
        Endpoint { port: Some(silent.local_addr().unwrap().port()), ..world.endpoint_of_command() };
    let mut words = world.start_command().get_args().map(ToOwned::to_owned).collect::<Vec<_>>();
    let port = words.iter().position(|word| word == "-p").unwrap() + 1;
    words[port] = endpoint.port.unwrap().to_string().into();
    let started = world.command().args(&words).args(["--timeout", "1"]).output().unwrap();
    assert_eq!(started.status.code(), Some(69), "{started:?}");
    let attempts = || std::iter::from_fn(|| silent.accept().ok()).count();
    assert_eq!(attempts(), 1);
    assert!(extensions(&world.pool.directory().join("down")).contains(&"down".into()), "it is noted");
    // The first pause is short. A slow machine must not outlast it, so it is made longer.
    world.pool.memory(&endpoint).failed("no connection within 1 s", SystemTime::now() + PATIENCE);
    assert_eq!(world.pool.down(&endpoint).unwrap().failures, 2);

    let begin = Instant::now();
    let proxy = world
        .command()
        .args(["--via", "127.0.0.1", "--timeout", "10"])
        .args(&words[2..])
        .args(["elsewhere.invalid", "22"])
        .output()
        .unwrap();
    // Stated: milliseconds.
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    assert_eq!(proxy.status.code(), Some(75), "{proxy:?}");
    let said = String::from_utf8(proxy.stderr).unwrap();
    assert!(said.contains("no connection within 1 s"), "{said}");
    assert_eq!(attempts(), 0, "nobody tried");
}
