//! The ways to a machine's daemon over a master, best first, and what is noted of them.
//!
//! Must never start a master, nor give one up.

use super::notes::{Note, Notes};
use super::session::Session;
use super::{
    DAEMON_SOCKET, OPEN_BOUND, Reach, ReachError, Reached, Way, is_named, left, uses_socket, version_in,
};
use crate::builder::{Ahead, Builder, BuilderError, Store};
use crate::plan::machine::{Machine, Scheme};
use crate::wire::worker::Version;
use nix_derivation::StoreDir;
use nix_offload_proxy::exit;
use nix_offload_proxy::master::{Master, OpenError, Stream};
use std::thread;
use std::time::{Duration, Instant};

/// Channels to one daemon's socket that hooks open at a time; a keeper opens three beside them. Daemons up to 2.8 let five
/// wait, and each one refused for that costs a small process.
const OPENING: u64 = 2;

/// How long to wait for a turn to open one.
const TURN_BOUND: Duration = Duration::from_millis(500);

/// How long to wait before a socket that was open to us is asked again after it refused.
const REFUSED_PAUSES: [Duration; 3] =
    [Duration::from_millis(20), Duration::from_millis(60), Duration::from_millis(180)];

/// Who gave the daemon at a socket less time than this to answer knows nothing of it.
const FAIR_BOUND: Duration = Duration::from_secs(1);

impl Reach {
    pub(super) fn on_master(
        &self,
        master: &Master,
        machine: &Machine,
        store_dir: &StoreDir,
        deadline: Instant,
        ahead: &Ahead,
    ) -> Result<Reached, ReachError> {
        let session = Session { master, machine, store_dir, deadline, ahead };
        let named = is_named(machine);
        let serves = machine.uri.scheme == Scheme::Ssh;
        let notes = self.notes(machine);
        let reached = |builder: Store, way, detour| {
            let nix_version = builder.nix_version().or_else(|| version_in(&master.first_output()?));
            Reached { builder, way, detour, nix_version }
        };
        if serves && named {
            let error = match session.serve() {
                Ok(store) => return Ok(reached(store, Way::Serve, None)),
                Err(error) => error,
            };
            // Where sshd runs one command whatever is asked for, that may be a daemon.
            if error.is_other_protocol()
                && let Ok(builder) = session.daemon()
            {
                return Ok(reached(builder, Way::Session, Some(exit::reason(&error))));
            }
            return Err(error);
        }
        if serves && let Some(reason) = notes.get(Note::Serve) {
            match session.serve() {
                Ok(store) => return Ok(reached(store, Way::Serve, Some(reason))),
                Err(ReachError::Open(error)) => return Err(error.into()),
                // Things have changed there; perhaps the other ways are open now.
                Err(_) => notes.remove(Note::Serve),
            }
        }
        let mut is_silent = false;
        let mut detour = notes.get(Note::Refused).filter(|_| uses_socket(machine));
        if uses_socket(machine) && detour.is_none() {
            detour = self.still_refused(&notes, master, deadline)?;
        }
        if uses_socket(machine) && detour.is_none() {
            match self.by_socket(master, machine, store_dir, deadline, ahead) {
                Ok(builder) => {
                    self.keep(master, machine);
                    return Ok(reached(Store::Daemon(builder.into()), Way::Socket, None));
                }
                Err(ReachError::Open(error)) if error.is_master_lost() => return Err(error.into()),
                Err(error) => {
                    let reason = exit::reason(&error);
                    log_detour(machine, "the daemon's socket is not open to us", &reason);
                    match error {
                        ReachError::Open(OpenError::Refused { .. }) => notes.put(Note::Refused, &reason),
                        ReachError::Daemon(BuilderError::NoAnswer { bound, .. }) => {
                            is_silent = bound >= FAIR_BOUND
                        }
                        _ => {}
                    }
                    detour = Some(reason);
                }
            }
        }
        let error = match session.daemon() {
            Ok(builder) => {
                // So it was not the link.
                if let Some(reason) = detour.as_ref().filter(|_| is_silent) {
                    notes.put(Note::Refused, reason);
                }
                return Ok(reached(builder, Way::Session, detour));
            }
            Err(error) if serves && error.may_serve() => error,
            Err(error) => return Err(error),
        };
        match session.serve() {
            Ok(store) => {
                let reason = exit::reason(&error);
                log_detour(machine, "no daemon can be started for us", &reason);
                notes.put(Note::Serve, &reason);
                Ok(reached(store, Way::Serve, Some(reason)))
            }
            Err(lost @ ReachError::Open(_)) => Err(lost),
            Err(slow @ ReachError::Daemon(BuilderError::NoAnswer { .. })) => {
                // A slow shell, and this one was the last of several; next time it is the first.
                notes.put(Note::Serve, &exit::reason(&error));
                Err(slow)
            }
            // What is said of a program that is there tells more than that another one is not.
            Err(other) if error.is_no_nix() && !other.is_no_nix() => Err(other),
            Err(_) => Err(error),
        }
    }

    /// Why the way to the daemon's socket is not to be taken, if it was refused some time ago and is still closed.
    fn still_refused(
        &self,
        notes: &Notes,
        master: &Master,
        deadline: Instant,
    ) -> Result<Option<String>, ReachError> {
        let Ok(reason) = notes.read(Note::Refused) else { return Ok(None) };
        let bound = left(deadline).min(OPEN_BOUND);
        match master.try_unix_socket(DAEMON_SOCKET, &Builder::first_words(), bound) {
            Ok(()) => {
                notes.remove(Note::Refused);
                Ok(None)
            }
            Err(OpenError::Refused { .. }) => {
                notes.put(Note::Refused, &reason);
                Ok(Some(reason))
            }
            Err(lost @ OpenError::Gone { .. }) => Err(lost.into()),
            // A daemon that does not answer, perhaps. If it is the link, the next way will tell; not each build is to wait
            // for that.
            Err(_) => {
                notes.put(Note::Refused, &reason);
                Ok(Some(reason))
            }
        }
    }

    fn by_socket(
        &self,
        master: &Master,
        machine: &Machine,
        store_dir: &StoreDir,
        deadline: Instant,
        ahead: &Ahead,
    ) -> Result<Builder, ReachError> {
        // Without a turn it may still go well.
        let _turn =
            self.opening.take_within(&machine.uri.destination, OPENING, TURN_BOUND.min(left(deadline)));
        let way = self.notes(machine).read(Note::Answered);
        let was_open = way.is_ok_and(|way| way == Way::Socket.as_str());
        let mut pauses = REFUSED_PAUSES.iter().take(if was_open { REFUSED_PAUSES.len() } else { 0 });
        loop {
            let channel = match master.open_unix_socket(DAEMON_SOCKET, left(deadline).min(OPEN_BOUND)) {
                Err(refused @ OpenError::Refused { .. }) => match pauses.next() {
                    Some(pause) => {
                        thread::sleep(*pause);
                        continue;
                    }
                    None => return Err(refused.into()),
                },
                other => other?,
            };
            // Half of what is left: if this daemon hangs, one of our own may still do it.
            let bound = left(deadline) / 2;
            return Builder::connect(
                Stream::from(channel),
                store_dir.clone(),
                Version::newest(),
                bound,
                ahead.clone(),
            )
            .map_err(ReachError::Daemon);
        }
    }
}

/// Logs why the way that is tried first is not the one that is taken.
fn log_detour(machine: &Machine, event: &str, reason: &str) {
    let (builder, line) = (machine.name.as_str(), exit::first_line(reason));
    tracing::info!(event, builder, reason, "{builder}: {event}: {line}");
}
