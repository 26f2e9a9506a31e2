//! The words between a client and a master until a channel is confirmed, and the bytes that come behind them.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::Instant,
};

use super::{
    OpenError,
    proxy_mode::{self as codec, MuxMessage, Packet, ProtocolError},
};

/// What the peer may send before we have consumed anything, in bytes. 8 MiB fill 145 MB/s at a round trip of
/// 50 ms, and 64 MiB were far slower.
pub(super) const WINDOW: u32 = 8 * 1024 * 1024;
/// What one read of the socket may bring, in bytes.
const BUFFER: usize = 256 * 1024;

/// What the far side says when it agrees.
#[derive(Debug, Clone, Copy)]
pub(super) struct Confirmed {
    /// Its number of the channel.
    pub(super) channel: u32,
    /// What we may send, in bytes.
    pub(super) window: u32,
    /// The largest packet it takes, in bytes.
    pub(super) max_packet: u32,
}

/// How the dialogue can fail.
#[derive(Debug)]
pub(super) enum Broken {
    Lost(io::Error),
    Late { master_answers: bool },
    Refused { reason: String },
    Protocol(ProtocolError),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Broken::Lost(error)
    }
}

impl From<ProtocolError> for Broken {
    fn from(error: ProtocolError) -> Self {
        Broken::Protocol(error)
    }
}

/// One opening: what was heard so far.
#[derive(Debug, Default)]
pub(super) struct Dialogue {
    incoming: Incoming,
    proxying: bool,
}

impl Dialogue {
    /// Everything the client has to say to open a channel to a unix socket on the far side.
    pub(super) fn opening(socket_path: &str) -> Result<Vec<u8>, OpenError> {
        if socket_path.is_empty() || socket_path.contains('\0') || socket_path.len() > codec::MAX_MUX_MESSAGE
        {
            return Err(OpenError::Argument { what: "socket path" });
        }
        Ok(codec::opening(Some(socket_path), WINDOW))
    }

    /// The same for a session.
    pub(super) fn opening_session() -> Vec<u8> {
        codec::opening(None, WINDOW)
    }

    /// Says all at once, for the master takes its messages one by one whatever their packing, and hears the answers.
    pub(super) fn run(
        &mut self,
        socket: &mut UnixStream,
        opening: &[u8],
        deadline: Instant,
    ) -> Result<Confirmed, Broken> {
        socket.write_all(opening)?;
        loop {
            if let Some(confirmed) = self.advance()? {
                return Ok(confirmed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Broken::Late { master_answers: self.proxying });
            }
            socket.set_read_timeout(Some(left))?;
            match self.incoming.fill(socket) {
                Err(error) if is_timeout(&error) => {}
                other => other?,
            }
        }
    }

    /// Adds what one read brings.
    pub(super) fn fill(&mut self, socket: &mut impl Read) -> io::Result<()> {
        self.incoming.fill(socket)
    }

    /// Takes the messages that are complete; the confirmation is the last one taken.
    pub(super) fn advance(&mut self) -> Result<Option<Confirmed>, Broken> {
        loop {
            let limit = if self.proxying { codec::MAX_PACKET } else { codec::MAX_MUX_MESSAGE };
            let bytes = self.incoming.bytes();
            let Some(len) = codec::length(bytes, "message", limit)? else { return Ok(None) };
            let Some(body) = bytes.get(4..4 + len) else { return Ok(None) };
            let mut confirmation = None;
            if self.proxying {
                match codec::packet(body)? {
                    Packet::Confirmation { channel, window, max_packet } => {
                        confirmation = Some(Confirmed { channel, window, max_packet });
                    }
                    Packet::OpenFailure { reason, .. } => return Err(Broken::Refused { reason }),
                    _ => {
                        let number = body.get(1).copied().unwrap_or_default().into();
                        let expected = "the channel's confirmation";
                        return Err(ProtocolError::Unexpected { number, expected }.into());
                    }
                }
            } else {
                match codec::mux_message(body)? {
                    MuxMessage::Hello => {}
                    MuxMessage::Proxy => self.proxying = true,
                    MuxMessage::Refused { reason } => return Err(Broken::Refused { reason }),
                }
            }
            self.incoming.take(4 + len);
            if confirmation.is_some() {
                return Ok(confirmation);
            }
        }
    }

    /// What was heard and not taken.
    pub(super) fn rest(&self) -> &[u8] {
        self.incoming.bytes()
    }

    /// The same, to go on with.
    pub(super) fn into_rest(self) -> Incoming {
        self.incoming
    }
}

/// Bytes from the master that were not looked at yet.
pub(super) struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Incoming({} bytes)", self.end - self.start)
    }
}

impl Default for Incoming {
    fn default() -> Self {
        Incoming { buffer: vec![0; BUFFER].into_boxed_slice(), start: 0, end: 0 }
    }
}

impl Incoming {
    /// With bytes that another process read before us. None if they are more than fit.
    pub(super) fn holding(bytes: &[u8]) -> Option<Self> {
        let mut incoming = Incoming::default();
        incoming.buffer.get_mut(..bytes.len())?.copy_from_slice(bytes);
        incoming.end = bytes.len();
        Some(incoming)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub(super) fn take(&mut self, len: usize) {
        self.start += len;
    }

    /// Adds what one read brings. Every packet fits, so there is room as long as packets are taken.
    pub(super) fn fill(&mut self, socket: &mut impl Read) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < codec::MAX_PACKET {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        loop {
            match socket.read(&mut self.buffer[self.end..]) {
                Ok(0) => {
                    let text = "the SSH master closed the connection";
                    return Err(io::Error::new(io::ErrorKind::ConnectionReset, text));
                }
                Ok(len) => {
                    self.end += len;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
