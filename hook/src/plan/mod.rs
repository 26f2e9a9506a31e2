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

use estimate::{Basis, Estimate, estimate_here, is_measured};
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

    /// The build waits for one of these: in the hook if only they could do it, else in Nix, which may have a slot sooner.
    fn wait_for(&self, machines: Vec<usize>) -> Verdict {
        match self.local.could_build(self.request) {
            true => Verdict::Postpone(machines),
            false => Verdict::Wait(machines),
        }
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
    let sample = known.sample.as_ref()?;
    if !sample.is_stale(now, rules.stale_after) {
        return shortage(sample, rules);
    }
    // What it said is no more to be relied on, but it is not to be taken for gone before somebody has asked.
    let what = shortage(sample, rules).filter(|_| rules.looks_again)?;
    Some(Refusal::Recalled { what: Box::new(what), at: sample.at })
}

/// What a machine said that keeps builds from it.
fn shortage(sample: &Sample, rules: &Rules) -> Option<Refusal> {
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

/// Chooses among the machines of the list. Numbers in here are those of the points in `docs/choosing.md`.
///
/// `known` is asked once for each machine whose line suits the request, with its index. Machines with a free slot are
/// put in the order of their estimated finish (see [`mod@estimate`]), equal ones in that of the stock hook of Nix 2.20 and
/// newer. If nothing is measured of any of them, that order alone counts.
pub fn decide(question: &Question<'_>, known: impl FnMut(usize) -> Known) -> Decision {
    let mut standings =
        vec![Standing { place: None, estimate: None, refusal: None }; question.machines.len()];
    let mut field = look_round(question, known, &mut standings);
    field.admit_ailing(question.local.could_build(question.request));
    field.refuse_absent(&mut standings);

    let basis = field.basis(question);
    let order = field.order(&basis);
    field.estimate(&basis);
    let ranked = rank(&field, order);
    let here = (question.rules.policy == Policy::Cost && question.can_build_now())
        .then(|| estimate_here(question.here, question.local.max_jobs, &basis));

    let (verdict, because) = answer(question, &field, &ranked, order, here.as_ref(), &standings);
    let slots = best_free(&ranked).map_or(1, |best| best.candidate.weight);
    stand(&ranked, order, &verdict, because, &mut standings);
    Decision { verdict, because, order, slots, standings, here, at: question.now }
}

/// A machine that could do it, now or when a slot is free.
struct Candidate<'a> {
    index: usize,
    machine: &'a Machine,
    known: Known,
    weight: u64,
    is_free: bool,
    /// None before all candidates are known: what is assumed of one depends on the others.
    estimate: Option<Estimate>,
}

impl<'a> Candidate<'a> {
    /// The machine of this index, or what keeps it from the build whoever else there is.
    fn new(
        question: &Question<'a>,
        index: usize,
        known: &mut impl FnMut(usize) -> Known,
    ) -> Result<Self, Refusal> {
        let Question { machines, rules, request, now, .. } = *question;
        let machine = &machines[index];
        // Point 1: who may.
        suits(machine, request)?;
        // Point 2: who is out.
        let known = known(index);
        if let Some(refusal) = obstacle(&known, rules, now) {
            return Err(refusal);
        }
        // Point 3: who has room. One who has waited for several slots for long is content with those that are free.
        let weight = request.weight(rules, machine);
        let left = machine.max_jobs.saturating_sub(known.load.taken);
        let weight = if question.waited() >= rules.hold_back { weight.min(left.max(1)) } else { weight };
        let is_free = left >= weight && known.waiting == 0;
        Ok(Self { index, machine, known, weight, is_free, estimate: None })
    }

    /// Whether it has slots, taken or not. One without will never have a free one: it is nobody to wait for, and no other
    /// one beside those that failed.
    fn has_slots(&self) -> bool {
        self.machine.max_jobs > 0
    }
}

