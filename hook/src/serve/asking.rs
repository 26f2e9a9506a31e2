//! How long Nix is kept waiting for machines that are not known to answer: once for `connect-timeout`, however many they
//! are, and then not again for a while.
//!
//! Must never decide what becomes of a build meanwhile, or wait itself.

use super::ailing::log_failure;
use super::race::{CHECKING, Late};
use super::{Candidate, Failed, Hook, Stage};
use crate::plan;
use crate::reach::FIRST_PAUSE;
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime};

/// What a process remembers of the machines that it asked.
#[derive(Default)]
pub(super) struct Asking {
    /// Those from which there was no answer yet when Nix got its own.
    late: RefCell<Vec<Late>>,
    /// When Nix was last kept waiting for nothing.
    in_vain: Cell<Option<Instant>>,
    /// Since when no machine was known to answer, as of the last decision.
    pub(super) silent: Cell<Option<SystemTime>>,
}

impl Asking {
    /// Whether the machine of this index is being asked.
    pub(super) fn is_under_way(&self, index: usize) -> bool {
        self.late.borrow().iter().any(|late| late.asked.contains(&index))
    }
}

impl Hook<'_> {
    /// Until when Nix may wait for machines because of this request. Where it could build by itself, that any process of
    /// Nix was kept waiting for nothing a moment ago is reason enough not to wait. Else somebody is to see that a machine is
    /// back as soon as it is asked for, and only what this process did counts.
    pub(super) fn end_of_patience(&self, candidate: &Candidate) -> Instant {
        let was_here = self.asking.in_vain.get().is_some_and(|at| at.elapsed() < FIRST_PAUSE);
        let could_build = self.local.could_build(&candidate.request);
        let was_in_vain = was_here || could_build && self.reach.was_in_vain();
        Instant::now() + if was_in_vain { Duration::ZERO } else { self.reach.connect_timeout() }
    }

    /// How long a machine that has answered may take to say whether it takes the build, if Nix is to wait until `end`.
    pub(super) fn time_to_check(&self, end: Option<Instant>) -> Duration {
        time_to_check(self.reach.connect_timeout(), end, Instant::now())
    }

    /// Nix has waited for long enough, and there are machines that may still answer.
    pub(super) fn note_in_vain(&self, late: Option<Late>) {
        self.asking.in_vain.set(Some(Instant::now()));
        self.asking.late.borrow_mut().extend(late);
        self.reach.note_in_vain();
    }

    /// What has come of them since.
    pub(super) fn hear_of_late(&self, failed: &mut Failed) {
        let mut all = self.asking.late.borrow_mut();
        for late in all.iter_mut() {
            while let Some((index, reached)) = late.hear() {
                let Err(error) = reached else { continue };
                if !error.is_waking() && !error.is_no_network() {
                    // It is noted already, and told when this request has its answer.
                    let reason = error.describe();
                    log_failure(&self.machines[index], &reason);
                    failed.insert(index, reason);
                }
            }
        }
        all.retain(|late| !late.asked.is_empty());
    }

    /// Machines that are not to be asked for this build now: those that are being asked already, or all that are not known
    /// to answer if Nix is not to wait.
    pub(super) fn not_to_be_asked(&self, candidate: &Candidate, stage: Stage<'_>) -> HashSet<usize> {
        let Stage::New { may_ask } = stage else { return HashSet::new() };
        if may_ask && self.asking.late.borrow().is_empty() {
            return HashSet::new();
        }
        let is_silent = |index: &usize| {
            let machine = &self.machines[*index];
            (!may_ask || self.asking.is_under_way(*index))
                && plan::suits(machine, &candidate.request).is_ok()
                && !self.may_be_promised(machine, candidate)
        };
        (0..self.machines.len()).filter(is_silent).collect()
    }
}

fn time_to_check(most: Duration, end: Option<Instant>, now: Instant) -> Duration {
    end.map_or(most, |end| most.min((end + CHECKING).saturating_duration_since(now)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_that_answer_late_share_one_moment() {
        const MOST: Duration = Duration::from_secs(5);
        let end = Instant::now() + Duration::from_secs(60);
        let left = |before: f64, after: f64| {
            let now = end - Duration::from_secs_f64(before) + Duration::from_secs_f64(after);
            time_to_check(MOST, Some(end), now).as_secs_f64()
        };
        assert_eq!([left(20.0, 0.0), left(1.0, 0.0), left(0.0, 0.0)], [5.0, 2.0, 1.0]);
        assert_eq!([left(0.0, 0.75), left(0.0, 1.0), left(0.0, 30.0)], [0.25, 0.0, 0.0]);
        assert_eq!(time_to_check(MOST, None, end), MOST);
    }
}
