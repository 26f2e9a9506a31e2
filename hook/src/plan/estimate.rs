//! When a machine would be done with a build: the arithmetic of the choice, with every term kept.
//!
//! Owns the formula. Must never know what the estimate is used for.
//!
//! ```text
//! total    = wait + transfer + build + fetch                                    seconds
//! wait     = until a slot is free; 0 with a free slot
//! transfer = round trip + (missing + backlog) / bandwidth; 0 if nothing is missing
//! build    = duration / (speed factor * share)
//! fetch    = output / bandwidth
//! share    = min(1, cores / (foreign + own + weight))        of a processor, for each task
//! foreign  = max(0, tasks - own tasks at the time of the sample)
//! tasks    = max(p * cores, min(load average, cores + p * load average))        p = cpu pressure / 100
//! ```
//!
//! Builds of this client count as one task for each slot, whether the sample has seen them yet or not; all other tasks
//! are foreign. The load average lags a minute behind, pressure ten seconds. So pressure corrects it: where nobody waits
//! for a processor there cannot be more tasks than processors, and where somebody waits for half of the time there must
//! be as many for half of the time.
//!
//! What is not known is assumed, and says so in its [`Figure`]: as many cores as slots, no foreign tasks, as many
//! missing bytes as the other machine that lacks most, the duration of an average build, and what [`Rules`] say.
//!
//! More load, more pressure, more bytes, fewer cores, less speed or bandwidth never make an estimate better.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::known::{Known, Sample, Work};
use super::machine::Machine;
use super::rules::Rules;
use std::time::SystemTime;

/// A number that an estimate is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figure {
    /// The number.
    pub value: f64,
    /// Whether it was measured. Otherwise it is assumed.
    pub is_known: bool,
}

impl Figure {
    fn of(known: Option<f64>, assumed: f64) -> Self {
        match known.filter(|value| value.is_finite() && *value >= 0.0) {
            Some(value) => Self { value, is_known: true },
            None => Self { value: assumed, is_known: false },
        }
    }
}

/// When a machine would be done with a build, and the terms of that.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// Seconds from now until the outputs are here.
    pub total: f64,
    /// Seconds until a slot is free.
    pub wait: f64,
    /// Seconds until the inputs are there.
    pub transfer: f64,
    /// Seconds that the build takes there.
    pub build: f64,
    /// Seconds until the outputs are here, from the end of the build.
    pub fetch: f64,
    /// What the seconds above are made of.
    pub terms: Terms,
}

/// What an estimate is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Terms {
    /// Seconds of the build on an idle machine of speed factor 1.
    pub duration: Figure,
    /// The machine's speed factor.
    pub speed: f64,
    /// The share of a processor that each task gets, from 0 (excluded) to 1.
    pub share: f64,
    /// Its processors.
    pub cores: Figure,
    /// Tasks of others.
    pub foreign: Figure,
    /// All tasks that run or wait to run, as far as the sample tells; builds that began since then are not among them.
    pub tasks: Option<f64>,
    /// Slots that builds of this client have there.
    pub own: u64,
    /// Slots that this build would have.
    pub weight: u64,
    /// Bytes that it lacks. Not known of any machine: assumed to be 0 for all.
    pub missing: Figure,
    /// Bytes on their way there for other builds.
    pub backlog: Figure,
    /// Bytes per second.
    pub bandwidth: Figure,
    /// Seconds of one round trip.
    pub round_trip: Figure,
    /// Bytes of the outputs. Not known: 0, the same for all machines.
    pub output: Figure,
}

/// What the estimate of one machine needs besides what is known of it.
#[derive(Debug, Clone, Copy)]
pub struct Basis<'a> {
    /// The settings.
    pub rules: &'a Rules,
    /// What is known of the build.
    pub work: &'a Work,
    /// The time.
    pub now: SystemTime,
    /// Bytes that a machine lacks of which that is not known.
    pub missing: Option<u64>,
}

/// Whether anything is measured of the machine that bears on how soon it would be done. If that is so for no machine,
/// estimates are all guesses, and the choice is that of the stock hook of Nix 2.20 and newer.
pub fn is_measured(known: &Known, rules: &Rules, now: SystemTime) -> bool {
    known.link.missing.is_some()
        || known.sample.as_ref().is_some_and(|sample| {
            let has_load = sample.load_average.is_some() || sample.cpu_pressure.is_some();
            sample.cores.is_some() || (has_load && !sample.is_stale(now, rules.stale_after))
        })
}