/// The machines to which nothing is an obstacle, by how they are, each in the order of the list.
#[derive(Default)]
struct Field<'a> {
    /// They may get the build.
    ready: Vec<Candidate<'a>>,
    /// They failed a short while ago, and are left alone while there is another one.
    ailing: Vec<Candidate<'a>>,
    /// They get nothing yet, but are worth waiting for.
    waking: Vec<Candidate<'a>>,
    /// They are not known to answer, and get nothing yet.
    unasked: Vec<Candidate<'a>>,
}

/// Sees who there is. Those with an obstacle get their reasons.
fn look_round<'a>(
    question: &Question<'a>,
    mut known: impl FnMut(usize) -> Known,
    standings: &mut [Standing],
) -> Field<'a> {
    // Mostly all are ready.
    let mut field = Field { ready: Vec::with_capacity(standings.len()), ..Field::default() };
    for (index, standing) in standings.iter_mut().enumerate() {
        match Candidate::new(question, index, &mut known) {
            Ok(candidate) => field.add(candidate, question.now),
            Err(refusal) => standing.refusal = Some(refusal),
        }
    }
    field
}

impl<'a> Field<'a> {
    fn add(&mut self, candidate: Candidate<'a>, now: SystemTime) {
        let group = match &candidate.known.health {
            Health::Waking => &mut self.waking,
            Health::Unasked => &mut self.unasked,
            Health::CoolDown { until, .. } if until.is_none_or(|until| until > now) => &mut self.ailing,
            _ => &mut self.ready,
        };
        group.push(candidate);
    }

    /// Point 2: without another machine those that failed are asked, all of them for what Nix could not build, else those
    /// whose pause is over.
    fn admit_ailing(&mut self, could_build: bool) {
        let mut others = self.ready.iter().chain(&self.waking).chain(&self.unasked);
        if others.any(Candidate::has_slots) {
            return;
        }
        let is_paused = |c: &Candidate<'_>| matches!(c.known.health, Health::CoolDown { until: Some(_), .. });
        let ailing = std::mem::take(&mut self.ailing).into_iter();
        let (left_alone, asked): (Vec<_>, Vec<_>) = ailing.partition(|c| could_build && is_paused(c));
        self.ailing = left_alone;
        self.ready.extend(asked);
        self.ready.sort_by_key(|candidate| candidate.index);
    }

    /// Gives their reasons to those that may not get it now.
    fn refuse_absent(&self, standings: &mut [Standing]) {
        for Candidate { index, known, .. } in self.ailing.iter().chain(&self.waking).chain(&self.unasked) {
            standings[*index].refusal = match &known.health {
                Health::CoolDown { until, why } => {
                    Some(Refusal::CoolDown { until: *until, why: why.clone() })
                }
                Health::Waking => Some(Refusal::Waking),
                _ => Some(Refusal::Unasked),
            };
        }
    }

    /// Point 5: what is not known is assumed; as many missing bytes as the machine that lacks most.
    fn basis<'q>(&self, question: &Question<'q>) -> Basis<'q> {
        let Question { rules, work, now, .. } = *question;
        let missing = self.ready.iter().filter_map(|candidate| candidate.known.link.missing).max();
        Basis { rules, work, now, missing }
    }

    /// Point 5: where nothing is measured, estimates say nothing.
    fn order(&self, basis: &Basis<'_>) -> Order {
        let is_any_measured = self.ready.iter().any(|c| is_measured(&c.known, basis.rules, basis.now));
        if is_any_measured { Order::Estimate } else { Order::Stock }
    }

    /// Point 4: when each would be done.
    fn estimate(&mut self, basis: &Basis<'_>) {
        for Candidate { machine, known, weight, estimate, .. } in &mut self.ready {
            *estimate = Some(estimate::estimate(machine, known, *weight, basis));
        }
    }

    /// Whether any machine is known to answer, or will be. Whoever waits for others takes such a one as soon as it does.
    fn is_any_known(&self) -> bool {
        self.ready.iter().chain(&self.waking).any(Candidate::has_slots)
    }

    /// Indexes of those that are not known to answer.
    fn silent(&self) -> Vec<usize> {
        indexes(self.unasked.iter().chain(&self.ailing))
    }

    /// Indexes of those that are worth waiting for while nobody has a free slot.
    fn worth_waiting_for(&self) -> Vec<usize> {
        indexes(self.ready.iter().chain(&self.waking).chain(&self.unasked))
    }
}

