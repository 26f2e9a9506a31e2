//! The accepted build, from machine to machine until one of them has done it.
//!
//! Must never try another machine for a build that failed by itself.

use super::attempts::{Ended, plain};
use super::{Accepted, Candidate, Chosen, Failed, Hook, NOWHERE, Stage};
use crate::derivation;
use crate::wire::hook::{Job, Verbosity};
use nix_offload_proxy::exit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

/// How long to wait when a machine that was taken for reachable is cut off again and again.
const CUT_OFF_PAUSE: Duration = Duration::from_secs(2);

impl Hook<'_> {
    /// Runs the accepted build, on another machine if the first cannot be kept. Gives the exit status.
    pub(super) fn build(
        &self,
        candidate: &Candidate,
        accepted: Accepted,
        job: &Job,
        mut failed: Failed,
    ) -> u8 {
        let (told, mut next) = match accepted {
            Accepted::Now(chosen) => (chosen.index, Some(*chosen)),
            Accepted::Waiting(named, place) => (named, self.wait_in(candidate, &mut failed, place)),
        };
        let (hook, tried) = (self, Vec::new());
        let mut course = Course { hook, candidate, failed, tried, told, was_moved: false, cut_off: None };
        while let Some(chosen) = next {
            let index = chosen.index;
            if index != course.told {
                course.tell_where(index, Verbosity::Info);
            }
            next = match course.build_on(chosen, job) {
                Ended::Done(_) => return exit::OK,
                Ended::Final(status, text) => {
                    course.tell_failure(index, &text);
                    return status;
                }
                Ended::Moved(better) => Some(course.begin_anew(*better)),
                Ended::Asleep => course.choose_again(Stage::Waited(None)),
                Ended::CutOff { had_network } => course.wait_for_network(index, had_network),
                Ended::Elsewhere(text) => {
                    course.give_up(index, &text);
                    candidate.unfit.borrow_mut().insert(index, text);
                    course.go_elsewhere()
                }
                Ended::Unreachable(text) => {
                    course.give_up(index, &text);
                    course.failed.insert(index, text);
                    course.go_elsewhere()
                }
            };
        }
        course.tell_that_none_did();
        exit::FAILURE
    }
}

/// The accepted build on its way from machine to machine.
struct Course<'h, 'a> {
    hook: &'h Hook<'a>,
    candidate: &'h Candidate,
    failed: Failed,
    /// Machines that were given up, and why.
    tried: Vec<String>,
    /// Where the user was told that it is built, by Nix at first.
    told: usize,
    was_moved: bool,
    /// Since when there has been no network, each time that it was about to go on.
    cut_off: Option<Instant>,
}

impl Course<'_, '_> {
    /// Builds on that machine, and notes what came of it.
    fn build_on(&self, chosen: Chosen, job: &Job) -> Ended {
        let Self { hook, candidate, .. } = self;
        let index = chosen.index;
        let done = catch_unwind(AssertUnwindSafe(|| {
            let outlook = (!self.was_moved).then(|| hook.outlook(candidate, index, &self.failed)).flatten();
            hook.build_on(candidate, chosen, job, outlook.as_ref())
        }));
        let ended = done.unwrap_or_else(|_| {
            Ended::Final(1, "internal error of nix-offload (see journalctl -t nix-offload)".into())
        });
        let (end, how) = ended.outcome();
        hook.note_trial(candidate, index, end, &plain(how));
        self.keep_trials();
        ended
    }

    fn begin_anew(&mut self, better: Chosen) -> Chosen {
        self.was_moved = true;
        // The user knows.
        self.told = better.index;
        better
    }

