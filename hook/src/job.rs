//! One accepted build on one connection: inputs up, build, log back, outputs into the local store.
//!
//! Owns the order of these steps. Must never choose a machine or make a connection.

mod copying;
mod inputs;
mod results;

use crate::builder::{Ahead, BuilderError, Clocks, Event, MAX_ACTIVITIES, Review, Store as Builder};
use crate::config::Settings;
use crate::lease::{Lease, LeaseError, Permit};
use crate::nix_side::NixSide;
use crate::path_info::PathInfo;
use crate::plan::outputs::{self, OutputError, Wanted};
use crate::plan::trust::Way;
use crate::sending::{Mark, Sending};
use crate::slots::Held;
use crate::store::{CycleError, DatabaseError, Location, Query, RestoreError};
use crate::wire::hook::{Job, Verbosity, activity};
use crate::wire::worker::{BuildResult, Options, Outcome, Own};
use nix_derivation::{Derivation, StorePath};
use nix_offload_proxy::exit;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long Nix may take to read the end of a log, before we leave.
const LOG_BOUND: Duration = Duration::from_secs(10);

/// Why an accepted build did not end with valid outputs.
#[derive(Debug, Error)]
pub enum JobError {
    /// The builder or the way to it failed.
    #[error(transparent)]
    Builder(BuilderError),
    /// The build itself failed.
    #[error("{message}")]
    Failed {
        /// The builder's own words.
        message: String,
        /// What kind of failure it was.
        outcome: Outcome,
    },
    /// The connection was lost before there was a shared slot.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The builder's claims of the outputs cannot be accepted.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// An output could not be put into the local store.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The local store's database could not be read or written.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// Paths refer to each other in a circle.
    #[error(transparent)]
    Cycle(#[from] CycleError),
    /// An input is not valid here, although Nix says so.
    #[error("the input '{0}' is not valid in the local store")]
    InputMissing(String),
    /// Nix sent a path that is none.
    #[error("Nix named the input '{0}', which is no store path")]
    InputPath(String),
}

/// Who is to blame for a failure, and so whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// The transport: the same machine may do it over another connection.
    Transport,
    /// The machine: another one may do it.
    Machine,
    /// The build itself, or this side: nobody can do better.
    Build,
    /// A guess of ours: without it the same machine will do it.
    Guess,
    /// Nobody: it was called off, to be done elsewhere.
    Nobody,
}

impl From<BuilderError> for JobError {
    /// What failed here while the builder was listened to is told apart from what failed over there.
    fn from(error: BuilderError) -> Self {
        match error {
            BuilderError::Receive(cause) => match cause.downcast() {
                Ok(error) => Self::Restore(*error),
                Err(cause) => Self::Builder(BuilderError::Receive(cause)),
            },
            other => Self::Builder(other),
        }
    }
}

impl JobError {
    /// Who is to blame.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Builder(error) if error.is_transport() => Blame::Transport,
            Self::Lease(_) => Blame::Transport,
            Self::Builder(BuilderError::Guess { .. }) => Blame::Guess,
            Self::Builder(BuilderError::CalledOff) => Blame::Nobody,
            Self::Builder(BuilderError::Refused { .. } | BuilderError::Protocol { .. })
            | Self::Failed { outcome: Outcome::NotThere, .. }
            | Self::Output(
                OutputError::Missing(_) | OutputError::Reference { .. } | OutputError::FixedReference { .. },
            ) => Blame::Machine,
            Self::Restore(error) if error.is_builders() => Blame::Machine,
            _ => Blame::Build,
        }
    }

    /// The exit status by which Nix up to 2.33 tells kinds of failure apart (`Worker` in
    /// `src/libstore/build/worker.cc`: 100 for permanent failures, 101 for timeouts).
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Failed { outcome: Outcome::TimedOut, .. }
            | Self::Builder(BuilderError::Silent(_) | BuilderError::TimedOut(_)) => 101,
            Self::Failed { outcome: Outcome::Failed, .. } => 100,
            _ => 1,
        }
    }
}

