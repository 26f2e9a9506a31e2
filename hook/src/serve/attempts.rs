//! The accepted build on one machine, connection after connection.
//!
//! Must never repeat a build that failed by itself.

use super::moving::Outlook;
use super::{Candidate, Chosen, Hook, PATIENT_BOUND};
use crate::builder::Store as Builder;
use crate::derivation;
use crate::job::{self, Blame, Claim, JobError, Prepared, Report, Task};
use crate::lease::Lease;
use crate::plan::machine::Machine;
use crate::plan::telling;
use crate::plan::trust::{self, Way};
use crate::reach::{ReachError, Reached, Seen};
use crate::sending::Sending;
use crate::slots::Held;
use crate::state::End;
use crate::wire::hook::{Job, Verbosity};
use nix_derivation::StorePath;
use nix_offload_proxy::exit;
use std::cell::Cell;
use std::mem;
use std::time::{Duration, Instant};

/// How often one machine is tried for an accepted build whose connection breaks.
const TRIES: usize = 3;

/// How the build's time on one machine ended.
pub(super) enum Ended {
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

impl Ended {
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

    /// Nobody can do better.
    fn failed(error: &JobError) -> Self {
        Self::Final(error.exit_status(), one_report(error))
    }
}

impl Hook<'_> {
    /// How many slots all clients share there, if they do and the machine has the means for it.
    fn shared_slots(&self, machine: &Machine) -> Option<u32> {
        let slots = self.offload.of_machine(machine).shared_slots;
        slots.filter(|_| !self.reach.is_without_leases(machine))
    }

    /// Builds on the machine that was chosen, and tries that again where it may help.
    pub(super) fn build_on(
        &self,
        candidate: &Candidate,
        chosen: Chosen,
        job: &Job,
        outlook: Option<&Outlook<'_, '_>>,
    ) -> Ended {
        let Chosen { index, slot, pace, reached } = chosen;
        let machine = &self.machines[index];
        let meanwhile = |slot: Option<&Held>| {
            if let Some(slot) = slot {
                self.say(candidate, slot, pace);
            }
            self.note_trial(candidate, index, End::Open, "");
            self.memory.keep_latest(&candidate.request.drv_path, self.machines, &candidate.trials.borrow());
            self.interest.show();
        };
        let calls_off = |ran: Duration| outlook.is_some_and(|outlook| outlook.finds(ran));
        let shared_slots = self.shared_slots(machine);
        let sets_options = job::sets_options(self.settings);
        let own = Cell::new(sets_options.then(|| self.reach.own_settings(machine, self.settings)).flatten());
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
            is_leased: shared_slots.is_some(),
            meanwhile: &meanwhile,
            review: outlook.map(|outlook| outlook.review(&calls_off)),
            ended: &|| outlook.into_iter().for_each(Outlook::leave),
        };
        let seen = self.reach.seen(machine);
        let direct = self.direct_inputs(&candidate.drv);
        let way = trust::way(&candidate.drv, self.reach.expected_trust(machine));
        let mut prepared = match task.prepare(job, direct.clone(), way, |paths| seen.has_all(paths)) {
            Ok(prepared) => prepared,
            Err(error) => return Ended::failed(&error),
        };
        // What is on this machine answers at once, and through pipes, which hold less.
        if self.reach.is_old(machine) || machine.uri.here().is_some() {
            prepared.step_by_step();
        }
        let attempts = Attempts {
            hook: self,
            candidate,
            job,
            task: &task,
            outlook,
            index,
            machine,
            pace,
            shared_slots,
            seen,
            direct,
            begin: Instant::now(),
            way,
            prepared,
            claim: Claim { slot: Some(slot), lease: None },
            count: 0,
            had_connection: false,
            guessed_wrong: false,
            refused: false,
            lost: String::new(),
        };
        attempts.run(reached)
    }

    fn elsewhere(&self, index: usize, text: String) -> Ended {
        self.tell(index, &text);
        Ended::Elsewhere(text)
    }
}

/// How an attempt ended that did not lead to the outputs.
enum Stop {
    /// It was the last one on this machine.
    Over(Ended),
    /// There is to be another one.
    Again,
    /// The same, and this one is not counted: a guess was wrong, which happens once.
    Uncounted,
}

impl From<Ended> for Stop {
    fn from(ended: Ended) -> Self {
        Self::Over(ended)
    }
}

