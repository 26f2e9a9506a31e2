//! What people are told of machines that cannot be used, and who has such machines tried again.
//!
//! Each failure is told by one process, once for each time that the machine is left alone, not for each derivation. A
//! build that nobody else can do is another matter: it says why, unless this process has said so already.

use super::{Failed, Hook};
use crate::plan::Request;
use crate::reach::ReachError;
use crate::wire::hook::Verbosity;
use std::time::SystemTime;

impl Hook<'_> {
    /// A machine could not be used for a reason that is its own.
    pub(super) fn note_failure(&self, index: usize, error: &ReachError) {
        let machine = &self.machines[index];
        let text = error.describe();
        tracing::warn!(builder = machine.name, reason = text, "cannot build on this machine");
        self.reach.note_failure(machine, error);
        self.tell_news(index, &text);
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

    fn tell(&self, index: usize, text: &str) {
        self.told.borrow_mut().insert(index);
        self.nix
            .message(Verbosity::Error, &format!("cannot build on '{}': {text}", self.machines[index].name));
    }

    /// Tells that this machine has no network, once.
    pub(super) fn tell_of_network(&self) {
        if self.reach.take_news_of_network() {
            tracing::warn!("this machine has no network");
            let text = "this machine has no network: no builds go to other machines until it has one";
            self.nix.message(Verbosity::Error, text);
        }
    }

    /// When the last decision has been answered: tells what is new of the machines that it left alone, and has those
    /// tried again for which it is time.
    pub(super) fn attend(&self, failed: &Failed) {
        self.tell_of_network();
        let mut ailing = self.memory.left_alone();
        ailing.extend(failed.keys());
        ailing.sort_unstable();
        ailing.dedup();
        for index in ailing {
            let machine = &self.machines[index];
            let Some(known) = self.reach.ailing(machine, SystemTime::now()) else { continue };
            if let Some(text) = self.reach.take_news(machine) {
                self.tell(index, &text);
            }
            if known.until.is_none() {
                self.reach.try_again(machine);
            }
        }
    }

    /// Forgets what failed in this process if it has been seen to be well since.
    pub(super) fn forget_what_is_well(&self, failed: &mut Failed) {
        failed.retain(|index, _| self.reach.ailing(&self.machines[*index], SystemTime::now()).is_some());
    }

    /// For a request that is answered with no: if it cannot be built here either, people are told which machines would have
    /// done it and why they cannot, those that this process has not told them of.
    pub(super) fn tell_why_nowhere(&self, request: &Request) {
        if self.local.could_build(request) {
            return;
        }
        for (index, why) in self.memory.out_of_reach() {
            let machine = &self.machines[index];
            if machine.uri.is_ours() && !self.told.borrow().contains(&index) {
                self.tell(index, &why);
            }
        }
    }
}