/// Indexes of those of them that have slots, in the order of the list.
fn indexes<'c, 'a: 'c>(candidates: impl Iterator<Item = &'c Candidate<'a>>) -> Vec<usize> {
    let mut indexes: Vec<usize> = candidates.filter(|c| c.has_slots()).map(|c| c.index).collect();
    indexes.sort_unstable();
    indexes
}

/// A candidate with its estimate.
#[derive(Clone, Copy)]
struct Ranked<'f> {
    candidate: &'f Candidate<'f>,
    estimate: &'f Estimate,
}

/// Point 4: who is soonest. The better ones come first.
fn rank<'f>(field: &'f Field<'f>, order: Order) -> Vec<Ranked<'f>> {
    let ranked =
        |candidate: &'f Candidate<'f>| Some(Ranked { candidate, estimate: candidate.estimate.as_ref()? });
    let mut ranked: Vec<Ranked<'f>> = field.ready.iter().filter_map(ranked).collect();
    ranked.sort_by(|a, b| compare(order, *a, *b));
    ranked
}

/// Who comes first: those with a free slot, then the sooner finish, then the rule of the stock hook
/// (`src/nix/build-remote/build-remote.cc` in Nix 2.34): the lowest load in relation to the speed factor, the higher speed
/// factor, the lower load, the earlier place in the list. Before Nix 2.20 speed factors are integers there
/// (`src/libstore/machines.hh`), and the remainder of the division by them is dropped; that is not followed.
fn compare(order: Order, a: Ranked<'_>, b: Ranked<'_>) -> Ordering {
    let relative = |c: &Candidate<'_>| c.known.load.taken as f32 / c.machine.speed_factor;
    let estimated = match order {
        Order::Estimate => a.estimate.total.total_cmp(&b.estimate.total),
        Order::Stock => Ordering::Equal,
    };
    let (a, b) = (a.candidate, b.candidate);
    (b.is_free.cmp(&a.is_free))
        .then(estimated)
        .then(relative(a).total_cmp(&relative(b)))
        .then(b.machine.speed_factor.total_cmp(&a.machine.speed_factor))
        .then(a.known.load.taken.cmp(&b.known.load.taken))
        .then(a.index.cmp(&b.index))
}

/// The best one, if it has a free slot: those that have are before those that have not.
fn best_free<'f>(ranked: &[Ranked<'f>]) -> Option<Ranked<'f>> {
    ranked.first().copied().filter(|best| best.candidate.is_free)
}