    /// Waits until there is a network and a slot. None if it has no patience left for that.
    fn wait_for_network(&mut self, index: usize, had_network: bool) -> Option<Chosen> {
        self.hook.tell_of_network();
        let since = self.cut_off.filter(|_| !had_network);
        if let Some(since) = since {
            if since.elapsed() >= self.hook.rules.obstacle_patience {
                self.tried.push(format!("{}: this machine has no network", self.name_of(index)));
                return None;
            }
            thread::sleep(CUT_OFF_PAUSE);
        }
        self.cut_off = since.or_else(|| Some(Instant::now()));
        let asked = Instant::now();
        let next = self.choose_again(Stage::Waited(None));
        if asked.elapsed() >= CUT_OFF_PAUSE {
            // It waited, with a patience of its own, until there was a network: the next time is another one.
            self.cut_off = None;
        }
        next
    }

    fn give_up(&mut self, index: usize, text: &str) {
        let (derivation, builder, reason) = (self.derivation(), self.name_of(index), plain(text));
        tracing::warn!(
            event = "giving up this machine",
            derivation,
            builder,
            reason,
            "giving up {builder} for '{}': {}",
            derivation::name_in(derivation),
            exit::first_line(&reason)
        );
        // Whoever sees nothing but the last error is to know why; what helps stands above it.
        let is_said = self.hook.memory.was_said(index, text);
        let why = if is_said { text.lines().next().unwrap_or_default() } else { text };
        let tried = format!("{builder}: {why}");
        self.tried.push(tried);
        self.hook.forget_what_is_well(&mut self.failed);
    }

    fn go_elsewhere(&mut self) -> Option<Chosen> {
        let next = self.choose_again(Stage::Again)?;
        self.tell_where(next.index, Verbosity::Warn);
        Some(next)
    }

    fn choose_again(&mut self, stage: Stage<'_>) -> Option<Chosen> {
        self.hook.choose_again(self.candidate, stage, &mut self.failed)
    }

    fn tell_where(&mut self, index: usize, level: Verbosity) {
        self.told = index;
        let text = format!("building '{}' on '{}' instead", self.derivation(), self.name_of(index));
        self.hook.nix.message(level, &text);
    }

    /// The build failed by itself.
    fn tell_failure(&self, index: usize, text: &str) {
        let (derivation, builder, why) = (self.derivation(), self.name_of(index), plain(text));
        let text = format!("build of '{derivation}' on '{builder}' failed: {text}");
        tracing::info!(
            event = "failed",
            derivation,
            builder,
            reason = plain(&text),
            "build of '{}' on {builder} failed: {}",
            derivation::name_in(derivation),
            exit::first_line(&why)
        );
        self.hook.nix.message(Verbosity::Error, &format!("error: {text}"));
    }

    fn tell_that_none_did(&self) {
        let (derivation, tried) = (self.derivation(), &self.tried);
        self.hook.tell_what_is_missing(&self.candidate.request, &NOWHERE);
        let after = if tried.is_empty() {
            " (see above)".to_owned()
        } else {
            format!("; tried:\n  {}", tried.join("\n  "))
        };
        let text = format!("error: '{derivation}' could not be built on any machine{after}");
        tracing::error!(
            event = "failed",
            derivation,
            reason = plain(&text),
            "'{}' could not be built on any machine{}",
            derivation::name_in(derivation),
            told_in_one_line(tried)
        );
        self.keep_trials();
        self.hook.nix.message(Verbosity::Error, &text);
    }

    fn keep_trials(&self) {
        let trials = self.candidate.trials.borrow();
        self.hook.memory.keep_latest(self.derivation(), self.hook.machines, &trials);
    }

    fn derivation(&self) -> &str {
        &self.candidate.request.drv_path
    }

    fn name_of(&self, index: usize) -> &str {
        &self.hook.machines[index].name
    }
}

/// The machines that were tried, and the first line of why each was given up.
fn told_in_one_line(tried: &[String]) -> String {
    let lines: Vec<String> = tried.iter().map(|text| exit::first_line(&plain(text)).to_owned()).collect();
    if lines.is_empty() { String::new() } else { format!(": {}", lines.join("; ")) }
}
