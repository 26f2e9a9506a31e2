//! Reaching a machine: from its line in the list to a connection with the Nix daemon there.
//!
//! Tries the ways in their order, best first, and turns every failure into a sentence that names the machine, the
//! cause and the cure. Must never choose a machine or know what the connection is for.

mod error;
mod health;
mod local;
mod notes;
mod own;
mod seen;
mod session;
mod shell;
mod speed;
mod trust;
mod ways;

pub use error::{ReachError, ReachSetupError};
pub use health::{Ailing, FIRST_PAUSE, Vitals, probe};
pub use notes::WARM;
pub use seen::{Seen, Wanted};
pub use shell::{Beside, Open};
pub use speed::Speed;

use crate::builder::{Ahead, Builder, Store};
use crate::config::Settings;
use crate::digest;
use crate::plan::machine::{Machine, Scheme};
use crate::slots::Slots;
use crate::wire::worker::plain_version;
use nix_derivation::StoreDir;
use nix_offload_proxy::exit;
use nix_offload_proxy::master::{Endpoint, Master, Pool, Recipe, Stream};
use notes::{Note, Notes};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

/// Where a daemon listens unless its `NIX_STATE_DIR` or `NIX_DAEMON_SOCKET_PATH` was changed.
pub const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

/// A live master, or the link behind it, has this long to open a stream before another one is tried.
const OPEN_BOUND: Duration = Duration::from_secs(3);

/// The first command on a new master: tells the builder's version of Nix, and ends the delay of small packets
/// that OpenSSH up to 10.0 has until a session was opened.
const FIRST_COMMAND: &str = "nix-daemon --version || nix-store --version";

/// How a connection came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A channel to the daemon's socket.
    Socket,
    /// A daemon of our own, started in a session.
    Session,
    /// `nix-store --serve`, started in a session.
    Serve,
    /// A daemon's socket on this machine.
    LocalSocket,
    /// A daemon of our own on this machine.
    Child,
}

impl Way {
    /// A word for people and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Socket => "daemon socket",
            Self::Session => "nix-daemon --stdio",
            Self::Serve => "nix-store --serve",
            Self::LocalSocket => "daemon socket here",
            Self::Child => "nix-daemon --stdio here",
        }
    }
}

/// A connection and how it came about.
pub struct Reached {
    /// The connection.
    pub builder: Store,
    /// How.
    pub way: Way,
    /// Why a better way could not be taken.
    pub detour: Option<String>,
    /// The builder's version of Nix, if it is known.
    pub nix_version: Option<String>,
}

/// Reaches machines over shared masters.
#[derive(Debug, Clone)]
pub struct Reach {
    pool: Pool,
    opening: Slots,
    ssh_options: Vec<String>,
    around: local::Surroundings,
}

impl Reach {
    /// Uses the runtime directory and `NIX_SSHOPTS` of the environment.
    ///
    /// # Errors
    /// If the runtime directory cannot be made or is not safe, or the options cannot be split into words.
    pub fn new(env: impl Fn(&str) -> Option<OsString>) -> Result<Self, ReachSetupError> {
        let options = env("NIX_SSHOPTS").unwrap_or_default().to_string_lossy().into_owned();
        let ssh_options = shlex::split(&options).ok_or(ReachSetupError::SshOptions(options))?;
        let pool = Pool::from_lookup(&env)?;
        let opening = Slots::open(pool.directory().join("opening"))?;
        Ok(Self { pool, opening, ssh_options, around: local::Surroundings::new(env) })
    }

    /// Has daemons of our own on this machine follow Nix's settings.
    #[must_use]
    pub fn following(mut self, settings: &Settings) -> Self {
        self.around.follow(settings);
        self
    }

    /// The runtime directory.
    pub fn directory(&self) -> &Path {
        self.pool.directory()
    }

    /// How long connecting may take while somebody waits who has other things to do.
    pub fn connect_timeout(&self) -> Duration {
        self.pool.settings().ssh.connect_timeout
    }

    /// Whether the machine answered within the last minute and its master lives, so that it can be promised a
    /// build without being asked.
    pub fn is_warm(&self, machine: &Machine) -> bool {
        let recent = self.notes(machine).holds(Note::Answered);
        let lives = || {
            endpoint(machine, &self.ssh_options)
                .is_ok_and(|endpoint| self.pool.is_kept(&endpoint) || self.pool.live(&endpoint).is_some())
        };
        recent && (machine.uri.here().is_some() || lives())
    }

    /// How much longer the machine may take to wake up, if it was down and has been told to.
    pub fn waking(&self, machine: &Machine) -> Option<Duration> {
        let endpoint = endpoint(machine, &self.ssh_options).ok()?;
        self.pool.waking(&endpoint).ok()?.map(|waking| waking.left)
    }

