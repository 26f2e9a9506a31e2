//! Builds that wait in hooks of ours for a slot, and builds that do not stay where they began.

use super::{Event, What, World};
use crate::site::{Site, clock};
use nix_offload::plan::turn::{self, Waiting};
use nix_offload::plan::{Because, Verdict};

/// A build that waits looks again after so long even if nothing happens.
const LOOK_AGAIN: f64 = 2.0;

impl World<'_> {
    /// Those that wait in hooks of ours are served, as far as there are slots. One that is held back for a machine lets
    /// others pass.
    pub(super) fn serve_waiting(&mut self) {
        let mut passed = 0;
        if self.sites.iter().any(Site::is_free) {
            self.put_in_order();
            while self.sites.iter().any(Site::is_free) {
                let Some(job) = self.waiting.get(passed).copied() else { break };
                match self.decide(job) {
                    (Verdict::Accept(site), _) => {
                        self.waiting.remove(passed);
                        self.start(job, site);
                    }
                    (_, Because::HeldBack) if passed < turn::LET_PASS => passed += 1,
                    _ => break,
                }
            }
        }
        self.look_later();
    }

    fn put_in_order(&mut self) {
        let waiting: Vec<Waiting> = self.waiting.iter().map(|job| self.waits(*job)).collect();
        self.waiting = turn::order(&waiting).into_iter().map(|place| self.waiting[place]).collect();
    }

    pub(super) fn waits(&self, job: usize) -> Waiting {
        let since = clock(self.jobs[job].asked.unwrap_or(self.now));
        Waiting { user: 0, slots: 0, since, tail: self.tails[job] }
    }

    /// Builds on slow machines begin anew on faster ones for which nobody waits.
    pub(super) fn move_builds(&mut self) {
        for from in 0..self.sites.len() {
            let jobs: Vec<usize> = self.sites[from].builds.users().collect();
            for job in jobs {
                let is_any_free = self.sites.iter().any(Site::is_free);
                if !is_any_free || !self.waiting.is_empty() || !self.postponed.is_empty() {
                    return;
                }
                let Some(to) = self.better_place(job, from) else { continue };
                self.advance(from, What::Build);
                self.sites[from].builds.remove(job);
                self.go_on(from, What::Build);
                self.jobs[job].attempt += 1;
                self.jobs[job].was_moved = true;
                self.outcome.moved += 1;
                self.give_back(job, from);
                self.start(job, to);
            }
        }
    }

    pub(super) fn look_later(&mut self) {
        if !self.waiting.is_empty() && !self.is_looking {
            self.is_looking = true;
            self.after(LOOK_AGAIN, Event::Look);
        }
    }
}
