//! Leases: slots of a machine that several clients share, held by a shell there as long as its connection lives.
//!
//! Nothing of ours is installed there, and nothing has to be cleared away. Where a machine has not the means for it, it
//! is said once, and builds go there without. A lease whose connection is lost while the build goes on is taken anew as
//! soon as it can be had. Must never hold a lease for more than one build.

mod script;

use crate::plan::machine::Machine;
use crate::reach::{Beside, Reach, ReachError};
use nix_offload_proxy::exit;
use nix_offload_proxy::master::{CloseWrite, SessionStatus, Stream};
use script::Word;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a session for it may take to come about.
const OPENING: Duration = Duration::from_secs(20);
/// How long the shell may take to say its first word, with what its account runs before.
const FIRST_WORD: Duration = Duration::from_secs(15);
/// How much longer where there were leases before: a machine with too much to do is slow to start a shell, and it is then
/// that the number of builds there must not grow.
const PATIENCE_WHERE_KNOWN: Duration = Duration::from_secs(300);
/// A word that the shell over there hears, so that it knows that the link is alive.
const BEAT: Duration = Duration::from_secs(15);
/// How long it waits for such a word before it gives the slot up. Masters give a silent link up about as soon.
const QUIET: Duration = Duration::from_secs(60);
/// How long a wait is before it is worth a word to the user.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is tried again after a lease was lost, or all our shells there were taken.
const AGAIN: Duration = Duration::from_secs(1);
/// A line is no longer than this, in bytes.
const LONGEST_LINE: u64 = 4096;
/// What is said of an account by which no shell answers.
const NO_SHELL: &str = "its account gives us no shell";

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
    /// The machine gave no answer: this build goes on without until there is one, and the next one asks again. This is to be
    /// said.
    Unanswered(String),
}

/// What the thread that listens has to say. It ends without another word where a command ran that was no shell.
type Heard = Result<Word, LeaseError>;

/// One of a machine's shared slots, or the wait for it. Given back when dropped.
pub struct Lease {
    reach: Reach,
    machine: Machine,
    slots: u32,
    heard: Receiver<Heard>,
    end: Arc<End>,
}

/// Whether it has been given back.
#[derive(Debug, Default)]
struct End {
    has_come: Mutex<bool>,
    news: Condvar,
}

/// The thread that holds the lease.
struct Keeper {
    reach: Reach,
    machine: Machine,
    slots: u32,
    say: Sender<Heard>,
    end: Arc<End>,
}

impl Lease {
    /// Begins to wait for one of that many slots; nothing is waited for here. The machine should be connected to. None if
    /// it turned out a short while ago that it has not the means for it.
    pub fn begin(reach: &Reach, machine: &Machine, slots: u32) -> Option<Self> {
        if reach.is_without_leases(machine) {
            return None;
        }
        let (say, heard) = mpsc::channel();
        let end = Arc::<End>::default();
        let (reach, machine) = (reach.clone(), machine.clone());
        let keeper =
            Keeper { reach: reach.clone(), machine: machine.clone(), slots, say, end: Arc::clone(&end) };
        thread::spawn(move || keeper.keep());
        Some(Self { reach, machine, slots, heard, end })
    }