/// What is to be done, and for whom.
pub struct Task<'a> {
    /// The side turned to Nix.
    pub nix: &'a NixSide,
    /// Nix's settings.
    pub settings: &'a Settings,
    /// The local store.
    pub location: &'a Location,
    /// The derivation's path.
    pub drv_path: &'a StorePath,
    /// The derivation.
    pub drv: &'a Derivation,
    /// Its outputs by name.
    pub outputs: &'a BTreeMap<String, Wanted>,
    /// The machine's name.
    pub machine: &'a str,
    /// Who sends what to it.
    pub sending: &'a Sending,
    /// What the machine has of its own where [`sets_options`] says that options are set; None if it has not been asked, none
    /// within if it does not tell.
    pub own: &'a Cell<Option<Option<Own>>>,
    /// The build may have to wait for a lease, so nothing that begins it is sent in advance.
    pub is_leased: bool,
    /// What can be done here while the builder is at work, with the slot if there still is one.
    pub meanwhile: &'a dyn Fn(Option<&Held>),
    /// Who looks in on the build while it runs.
    pub review: Option<Review<'a>>,
    /// Called as soon as the build is over.
    pub ended: &'a dyn Fn(),
}

/// Whether these settings are to be told to a machine's daemon. Without need they are not, for options replace what the
/// machine has of its own, and that must be asked for first. `timeout` needs no help from over there.
pub fn sets_options(settings: &Settings) -> bool {
    settings.flag("keep-failed") || settings.number("max-silent-time", 0) > 0
}

/// What a build has of its machine until it is over.
#[derive(Default)]
pub struct Claim {
    /// A slot of this client. None if it was given back already.
    pub slot: Option<Held>,
    /// One of the slots that clients share there.
    pub lease: Option<Lease>,
}

/// What happened, for the log.
#[derive(Debug, Clone, Copy, Default)]
pub struct Report {
    /// Inputs sent.
    pub sent_paths: usize,
    /// Bytes of their NARs.
    pub sent_bytes: u64,
    /// Outputs fetched.
    pub fetched_paths: usize,
    /// Bytes of their NARs.
    pub fetched_bytes: u64,
    /// How long asking for and sending inputs took.
    pub inputs: Duration,
    /// How long sending them took, until all had arrived.
    pub sending: Duration,
    /// Whether there was anything left to build.
    pub was_built: bool,
    /// How long the build took, seen from here.
    pub build: Duration,
    /// How long fetching and registering the outputs took.
    pub outputs: Duration,
    /// How long fetching them took.
    pub fetching: Duration,
}

/// What is known before there is a connection.
#[derive(Debug)]
pub struct Prepared {
    /// The closure of the inputs, as Nix gives it.
    inputs: Vec<StorePath>,
    /// Those of them whose closure it is.
    direct: Vec<StorePath>,
    /// All direct inputs are taken to be on the machine already.
    guessed: bool,
    /// What else the derivation refers to, itself included, if the machine is to have that.
    closure: Option<Vec<StorePath>>,
    /// Outputs that are valid here and stay as they are.
    kept: BTreeSet<StorePath>,
    /// What had been sent to the machine before it was asked anything.
    mark: Mark,
    /// What the connection is to be sent without waiting.
    pub ahead: Ahead,
}

impl Prepared {
    /// Nothing is to be sent in advance.
    pub fn step_by_step(&mut self) {
        self.ahead = Ahead::default();
    }

    /// Paths that the machine has once the build is over.
    pub fn direct_inputs(&self) -> impl Iterator<Item = &StorePath> {
        self.direct.iter()
    }

    /// What the builder is asked about first. If the direct inputs are there, their closure is.
    fn asked(&self) -> &[StorePath] {
        if self.guessed { &self.direct } else { &self.inputs }
    }
}

