//! What is decided about a request: the answer, and for every machine its place and the reasons.
//!
//! Owns the nouns and the sentence for each reason. Must never decide.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::estimate::Estimate;
use super::known::{Withheld, Withholding};
use std::collections::BTreeSet;
use std::fmt;
use std::time::SystemTime;

/// What to answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Build it on the machine of this index.
    Accept(usize),
    /// It cannot be built locally at any time, and these machines are worth waiting for: accept it and wait for a slot,
    /// unless as many as [`Rules::max_waiting`](super::Rules) do so already.
    Wait(Vec<usize>),
    /// Ask again later: these machines are worth waiting for, but Nix may have a local slot for it sooner, or it may
    /// take long.
    Postpone(Vec<usize>),
    /// Not to be built by any machine now.
    Decline,
}

/// Why the answer is what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Because {
    /// The machine is the best of those with a free slot.
    Best,
    /// A machine that is full would still be done sooner than any with a free slot.
    HeldBack,
    /// All suitable machines are full or about to wake up.
    Full,
    /// Of no suitable machine it is known that it answers, and Nix is not to wait until one has.
    Silent,
    /// All suitable machines are short of something, inhibited, out of service for a time or cut off.
    Obstacles,
    /// The same, for longer than is waited for that.
    ObstaclesTooLong,
    /// What Nix itself does (`builtin:fetchurl`, for instance) is not worth sending away.
    Builtin,
    /// The policy prefers this machine, which has a slot free.
    LocalFirst,
    /// It would be done sooner here.
    LocalSooner,
    /// All suitable machines are full, and this one has a slot free.
    LocalFree,
    /// No machine will do.
    NothingFits,
}

impl Because {
    /// Whether it is to be done here whatever other machines there are, those included that we do not speak to.
    pub fn prefers_here(self) -> bool {
        matches!(self, Self::Builtin | Self::LocalFirst | Self::LocalSooner)
    }
}

/// How the machines were put in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// By estimated finish.
    Estimate,
    /// As the stock hook of Nix 2.20 and newer does, since nothing is measured of any suitable machine.
    Stock,
}

/// A verdict with the reasons for it.
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct Decision {
    /// What to answer.
    pub verdict: Verdict,
    /// Why.
    pub because: Because,
    /// How machines were put in order.
    pub order: Order,
    /// Slots to take on the chosen machine.
    pub slots: u64,
    /// One entry for each machine, in the order of the list.
    pub standings: Vec<Standing>,
    /// When the client's own machine would be done, where the policy asks that.
    pub here: Option<Estimate>,
    /// When it was decided; reasons with times are told from then.
    pub at: SystemTime,
}

impl Decision {
    /// Machines that do not get the build, with the reason, in the order of the list.
    pub fn refusals(&self) -> impl Iterator<Item = (usize, &Refusal)> {
        let standings = self.standings.iter().enumerate();
        standings.filter_map(|(index, standing)| Some((index, standing.refusal.as_ref()?)))
    }

    /// Machines with a free slot that would have been next, the better ones first.
    pub fn outranked(&self) -> Vec<usize> {
        let is_outranked =
            |index: &usize| matches!(self.standings[*index].refusal, Some(Refusal::Outranked { .. }));
        let mut outranked: Vec<usize> = (0..self.standings.len()).filter(is_outranked).collect();
        outranked.sort_by_key(|index| self.standings[*index].place);
        outranked
    }

    /// Since when obstacles that may pass have kept the build from every machine, if it was `before` until now: to be told to
    /// the next decision about it ([`Work::obstructed_since`](super::Work)).
    pub fn obstructed_since(&self, before: Option<SystemTime>) -> Option<SystemTime> {
        let is_obstructed = matches!(self.because, Because::Obstacles | Because::ObstaclesTooLong);
        is_obstructed.then(|| before.unwrap_or(self.at))
    }

    /// Since when no machine was known to answer, if it was `before` until now: to be told to the next decision
    /// ([`Work::silent_since`](super::Work)).
    pub fn silent_since(&self, before: Option<SystemTime>) -> Option<SystemTime> {
        (self.because == Because::Silent).then(|| before.unwrap_or(self.at))
    }

