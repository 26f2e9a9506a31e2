//! Builds that somebody looks in on, by every way of asking for one, on a real daemon and a real `nix-store --serve`.

use crate::real::{Store, expression};
use crate::serving::{releases, serve, store_in};
use nix::sys::socket::{MsgFlags, recv};
use nix_derivation::{Derivation, StorePath};
use nix_offload::builder::{BuilderError, Clocks, Review, Store as Any};
use nix_offload::wire::serve as serve_wire;
use nix_offload::wire::worker::{BuildResult, NEWEST_MINOR, Outcome};
use std::cell::Cell;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

const BOUND: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Derivation,
    Outputs,
    Serve,
}

const EVERY_WAY: [How; 3] = [How::Derivation, How::Outputs, How::Serve];

/// Builds it, and gives `calls_off` a stream to look for the answer on.
fn build(
    store: &mut Store,
    how: How,
    (drv_path, drv): &(StorePath, Derivation),
    clocks: Clocks<'_>,
    seen: &Cell<Option<UnixStream>>,
) -> Result<BuildResult, BuilderError> {
    let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
    let (mut builder, socket) = match how {
        How::Serve => {
            let (serving, socket) = serve(store, serve_wire::NEWEST_MINOR);
            (Any::Serve(serving.into()), socket)
        }
        _ => {
            let (builder, socket) = store.daemon_and_socket(NEWEST_MINOR, &[]);
            (Any::Daemon(builder.into()), socket)
        }
    };
    seen.set(Some(socket));
    let built = match how {
        How::Outputs => builder.build_outputs(drv_path, &["out".to_owned()].into(), clocks, &mut |_| {}),
        _ => builder.build(drv_path, drv, &inputs, clocks, &mut |_| {}),
    };
    drop(builder);
    seen.set(None);
    built
}

/// Waits until the answer to the build lies there, unread.
fn wait_for_answer(how: How, socket: &UnixStream) {
    let begin = Instant::now();
    let last = b"stla\0\0\0\0";
    let mut piece = vec![0; 1 << 16];
    loop {
        let size = recv(socket.as_raw_fd(), &mut piece, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        let size = size.unwrap_or(0);
        let is_there = match how {
            How::Serve => size > 0,
            // The result stands behind the last message.
            _ => piece[..size].windows(last.len()).any(|word| word == last) && size.is_multiple_of(8),
        };
        if is_there {
            return;
        }
        assert!(begin.elapsed() < BOUND, "no answer by {how:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_build_that_is_called_off_is_given_up_at_once_be_it_silent_or_not() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store_in(directory.path(), root);
        for (name, script) in [("silent", "sleep 300"), ("talks", "while :; do echo on; done")] {
            let drv = store.instantiate(&expression(name, script));
            for how in EVERY_WAY {
                let (looked, at, ran) = (Cell::new(0), Cell::new(None), Cell::new(Duration::ZERO));
                let calls_off = |elapsed: Duration| {
                    looked.set(looked.get() + 1);
                    ran.set(elapsed);
                    at.set(Some(Instant::now()));
                    looked.get() == 3
                };
                let (first, every) = (Duration::from_millis(300), Duration::from_millis(50));
                let review = Some(Review { first, every, calls_off: &calls_off });
                let clocks = Clocks { timeout: 60, review, ..Clocks::default() };
                let error = build(&mut store, how, &drv, clocks, &Cell::default()).unwrap_err();
                let context = format!("{release} {name} {how:?}: {error}");
                assert!(matches!(error, BuilderError::CalledOff), "{context}");
                assert!(!error.is_transport(), "{context}");
                assert_eq!(looked.get(), 3, "{context}");
                assert!(ran.get() >= first + every * 2, "{context}");
                assert!(at.get().unwrap().elapsed() < Duration::from_secs(2), "{context}");
            }
        }
    }
}

#[test]
fn a_build_whose_answer_is_there_is_not_given_up_and_looking_does_not_count_as_its_silence() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store_in(directory.path(), root);
        for how in EVERY_WAY {
            let gate = store.root.join(format!("gate-{how:?}"));
            let script = format!("until [ -e {} ]; do sleep 0.02; done; echo > $out", gate.display());
            let drv = store.instantiate(&expression(&format!("ends-{how:?}"), &script));
            let (socket, looked) = (Cell::new(None::<UnixStream>), Cell::new(0));
            let calls_off = |_: Duration| {
                looked.set(looked.get() + 1);
                fs::write(&gate, "").unwrap();
                let stream = socket.take().unwrap();
                wait_for_answer(how, &stream);
                true
            };
            let (first, every) = (Duration::from_millis(100), Duration::from_millis(100));
            let review = Some(Review { first, every, calls_off: &calls_off });
            let clocks = Clocks { timeout: 60, review, ..Clocks::default() };
            let built = build(&mut store, how, &drv, clocks, &socket);
            let built = built.unwrap_or_else(|error| panic!("{release} {how:?}: {error}"));
            assert_eq!((built.outcome(false), looked.get()), (Outcome::Built, 1), "{release} {how:?}");
        }
    }
}

#[test]
fn the_time_that_looking_takes_is_on_no_clock_of_the_build() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = store_in(directory.path(), None);
    // The far side keeps the clocks of a served build itself.
    for how in [How::Derivation, How::Outputs] {
        let gate = store.root.join(format!("gate-{how:?}"));
        let script = format!("until [ -e {} ]; do sleep 0.02; done; echo > $out", gate.display());
        let drv = store.instantiate(&expression(&format!("slow-{how:?}"), &script));
        let calls_off = |_: Duration| {
            thread::sleep(Duration::from_millis(1500));
            fs::write(&gate, "").unwrap();
            false
        };
        let (first, every) = (Duration::from_millis(100), BOUND);
        let review = Some(Review { first, every, calls_off: &calls_off });
        let clocks = Clocks { max_silent_time: 1, timeout: 60, review, ..Clocks::default() };
        let built = build(&mut store, how, &drv, clocks, &Cell::default());
        assert_eq!(built.unwrap().outcome(false), Outcome::Built, "{how:?}");
    }
}

#[test]
fn nixs_clocks_end_a_build_that_is_looked_at_too() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = store_in(directory.path(), None);
    let review =
        Some(Review { first: Duration::ZERO, every: Duration::from_millis(70), calls_off: &|_| false });
    for (name, script, max_silent_time, timeout) in
        [("silent", "sleep 300", 1, 60), ("talks", "while :; do echo on; sleep 0.01; done", 60, 1)]
    {
        let drv = store.instantiate(&expression(name, script));
        for how in EVERY_WAY {
            let clocks = Clocks { max_silent_time, timeout, review, ..Clocks::default() };
            let ended = build(&mut store, how, &drv, clocks, &Cell::default());
            let is_over = match &ended {
                Ok(result) => how == How::Serve && result.outcome(false) == Outcome::TimedOut,
                Err(BuilderError::Silent(1)) => name == "silent",
                Err(BuilderError::TimedOut(1)) => name == "talks",
                Err(_) => false,
            };
            assert!(is_over, "{name} {how:?}: {ended:?}");
        }
    }
}
