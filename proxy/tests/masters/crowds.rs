//! Many at once, and an sshd that will not have so many.

use std::{
    io::{self, Read},
    net::TcpStream,
    process::Stdio,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use nix_offload_proxy::master::{Endpoint, Fault, Master, OpenError, Pool, StartError};

use crate::world::{BOUND, Trouble, World, wait_until};

#[test]
fn two_hundred_processes_at_once_make_one_connection_and_all_can_use_it() {
    let world = World::with_sshd(|_| "MaxSessions 400".into());
    // They stand at a pipe until it is closed.
    let (gate, handle) = io::pipe().unwrap();
    let start = world.start_command();
    let words: Vec<_> = start.get_args().skip(1).collect();
    let processes: Vec<_> = (0..200)
        .map(|_| {
            let mut shell = std::process::Command::new("sh");
            shell
                .args([
                    "-c",
                    r#"read -r _; "$0" start "$@" --timeout 100 && exec "$0" check "$@" --timeout 100"#,
                ])
                .arg(start.get_program())
                .args(&words)
                .env("NIX_OFFLOAD_RUNTIME_DIR", world.pool.directory())
                .stdin(gate.try_clone().unwrap())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            shell.spawn().unwrap()
        })
        .collect();
    drop((gate, handle));
    for process in processes {
        let output = process.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert!(output.status.success());
    }
    assert_eq!(world.logins(), 1);
    assert!(world.only_master().alive);
}

/// Connects, says nothing, and so takes the only place that sshd has for who is not logged in. Returns how many it has
/// turned away by then: that of whoever looked whether sshd is there may not have been free yet.
fn occupy(world: &World) -> (TcpStream, usize) {
    let mut silent = None;
    wait_until("the place is ours", || {
        let stream = TcpStream::connect(("127.0.0.1", world.port)).unwrap();
        let mut greeting = [0; 4];
        let greeted = (&stream).read_exact(&mut greeting).is_ok() && greeting == *b"SSH-";
        silent = greeted.then_some(stream);
        greeted
    });
    (silent.unwrap(), turned_away(world))
}

fn turned_away(world: &World) -> usize {
    world.sshd_log().matches("drop connection #").count()
}

#[test]
fn a_start_that_sshd_turns_away_is_tried_again_with_growing_pauses() {
    let world = World::with_sshd(|_| "MaxStartups 1".into());
    let (silent, before) = occupy(&world);
    let begin = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("three attempts were in vain", || turned_away(&world) - before >= 3);
            drop(silent);
        });
        world.start().open_session("true", BOUND).unwrap();
    });
    // The pauses between them, and one behind them.
    assert!(begin.elapsed() >= Duration::from_millis(300 + 600 + 1200), "{:?}", begin.elapsed());
    assert_eq!(world.logins(), 1);
    let attempts = turned_away(&world) - before;
    // Pauses of 0.3, 0.6, 1.2 seconds and up to half more.
    assert!((3..=4).contains(&attempts), "{attempts} attempts in vain");
    assert_eq!(world.pool.down(&world.endpoint()), None);
}

#[test]
fn an_sshd_that_goes_on_turning_us_away_is_told_with_the_words_to_look_for_and_left_alone() {
    let world = World::with_sshd(|_| "MaxStartups 1".into());
    let (_silent, before) = occupy(&world);
    let bound = Duration::from_secs(3);
    let begin = Instant::now();
    let error = world.pool.start(&world.endpoint(), bound, "true").unwrap_err();
    assert!(begin.elapsed() < bound + Duration::from_secs(3), "{:?}", begin.elapsed());
    assert!(matches!(error, StartError::Failed { fault: Fault::TurnedAway { .. }, .. }), "{error:?}");
    assert!(error.is_temporary() && error.to_string().contains("turned the connection away"), "{error}");
    let cure = error.cure().unwrap();
    assert!(cure.contains("MaxStartups") && cure.contains("PerSourcePenalties"), "{cure}");
    let attempts = turned_away(&world) - before;
    assert!((2..=4).contains(&attempts), "{attempts} attempts");
    assert!(world.pool.down(&world.endpoint()).unwrap().reason.contains("turned the connection away"));
}

/// Starts that many masters at the same moment.
fn start_at_once(pool: &Pool, endpoint: &Endpoint, masters: u32) -> Duration {
    let barrier = Barrier::new(masters as usize);
    let begin = Instant::now();
    thread::scope(|scope| {
        let start = |instance| {
            barrier.wait();
            pool.start(&Endpoint { instance, ..endpoint.clone() }, Duration::from_secs(60), "true")
        };
        let threads: Vec<_> = (0..masters).map(|instance| scope.spawn(move || start(instance))).collect();
        let masters: Vec<Master> =
            threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect();
        assert!(masters.iter().all(|master| master.start_time().is_some()));
    });
    begin.elapsed()
}

#[test]
fn forty_starts_at_once_are_spread_so_that_sshd_turns_none_away() {
    let world = World::with_sshd(|_| "MaxStartups 10:30:100".into());
    let took = start_at_once(&world.pool, &world.endpoint(), 40);
    assert_eq!((world.logins(), turned_away(&world)), (40, 0), "{took:?}");
    // Ten at once and twenty in each second.
    assert!(took >= Duration::from_millis(1400), "{took:?}");
}

#[test]
fn how_many_connections_are_made_in_a_second_is_set() {
    let took = |per_second: u32| {
        let world = World::new();
        let pool = world.pool_with(&format!("[ssh]\nconnections-per-second = {per_second}\n"));
        start_at_once(&pool, &world.endpoint(), 12)
    };
    let (slow, fast) = (took(2), took(100));
    assert!(slow >= Duration::from_millis(4900), "{slow:?}");
    assert!(fast < slow, "{fast:?}, {slow:?}");
    let world = World::new();
    let pool = world.pool_with("[[host]]\nname = '127.*'\nconnections-per-second = 1\n");
    let one = start_at_once(&pool, &world.endpoint(), 3);
    assert!(one >= Duration::from_millis(1900), "{one:?}");
}

#[test]
fn a_master_that_carries_enough_is_left_for_another_one_and_nothing_is_held_against_it() {
    let world = World::new();
    let mut asked = Vec::new();
    let open = |master: &Master| {
        asked.push(master.control_path().to_owned());
        // More of them than may refuse before the far side is given up.
        if asked.len() < 5 { Err(Trouble::Open(OpenError::Taken)) } else { Ok(()) }
    };
    fn why(error: &Trouble) -> Option<&OpenError> {
        match error {
            Trouble::Open(error) => Some(error),
            Trouble::Start(_) => None,
        }
    }
    let deadline = Instant::now() + BOUND * 5;
    world.pool.with_master(&world.endpoint(), deadline, "true", open, why).unwrap();
    asked.sort();
    asked.dedup();
    assert_eq!((asked.len(), world.logins()), (5, 5));
    // The first one is as good as before for what it still has room for.
    let mut first = None;
    let any = |master: &Master| -> Result<(), Trouble> {
        first = Some(master.control_path().to_owned());
        Ok(())
    };
    world.pool.with_master(&world.endpoint(), deadline, "true", any, why).unwrap();
    assert_eq!(first.as_deref(), Some(world.pool.live(&world.endpoint()).unwrap().control_path()));
}
