//! The accepted build on one machine, connection after connection.
//!
//! Must never repeat a build that failed by itself.

use super::moving::Outlook;
use super::{Candidate, Chosen, Hook, PATIENT_BOUND};
use crate::derivation;
use crate::job::{self, Blame, JobError, Report, Task};
use crate::lease::Lease;
use crate::plan::machine::Machine;
use crate::plan::telling;
use crate::plan::trust::{self, Way};
use crate::reach::ReachError;
use crate::sending::Sending;
use crate::slots::Held;
use crate::state::End;
use crate::wire::hook::{Job, Verbosity};
use nix_offload_proxy::exit;
use std::cell::Cell;
use std::time::{Duration, Instant};

/// How often one machine is tried for an accepted build whose connection breaks.
const TRIES: usize = 3;

/// How trying one machine for an accepted build ended.
pub(super) enum Attempt {
    /// The outputs are valid here; how that came.
    Done(String),
    /// The build failed, with this exit status and text; no other machine is to be tried.
    Final(u8, String),
    /// The machine is not to have this build, which has been told; another may do it.
    Elsewhere(String),
    /// The machine could not be reached, which has been told; it may be used when it is well again.
    Unreachable(String),
    /// The machine is down and has been told to wake up.
    Asleep,
    /// The machine cannot be reached before this one has a network, which it had meanwhile or not.
    CutOff { had_network: bool },
    /// Another machine would be done much sooner, so the build was ended where it was.
    Moved(Box<Chosen>),
}

impl Attempt {
    /// The same for those who ask later.
    pub(super) fn outcome(&self) -> (End, &str) {
        match self {
            Self::Done(how) => (End::Built, how),
            Self::Final(_, text) => (End::Failed, text),
            Self::Elsewhere(text) | Self::Unreachable(text) => (End::GivenUp, text),
            Self::Asleep => (End::GivenUp, "it was down, and is being woken"),
            Self::CutOff { .. } => (End::GivenUp, "this client had no network"),
            Self::Moved(_) => (End::Moved, ""),
        }
    }
}

