//! Choosing a machine, and asking it where it is not known to answer.
//!
//! Must never have a rule of its own about which machine is better.

use super::ailing::log_failure;
use super::race::{Runner, STAGGER, log_instead, race};
use super::{Candidate, Chosen, Failed, Hook, Stage};
use crate::plan::Verdict;
use crate::reach::ReachError;
use crate::slots::SlotError;
use crate::state::End;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How many further machines are contacted in parallel when the best one is not known to answer.
const MOST_RIVALS: usize = 15;

/// How long connecting may take before the reply to a machine that was down a moment ago and is being woken.
const WAKING_BOUND: Duration = Duration::from_millis(1500);

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
    ) -> Result<(Verdict, Option<Chosen>), SlotError> {
        let mut cut_off = HashSet::new();
        let mut woken = HashSet::new();
        let end = matches!(stage, Stage::New { .. }).then(|| self.end_of_patience(candidate));
        loop {
            let is_over = end.is_some_and(|end| Instant::now() >= end);
            let stage = if is_over { Stage::New { may_ask: false } } else { stage };
            let (decision, slot) = self.decide(candidate, stage, failed, &cut_off)?;
            let decision = Rc::new(decision);
            self.log_decision(candidate, &decision);
            let (index, slot) = match (&decision.verdict, slot) {
                (Verdict::Accept(index), Some(slot)) => (*index, slot),
                // Somebody took it without the right to choose; the next count will tell.
                (Verdict::Accept(_), None) => continue,
                _ => return Ok((decision.verdict.clone(), None)),
            };
            let machine = &self.machines[index];
            if matches!(stage, Stage::Waited(_)) || self.may_be_promised(machine, candidate) {
                let chosen = Chosen { index, pace: decision.pace(index), slot, reached: None };
                return Ok((decision.verdict.clone(), Some(chosen)));
            }
            // Among those that would do, a machine that is known to answer must not wait for the others for long.
            // One that never had a build of ours has not answered us either, which there may be a thousand of.
            let (outranked, used) = (decision.outranked(), self.slots.used());
            let warm = outranked.iter().copied().find(|index| {
                let machine = &self.machines[*index];
                used.has(&machine.name) && self.may_be_promised(machine, candidate)
            });
            let mut runners = vec![self.runner(index)];
            if warm.is_none() {
                runners.extend(outranked.into_iter().take(MOST_RIVALS).map(|index| self.runner(index)));
            }
            let good = |index: usize, reached| {
                self.check_within(&self.machines[index], reached, candidate, self.time_to_check(end))
            };
            let raced = race(&self.reach, &self.location.store_dir, &runners, warm.is_some(), end, good);
            for (index, error) in raced.failed {
                let machine = &self.machines[index];
                let text = error.describe();
                if error.is_waking() {
                    // The next choice will find it so, and wait for it.
                    self.note_asleep(machine, &error);
                    if !woken.insert(index) {
                        return Ok((Verdict::Postpone(vec![index]), None));
                    }
                    continue;
                }
                if !error.is_no_network() {
                    self.note_trial(candidate, index, End::GivenUp, &text);
                }
                match error {
                    ReachError::Distrust(_) => {
                        log_failure(machine, &text);
                        self.tell(index, &text);
                        candidate.unfit.borrow_mut().insert(index, text);
                    }
                    // It is used at once when there is one again.
                    error if error.is_no_network() => {
                        self.tell_of_network();
                        cut_off.insert(index);
                    }
                    error => {
                        self.note_failure(index, &error);
                        failed.insert(index, text);
                    }
                }
            }
            for index in raced.slow {
                self.reach.note_slow(&self.machines[index], STAGGER);
            }
            if raced.winner.is_none() && warm.is_none() && end.is_some_and(|end| Instant::now() >= end) {
                self.note_in_vain(raced.late);
            }
            let was_asked = raced.winner.is_some();
            let (winner, reached) = match raced.winner {
                Some((winner, reached)) => (winner, reached.map(|reached| *reached)),
                None => match warm {
                    Some(warm) => (warm, None),
                    None => continue,
                },
            };
            if winner == index {
                let chosen = Chosen { index, pace: decision.pace(index), slot, reached };
                return Ok((Verdict::Accept(index), Some(chosen)));
            }
            drop(slot);
            let (machine, slots) = (&self.machines[winner], decision.weight(winner));
            let slot = self
                .slots
                .lock_choice()
                .and_then(|_choosing| self.slots.take_many(&machine.name, machine.max_jobs, slots));
            if let Ok(Some(slot)) = slot {
                log_instead(&candidate.request.drv_path, &machine.name, was_asked);
                let chosen = Chosen { index: winner, pace: decision.pace(winner), slot, reached };
                return Ok((Verdict::Accept(winner), Some(chosen)));
            }
            // Somebody else has the slot by now. It answers, at least.
        }
    }

    fn runner(&self, index: usize) -> Runner<'_> {
        let machine = &self.machines[index];
        // One that is about to wake up has no claim on Nix's patience.
        let waking = self.reach.waking(machine).is_some();
        Runner { index, machine, bound: if waking { WAKING_BOUND } else { self.reach.connect_timeout() } }
    }
}
