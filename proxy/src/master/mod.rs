//! Masters: finding and starting them, and opening streams on them.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use nix_offload_proxy::master::{Endpoint, Pool};
//! use std::time::Duration;
//! let pool = Pool::from_env()?;
//! let master = pool.start(&Endpoint::new("builder")?, Duration::from_secs(5), "true")?;
//! let (reader, writer) = master.open_unix_socket("/run/some.socket", Duration::from_secs(1))?.split();
//! # Ok(()) }
//! ```

mod channel;
mod clients;
mod cut_off;
mod diagnosis;
mod dialogue;
mod directory;
mod effective;
mod error;
mod everybody;
mod forward;
mod handle;
mod holder;
mod instances;
mod keeper;
mod kept;
mod liveness;
mod lock;
mod mux;
mod name;
pub(crate) mod pace;
mod parting;
mod pool;
mod process;
mod proxy_mode;
mod record;
mod roster;
mod session;
mod start;
mod stdio_forward;
mod traffic;

use std::{
    io::{self, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr},
};
use thiserror::Error;

pub use channel::{Channel, ChannelReader, ChannelWriter};
pub use diagnosis::Fault;
pub use directory::{DIRECTORY_VARIABLE, DirectoryError};
pub use error::StartError;
pub use everybody::{Place, Survivor, places, survivors};
pub use forward::Forward;
pub use handle::Master;
pub use keeper::{detach, keep};
pub use kept::Recipe;
pub use name::{Endpoint, EndpointError};
pub use pool::{Pool, SetupError};
pub use proxy_mode::ProtocolError;
pub use roster::{MasterInfo, PoolError};
pub use session::{Session, SessionEnd, SessionReader, SessionStatus, SessionWriter};
pub use traffic::Traffic;

/// How long to sleep between two looks at something that gives no notice.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// The reading half of a stream.
pub trait TimedRead: Read {
    /// Lets a read fail with `TimedOut` when nothing came for that long; no data is lost, the read may be
    /// tried again. Without a timeout (as at first) it waits for ever.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Says that nobody will read any more: a write of the other half that waits for the far side, or comes later,
    /// fails.
    fn abandon(&mut self);
}

/// The writing half of a stream.
pub trait CloseWrite: Write {
    /// Says that nothing more will be written. Reading goes on.
    ///
    /// # Errors
    /// When the stream is lost.
    fn shutdown(&mut self) -> io::Result<()>;
}

/// A byte stream to the far side, of whatever kind. Dropping both halves ends it there.
pub struct Stream {
    /// What the far side says.
    pub reader: Box<dyn TimedRead + Send>,
    /// What it is told. A long write goes on only while another thread reads.
    pub writer: Box<dyn CloseWrite + Send>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl From<Channel> for Stream {
    fn from(channel: Channel) -> Self {
        let (reader, writer) = channel.split();
        Stream { reader: Box::new(reader), writer: Box::new(writer) }
    }
}

/// Why a stream could not be opened on a master.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The master cannot be reached any more, or left in the middle.
    #[error("the SSH master at {} is gone", control.display())]
    Gone {
        /// Its control socket.
        control: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No answer within the bound.
    #[error("no answer within {} s from {}", crate::exit::seconds(*bound), if *master_answers { "the far side" } else { "the SSH master" })]
    TimedOut {
        /// The bound that was given.
        bound: Duration,
        /// The master itself did answer, so it is the link or the far side that does not.
        master_answers: bool,
    },
    /// The master or the far side does not want to: no such socket, forwarding not allowed, too many sessions.
    #[error("the far side refused: {reason}")]
    Refused {
        /// Its words.
        reason: String,
    },
    /// This master carries as many streams of the kind as it is to carry, which is nobody's fault. Another one may be
    /// asked. For callers who have such a bound.
    #[error("the SSH master carries enough streams of this kind")]
    Taken,
    /// What came is not the mux protocol.
    #[error("the SSH master does not speak the mux protocol as expected")]
    Protocol(#[from] ProtocolError),
    /// A path, host or command that cannot be sent.
    #[error("the {what} is empty, too long, or has a zero byte")]
    Argument {
        /// Which one.
        what: &'static str,
    },
}

impl OpenError {
    /// The master (or its link) is to be given up with [`Master::retire`], and another one started.
    pub fn is_master_lost(&self) -> bool {
        matches!(self, OpenError::Gone { .. } | OpenError::TimedOut { .. } | OpenError::Protocol(_))
    }
}

/// Connects to a socket of this machine. Blocking afterwards, but never while connecting: the queue of a stopped
/// listener, a master for instance, fills up, and a blocking connect would wait for ever.
///
/// # Errors
/// If nobody listens there, or not to us; `WouldBlock` if the queue was full until the deadline.
pub fn connect(socket: &Path, deadline: Instant) -> io::Result<UnixStream> {
    connect_as(SockType::Stream, socket, deadline)
}

/// The same to a socket of another type.
fn connect_as(kind: SockType, control: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let address = UnixAddr::new(control)?;
    loop {
        let socket = socket::socket(AddressFamily::Unix, kind, flags, None)?;
        match socket::connect(socket.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(Errno::EAGAIN | Errno::EINTR) if Instant::now() < deadline => {
                std::thread::sleep(POLL_INTERVAL);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}