impl Hook<'_> {
    /// How many slots all clients share there, if they do and the machine has the means for it.
    fn shared_slots(&self, machine: &Machine) -> Option<u32> {
        let slots = self.offload.of_machine(machine).shared_slots;
        slots.filter(|_| !self.reach.is_without_leases(machine))
    }

    pub(super) fn build_on(
        &self,
        candidate: &Candidate,
        chosen: Chosen,
        job: &Job,
        outlook: Option<&Outlook<'_, '_>>,
    ) -> Attempt {
        let Chosen { index, slot, pace, mut reached } = chosen;
        let machine = &self.machines[index];
        let derivation = candidate.request.drv_path.as_str();
        let meanwhile = |slot: Option<&Held>| {
            if let Some(slot) = slot {
                self.say(candidate, slot, pace);
            }
            self.note_trial(candidate, index, End::Open, "");
            self.memory.keep_latest(derivation, self.machines, &candidate.trials.borrow());
            self.interest.show();
        };
        let calls_off = |ran: Duration| outlook.is_some_and(|outlook| outlook.finds(ran));
        let leases = self.shared_slots(machine);
        let sets_options = job::sets_options(self.settings);
        let own = Cell::new(None);
        if sets_options {
            own.set(self.reach.own_settings(machine, self.settings));
        }
        let sending = Sending::to(self.reach.directory(), &machine.name);
        let task = Task {
            nix: self.nix,
            settings: self.settings,
            location: &self.location,
            drv_path: &candidate.drv_path,
            drv: &candidate.drv,
            outputs: &candidate.outputs,
            machine: &machine.name,
            sending: &sending,
            own: &own,
            is_leased: leases.is_some(),
            meanwhile: &meanwhile,
            review: outlook.map(|outlook| outlook.review(&calls_off)),
            ended: &|| outlook.into_iter().for_each(Outlook::leave),
        };
        let seen = self.reach.seen(machine);
        let direct = self.direct_inputs(&candidate.drv);
        let mut way = trust::way(&candidate.drv, self.reach.expected_trust(machine));
        let mut prepared = match task.prepare(job, direct.clone(), way, |paths| seen.has_all(paths)) {
            Ok(prepared) => prepared,
            Err(error) => return Attempt::Final(error.exit_status(), one_report(&error)),
        };
        if self.reach.is_old(machine) {
            prepared = prepared.step_by_step();
        }
        let mut slot = Some(slot);
        let begin = Instant::now();
        let mut lost = String::new();
        let mut attempt = 0;
        let mut had_connection = false;
        let mut guessed_wrong = false;
        // Its daemon refused to build the derivation alone, whatever it says of itself.
        let mut refused = false;
        while attempt < TRIES {
            attempt += 1;
            let met = reached.take();
            let sent = met.is_none() && !prepared.ahead.is_empty();
            let fresh = met.is_none();
            let connection = met.map_or_else(|| self.connect(machine, PATIENT_BOUND, &prepared.ahead), Ok);
            let mut connection = match connection {
                Ok(connection) => connection,
                Err(error) if error.is_waking() => return Attempt::Asleep,
                Err(error) if error.is_no_network() => {
                    return Attempt::CutOff { had_network: had_connection };
                }
                Err(error) => {
                    self.note_failure(index, &error);
                    return Attempt::Unreachable(error.describe());
                }
            };
            had_connection = true;
            candidate.has_run.set(true);
            if !connection.builder.takes_ahead() {
                self.reach.note_old(machine);
                prepared = prepared.step_by_step();
                if sent {
                    // It has misread that. Nobody is to blame, and it happens once.
                    attempt -= 1;
                    continue;
                }
            }
            if sets_options && own.get().is_none() && connection.builder.daemon().is_some() {
                own.set(Some(self.reach.ask_own_settings(machine, self.settings)));
            }
            let trusted = self.reach.trust(machine, &mut connection.builder);
            let seen_way = trust::way(&candidate.drv, trusted);
            let seen_way = if refused { Way::Closure } else { seen_way };
            if seen_way != way {
                way = seen_way;
                prepared = match task.prepare(job, direct.clone(), way, |_| false) {
                    Ok(prepared) => prepared.step_by_step(),
                    Err(error) => return Attempt::Final(error.exit_status(), one_report(&error)),
                };
                if sent {
                    // What was sent in advance was for the other way.
                    continue;
                }
            }
            if !fresh {
                // If it fails the connection is lost, which the first answer will show.
                let _ = connection.builder.send_ahead(prepared.ahead.clone());
            }
            // What was built before the connection was lost needs none.
            let mut lease =
                leases.filter(|_| slot.is_some()).and_then(|slots| Lease::begin(&self.reach, machine, slots));
            if slot.is_none() {
                // It was given back when the build was over. Most likely there is nothing left to build, so another
                // build's claim to the last slot is no reason to wait.
                slot = self.slots.take_any(&machine.name, machine.max_jobs).ok().flatten();
            }
            let error = match task.run(&mut connection.builder, job, &prepared, &mut slot, &mut lease) {
                Ok(report) => {
                    self.reach.note_built(machine);
                    let outputs = candidate.outputs.values().map(|output| &output.path);
                    seen.note(prepared.direct_inputs().chain(outputs));
                    let (sent, fetched) = (report.sent_bytes, report.fetched_bytes);
                    self.reach.speed(machine).note((sent, report.sending), (fetched, report.fetching));
                    log_report(derivation, &machine.name, &report, begin.elapsed());
                    if report.was_built {
                        let seconds = report.build.as_secs_f64();
                        self.memory.built(&candidate.drv, seconds, pace, report.fetched_bytes);
                    }
                    return Attempt::Done(match report.was_built {
                        true => format!("in {}", telling::seconds(report.build.as_secs_f64())),
                        false => "its outputs were there already".to_owned(),
                    });
                }
                Err(error) => error,
            };
            match error.blame() {
                Blame::Build => {
                    if matches!(error, JobError::Failed { .. }) {
                        self.reach.note_built(machine);
                    }
                    return Attempt::Final(error.exit_status(), one_report(&error));
                }
                Blame::Machine => {
                    let text = one_report(&error);
                    let is_daemon = connection.builder.daemon().is_some();
                    if is_daemon && !refused && way == Way::Derivation && trust::is_refusal_to_build(&text) {
                        let name = derivation::name_in(derivation);
                        tracing::info!(
                            event = "not trusted",
                            derivation,
                            builder = machine.name,
                            reason = text,
                            "{} does not trust us, so '{name}' is sent with its closure: {}",
                            machine.name,
                            exit::first_line(&plain(&text))
                        );
                        self.reach.note_trust(machine, false);
                        refused = true;
                        lost = text;
                        way = Way::Closure;
                        prepared = match task.prepare(job, direct.clone(), way, |_| false) {
                            Ok(prepared) => prepared.step_by_step(),
                            Err(error) => return Attempt::Final(error.exit_status(), one_report(&error)),
                        };
                        continue;
                    }
                    let distrust = self.distrust_in(machine, &text).map(ReachError::from);
                    let text = distrust.map_or(text, |distrust| distrust.describe());
                    return self.elsewhere(index, text);
                }
                Blame::Nobody => {
                    if let Some(better) = outlook.and_then(Outlook::take) {
                        // With the connection the build ends there, and then the slot is free.
                        drop(connection);
                        drop(slot);
                        return Attempt::Moved(self.move_to(better, candidate, machine));
                    }
                    lost = one_report(&error);
                }
                Blame::Guess => {
                    let name = derivation::name_in(derivation);
                    tracing::info!(
                        event = "inputs are not there any more",
                        derivation,
                        builder = machine.name,
                        "inputs of '{name}' are not on {} any more",
                        machine.name
                    );
                    seen.forget();
                    if !guessed_wrong {
                        attempt -= 1;
                    }
                    guessed_wrong = true;
                    lost = one_report(&error);
                    prepared = match task.prepare(job, direct.clone(), way, |_| false) {
                        // Step by step, so that no guess is wrong again.
                        Ok(prepared) => prepared.step_by_step(),
                        Err(error) => return Attempt::Final(error.exit_status(), one_report(&error)),
                    };
                }
                Blame::Transport => {
                    self.reach.forget(machine);
                    // A slot that was taken to begin anew there is for whoever comes first.
                    outlook.iter().for_each(|outlook| outlook.leave());
                    lost = one_report(&error);
                    tracing::warn!(
                        event = "connection lost",
                        derivation,
                        builder = machine.name,
                        attempt,
                        reason = lost,
                        "attempt {attempt} of '{}' on {} failed: {}",
                        derivation::name_in(derivation),
                        machine.name,
                        exit::first_line(&lost)
                    );
                    if attempt >= TRIES {
                        self.note_lost(index, &lost);
                        return Attempt::Elsewhere(lost);
                    }
                    let text = format!("'{derivation}' on '{}': {lost}; connecting again", machine.name);
                    self.nix.message(Verbosity::Warn, &text);
                }
            }
        }
        self.elsewhere(index, lost)
    }

    fn elsewhere(&self, index: usize, text: String) -> Attempt {
        self.tell(index, &text);
        Attempt::Elsewhere(text)
    }
}

