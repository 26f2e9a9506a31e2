//! Waiting for something to become true, never for time to pass.

use std::{
    process::Child,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::wait::{Id, WaitPidFlag, waitid},
    unistd::Pid,
};

/// The pauses between two questions, at first and at last.
const SHORTEST: Duration = Duration::from_micros(300);
const LONGEST: Duration = Duration::from_millis(5);

/// Asks every few milliseconds, at first more often, until `question` says yes; panics with `what` after `limit`.
/// Returns how long it took.
pub fn wait_until(what: &str, limit: Duration, mut question: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !question() {
        assert!(start.elapsed() < limit, "still not so after {limit:?}: {what}");
        thread::sleep((start.elapsed() / 16).clamp(SHORTEST, LONGEST));
    }
    start.elapsed()
}

/// Waits for the end of a process, no longer than `limit`, and says whether it has come. The process is left to be reaped.
pub(crate) fn wait_for_end(child: &mut Child, limit: Duration) -> bool {
    if matches!(child.try_wait(), Ok(Some(_))) {
        return true;
    }
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let (tell, hear) = mpsc::channel();
    thread::spawn(move || {
        while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
        // Nobody listens any more after the limit.
        let _ = tell.send(());
    });
    hear.recv_timeout(limit).is_ok()
}
