//! What the user is told when no machine gets a build: a table of what is missing where, once in a Nix command for all
//! builds that are kept from the machines by the same things.
//!
//! Nix's own hook prints such a table for each derivation, at the level of warnings where nothing can build it (`Failed to
//! find a machine for remote build!` in Nix 2.34 `src/nix/build-remote/build-remote.cc`).
//!
//! Must never hold up a reply.

use super::{Hook, NOWHERE};
use crate::plan::{Because, Decision, Local, Refusal, Request, Verdict, telling};
use crate::wire::hook::Verbosity;

impl Hook<'_> {
    /// Tells what was missing in the last decision, if nobody has in this command. `local` is what Nix can still build
    /// itself.
    pub(super) fn tell_what_is_missing(&self, request: &Request, local: &Local) {
        self.tell_table(request, local, "Nix asks again every few seconds");
    }

    /// The same for a build that is accepted and waits here.
    pub(super) fn tell_what_is_waited_for(&self, request: &Request) {
        self.tell_table(request, &NOWHERE, "it waits for one");
    }

    fn tell_table(&self, request: &Request, local: &Local, meanwhile: &str) {
        let latest = self.memory.latest();
        let Some(decision) = latest.as_ref() else { return };
        let Some(level) = level(decision, local.could_build(request)) else { return };
        if !self.memory.is_first_told(&telling::gist(decision, request)) {
            return;
        }
        let here = telling::here(&self.local, request).filter(|_| level == Verbosity::Warn);
        let is_said = |index: usize, why: &str| self.memory.was_said(index, why);
        let table = telling::table_below(decision, self.machines, here.as_deref(), &is_said);
        let (needs, derivation) = (telling::needs(request), &request.drv_path);
        let (head, tail) = match decision.because {
            Because::Obstacles => (
                format!("no machine can take '{derivation}' ({needs}) at present:"),
                format!(
                    "{meanwhile}, for {} at most",
                    telling::seconds(self.rules.obstacle_patience.as_secs_f64())
                ),
            ),
            _ if level == Verbosity::Warn => {
                (format!("nothing can build '{derivation}' ({needs}):"), String::new())
            }
            _ => (format!("no machine can build '{derivation}' ({needs}), but this one can:"), String::new()),
        };
        let same = "other derivations with the same needs fare alike, and are not listed";
        let tail = if tail.is_empty() { same.to_owned() } else { format!("{tail}; {same}") };
        self.nix.message(level, &format!("nix-offload: {head}\n{table}  ({tail})"));
    }
}

/// How important it is; none if there is nothing to tell.
fn level(decision: &Decision, could_build: bool) -> Option<Verbosity> {
    let nobody_can =
        matches!(decision.because, Because::NothingFits | Because::ObstaclesTooLong | Because::Silent);
    match decision.verdict {
        Verdict::Decline if nobody_can && !could_build => Some(Verbosity::Warn),
        // That machines for other systems do not build it is what they are for.
        Verdict::Decline if nobody_can => {
            let is_for_it = |refusal: &Refusal| *refusal != Refusal::System;
            decision.refusals().any(|(_, refusal)| is_for_it(refusal)).then_some(Verbosity::Talkative)
        }
        Verdict::Postpone(_) if decision.because == Because::Obstacles => Some(Verbosity::Warn),
        _ => None,
    }
}