/// When the machine would be done with a build that takes `weight` of its slots.
pub fn estimate(machine: &Machine, known: &Known, weight: u64, basis: &Basis<'_>) -> Estimate {
    let Basis { rules, work, now, missing } = *basis;
    let own = known.load.taken;
    let cores = Figure::of(
        known.sample.as_ref().and_then(|sample| sample.cores).map(|cores| f64::from(cores.max(1))),
        machine.max_jobs.max(1) as f64,
    );
    let fresh = known.sample.as_ref().filter(|sample| !sample.is_stale(now, rules.stale_after));
    let tasks = fresh.and_then(|sample| tasks(sample, cores.value));
    let foreign = Figure::of(fresh.zip(tasks).map(|(sample, tasks)| foreign(sample, tasks, own)), 0.0);
    let speed = f64::from(machine.speed_factor);
    let share = share(cores.value, foreign.value + (own + weight) as f64);
    let duration = Figure::of(work.duration, work.usual.unwrap_or(rules.typical_duration));
    let build = duration.value / (speed * share);

    let link = &known.link;
    let bytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
    let lacking = Figure::of(bytes(link.missing), missing.unwrap_or(0) as f64);
    let backlog = Figure::of(bytes(link.backlog), 0.0);
    let bandwidth =
        Figure::of(link.bandwidth.filter(|bandwidth| *bandwidth > 0.0), rules.typical_bandwidth.max(1.0));
    let round_trip = Figure::of(link.round_trip, 0.0);
    let transfer = if lacking.value == 0.0 {
        0.0
    } else {
        round_trip.value + (lacking.value + backlog.value) / bandwidth.value
    };
    let output = Figure::of(bytes(work.output), 0.0);
    let fetch = output.value / bandwidth.value;

    let is_full = own + weight > machine.max_jobs || known.waiting > 0;
    let wait = known.slot_wait.filter(|_| is_full).unwrap_or(0.0).max(0.0);
    Estimate {
        total: wait + transfer + build + fetch,
        wait,
        transfer,
        build,
        fetch,
        terms: Terms {
            duration,
            speed,
            share,
            cores,
            foreign,
            tasks,
            own,
            weight,
            missing: lacking,
            backlog,
            bandwidth,
            round_trip,
            output,
        },
    }
}

/// When a build would be done on the client's own machine. All its tasks count as foreign; nothing travels.
pub fn estimate_here(sample: Option<&Sample>, slots: u64, basis: &Basis<'_>) -> Estimate {
    let Basis { rules, work, now, .. } = *basis;
    let cores = Figure::of(
        sample.and_then(|sample| sample.cores).map(|cores| f64::from(cores.max(1))),
        slots.max(1) as f64,
    );
    let fresh = sample.filter(|sample| !sample.is_stale(now, rules.stale_after));
    let tasks = fresh.and_then(|sample| tasks(sample, cores.value));
    let foreign = Figure::of(tasks, 0.0);
    let share = share(cores.value, foreign.value + 1.0);
    let speed = rules.local_speed_factor;
    let duration = Figure::of(work.duration, work.usual.unwrap_or(rules.typical_duration));
    let build = duration.value / (speed * share);
    let nothing = Figure { value: 0.0, is_known: true };
    Estimate {
        total: build,
        wait: 0.0,
        transfer: 0.0,
        build,
        fetch: 0.0,
        terms: Terms {
            duration,
            speed,
            share,
            cores,
            foreign,
            tasks,
            own: 0,
            weight: 1,
            missing: nothing,
            backlog: nothing,
            bandwidth: Figure { value: f64::INFINITY, is_known: true },
            round_trip: nothing,
            output: nothing,
        },
    }
}

/// Seconds until a slot is free for a build behind which nobody pushes in.
///
/// `ends` are the seconds until each of the running builds ends, `ahead` is the number of builds that wait already, and
/// each of those takes a slot for `each` seconds. `None` if nothing runs there.
pub fn slot_wait(ends: &[f64], ahead: u64, each: f64) -> Option<f64> {
    let mut ends: Vec<f64> = ends.iter().map(|end| end.max(0.0)).collect();
    ends.sort_by(f64::total_cmp);
    let slots = ends.len() as u64;
    let turns = ahead.checked_div(slots)?;
    let end = ends.get((ahead % slots) as usize)?;
    Some(end + turns as f64 * each)
}

/// The share of a processor that each of that many tasks gets.
pub(super) fn share(cores: f64, tasks: f64) -> f64 {
    (cores / tasks.max(1.0)).min(1.0)
}

/// Tasks of others, of `tasks` in all.
fn foreign(sample: &Sample, tasks: f64, own_now: u64) -> f64 {
    (tasks - sample.own_load.unwrap_or(own_now as f64)).max(0.0)
}

/// All tasks that run or wait to run, if the sample tells.
pub(super) fn tasks(sample: &Sample, cores: f64) -> Option<f64> {
    let pressure = sample.cpu_pressure.map(|percent| (percent / 100.0).clamp(0.0, 1.0));
    match (sample.load_average, pressure) {
        (Some(load), Some(pressure)) => Some(load.min(cores + pressure * load).max(pressure * cores)),
        (Some(load), None) => Some(load),
        (None, Some(pressure)) => Some(pressure * cores),
        (None, None) => None,
    }
}
