//! `ping-store`: connects to machines as the hook would and tells what answers.
//!
//! Owns the order of asking and the report's form. Must never connect in any other way than `reach` does.

use crate::builder::Ahead;
use crate::cli::{Meant, Targets};
use crate::config::{self, Fleet};
use crate::fds;
use crate::files::read_machines_file;
use crate::nix_here::AskError;
use crate::plan::machine::{Machine, UriError};
use crate::plan::trust::Account;
use crate::reach::{DAEMON_SOCKET, Reach, ReachError, ReachSetupError, Way};
use crate::vantage::{self, Vantage, VantageError};
use nix_derivation::StoreDir;
use nix_offload_proxy::exit::{self, Failure};
use serde_json::{Value, json};
use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Machines asked at the same time.
const AT_ONCE: usize = 32;

/// Why `ping-store` cannot begin.
#[derive(Debug, Error)]
pub enum PingError {
    /// Nothing can be reached from here.
    #[error(transparent)]
    Setup(#[from] ReachSetupError),
    /// What the hook has before it is not known.
    #[error(transparent)]
    Vantage(#[from] VantageError),
    /// A URI that cannot be read.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The output cannot be written.
    #[error("cannot write the report")]
    Output(#[source] io::Error),
    /// There is nothing to ask.
    #[error("no machines are configured{}", missing_files(.0))]
    NoMachines(Vec<String>),
}

fn missing_files(files: &[String]) -> String {
    if files.is_empty() { String::new() } else { format!(" ({} does not exist)", files.join(", ")) }
}

impl PingError {
    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            Self::NoMachines(_) => {
                Some("name a store with --store ssh-ng://host, or set 'builders' in nix.conf".into())
            }
            Self::Uri(_) => {
                Some("write the store as ssh-ng://[user@]host[:port] or ssh://[user@]host[:port]".into())
            }
            Self::Setup(error) => error.cure(),
            Self::Vantage(VantageError::Location(_)) => {
                Some("name the machine with --store, or a list with --builders".into())
            }
            Self::Vantage(error) => error.cure(),
            Self::Output(_) => None,
        }
    }

    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Uri(_) => exit::USAGE,
            Self::Vantage(error) => error.exit_code(),
            Self::Setup(_) | Self::NoMachines(_) => exit::CONFIG,
            Self::Output(_) => exit::FAILURE,
        }
    }
}

impl From<PingError> for Failure {
    fn from(error: PingError) -> Self {
        Failure::new(&error, error.cure().as_deref(), error.exit_code())
    }
}

/// What a machine answered.
struct Answer {
    version: Option<String>,
    trusted: Option<bool>,
    /// Who we are there, if that matters.
    account: Option<Account>,
    way: Way,
    detour: Option<String>,
    connected: Duration,
    round_trip: Duration,
}

/// Asks the machines and prints the report; gives the exit code.
///
/// # Errors
/// If there is nothing to ask or no way to begin.
pub fn ping(targets: &Targets, bound: Duration, as_json: bool) -> Result<u8, PingError> {
    let (Fleet { machines, problems, missing_files }, reach) = find(targets)?;
    let mut code = exit::OK;
    for problem in &problems {
        code = exit::CONFIG;
        // What cannot be shown cannot be helped.
        let _ = writeln!(io::stderr(), "error: {problem}");
    }
    if machines.is_empty() && problems.is_empty() {
        return Err(PingError::NoMachines(missing_files));
    }
    // A master and what goes with it outlive this command, and are not to hold a caller's locks and pipes.
    let _ = fds::keep_from_children();
    let answers = ask_all(&reach, &machines, bound);
    let mut report = String::new();
    let mut list = Vec::new();
    for (machine, answer) in machines.iter().zip(&answers) {
        if as_json {
            list.push(to_json(machine, answer));
        } else {
            to_text(&mut report, machine, answer);
        }
        if let (Err(error), exit::OK) = (answer, code) {
            code = error.exit_code();
        }
    }
    if as_json {
        report = format!("{:#}\n", Value::Array(list));
    }
    match io::stdout().write_all(report.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(PingError::Output(error)),
        _ => {}
    }
    if !as_json && !nix::unistd::geteuid().is_root() && Path::new(DAEMON_SOCKET).exists() {
        let _ = writeln!(
            io::stderr(),
            "note: builds run by the Nix daemon connect as root, with root's keys and ssh_config; \
             run this as root to see what it sees"
        );
    }
    Ok(code)
}

/// The machines, and the way to them that the hook has.
fn find(targets: &Targets) -> Result<(Fleet, Reach), PingError> {
    let builders = match targets {
        Targets::Stores(stores) => {
            let machines = stores.iter().map(|uri| Machine::for_uri(uri, BTreeSet::new()));
            let fleet = Fleet { machines: machines.collect::<Result<_, _>>()?, ..Fleet::default() };
            return Ok((fleet, own_reach()?));
        }
        Targets::Builders(text) => Some(text),
        Targets::Configured => None,
    };
    let vantage = match Vantage::find(&Meant { store: None, builders: builders.cloned() }) {
        Ok(vantage) => vantage,
        // A list that is given needs nothing of Nix.
        Err(VantageError::Nix(AskError::NoNix)) if let Some(text) = builders => {
            let fleet = config::parse_machines("--builders", text, &BTreeSet::new(), &read_machines_file);
            return Ok((fleet, own_reach()?));
        }
        Err(error) => return Err(error.into()),
    };
    let reach = if vantage.ours().is_ok() { vantage.reach()? } else { own_reach()? };
    Ok((vantage.fleet(), reach))
}

