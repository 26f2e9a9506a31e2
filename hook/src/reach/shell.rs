//! A shell on a machine: for looking at one that is connected already, and beside a build.
//!
//! To look at a machine must never start a master, wake it or ask for anything that a person would have to answer.

use super::local::{self, LocalError};
use super::notes::Note;
use super::{FIRST_COMMAND, OPEN_BOUND, Reach, ReachError, Way, endpoint, left};
use crate::plan::machine::Machine;
use crate::slots::Held;
use nix_offload_proxy::master::{Master, OpenError, SessionStatus, Stream};
use std::time::{Duration, Instant};

/// What is asked of the far account's shell, whichever that is. Scripts come on standard input.
const COMMAND: &str = "sh";

/// Shells beside builds on one master, if builds need no sessions there. sshd allows ten (`MaxSessions`), of which some
/// are left to others: each one refused costs a small process.
const BESIDE: u64 = 8;

/// A shell on a machine beside a build there.
pub struct Beside {
    /// What it says and hears.
    pub stream: Stream,
    /// The way to learn how it ended. Without it the end of what it says is its own end, and a lost connection an error.
    pub status: Option<SessionStatus>,
    /// To be kept as long as any part of the stream: with the last of them the session ends.
    pub seat: Option<Held>,
}

/// A machine on which a shell can be started without connecting to it.
#[derive(Debug)]
pub struct Open {
    /// None if it is this machine.
    master: Option<Master>,
    /// Builds reach its daemon by the socket, so that they need no sessions on the master.
    is_by_socket: bool,
}

impl Reach {
    /// What tells a machine from others, as a text.
    pub fn key(&self, machine: &Machine) -> String {
        self.identity(machine)
    }

    /// How long a connection is kept that nobody uses.
    pub fn idle(&self) -> Duration {
        self.pool.settings().ssh.idle
    }

    /// Notes that a build would have gone to the machine but for what was seen there, so that somebody goes on looking.
    pub fn note_wanted(&self, machine: &Machine) {
        self.notes(machine).put(Note::Wanted, "");
    }

    /// Whether the machine answered, or a build would have gone there, within such a time. Costs microseconds.
    pub fn was_wanted(&self, machine: &Machine, within: Duration) -> bool {
        let notes = self.notes(machine);
        let is_recent = |note| {
            // After the clock was set back it is not known when it was.
            notes.time(note).is_ok_and(|noted| noted.elapsed().map_or(true, |age| age < within))
        };
        is_recent(Note::Answered) || (notes.is_there(Note::Answered) && is_recent(Note::Wanted))
    }

    /// Whether the machine has ever been reached, as far as is remembered. Costs microseconds.
    pub fn was_reached(&self, machine: &Machine) -> bool {
        self.notes(machine).is_there(Note::Answered)
    }

    /// Whether builds reach the machine's daemon by its socket, so that they need no sessions on the master.
    pub fn is_by_socket(&self, machine: &Machine) -> bool {
        let way = self.notes(machine).read(Note::Answered).unwrap_or_default();
        [Way::Socket, Way::LocalSocket, Way::Child].iter().any(|by| way == by.as_str())
    }

    /// The machine, if its master lives or it needs none. Starts nothing and waits for nobody.
    pub fn open(&self, machine: &Machine) -> Option<Open> {
        let is_by_socket = self.is_by_socket(machine);
        if machine.uri.here().is_some() {
            return Some(Open::here());
        }
        let endpoint = endpoint(machine, &self.ssh_options).ok()?;
        Some(Open { master: Some(self.pool.live(&endpoint)?), is_by_socket })
    }

    /// A shell on the machine beside a build there. As for builds in sessions, another master is started where those of
    /// one are used up.
    ///
    /// # Errors
    /// If there is no session to be had; see [`ReachError::is_no_session`] and [`ReachError::is_crowded`].
    pub fn shell_beside(&self, machine: &Machine, bound: Duration) -> Result<Beside, ReachError> {
        if machine.uri.here().is_some() {
            return Ok(Beside { stream: Open::here().shell(bound)?, status: None, seat: None });
        }
        let is_by_socket = self.is_by_socket(machine);
        let deadline = Instant::now() + bound;
        self.pool.with_master(
            &endpoint(machine, &self.ssh_options)?,
            deadline,
            FIRST_COMMAND,
            |master| {
                let bound = left(deadline).min(OPEN_BOUND);
                if !is_by_socket {
                    let (stream, status) = master.open_session(COMMAND, bound)?.into_stream();
                    return Ok(Beside { stream, status: Some(status), seat: None });
                }
                let name = master.control_path().file_stem().unwrap_or_default().to_string_lossy();
                let Some(seat) = self.opening.take_any(&format!("beside-{name}"), BESIDE).ok().flatten()
                else {
                    return Err(OpenError::Taken.into());
                };
                let stream = master.open_guarded_session(COMMAND, bound)?.into();
                Ok(Beside { stream, status: None, seat: Some(seat) })
            },
            |error| match error {
                ReachError::Open(error) => Some(error),
                _ => None,
            },
        )
    }

    /// Whether it turned out lately that the machine has not the means for leases.
    pub fn is_without_leases(&self, machine: &Machine) -> bool {
        self.notes(machine).holds(Note::Unleased)
    }

    /// Notes that it has not.
    pub fn note_without_leases(&self, machine: &Machine, reason: &str) {
        self.notes(machine).put(Note::Unleased, reason);
    }

    /// Whether there was a lease on the machine within the last day.
    pub fn had_leases(&self, machine: &Machine) -> bool {
        self.notes(machine).holds(Note::Leased)
    }

    /// Notes that there is one, whatever was noted before.
    pub fn note_lease(&self, machine: &Machine) {
        let notes = self.notes(machine);
        notes.put(Note::Leased, "");
        notes.remove(Note::Unleased);
    }
}

impl Open {
    /// This machine.
    pub fn here() -> Self {
        Self { master: None, is_by_socket: true }
    }

    /// Starts a shell there, which takes commands on its standard input and ends with it. It is of the kind that gets on
    /// with the builds on that master.
    ///
    /// # Errors
    /// If the master gives no session for it, or none can be started here.
    pub fn shell(&self, bound: Duration) -> Result<Stream, ReachError> {
        match &self.master {
            Some(master) if self.is_by_socket => Ok(master.open_lasting_session(COMMAND, bound)?.into()),
            Some(master) => Ok(master.open_session(COMMAND, bound)?.into_stream().0),
            None => {
                let failed = |source| LocalError::Start { command: COMMAND.into(), source };
                Ok(local::start(COMMAND, "").map(|(stream, _)| stream).map_err(failed)?)
            }
        }
    }

    /// Whether a shell may stay: no build needs a session.
    pub fn is_by_socket(&self) -> bool {
        self.is_by_socket
    }

    /// Whether its master takes connections and is still the same. One that was given up ends with the last it has.
    pub fn is_current(&self) -> bool {
        self.master.as_ref().is_none_or(Master::is_in_place)
    }
}
