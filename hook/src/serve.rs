//! The hook: answers Nix's requests and runs the one build it accepted.
//!
//! The only room that joins all the others. Must never contain a rule: a rule found here belongs to `plan`.

use crate::config::{self, Fleet, Settings};
use crate::fds;
use crate::job::{JobError, Report, Task};
use crate::nix_side::NixSide;
use crate::plan::machine::{Machine, Scheme};
use crate::plan::outputs::{self, OutputError, Wanted};
use crate::plan::{self, Decision, Local, Request, State, Verdict};
use crate::reach::{Reach, ReachError, Reached};
use crate::slots::{Held, SlotError, Slots};
use crate::store::{Location, LocationError};
use crate::wire::WireError;
use crate::wire::hook::{self, Job, Reply, Verbosity};
use nix_derivation::{Derivation, HashAlgorithm, StorePath, hash_bytes};
use nix_offload_proxy::exit;
use nix_offload_proxy::log::{self, Fallback};
use nix_offload_proxy::master::DirectoryError;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, StdinLock};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};
use thiserror::Error;
use tracing::level_filters::LevelFilter;

/// How long reaching a machine may take before it is given up.
const CONNECT_BOUND: Duration = Duration::from_secs(8);

/// Builds that may be accepted to wait for one set of machines. Each costs a process of about 1 MiB; those above
/// are postponed, for which Nix has no better clock than asking again every 5 seconds.
const MAX_WAITING: u64 = 256;

/// A waiting build looks at the slots so often even if nothing seems to happen.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How often one machine is tried for an accepted build whose connection breaks.
const TRIES: usize = 3;

