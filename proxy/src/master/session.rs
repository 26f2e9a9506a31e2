//! The data plane of one session: sockets whose other ends the master holds.
//!
//! Plain blocking I/O. Stderr is drained while stdout is read, and its end is kept for error messages; all of it for
//! who wants to hear it.

use std::{
    io::{self, Read, Write},
    mem,
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{CloseWrite, OpenError, Stream, TimedRead, mux::OpenSession};

/// How much of stderr's end is kept, in bytes.
const STDERR_KEPT: usize = 16 * 1024;

/// How much of it waits to be heard while nobody listens, in bytes. Of more the oldest is lost.
const STDERR_UNHEARD: usize = 4 * 1024 * 1024;

/// How much of it is read before it is heard, in bytes.
const STDERR_PIECE: usize = 64 * 1024;

/// A command on the far side. It is ended when all its parts are dropped.
#[derive(Debug)]
pub struct Session {
    reader: SessionReader,
    writer: SessionWriter,
    status: SessionStatus,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionEnd {
    /// The command's exit status; none if a signal or a lost connection ended it, or if it still runs.
    pub exit: Option<u32>,
    /// The end of what it wrote to stderr, at most 16 KiB.
    pub stderr: String,
}

impl Session {
    /// Starts `command` on the master.
    pub(super) fn open(control: &Path, command: &str, bound: Duration) -> Result<Self, OpenError> {
        let gone = |source| OpenError::Gone { control: control.to_owned(), source };
        // One pair for each direction: with one for both, ssh could not pass on the end of the output alone.
        let (stdin, stdin_far) = UnixStream::pair().map_err(gone)?;
        let (stdout, stdout_far) = UnixStream::pair().map_err(gone)?;
        let (stderr, stderr_far) = UnixStream::pair().map_err(gone)?;
        stderr.set_nonblocking(true).map_err(gone)?;
        let stdin_too = stdin.try_clone().map_err(gone)?;
        let stdout_too = stdout.try_clone().map_err(gone)?;
        let fds = [stdin_far, stdout_far, stderr_far].map(OwnedFd::from);
        let session = Arc::new(Mutex::new(OpenSession::open(control, command, fds, bound)?));
        let tail =
            Arc::new(Mutex::new(Tail { socket: Some(Arc::new(stderr)), bytes: Vec::new(), unheard: None }));
        Ok(Session {
            reader: SessionReader {
                stdout,
                stdin: stdin_too,
                tail: Arc::clone(&tail),
                timeout: None,
                _session: Arc::clone(&session),
            },
            writer: SessionWriter { stdin, _session: Arc::clone(&session) },
            status: SessionStatus { session, tail, stdout: stdout_too },
        })
    }

    /// The parts: stdout, stdin, and the way to learn how it ended.
    pub fn split(self) -> (SessionReader, SessionWriter, SessionStatus) {
        (self.reader, self.writer, self.status)
    }

    /// The same with the halves in the shape that channels have too.
    pub fn into_stream(self) -> (Stream, SessionStatus) {
        (Stream { reader: Box::new(self.reader), writer: Box::new(self.writer) }, self.status)
    }
}

/// The command's stdout.
#[derive(Debug)]
pub struct SessionReader {
    stdout: UnixStream,
    /// The writer's socket, to end it with.
    stdin: UnixStream,
    tail: Arc<Mutex<Tail>>,
    timeout: Option<Duration>,
    _session: Arc<Mutex<OpenSession>>,
}

impl Read for SessionReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let mut tail = lock(&self.tail);
            let ready = {
                // A full stderr would stop the command, so it is emptied on the way.
                let mut fds = vec![PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
                fds.extend(tail.socket.as_ref().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
                match poll(&mut fds, until(deadline)) {
                    Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                    Ok(_) => [fds.first(), fds.get(1)].map(|fd| fd.and_then(PollFd::any).unwrap_or_default()),
                    Err(Errno::EINTR) => continue,
                    Err(errno) => return Err(errno.into()),
                }
            };
            if ready[1] {
                tail.drain(STDERR_PIECE);
            }
            drop(tail);
            if ready[0] {
                return (&self.stdout).read(out);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

impl TimedRead for SessionReader {
    fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.timeout = timeout;
        Ok(())
    }

    fn abandon(&mut self) {
        // It may be gone already.
        let _ = self.stdin.shutdown(Shutdown::Both);
    }
}

/// The command's stdin. Writes fail with `BrokenPipe` when the session is over.
#[derive(Debug)]
pub struct SessionWriter {
    stdin: UnixStream,
    _session: Arc<Mutex<OpenSession>>,
}

impl Write for SessionWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stdin.write(data)
    }

    /// Nothing is held back, so there is nothing to do.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl CloseWrite for SessionWriter {
    fn shutdown(&mut self) -> io::Result<()> {
        match self.stdin.shutdown(Shutdown::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            other => other,
        }
    }
}

/// The way to learn how a session ended.
#[derive(Debug)]
pub struct SessionStatus {
    session: Arc<Mutex<OpenSession>>,
    tail: Arc<Mutex<Tail>>,
    /// Only to see whether there is something to read.
    stdout: UnixStream,
}

impl SessionStatus {
    /// Has everything on stderr kept from now on, until it is heard by [`SessionStatus::listen`]. What the command
    /// wrote while nobody listened is kept up to 4 MiB.
    pub fn keep_stderr(&mut self) {
        lock(&self.tail).unheard.get_or_insert_default();
    }

    /// Passes on what the command writes to stderr, as it comes, until there is something to read from stdout or
    /// its end. False if `timeout` was over before. What comes on stderr alone does not make it longer.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    pub fn listen(&mut self, timeout: Option<Duration>, hear: &mut dyn FnMut(&[u8])) -> io::Result<bool> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let (heard, socket) = {
                let mut tail = lock(&self.tail);
                // Piece by piece, so that nothing is lost of a command that writes faster than is heard.
                tail.drain(STDERR_PIECE);
                (tail.unheard.as_mut().map(mem::take), tail.socket.clone())
            };
            if let Some(heard) = heard.filter(|heard| !heard.is_empty()) {
                hear(&heard);
            }
            let mut fds = vec![PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
            fds.extend(socket.as_ref().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
            match poll(&mut fds, until(deadline)) {
                Ok(0) => return Ok(false),
                Ok(_) if fds.first().and_then(PollFd::any).unwrap_or_default() => return Ok(true),
                // There is always something on stderr of a command that never stops to complain.
                Ok(_) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok(false),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits, at most for `bound`, for the end of stderr and the exit status. To be called once stdout has
    /// ended; the exit status is given only once.
    pub fn end(&mut self, bound: Duration) -> SessionEnd {
        let begin = Instant::now();
        // What the command has started may keep stderr open for ever, and is not to hide the exit status. But who
        // has that leaves the master, which then drops what is still under way.
        self.drain_until(begin.checked_add(bound / 2));
        let exit = lock(&self.session).exit_status(bound.saturating_sub(begin.elapsed()));
        self.drain_until(Some(begin));
        SessionEnd { exit, stderr: String::from_utf8_lossy(&lock(&self.tail).bytes).into_owned() }
    }

    /// Reads stderr to its end, or until then.
    fn drain_until(&mut self, deadline: Option<Instant>) {
        let mut tail = lock(&self.tail);
        while let Some(socket) = tail.socket.clone() {
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, until(deadline)) {
                Ok(0) => break,
                Ok(_) => tail.drain(STDERR_PIECE),
                Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
    }
}

/// The end of stderr.
#[derive(Debug)]
struct Tail {
    /// Non-blocking; none after its end.
    socket: Option<Arc<UnixStream>>,
    bytes: Vec<u8>,
    /// What somebody is still to hear; none if nobody wants to.
    unheard: Option<Vec<u8>>,
}

impl Tail {
    /// Reads what is there, about `most` bytes.
    fn drain(&mut self, most: usize) {
        let mut chunk = [0; 4096];
        let mut got = 0;
        while let (Some(socket), true) = (&self.socket, got < most) {
            match (&**socket).read(&mut chunk) {
                Ok(0) => self.socket = None,
                Ok(len) => {
                    got += len;
                    self.bytes.extend_from_slice(&chunk[..len]);
                    let surplus = self.bytes.len().saturating_sub(STDERR_KEPT);
                    self.bytes.drain(..surplus);
                    if let Some(unheard) = &mut self.unheard {
                        unheard.extend_from_slice(&chunk[..len]);
                        if unheard.len() > STDERR_UNHEARD {
                            unheard.drain(..STDERR_UNHEARD / 2);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.socket = None,
            }
        }
    }
}

/// The time left for poll: rounded up, so that it does not spin in the last millisecond.
fn until(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else { return PollTimeout::NONE };
    let left = deadline.saturating_duration_since(Instant::now()).as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