impl Task<'_> {
    /// Prepares the build for a connection, to be asked for in that way. `direct` are the direct inputs, if they are known.
    /// `is_there` is to tell whether these may be taken to be on the machine; if they are not after all, [`Task::run`]
    /// fails with [`Blame::Guess`].
    ///
    /// # Errors
    /// If Nix named something that is no path, or the local store cannot be asked.
    pub fn prepare(
        &self,
        job: &Job,
        direct: Option<Vec<StorePath>>,
        way: Way,
        is_there: impl FnOnce(&[StorePath]) -> bool,
    ) -> Result<Prepared, JobError> {
        let parse = |path: &String| {
            let parsed = self.location.store_dir.parse_path(path.as_bytes());
            parsed.map_err(|_| JobError::InputPath(path.clone()))
        };
        let inputs: Vec<StorePath> = job.inputs.iter().map(parse).collect::<Result<_, _>>()?;
        let direct = direct.filter(|direct| {
            let closure: BTreeSet<&StorePath> = inputs.iter().collect();
            direct.iter().all(|path| closure.contains(path))
        });
        // What is not known yet is asked for before the build.
        let is_known = !sets_options(self.settings) || self.own.get().is_some();
        let guessed = way == Way::Derivation
            && is_known
            && !self.is_leased
            && direct.as_ref().is_some_and(|direct| is_there(direct));
        let direct = direct.unwrap_or_else(|| inputs.clone());
        let closure = match way {
            Way::Derivation => None,
            Way::Closure => Some(self.closure(&inputs)?),
        };
        let kept = self.kept(job)?;
        let mark = self.sending.mark();
        let mut prepared = Prepared { inputs, direct, guessed, closure, kept, mark, ahead: Ahead::default() };
        let mut ahead = Ahead::default();
        let substitute = self.settings.flag("builders-use-substitutes");
        ahead.hold_and_query(&self.location.store_dir, prepared.asked(), substitute);
        if let Some(closure) = &prepared.closure {
            ahead.hold_and_query(&self.location.store_dir, closure, false);
        }
        if prepared.guessed {
            self.build_and_fetch(&mut ahead, &prepared, job)?;
        }
        prepared.ahead = ahead.if_small();
        Ok(prepared)
    }

    /// What the derivation refers to besides the inputs, itself included.
    fn closure(&self, inputs: &[StorePath]) -> Result<Vec<StorePath>, JobError> {
        let inputs: BTreeSet<&StorePath> = inputs.iter().collect();
        let closure = Query::open(self.location)?.closure([self.drv_path.clone()])?;
        if closure.is_empty() {
            return Err(JobError::InputMissing(self.location.render(self.drv_path)));
        }
        Ok(closure.into_keys().filter(|path| !inputs.contains(path)).collect())
    }

    /// What outputs may refer to besides outputs: the inputs, and those of the paths they claim to refer to that are valid here.
    fn referable(
        &self,
        inputs: &[StorePath],
        claims: &[Option<PathInfo>],
    ) -> Result<BTreeSet<StorePath>, JobError> {
        let mut referable: BTreeSet<StorePath> = inputs.iter().cloned().collect();
        let is_output = |path: &StorePath| self.outputs.values().any(|output| output.path == *path);
        let claimed = claims.iter().flatten().flat_map(|claim| &claim.references);
        let others: BTreeSet<&StorePath> =
            claimed.filter(|path| !referable.contains(*path) && !is_output(path)).collect();
        if others.is_empty() {
            return Ok(referable);
        }
        let query = Query::open(self.location)?;
        let mut valid = Vec::new();
        for path in others {
            if query.is_valid(path)? {
                valid.push(path.clone());
            }
        }
        referable.extend(valid);
        Ok(referable)
    }

    /// Does it. What it claims of the machine is given back as soon as the build is over, before outputs travel.
    ///
    /// The builder has been sent [`Prepared::ahead`].
    ///
    /// # Errors
    /// If the outputs are not valid in the local store afterwards; see [`JobError::blame`].
    pub fn run(
        &self,
        builder: &mut Builder,
        job: &Job,
        prepared: &Prepared,
        claim: &mut Claim,
    ) -> Result<Report, JobError> {
        let mut relay = Relay { nix: self.nix, activities: HashMap::new() };
        let done = self.steps(builder, job, prepared, claim, &mut relay);
        builder.finish(&mut |e| relay.pass(e));
        relay.end();
        self.nix.wait_for_log(LOG_BOUND);
        done
    }

    fn steps(
        &self,
        builder: &mut Builder,
        job: &Job,
        prepared: &Prepared,
        claim: &mut Claim,
        relay: &mut Relay<'_>,
    ) -> Result<Report, JobError> {
        let mut report = Report::default();
        (self.meanwhile)(claim.slot.as_ref());
        // Now, while the builder is at work; if it fails it is done again when there is something to register.
        let registrar = self.registrar().ok();
        let clock = Instant::now();
        self.send_inputs(builder, job, prepared, relay, &mut report)?;
        report.inputs = clock.elapsed();
        if let Some(lease) = &mut claim.lease {
            self.wait_for(lease)?;
        }
        let clock = Instant::now();
        report.was_built = self.build(builder, job, prepared, relay)?.is_new();
        report.build = clock.elapsed();
        *claim = Claim::default();
        (self.ended)();
        let clock = Instant::now();
        self.fetch_outputs(builder, job, prepared, registrar, relay, &mut report)?;
        report.outputs = clock.elapsed();
        Ok(report)
    }

    fn wait_for(&self, lease: &mut Lease) -> Result<(), JobError> {
        let (machine, slots) = (self.machine, lease.slots());
        let begin = Instant::now();
        let permit = lease.wait(&mut || {
            let text = format!("waiting for one of {slots} shared slots of '{machine}'");
            self.nix.message(Verbosity::Info, &text);
        })?;
        match permit {
            Permit::Held => {
                let duration_ms = begin.elapsed().as_millis() as u64;
                tracing::info!(
                    event = "a shared slot",
                    builder = machine,
                    duration_ms,
                    "{machine} gave a shared slot after {} s",
                    exit::seconds(begin.elapsed())
                );
            }
            Permit::Without(reason) => {
                tracing::warn!(
                    event = "no shared slots",
                    builder = machine,
                    reason,
                    "{machine} cannot share its slots: {reason}"
                );
                let text = format!(
                    "warning: '{machine}' has no means to share its slots ({reason}): `shared-slots = {slots}` is \
                     without effect there"
                );
                self.nix.message(Verbosity::Warn, &text);
            }
            Permit::Unanswered(reason) => {
                tracing::warn!(
                    event = "no shared slot yet",
                    builder = machine,
                    reason,
                    "no shared slot of {machine} yet, the build goes on without: {reason}"
                );
                let text = format!(
                    "warning: '{machine}' gives none of its {slots} shared slots ({reason}), so '{}' goes on there \
                     without; if its account has no shell, `shared-slots` is of no use",
                    self.location.render(self.drv_path)
                );
                self.nix.message(Verbosity::Warn, &text);
            }
        }
        Ok(())
    }

    /// What the machine's daemon is told. If it does not tell what it has of its own, that is not replaced only for the sake of
    /// a clock which can be kept here, though less well: only whole lines are heard.
    fn options(&self) -> Option<Options> {
        let keep_failed = self.settings.flag("keep-failed");
        let own = self.own.get().flatten();
        (sets_options(self.settings) && (keep_failed || own.is_some())).then(|| Options {
            keep_failed,
            max_silent_time: self.settings.number("max-silent-time", 0),
            timeout: self.settings.number("timeout", 0),
            own: own.unwrap_or_default(),
        })
    }

    fn build(
        &self,
        builder: &mut Builder,
        job: &Job,
        prepared: &Prepared,
        relay: &mut Relay<'_>,
    ) -> Result<BuildResult, JobError> {
        let keep_failed = self.settings.flag("keep-failed");
        let options = self.options();
        let clocks = Clocks {
            max_silent_time: self.settings.number("max-silent-time", 0),
            is_silence_ended_there: options.is_some(),
            timeout: self.settings.number("timeout", 0),
            review: self.review,
        };
        if let Some(options) = options {
            builder.set_options(options, &mut |e| relay.pass(e))?;
        }
        let result = match prepared.closure {
            None => builder.build(self.drv_path, self.drv, &prepared.direct, clocks, &mut |e| relay.pass(e)),
            Some(_) => {
                builder.build_outputs(self.drv_path, &job.wanted_outputs, clocks, &mut |e| relay.pass(e))
            }
        }?;
        match result.outcome(outputs::is_fixed(self.drv)) {
            Outcome::Built => Ok(result),
            outcome => {
                if keep_failed {
                    self.nix.message(
                        Verbosity::Warn,
                        "The failed build directory was kept on the remote builder due to `--keep-failed`.",
                    );
                }
                Err(JobError::Failed { message: result.message, outcome })
            }
        }
    }
}