    /// How many seconds of an idle machine of speed factor 1 a second of this machine is worth to the build.
    pub fn pace(&self, index: usize) -> f64 {
        let estimate = self.standings.get(index).and_then(|standing| standing.estimate.as_ref());
        estimate.map_or(1.0, |estimate| estimate.terms.speed * estimate.terms.share)
    }

    /// Slots that the build would take on this machine.
    pub fn weight(&self, index: usize) -> u64 {
        let estimate = self.standings.get(index).and_then(|standing| standing.estimate.as_ref());
        estimate.map_or(1, |estimate| estimate.terms.weight)
    }
}

/// What becomes of one machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    /// Its place from 1 among the machines that could do it, now or soon.
    pub place: Option<usize>,
    /// When it would be done, if it could do it.
    pub estimate: Option<Estimate>,
    /// Why it does not get the build; none for the one that does.
    pub refusal: Option<Refusal>,
}

/// Why a machine does not get a build.
#[derive(Debug, Clone, PartialEq)]
pub enum Refusal {
    /// It does not build for the derivation's system.
    System,
    /// It lacks these of the required features.
    MissingFeatures(BTreeSet<String>),
    /// It insists on these features, which the derivation does not require.
    MandatoryFeatures(BTreeSet<String>),
    /// Too many of its slots are taken.
    Full {
        /// Slots taken.
        taken: u64,
        /// Slots it has.
        slots: u64,
        /// Slots that the build needs.
        needed: u64,
        /// Builds that wait for a slot before this one.
        waiting: u64,
    },
    /// It is being woken.
    Waking,
    /// It is not known to answer, and it was not to be waited for.
    Unasked,
    /// It failed when it was last tried; the text says how.
    Failed(String),
    /// It failed a short while ago, and another one will do, or Nix itself.
    CoolDown {
        /// When it may be tried again.
        until: Option<SystemTime>,
        /// How it failed.
        why: String,
    },
    /// It cannot be used for this, as if its store URI is of a kind that cannot be reached; the text says why.
    Unreachable(String),
    /// This client has no network.
    CutOff,
    /// Somebody took it out of service.
    Withheld(Withheld),
    /// It has less than it should have of this.
    Short {
        /// What it is short of.
        of: Resource,
        /// What is left.
        left: u64,
        /// What it should have at least.
        floor: u64,
    },
    /// It has an inhibit file, which says this.
    Inhibited(String),
    /// It said so when it was last looked at, which is too long ago to be believed of anything else. It is to be asked
    /// before it gets a build.
    Recalled {
        /// What kept builds from it then: [`Refusal::Short`] or [`Refusal::Inhibited`].
        what: Box<Refusal>,
        /// When that was.
        at: SystemTime,
    },
    /// Another one was better.
    Outranked {
        /// Index of the best one.
        by: usize,
        /// How many seconds later it would be done than the best one; none if places follow the stock hook's rule.
        later: Option<f64>,
    },
    /// It is the best one with a free slot, but one that is full would still be done sooner.
    HeldBack,
    /// No machine was to get it: the client's own machine does it.
    Local,
}

/// What a machine may be short of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Bytes on the file system of its store.
    Disk,
    /// Inodes there.
    Inodes,
    /// Bytes of memory.
    Memory,
}

impl Refusal {
    /// Whether it may pass without anybody touching the list of machines, and does not depend on other builds of ours.
    pub fn passes(&self) -> bool {
        match self {
            Self::Short { .. } | Self::Inhibited(_) | Self::Recalled { .. } | Self::CutOff => true,
            Self::Withheld(withheld) => withheld.how == Withholding::Drained,
            _ => false,
        }
    }

    /// What helps, if it is known. One line.
    pub fn cure(&self) -> Option<&str> {
        match self {
            Self::Failed(why) | Self::CoolDown { why, .. } => why.lines().nth(1).map(str::trim),
            _ => None,
        }
    }

