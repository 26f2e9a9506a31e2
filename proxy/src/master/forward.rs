//! Connections from the far side to other hosts.
//!
//! A stream hands our own descriptors to the master, which carries the bytes; nothing is copied here, and all
//! that is left to do is to wait. A socket is for those who want a descriptor and nobody who waits: the master
//! listens for us in the runtime directory for a moment.

use std::{
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv},
};

use super::{
    Master, OpenError, POLL_INTERVAL, connect,
    liveness::{self, Liveness},
    mux, process,
    proxy_mode::{self, MAX_MUX_MESSAGE},
    record::Record,
    stdio_forward::{self, MAX_HOST, Reply},
};
use crate::passing::send_descriptor;

/// The extension of the sockets on which a master listens for a moment.
const EXTENSION: &str = "fwd";

/// How long a process may be seen that has closed its descriptors because it dies.
const DYING: Duration = Duration::from_millis(30);
/// How long a master may take to show that it is alive when a stream has ended.
const ANSWER_BOUND: Duration = Duration::from_secs(5);

/// A stream that the master carries. It ends, both ways, when this is dropped.
#[derive(Debug)]
pub struct Forward {
    control: UnixStream,
    master: PathBuf,
    /// The master's process and when it began, if that is written down.
    process: Option<(u32, String)>,
}

