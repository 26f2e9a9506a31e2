//! Whether a build that runs is begun anew on a much faster machine that has become free.
//!
//! Owns that rule. Must never stop or begin a build.
//!
//! Nobody knows at the start which builds are long. One that has gone on for long on a slow machine is, and will most
//! likely go on for as long again: it may be done sooner from its beginning on a machine that is much faster. Load comes
//! and goes, so differences of load alone are no reason: a build that is moved for that loses more than it gains.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::machine::Machine;
use super::verdict::{Decision, Verdict};
use super::{Request, suits};

/// The other machine's speed factor must be so many times as high.
const MUCH_FASTER: f32 = 1.5;

/// And what is left of the build must take so many times as long here as all of it there, because what is left is a guess.
const MARGIN: f64 = 1.5;

/// A build that has run for so much shorter, in seconds, is left alone.
pub const SETTLED: f64 = 20.0;

/// A build takes at least so many times as long as it has taken already.
const LONGER: f64 = 1.7;

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
}

/// The machines on which a build might be begun anew that runs on the machine of this index, whatever is known of them and of
/// the build. Costs next to nothing where all are equally fast.
pub fn rivals<'a>(
    machines: &'a [Machine],
    request: &'a Request,
    on: usize,
) -> impl Iterator<Item = usize> + 'a {
    let here = machines.get(on);
    let is_rival = move |there: &Machine| {
        here.is_some_and(|here| is_much_faster(there, here))
            && there.max_jobs > 0
            && there.uri.is_ours()
            && suits(there, request).is_ok()
    };
    machines.iter().enumerate().filter(move |(_, there)| is_rival(there)).map(|(index, _)| index)
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
    if to == running.on || running.was_moved || !is_much_faster(there, here) || !is_settled {
        return None;
    }
    let estimate = |index: usize| decision.standings.get(index)?.estimate.as_ref();
    let (own, other) = (&estimate(running.on)?.terms, estimate(to)?);
    // The estimate of its machine is that of one build more.
    let tasks = own.foreign.value + own.own as f64;
    let pace = own.speed * (own.cores.value / tasks.max(1.0)).min(1.0);
    let done = running.elapsed * pace;
    let total = own.duration.value.max(LONGER * done);
    let stay = (total - done) / pace;
    let go = other.transfer + total / (other.terms.speed * other.terms.share);
    (go * MARGIN < stay).then_some(Move { to, stay, go })
}

fn is_much_faster(there: &Machine, here: &Machine) -> bool {
    there.speed_factor >= MUCH_FASTER * here.speed_factor
}
