//! Whether a build that runs is begun anew on a machine that has become free and on which it would go much faster.
//!
//! Owns that rule. Must never stop or begin a build.
//!
//! Nobody knows at the start which builds are long, nor for how long others leave a machine alone. A build that has gone on
//! for long will most likely go on for as long again: it may be done sooner from its beginning on a machine that is much
//! faster, or that nobody else uses.
//!
//! ```text
//! pace  = speed factor * min(1, cores / tasks)          where it runs; tasks as the sample has them, less cores - 1
//! done  = elapsed * pace
//! total = max(duration, 2 * done)
//! stay  = (total - done) / pace
//! go    = transfer + total / (speed factor * share)     on the other machine, by its estimate
//! ```
//!
//! A build may keep all processors busy itself, and nobody knows which tasks are its own. So that it does not flee from
//! itself, as many tasks as there are processors are taken for its own.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::estimate::{Terms, share, tasks};
use super::known::Sample;
use super::machine::Machine;
use super::rules::Rules;
use super::verdict::{Decision, Verdict};
use super::{Request, suits};
use std::time::SystemTime;

/// How many times as long what is left of the build must take here as all of it there, because what is left is a guess.
const MARGIN: f64 = 1.5;

/// So it must go more than this many times as fast there.
const MUCH_FASTER: f64 = MARGIN;

/// How long a build runs, in seconds, before it is thought of moving it.
pub const SETTLED: f64 = 20.0;

/// How many times as long as it has taken already a build takes, at least.
const LONGER: f64 = 2.0;

/// A build that runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Running {
    /// The place of its machine in the list.
    pub on: usize,
    /// Seconds since it began there; transfers do not count.
    pub elapsed: f64,
    /// Whether it was moved before. It is done at most once.
    pub was_moved: bool,
}

/// Where to, and what that is worth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Move {
    /// The place of the other machine in the list.
    pub to: usize,
    /// Seconds that it is expected to go on where it is.
    pub stay: f64,
    /// Seconds until it is done on the other machine.
    pub go: f64,
    /// Whether anything but a guess says that the build goes much faster there: the speed factors, or a sample of the other
    /// machine. A build must not flee from load to a machine of whose load nothing is known.
    pub is_known: bool,
}

/// The machines on which a build might be begun anew that runs on the machine of this index, whatever is known of the build.
/// Where load is never measured, only those with a much higher speed factor.
pub fn rivals<'a>(
    machines: &'a [Machine],
    request: &'a Request,
    on: usize,
    is_measured: bool,
) -> impl Iterator<Item = usize> + 'a {
    let here = machines.get(on);
    let is_rival = move |there: &Machine| {
        here.is_some_and(|here| is_measured || is_much_faster(there, here))
            && there.max_jobs > 0
            && there.uri.is_ours()
            && suits(there, request).is_ok()
    };
    let others = machines.iter().enumerate().filter(move |(index, _)| *index != on);
    others.filter(move |(_, there)| is_rival(there)).map(|(index, _)| index)
}

/// Whether it may be worth it to look for a better machine: the build might go much faster on one if nobody used that.
/// `sample` is the last one of the machine where it runs. Costs little.
pub fn is_worth_a_look(
    machines: &[Machine],
    request: &Request,
    on: usize,
    sample: Option<&Sample>,
    rules: &Rules,
    now: SystemTime,
) -> bool {
    let Some(here) = machines.get(on) else { return false };
    let sample = sample.filter(|sample| !sample.is_stale(now, rules.stale_after));
    let crowding = sample.and_then(|sample| {
        let cores = sample.cores.map_or(here.max_jobs, u64::from).max(1) as f64;
        Some(crowding(cores, tasks(sample, cores)?))
    });
    let pace = f64::from(here.speed_factor) * crowding.unwrap_or(1.0);
    let is_faster = |rival: usize| f64::from(machines[rival].speed_factor) >= MUCH_FASTER * pace;
    rivals(machines, request, on, true).any(is_faster)
}

/// Whether the build is to be stopped where it is and begun anew elsewhere.
///
/// `decision` is what [`decide`](super::decide) says of the same build now. To be asked only while nobody waits for a slot,
/// and not for builds that take a lock somewhere else or must not be repeated.
pub fn worth_moving(machines: &[Machine], decision: &Decision, running: &Running) -> Option<Move> {
    let Verdict::Accept(to) = decision.verdict else { return None };
    let (here, there) = (machines.get(running.on)?, machines.get(to)?);
    // Also `false` for what is no number.
    let is_settled = running.elapsed >= SETTLED;
    if to == running.on || running.was_moved || !is_settled {
        return None;
    }
    let estimate = |index: usize| decision.standings.get(index)?.estimate.as_ref();
    let (own, other) = (&estimate(running.on)?.terms, estimate(to)?);
    let pace = pace(own);
    let done = running.elapsed * pace;
    let total = own.duration.value.max(LONGER * done);
    let stay = (total - done) / pace;
    let go = other.transfer + total / (other.terms.speed * other.terms.share);
    let is_known = is_much_faster(there, here) || other.terms.foreign.is_known;
    (go * MARGIN < stay).then_some(Move { to, stay, go, is_known })
}

/// How fast a build goes on where it runs, in seconds of an idle machine of speed factor 1 for each second.
fn pace(terms: &Terms) -> f64 {
    terms.speed * terms.tasks.map_or(1.0, |tasks| crowding(terms.cores.value, tasks))
}

/// The share of a processor that a build has which is one of that many tasks, if as many of them as there are processors are
/// its own.
fn crowding(cores: f64, tasks: f64) -> f64 {
    share(cores, tasks - (cores - 1.0))
}

fn is_much_faster(there: &Machine, here: &Machine) -> bool {
    f64::from(there.speed_factor) >= MUCH_FASTER * f64::from(here.speed_factor)
}