impl Forward {
    /// Has the far side connect to a host, and the master carry `input` there and what comes back to `output`.
    /// They may be closed here afterwards.
    pub(super) fn open(
        control: &Path,
        host: &str,
        port: u16,
        fds: [BorrowedFd<'_>; 2],
        bound: Duration,
    ) -> Result<Self, OpenError> {
        check(host, "host")?;
        let deadline = Instant::now() + bound;
        let gone = |source| OpenError::Gone { control: control.to_owned(), source };
        let mut socket = connect(control, deadline).map_err(gone)?;
        socket.set_write_timeout(Some(bound)).map_err(gone)?;
        socket.write_all(&stdio_forward::request(host, port)).map_err(gone)?;
        for fd in fds {
            send_descriptor(&socket, fd).map_err(gone)?;
        }
        let mut master_answers = false;
        loop {
            let body = match read_message(&mut socket, deadline) {
                Ok(body) => body,
                Err(error) if is_late(&error) => return Err(OpenError::TimedOut { bound, master_answers }),
                Err(error) => return Err(gone(error)),
            };
            match stdio_forward::reply(&body)? {
                Reply::Hello => master_answers = true,
                Reply::Opened => break,
                Reply::Refused { reason } => return Err(OpenError::Refused { reason }),
            }
        }
        socket.set_read_timeout(None).map_err(gone)?;
        let recorded = Record::read_at(&control.with_extension("json")).and_then(|record| record.process);
        let process = recorded.and_then(|(pid, born)| Some((pid, born?)));
        Ok(Forward { control: socket, master: control.to_owned(), process })
    }

    /// Waits until both directions have ended.
    ///
    /// # Errors
    /// `Gone` when it is the master that ended.
    pub fn wait(mut self) -> Result<(), OpenError> {
        let gone = |source| OpenError::Gone { control: self.master.clone(), source };
        // The master says nothing more, and closes the connection when the stream is over. When it dies the
        // kernel closes its descriptors in any order, so that one can still connect to it: it must answer.
        match self.control.read(&mut [0; 64]) {
            Ok(0) if self.master_is_there() => Ok(()),
            Ok(0) => Err(gone(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => Err(OpenError::Protocol(proxy_mode::ProtocolError::Unexpected {
                number: 0,
                expected: "the end of the stream",
            })),
            Err(error) => Err(gone(error)),
        }
    }
}

impl Forward {
    /// Whether the master that carried the stream has outlived it. Another one may listen in its place by now.
    fn master_is_there(&self) -> bool {
        let Some((pid, born)) = &self.process else {
            return matches!(liveness::ask(&self.master, ANSWER_BOUND), Liveness::Alive { .. });
        };
        // The kernel closes the descriptors of a process that dies a moment before the process is gone.
        let deadline = Instant::now() + DYING;
        while process::birth(*pid).as_ref() == Some(born) {
            if Instant::now() >= deadline {
                return true;
            }
            thread::sleep(POLL_INTERVAL);
        }
        false
    }
}

/// Has the far side connect to a host whose server speaks first, and returns a socket that needs nobody else.
/// The end of either direction is passed on.
///
/// A forward of the master's (`ssh -L`), taken back as soon as the connection stands. It does not say when the far
/// side cannot connect: it closes the connection, which is why the server's first byte is waited for.
pub(super) fn socket(
    control: &Path,
    host: &str,
    port: u16,
    bound: Duration,
) -> Result<UnixStream, OpenError> {
    check(host, "host")?;
    by_listener(control, mux::Target::Host(host, port), &[], bound)
}

impl Master {
    /// Sees whether somebody at a unix socket on the far side answers these words. Other than that of
    /// [`Master::open_unix_socket`] a refusal costs nothing, but the stream is of no other use: its far side would not be
    /// closed with it.
    ///
    /// # Errors
    /// `Refused` when there is no such socket, nobody listens, or sshd does not allow it; see [`OpenError`].
    pub fn try_unix_socket(&self, path: &str, words: &[u8], bound: Duration) -> Result<(), OpenError> {
        check(path, "socket path")?;
        by_listener(self.control_path(), mux::Target::Path(path), words, bound).map(drop)
    }
}

fn by_listener(
    control: &Path,
    target: mux::Target<'_>,
    words: &[u8],
    bound: Duration,
) -> Result<UnixStream, OpenError> {
    let deadline = Instant::now() + bound;
    let local = control.with_extension(format!("{:012x}.{EXTENSION}", random() >> 16));
    mux::listen(control, &local, target, bound)?;
    let result = first_byte(control, &local, words, deadline, bound);
    // If this fails the master listens on, at a path that nobody knows.
    let _ = mux::unlisten(control, &local, target, bound);
    let _ = fs::remove_file(&local);
    result
}

/// Removes the sockets on which an earlier master at `control` listened, for processes that were killed meanwhile.
pub(super) fn remove_all(control: &Path) {
    let entries = control.parent().and_then(|directory| fs::read_dir(directory).ok());
    for path in entries.into_iter().flatten().flatten().map(|entry| entry.path()) {
        if belongs(&path, control) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether that file is a socket on which the master `control` listens for a moment.
pub(super) fn belongs(file: &Path, control: &Path) -> bool {
    let prefix = control.file_stem().map(|stem| format!("{}.", stem.to_string_lossy()));
    file.extension().is_some_and(|extension| extension == EXTENSION)
        && file
            .file_name()
            .zip(prefix)
            .is_some_and(|(name, prefix)| name.to_string_lossy().starts_with(&prefix))
}

fn first_byte(
    control: &Path,
    local: &Path,
    words: &[u8],
    deadline: Instant,
    bound: Duration,
) -> Result<UnixStream, OpenError> {
    let gone = |source| OpenError::Gone { control: control.to_owned(), source };
    let mut socket = connect(local, deadline).map_err(gone)?;
    // If they are not taken, what is read says why.
    let _ = socket.write_all(words);
    // The end comes from the far side, or because the master ended.
    let refused = || match liveness::ask(control, ANSWER_BOUND) {
        Liveness::Alive { .. } => {
            OpenError::Refused { reason: "it could not connect, or nobody spoke there".into() }
        }
        Liveness::Absent | Liveness::Hung => gone(io::ErrorKind::UnexpectedEof.into()),
    };
    loop {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, until(deadline)) {
            Ok(0) => return Err(OpenError::TimedOut { bound, master_answers: true }),
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(gone(errno.into())),
        }
    }
    match recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK) {
        Ok(0) | Err(Errno::ECONNRESET) => Err(refused()),
        Ok(_) => Ok(socket),
        Err(errno) => Err(gone(errno.into())),
    }
}

fn check(name: &str, what: &'static str) -> Result<(), OpenError> {
    if name.is_empty() || name.len() > MAX_HOST || name.contains('\0') {
        return Err(OpenError::Argument { what });
    }
    Ok(())
}

/// Reads one message of the mux protocol.
fn read_message(socket: &mut UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut prefix = [0; 4];
    read_exact(socket, &mut prefix, deadline)?;
    let len = proxy_mode::length(&prefix, "message", MAX_MUX_MESSAGE)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let mut body = vec![0; len.unwrap_or_default()];
    read_exact(socket, &mut body, deadline)?;
    Ok(body)
}

fn read_exact(socket: &mut UnixStream, mut out: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !out.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(out) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => out = &mut out[len..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn until(deadline: Instant) -> PollTimeout {
    let left = deadline.saturating_duration_since(Instant::now()).as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

/// Each `RandomState` has keys of its own.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_is_known_by_its_master() {
        let control = Path::new("/r/abc.sock");
        assert!(belongs(Path::new("/r/abc.0123456789ab.fwd"), control));
        for other in ["/r/abcd.0123456789ab.fwd", "/r/abc.sock", "/r/abc.log"] {
            assert!(!belongs(Path::new(other), control), "{other}");
        }
    }
}
