//! Waiting for something to become true, never for time to pass.

use std::{
    thread,
    time::{Duration, Instant},
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
