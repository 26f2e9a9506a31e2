//! Whose turn it is when a slot is free and several builds wait for it.
//!
//! Owns the order of those that wait. Must never know how they wait or how they are woken.
//!
//! Between users: the one with the fewest slots. Between builds of one user: first come, first served, where each counts
//! as if it had come earlier by a part of the chain of builds that waits for it. So nobody starves: a build can be
//! overtaken only by those that come soon after it, never by later ones. Where no chain is known it is plain first come,
//! first served.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

/// A second of the chain behind a build counts as so many seconds of waiting.
const HEAD_START: f64 = 10.0;

/// And all of it as this at most: whoever waits for longer is overtaken by nobody new.
pub const LONGEST_HEAD_START: Duration = Duration::from_secs(4 * 3600);

/// Where the first of those that wait is held back for a machine that is full, others may pass: so many are asked about
/// in their order until one takes what is free.
pub const LET_PASS: usize = 64;

/// A build that waits for a slot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Waiting {
    /// Whose build it is, by user number.
    pub user: u32,
    /// Slots that builds of this user have now on the machines that are waited for.
    pub slots: u64,
    /// When it began to wait.
    pub since: SystemTime,
    /// Seconds of the longest chain of builds that waits for it, its own included ([`tails`](super::chain::tails)), if
    /// that is known.
    pub tail: Option<f64>,
}

impl Waiting {
    /// The time at which it counts as having come: the earlier, the sooner its turn. It does not change while it waits.
    pub fn ticket(&self) -> SystemTime {
        let tail = self.tail.filter(|tail| *tail > 0.0).unwrap_or(0.0);
        let longest = LONGEST_HEAD_START.as_secs_f64();
        let start = Duration::from_secs_f64((HEAD_START * tail).min(longest));
        self.since.checked_sub(start).unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

/// In which order they are served, by their places in `waiting`, as if a slot became free for one after the other.
pub fn order(waiting: &[Waiting]) -> Vec<usize> {
    let mut queues: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    let mut slots: BTreeMap<u32, u64> = BTreeMap::new();
    for (index, one) in waiting.iter().enumerate() {
        queues.entry(one.user).or_default().push(index);
        let slots = slots.entry(one.user).or_default();
        *slots = one.slots.max(*slots);
    }
    let key = |index: usize| (waiting[index].ticket(), waiting[index].since, index);
    for queue in queues.values_mut() {
        // The next one stands at the end.
        queue.sort_unstable_by_key(|index| std::cmp::Reverse(key(*index)));
    }
    let mut order = Vec::with_capacity(waiting.len());
    loop {
        let next = queues.iter().filter_map(|(user, queue)| Some((*user, *queue.last()?)));
        let Some((user, index)) = next.min_by_key(|(user, index)| (slots.get(user).copied(), key(*index)))
        else {
            return order;
        };
        queues.entry(user).or_default().pop();
        *slots.entry(user).or_default() += 1;
        order.push(index);
    }
}

/// Whose turn it is. `None` if nobody waits.
pub fn turn(waiting: &[Waiting]) -> Option<usize> {
    order(waiting).first().copied()
}