/// Why the hook cannot do its work at all.
#[derive(Debug, Error)]
pub enum ServeError {
    /// It was not started by Nix.
    #[error("descriptor 4 is not open for writing, so this program was not started by Nix as its build hook")]
    NotStartedByNix(#[source] io::Error),
    /// What came on standard input is not what Nix sends.
    #[error("Nix sent something that is not the build hook protocol")]
    Protocol(#[source] WireError),
    /// Nix is gone.
    #[error("Nix no longer listens")]
    NixGone(#[source] io::Error),
}

/// Why a request is declined before any machine is looked at.
#[derive(Debug, Error)]
enum Unfit {
    #[error("'{0}' is no path of a derivation in the local store")]
    NoDrvPath(String),
    #[error("the derivation cannot be read from the local store")]
    Unreadable(#[source] io::Error),
    #[error("the derivation cannot be parsed")]
    Unparsable(#[source] nix_derivation::Error),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(
        "the derivation has an input that is itself built by a build (an experimental kind of derivation)"
    )]
    Dynamic,
}

/// Why no request can be served, though Nix and its machines are well.
#[derive(Debug, Error)]
enum Unable {
    #[error(transparent)]
    Location(#[from] LocationError),
    #[error(transparent)]
    Slots(#[from] SlotError),
    #[error(transparent)]
    Runtime(#[from] DirectoryError),
}

/// Serves Nix until it has no more requests or the accepted build is over. Gives the exit status.
///
/// # Errors
/// If this is no dialogue with Nix. Everything else is answered or reported within it.
pub fn serve(verbosity: u64) -> Result<u8, ServeError> {
    let log = fds::take_log().map_err(ServeError::NotStartedByNix)?;
    // A panic's text must not reach descriptor 2, which is the wire to Nix.
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "internal error")));
    log::init("nix-offload", level(verbosity), Fallback::Nothing);
    let nix = NixSide::new(log);
    let mut source = io::stdin().lock();
    let settings = hook::read_settings(&mut source).map_err(ServeError::Protocol)?;
    let fleet = fleet(&settings);
    for problem in &fleet.problems {
        tracing::warn!(place = %format_args!("{}:{}:{}", problem.place.source, problem.place.line,
            problem.place.column), "{}", problem.message);
        nix.message(Verbosity::Warn, &format!("warning: {problem}"));
    }
    if fleet.machines.is_empty() {
        tracing::debug!(missing = ?fleet.missing_files, "no machines");
        nix.reply(&Reply::DeclinePermanently).map_err(ServeError::NixGone)?;
        return Ok(exit::OK);
    }
    match Hook::new(&nix, &settings, &fleet.machines) {
        Ok(hook) => hook.run(&mut source),
        Err(unable) => {
            let text = exit::report(&unable, None);
            tracing::error!("{text}");
            nix.message(Verbosity::Warn, &format!("nix-offload cannot build remotely: {text}"));
            nix.reply(&Reply::DeclinePermanently).map_err(ServeError::NixGone)?;
            Ok(exit::OK)
        }
    }
}

/// What is logged: `NIX_OFFLOAD_LOG` if it names a level, else what Nix's verbosity asks for.
fn level(verbosity: u64) -> LevelFilter {
    let named = std::env::var("NIX_OFFLOAD_LOG").ok().and_then(|text| log::parse_level(&text));
    named.unwrap_or(match verbosity {
        0 | 1 => LevelFilter::WARN,
        2..=4 => LevelFilter::INFO,
        5 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    })
}

fn fleet(settings: &Settings) -> Fleet {
    let text = settings.get("builders").unwrap_or_default();
    config::parse_machines("builders", text, &settings.default_systems(), &read_machines_file)
}

/// Reads a file of machines for [`config::parse_machines`].
///
/// # Errors
/// If it exists and cannot be read as text.
pub fn read_machines_file(path: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A request that passed the checks which need no machine.
struct Candidate {
    request: Request,
    drv_path: StorePath,
    drv: Derivation,
    outputs: BTreeMap<String, Wanted>,
}

/// A machine that was chosen, its slot, and a connection if one was made to be sure.
struct Chosen {
    index: usize,
    slot: Held,
    reached: Option<Reached>,
}

/// How a build was accepted.
enum Accepted {
    /// On a machine with a free slot.
    Now(Box<Chosen>),
    /// To wait here for a slot. Holds a place in the queue.
    Waiting(Held),
}

struct Hook<'a> {
    nix: &'a NixSide,
    settings: &'a Settings,
    machines: &'a [Machine],
    local: Local,
    location: Location,
    slots: Slots,
    queue: Slots,
    reach: Reach,
}

/// Machines that failed in this process, by index, and how.
type Failed = HashMap<usize, String>;

impl<'a> Hook<'a> {
    fn new(nix: &'a NixSide, settings: &'a Settings, machines: &'a [Machine]) -> Result<Self, Unable> {
        let env = |name: &str| std::env::var_os(name);
        let location = Location::find(settings.get("store").unwrap_or("auto"), env)?;
        let slots = Slots::open(location.state_dir.join("current-load"))?;
        let reach = Reach::new(env)?;
        let queue = Slots::open(reach.directory().join("queue"))?;
        Ok(Self { nix, settings, machines, local: settings.local(), location, slots, queue, reach })
    }

    fn run(&self, source: &mut StdinLock<'_>) -> Result<u8, ServeError> {
        let mut failed = Failed::new();
        while let Some(request) = hook::read_request(source).map_err(ServeError::Protocol)? {
            let begin = Instant::now();
            let drv_path = request.drv_path.clone();
            // A panic before the reply would make Nix give up the whole command.
            let answered = catch_unwind(AssertUnwindSafe(|| self.answer(request, &mut failed)));
            let (reply, accepted) = answered.unwrap_or_else(|_| {
                self.nix.message(
                    Verbosity::Error,
                    "nix-offload: internal error while choosing a machine (see journalctl -t nix-offload); \
                     please report it",
                );
                (Reply::Decline, None)
            });
            self.nix.reply(&reply).map_err(ServeError::NixGone)?;
            tracing::debug!(
                derivation = drv_path,
                reply = ?reply,
                duration_us = begin.elapsed().as_micros() as u64,
                "answered"
            );
            if let Some((candidate, accepted)) = accepted {
                // Nix writes this with its whole event loop waiting, so it is read before anything else.
                let job = hook::read_job(source).map_err(ServeError::Protocol)?;
                return Ok(self.build(&candidate, accepted, &job, failed));
            }
        }
        Ok(exit::OK)
    }

    fn answer(&self, request: Request, failed: &mut Failed) -> (Reply, Option<(Candidate, Accepted)>) {
        let drv_path = request.drv_path.clone();
        let candidate = match self.candidate(request) {
            Ok(candidate) => candidate,
            Err(unfit) => {
                let reason = exit::report(&unfit, None);
                tracing::info!(derivation = drv_path, reason, "declined");
                return (Reply::Decline, None);
            }
        };
        match self.choose(&candidate, failed, true) {
            (Verdict::Accept(_), Some(chosen)) => {
                let machine = self.machines[chosen.index].name.clone();
                (Reply::Accept { machine }, Some((candidate, Accepted::Now(Box::new(chosen)))))
            }
            (Verdict::Postpone, _) => match self.place_in_queue(&candidate.request, failed) {
                Some((machine, place)) => {
                    let machine = self.machines[machine].name.clone();
                    (Reply::Accept { machine }, Some((candidate, Accepted::Waiting(place))))
                }
                None => (Reply::Postpone, None),
            },
            _ => (Reply::Decline, None),
        }
    }

    fn candidate(&self, request: Request) -> Result<Candidate, Unfit> {
        let no_path = || Unfit::NoDrvPath(request.drv_path.clone());
        let drv_path =
            self.location.store_dir.parse_path(request.drv_path.as_bytes()).map_err(|_| no_path())?;
        let name = drv_path.name().strip_suffix(".drv").ok_or_else(no_path)?.to_owned();
        let aterm = fs::read(self.location.real_path(&drv_path)).map_err(Unfit::Unreadable)?;
        let drv = Derivation::from_aterm_bytes_in(&aterm, &name, self.location.store_dir.clone())
            .map_err(Unfit::Unparsable)?;
        if drv.input_derivations().values().any(|input| input.is_dynamic()) {
            return Err(Unfit::Dynamic);
        }
        let outputs = outputs::output_paths(&drv, &self.location.store_dir)?;
        Ok(Candidate { request, drv_path, drv, outputs })
    }

    /// Chooses until a machine is found that is known or seen to answer.
    ///
    /// With `ask` a machine that has not answered lately is connected to first.
    fn choose(&self, candidate: &Candidate, failed: &mut Failed, ask: bool) -> (Verdict, Option<Chosen>) {
        loop {
            let (decision, slot) = match self.decide(&candidate.request, failed) {
                Ok(decided) => decided,
                Err(error) => {
                    let text = exit::report(&error, None);
                    tracing::error!("{text}");
                    self.nix.message(Verbosity::Error, &format!("nix-offload: {text}"));
                    return (Verdict::Decline, None);
                }
            };
            self.log_decision(candidate, &decision);
            let (Verdict::Accept(index), Some(slot)) = (&decision.verdict, slot) else {
                return (decision.verdict, None);
            };
            let index = *index;
            let machine = &self.machines[index];
            if !ask || self.reach.is_warm(machine) {
                return (decision.verdict, Some(Chosen { index, slot, reached: None }));
            }
            match self.connect(machine, &candidate.drv) {
                Ok(reached) => {
                    return (decision.verdict, Some(Chosen { index, slot, reached: Some(reached) }));
                }
                Err(error) => {
                    let text = error.describe();
                    tracing::warn!(builder = machine.name, reason = text, "cannot build on this machine");
                    self.nix
                        .message(Verbosity::Error, &format!("cannot build on '{}': {text}", machine.name));
                    failed.insert(index, text);
                }
            }
        }
    }

    /// A place among the builds that wait here for a slot, and the machine to name to Nix meanwhile.
    ///
    /// Only for what cannot be built locally: Nix would rather build that than wait.
    fn place_in_queue(&self, request: &Request, failed: &Failed) -> Option<(usize, Held)> {
        if self.local.could_build(request) {
            return None;
        }
        let suitable = self.suitable(request, failed);
        // A machine without slots will never have a free one.
        let first = *suitable.iter().find(|index| self.machines[**index].max_jobs > 0)?;
        let place = self.queue.take_any(&self.queue_name(&suitable), MAX_WAITING);
        match place {
            Ok(place) => place.map(|place| (first, place)),
            Err(error) => {
                tracing::error!("{}", exit::report(&error, None));
                None
            }
        }
    }

    fn suitable(&self, request: &Request, failed: &Failed) -> Vec<usize> {
        let reachable = |m: &Machine| !matches!(m.uri.scheme, Scheme::Other(_));
        let suits = |(index, machine): (usize, &Machine)| {
            let fits = reachable(machine) && plan::suits(machine, request).is_ok();
            (fits && !failed.contains_key(&index)).then_some(index)
        };
        self.machines.iter().enumerate().filter_map(suits).collect()
    }

    /// Builds that can use the same machines stand in one queue, so that none waits behind one with other wishes.
    fn queue_name(&self, suitable: &[usize]) -> String {
        let names: Vec<&str> = suitable.iter().map(|index| self.machines[*index].name.as_str()).collect();
        hash_bytes(HashAlgorithm::Sha256, names.join("\n").as_bytes())
            .to_nix_base16_string()
            .replace(':', "-")
    }

    /// Waits until a machine has a slot for the build; first come, first served.
    fn wait_for_slot(&self, candidate: &Candidate, failed: &mut Failed) -> Option<Chosen> {
        let begin = Instant::now();
        let waited = |chosen: Option<Chosen>| {
            let duration_ms = begin.elapsed().as_millis() as u64;
            tracing::info!(derivation = candidate.request.drv_path, duration_ms, "waited for a slot");
            chosen
        };
        let head = format!("{}-head", self.queue_name(&self.suitable(&candidate.request, failed)));
        let turn = self.queue.lock(&head).and_then(|turn| Ok((turn, self.slots.watch()?)));
        let (_turn, watch) = match turn {
            Ok(turn) => turn,
            Err(error) => {
                tracing::error!("{}", exit::report(&error, None));
                return None;
            }
        };
        loop {
            match self.choose(candidate, failed, false) {
                (Verdict::Postpone, _) => watch.wait(LOOK_AGAIN),
                (_, chosen) => return waited(chosen),
            }
        }
    }

    fn decide(&self, request: &Request, failed: &Failed) -> Result<(Decision, Option<Held>), SlotError> {
        let _choosing = self.slots.lock("main-lock")?;
        let mut free: HashMap<usize, u64> = HashMap::new();
        let mut fault = None;
        let decision = plan::decide(self.machines, &self.local, request, |index| {
            let machine = &self.machines[index];
            if let Some(reason) = failed.get(&index) {
                return State::Failed(reason.clone());
            }
            if let Scheme::Other(kind) = &machine.uri.scheme {
                return State::Unreachable(ReachError::NotSsh(kind.clone()).to_string());
            }
            match self.slots.count(&machine.name, machine.max_jobs) {
                Ok((load, slot)) => {
                    free.extend(slot.map(|slot| (index, slot)));
                    State::Ready(load)
                }
                Err(error) => {
                    let reason = exit::report(&error, None);
                    fault = Some(error);
                    State::Failed(reason)
                }
            }
        });
        match (decision.verdict.clone(), fault) {
            (Verdict::Accept(index), _) => {
                let slot = match free.get(&index) {
                    Some(number) => self.slots.take(&self.machines[index].name, *number)?,
                    None => None,
                };
                Ok((decision, slot))
            }
            (_, Some(error)) => Err(error),
            (_, None) => Ok((decision, None)),
        }
    }

    fn log_decision(&self, candidate: &Candidate, decision: &Decision) {
        let derivation = candidate.request.drv_path.as_str();
        for (index, refusal) in &decision.refusals {
            let builder = self.machines[*index].name.as_str();
            tracing::debug!(derivation, builder, reason = %refusal, "not chosen");
        }
        match &decision.verdict {
            Verdict::Accept(index) => {
                tracing::info!(derivation, builder = self.machines[*index].name, "chosen");
            }
            Verdict::Postpone => {
                tracing::info!(derivation, reason = "all suitable machines are full", "postponed")
            }
            Verdict::Decline => {
                let reasons: Vec<String> = decision
                    .refusals
                    .iter()
                    .map(|(index, refusal)| format!("{} {refusal}", self.machines[*index].name))
                    .collect();
                tracing::info!(derivation, reason = reasons.join("; "), "declined");
            }
        }
    }

    fn connect(&self, machine: &Machine, drv: &Derivation) -> Result<Reached, ReachError> {
        let begin = Instant::now();
        let reached = self.reach.connect(machine, &self.location.store_dir, CONNECT_BOUND)?;
        tracing::debug!(
            builder = machine.name,
            way = reached.way.as_str(),
            reason = reached.detour,
            version = reached.nix_version,
            duration_us = begin.elapsed().as_micros() as u64,
            "reached the daemon"
        );
        // A builder that does not trust us still builds what is fixed by its content.
        if reached.builder.peer().trusted == Some(false) && !outputs::is_fixed(drv) {
            self.reach.forget(machine);
            let account = machine.uri.destination.clone();
            return Err(ReachError::Untrusted { account });
        }
        Ok(reached)
    }

    /// Runs the accepted build to its end, on another machine if the first cannot be kept. Gives the exit status.
    fn build(&self, candidate: &Candidate, accepted: Accepted, job: &Job, mut failed: Failed) -> u8 {
        let mut tried = Vec::new();
        let mut chosen = match accepted {
            Accepted::Now(chosen) => Some(*chosen),
            Accepted::Waiting(_place) => self.wait_for_slot(candidate, &mut failed),
        };
        while let Some(current) = chosen.take() {
            let machine = &self.machines[current.index];
            let index = current.index;
            let done = catch_unwind(AssertUnwindSafe(|| self.build_on(candidate, current, job)));
            let attempt = done.unwrap_or_else(|_| {
                Attempt::Final(1, "internal error of nix-offload (see journalctl -t nix-offload)".into())
            });
            match attempt {
                Attempt::Done => return exit::OK,
                Attempt::Final(status, text) => {
                    let text = format!(
                        "build of '{}' on '{}' failed: {text}",
                        candidate.request.drv_path, machine.name
                    );
                    tracing::info!(
                        derivation = candidate.request.drv_path,
                        builder = machine.name,
                        reason = text,
                        "failed"
                    );
                    self.nix.message(Verbosity::Error, &format!("error: {text}"));
                    return status;
                }
                Attempt::Elsewhere(text) => {
                    tracing::warn!(
                        derivation = candidate.request.drv_path,
                        builder = machine.name,
                        reason = text,
                        "giving up this machine"
                    );
                    self.nix.message(Verbosity::Warn, &format!("cannot build on '{}': {text}", machine.name));
                    tried.push(format!("{}: {text}", machine.name));
                    failed.insert(index, text);
                    chosen = match self.choose(candidate, &mut failed, true) {
                        (Verdict::Postpone, _) => self.wait_for_slot(candidate, &mut failed),
                        (_, chosen) => chosen,
                    };
                    if let Some(next) = &chosen {
                        let name = &self.machines[next.index].name;
                        self.nix.message(
                            Verbosity::Warn,
                            &format!("building '{}' on '{name}' instead", candidate.request.drv_path),
                        );
                    }
                }
            }
        }
        let text = format!(
            "error: '{}' could not be built on any machine; tried:\n  {}",
            candidate.request.drv_path,
            tried.join("\n  ")
        );
        tracing::error!(derivation = candidate.request.drv_path, reason = text, "failed");
        self.nix.message(Verbosity::Error, &text);
        exit::FAILURE
    }

    fn build_on(&self, candidate: &Candidate, chosen: Chosen, job: &Job) -> Attempt {
        let machine = &self.machines[chosen.index];
        let derivation = candidate.request.drv_path.as_str();
        let task = Task {
            nix: self.nix,
            settings: self.settings,
            location: &self.location,
            drv_path: &candidate.drv_path,
            drv: &candidate.drv,
            outputs: &candidate.outputs,
            machine: &machine.name,
        };
        let Chosen { slot, mut reached, .. } = chosen;
        let mut slot = Some(slot);
        let begin = Instant::now();
        let mut lost = String::new();
        for attempt in 1..=TRIES {
            let connection = match reached.take() {
                Some(reached) => Ok(reached),
                None => self.connect(machine, &candidate.drv),
            };
            let mut connection = match connection {
                Ok(connection) => connection,
                Err(error) => return Attempt::Elsewhere(error.describe()),
            };
            match task.run(&mut connection.builder, job, &mut slot) {
                Ok(report) => {
                    log_report(derivation, &machine.name, &report, begin.elapsed());
                    return Attempt::Done;
                }
                Err(error) if error.is_transport() => {
                    self.reach.forget(machine);
                    lost = one_report(&error);
                    tracing::warn!(
                        derivation,
                        builder = machine.name,
                        attempt,
                        reason = lost,
                        "connection lost"
                    );
                    if attempt < TRIES {
                        let text = format!("'{}': {lost}; connecting again", machine.name);
                        self.nix.message(Verbosity::Warn, &text);
                    }
                }
                Err(error) => return Attempt::Final(error.exit_status(), one_report(&error)),
            }
        }
        Attempt::Elsewhere(lost)
    }
}

/// How trying one machine for an accepted build ended.
enum Attempt {
    /// The outputs are valid here.
    Done,
    /// The build failed, with this exit status and text; no other machine is to be tried.
    Final(u8, String),
    /// The machine could not be used; another may do it.
    Elsewhere(String),
}

/// The error with its causes. The builder's own words keep their lines.
fn one_report(error: &JobError) -> String {
    match error {
        JobError::Failed { message, .. } => message.clone(),
        other => {
            let text = exit::report(other, None);
            text.strip_prefix("error: ").unwrap_or(&text).to_owned()
        }
    }
}

fn log_report(derivation: &str, builder: &str, report: &Report, all: Duration) {
    let ms = |duration: Duration| duration.as_micros() as f64 / 1000.0;
    tracing::info!(
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
        "built"
    );
}
