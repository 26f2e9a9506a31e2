//! Builds that run and are begun anew on a machine that has become free and where they go much faster (`plan::moving`).
//!
//! Must never end a build before it has a place elsewhere.

use super::{Candidate, Chosen, Failed, Hook, Stage};
use crate::builder::{Ahead, Review};
use crate::derivation;
use crate::plan::machine::Machine;
use crate::plan::moving::{self, Move, Running};
use crate::plan::{Decision, Health, Verdict, Work, telling};
use crate::queue::Waiting;
use crate::reach::{ReachError, Reached};
use crate::sampler::Samples;
use crate::wire::hook::Verbosity;
use nix_offload_proxy::exit;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

/// How often a build that runs is looked at.
const EVERY: Duration = Duration::from_secs(10);

/// How often, at most, a machine of whose load nothing is known is connected to, so that the sampler can ask it.
const ASK_EVERY: Duration = Duration::from_secs(120);

/// The look-out for a better machine while a build runs.
pub(super) struct Outlook<'h, 'a> {
    hook: &'h Hook<'a>,
    candidate: &'h Candidate,
    /// The place of its machine in the list.
    on: usize,
    /// Machines that failed in this process.
    failed: &'h Failed,
    /// Machines that turned out not to trust us with this build.
    distrusted: RefCell<Failed>,
    /// Machines that were connected to so that they are sampled, and when, since the build began.
    asked: RefCell<HashMap<usize, Duration>>,
    found: Cell<Option<Better>>,
}

/// A place for it on a better machine.
pub(super) struct Better {
    chosen: Chosen,
    decision: Decision,
    worth: Move,
}

impl<'a> Hook<'a> {
    /// None if no machine could ever be so much better than the one of this index.
    pub(super) fn outlook<'h>(
        &'h self,
        candidate: &'h Candidate,
        on: usize,
        failed: &'h Failed,
    ) -> Option<Outlook<'h, 'a>> {
        if !self.rules.begin_anew {
            return None;
        }
        let is_measured = self.offload.sample_every().is_some();
        let mut rivals = moving::rivals(self.machines, &candidate.request, on, is_measured);
        let (distrusted, asked, found) = Default::default();
        rivals.any(|index| !self.is_shared(index)).then_some(Outlook {
            hook: self,
            candidate,
            on,
            failed,
            distrusted,
            asked,
            found,
        })
    }

    /// Whether a build might have to wait for a lease there.
    fn is_shared(&self, index: usize) -> bool {
        self.offload.of_machine(&self.machines[index]).shared_slots.is_some()
    }

    /// Goes over to the better machine, when the build has ended where it was.
    pub(super) fn move_to(&self, better: Better, candidate: &Candidate, from: &Machine) -> Box<Chosen> {
        let Better { chosen, decision, worth } = better;
        let derivation = candidate.request.drv_path.as_str();
        let (here, there) = (&from.name, &self.machines[chosen.index].name);
        let (stay, go) = (telling::seconds(worth.stay), telling::seconds(worth.go));
        let decision = Rc::new(decision);
        self.log_decision(candidate, &decision);
        let reason = format!("it would take about {stay} more on '{here}', {go} there");
        let name = derivation::name_in(derivation);
        tracing::info!(
            event = "begun anew",
            derivation,
            builder = there,
            reason,
            "'{name}' begins anew on {there}: {reason}"
        );
        let text = format!("beginning '{derivation}' anew on '{there}': {reason}");
        self.nix.message(Verbosity::Info, &text);
        Box::new(chosen)
    }
}