    /// Since when there is a master to the machine, if one takes connections; `Some(None)` if the time is not known. Looks at
    /// the first one only, and asks nobody.
    pub fn master(&self, machine: &Machine) -> Option<Option<SystemTime>> {
        let endpoint = endpoint(machine, &self.ssh_options).ok()?;
        self.pool.live(&endpoint).map(|master| master.started_at())
    }

    /// Forgets that the machine answered.
    pub fn forget(&self, machine: &Machine) {
        self.notes(machine).remove(Note::Answered);
    }

    /// Whether the machine's Nix was lately found too old for requests that are sent before it has said its version.
    pub fn is_old(&self, machine: &Machine) -> bool {
        self.notes(machine).holds(Note::Old)
    }

    /// Notes that for other hooks.
    pub fn note_old(&self, machine: &Machine) {
        let notes = self.notes(machine);
        if !notes.is_young(Note::Old) {
            notes.put(Note::Old, "has an old Nix");
        }
    }

    /// Which paths the machine was seen to have lately.
    pub fn seen(&self, machine: &Machine) -> Seen {
        let notes = self.notes(machine);
        Seen::at(notes.path(Note::Seen), notes.path(Note::SeenBefore))
    }

    /// How fast bytes went to the machine and came from there.
    pub fn speed(&self, machine: &Machine) -> Speed {
        Speed::at(self.notes(machine).path(Note::Speed))
    }

    /// Connects to the machine's Nix daemon within `bound`, and sends it `ahead` in the same flight, if it is not on this
    /// machine.
    ///
    /// A live master is used; a dead or hung one is replaced, once.
    ///
    /// # Errors
    /// Why it cannot be reached, with the cure.
    pub fn connect(
        &self,
        machine: &Machine,
        store_dir: &StoreDir,
        bound: Duration,
        ahead: &Ahead,
    ) -> Result<Reached, ReachError> {
        // Others need not try again what is being tried here.
        let health = self.health(machine);
        let _probe = health.look().and_then(|_| health.claim(SystemTime::now()));
        let reached = self.connect_now(machine, store_dir, bound, ahead);
        match &reached {
            Ok(reached) => {
                if let Some(trusted) = reached.builder.trusted() {
                    self.note_trust(machine, trusted);
                }
                let (notes, way) = (self.notes(machine), reached.way.as_str());
                if !notes.is_young(Note::Answered) || notes.get(Note::Answered).as_deref() != Some(way) {
                    notes.put(Note::Answered, way);
                }
                self.note_success(machine);
            }
            Err(error) => self.note_failure(machine, error),
        }
        reached
    }

    fn connect_now(
        &self,
        machine: &Machine,
        store_dir: &StoreDir,
        bound: Duration,
        ahead: &Ahead,
    ) -> Result<Reached, ReachError> {
        if let Some(here) = machine.uri.here() {
            let (builder, way) = local::connect(machine, &here, &self.around, store_dir, bound)?;
            let nix_version = builder.peer().nix_version.clone();
            return Ok(Reached { builder: Store::Daemon(builder.into()), way, detour: None, nix_version });
        }
        let endpoint = endpoint(machine, &self.ssh_options)?;
        let deadline = Instant::now() + bound;
        if let Some(reached) = self.by_keeper(&endpoint, machine, store_dir, deadline, ahead) {
            return Ok(reached);
        }
        self.pool.with_master(
            &endpoint,
            deadline,
            FIRST_COMMAND,
            |master| {
                if let Some(took) = master.start_time() {
                    let duration_ms = took.as_millis() as u64;
                    tracing::info!(
                        event = "connected by ssh",
                        builder = machine.name,
                        duration_ms,
                        "connected to {} by ssh in {} s",
                        machine.name,
                        exit::seconds(took)
                    );
                }
                self.on_master(master, machine, store_dir, deadline, ahead)
            },
            |error| match error {
                ReachError::Open(error) => Some(error),
                _ => None,
            },
        )
    }

    /// By a stream that was opened in advance, if there is one. If anything is amiss with it the usual way will tell.
    fn by_keeper(
        &self,
        endpoint: &Endpoint,
        machine: &Machine,
        store_dir: &StoreDir,
        deadline: Instant,
        ahead: &Ahead,
    ) -> Option<Reached> {
        if !uses_socket(machine) || self.ready_streams() == 0 {
            return None;
        }
        // The usual way must have time enough if nothing comes of it.
        let bound = (left(deadline) / 3).min(OPEN_BOUND);
        let (master, channel) = self.pool.take_kept(endpoint, &recipe(), bound)?;
        match Builder::resume(Stream::from(channel), store_dir.clone(), bound, ahead.clone()) {
            Ok(builder) => {
                let nix_version =
                    builder.peer().nix_version.clone().or_else(|| version_in(&master.first_output()?));
                tracing::debug!(builder = machine.name, "by a stream that was opened in advance");
                let builder = Store::Daemon(builder.into());
                Some(Reached { builder, way: Way::Socket, detour: None, nix_version })
            }
            Err(error) => {
                let reason = exit::reason(&error);
                tracing::debug!(builder = machine.name, reason, "not reached by a stream opened in advance");
                None
            }
        }
    }

