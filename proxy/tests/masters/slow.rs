//! A master that is at work and slow is not one that hangs.

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use nix_offload_proxy::master::OpenError;

use crate::world::{BOUND, Echo, Trouble, World, gone, wait_until};

/// Has an ssh with a socket to listen on work for three seconds before each look at its connections, as long as there
/// is a file. That is how it goes on a machine with far too much to do.
const BUSY: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void work(void) {
    const char *file = getenv("BUSY_WHILE");
    struct timespec begin, now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    do
        clock_gettime(CLOCK_MONOTONIC, &now);
    while (file && access(file, F_OK) == 0 && now.tv_sec < begin.tv_sec + 3);
}

int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask) {
    struct timespec left = {0}, *given = NULL;
    if (timeout) { left = *timeout; given = &left; }
    if (strcmp(program_invocation_short_name, "ssh") == 0) work();
    return syscall(SYS_ppoll, fds, count, given, mask, 8);
}

int poll(struct pollfd *fds, nfds_t count, int timeout) {
    struct timespec left = {timeout / 1000, timeout % 1000 * 1000000L};
    return ppoll(fds, count, timeout < 0 ? NULL : &left, NULL);
}
"#;

#[test]
fn a_master_that_is_slow_is_not_given_up() {
    let world = World::new();
    let (source, library, flag) = (world.path("busy.c"), world.path("busy.so"), world.path("busy"));
    fs::write(&source, BUSY).unwrap();
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status();
    assert!(compiled.unwrap().success());
    let mut start = world.start_command();
    start.env("LD_PRELOAD", &library).env("BUSY_WHILE", &flag).stdout(Stdio::null());
    assert!(start.status().unwrap().success());
    let endpoint = world.endpoint_of_command();
    let before = world.only_master();
    let master = world.pool.live(&endpoint).unwrap();
    let mut echo = Echo::of(master.open_session("cat", BOUND).unwrap());
    echo.says("before");

    fs::write(&flag, "").unwrap();
    // It wakes up for this, and sees the file.
    let late = master.open_session("true", Duration::from_millis(1500)).map(drop).unwrap_err();
    assert!(late.is_master_lost(), "it does not answer, that is part of the test: {late:?}");
    assert!(!master.hangs());
    let begin = Instant::now();
    let same = world.pool.start(&endpoint, Duration::from_secs(1), "true").unwrap();
    let took = begin.elapsed();
    assert_eq!((same.control_path(), same.start_time()), (master.control_path(), None));
    assert!(took < Duration::from_secs(8), "{took:?}");
    // Whoever was asked in vain leaves it alone, and others get another one.
    let other = crate::world::session_on_any(&world.pool, &endpoint, "true", Duration::from_millis(1500));
    assert_ne!(other.unwrap().0.control_path(), master.control_path());
    assert!(!gone(before.pid));
    fs::remove_file(&flag).unwrap();

    echo.says("after");
    echo.ends();
    wait_until("it answers again", || !master.hangs() && world.pool.list().unwrap().iter().all(|m| m.alive));
    assert!(!gone(before.pid));
    assert_eq!(world.logins(), 2);
}

#[test]
fn a_first_command_that_takes_its_time_leaves_enough_for_the_stream() {
    let world = World::new();
    let bound = Duration::from_secs(8);
    let begin = Instant::now();
    let master = world.pool.start(&world.endpoint(), bound, "exec sleep 30").unwrap();
    assert!(begin.elapsed() < bound - Duration::from_secs(1), "{:?}", begin.elapsed());
    world.pool.stop(&world.only_master()).unwrap();

    // The same for who goes on with it.
    let deadline = Instant::now() + bound;
    let opened = world.pool.with_master(
        &world.endpoint(),
        deadline,
        "exec sleep 30",
        |master| {
            let left = deadline.saturating_duration_since(Instant::now());
            master.open_session("cat", left).map_err(Trouble::Open)
        },
        why,
    );
    Echo::of(opened.unwrap()).ends();
    assert_eq!(world.logins(), 2);
    let (same, _) = crate::world::session_on_any(&world.pool, &world.endpoint(), "true", BOUND).unwrap();
    assert_eq!(same.control_path(), master.control_path());
}

#[test]
fn a_master_is_not_left_alone_by_who_had_no_time_to_ask_it() {
    let world = World::new();
    let master = world.start();
    let ask = |deadline: Duration, bound: Duration| {
        let stopped = world.sshd_sessions();
        stopped.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
        let asked = world.pool.with_master(
            &world.endpoint(),
            Instant::now() + deadline,
            "true",
            |master| master.open_session("true", bound).map(drop).map_err(Trouble::Open),
            why,
        );
        stopped.iter().for_each(|pid| kill(*pid, Signal::SIGCONT).unwrap());
        asked
    };
    // With less than a second left nobody makes another one.
    let late = ask(Duration::from_millis(900), Duration::from_millis(100)).unwrap_err();
    assert!(matches!(late, Trouble::Open(OpenError::TimedOut { master_answers: true, .. })), "{late:?}");
    let (same, _) = crate::world::session_on_any(&world.pool, &world.endpoint(), "true", BOUND).unwrap();
    assert_eq!((same.control_path(), world.logins()), (master.control_path(), 1));
    // Who had the time is believed.
    ask(Duration::from_millis(900), Duration::from_millis(600)).unwrap_err();
    let (other, _) = crate::world::session_on_any(&world.pool, &world.endpoint(), "true", BOUND).unwrap();
    assert_ne!(other.control_path(), master.control_path());
}

fn why(error: &Trouble) -> Option<&OpenError> {
    match error {
        Trouble::Open(error) => Some(error),
        Trouble::Start(_) => None,
    }
}
