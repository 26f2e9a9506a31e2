//! The accepted build, from machine to machine until one of them has done it.
//!
//! Must never try another machine for a build that failed by itself.

use super::attempts::{Ended, plain};
use super::{Accepted, Candidate, Failed, Hook, NOWHERE, Stage};
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
        let derivation = candidate.request.drv_path.as_str();
        let mut tried = Vec::new();
        let mut was_moved = false;
        // Where the user was told that it is built, by Nix at first.
        let (mut told, mut next) = match accepted {
            Accepted::Now(chosen) => (chosen.index, Some(*chosen)),
            Accepted::Waiting(named, place) => (named, self.wait_in(candidate, &mut failed, place)),
        };
        let mut cut_off: Option<Instant> = None;
        while let Some(current) = next.take() {
            let index = current.index;
            let name = self.machines[index].name.as_str();
            if index != std::mem::replace(&mut told, index) {
                let text = format!("building '{derivation}' on '{name}' instead");
                self.nix.message(Verbosity::Info, &text);
            }
            let done = catch_unwind(AssertUnwindSafe(|| {
                let outlook = (!was_moved).then(|| self.outlook(candidate, index, &failed)).flatten();
                self.build_on(candidate, current, job, outlook.as_ref())
            }));
            let attempt = done.unwrap_or_else(|_| {
                Ended::Final(1, "internal error of nix-offload (see journalctl -t nix-offload)".into())
            });
            let (end, how) = attempt.outcome();
            self.note_trial(candidate, index, end, &plain(how));
            self.memory.keep_latest(derivation, self.machines, &candidate.trials.borrow());
            let is_for_good = matches!(attempt, Ended::Elsewhere(_));
            match attempt {
                Ended::Done(_) => return exit::OK,
                Ended::Final(status, text) => {
                    let text = format!("build of '{derivation}' on '{name}' failed: {text}");
                    let reason = plain(&text);
                    let drv_name = derivation::name_in(derivation);
                    let why = reason.split_once(" failed: ").map_or(reason.as_str(), |(_, why)| why);
                    tracing::info!(
                        event = "failed",
                        derivation,
                        builder = name,
                        reason,
                        "build of '{drv_name}' on {name} failed: {}",
                        exit::first_line(why)
                    );
                    self.nix.message(Verbosity::Error, &format!("error: {text}"));
                    return status;
                }
                Ended::Moved(chosen) => {
                    was_moved = true;
                    told = chosen.index;
                    next = Some(*chosen);
                }
                Ended::Asleep => next = self.choose_again(candidate, Stage::Waited(None), &mut failed),
                Ended::CutOff { had_network } => {
                    self.tell_of_network();
                    let since = cut_off.filter(|_| !had_network);
                    match since.map(|since| since.elapsed()) {
                        Some(elapsed) if elapsed >= self.rules.obstacle_patience => {
                            tried.push(format!("{name}: this machine has no network"));
                            break;
                        }
                        Some(_) => thread::sleep(CUT_OFF_PAUSE),
                        None => {}
                    }
                    cut_off = since.or_else(|| Some(Instant::now()));
                    let asked = Instant::now();
                    next = self.choose_again(candidate, Stage::Waited(None), &mut failed);
                    if asked.elapsed() >= CUT_OFF_PAUSE {
                        // It waited, with a patience of its own, until there was a network: the next time is another one.
                        cut_off = None;
                    }
                }
                Ended::Elsewhere(text) | Ended::Unreachable(text) => {
                    let reason = plain(&text);
                    let drv_name = derivation::name_in(derivation);
                    tracing::warn!(
                        event = "giving up this machine",
                        derivation,
                        builder = name,
                        reason,
                        "giving up {name} for '{drv_name}': {}",
                        exit::first_line(&reason)
                    );
                    // Whoever sees nothing but the last error is to know why; what helps stands above it.
                    let is_said = self.memory.was_said(index, &text);
                    let why = if is_said { text.lines().next().unwrap_or_default() } else { &text };
                    tried.push(format!("{name}: {why}"));
                    self.forget_what_is_well(&mut failed);
                    if is_for_good {
                        candidate.unfit.borrow_mut().insert(index, text);
                    } else {
                        failed.insert(index, text);
                    }
                    next = self.choose_again(candidate, Stage::Again, &mut failed);
                    if let Some(next) = &next {
                        told = next.index;
                        let name = &self.machines[next.index].name;
                        let text = format!("building '{derivation}' on '{name}' instead");
                        self.nix.message(Verbosity::Warn, &text);
                    }
                }
            }
        }
        self.tell_what_is_missing(&candidate.request, &NOWHERE);
        let after = if tried.is_empty() {
            " (see above)".to_owned()
        } else {
            format!("; tried:\n  {}", tried.join("\n  "))
        };
        let text = format!("error: '{derivation}' could not be built on any machine{after}");
        let reason = plain(&text);
        tracing::error!(
            event = "failed",
            derivation,
            reason,
            "'{}' could not be built on any machine{}",
            derivation::name_in(derivation),
            told_in_one_line(&tried)
        );
        self.memory.keep_latest(derivation, self.machines, &candidate.trials.borrow());
        self.nix.message(Verbosity::Error, &text);
        exit::FAILURE
    }
}

/// The machines that were tried, and the first line of why each was given up.
fn told_in_one_line(tried: &[String]) -> String {
    let lines: Vec<String> = tried.iter().map(|text| exit::first_line(&plain(text)).to_owned()).collect();
    if lines.is_empty() { String::new() } else { format!(": {}", lines.join("; ")) }
}
