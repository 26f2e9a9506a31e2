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
const FAIR_BOUND: Duration = Duration::from_millis(500);

/// A connection, how it came about, and why a better way could not be taken.
type Found = (Store, Way, Option<String>);

/// The daemon's socket is not the way.
struct Closed {
    reason: String,
    /// Nothing was heard of the daemon. It may have been the link.
    is_silent: bool,
}

impl Reach {
    /// By the best way that is open.
    pub(super) fn on_master(
        &self,
        master: &Master,
        machine: &Machine,
        store_dir: &StoreDir,
        deadline: Instant,
        ahead: &Ahead,
    ) -> Result<Reached, ReachError> {
        let session = Session { master, machine, store_dir, deadline, ahead };
        let (builder, way, detour) = match machine.uri.scheme {
            Scheme::Ssh if is_named(machine) => by_named_store(&session)?,
            _ => self.by_best_way(&session)?,
        };
        let nix_version = builder.nix_version().or_else(|| version_in(&master.first_output()?));
        Ok(Reached { builder, way, detour, nix_version })
    }

    fn by_best_way(&self, session: &Session<'_>) -> Result<Found, ReachError> {
        let (machine, notes) = (session.machine, self.notes(session.machine));
        let serves = machine.uri.scheme == Scheme::Ssh;
        if serves && let Some(reason) = notes.get(Note::Serve) {
            match session.serve() {
                Ok(store) => return Ok((store, Way::Serve, Some(reason))),
                Err(ReachError::Open(error)) => return Err(error.into()),
                // Things have changed there; perhaps the other ways are open now.
                Err(_) => notes.remove(Note::Serve),
            }
        }
        let closed = if uses_socket(machine) {
            match self.by_socket(session, &notes)? {
                Ok(builder) => return Ok((Store::Daemon(builder.into()), Way::Socket, None)),
                Err(closed) => Some(closed),
            }
        } else {
            None
        };
        match session.daemon() {
            Ok(builder) => {
                // So it was not the link.
                if let Some(Closed { reason, is_silent: true }) = &closed {
                    notes.put(Note::Refused, reason);
                }
                Ok((builder, Way::Session, closed.map(|closed| closed.reason)))
            }
            Err(error) if serves && error.may_serve() => by_store_instead(session, &notes, error),
            Err(error) => Err(error),
        }
    }

    /// By the daemon's socket, or why it is closed to us. Other errors end the attempt.
    fn by_socket(&self, session: &Session<'_>, notes: &Notes) -> Result<Result<Builder, Closed>, ReachError> {
        let &Session { master, machine, deadline, .. } = session;
        let refused = match notes.get(Note::Refused) {
            None => self.still_refused(notes, master, deadline)?,
            refused => refused,
        };
        if let Some(reason) = refused {
            return Ok(Err(Closed { reason, is_silent: false }));
        }
        let error = match self.open_socket(session) {
            Ok(builder) => {
                self.keep(master, machine);
                return Ok(Ok(builder));
            }
            Err(ReachError::Open(error)) if error.is_master_lost() => return Err(error.into()),
            Err(error) => error,
        };
        let reason = exit::reason(&error);
        log_detour(machine, "the daemon's socket is not open to us", &reason);
        let mut is_silent = false;
        match error {
            ReachError::Open(OpenError::Refused { .. }) => notes.put(Note::Refused, &reason),
            ReachError::Daemon(BuilderError::NoAnswer { bound, .. }) => is_silent = bound >= FAIR_BOUND,
            _ => {}
        }
        Ok(Err(Closed { reason, is_silent }))
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

    fn open_socket(&self, session: &Session<'_>) -> Result<Builder, ReachError> {
        let &Session { master, machine, store_dir, deadline, ahead } = session;
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

/// By the program that the machine's line names.
fn by_named_store(session: &Session<'_>) -> Result<Found, ReachError> {
    let error = match session.serve() {
        Ok(store) => return Ok((store, Way::Serve, None)),
        Err(error) => error,
    };
    // Where sshd runs one command whatever is asked for, that may be a daemon.
    if error.is_other_protocol()
        && let Ok(builder) = session.daemon()
    {
        return Ok((builder, Way::Session, Some(exit::reason(&error))));
    }
    Err(error)
}

/// By `nix-store --serve`, where no daemon could be started for this reason.
fn by_store_instead(session: &Session<'_>, notes: &Notes, error: ReachError) -> Result<Found, ReachError> {
    match session.serve() {
        Ok(store) => {
            let reason = exit::reason(&error);
            log_detour(session.machine, "no daemon can be started for us", &reason);
            notes.put(Note::Serve, &reason);
            Ok((store, Way::Serve, Some(reason)))
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

/// Logs why the way that is tried first is not the one that is taken.
fn log_detour(machine: &Machine, event: &str, reason: &str) {
    let (builder, line) = (machine.name.as_str(), exit::first_line(reason));
    tracing::info!(event, builder, reason, "{builder}: {event}: {line}");
}
