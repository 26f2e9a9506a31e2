//! Choosing a machine, and asking it where it is not known to answer.
//!
//! Must never have a rule of its own about which machine is better.

use super::ailing::log_failure;
use super::race::{Raced, Runner, STAGGER, ask_one, log_instead, race};
use super::{Candidate, Chosen, Failed, Hook, Stage};
use crate::plan::{Because, Decision, Verdict};
use crate::reach::{ReachError, Reached};
use crate::slots::{Held, SlotError};
use crate::state::End;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How many further machines are contacted in parallel when the best one is not known to answer.
const MOST_RIVALS: usize = 15;

/// How long connecting may take before the reply to a machine that was down a moment ago and is being woken.
const WAKING_BOUND: Duration = Duration::from_millis(1500);

/// What came of choosing.
pub(super) enum Choice {
    /// This machine, with its slot.
    Machine(Box<Chosen>),
    /// None yet: to be accepted, to wait here for one of these. See [`Verdict::Wait`].
    Wait(Vec<usize>),
    /// None yet: Nix is to ask again. See [`Verdict::Postpone`].
    Postpone(Vec<usize>),
    /// None.
    Decline(Because),
}

/// What has come of asking machines for one build.
#[derive(Default)]
struct Asked {
    /// Those that cannot be reached before there is a network.
    cut_off: HashSet<usize>,
    /// Those that have been told to wake up.
    woken: HashSet<usize>,
}

impl Hook<'_> {
    /// Chooses until a machine is found that is known or seen to answer.
    ///
    /// A machine that has not answered lately is connected to first, unless the build has waited for this one already. Nix
    /// waits for that no longer than `connect-timeout`, however many machines there are.
    ///
    /// # Errors
    /// If slots cannot be counted or taken.
    pub(super) fn choose(
        &self,
        candidate: &Candidate,
        stage: Stage<'_>,
        failed: &mut Failed,
    ) -> Result<Choice, SlotError> {
        let mut asked = Asked::default();
        let end = matches!(stage, Stage::New { .. }).then(|| self.end_of_patience(candidate));
        let is_over = || end.is_some_and(|end| Instant::now() >= end);
        loop {
            let stage = if is_over() { Stage::New { may_ask: false } } else { stage };
            let (decision, slot) = self.decide(candidate, stage, failed, &asked.cut_off)?;
            let decision = Rc::new(decision);
            self.log_decision(candidate, &decision);
            let (index, slot) = match (&decision.verdict, slot) {
                (Verdict::Accept(index), Some(slot)) => (*index, slot),
                // Somebody took it without the right to choose; the next count will tell.
                (Verdict::Accept(_), None) => continue,
                (Verdict::Wait(machines), _) => return Ok(Choice::Wait(machines.clone())),
                (Verdict::Postpone(machines), _) => return Ok(Choice::Postpone(machines.clone())),
                (Verdict::Decline, _) => return Ok(Choice::Decline(decision.because)),
            };
            let choice = |index: usize, slot: Held, reached: Option<Reached>| {
                Choice::Machine(Box::new(Chosen { index, pace: decision.pace(index), slot, reached }))
            };
            if matches!(stage, Stage::Waited(_)) || self.may_be_promised(&self.machines[index], candidate) {
                return Ok(choice(index, slot, None));
            }
            let warm = self.known_to_answer(&decision, candidate);
            let raced = self.ask(&decision, index, warm.is_some(), candidate, end);
            if let Some(index) = self.note_failed(raced.failed, candidate, failed, &mut asked) {
                return Ok(Choice::Postpone(vec![index]));
            }
            for index in raced.slow {
                self.reach.note_slow(&self.machines[index], STAGGER);
            }
            let was_asked = raced.winner.is_some();
            let winner = raced.winner.or(warm.map(|warm| (warm, None)));
            let Some((winner, reached)) = winner else {
                if is_over() {
                    self.note_in_vain(raced.late);
                }
                continue;
            };
            let reached = reached.map(|reached| *reached);
            if winner == index {
                return Ok(choice(index, slot, reached));
            }
            drop(slot);
            if let Some(slot) = self.slot_instead(&decision, winner) {
                log_instead(&candidate.request.drv_path, &self.machines[winner].name, was_asked);
                return Ok(choice(winner, slot, reached));
            }
            // Somebody else has it by now. It answers, at least.
        }
    }

    /// The best of those machines that are known to answer and would do in the place of the chosen one. One that never had a
    /// build of ours has not answered us either, of which there may be a thousand.
    fn known_to_answer(&self, decision: &Decision, candidate: &Candidate) -> Option<usize> {
        let used = self.slots.used();
        decision.outranked().into_iter().find(|index| {
            let machine = &self.machines[*index];
            used.has(&machine.name) && self.may_be_promised(machine, candidate)
        })
    }

    /// Asks the machine of this index, and those that would do in its place unless there is one that is known to answer
    /// (`has_other`).
    fn ask(
        &self,
        decision: &Decision,
        index: usize,
        has_other: bool,
        candidate: &Candidate,
        end: Option<Instant>,
    ) -> Raced {
        let (reach, store_dir) = (&self.reach, &self.location.store_dir);
        let good = |index: usize, reached| {
            self.check_within(&self.machines[index], reached, candidate, self.time_to_check(end))
        };
        if has_other {
            return ask_one(reach, store_dir, &self.runner(index), end, good);
        }
        let asked = [index].into_iter().chain(decision.outranked().into_iter().take(MOST_RIVALS));
        let runners: Vec<Runner<'_>> = asked.map(|index| self.runner(index)).collect();
        race(reach, store_dir, &runners, end, good)
    }

    fn runner(&self, index: usize) -> Runner<'_> {
        let machine = &self.machines[index];
        // One that is about to wake up has no claim on Nix's patience.
        let waking = self.reach.waking(machine).is_some();
        Runner { index, machine, bound: if waking { WAKING_BOUND } else { self.reach.connect_timeout() } }
    }

    /// Notes for the next decision how machines failed. Gives one that is told to wake up again and again, which Nix is not
    /// to wait for.
    fn note_failed(
        &self,
        all: Vec<(usize, ReachError)>,
        candidate: &Candidate,
        failed: &mut Failed,
        asked: &mut Asked,
    ) -> Option<usize> {
        for (index, error) in all {
            let machine = &self.machines[index];
            let text = error.describe();
            if error.is_waking() {
                // The next choice will find it so, and wait for it.
                self.note_asleep(machine, &error);
                if !asked.woken.insert(index) {
                    return Some(index);
                }
                continue;
            }
            if error.is_no_network() {
                // It is used at once when there is one again.
                self.tell_of_network();
                asked.cut_off.insert(index);
                continue;
            }
            self.note_trial(candidate, index, End::GivenUp, &text);
            if matches!(error, ReachError::Distrust(_)) {
                log_failure(machine, &text);
                self.tell(index, &text);
                candidate.unfit.borrow_mut().insert(index, text);
            } else {
                self.note_failure(index, &error);
                failed.insert(index, text);
            }
        }
        None
    }

    /// The slot of another machine than the one that was chosen, if it is still free.
    fn slot_instead(&self, decision: &Decision, index: usize) -> Option<Held> {
        let (machine, needed) = (&self.machines[index], decision.weight(index));
        let _choosing = self.slots.lock_choice().ok()?;
        self.slots.take_many(&machine.name, machine.max_jobs, needed).ok().flatten()
    }
}
