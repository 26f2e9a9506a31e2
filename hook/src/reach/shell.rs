//! A shell on a machine that is connected already, for looking at it.
//!
//! Must never start a master, wake a machine or ask for anything that a person would have to answer.

use super::{Reach, Way, endpoint, local};
use crate::plan::machine::Machine;
use nix_offload_proxy::master::{Master, OpenError, Stream};
use std::fs;
use std::io;
use std::time::Duration;

/// What is asked of the far account's shell, whichever that is. Scripts come on standard input.
const COMMAND: &str = "sh";

/// A machine on which a shell can be started without connecting to it.
#[derive(Debug)]
pub struct Open {
    /// None if it is this machine.
    master: Option<Master>,
    /// Builds reach its daemon by the socket, so that they need no sessions on the master.
    is_by_socket: bool,
}

impl Reach {
    /// The name by which files of the runtime directory know a machine: some hexadecimal digits.
    pub fn key(&self, machine: &Machine) -> String {
        let stamp = self.stamp(machine);
        stamp.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Whether the machine has ever been reached, as far as is remembered. Costs microseconds.
    pub fn was_reached(&self, machine: &Machine) -> bool {
        self.stamp(machine).exists()
    }

    /// Whether builds reach the machine's daemon by its socket, so that they need no sessions on the master.
    pub fn is_by_socket(&self, machine: &Machine) -> bool {
        let way = fs::read_to_string(self.stamp(machine)).unwrap_or_default();
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
    pub fn shell(&self, bound: Duration) -> Result<Stream, OpenError> {
        match &self.master {
            Some(master) if self.is_by_socket => Ok(master.open_lasting_session(COMMAND, bound)?.into()),
            Some(master) => Ok(master.open_session(COMMAND, bound)?.into_stream().0),
            None => {
                let gone = |source: io::Error| OpenError::Gone { control: "/bin/sh".into(), source };
                local::start(COMMAND, "").map(|(stream, _)| stream).map_err(gone)
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