/// Passes on to Nix what the builder tells, with activity numbers of our own.
struct Relay<'a> {
    nix: &'a NixSide,
    activities: HashMap<u64, u64>,
}

impl Relay<'_> {
    /// What the builder has not said the end of has none any more.
    fn end(&mut self) {
        self.activities.drain().for_each(|(_, ours)| self.nix.stop(ours));
    }

    fn pass(&mut self, event: Event<'_>) {
        match event {
            Event::LogLine(line) => self.nix.log_line(line),
            Event::Phase(name) => self.nix.phase(name),
            Event::Text(text) => {
                self.nix.message(Verbosity::Error, String::from_utf8_lossy(text).trim_end());
            }
            // The builder's books on its own work. This Nix keeps its own, and each line would wake it.
            Event::Start { kind: activity::REALISE | activity::COPY_PATHS | activity::BUILDS, .. } => {}
            // What the builder does by the way, so unimportant that nobody here asked to see it.
            Event::Start { kind: activity::UNKNOWN, level, .. } if !self.nix.is_asked_for(level) => {}
            Event::Start { .. } if self.activities.len() >= MAX_ACTIVITIES => {}
            Event::Start { id, level, kind, text, fields } => {
                // Its text may be all that can be shown of it.
                let is_readable = activity::is_readable(kind, fields);
                let (kind, fields) = if is_readable { (kind, fields) } else { (activity::UNKNOWN, &[][..]) };
                let level = level.min(Verbosity::Vomit as u64);
                let ours = self.nix.start(level, kind, &String::from_utf8_lossy(text), fields);
                self.activities.insert(id, ours);
            }
            Event::Result { id, kind, fields } => {
                if let Some(ours) = self.activities.get(&id) {
                    self.nix.result(*ours, kind, fields);
                }
            }
            Event::Stop { id } => {
                if let Some(ours) = self.activities.remove(&id) {
                    self.nix.stop(ours);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn blame_of_receiving(error: RestoreError) -> Blame {
        JobError::from(BuilderError::Receive(Box::new(error))).blame()
    }

    #[test]
    fn what_a_builder_sent_is_its_fault_and_our_disk_is_not() {
        let path = || "/nix/store/x".to_owned();
        let (specified, got) = (path(), path());
        let wrong = RestoreError::NarHash { path: path(), specified, got };
        assert_eq!(blame_of_receiving(wrong), Blame::Machine);
        let short = RestoreError::Size { path: path(), nar_size: 1, longer: false };
        assert_eq!(blame_of_receiving(short), Blame::Machine);
        let refers = OutputError::FixedReference { path: path(), reference: path() };
        assert_eq!(JobError::from(refers).blame(), Blame::Machine);
        let source = || io::Error::from(io::ErrorKind::StorageFull);
        let full = RestoreError::Write { file: path().into(), action: "write", source: source() };
        assert_eq!(blame_of_receiving(full), Blame::Build);
        assert_eq!(blame_of_receiving(RestoreError::Valid { path: path() }), Blame::Build);
        assert_eq!(blame_of_receiving(RestoreError::TooDeep { path: path(), limit: 64 }), Blame::Build);
        let other = JobError::from(BuilderError::Receive(Box::new(source())));
        assert!(matches!(other, JobError::Builder(BuilderError::Receive(_))), "{other:?}");
    }
}
