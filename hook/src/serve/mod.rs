//! The hook: answers Nix's requests and runs the one build it accepted.
//!
//! The only room that joins all the others. Must never contain a rule: a rule found here belongs to `plan`.

mod accepted;
mod ailing;
mod asking;
mod attempts;
mod choosing;
mod deciding;
mod handover;
mod moment;
mod moving;
mod notice;
mod race;
mod trust;
mod wait;
mod waiting;

use crate::config::rules::Offload;
use crate::config::{self, Settings};
use crate::derivation::{self, Subject, Unfit};
use crate::fds;
use crate::files::read_machines_file;
use crate::nix_side::NixSide;
use crate::path_info::PathInfo;
use crate::plan::machine::Machine;
use crate::plan::outputs::Wanted;
use crate::plan::{Local, Request, Rules, Work, turn};
use crate::queue::{self, Place, Queue, QueueError, Wish};
use crate::reach::{Reach, ReachSetupError, Reached};
use crate::sampler::Interest;
use crate::slots::{Held, SlotError, Slots};
use crate::state::{Times, Trial};
use crate::stock::Stock;
use crate::store::{Location, LocationError};
use crate::survey;
use crate::wire::WireError;
use crate::wire::hook::{self, Reply, Verbosity};
use asking::Asking;
use choosing::Choice;
use deciding::Memory;
use handover::{Among, Handover};
use moment::Moment;
use nix_derivation::{Derivation, StorePath};
use nix_offload_proxy::exit;
use nix_offload_proxy::log::{self, Fallback};
use nix_offload_proxy::settings::{self as offload, SettingsError};
use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::error::Error;
use std::ffi::OsString;
use std::io::{self, StdinLock};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};
use thiserror::Error;
use tracing::level_filters::LevelFilter;
use wait::Wait;

/// How long it may take for a build that is accepted already, and lost if this machine is given up too soon.
const PATIENT_BOUND: Duration = Duration::from_secs(20);

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

