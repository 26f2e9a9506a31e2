//! Talking to the shell of one machine: starting it, asking it again and again, and what its silence means.
//!
//! Must never wait without a bound, nor ask a machine again that did not answer: that is for whoever called.

use super::samples::Entry;
use crate::reach::{Open, ReachError};
use crate::sample::{self, Progress};
use nix_offload_proxy::exit;
use nix_offload_proxy::master::Stream;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant, SystemTime};

/// How long the master may take to give a session.
const SESSION_BOUND: Duration = Duration::from_secs(5);
/// How long a shell may take to start, with what its account runs first.
const START_BOUND: Duration = Duration::from_secs(10);
/// How long it may take to answer. A machine that is too busy for that has no sample.
const ANSWER_BOUND: Duration = Duration::from_secs(10);
/// How long file systems may take to say what is left on them.
const DISK_BOUND: Duration = Duration::from_secs(3);
/// How many round trips there are of which the shortest counts: what makes one longer is not the link.
const ROUND_TRIPS: usize = 8;

/// Why there is no sample.
#[derive(Debug)]
pub(super) enum Silence {
    /// The master gives no session now.
    NoSession(ReachError),
    /// The same in the way that costs a small process for the rest of the master's life.
    NoLastingSession(ReachError),
    /// Something else than a shell answered, or nothing did.
    NoShell,
    /// The shell is gone, or says nothing more.
    Lost,
}

impl Silence {
    /// For the log.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::NoSession(error) | Self::NoLastingSession(error) => exit::reason(error),
            Self::NoShell => "no shell answers".into(),
            Self::Lost => "the shell is gone or does not answer".into(),
        }
    }
}

/// A shell that answers.
pub(super) struct Conversation {
    stream: Stream,
    heard: Vec<u8>,
    round_trips: VecDeque<Duration>,
}

/// An answer.
pub(super) struct Answer {
    pub(super) entry: Entry,
    /// A file system did not say what is left on it. The shell waits for it, and will not answer again.
    pub(super) hangs: bool,
}

impl Conversation {
    /// Starts a shell.
    pub(super) fn begin(open: &Open) -> Result<Self, Silence> {
        let stream = open.shell(SESSION_BOUND).map_err(|error| match error {
            error if error.is_no_session() && open.is_by_socket() => Silence::NoLastingSession(error),
            error => Silence::NoSession(error),
        })?;
        let mut begun = Self { stream, heard: Vec::new(), round_trips: VecDeque::new() };
        let is_ready = |heard: &[u8]| sample::has_line(heard, sample::READY);
        match begun.ask(sample::SCRIPT, START_BOUND, is_ready) {
            Ok(true) => Ok(begun),
            // Where the link or its master is dead, the shell is not to blame.
            _ if !open.is_current() => Err(Silence::Lost),
            _ => Err(Silence::NoShell),
        }
    }

    /// Asks the machine how it is. `store_dir` is left out where its file system is known to hang.
    pub(super) fn sample(&mut self, store_dir: Option<&str>) -> Result<Answer, Silence> {
        let clock = Instant::now();
        let is_there = |heard: &[u8]| sample::has_line(heard, sample::PONG);
        if !self.ask(sample::PING, ANSWER_BOUND, is_there)? {
            return Err(Silence::Lost);
        }
        self.round_trips.push_back(clock.elapsed());
        if self.round_trips.len() > ROUND_TRIPS {
            self.round_trips.pop_front();
        }
        let is_loaded = |heard: &[u8]| sample::progress(heard) != Progress::Begun;
        if !self.ask(&sample::request(store_dir), ANSWER_BOUND, is_loaded)? {
            return Err(Silence::Lost);
        }
        let at = SystemTime::now();
        let is_complete = |heard: &[u8]| sample::progress(heard) == Progress::Complete;
        let is_whole = self.listen(DISK_BOUND, is_complete)?;
        let round_trip = self.round_trips.iter().min().map(Duration::as_secs_f64);
        let entry = Entry { sample: sample::parse(&self.heard, at), round_trip };
        Ok(Answer { entry, hangs: !is_whole })
    }

    /// Says something, and hears the answer.
    fn ask(
        &mut self,
        words: &str,
        bound: Duration,
        is_enough: impl Fn(&[u8]) -> bool,
    ) -> Result<bool, Silence> {
        self.heard.clear();
        self.stream.writer.write_all(words.as_bytes()).map_err(|_| Silence::Lost)?;
        self.listen(bound, is_enough)
    }

    /// Listens until there is enough. False if it takes too long.
    fn listen(&mut self, bound: Duration, is_enough: impl Fn(&[u8]) -> bool) -> Result<bool, Silence> {
        let deadline = Instant::now() + bound;
        let mut piece = [0; 4096];
        while !is_enough(&self.heard) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.stream.reader.set_timeout(Some(left)).map_err(|_| Silence::Lost)?;
            match self.stream.reader.read(&mut piece) {
                Ok(0) => return Err(Silence::Lost),
                Ok(length) => self.heard.extend_from_slice(&piece[..length]),
                Err(error) if is_only_late(&error) => {}
                Err(_) => return Err(Silence::Lost),
            }
            if self.heard.len() > sample::MOST_BYTES {
                return Err(Silence::Lost);
            }
        }
        Ok(true)
    }
}

fn is_only_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl Drop for Conversation {
    fn drop(&mut self) {
        // The shell sees the end of its input and ends.
        let _ = self.stream.writer.shutdown();
        self.stream.reader.abandon();
    }
}