/// What to say to Nix, and why.
fn answer(
    question: &Question<'_>,
    field: &Field<'_>,
    ranked: &[Ranked<'_>],
    order: Order,
    here: Option<&Estimate>,
    standings: &[Standing],
) -> (Verdict, Because) {
    let Question { rules, local, request, .. } = *question;
    let (could_build, can_build_now) = (local.could_build(request), question.can_build_now());
    // What stays here, whatever the machines are like, stands below the points.
    if request.is_builtin() && could_build {
        return (Verdict::Decline, Because::Builtin);
    }
    if rules.policy == Policy::LocalFirst && can_build_now {
        return (Verdict::Decline, Because::LocalFirst);
    }
    // Point 4: who is soonest.
    if let Some(best) = best_free(ranked) {
        if here.is_some_and(|here| here.total < best.estimate.total) {
            return (Verdict::Decline, Because::LocalSooner);
        }
        // Point 6: holding back.
        let awaited = worth_holding_back(question, ranked, order, best);
        if !awaited.is_empty() {
            return (question.wait_for(awaited), Because::HeldBack);
        }
        return (Verdict::Accept(best.candidate.index), Because::Best);
    }
    // Point 7: nobody free. If nobody is known to answer either, somebody may be by the time that Nix asks again.
    let silent = field.silent();
    if !field.is_any_known() && !silent.is_empty() {
        let is_left_to_nix = can_build_now || could_build && question.has_heard_nothing();
        let verdict = if is_left_to_nix { Verdict::Decline } else { Verdict::Postpone(silent) };
        return (verdict, Because::Silent);
    }
    let awaited = field.worth_waiting_for();
    let passing = passing(standings);
    // As in the stock hook: when a local build can start at once there is no reason to wait for a machine.
    if can_build_now && !(awaited.is_empty() && passing.is_empty()) {
        return (Verdict::Decline, Because::LocalFree);
    }
    if !awaited.is_empty() {
        return (question.wait_for(awaited), Because::Full);
    }
    if passing.is_empty() || could_build {
        return (Verdict::Decline, Because::NothingFits);
    }
    if question.obstructed() >= rules.obstacle_patience {
        return (Verdict::Decline, Because::ObstaclesTooLong);
    }
    (Verdict::Postpone(passing), Because::Obstacles)
}

/// Machines that are full, and yet would be done with the build so much sooner than the best one with a free slot that it
/// is held back for them.
fn worth_holding_back(
    question: &Question<'_>,
    ranked: &[Ranked<'_>],
    order: Order,
    best: Ranked<'_>,
) -> Vec<usize> {
    if order == Order::Stock || question.can_build_now() {
        return Vec::new();
    }
    let left = question.rules.hold_back.saturating_sub(question.waited()).as_secs_f64();
    let is_worth_it = |Ranked { candidate, estimate }: &Ranked<'_>| {
        !candidate.is_free
            && candidate.known.slot_wait.is_some()
            && estimate.wait < left
            && estimate.total * HOLD_BACK_MARGIN < best.estimate.total
    };
    let mut sooner: Vec<usize> =
        ranked.iter().filter(|ranked| is_worth_it(ranked)).map(|ranked| ranked.candidate.index).collect();
    sooner.sort_unstable();
    sooner
}

/// Indexes of those whose obstacles may pass.
fn passing(standings: &[Standing]) -> Vec<usize> {
    let passes = |standing: &Standing| standing.refusal.as_ref().is_some_and(Refusal::passes);
    standings.iter().enumerate().filter(|(_, standing)| passes(standing)).map(|(index, _)| index).collect()
}

/// Gives everyone who could do it their place and estimate, and a reason to all but the one who does.
fn stand(
    ranked: &[Ranked<'_>],
    order: Order,
    verdict: &Verdict,
    because: Because,
    standings: &mut [Standing],
) {
    let Some(first) = ranked.first() else { return };
    let is_local = because.prefers_here() || because == Because::LocalFree;
    for (place, Ranked { candidate, estimate }) in (1..).zip(ranked) {
        let Candidate { index, machine, known, weight, is_free, .. } = candidate;
        let refusal = if !is_free {
            let (taken, slots, waiting) = (known.load.taken, machine.max_jobs, known.waiting);
            Some(Refusal::Full { taken, slots, needed: *weight, waiting })
        } else if is_local {
            Some(Refusal::Local)
        } else if *verdict == Verdict::Accept(*index) {
            None
        } else if place == 1 {
            Some(Refusal::HeldBack)
        } else {
            let later = (order == Order::Estimate).then_some(estimate.total - first.estimate.total);
            Some(Refusal::Outranked { by: first.candidate.index, later })
        };
        standings[*index] = Standing { place: Some(place), estimate: Some((*estimate).clone()), refusal };
    }
}

#[cfg(test)]
mod tests;
