//! Machines that failed: who is told of it, and that they are tried again.
//!
//! Each failure is told by one process, once for each time that the machine is left alone, not for each derivation. Must
//! never decide, or wait for a machine.

use super::{Failed, Hook};
use crate::plan::machine::Machine;
use crate::plan::{Decision, Refusal};
use crate::reach::ReachError;
use crate::wire::hook::Verbosity;
use nix_offload_proxy::exit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::SystemTime;

/// How many machines are tried at a time, whether they failed or Nix could not wait for them; each takes a process. The next
/// request has more of them tried.
const MOST_TRIED: usize = 16;

impl Hook<'_> {
    /// A machine could not be used for a reason that is its own.
    pub(super) fn note_failure(&self, index: usize, error: &ReachError) {
        let machine = &self.machines[index];
        let text = error.describe();
        log_failure(machine, &text);
        self.reach.note_failure(machine, error);
        self.tell_news(index, &text);
    }

    /// A machine lost a build again and again, though it can be connected to.
    pub(super) fn note_lost(&self, index: usize, how: &str) {
        self.reach.note_lost(&self.machines[index], how);
        self.tell_news(index, how);
    }

    /// Tells how a machine failed, unless another process has done so since it failed. `text` is for the case that its
    /// failure could not be noted.
    fn tell_news(&self, index: usize, text: &str) {
        let machine = &self.machines[index];
        match self.reach.take_news(machine) {
            Some(text) => self.tell(index, &text),
            None if self.reach.ailing(machine, SystemTime::now()).is_none() => self.tell(index, text),
            None => {}
        }
    }

    /// Tells in full how a machine failed.
    pub(super) fn tell(&self, index: usize, text: &str) {
        self.memory.note_said(index, text);
        self.nix
            .message(Verbosity::Error, &format!("cannot build on '{}': {text}", self.machines[index].name));
    }

    /// A machine is down and about to wake up. The user is told by whoever woke it.
    pub(super) fn note_asleep(&self, machine: &Machine, error: &ReachError) {
        let (name, reason) = (machine.name.as_str(), error.describe());
        let event = "waiting for this machine to wake up";
        let line = exit::first_line(&reason);
        tracing::info!(event, builder = name, reason, "waiting for {name} to wake up: {line}");
        if error.has_just_begun_to_wake() {
            self.nix.message(Verbosity::Warn, &format!("waking '{name}', which is down"));
        }
    }

    /// Tells that this machine has no network, once.
    pub(super) fn tell_of_network(&self) {
        if self.reach.take_news_of_network() {
            tracing::warn!("this machine has no network, so no builds go to other machines");
            let text = "this machine has no network: no builds go to other machines until it has one";
            self.nix.message(Verbosity::Error, text);
        }
    }

    /// When the last decision has been answered: tells what is new of the machines that it left alone, and has those
    /// tried again for which it is time, or asked that Nix could not wait for. Those that are short of something are to be
    /// looked at further. That takes a connection, and the sampler makes none, so it is made here if it has ended.
    pub(super) fn attend(&self, failed: &Failed) {
        // No build is to be lost for a fault in this.
        let _ = catch_unwind(AssertUnwindSafe(|| self.tell_and_try(failed)));
    }

    fn tell_and_try(&self, failed: &Failed) {
        self.tell_of_network();
        for index in self.memory.short() {
            self.reach.note_wanted(&self.machines[index]);
        }
        let (unasked, recalled) = (self.memory.unasked(), self.memory.recalled());
        if !recalled.is_empty() {
            self.interest.show();
        }
        let mut ailing = self.memory.left_alone();
        ailing.extend(failed.keys());
        ailing.extend(unasked.iter().chain(&recalled));
        ailing.sort_unstable();
        ailing.dedup();
        let mut tried = 0;
        for index in ailing {
            let machine = &self.machines[index];
            let is_due = match self.reach.ailing(machine, SystemTime::now()) {
                None => {
                    let is_to_be_seen = recalled.contains(&index) && !self.reach.is_warm(machine);
                    is_to_be_seen || unasked.contains(&index) && !self.asking.is_under_way(index)
                }
                Some(known) => {
                    if let Some(text) = self.reach.take_news(machine) {
                        self.tell(index, &text);
                    }
                    known.until.is_none()
                }
            };
            if is_due && tried < MOST_TRIED && self.reach.try_again(machine) {
                tried += 1;
            }
        }
    }

    /// Has those tried again for which it is time, of the machines that a decision left alone for their health.
    pub(super) fn try_what_ailed(&self, decision: &Decision) {
        let left_alone = decision
            .refusals()
            .filter(|(_, refusal)| matches!(refusal, Refusal::CoolDown { .. } | Refusal::Failed(_)));
        let machines = left_alone.map(|(index, _)| &self.machines[index]);
        let is_due = |machine: &&Machine| {
            let known = self.reach.ailing(machine, SystemTime::now());
            known.is_some_and(|known| known.until.is_none())
        };
        machines
            .filter(is_due)
            .filter(|machine| self.reach.try_again(machine))
            .take(MOST_TRIED)
            .for_each(drop);
    }

    /// Forgets what failed in this process if it has been seen to be well since.
    pub(super) fn forget_what_is_well(&self, failed: &mut Failed) {
        failed.retain(|index, _| self.reach.ailing(&self.machines[*index], SystemTime::now()).is_some());
    }
}

/// Logs how a machine could not be used.
pub(super) fn log_failure(machine: &Machine, reason: &str) {
    let (event, name) = ("cannot build on this machine", machine.name.as_str());
    tracing::warn!(event, builder = name, reason, "cannot build on {name}: {}", exit::first_line(reason));
}