/// The attempts to build on one machine, each over a connection of its own.
struct Attempts<'t, 'a> {
    hook: &'t Hook<'a>,
    candidate: &'t Candidate,
    job: &'t Job,
    task: &'t Task<'t>,
    outlook: Option<&'t Outlook<'t, 'a>>,
    index: usize,
    machine: &'t Machine,
    pace: f64,
    /// How many slots all clients share there.
    shared_slots: Option<u32>,
    seen: Seen,
    direct: Option<Vec<StorePath>>,
    begin: Instant,
    /// How the build is to be asked for.
    way: Way,
    /// What was prepared for that.
    prepared: Prepared,
    /// The slot stays its own until the build is over, the lease goes with the connection.
    claim: Claim,
    /// How many have begun, of those that count.
    count: usize,
    had_connection: bool,
    /// Inputs that were taken to be there were not.
    guessed_wrong: bool,
    /// Its daemon refused to build the derivation alone, whatever it says of itself.
    refused: bool,
    /// How the last one failed.
    lost: String,
}

impl Attempts<'_, '_> {
    /// All of them, the first over the connection that was made before the reply.
    fn run(mut self, mut reached: Option<Reached>) -> Ended {
        while self.count < TRIES {
            self.count += 1;
            let attempt = self.attempt(reached.take());
            // With the connection the build has ended there.
            self.claim.lease = None;
            match attempt {
                Ok(how) => return Ended::Done(how),
                Err(Stop::Over(ended)) => return ended,
                Err(Stop::Again) => {}
                Err(Stop::Uncounted) => self.count -= 1,
            }
        }
        self.hook.elsewhere(self.index, self.lost)
    }

    /// One of them. Gives how the outputs came.
    fn attempt(&mut self, reached: Option<Reached>) -> Result<String, Stop> {
        // A connection that was made before has been sent nothing yet.
        let was_sent = reached.is_none() && !self.prepared.ahead.is_empty();
        let mut connection = reached.map_or_else(|| self.connect(), Ok)?;
        self.had_connection = true;
        self.candidate.wait.end();
        let builder = &mut connection.builder;
        self.heed_age(builder, was_sent)?;
        self.ask_own_settings(builder);
        self.heed_trust(builder, was_sent)?;
        if !was_sent {
            // If it fails the connection is lost, which the first answer will show.
            let _ = builder.send_ahead(self.prepared.ahead.clone());
        }
        self.renew_claim();
        let done = self.task.run(builder, self.job, &self.prepared, &mut self.claim);
        let error = match done {
            Ok(report) => return Ok(self.built(&report)),
            Err(error) => error,
        };
        self.lost = one_report(&error);
        match error.blame() {
            Blame::Build => Err(self.failed(&error).into()),
            Blame::Machine if self.wants_closure(builder) => self.send_closure(),
            Blame::Machine => Err(self.given_up().into()),
            Blame::Nobody => Err(self.called_off(connection)),
            Blame::Guess => self.guessed_wrong(),
            Blame::Transport => Err(self.connection_lost()),
        }
    }

    fn connect(&self) -> Result<Reached, Ended> {
        let connected = self.hook.connect(self.machine, PATIENT_BOUND, &self.prepared.ahead);
        connected.map_err(|error| {
            if error.is_waking() {
                return Ended::Asleep;
            }
            if error.is_no_network() {
                return Ended::CutOff { had_network: self.had_connection };
            }
            self.hook.note_failure(self.index, &error);
            Ended::Unreachable(error.describe())
        })
    }

    /// Prepares the build anew, to be asked for step by step: no guess is to be wrong again.
    fn prepare_again(&mut self, way: Way) -> Result<(), Ended> {
        let prepared = self.task.prepare(self.job, self.direct.clone(), way, |_| false);
        self.prepared = prepared.map_err(|error| Ended::failed(&error))?;
        self.prepared.step_by_step();
        self.way = way;
        Ok(())
    }

    /// A daemon before Nix 2.4 misreads what is sent in advance.
    fn heed_age(&mut self, builder: &Builder, was_sent: bool) -> Result<(), Stop> {
        if builder.takes_ahead() {
            return Ok(());
        }
        self.hook.reach.note_old(self.machine);
        self.prepared.step_by_step();
        if was_sent { Err(Stop::Uncounted) } else { Ok(()) }
    }

    /// Where options are to be set, what the machine has of its own is asked for first.
    fn ask_own_settings(&self, builder: &mut Builder) {
        let (own, settings) = (self.task.own, self.task.settings);
        if job::sets_options(settings) && own.get().is_none() && builder.daemon().is_some() {
            own.set(Some(self.hook.reach.ask_own_settings(self.machine, settings)));
        }
    }

    /// A daemon may turn out to trust us, or not to. Then the build is asked for in the other way.
    fn heed_trust(&mut self, builder: &mut Builder, was_sent: bool) -> Result<(), Stop> {
        let trusted = self.hook.reach.trust(self.machine, builder);
        let way = if self.refused { Way::Closure } else { trust::way(&self.candidate.drv, trusted) };
        if way == self.way {
            return Ok(());
        }
        self.prepare_again(way)?;
        // What was sent in advance was for the other one.
        if was_sent { Err(Stop::Again) } else { Ok(()) }
    }

