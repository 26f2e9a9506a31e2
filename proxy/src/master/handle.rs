//! One master: opening streams on it, leaving it alone for a while, giving it up.

use std::{
    fs, io,
    os::{
        fd::BorrowedFd,
        unix::{fs::MetadataExt, net::UnixStream},
    },
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use super::{
    Channel, Forward, OpenError, Session, channel, forward,
    liveness::{self, Liveness},
    lock::lock,
    process,
    record::Record,
    start::{self, Files},
};

/// How long retiring waits for the lock: who holds it is about to replace the master anyway.
const RETIRE_BOUND: Duration = Duration::from_millis(500);
/// How long a master is asked last whose sessions were used up.
const FULL_FOR: Duration = Duration::from_secs(5);
/// The same of one whose far side did not answer in time: within this time ssh itself notices that the link is cut.
const SILENT_FOR: Duration = Duration::from_secs(40);
/// How long a master that is given up may take to end when asked to.
const END_BOUND: Duration = Duration::from_millis(200);

/// A master that was alive when this value was made.
#[derive(Debug, Clone)]
pub struct Master {
    files: Files,
    destination: String,
    socket_identity: Option<SocketIdentity>,
    /// Somebody opened it by hand; it is not ours to end.
    foreign: bool,
    took: Option<Duration>,
}

/// Why a master is to be left alone for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Avoid {
    /// sshd has no more sessions to give on it.
    Full,
    /// It did not answer in time, or not the far side of its link.
    Silent,
}

impl Avoid {
    fn word(self) -> &'static str {
        match self {
            Avoid::Full => "full",
            Avoid::Silent => "silent",
        }
    }
}

impl Master {
    pub(super) fn of(files: Files, destination: String) -> Self {
        let socket_identity = SocketIdentity::of(&files.socket);
        Master { files, destination, socket_identity, foreign: false, took: None }
    }

    /// One that somebody opened by hand.
    pub(super) fn foreign(files: Files, destination: String) -> Self {
        Master { foreign: true, ..Master::of(files, destination) }
    }

    /// One that has just been started.
    pub(super) fn started(self, took: Duration) -> Self {
        Master { took: Some(took), ..self }
    }

    /// How long it took to start it. None if it was there.
    pub fn start_time(&self) -> Option<Duration> {
        self.took
    }

    /// When it was started, if that was written down: not for one that somebody opened by hand.
    pub fn started_at(&self) -> Option<SystemTime> {
        Record::read(&self.files).map(|record| record.started_at)
    }

    /// What the first command wrote to stdout (its first 4 KiB, without blanks around it), if it succeeded.
    pub fn first_output(&self) -> Option<String> {
        start::first_output(&self.files)
    }

    /// Opens a stream to a unix socket on the far side: no shell, no process, and it is closed there as soon
    /// as it is dropped here. Does not count against sshd's MaxSessions.
    ///
    /// A refusal costs: OpenSSH bears it only while the connection is held, so a small process holds it (and
    /// the master never gets idle) until the master ends. Whoever is refused should not ask again soon.
    ///
    /// # Errors
    /// `Refused` when there is no such socket, nobody listens, or sshd does not allow it; see [`OpenError`].
    pub fn open_unix_socket(&self, path: &str, bound: Duration) -> Result<Channel, OpenError> {
        channel::open(&self.files.socket, path, bound)
    }

    /// Has the far side connect to a host (`ssh -W`), and the master carry `input` there and what comes back
    /// to `output`: nothing passes through this process, which only keeps the value as long as the stream is to
    /// last. Does not count against sshd's MaxSessions.
    ///
    /// # Errors
    /// `Refused` when the far side cannot connect there, or sshd does not allow it; see [`OpenError`].
    pub fn carry(
        &self,
        host: &str,
        port: u16,
        input: BorrowedFd<'_>,
        output: BorrowedFd<'_>,
        bound: Duration,
    ) -> Result<Forward, OpenError> {
        Forward::open(&self.files.socket, host, port, [input, output], bound)
    }

    /// Has the far side connect to a host whose server speaks first, as sshd does, and returns a socket that
    /// is connected to it and needs no process of ours any more.
    ///
    /// # Errors
    /// As [`Master::carry`]; the reason of a refusal is not known.
    pub fn connect_to(&self, host: &str, port: u16, bound: Duration) -> Result<UnixStream, OpenError> {
        forward::socket(&self.files.socket, host, port, bound)
    }

    /// Runs a command in the far user's shell.
    ///
    /// # Errors
    /// `Refused` when sshd has no session to give; see [`OpenError`]. A command that does not exist is no
    /// error here: the shell on the far side says so, and exits with 127.
    pub fn open_session(&self, command: &str, bound: Duration) -> Result<Session, OpenError> {
        Session::open(&self.files.socket, command, bound)
    }

