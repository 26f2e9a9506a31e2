//! What is known of a machine at the moment of choosing: the nouns that samplers fill in and the rule reads.
//!
//! Owns their meaning and units. What is not known is `None`, never 0. Must never measure anything itself.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, SystemTime};

/// How busy a machine is with builds of this client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Slots taken, of the machine's `max_jobs`. From Nix's lock files, so builds of a stock hook beside ours count.
    pub taken: u64,
}

/// What is known of a machine besides its line in the list. [`Known::ready`] is a machine of which nothing is known but
/// its taken slots.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// Slots that this client has taken there.
    pub load: Load,
    /// What the machine said of itself when it was last looked at.
    pub sample: Option<Sample>,
    /// What would have to travel, and how fast that is.
    pub link: Link,
    /// Seconds until one of its slots is free for this build, if all are taken and that can be estimated: from the times
    /// at which the running builds began, how long builds take, and how many wait already, as if this one were the last
    /// of them (see [`slot_wait`](super::estimate::slot_wait)). Not read while a slot is free.
    pub slot_wait: Option<f64>,
    /// Builds of this client that wait for a slot there and come before this one. What they wait for is not free.
    pub waiting: u64,
    /// Whether it can be reached.
    pub health: Health,
    /// Whether somebody has taken it out of service.
    pub withheld: Option<Withheld>,
}

/// What a machine said of its load and of what it has left, at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// When. All but the number of cores is forgotten when it is older than [`Rules::stale_after`](super::Rules).
    pub at: SystemTime,
    /// Its processors, as the scheduler counts them.
    pub cores: Option<u32>,
    /// Its load average over one minute: tasks that run or wait to run.
    pub load_average: Option<f64>,
    /// How much of that load average is due to builds of this client. If it is not known, it is taken for as many
    /// as there are slots taken now.
    pub own_load: Option<f64>,
    /// The share of the last ten seconds in which some task waited for a processor, in percent (`some avg10` of
    /// `/proc/pressure/cpu`).
    pub cpu_pressure: Option<f64>,
    /// Bytes of memory that can be had without swapping (`MemAvailable`).
    pub memory_free: Option<u64>,
    /// Free bytes on the file system of its store.
    pub disk_free: Option<u64>,
    /// Free inodes there; `None` also for file systems that do not count them.
    pub inodes_free: Option<u64>,
    /// The machine wants no builds at present, with the first line of its inhibit file.
    pub inhibited: Option<String>,
}

/// What a build's inputs cost to bring there.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Link {
    /// Bytes of the build's input closure that the machine does not have.
    pub missing: Option<u64>,
    /// Bytes that this client is still sending there for other builds.
    pub backlog: Option<u64>,
    /// Bytes per second, as measured in earlier transfers.
    pub bandwidth: Option<f64>,
    /// Seconds of one round trip.
    pub round_trip: Option<f64>,
}

/// Whether a machine can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Health {
    /// Nothing speaks against it.
    #[default]
    Well,
    /// It failed a short while ago. It is left alone until that time while there is another machine or Nix could build by
    /// itself, and after that time while there is another machine: memory alone never leaves a build to nobody.
    CoolDown {
        /// When it may be tried again; none if that was before now, and nobody has seen yet that it is well.
        until: Option<SystemTime>,
        /// How it failed.
        why: String,
    },
    /// It sleeps and has been told to wake up. It gets nothing yet, but is worth waiting for.
    Waking,
    /// It is not known to answer, and Nix has been kept waiting for answers for long enough, or it is being asked already. It
    /// gets nothing yet.
    Unasked,
    /// It failed for this very request; the text says how.
    Failed(String),
    /// It cannot be used for this, as if its store URI is of a kind that cannot be reached; the text says why.
    Unreachable(String),
    /// The client has no network. It gets nothing, and will be well when there is one again.
    CutOff,
}

/// A machine that somebody took out of service. It gets nothing new, even if it is the last one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Withheld {
    /// In which way.
    pub how: Withholding,
    /// When it is over; `None` if somebody has to say so.
    pub until: Option<SystemTime>,
    /// What was given as the reason; may be empty.
    pub why: String,
}

/// In which way a machine is out of service. Either way it gets nothing new, and what runs there is left to finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withholding {
    /// For a while: builds that nobody else can do wait for it to come back.
    Drained,
    /// It is not to be counted on: builds that nobody else can do are told so at once.
    Disabled,
}

/// What is known of the build itself. Nothing, by default.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// Seconds that it takes on an idle machine of speed factor 1: an average over builds of the same name.
    pub duration: Option<f64>,
    /// The same of an average build of this client.
    pub usual: Option<f64>,
    /// Bytes of its outputs: an average over builds of the same name.
    pub output: Option<u64>,
    /// Since when it waits: when Nix first asked for it, if that was before, or when it lost the machine that it ran on. What
    /// is held back is held to a bound by it, so it has to outlive the hook process where the answer was `postpone`.
    pub waiting_since: Option<SystemTime>,
    /// Since when obstacles that may pass have kept it from every machine, without a pause
    /// ([`Decision::obstructed_since`](super::Decision::obstructed_since)). Waiting for that has a bound too, and time
    /// spent in a queue is not to count.
    pub obstructed_since: Option<SystemTime>,
    /// Since when no machine was known to answer, for this build or those before it in the same process, without a pause
    /// ([`Decision::silent_since`](super::Decision::silent_since)).
    pub silent_since: Option<SystemTime>,
}

impl Known {
    /// A machine of which nothing is known but its taken slots.
    pub fn ready(load: Load) -> Self {
        Self {
            load,
            sample: None,
            link: Link::default(),
            slot_wait: None,
            waiting: 0,
            health: Health::Well,
            withheld: None,
        }
    }

    /// The same with another health.
    pub fn with_health(self, health: Health) -> Self {
        Self { health, ..self }
    }
}

impl Sample {
    /// A sample that says nothing yet.
    pub fn empty(at: SystemTime) -> Self {
        Self {
            at,
            cores: None,
            load_average: None,
            own_load: None,
            cpu_pressure: None,
            memory_free: None,
            disk_free: None,
            inodes_free: None,
            inhibited: None,
        }
    }

    /// Whether it is too old, or from a time that is still to come: then the clock was set back, and its age is not known.
    pub fn is_stale(&self, now: SystemTime, after: Duration) -> bool {
        // A decision may have begun before it was written.
        const AHEAD: Duration = Duration::from_secs(5);
        match now.duration_since(self.at) {
            Ok(age) => age > after,
            Err(future) => future.duration() > AHEAD,
        }
    }
}

impl Withheld {
    /// Whether it is in force.
    pub fn holds(&self, now: SystemTime) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    #[test]
    fn a_sample_is_believed_neither_when_it_is_old_nor_when_it_is_still_to_come() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let is_stale = |at: i64| {
            let at = UNIX_EPOCH + Duration::from_secs((1_000_000 + at) as u64);
            Sample::empty(at).is_stale(now, Duration::from_secs(60))
        };
        for (at, expected) in [(-61, true), (-60, false), (0, false), (4, false), (6, true), (3600, true)] {
            assert_eq!(is_stale(at), expected, "{at}");
        }
    }
}