    /// Begins to wait for a lease, where slots are shared. If the build was over already when the connection was lost, a slot
    /// is taken again.
    fn renew_claim(&mut self) {
        let (hook, machine) = (self.hook, self.machine);
        if self.claim.slot.is_some() {
            let lease = |slots| Lease::begin(&hook.reach, machine, slots);
            self.claim.lease = self.shared_slots.and_then(lease);
        } else {
            // Most likely there is nothing left to build: it needs no lease, and another build's claim to the last slot is
            // no reason to wait.
            self.claim.slot = hook.slots.take_any(&machine.name, machine.max_jobs).ok().flatten();
        }
    }

    /// Notes what others can learn from it.
    fn built(&self, report: &Report) -> String {
        let Self { hook, candidate, machine, .. } = self;
        hook.reach.note_built(machine);
        let outputs = candidate.outputs.values().map(|output| &output.path);
        self.seen.note(self.prepared.direct_inputs().chain(outputs));
        let (sent, fetched) = (report.sent_bytes, report.fetched_bytes);
        hook.reach.speed(machine).note((sent, report.sending), (fetched, report.fetching));
        log_report(self.derivation(), &machine.name, report, self.begin.elapsed());
        if !report.was_built {
            return "its outputs were there already".to_owned();
        }
        let seconds = report.build.as_secs_f64();
        hook.memory.built(&candidate.drv, seconds, self.pace, fetched);
        format!("in {}", telling::seconds(seconds))
    }

    /// The build failed, or this side.
    fn failed(&self, error: &JobError) -> Ended {
        if matches!(error, JobError::Failed { .. }) {
            self.hook.reach.note_built(self.machine);
        }
        Ended::failed(error)
    }

    /// Whether the daemon only wants to see for itself what it is asked to build.
    fn wants_closure(&self, builder: &mut Builder) -> bool {
        let may_be = !self.refused && self.way == Way::Derivation && builder.daemon().is_some();
        may_be && trust::is_refusal_to_build(&self.lost)
    }

    fn send_closure(&mut self) -> Result<String, Stop> {
        let (derivation, builder, reason) = (self.derivation(), &self.machine.name, &self.lost);
        tracing::info!(
            event = "not trusted",
            derivation,
            builder,
            reason,
            "{builder} does not trust us, so '{}' is sent with its closure: {}",
            derivation::name_in(derivation),
            exit::first_line(&plain(reason))
        );
        self.hook.reach.note_trust(self.machine, false);
        self.refused = true;
        self.prepare_again(Way::Closure)?;
        Err(Stop::Again)
    }

    /// The machine failed.
    fn given_up(&self) -> Ended {
        let distrust = self.hook.distrust_in(self.machine, &self.lost).map(ReachError::from);
        let text = distrust.map_or_else(|| self.lost.clone(), |distrust| distrust.describe());
        self.hook.elsewhere(self.index, text)
    }

    /// The build was ended there because it goes faster elsewhere.
    fn called_off(&mut self, connection: Reached) -> Stop {
        let Some(better) = self.outlook.and_then(Outlook::take) else { return Stop::Again };
        // With the connection the build ends there, and then the slot is free.
        drop(connection);
        self.claim.slot = None;
        Ended::Moved(self.hook.move_to(better, self.candidate, self.machine)).into()
    }

    /// Inputs that were taken to be on the machine are gone.
    fn guessed_wrong(&mut self) -> Result<String, Stop> {
        let (derivation, builder) = (self.derivation(), &self.machine.name);
        tracing::info!(
            event = "inputs are not there any more",
            derivation,
            builder,
            "inputs of '{}' are not on {builder} any more",
            derivation::name_in(derivation)
        );
        self.seen.forget();
        self.prepare_again(self.way)?;
        let was_wrong_before = mem::replace(&mut self.guessed_wrong, true);
        Err(if was_wrong_before { Stop::Again } else { Stop::Uncounted })
    }

    fn connection_lost(&self) -> Stop {
        self.hook.reach.forget(self.machine);
        // A slot that was taken to begin anew there is for whoever comes first.
        self.outlook.iter().for_each(|outlook| outlook.leave());
        let (derivation, builder, reason) = (self.derivation(), &self.machine.name, &self.lost);
        let attempt = self.count;
        tracing::warn!(
            event = "connection lost",
            derivation,
            builder,
            attempt,
            reason,
            "attempt {attempt} of '{}' on {builder} failed: {}",
            derivation::name_in(derivation),
            exit::first_line(reason)
        );
        if attempt >= TRIES {
            self.hook.note_lost(self.index, reason);
            return Ended::Elsewhere(reason.clone()).into();
        }
        let text = format!("'{derivation}' on '{builder}': {reason}; connecting again");
        self.hook.nix.message(Verbosity::Warn, &text);
        Stop::Again
    }

    fn derivation(&self) -> &str {
        &self.candidate.request.drv_path
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