/// Our own variables count, or else those of the daemon whose hook has the same masters and the same memory.
fn own_reach() -> Result<Reach, ReachSetupError> {
    let daemons = vantage::of_daemon();
    Reach::new(|name| std::env::var_os(name).or_else(|| daemons.as_ref()?.variable(name)))
}

fn ask_all(reach: &Reach, machines: &[Machine], bound: Duration) -> Vec<Result<Answer, ReachError>> {
    let queue: Mutex<VecDeque<usize>> = Mutex::new((0..machines.len()).collect());
    let answers = Mutex::new(Vec::with_capacity(machines.len()));
    let lock = |error: PoisonError<_>| error.into_inner();
    thread::scope(|scope| {
        for _ in 0..machines.len().min(AT_ONCE) {
            scope.spawn(|| {
                while let Some(index) = queue.lock().unwrap_or_else(lock).pop_front() {
                    let answer = ask(reach, &machines[index], bound);
                    answers.lock().unwrap_or_else(PoisonError::into_inner).push((index, answer));
                }
            });
        }
    });
    let mut answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
    answers.sort_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

fn ask(reach: &Reach, machine: &Machine, bound: Duration) -> Result<Answer, ReachError> {
    const TRIPS: usize = 3;
    let begin = Instant::now();
    let mut reached = reach.connect(machine, &StoreDir::default(), bound, &Ahead::default())?;
    let connected = begin.elapsed();
    let mut round_trip = Duration::MAX;
    for _ in 0..TRIPS {
        // The shortest is the link's; the others also had to wait for something else.
        round_trip = round_trip.min(reached.builder.round_trip(bound).map_err(ReachError::Daemon)?);
    }
    let (version, way, detour) = (reached.nix_version.clone(), reached.way, reached.detour.clone());
    let (trusted, _) = reach.find_trust(machine, reached, bound)?;
    let account = (trusted == Some(false)).then(|| reach.account(machine));
    Ok(Answer { version, trusted, account, way, detour, connected, round_trip })
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 100_000.0).round() / 100.0
}

fn to_json(machine: &Machine, answer: &Result<Answer, ReachError>) -> Value {
    match answer {
        Ok(answer) => json!({
            "url": machine.name,
            "version": answer.version,
            "trusted": answer.trusted,
            "account": answer.account.as_ref().map(Account::to_string),
            "way": answer.way.as_str(),
            "detour": answer.detour,
            "connectMs": ms(answer.connected),
            "roundTripMs": ms(answer.round_trip),
            "hint": slip(machine),
        }),
        Err(error) => json!({
            "url": machine.name,
            "error": exit::reason(error),
            "hint": slip(machine).or_else(|| error.cure()),
        }),
    }
}

/// What was surely meant, where the URI names a path of this machine.
fn slip(machine: &Machine) -> Option<String> {
    machine.uri.slip().map(|slip| format!("{}; {}", slip.message, slip.cure))
}

/// What it means not to be trusted.
fn untrusted(account: &Account) -> String {
    format!(
        "its daemon does not trust '{account}': builds work but are slower, for each derivation is sent with all that it was \
         made from, and what was built elsewhere must be signed by a key that stands in trusted-public-keys there; \
         to be trusted, {}",
        account.cure()
    )
}

fn to_text(report: &mut String, machine: &Machine, answer: &Result<Answer, ReachError>) {
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(report, "{name}: {value}");
    };
    line("Store URL", &machine.name);
    if let Some(slip) = slip(machine) {
        line("Hint", &slip);
    }
    match answer {
        Ok(answer) => {
            line("Version", answer.version.as_deref().unwrap_or("unknown"));
            // Numbers, as `nix store ping` prints them.
            match answer.trusted {
                Some(true) => line("Trusted", "1"),
                Some(false) => {
                    line("Trusted", "0");
                    if let Some(account) = &answer.account {
                        line("Hint", &untrusted(account));
                    }
                }
                None => line("Trusted", "unknown"),
            }
            line("Way", answer.way.as_str());
            if let Some(detour) = &answer.detour {
                let why = match answer.way {
                    Way::Serve => "no daemon can be started for us",
                    _ => "the daemon's socket is not open to us",
                };
                line("Detour", &format!("{why}: {detour}"));
            }
            line("Connected in", &format!("{} ms", ms(answer.connected)));
            line("Round trip", &format!("{} ms", ms(answer.round_trip)));
        }
        Err(error) => {
            line("Error", &exit::reason(error));
            if let Some(cure) = error.cure().filter(|_| slip(machine).is_none()) {
                line("Hint", &cure);
            }
        }
    }
}