    /// The reason as a part of a sentence. `now` is for times, which are told from then.
    pub fn describe(&self, now: SystemTime) -> String {
        let join = |set: &BTreeSet<String>| set.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        match self {
            Self::System => "does not build for this system".into(),
            Self::MissingFeatures(set) => format!("lacks the features [{}]", join(set)),
            Self::MandatoryFeatures(set) => {
                format!("builds only derivations that require the features [{}]", join(set))
            }
            Self::Full { slots: 0, .. } => "has no slots (its maximum of jobs is 0)".into(),
            Self::Full { taken, slots, waiting, .. } if *waiting > 0 => {
                let wait = if *waiting == 1 { "build waits" } else { "builds wait" };
                format!("full: {taken} of {slots} slots taken, and {waiting} {wait} for one")
            }
            Self::Full { taken, slots, needed, .. } if *needed > 1 => {
                format!("full: {taken} of {slots} slots taken, {needed} needed")
            }
            Self::Full { taken, slots, .. } => format!("full: {taken} of {slots} slots taken"),
            Self::Waking => "is being woken".into(),
            Self::Unasked => "is not known to answer, and Nix has waited for answers for long enough".into(),
            Self::Failed(why) => format!("failed: {}", first_line(why)),
            Self::CoolDown { until, why } => match until.and_then(|until| seconds_until(until, now)) {
                Some(seconds) => {
                    format!("failed: {}; left alone for {}", first_line(why), span(seconds))
                }
                None => format!("failed: {}", first_line(why)),
            },
            Self::Unreachable(why) => format!("cannot be used: {why}"),
            Self::CutOff => "cannot be used: this client has no network".into(),
            Self::Withheld(Withheld { how, until, why }) => {
                let how = match how {
                    Withholding::Drained => "drained",
                    Withholding::Disabled => "disabled",
                };
                let until = until.and_then(|until| seconds_until(until, now));
                let until = until.map(|seconds| format!(" for {}", span(seconds))).unwrap_or_default();
                let why = if why.is_empty() { String::new() } else { format!(": {why}") };
                format!("{how}{until}{why}")
            }
            Self::Short { of, left, floor } => {
                let [left, floor] = [left, floor].map(|number| match of {
                    Resource::Inodes => format!("{number} inodes"),
                    Resource::Disk | Resource::Memory => bytes(*number as f64),
                });
                format!("short of {of}: {left} left, the minimum is {floor}")
            }
            Self::Inhibited(why) if why.is_empty() => "has an inhibit file".into(),
            Self::Inhibited(why) => format!("has an inhibit file: {why}"),
            Self::Recalled { what, at } => {
                let ago = now.duration_since(*at).unwrap_or_default().as_secs_f64();
                format!("{}; that was {} ago, it is to be asked again", what.describe(now), span(ago))
            }
            Self::Outranked { later: Some(later), .. } if *later >= 0.05 => {
                format!("would be done {} later than the best one", span(*later))
            }
            Self::Outranked { .. } => "another machine is less loaded, faster or earlier in the list".into(),
            Self::HeldBack => "one that is full would still be done sooner".into(),
            Self::Local => "it is built here".into(),
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "disk",
            Self::Inodes => "inodes",
            Self::Memory => "memory",
        })
    }
}

/// What comes behind it is the cure.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn seconds_until(until: SystemTime, now: SystemTime) -> Option<f64> {
    until.duration_since(now).ok().map(|left| left.as_secs_f64())
}

/// Seconds as people read them: `0.3 s`, `42 s`, `7 min`, `3.2 h`.
pub(super) fn span(seconds: f64) -> String {
    match seconds {
        s if s < 9.95 => format!("{s:.1} s"),
        s if s < 119.5 => format!("{s:.0} s"),
        s if s < 7170.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Bytes as people read them, in powers of 1024.
pub(super) fn bytes(number: f64) -> String {
    let units = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| number >= *unit as f64) {
        Some((unit, name)) => format!("{:.1} {name}", number / unit as f64),
        None => format!("{number:.0} B"),
    }
}