    /// The same for a command that stays: what it writes to stderr is lost, its exit status is not told, and it lives
    /// beside channels that [`Master::open_unix_socket`] opened. While there is a session of the other kind, the end of a
    /// killed process's channel may end the connection (see `parting`).
    ///
    /// # Errors
    /// `Refused` when sshd has no session to give, which costs as much as for a socket; see [`OpenError`].
    pub fn open_lasting_session(&self, command: &str, bound: Duration) -> Result<Channel, OpenError> {
        channel::open_session(&self.files.socket, command, bound, false)
    }

    /// The same for a process that may be killed: a small one closes the channel in its place.
    ///
    /// # Errors
    /// As [`Master::open_lasting_session`].
    pub fn open_guarded_session(&self, command: &str, bound: Duration) -> Result<Channel, OpenError> {
        channel::open_session(&self.files.socket, command, bound, true)
    }

    /// Gives the master up, because it is dead, hung, or its link is: it is killed if it is still the process
    /// that was started, and its socket removed, so that the next start makes a new one. Does nothing to
    /// a master that has replaced it meanwhile. True when this one is gone, so that it cannot do any more what it
    /// was asked to do. One that was opened by hand is only left alone for a while.
    pub fn retire(&self) -> bool {
        if self.foreign {
            self.avoid(Avoid::Silent);
            return false;
        }
        let is_there = || {
            let now = SocketIdentity::of(&self.files.socket);
            now.is_some() && now == self.socket_identity
        };
        let Ok(Some(_lock)) = lock(&self.files.lock, Instant::now() + RETIRE_BOUND) else {
            return !is_there();
        };
        if !is_there() {
            return true;
        }
        tracing::info!(
            event = "SSH master retired",
            destination = self.destination,
            "SSH master to {} retired",
            self.destination
        );
        let gone = kill_recorded(&self.files);
        let _ = remove(&self.files.socket);
        gone
    }

    /// Whether its control socket is where it was, and still its own: neither given up nor replaced.
    pub fn is_in_place(&self) -> bool {
        self.socket_identity.is_some() && SocketIdentity::of(&self.files.socket) == self.socket_identity
    }

    /// Whether its process does nothing, though somebody waits for it. One that is only slow does not hang.
    pub fn hangs(&self) -> bool {
        !matches!(liveness::ask(&self.files.socket, Duration::ZERO), Liveness::Alive { .. })
    }

    /// Lets others ask it last for a while.
    pub(super) fn avoid(&self, why: Avoid) {
        tracing::debug!(
            destination = self.destination,
            reason = why.word(),
            "SSH master left alone for a while"
        );
        // If it cannot be noted, the others find out for themselves.
        let _ = start::write_whole(&self.files.avoid, why.word());
    }

    /// The destination as it was given.
    pub fn destination(&self) -> &str {
        &self.destination
    }

    /// The control socket.
    pub fn control_path(&self) -> &Path {
        &self.files.socket
    }

    /// What ssh has to say: its stderr while it connects, its log afterwards.
    pub fn log_path(&self) -> &Path {
        &self.files.log
    }
}

/// What tells one control socket from its successor of the same name: inode numbers are used again at once, so there is the
/// time of the last change, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SocketIdentity {
    inode: u64,
    /// Seconds since 1970.
    changed: i64,
    /// Nanoseconds besides.
    changed_nanos: i64,
}

impl SocketIdentity {
    /// None if there is no socket.
    pub(super) fn of(socket: &Path) -> Option<Self> {
        let metadata = fs::symlink_metadata(socket).ok()?;
        Some(Self { inode: metadata.ino(), changed: metadata.ctime(), changed_nanos: metadata.ctime_nsec() })
    }
}

/// Whether a master is to be left alone just now.
pub(super) fn avoided(files: &Files) -> Option<Avoid> {
    let noted = fs::metadata(&files.avoid).and_then(|metadata| metadata.modified()).ok()?;
    let age = SystemTime::now().duration_since(noted).unwrap_or_default();
    if age >= SILENT_FOR {
        return None;
    }
    match fs::read_to_string(&files.avoid).ok()? {
        word if word != Avoid::Full.word() => Some(Avoid::Silent),
        _ => (age < FULL_FOR).then_some(Avoid::Full),
    }
}

/// Ends the process of the record, if it still is that process. True when it is gone.
pub(super) fn kill_recorded(files: &Files) -> bool {
    let Some((pid, Some(born))) = Record::read(files).and_then(|record| record.process) else { return false };
    // It had its chance to answer.
    process::end(pid, &born, END_BOUND);
    process::birth(pid) != Some(born)
}

pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