/// The error with its causes. The builder's own words keep their lines.
fn one_report(error: &JobError) -> String {
    match error {
        JobError::Failed { message, .. } => message.clone(),
        other => exit::reason(other),
    }
}

/// A builder's text without colours and other control characters, which would make it a blob in the journal.
pub(super) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            // A colour: ESC [ numbers and semicolons, then a letter.
            '\u{1b}' => drop(rest.find(|c| c.is_ascii_alphabetic())),
            '\n' => plain.push(c),
            c if c.is_control() => {}
            c => plain.push(c),
        }
    }
    plain
}

fn log_report(derivation: &str, builder: &str, report: &Report, all: Duration) {
    let ms = |duration: Duration| duration.as_micros() as f64 / 1000.0;
    let name = derivation::name_in(derivation);
    let how = if report.was_built { "built" } else { "fetched (it was built already)" };
    tracing::info!(
        event = "built",
        derivation,
        builder,
        duration_ms = ms(all),
        inputs_ms = ms(report.inputs),
        build_ms = ms(report.build),
        outputs_ms = ms(report.outputs),
        sent_paths = report.sent_paths as u64,
        sent_bytes = report.sent_bytes,
        fetched_paths = report.fetched_paths as u64,
        fetched_bytes = report.fetched_bytes,
        "{how} '{name}' on {builder} in {} s",
        exit::seconds(all)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_and_control_characters_do_not_get_into_the_journal() {
        assert_eq!(plain("\u{1b}[31;1merror:\u{1b}[0m a\tb\nc\u{7}"), "error: ab\nc");
        assert_eq!(plain("cut short \u{1b}[31"), "cut short ");
    }
}
