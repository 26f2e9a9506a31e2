//! Leases: slots of a machine that several clients share, held by a shell there as long as its connection lives.
//!
//! Nothing of ours is installed there, and nothing has to be cleared away. Where a machine has not the means for it, it
//! is said once, and builds go there without. A lease whose connection is lost while the build goes on is taken anew as
//! soon as it can be had. Must never hold a lease for more than one build.

mod script;

use crate::plan::machine::Machine;
use crate::reach::{Beside, Reach};
use nix_offload_proxy::exit;
use nix_offload_proxy::master::{CloseWrite, SessionStatus, Stream};
use script::Word;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::mem;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
/// When it is tried again after a lease was lost, or no shell could be had there. Each time that it comes to nothing doubles
/// it.
const AGAIN: Duration = Duration::from_secs(1);
/// But it is no longer than this.
const AGAIN_AT_LAST: Duration = Duration::from_secs(15);
/// A line is no longer than this, in bytes.
const LONGEST_LINE: u64 = 4096;
/// What is said of an account by which no shell answers.
const NO_SHELL: &str = "its account gives us no shell";

/// The shell that waited for a lease is gone, and the connection with it.
#[derive(Debug, Error)]
#[error("the connection was lost while waiting for a shared slot")]
pub struct LeaseError(#[source] io::Error);

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

/// What the thread that holds a lease has to say to whoever waits for it.
#[derive(Debug)]
enum News {
    /// A shell there runs, and waits for a slot.
    Waiting,
    /// It has one, until it ends.
    Held,
    /// The machine has not the means for it, and why. Nothing is tried any more.
    Without(String),
    /// What ran there was no shell. Nothing is tried any more, unless there was a slot before.
    NoShell,
    /// The shell that waited is gone. Nothing is tried any more, unless there was a slot before.
    Gone(io::Error),
    /// The shell that had a slot is gone, and another one is started.
    Lost,
    /// Builds of ours have all the shells there that we may have. One is tried for again.
    Crowded,
    /// No shell could be started, and why. It is tried again.
    NotStarted(String),
}

/// How far a lease has come, for whoever waits for it.
#[derive(Debug, Clone, Copy)]
enum Stage {
    /// No shell there has said a word since then, and it is waited for one as long as that.
    Silent { since: Instant, patience: Duration },
    /// A shell there waits.
    Waiting,
    /// It was held at the last word.
    Held,
}

/// One of a machine's shared slots, or the wait for it. Given back when dropped.
pub struct Lease {
    reach: Reach,
    machine: Machine,
    slots: u32,
    heard: Receiver<News>,
    end: Arc<End>,
}

/// Whether it has been given back. One at a time watches for it.
#[derive(Debug, Default)]
struct End(Mutex<Watched>);

#[derive(Debug, Default)]
struct Watched {
    has_come: bool,
    /// Who watches hears of it by this being dropped.
    by: Option<Sender<()>>,
}

/// The thread that holds the lease.
struct Keeper {
    reach: Reach,
    machine: Machine,
    slots: u32,
    say: Sender<News>,
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
        if let Err(error) = thread::Builder::new().spawn(move || keeper.keep()) {
            // Whoever waits for the lease finds that nobody is there to hear of.
            tracing::error!(event = "cannot start a thread", %error, "cannot start a thread: {error}");
        }
        Some(Self { reach, machine, slots, heard, end })
    }

    /// How many there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Waits for the slot. That a shell there says something has a bound, and then the wait has none, as long as the shell's
    /// connection lives. `waiting` is called once if that takes a while. A lease that is kept after the wait goes on being
    /// asked for.
    ///
    /// # Errors
    /// If the connection of a shell that waited is lost.
    pub fn wait(&mut self, waiting: &mut dyn FnMut()) -> Result<Permit, LeaseError> {
        self.wait_within([OPENING + FIRST_WORD, PATIENCE_WHERE_KNOWN], waiting)
    }

    /// With the bounds for the first word: the usual one, and how much more there is where there were leases before.
    fn wait_within(
        &mut self,
        [usual, more]: [Duration; 2],
        waiting: &mut dyn FnMut(),
    ) -> Result<Permit, LeaseError> {
        let silent = || Stage::Silent { since: Instant::now(), patience: usual };
        let mut stage = silent();
        let mut why_not_started = None;
        let mut is_told = false;
        loop {
            let bound = match stage {
                Stage::Silent { since, patience } => Some(patience.saturating_sub(since.elapsed())),
                Stage::Waiting => (!is_told).then_some(PATIENCE),
                // It may have been lost since.
                Stage::Held => Some(Duration::ZERO),
            };
            let takes_a_while = match (self.hear(bound), stage) {
                (Ok(News::Waiting), _) => {
                    stage = Stage::Waiting;
                    false
                }
                (Ok(News::Held), _) => {
                    stage = Stage::Held;
                    false
                }
                (Ok(News::Lost), _) => {
                    stage = silent();
                    false
                }
                (Ok(News::Crowded), _) => {
                    stage = silent();
                    true
                }
                (Ok(News::NotStarted(why)), _) => {
                    why_not_started = Some(why);
                    false
                }
                (Ok(News::Without(reason)), _) => return Ok(self.without(reason)),
                // Where there have been leases it is that no process can be started, and says nothing of the next build.
                (Ok(News::NoShell), _) if self.reach.had_leases(&self.machine) => {
                    return Ok(Permit::Unanswered("a shell there ended without a word".into()));
                }
                (Ok(News::NoShell), _) => return Ok(self.without(NO_SHELL.into())),
                (Ok(News::Gone(error)), _) => return Err(LeaseError(error)),
                (Err(RecvTimeoutError::Timeout), Stage::Held) => return Ok(Permit::Held),
                (Err(RecvTimeoutError::Timeout), Stage::Waiting) => true,
                (Err(RecvTimeoutError::Timeout), Stage::Silent { since, patience })
                    if patience == usual && self.reach.had_leases(&self.machine) =>
                {
                    stage = Stage::Silent { since, patience: usual + more };
                    true
                }
                (Err(RecvTimeoutError::Timeout), Stage::Silent { since, .. }) => {
                    let within = format!("within {} seconds", since.elapsed().as_secs());
                    return Ok(Permit::Unanswered(match why_not_started {
                        Some(why) => format!("no shell could be started there {within}: {why}"),
                        None => format!("no shell there has said a word {within}"),
                    }));
                }
                // A fault of ours.
                (Err(RecvTimeoutError::Disconnected), _) => {
                    return Ok(Permit::Unanswered("this client could not ask for one".into()));
                }
            };
            if takes_a_while && !mem::replace(&mut is_told, true) {
                waiting();
            }
        }
    }

    fn hear(&self, bound: Option<Duration>) -> Result<News, RecvTimeoutError> {
        match bound {
            Some(bound) => self.heard.recv_timeout(bound),
            None => self.heard.recv().map_err(RecvTimeoutError::from),
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
    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn come(&self) {
        let mut watched = self.watched();
        watched.has_come = true;
        watched.by = None;
    }

    /// Watches for it: what this gives is cut off when it comes, or when somebody else watches.
    fn watch(&self) -> Receiver<()> {
        let (by, watch) = mpsc::channel();
        let mut watched = self.watched();
        watched.by = (!watched.has_come).then_some(by);
        watch
    }

    /// Waits for it. Whether it has come.
    fn wait(&self, bound: Duration) -> bool {
        let _ = self.watch().recv_timeout(bound);
        self.watched().has_come
    }
}

impl Keeper {
    /// Takes the lease, and takes it anew when it is lost, until it is given back.
    fn keep(self) {
        let mut was_held = false;
        let mut pause = AGAIN;
        loop {
            let mut is_held = false;
            let ended = self.hold(&mut |news| {
                if matches!(news, News::Held) {
                    is_held = true;
                    self.note_held(was_held);
                }
                self.say(news);
            });
            // The shell ends when the lease is given back.
            if self.end.wait(Duration::ZERO) {
                return;
            }
            if is_held {
                (was_held, pause) = (true, AGAIN);
            }
            let news = match ended {
                News::Gone(error) if is_held => {
                    self.log_lost(&error);
                    News::Lost
                }
                other => other,
            };
            let is_over = match news {
                News::Without(_) => true,
                News::NoShell | News::Gone(_) => !was_held,
                _ => false,
            };
            if was_held {
                self.log_not_again(&news);
            }
            self.say(news);
            if is_over || self.end.wait(pause) {
                return;
            }
            pause = (pause * 2).min(AGAIN_AT_LAST);
        }
    }

    /// Whoever has the permission to go on does not listen any more.
    fn say(&self, news: News) {
        let _ = self.say.send(news);
    }

    /// Runs the script once, to its end, and passes on how it fares. Gives how it ended, or why there was no shell for it.
    fn hold(&self, pass: &mut dyn FnMut(News)) -> News {
        let shell = match self.reach.shell_beside(&self.machine, OPENING) {
            Ok(shell) => shell,
            Err(error) if error.is_crowded() => return News::Crowded,
            // Where there have been leases it has none to spare just now.
            Err(error) if error.is_no_session() && !self.reach.had_leases(&self.machine) => {
                return News::Without("there is no session for a shell".into());
            }
            Err(error) => return News::NotStarted(exit::reason(&error)),
        };
        let Beside { stream: Stream { reader, writer }, mut status, seat } = shell;
        // The session lasts as long as either half of its stream.
        let seat = Arc::new(seat);
        let (slots, over, writers) = (self.slots, self.end.watch(), Arc::clone(&seat));
        // Another thread writes, for what ends the lease must not wait for a word.
        let talking = thread::Builder::new().spawn(move || {
            talk(writer, slots, &over);
            drop(writers);
        });
        if let Err(error) = talking {
            return News::NotStarted(format!("cannot start a thread here: {error}"));
        }
        let mut reader = BufReader::new(reader);
        let mut runs = false;
        loop {
            match next_word(&mut reader) {
                Ok(Some(word)) => {
                    runs = true;
                    match word {
                        Word::Here | Word::Waiting => pass(News::Waiting),
                        Word::Held => pass(News::Held),
                        Word::None(reason) => return News::Without(reason),
                    }
                }
                Ok(None) => {}
                // Something ran there, and it was none.
                Err(error) if !runs && has_ended(&error, status.as_mut()) => return News::NoShell,
                Err(error) => return News::Gone(error),
            }
        }
    }

    /// There is a slot, perhaps after one that was lost.
    fn note_held(&self, was_held: bool) {
        self.reach.note_lease(&self.machine);
        if was_held {
            let builder = self.machine.name.as_str();
            tracing::warn!(event = "a shared slot again", builder, "a shared slot of {builder} again");
        }
    }

    fn log_lost(&self, error: &io::Error) {
        let builder = self.machine.name.as_str();
        let reason = error.to_string();
        tracing::warn!(
            event = "the shared slot was lost",
            builder,
            reason,
            "the shared slot of {builder} was lost, taking one anew: {reason}"
        );
    }

    /// Why there is none again, after one was lost.
    fn log_not_again(&self, news: &News) {
        let builder = self.machine.name.as_str();
        match news {
            News::Lost => {}
            News::Without(reason) => tracing::warn!(
                event = "no shared slot again",
                builder,
                reason,
                "no shared slot of {builder} again, the build goes on without: {reason}"
            ),
            other => tracing::debug!(builder, reason = ?other, "no shared slot again yet"),
        }
    }
}

/// Says the script, and lets the far side hear of us until it is `over`.
fn talk(mut writer: Box<dyn CloseWrite + Send>, slots: u32, over: &Receiver<()>) {
    let script = script::text(slots, QUIET, script::DIRECTORY);
    let mut said = writer.write_all(script.as_bytes()).and_then(|()| writer.flush());
    while said.is_ok() && over.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
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
