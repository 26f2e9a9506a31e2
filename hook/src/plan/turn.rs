//! Whose turn it is when a slot is free and several builds wait for it.
//!
//! Owns the order of those that wait. Must never know how they wait or how they are woken.
//!
//! First come, first served, where each counts as if it had come earlier by a part of the chain of builds that waits for
//! it. So nobody starves: a build can be overtaken only by those that come soon after it, never by later ones. Where no
//! chain is known it is plain first come, first served.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, SystemTime};

/// How many seconds of waiting a second of the chain behind a build counts as.
const HEAD_START: f64 = 5.0;

/// And all of it as this at most: whoever waits for longer is overtaken by nobody new.
pub const LONGEST_HEAD_START: Duration = Duration::from_secs(4 * 3600);

/// The time at which a build that waits counts as having come: the earlier, the sooner its turn. It does not change while
/// it waits.
///
/// `since` is when it began to wait. `tail` are the seconds of the longest chain of builds that waits for it, its own
/// included ([`tails`](super::chain::tails)), if that is known.
pub fn ticket(since: SystemTime, tail: Option<f64>) -> SystemTime {
    let tail = tail.filter(|tail| *tail > 0.0).unwrap_or(0.0);
    let longest = LONGEST_HEAD_START.as_secs_f64();
    let start = Duration::from_secs_f64((HEAD_START * tail).min(longest));
    since.checked_sub(start).unwrap_or(SystemTime::UNIX_EPOCH)
}