    /// Has streams opened in advance from now on, if one build has followed another.
    fn keep(&self, master: &Master, machine: &Machine) {
        if self.ready_streams() == 0 || !self.notes(machine).holds(Note::Answered) {
            return;
        }
        let mut program = Command::new("/proc/self/exe");
        program.arg0("nix-offload").arg("keep");
        let kept = endpoint(machine, &self.ssh_options)
            .ok()
            .map(|endpoint| self.pool.keep(&endpoint, master, program, &recipe(), self.ready_streams()));
        if let Some(Err(error)) = kept {
            tracing::warn!(event = "cannot have streams opened in advance", builder = machine.name, %error, "cannot have streams to {} opened in advance: {error}", machine.name);
        }
    }

    fn ready_streams(&self) -> u8 {
        self.pool.settings().ssh.ready_streams
    }

    /// What tells it from others.
    fn identity(&self, machine: &Machine) -> String {
        // There may be a thousand of them in a list.
        [&machine.name, "\0", machine.identity.as_deref().unwrap_or_default()].concat()
    }

    /// What is noted of it.
    fn notes(&self, machine: &Machine) -> Notes {
        Notes::at(self.pool.directory().join("answered").join(digest::short(&self.identity(machine))))
    }
}

/// Streams to a daemon's socket, the greeting said.
fn recipe() -> Recipe {
    Recipe { socket_path: DAEMON_SOCKET.to_owned(), words: Builder::first_words() }
}

/// Whether the machine's line names the program to speak to.
fn is_named(machine: &Machine) -> bool {
    machine.uri.param("remote-program").is_some_and(|words| !words.trim().is_empty())
}

/// Whether the daemon that listens there is the one to speak to.
fn uses_socket(machine: &Machine) -> bool {
    !is_named(machine) && machine.uri.param("remote-store").is_none()
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// The endpoint of ssh that a machine's line describes.
///
/// # Errors
/// If the machine is not reached by ssh, or its line makes no endpoint.
fn endpoint(machine: &Machine, ssh_options: &[String]) -> Result<Endpoint, ReachError> {
    let not_ssh = |kind: &str| Err(ReachError::NotSsh(kind.split(':').next().unwrap_or_default().to_owned()));
    match &machine.uri.scheme {
        Scheme::Other(kind) => return not_ssh(kind),
        _ if machine.uri.here().is_some() => return not_ssh(&machine.uri.destination),
        _ => {}
    }
    let mut endpoint = Endpoint::new(&machine.uri.destination)?;
    endpoint.port = machine.uri.port;
    endpoint.identity = machine.identity_file().map(PathBuf::from);
    endpoint.host_keys = machine.host_key.clone();
    endpoint.compress = machine.uri.flag("compress");
    endpoint.ssh_options = ssh_options.to_vec();
    endpoint.check()?;
    Ok(endpoint)
}

/// The version in the output of a program's `--version`, for instance `nix-daemon (Nix) 2.8.0`.
fn version_in(output: &str) -> Option<String> {
    let (_, version) = output.lines().find_map(|line| line.rsplit_once("(Nix) "))?;
    Some(plain_version(version.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn machine(uri: &str) -> Machine {
        Machine::for_uri(uri, BTreeSet::new()).unwrap()
    }

    #[test]
    fn the_version_is_found_among_other_lines() {
        assert_eq!(version_in("Welcome!\nnix-daemon (Nix) 2.26.3\n").as_deref(), Some("2.26.3"));
        assert_eq!(version_in("nix-daemon (Nix) 2.8\u{1b}[2J\n").as_deref(), Some("2.8[2J"));
        assert_eq!(version_in("bash: nix-daemon: command not found"), None);
    }

    #[test]
    fn a_machines_line_becomes_an_endpoint() {
        let mut m = machine("ssh-ng://nix@mac:2222?compress=true&ssh-key=/k");
        let e = endpoint(&m, &["-v".to_owned()]).unwrap();
        assert_eq!((e.destination.as_str(), e.port, e.compress), ("nix@mac", Some(2222), true));
        assert_eq!(e.identity, Some(PathBuf::from("/k")));
        assert_eq!(e.ssh_options, ["-v"]);
        m.identity = Some("/column".into());
        assert_eq!(endpoint(&m, &[]).unwrap().identity, Some(PathBuf::from("/column")));
        for (uri, expected) in [("auto", "auto"), ("https://x", "https"), ("ssh://localhost", "localhost")] {
            assert!(
                matches!(endpoint(&machine(uri), &[]), Err(ReachError::NotSsh(kind)) if kind == expected)
            );
        }
    }
}