/// Why no request can be served, though Nix and its machines are well.
#[derive(Debug, Error)]
enum Unable {
    #[error(transparent)]
    Location(#[from] LocationError),
    #[error(transparent)]
    Slots(#[from] SlotError),
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Reach(#[from] ReachSetupError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

impl Unable {
    fn cure(&self) -> Option<String> {
        match self {
            Self::Reach(error) => error.cure(),
            Self::Settings(error) => error.cure(),
            Self::Location(_) | Self::Slots(_) | Self::Queue(_) => None,
        }
    }
}

/// Serves Nix until it has no more requests or the accepted build is over. Gives the exit status.
///
/// # Errors
/// If this is no dialogue with Nix. Everything else is answered or reported within it.
pub fn serve(verbosity: u64) -> Result<u8, ServeError> {
    let log = fds::take_log().map_err(ServeError::NotStartedByNix)?;
    // A panic's text must not reach descriptor 2, which is the wire to Nix.
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "internal error: {panic}")));
    log::init("nix-offload", level(verbosity), Fallback::Nothing);
    let nix = NixSide::new(log, verbosity);
    let mut source = io::stdin().lock();
    let settings = hook::read_settings(&mut source).map_err(ServeError::Protocol)?;
    let builders = settings.get("builders").unwrap_or_default();
    let fleet = config::fleet(&settings, "builders", builders, &read_machines_file);
    for problem in &fleet.problems {
        let place = format!("{}:{}:{}", problem.place.source, problem.place.line, problem.place.column);
        tracing::warn!(event = "a fault in the list of machines", place, "{place}: {}", problem.message);
        nix.message(Verbosity::Warn, &format!("warning: {problem}"));
    }
    if fleet.machines.is_empty() {
        tracing::debug!(missing = ?fleet.missing_files, "no machines");
        nix.reply(&Reply::DeclinePermanently).map_err(ServeError::NixGone)?;
        return Ok(exit::OK);
    }
    match Hook::new(&nix, &settings, &fleet.machines) {
        Ok(hook) => hook.run(&mut source, verbosity),
        Err(unable) => {
            let text = exit::reason_and_cure(&unable, unable.cure().as_deref());
            if matches!(unable, Unable::Location(_)) {
                let handover = Handover::new(&nix, &settings, verbosity, fleet.machines.iter());
                return handover::serve_all(handover, &mut source, &text);
            }
            tracing::error!("cannot build remotely: {text}");
            nix.message(Verbosity::Error, &format!("nix-offload cannot build remotely: {text}"));
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

/// A request that passed the checks which need no machine.
struct Candidate {
    request: Request,
    work: Work,
    wait: Wait,
    /// How it fared on machines so far; the last word on each.
    trials: RefCell<Vec<Trial>>,
    /// What speaks against a machine for this build only, by its index.
    unfit: RefCell<Failed>,
    drv_path: StorePath,
    drv: Derivation,
    outputs: BTreeMap<String, Wanted>,
    /// The direct inputs and the sizes of their NARs, once they have been looked up.
    inputs: OnceCell<Option<Vec<(StorePath, u64)>>>,
    /// Seconds of the longest chain that waits for it, once that has been looked up.
    tail: OnceCell<Option<f64>>,
    /// The inputs that not every machine takes from us, once they have been looked up.
    in_doubt: OnceCell<Vec<PathInfo>>,
}

/// A machine that was chosen, its slot, and a connection if one was made to be sure.
struct Chosen {
    index: usize,
    /// How many seconds of an idle machine of speed factor 1 a second of this one is worth now.
    pace: f64,
    slot: Held,
    reached: Option<Reached>,
}

/// What is done with a request.
enum Answer {
    /// Nothing but this.
    Reply(Reply),
    /// It is built by this process.
    Ours(Reply, Box<Candidate>, Accepted),
    /// Nix's own hook took it.
    Handed(Reply, Stock),
}

/// How a build was accepted.
enum Accepted {
    /// On a machine with a free slot.
    Now(Box<Chosen>),
    /// To wait here for a slot. Nix was named the machine of this index.
    Waiting(usize, Place),
}

/// How far a build has come that a machine is chosen for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage<'w> {
    /// Nix waits for the answer. Whether it may wait until machines have answered that are not known to.
    New { may_ask: bool },
    /// It was accepted, and its machine was given up.
    Again,
    /// It has waited for a slot, and it is its turn among those that wish the same, unless it waits beside them.
    Waited(Option<&'w Wish>),
}

/// What Nix can still build itself of a derivation that is accepted: nothing, it has no say any more.
const NOWHERE: Local = Local { max_jobs: 0, systems: BTreeSet::new(), features: BTreeSet::new() };

struct Hook<'a> {
    nix: &'a NixSide,
    settings: &'a Settings,
    machines: &'a [Machine],
    rules: Rules,
    local: Local,
    location: Location,
    slots: Slots,
    queue: Queue,
    reach: Reach,
    memory: Memory,
    interest: Interest<'a>,
    asking: Asking,
    offload: Offload,
}

/// Machines that failed in this process, by index, and how.
type Failed = HashMap<usize, String>;

impl From<(Reply, Option<Stock>)> for Answer {
    fn from((reply, stock): (Reply, Option<Stock>)) -> Self {
        match stock {
            Some(stock) => Self::Handed(reply, stock),
            None => Self::Reply(reply),
        }
    }
}

fn env(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

impl<'a> Hook<'a> {
    fn new(nix: &'a NixSide, settings: &'a Settings, machines: &'a [Machine]) -> Result<Self, Unable> {
        let location = Location::find(settings.get("store").unwrap_or("auto"), env)?;
        let current_load = location.state_dir.join("current-load");
        let slots = Slots::open(current_load.clone())?;
        let reach = Reach::new(env)?.following(settings);
        let queue = Queue::open(reach.directory(), &location.state_dir)?;
        let offload: Offload = offload::read(env)?;
        let (rules, local) = (offload.rules(), settings.local());
        let memory = Memory::new(&reach);
        let store_dir = location.store_dir.to_string();
        let interest = Interest::new(&reach, machines, offload.sample_every(), &current_load, &store_dir);
        Ok(Self {
            nix,
            settings,
            machines,
            rules,
            local,
            location,
            slots,
            queue,
            reach,
            memory,
            interest,
            asking: Asking::default(),
            offload,
        })
    }

    fn run(&self, source: &mut StdinLock<'_>, verbosity: u64) -> Result<u8, ServeError> {
        let mut failed = Failed::new();
        let left = self.machines.iter().filter(|machine| !survey::is_own_store(machine, &self.location, env));
        let mut handover = Handover::new(self.nix, self.settings, verbosity, left);
        let mut first_asked: HashMap<String, (Times, Moment)> = HashMap::new();
        while let Some(request) = hook::read_request(source).map_err(ServeError::Protocol)? {
            let begin = Instant::now();
            self.memory.begin_request();
            self.hear_of_late(&mut failed);
            self.forget_what_is_well(&mut failed);
            let drv_path = request.drv_path.clone();
            let is_first = !first_asked.contains_key(&drv_path);
            let asked = || (self.memory.asked(&drv_path), Moment::now());
            let (times, last) = first_asked.entry(drv_path.clone()).or_insert_with(asked);
            let missed = mem::replace(last, Moment::now()).missed();
            times.first = missed.after(times.first);
            times.obstructed = times.obstructed.map(|since| missed.after(since));
            // A panic before the reply would make Nix give up the whole command.
            let answered =
                catch_unwind(AssertUnwindSafe(|| self.answer(request, times, &mut failed, &mut handover)));
            let answer = answered.unwrap_or_else(|_| {
                self.tell_fault("choosing a machine");
                Answer::Reply(Reply::Decline)
            });
            let (Answer::Reply(reply) | Answer::Ours(reply, ..) | Answer::Handed(reply, _)) = &answer;
            self.nix.reply(reply).map_err(ServeError::NixGone)?;
            tracing::debug!(
                derivation = drv_path,
                reply = ?reply,
                duration_us = begin.elapsed().as_micros() as u64,
                "answered"
            );
            match answer {
                Answer::Reply(reply) => {
                    self.attend(&failed);
                    if matches!(reply, Reply::Postpone) {
                        self.memory.postponed(&drv_path, *times);
                        self.interest.show();
                    }
                    if is_first {
                        self.memory.keep_latest(&drv_path, self.machines, &[]);
                    }
                }
                Answer::Ours(_, candidate, accepted) => {
                    drop(handover);
                    // Nix writes this with its whole event loop waiting, so it is read before anything else.
                    let job = hook::read_job(source).map_err(ServeError::Protocol)?;
                    self.attend(&failed);
                    let build = AssertUnwindSafe(|| self.build(&candidate, accepted, &job, failed));
                    return Ok(catch_unwind(build).unwrap_or_else(|_| {
                        self.tell_fault("an accepted build");
                        exit::FAILURE
                    }));
                }
                Answer::Handed(_, stock) => return Ok(stock.carry_on(source, self.nix)),
            }
        }
        Ok(exit::OK)
    }

    /// Tells of a panic.
    fn tell_fault(&self, during: &str) {
        let text =
            format!("internal error during {during} (see journalctl -t nix-offload); please report it");
        self.nix.message(Verbosity::Error, &format!("nix-offload: {text}"));
    }

    fn answer(
        &self,
        request: Request,
        times: &mut Times,
        failed: &mut Failed,
        handover: &mut Handover<'_>,
    ) -> Answer {
        let candidate = match self.candidate(&request, *times) {
            Ok(candidate) => candidate,
            Err(unfit) => {
                let reason = exit::reason(&unfit);
                let (event, name) = ("not for us", derivation::name_in(&request.drv_path));
                tracing::info!(event, derivation = request.drv_path, reason, "'{name}' is {event}: {reason}");
                if unfit.is_for_stock() {
                    return Answer::from(handover.ask(Among::All, &request, &reason));
                }
                return Answer::Reply(Reply::Decline);
            }
        };
        let name = |index: usize| self.machines[index].name.clone();
        let choice = self.choose(&candidate, Stage::New { may_ask: true }, failed);
        times.obstructed = candidate.wait.obstructed();
        match choice {
            Ok(Choice::Machine(chosen)) => {
                let reply = Reply::Accept { machine: name(chosen.index) };
                Answer::Ours(reply, Box::new(candidate), Accepted::Now(chosen))
            }
            Ok(Choice::Wait(machines)) => {
                match (machines.first(), self.place_in_queue(&candidate, &machines)) {
                    // The first is named to Nix, which cannot be told otherwise later; the user can.
                    (Some(first), Some(place)) => {
                        let reply = Reply::Accept { machine: name(*first) };
                        Answer::Ours(reply, Box::new(candidate), Accepted::Waiting(*first, place))
                    }
                    _ => Answer::Reply(Reply::Postpone),
                }
            }
            Ok(Choice::Postpone(_)) => {
                self.tell_what_is_missing(&request, &self.local);
                Answer::Reply(Reply::Postpone)
            }
            // Nix's own hook would send it away.
            Ok(Choice::Decline(because)) if because.prefers_here() => Answer::Reply(Reply::Decline),
            Ok(Choice::Decline(_)) | Err(_) => {
                if let Err(error) = choice {
                    self.tell_error(&error, Verbosity::Error);
                }
                let why = "its machine is not of a kind we speak";
                let answer = handover.ask(Among::Foreign, &request, why);
                if answer.0 == Reply::Decline {
                    self.tell_what_is_missing(&request, &self.local);
                    if !self.local.could_build(&request) {
                        // Nix may end us as soon as it has the answer.
                        self.memory.keep_latest(&request.drv_path, self.machines, &candidate.trials.borrow());
                    }
                }
                Answer::from(answer)
            }
        }
    }

    fn candidate(&self, request: &Request, times: Times) -> Result<Candidate, Unfit> {
        let Subject { path, drv, outputs } = derivation::subject(&self.location, &request.drv_path)?;
        Ok(Candidate {
            request: request.clone(),
            work: self.work(&drv, times.first),
            wait: Wait::new(times),
            trials: RefCell::default(),
            unfit: RefCell::default(),
            drv_path: path,
            drv,
            outputs,
            inputs: OnceCell::new(),
            tail: OnceCell::new(),
            in_doubt: OnceCell::new(),
        })
    }

    /// The paths that a derivation names itself, whose closure are all its inputs. None if they cannot be told.
    fn direct_inputs(&self, drv: &Derivation) -> Option<Vec<StorePath>> {
        derivation::direct_inputs(&self.location, drv)
    }

    /// A place among the builds that wait here for a slot of these machines; none if there are too many of this user. What
    /// waits for the build itself is looked at later, for Nix waits now.
    fn place_in_queue(&self, candidate: &Candidate, machines: &[usize]) -> Option<Place> {
        let (wish, came) = (self.wish(machines), turn::ticket(candidate.wait.since(), None));
        self.queue.place(wish, queue::whose(), came, self.rules.max_waiting).unwrap_or_else(|error| {
            tracing::error!("no place to wait for a slot: {}", exit::reason(&error));
            None
        })
    }

    fn tell_error(&self, error: &dyn Error, level: Verbosity) {
        let text = exit::report(error, None);
        tracing::error!("{text}");
        self.nix.message(level, &format!("nix-offload: {text}"));
    }

    /// What a build waits for after the last decision.
    fn wish(&self, machines: &[usize]) -> Wish {
        let latest = self.memory.latest();
        let weight = |index: &usize| latest.as_ref().map_or(1, |decision| decision.weight(*index));
        let slots = machines.iter().map(weight).max().unwrap_or(1);
        Wish { machines: machines.iter().map(|index| self.machines[*index].name.clone()).collect(), slots }
    }
}
