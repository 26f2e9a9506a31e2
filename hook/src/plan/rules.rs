//! The settings of the choice.
//!
//! Owns their defaults and units. Must never read them from anywhere.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::Duration;

/// The settings of the choice. The defaults need no configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// What the client's own machine is used for.
    pub policy: Policy,
    /// The client's own speed factor, for [`Policy::Cost`]; above 0.
    pub local_speed_factor: f64,
    /// Slots that a derivation takes which requires the feature `big-parallel`. At least 1; a machine with fewer gives
    /// all it has.
    pub big_parallel_slots: u64,
    /// Builds of each user that may be accepted to wait for one set of machines. Each costs a process of about 1 MiB; those above are
    /// postponed, for which Nix has no better clock than asking again every 5 seconds.
    pub max_waiting: u64,
    /// What a machine must have left to get a build.
    pub floors: Floors,
    /// Seconds that a build takes at speed factor 1 when nothing is known of it.
    pub typical_duration: f64,
    /// Bytes per second to a machine whose bandwidth was never measured, once anything is measured at all.
    pub typical_bandwidth: f64,
    /// How old a sample may be to be believed; see [`stale_after`].
    pub stale_after: Duration,
    /// Whether machines are asked at all. Otherwise nobody would ever say that one is no longer short of something.
    pub looks_again: bool,
    /// How long a build may be held back for a machine that is full but would be done sooner, or for as many free slots
    /// as it weighs. Then it takes what is free.
    pub hold_back: Duration,
    /// Whether a build that runs may be begun anew on a machine where it would be done much sooner (see
    /// [`moving`](super::moving)).
    pub begin_anew: bool,
    /// How long a build that cannot be built locally waits for machines that are short of something, inhibited or
    /// out of service for a time. Then Nix is told that nobody will do it.
    pub obstacle_patience: Duration,
}

/// What the client's own machine is used for. It is used only where Nix can build locally and has a slot free for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Only when no machine has a slot free, as with the stock hook.
    #[default]
    RemoteFirst,
    /// Always.
    LocalFirst,
    /// When the build would be done here sooner than anywhere else.
    Cost,
}

/// What a machine must have left to get a build. What it did not tell is not held against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Floors {
    /// Free bytes on the file system of its store.
    pub disk: u64,
    /// Free inodes there.
    pub inodes: u64,
    /// Bytes of memory that can be had.
    pub memory: u64,
}

/// How many times as far apart samples are where one needs a session that builds may need.
pub const SPARING: u32 = 6;

/// How old a sample may be to be believed if machines are asked that often: at least a minute, and long enough for one to be
/// missed.
pub fn stale_after(every: Duration) -> Duration {
    const LEAST: Duration = Duration::from_secs(60);
    (every * SPARING * 2).max(LEAST)
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            local_speed_factor: 1.0,
            big_parallel_slots: 1,
            max_waiting: 256,
            floors: Floors::default(),
            typical_duration: 30.0,
            typical_bandwidth: 50e6,
            stale_after: Duration::from_secs(60),
            looks_again: true,
            hold_back: Duration::from_secs(300),
            begin_anew: true,
            obstacle_patience: Duration::from_secs(600),
        }
    }
}

impl Default for Floors {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Self { disk: 1024 * MIB, inodes: 10_000, memory: 256 * MIB }
    }
}