impl Outlook<'_, '_> {
    /// When to look; `calls_off` is to do it by [`Outlook::finds`].
    pub(super) fn review<'o>(&self, calls_off: &'o dyn Fn(Duration) -> bool) -> Review<'o> {
        Review { first: Duration::from_secs_f64(moving::SETTLED), every: EVERY, calls_off }
    }

    /// Whether there is a better machine for a build that has run for the time `ran`. Its slot is kept until it is
    /// [taken](Outlook::take) or [left](Outlook::leave).
    pub(super) fn finds(&self, ran: Duration) -> bool {
        // No other hook may be there to do it when the sampler was killed, or was replaced with its program.
        self.hook.interest.show();
        let derivation = self.candidate.request.drv_path.as_str();
        match self.better(ran) {
            Ok(better) => {
                self.found.set(Some(better));
                true
            }
            Err(reason) => {
                tracing::debug!(derivation, reason, "not begun anew");
                false
            }
        }
    }

    pub(super) fn take(&self) -> Option<Better> {
        self.found.take()
    }

    pub(super) fn leave(&self) {
        self.found.set(None);
    }

    /// Whether there can be a better place at all, by a look at the machine where it runs alone.
    fn is_worth_a_look(&self) -> bool {
        let Self { hook, candidate, on, .. } = *self;
        let samples = Samples::read(&Samples::path(hook.reach.directory()));
        let here = samples.of(&hook.reach.key(&hook.machines[on])).map(|entry| &entry.sample);
        let now = SystemTime::now();
        moving::is_worth_a_look(hook.machines, &candidate.request, on, here, &hook.rules, now)
    }

    /// The better place, or why there is none.
    fn better(&self, ran: Duration) -> Result<Better, String> {
        let Self { hook, candidate, on, failed, .. } = *self;
        if !self.is_worth_a_look() {
            return Err("it goes on well".into());
        }
        if hook.queue.waiting() != Waiting::default() {
            return Err("builds wait for a slot".into());
        }
        if hook.memory.is_anything_postponed() {
            return Err("Nix is about to ask again for builds".into());
        }
        let running = Running { on, elapsed: ran.as_secs_f64(), was_moved: false };
        // It does not wait, so it is not to be content with what there is.
        let work = Work { waiting_since: None, obstructed_since: None, ..candidate.work };
        let mut failed = failed.clone();
        // The build may have run for hours since they failed.
        hook.forget_what_is_well(&mut failed);
        let (distrusted, unfit) = (self.distrusted.borrow(), candidate.unfit.borrow());
        let health = |index: usize| {
            if index != on && hook.is_shared(index) {
                let why = "it shares its slots, so no build that runs is begun anew on it";
                return Some(Health::Unreachable(why.to_owned()));
            }
            let reason = failed.get(&index).or_else(|| distrusted.get(&index)).or_else(|| unfit.get(&index));
            reason.map(|reason| Health::Failed(reason.clone()))
        };
        let mut worth = None;
        let decided = hook.decide_if((candidate, &work), Stage::Waited(None), health, |decision| {
            worth = moving::worth_moving(hook.machines, decision, &running)
                .filter(|worth| worth.is_known || self.may_ask(worth.to, ran));
            worth.is_some()
        });
        drop(distrusted);
        let (decision, slot) = decided.map_err(|error| exit::reason(&error))?;
        // No other hook may be there to do it: Nix asks for nothing while this build is all that is left.
        hook.try_what_ailed(&decision);
        let (Verdict::Accept(index), Some(slot), Some(worth)) = (&decision.verdict, slot, worth) else {
            return Err("no machine is that much better".into());
        };
        let (index, machine) = (*index, &hook.machines[*index]);
        // Nobody waits for the answer, and a machine that gives none is to be known before the build has ended here.
        let reached = self.reach(machine).map_err(|error| self.failure_of(index, error))?;
        if !worth.is_known {
            // Now it is one of those that are sampled.
            hook.interest.show();
            return Err(format!("'{}': its load is not known yet", machine.name));
        }
        let chosen = Chosen { index, pace: decision.pace(index), slot, reached };
        Ok(Better { chosen, decision, worth })
    }

    /// Whether a machine of whose load nothing is known may be connected to, at this time of the build.
    fn may_ask(&self, index: usize, ran: Duration) -> bool {
        let mut asked = self.asked.borrow_mut();
        let may = asked.get(&index).is_none_or(|last| ran.saturating_sub(*last) >= ASK_EVERY);
        if may {
            asked.insert(index, ran);
        }
        may
    }

    fn reach(&self, machine: &Machine) -> Result<Option<Reached>, ReachError> {
        let hook = self.hook;
        let reached = hook.connect(machine, hook.reach.connect_timeout(), &Ahead::default())?;
        hook.check(machine, reached, self.candidate)
    }

    fn failure_of(&self, index: usize, error: ReachError) -> String {
        let text = error.describe();
        if matches!(error, ReachError::Distrust(_)) {
            self.distrusted.borrow_mut().insert(index, text.clone());
        } else if !error.is_waking() && !error.is_no_network() {
            self.hook.note_failure(index, &error);
        }
        format!("'{}': {text}", self.hook.machines[index].name)
    }
}
