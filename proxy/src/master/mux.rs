//! The mux conversation with a master: is it alive, sessions on it, and sockets where it listens for us.
//!
//! The only file that names tokio and openssh_mux_client. Descriptors are passed, payload is never carried.
//! That crate trusts the lengths it reads, so everything is under a time limit and no connection is used
//! again after an error.

use std::{
    borrow::Cow,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use openssh_mux_client::{
    Connection, Error, EstablishedSession, ForwardType, NonZeroByteSlice, Session, SessionStatus, Socket,
};
use tokio::{
    runtime::{Builder, Runtime},
    time::{sleep, timeout},
};

use super::{OpenError, POLL_INTERVAL};

/// What a master says of itself.
#[derive(Debug)]
pub(super) enum Health {
    /// It answers, and this is its process.
    Alive { pid: u32 },
    /// Nobody listens: no socket, or one that was left behind.
    Absent,
    /// Somebody listens but did not answer in time, or not as a master would.
    Silent,
}

/// Asks a master whether it lives. Says nothing of its link to the host.
pub(super) fn health(control: &Path, bound: Duration) -> Health {
    let Ok(runtime) = runtime() else { return Health::Silent };
    let ask = async {
        let mut connection = connect(control).await?;
        connection.send_alive_check().await
    };
    // A timer is made within the runtime, or tokio panics.
    let asked = runtime.block_on(async { timeout(bound, ask).await });
    match asked {
        Ok(Ok(pid)) => Health::Alive { pid: pid.get() },
        Ok(Err(Error::IOError(error)))
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
        {
            Health::Absent
        }
        Ok(Err(_)) | Err(_) => Health::Silent,
    }
}

/// Has the master take no more clients. It ends when the last one it has is gone.
pub(super) fn stop_listening(control: &Path, bound: Duration) -> Result<(), OpenError> {
    request(control, bound, async |connection| connection.request_stop_listening().await)
}

/// A session that runs on the far side, with what is needed to learn its end. It ends when this is dropped.
pub(super) struct OpenSession {
    runtime: Runtime,
    session: Option<EstablishedSession>,
}

impl std::fmt::Debug for OpenSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenSession").field("open", &self.session.is_some()).finish_non_exhaustive()
    }
}

impl OpenSession {
    /// Runs `command` in the far user's shell with the given stdin, stdout and stderr, which must be in
    /// blocking mode.
    pub(super) fn open(
        control: &Path,
        command: &str,
        fds: [OwnedFd; 3],
        bound: Duration,
    ) -> Result<Self, OpenError> {
        let gone = |source| OpenError::Gone { control: control.to_owned(), source };
        let command = NonZeroByteSlice::new(command.as_bytes())
            .filter(|_| !command.is_empty())
            .ok_or(OpenError::Argument { what: "command" })?;
        let no_terminal = NonZeroByteSlice::new(b"").ok_or(OpenError::Argument { what: "terminal" })?;
        let request = Session::builder().term(Cow::Borrowed(no_terminal)).cmd(Cow::Borrowed(command)).build();
        let runtime = runtime().map_err(gone)?;
        let mut answers = false;
        let open = async {
            let connection = connect(control).await?;
            answers = true;
            connection.open_new_session(&request, &fds.each_ref().map(AsRawFd::as_raw_fd)).await
        };
        let opened = runtime.block_on(async { timeout(bound, open).await });
        match opened {
            Ok(Ok(session)) => Ok(OpenSession { runtime, session: Some(session) }),
            Ok(Err(Error::RequestFailure(reason) | Error::PermissionDenied(reason))) => {
                Err(OpenError::Refused { reason: reason.into() })
            }
            Ok(Err(Error::IOError(source))) => Err(gone(source)),
            Ok(Err(error)) => Err(gone(io::Error::new(io::ErrorKind::InvalidData, error))),
            Err(_) => Err(OpenError::TimedOut { bound, master_answers: answers }),
        }
    }

    /// Waits for the command's exit status. `None` when it has none (a signal, a lost connection), when it
    /// has not ended within the bound, and when it was asked for before.
    pub(super) fn exit_status(&mut self, bound: Duration) -> Option<u32> {
        let session = self.session.take()?;
        match self.runtime.block_on(async { timeout(bound, session.wait()).await }) {
            Ok(Ok(SessionStatus::Exited { exit_value })) => exit_value,
            _ => None,
        }
    }
}

/// What the far side is to connect to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target<'a> {
    /// A port of a host.
    Host(&'a str, u16),
    /// A unix socket there.
    Path(&'a str),
}

/// Has the master listen at `local`, a path that is free, and have the far side connect to `target` for each client.
pub(super) fn listen(
    control: &Path,
    local: &Path,
    target: Target<'_>,
    bound: Duration,
) -> Result<(), OpenError> {
    let [local, remote] = ends(local, target);
    request(control, bound, async |connection| {
        connection.request_port_forward(ForwardType::Local, &local, &remote).await
    })
}

/// Ends that. The connections that were made stay.
pub(super) fn unlisten(
    control: &Path,
    local: &Path,
    target: Target<'_>,
    bound: Duration,
) -> Result<(), OpenError> {
    let [local, remote] = ends(local, target);
    request(control, bound, async |connection| {
        connection.close_port_forward(ForwardType::Local, &local, &remote).await
    })
}

fn ends<'a>(local: &'a Path, target: Target<'a>) -> [Socket<'a>; 2] {
    let at = |path| Socket::UnixSocket { path: Cow::Borrowed(path) };
    let target = match target {
        Target::Host(host, port) => Socket::TcpSocket { port: port.into(), host: Cow::Borrowed(host) },
        Target::Path(path) => at(Path::new(path)),
    };
    [at(local), target]
}

/// Makes one request on a connection of its own.
fn request(
    control: &Path,
    bound: Duration,
    ask: impl AsyncFnOnce(&mut Connection) -> Result<(), Error>,
) -> Result<(), OpenError> {
    let gone = |source| OpenError::Gone { control: control.to_owned(), source };
    let runtime = runtime().map_err(gone)?;
    let mut master_answers = false;
    let dialogue = async {
        let mut connection = connect(control).await?;
        master_answers = true;
        ask(&mut connection).await
    };
    let done = runtime.block_on(async { timeout(bound, dialogue).await });
    match done {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Error::RequestFailure(reason) | Error::PermissionDenied(reason))) => {
            Err(OpenError::Refused { reason: reason.into() })
        }
        Ok(Err(Error::IOError(source))) => Err(gone(source)),
        Ok(Err(error)) => Err(gone(io::Error::new(io::ErrorKind::InvalidData, error))),
        Err(_) => Err(OpenError::TimedOut { bound, master_answers }),
    }
}

/// A master that is slow may have more clients waiting than its queue has room for: then there is no waiting in
/// the kernel, only trying again. The caller sets the limit.
async fn connect(control: &Path) -> Result<Connection, Error> {
    loop {
        match Connection::connect(control).await {
            Err(Error::IOError(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                sleep(POLL_INTERVAL).await;
            }
            other => return other,
        }
    }
}

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_io().enable_time().build()
}
