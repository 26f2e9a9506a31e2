//! Choosing: which machine a build goes to, and why every other one does not get it.
//!
//! Owns the decision. Must never do I/O, read a clock or the environment, or log: the caller brings what is known
//! (machines, load, health, request, time) and carries out what is decided.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod chain;
pub mod estimate;
pub mod here;
pub mod known;
pub mod machine;
pub mod moving;
pub mod outputs;
pub mod rules;
pub mod telling;
pub mod trust;
pub mod turn;
pub mod verdict;

use estimate::{Basis, Estimate, estimate, estimate_here, is_measured};
pub use known::{Health, Known, Load, Sample, Work};
use machine::Machine;
pub use rules::{Policy, Rules};
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};
pub use verdict::{Because, Decision, Order, Refusal, Verdict};
use verdict::{Resource, Standing};

/// A machine that is full must be this many times sooner than one with a free slot to be waited for, because how long
/// running builds will take is a guess.
const HOLD_BACK_MARGIN: f64 = 1.5;

/// How long builds that Nix could do itself, but has no slot for, wait for machines none of which is known to answer: long
/// enough for one that failed once to be tried again. Then Nix may queue them here, where they
/// follow each other without a pause.
const SILENT_BOUND: Duration = Duration::from_secs(20);

/// One `try` of Nix: may this derivation be built elsewhere?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Whether Nix has a local slot free at this moment.
    pub am_willing: bool,
    /// The derivation's `system`.
    pub system: String,
    /// Full path of the derivation in the local store.
    pub drv_path: String,
    /// The derivation's `requiredSystemFeatures`.
    pub required_features: BTreeSet<String>,
}

impl Request {
    /// Whether Nix does it itself, as `builtin:fetchurl`.
    pub fn is_builtin(&self) -> bool {
        self.system == "builtin"
    }

    /// Slots that it takes on a machine of which no slot is taken.
    fn weight(&self, rules: &Rules, machine: &Machine) -> u64 {
        let wish = if self.required_features.contains("big-parallel") { rules.big_parallel_slots } else { 1 };
        wish.clamp(1, machine.max_jobs.max(1))
    }
}

/// What the local machine could build itself, from Nix's settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Local {
    /// The setting `max-jobs`; 0 means that nothing is ever built locally.
    pub max_jobs: u64,
    /// `system` and `extra-platforms`.
    pub systems: BTreeSet<String>,
    /// `system-features`.
    pub features: BTreeSet<String>,
}

impl Local {
    /// Whether the request could be built locally at some time, be it not now. What Nix does itself (the system
    /// `builtin`) it can do on any system.
    pub fn could_build(&self, request: &Request) -> bool {
        self.max_jobs > 0
            && (request.is_builtin() || self.systems.contains(&request.system))
            && request.required_features.is_subset(&self.features)
    }
}

/// Whether a machine's line in the list admits the request at all; the reason if not.
///
/// Follows `Machine::systemSupported`, `allSupported` and `mandatoryMet` in Nix 2.34
/// `src/libstore/machines.cc`: any machine will do for the system `builtin`.
pub fn suits(machine: &Machine, request: &Request) -> Result<(), Refusal> {
    if !request.is_builtin() && !machine.systems.contains(&request.system) {
        return Err(Refusal::System);
    }
    let lacks =
        |f: &&String| !machine.supported_features.contains(*f) && !machine.mandatory_features.contains(*f);
    // Mostly there are none, and no set is made for that.
    if request.required_features.iter().any(|f| lacks(&f)) {
        let missing = request.required_features.iter().filter(lacks).cloned().collect();
        return Err(Refusal::MissingFeatures(missing));
    }
    if !machine.mandatory_features.is_subset(&request.required_features) {
        let unmet = machine.mandatory_features.difference(&request.required_features).cloned().collect();
        return Err(Refusal::MandatoryFeatures(unmet));
    }
    Ok(())
}

/// Everything that a decision depends on, but what is known of each machine.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The machines of the list.
    pub machines: &'a [Machine],
    /// The settings of the choice.
    pub rules: &'a Rules,
    /// What could be built on the client's own machine. Where Nix has no say any more, nothing.
    pub local: &'a Local,
    /// What the client's own machine says of its load, for [`Policy::Cost`].
    pub here: Option<&'a Sample>,
    /// What Nix asked.
    pub request: &'a Request,
    /// What is known of the build.
    pub work: &'a Work,
    /// The time.
    pub now: SystemTime,
}

