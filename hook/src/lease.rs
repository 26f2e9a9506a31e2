//! Leases: slots of a machine that several clients share, held by a shell there as long as its connection lives.
//!
//! Nothing of ours is installed there, and nothing has to be cleared away. Where a machine has not the means for it, it
//! is said once, and builds go there without. Must never hold a lease for more than one build.

mod script;

use crate::plan::machine::Machine;
use crate::reach::{Beside, Reach, ReachError};
use nix_offload_proxy::master::{CloseWrite, SessionStatus, Stream, TimedRead};
use script::Word;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::mem;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;
use thiserror::Error;

/// How long a session for it may take to come about.
const OPENING: Duration = Duration::from_secs(20);
/// How long the shell may take to say its first word, with what its account runs before.
const FIRST_WORD: Duration = Duration::from_secs(15);
/// A word that the shell over there hears, so that it knows that the link is alive.
const BEAT: Duration = Duration::from_secs(15);
/// Without such a word it gives the slot up after so long. Masters give a silent link up about as soon.
const QUIET: Duration = Duration::from_secs(60);
/// A wait is worth a word to the user after so long.
const PATIENCE: Duration = Duration::from_secs(1);
/// A line is no longer than this, in bytes.
const LONGEST_LINE: u64 = 4096;
/// Lines before the first word, of an account that greets.
const MOST_LINES: usize = 1000;

/// Why no lease can be waited for any longer.
#[derive(Debug, Error)]
pub enum LeaseError {
    /// The connection is lost.
    #[error("the connection was lost while waiting for a shared slot")]
    Lost(#[source] io::Error),
    /// There is no connection any more for the shell that waits for it.
    #[error("no shell could be started to wait for a shared slot")]
    NoShell(#[source] ReachError),
}

/// How waiting for a lease ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Permit {
    /// There is a slot, until the lease is dropped.
    Held,
    /// The machine has not the means for it: go on without. This is to be said.
    Without(String),
}

type Half = Box<dyn TimedRead + Send>;

/// What the shell says, and the way to learn how it ended.
type Opened = (Half, Option<SessionStatus>);

/// One of a machine's shared slots, or the wait for it. Given back when dropped.
pub struct Lease {
    reach: Reach,
    machine: Machine,
    slots: u32,
    opened: Receiver<Result<Opened, LeaseError>>,
    words: Option<Words>,
    /// Dropped to end it.
    alive: Option<Sender<()>>,
}

impl Lease {
    /// Begins to wait for one of so many slots; nothing is waited for here. The machine should be connected to. None if
    /// it turned out a short while ago that it has not the means for it.
    pub fn begin(reach: &Reach, machine: &Machine, slots: u32) -> Option<Self> {
        if reach.is_without_leases(machine) {
            return None;
        }
        let (said, opened) = mpsc::channel();
        let (alive, ended) = mpsc::channel();
        let lease = Self {
            reach: reach.clone(),
            machine: machine.clone(),
            slots,
            opened,
            words: None,
            alive: Some(alive),
        };
        let (reach, machine) = (reach.clone(), machine.clone());
        thread::spawn(move || match reach.shell_beside(&machine, OPENING) {
            Ok(Beside { stream: Stream { reader, writer }, status, seat: _seat }) => {
                hold((reader, status), writer, slots, &said, &ended);
            }
            Err(error) => drop(said.send(Err(LeaseError::NoShell(error)))),
        });
        Some(lease)
    }

    /// How many there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Waits for the slot, as long as the connection lives. `waiting` is called once if that takes a while.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn wait(&mut self, waiting: &mut dyn FnMut()) -> Result<Permit, LeaseError> {
        const NO_SHELL: &str = "its account gives us no shell";
        let (reader, status) = match self.opened.recv() {
            Ok(Ok(opened)) => opened,
            Ok(Err(LeaseError::NoShell(error))) if error.is_no_session() => {
                return Ok(self.without("there is no session for a shell".into()));
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(LeaseError::Lost(io::ErrorKind::BrokenPipe.into())),
        };
        let words = self.words.insert(Words { reader: BufReader::new(reader), line: Vec::new() });
        match words.first() {
            Ok(true) => {}
            Ok(false) => return Ok(self.without(NO_SHELL.into())),
            // Something ran there, and it was none.
            Err(error) if has_ended(&error, status) || error.kind() == io::ErrorKind::TimedOut => {
                return Ok(self.without(NO_SHELL.into()));
            }
            Err(error) => return Err(LeaseError::Lost(error)),
        }
        words.set_timeout(Some(PATIENCE))?;
        loop {
            match words.next() {
                Ok(Some(Word::Held)) => return Ok(Permit::Held),
                Ok(Some(Word::None(reason))) => return Ok(self.without(reason)),
                Ok(Some(Word::Waiting | Word::Here) | None) => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    waiting();
                    words.set_timeout(None)?;
                }
                Err(error) => return Err(LeaseError::Lost(error)),
            }
        }
    }

    /// Notes it for other builds.
    fn without(&mut self, reason: String) -> Permit {
        self.reach.note_without_leases(&self.machine, &reason);
        Permit::Without(reason)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(mut words) = self.words.take() {
            words.reader.get_mut().abandon();
        }
        // The thread has the other half, and closes the stream while we have other things to do.
        drop(self.alive.take());
    }
}

/// Starts the script, hands the reading half over, and lets the far side hear of us until the lease is dropped.
fn hold(
    (mut reader, status): Opened,
    mut writer: Box<dyn CloseWrite + Send>,
    slots: u32,
    opened: &Sender<Result<Opened, LeaseError>>,
    ended: &Receiver<()>,
) {
    let script = script::text(slots, QUIET, script::DIRECTORY);
    let begun = writer.write_all(script.as_bytes()).and_then(|()| writer.flush());
    // That it takes no commands shows when its words are read.
    drop(begun.and_then(|()| reader.set_timeout(Some(FIRST_WORD))));
    if opened.send(Ok((reader, status))).is_err() {
        return;
    }
    while ended.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
        if writer.write_all(b"\n").and_then(|()| writer.flush()).is_err() {
            return;
        }
    }
}

/// What comes from over there.
struct Words {
    reader: BufReader<Half>,
    /// As much of a line as has come.
    line: Vec<u8>,
}

impl Words {
    /// Whether the script runs. Accounts may say something before.
    fn first(&mut self) -> io::Result<bool> {
        for _ in 0..MOST_LINES {
            if let Some(word) = self.next()? {
                return Ok(word == Word::Here);
            }
        }
        Ok(false)
    }

    /// The next line's word; none if the line is not one of the script's.
    fn next(&mut self) -> io::Result<Option<Word>> {
        let room = LONGEST_LINE.saturating_sub(self.line.len() as u64);
        if self.reader.by_ref().take(room).read_until(b'\n', &mut self.line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = mem::take(&mut self.line);
        Ok(script::word(&String::from_utf8_lossy(&line)))
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<(), LeaseError> {
        self.reader.get_mut().set_timeout(timeout).map_err(LeaseError::Lost)
    }
}

/// Whether the command ended by itself. A lost connection has no exit status.
fn has_ended(error: &io::Error, status: Option<SessionStatus>) -> bool {
    const STATUS_BOUND: Duration = Duration::from_secs(1);
    error.kind() == io::ErrorKind::UnexpectedEof
        && status.is_none_or(|mut status| status.end(STATUS_BOUND).exit.is_some())
}