    /// How many there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Waits for the slot, as long as the connection lives and the shell there shows that it does. `waiting` is called once if
    /// that takes a while. A lease that is kept after the wait goes on being asked for.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn wait(&mut self, waiting: &mut dyn FnMut()) -> Result<Permit, LeaseError> {
        self.wait_within([OPENING + FIRST_WORD, PATIENCE_WHERE_KNOWN], waiting)
    }

    /// With the bounds for the first word: the usual one, and how much more there is where there were leases before.
    fn wait_within(
        &mut self,
        [usual, more]: [Duration; 2],
        waiting: &mut dyn FnMut(),
    ) -> Result<Permit, LeaseError> {
        let begin = Instant::now();
        let mut told = false;
        let mut heard = self.heard.recv_timeout(usual);
        if matches!(heard, Err(RecvTimeoutError::Timeout)) && self.reach.had_leases(&self.machine) {
            waiting();
            told = true;
            heard = self.heard.recv_timeout(more);
        }
        if let Err(RecvTimeoutError::Timeout) = heard {
            let seconds = begin.elapsed().as_secs();
            return Ok(Permit::Unanswered(format!(
                "no shell there has said a word within {seconds} seconds"
            )));
        }
        loop {
            match heard {
                // It may have been lost since.
                Ok(Ok(Word::Held)) => match self.heard.try_iter().last() {
                    None | Some(Ok(Word::Held)) => return Ok(Permit::Held),
                    Some(Ok(Word::None(reason))) => return Ok(self.without(reason)),
                    Some(Ok(Word::Waiting | Word::Here)) => {}
                    Some(Err(error)) => return Err(error),
                },
                Ok(Ok(Word::None(reason))) => return Ok(self.without(reason)),
                Ok(Ok(Word::Waiting | Word::Here)) => {}
                Ok(Err(LeaseError::NoShell(error))) if error.is_no_session() => {
                    return Ok(self.without("there is no session for a shell".into()));
                }
                Ok(Err(error)) => return Err(error),
                Err(RecvTimeoutError::Timeout) => {
                    waiting();
                    told = true;
                }
                // Where there have been leases it is that no process can be started, and says nothing of the next build.
                Err(RecvTimeoutError::Disconnected) if self.reach.had_leases(&self.machine) => {
                    return Ok(Permit::Unanswered("a shell there ended without a word".into()));
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(self.without(NO_SHELL.into())),
            }
            heard = match told {
                false => self.heard.recv_timeout(PATIENCE),
                true => self.heard.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
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
        self.end.come();
    }
}

impl End {
    fn come(&self) {
        *self.has_come.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.news.notify_all();
    }

    /// Waits for it. Whether it has come.
    fn wait(&self, bound: Duration) -> bool {
        let has_come = self.has_come.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.news.wait_timeout_while(has_come, bound, |has_come| !*has_come);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Keeper {
    /// Takes the lease, and takes it anew when it is lost. Until it is held for the first time somebody waits for it, who
    /// is told what goes wrong.
    fn keep(self) {
        let builder = self.machine.name.as_str();
        let mut was_held = false;
        loop {
            let mut is_held = false;
            let ended = self.hold(&mut |word| {
                if word == Word::Held {
                    is_held = true;
                    self.reach.note_lease(&self.machine);
                    if was_held {
                        tracing::warn!(
                            event = "a shared slot again",
                            builder,
                            "a shared slot of {builder} again"
                        );
                    }
                }
                // Whoever gave the lease back does not listen any more, and the end is still to be seen.
                let _ = self.say.send(Ok(word));
            });
            if self.end.wait(Duration::ZERO) {
                return;
            }
            was_held |= is_held;
            match ended {
                Ok(Some(reason)) if was_held => {
                    return tracing::warn!(
                        event = "no shared slot again",
                        builder,
                        reason,
                        "no shared slot of {builder} again, the build goes on without: {reason}"
                    );
                }
                Ok(Some(reason)) => return drop(self.say.send(Ok(Word::None(reason)))),
                Ok(None) if was_held => {
                    tracing::debug!(builder, reason = NO_SHELL, "no shared slot again yet");
                }
                Ok(None) => return,
                Err(LeaseError::NoShell(error)) if error.is_crowded() => {
                    let _ = self.say.send(Ok(Word::Waiting));
                }
                Err(error) if was_held => {
                    let reason = exit::reason(&error);
                    if is_held {
                        tracing::warn!(
                            event = "the shared slot was lost",
                            builder,
                            reason,
                            "the shared slot of {builder} was lost, taking one anew: {reason}"
                        );
                        // For whoever has not begun yet.
                        let _ = self.say.send(Ok(Word::Waiting));
                    } else {
                        tracing::debug!(builder, reason, "no shared slot again yet");
                    }
                }
                Err(error) => return drop(self.say.send(Err(error))),
            }
            if self.end.wait(AGAIN) {
                return;
            }
        }
    }

    /// Runs the script once, to its end, and passes its words on. Gives the reason if it says that the machine has not the
    /// means for it, and none if a command ran there that was no shell.
    fn hold(&self, pass: &mut dyn FnMut(Word)) -> Result<Option<String>, LeaseError> {
        let shell = self.reach.shell_beside(&self.machine, OPENING).map_err(LeaseError::NoShell)?;
        let Beside { stream: Stream { reader, writer }, mut status, seat: _seat } = shell;
        let (slots, end) = (self.slots, Arc::clone(&self.end));
        // Another thread writes, for what ends the lease must not wait for a word.
        thread::spawn(move || talk(writer, slots, &end));
        let mut reader = BufReader::new(reader);
        let (mut runs, mut none) = (false, None);
        loop {
            match next_word(&mut reader) {
                Ok(Some(word)) => {
                    runs = true;
                    if let Word::None(reason) = &word {
                        none = Some(reason.clone());
                    }
                    pass(word);
                }
                Ok(None) => {}
                // It ends by itself then.
                Err(_) if none.is_some() => return Ok(none),
                // Something ran there, and it was none.
                Err(error) if !runs && has_ended(&error, status.as_mut()) => {
                    return Ok(None);
                }
                Err(error) => return Err(LeaseError::Lost(error)),
            }
        }
    }
}

/// Says the script, and lets the far side hear of us until the lease is given back.
fn talk(mut writer: Box<dyn CloseWrite + Send>, slots: u32, end: &End) {
    let script = script::text(slots, QUIET, script::DIRECTORY);
    let mut said = writer.write_all(script.as_bytes()).and_then(|()| writer.flush());
    while said.is_ok() && !end.wait(BEAT) {
        said = writer.write_all(b"\n").and_then(|()| writer.flush());
    }
    let _ = writer.shutdown();
}

/// The next line's word; none if the line is not one of the script's, as those of an account that greets are.
fn next_word(reader: &mut impl BufRead) -> io::Result<Option<Word>> {
    let mut line = Vec::new();
    if reader.take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(script::word(&String::from_utf8_lossy(&line)))
}

/// Whether the command ended by itself. A lost connection has no exit status.
fn has_ended(error: &io::Error, status: Option<&mut SessionStatus>) -> bool {
    const STATUS_BOUND: Duration = Duration::from_secs(1);
    error.kind() == io::ErrorKind::UnexpectedEof
        && status.is_none_or(|status| status.end(STATUS_BOUND).exit.is_some())
}

#[cfg(test)]
#[path = "lease/tests/mod.rs"]
mod tests;