impl Question<'_> {
    /// How long the build has been waiting.
    fn waited(&self) -> Duration {
        self.elapsed(self.work.waiting_since)
    }

    /// How long obstacles have kept it from every machine.
    fn obstructed(&self) -> Duration {
        self.elapsed(self.work.obstructed_since)
    }

    fn elapsed(&self, since: Option<SystemTime>) -> Duration {
        since.and_then(|since| self.now.duration_since(since).ok()).unwrap_or_default()
    }

    /// Whether it has waited for long enough for machines none of which is known to answer, or those before it have.
    fn has_heard_nothing(&self) -> bool {
        self.waited().max(self.elapsed(self.work.silent_since)) >= SILENT_BOUND
    }

    /// Whether Nix could build it itself at once.
    fn can_build_now(&self) -> bool {
        self.request.am_willing && self.local.could_build(self.request)
    }
}

/// What keeps a machine of which this is known from getting anything, whoever else there is.
pub fn obstacle(known: &Known, rules: &Rules, now: SystemTime) -> Option<Refusal> {
    match &known.health {
        Health::Failed(why) => return Some(Refusal::Failed(why.clone())),
        Health::Unreachable(why) => return Some(Refusal::Unreachable(why.clone())),
        Health::CutOff => return Some(Refusal::CutOff),
        Health::Well | Health::CoolDown { .. } | Health::Waking | Health::Unasked => {}
    }
    if let Some(withheld) = known.withheld.as_ref().filter(|withheld| withheld.holds(now)) {
        return Some(Refusal::Withheld(withheld.clone()));
    }
    let sample = known.sample.as_ref().filter(|s| !s.is_stale(now, rules.stale_after))?;
    if let Some(why) = &sample.inhibited {
        return Some(Refusal::Inhibited(why.clone()));
    }
    let floors = &rules.floors;
    [
        (Resource::Disk, sample.disk_free, floors.disk),
        (Resource::Inodes, sample.inodes_free, floors.inodes),
        (Resource::Memory, sample.memory_free, floors.memory),
    ]
    .into_iter()
    .find_map(|(of, left, floor)| {
        left.filter(|left| *left < floor).map(|left| Refusal::Short { of, left, floor })
    })
}

/// A machine that could do it, now or when a slot is free.
struct Candidate<'a> {
    index: usize,
    machine: &'a Machine,
    known: Known,
    weight: u64,
    is_free: bool,
}

/// Chooses among the machines of the list.
///
/// `known` is asked once for each machine whose line suits the request, with its index. Machines with a free slot are
/// put in the order of their estimated finish (see [`mod@estimate`]), equal ones in that of the stock hook. If nothing is
/// measured of any of them, the stock hook's order alone counts.
pub fn decide(question: &Question<'_>, mut known: impl FnMut(usize) -> Known) -> Decision {
    let Question { machines, rules, request, work, now, .. } = *question;
    let mut standings = vec![Standing { place: None, estimate: None, refusal: None }; machines.len()];
    let mut candidates = Vec::new();
    let mut ailing = Vec::new();
    // Those that get nothing now but are worth waiting for.
    let mut waking = Vec::new();
    let mut unasked = Vec::new();
    for (index, machine) in machines.iter().enumerate() {
        if let Err(refusal) = suits(machine, request) {
            standings[index].refusal = Some(refusal);
            continue;
        }
        let known = known(index);
        if let Some(refusal) = obstacle(&known, rules, now) {
            standings[index].refusal = Some(refusal);
            continue;
        }
        let weight = request.weight(rules, machine);
        // One who has waited for several slots for long is content with those that are free.
        let left = machine.max_jobs.saturating_sub(known.load.taken);
        let weight = if question.waited() >= rules.hold_back { weight.min(left.max(1)) } else { weight };
        let is_free = left >= weight && known.waiting == 0;
        let is_cool = match &known.health {
            Health::CoolDown { until, .. } => until.is_some_and(|until| until <= now),
            _ => true,
        };
        let candidate = Candidate { index, machine, known, weight, is_free };
        match candidate.known.health {
            Health::Waking => waking.push(candidate),
            Health::Unasked => unasked.push(candidate),
            _ if is_cool => candidates.push(candidate),
            _ => ailing.push(candidate),
        }
    }
    let could_build = question.local.could_build(request);
    // A machine without slots is no other one: it gets nothing. Nix itself is one.
    let has_slots = |candidate: &Candidate<'_>| candidate.machine.max_jobs > 0;
    let is_other = candidates.iter().chain(&waking).chain(&unasked).any(has_slots);
    let mut silent: Vec<usize> =
        unasked.iter().chain(&ailing).filter(|silent| has_slots(silent)).map(|silent| silent.index).collect();
    silent.sort_unstable();
    // Without another one those are asked whose pause is over, and all of them for what Nix could not build.
    let is_asked = |ailing: &Candidate<'_>| {
        let is_paused = matches!(ailing.known.health, Health::CoolDown { until: Some(_), .. });
        !(is_other || could_build && is_paused)
    };
    let (asked, left_alone): (Vec<_>, Vec<_>) = ailing.into_iter().partition(is_asked);
    candidates.extend(asked);
    candidates.sort_by_key(|candidate| candidate.index);
    for ailing in left_alone {
        if let Health::CoolDown { until, why } = ailing.known.health {
            standings[ailing.index].refusal = Some(Refusal::CoolDown { until, why });
        }
    }
    for waking in &waking {
        standings[waking.index].refusal = Some(Refusal::Waking);
    }
    for unasked in &unasked {
        standings[unasked.index].refusal = Some(Refusal::Unasked);
    }

    let missing = candidates.iter().filter_map(|candidate| candidate.known.link.missing).max();
    let basis = Basis { rules, work, now, missing };
    let is_any_measured = candidates.iter().any(|candidate| is_measured(&candidate.known, rules, now));
    let order = if is_any_measured { Order::Estimate } else { Order::Stock };
    let candidates: Vec<(Candidate<'_>, Estimate)> = candidates
        .into_iter()
        .map(|candidate| {
            let estimate = estimate(candidate.machine, &candidate.known, candidate.weight, &basis);
            (candidate, estimate)
        })
        .collect();
    let mut ranked: Vec<&(Candidate<'_>, Estimate)> = candidates.iter().collect();
    ranked.sort_by(|a, b| compare(order, a, b));
    let free = ranked.first().copied().filter(|(candidate, _)| candidate.is_free);
    let awaited = if order == Order::Estimate { worth_holding_back(question, &ranked) } else { Vec::new() };
    let here = (rules.policy == Policy::Cost && question.can_build_now())
        .then(|| estimate_here(question.here, question.local.max_jobs, &basis));

    // Whoever waits for others takes one of these as soon as it is seen to answer.
    let is_any_known = ranked.iter().map(|(candidate, _)| candidate).chain(&waking).any(has_slots);
    let mut worth_waiting: Vec<usize> = ranked
        .iter()
        .map(|(candidate, _)| candidate)
        .chain(waking.iter().chain(&unasked))
        // A machine without slots will never have a free one, so nobody is to wait for it.
        .filter(|candidate| has_slots(candidate) && (!candidate.is_free || free.is_none()))
        .map(|candidate| candidate.index)
        .collect();
    worth_waiting.sort_unstable();
    let passing: Vec<usize> = standings
        .iter()
        .enumerate()
        .filter(|(_, standing)| standing.refusal.as_ref().is_some_and(Refusal::passes))
        .map(|(index, _)| index)
        .collect();

    let sooner_here = |best: &Estimate| here.as_ref().is_some_and(|here| here.total < best.total);
    let (verdict, because) = if request.is_builtin() && could_build {
        (Verdict::Decline, Because::Builtin)
    } else if rules.policy == Policy::LocalFirst && question.can_build_now() {
        (Verdict::Decline, Because::LocalFirst)
    } else {
        match free {
            Some((_, best)) if sooner_here(best) => (Verdict::Decline, Because::LocalSooner),
            Some(_) if !awaited.is_empty() => {
                let wait = if could_build { Verdict::Postpone(awaited) } else { Verdict::Wait(awaited) };
                (wait, Because::HeldBack)
            }
            Some((best, _)) => (Verdict::Accept(best.index), Because::Best),
            // Nobody is known to answer. Somebody may be by the time that Nix asks again.
            None if !is_any_known && !silent.is_empty() => {
                let is_left_to_nix = could_build && question.has_heard_nothing();
                let verdict = match question.can_build_now() || is_left_to_nix {
                    true => Verdict::Decline,
                    false => Verdict::Postpone(silent),
                };
                (verdict, Because::Silent)
            }
            // As in the stock hook: when a local build can start at once there is no reason to wait for a machine.
            None if question.can_build_now() && !(worth_waiting.is_empty() && passing.is_empty()) => {
                (Verdict::Decline, Because::LocalFree)
            }
            None if !worth_waiting.is_empty() && could_build => {
                (Verdict::Postpone(worth_waiting), Because::Full)
            }
            None if !worth_waiting.is_empty() => (Verdict::Wait(worth_waiting), Because::Full),
            None if passing.is_empty() || could_build => (Verdict::Decline, Because::NothingFits),
            None if question.obstructed() >= rules.obstacle_patience => {
                (Verdict::Decline, Because::ObstaclesTooLong)
            }
            None => (Verdict::Postpone(passing), Because::Obstacles),
        }
    };
    let slots = free.map_or(1, |(candidate, _)| candidate.weight);
    let ranks: Vec<usize> = ranked.iter().map(|(candidate, _)| candidate.index).collect();
    for (place, index) in ranks.iter().enumerate() {
        standings[*index].place = Some(place + 1);
    }
    stand(&mut standings, candidates, order, &verdict, because);
    Decision { verdict, because, order, slots, standings, here, at: now }
}

/// Gives everyone who could do it their estimate, and a reason to all but the one who does.
fn stand(
    standings: &mut [Standing],
    candidates: Vec<(Candidate<'_>, Estimate)>,
    order: Order,
    verdict: &Verdict,
    because: Because,
) {
    let is_local =
        matches!(because, Because::Builtin | Because::LocalFirst | Because::LocalSooner | Because::LocalFree);
    let is_first = |candidate: &Candidate<'_>| standings[candidate.index].place == Some(1);
    let first = candidates.iter().find(|(candidate, _)| is_first(candidate));
    let first = first.map(|(best, estimate)| (best.index, estimate.total));
    for (candidate, estimate) in candidates {
        let Candidate { index, machine, known, weight, is_free } = candidate;
        let standing = &mut standings[index];
        standing.refusal = if !is_free {
            let (taken, slots, waiting) = (known.load.taken, machine.max_jobs, known.waiting);
            Some(Refusal::Full { taken, slots, needed: weight, waiting })
        } else if is_local {
            Some(Refusal::Local)
        } else if *verdict == Verdict::Accept(index) {
            None
        } else {
            let (by, total) = first.unwrap_or((index, estimate.total));
            let later = (order == Order::Estimate).then_some(estimate.total - total);
            Some(if by == index { Refusal::HeldBack } else { Refusal::Outranked { by, later } })
        };
        standing.estimate = Some(estimate);
    }
}

/// Machines that are full, and yet would be done with the build so much sooner than any with a free slot that it is
/// held back for them.
fn worth_holding_back(question: &Question<'_>, ranked: &[&(Candidate<'_>, Estimate)]) -> Vec<usize> {
    let Some((_, best)) = ranked.first().copied().filter(|(candidate, _)| candidate.is_free) else {
        return Vec::new();
    };
    let left = question.rules.hold_back.saturating_sub(question.waited()).as_secs_f64();
    if question.can_build_now() {
        return Vec::new();
    }
    let mut sooner: Vec<usize> = ranked
        .iter()
        .filter(|(candidate, estimate)| {
            !candidate.is_free
                && candidate.known.slot_wait.is_some()
                && estimate.wait < left
                && estimate.total * HOLD_BACK_MARGIN < best.total
        })
        .map(|(candidate, _)| candidate.index)
        .collect();
    sooner.sort_unstable();
    sooner
}

/// Who comes first: those with a free slot, then the sooner finish, then the rule of the stock hook
/// (`src/nix/build-remote/build-remote.cc` in Nix 2.34): the lowest load in relation to the speed factor, the higher speed
/// factor, the lower load, the earlier place in the list.
fn compare(order: Order, a: &(Candidate<'_>, Estimate), b: &(Candidate<'_>, Estimate)) -> Ordering {
    let relative = |(c, _): &(Candidate<'_>, Estimate)| c.known.load.taken as f32 / c.machine.speed_factor;
    let estimated = match order {
        Order::Estimate => a.1.total.total_cmp(&b.1.total),
        Order::Stock => Ordering::Equal,
    };
    (b.0.is_free.cmp(&a.0.is_free))
        .then(estimated)
        .then(relative(a).total_cmp(&relative(b)))
        .then(b.0.machine.speed_factor.total_cmp(&a.0.machine.speed_factor))
        .then(a.0.known.load.taken.cmp(&b.0.known.load.taken))
        .then(a.0.index.cmp(&b.0.index))
}

#[cfg(test)]
mod tests;
