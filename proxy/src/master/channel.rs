//! The data plane of one channel: reads and writes over a mux connection in proxy mode, with flow control.
//!
//! Synchronous, without a thread of its own: the reader half handles whatever the peer sends, the writer
//! half waits for the reader to learn of more window. The rules are those of RFC 4254, section 5.

use std::{
    io::{self, IoSlice, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    CloseWrite, OpenError, TimedRead, connect,
    holder::Holder,
    proxy_mode::{self as codec, MuxMessage, Packet, ProtocolError},
};

/// What the peer may send before we have consumed anything, in bytes. 8 MiB fill 145 MB/s at a round trip of
/// 50 ms, and 64 MiB were far slower.
const WINDOW: u32 = 8 * 1024 * 1024;
/// The window is opened again whenever this much has been consumed; half a window would halve the speed.
const ADJUST_AFTER: u32 = WINDOW / 32;
/// What one read of the socket may bring, in bytes.
const BUFFER: usize = 256 * 1024;
/// A master that takes nothing for this long is hung: it reads its clients' sockets whatever the link does,
/// and its own keep-alive would have ended it before.
const MASTER_STALL: Duration = Duration::from_secs(60);

/// How long the closing of a channel may take when its stream is dropped.
const CLOSE_BOUND: Duration = Duration::from_millis(500);

/// A byte stream to a socket on the far side. Dropping it, or both its halves, closes it there at once.
#[derive(Debug)]
pub struct Channel {
    reader: ChannelReader,
    writer: ChannelWriter,
}

impl Channel {
    /// The halves, for two threads if need be. A write of more than the peer's window (2 MiB with OpenSSH)
    /// goes on only while another thread reads.
    pub fn split(self) -> (ChannelReader, ChannelWriter) {
        (self.reader, self.writer)
    }
}

/// Opens a channel to a unix socket on the far side (`direct-streamlocal@openssh.com`).
pub(super) fn open(control: &Path, socket_path: &str, bound: Duration) -> Result<Channel, OpenError> {
    if socket_path.is_empty() || socket_path.contains('\0') || socket_path.len() > codec::MAX_MUX_MESSAGE {
        return Err(OpenError::Argument { what: "socket path" });
    }
    let deadline = Instant::now() + bound;
    let gone = |source| OpenError::Gone { control: control.to_owned(), source };
    let mut socket = connect(control, deadline).map_err(gone)?;
    socket.set_write_timeout(Some(MASTER_STALL)).map_err(gone)?;
    let holder = Holder::spawn(&socket).map_err(|error| tracing::warn!(%error, "cannot run /bin/sh")).ok();
    let mut incoming = Incoming::new();
    let dialogue = dialogue(&mut socket, &mut incoming, &codec::opening(socket_path, WINDOW), deadline);
    let confirmed = match dialogue {
        Ok(confirmed) => confirmed,
        Err(reason) => {
            match (holder, &reason) {
                (Some(holder), Broken::Refused { .. }) => {
                    // The holder reads from the same socket, and its timeout with it.
                    let _ = socket.set_read_timeout(None);
                    holder.keep();
                }
                (Some(holder), Broken::Lost(_)) => holder.release(),
                // It goes on holding: the master may be alive, and the confirmation on its way.
                (holder, _) => drop(holder),
            }
            return Err(match reason {
                Broken::Lost(source) => gone(source),
                Broken::Late { master_answers } => OpenError::TimedOut { bound, master_answers },
                Broken::Refused { reason } => OpenError::Refused { reason },
                Broken::Protocol(error) => error.into(),
            });
        }
    };
    let holder = holder.map(|mut holder| {
        holder.opened(&codec::close(confirmed.channel));
        holder
    });
    socket.set_read_timeout(None).map_err(gone)?;
    let shared = Arc::new(Shared {
        socket,
        channel: confirmed.channel,
        max_data: codec::MAX_DATA.min(confirmed.max_packet as usize).max(1),
        sending: Mutex::new(Sending::Open),
        flow: Mutex::new(Flow { window: confirmed.window, over: false }),
        changed: Condvar::new(),
        holder: Mutex::new(holder),
    });
    let reader = ChannelReader {
        shared: Arc::clone(&shared),
        incoming,
        data_left: 0,
        window: WINDOW,
        consumed: 0,
        finished: false,
        timeout: None,
    };
    Ok(Channel { reader, writer: ChannelWriter { shared, ended: false } })
}

/// What the far side says when it agrees.
struct Confirmed {
    channel: u32,
    window: u32,
    max_packet: u32,
}

/// How the opening dialogue can fail.
enum Broken {
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

/// Says all at once, for the master takes its messages one by one whatever their packing, and hears the answers.
fn dialogue(
    socket: &mut UnixStream,
    incoming: &mut Incoming,
    opening: &[u8],
    deadline: Instant,
) -> Result<Confirmed, Broken> {
    socket.write_all(opening)?;
    let mut master_answers = false;
    loop {
        match next_while_opening(incoming, master_answers)? {
            Some(Opening::Hello) => {}
            Some(Opening::Answered) => master_answers = true,
            Some(Opening::Confirmed(confirmed)) => return Ok(confirmed),
            None => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(Broken::Late { master_answers });
                }
                socket.set_read_timeout(Some(left))?;
                match incoming.fill(socket) {
                    Err(error) if is_timeout(&error) => {}
                    other => other?,
                }
            }
        }
    }
}

enum Opening {
    Hello,
    Answered,
    Confirmed(Confirmed),
}

/// Takes the next complete message of the opening dialogue.
fn next_while_opening(incoming: &mut Incoming, proxying: bool) -> Result<Option<Opening>, Broken> {
    let limit = if proxying { codec::MAX_PACKET } else { codec::MAX_MUX_MESSAGE };
    let Some(len) = codec::length(incoming.bytes(), "message", limit)? else { return Ok(None) };
    let Some(body) = incoming.bytes().get(4..4 + len) else { return Ok(None) };
    let step = if proxying {
        match codec::packet(body)? {
            Packet::Confirmation { channel, window, max_packet } => {
                Opening::Confirmed(Confirmed { channel, window, max_packet })
            }
            Packet::OpenFailure { reason, .. } => return Err(Broken::Refused { reason }),
            _ => {
                let number = body.get(1).copied().unwrap_or_default().into();
                return Err(
                    ProtocolError::Unexpected { number, expected: "the channel's confirmation" }.into()
                );
            }
        }
    } else {
        match codec::mux_message(body)? {
            MuxMessage::Hello => Opening::Hello,
            MuxMessage::Proxy => Opening::Answered,
            MuxMessage::Refused { reason } => return Err(Broken::Refused { reason }),
        }
    };
    incoming.take(4 + len);
    Ok(Some(step))
}

/// What both halves need.
#[derive(Debug)]
struct Shared {
    socket: UnixStream,
    /// The peer's number of the channel.
    channel: u32,
    max_data: usize,
    sending: Mutex<Sending>,
    flow: Mutex<Flow>,
    changed: Condvar,
    /// Closes the channel if we do not.
    holder: Mutex<Option<Holder>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A master that hangs is not waited for; if the channel is closed already, this does nothing.
        let _ = self.socket.set_write_timeout(Some(CLOSE_BOUND));
        let _ = self.send(&codec::close(self.channel), &[], true);
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Sending {
    Open,
    /// Our close is sent: another packet would make sshd drop the whole connection.
    Closed,
    /// A packet went out in part; nothing can follow it.
    Broken,
}

#[derive(Debug)]
struct Flow {
    /// What we may still send, in bytes.
    window: u32,
    /// The peer has ended its side, the master is gone, or nobody reads any more.
    over: bool,
}

impl Shared {
    /// Sends one whole packet, from whichever half.
    fn send(&self, header: &[u8], data: &[u8], last: bool) -> io::Result<()> {
        let mut sending = lock(&self.sending);
        if *sending != Sending::Open {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if last && let Some(holder) = lock(&self.holder).take() {
            // First, for a second closing packet would make sshd drop the whole connection.
            holder.release();
        }
        if let Err(error) = write_both(&self.socket, header, data) {
            *sending = Sending::Broken;
            let kind = if is_timeout(&error) { io::ErrorKind::TimedOut } else { error.kind() };
            return Err(io::Error::new(kind, "the SSH master does not take data"));
        }
        if last {
            *sending = Sending::Closed;
        }
        Ok(())
    }

    /// Waits until something may be sent and takes up to `wanted` of it.
    fn reserve(&self, wanted: usize) -> io::Result<u32> {
        let mut flow = lock(&self.flow);
        loop {
            if flow.over {
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the far side closed the channel"));
            }
            if flow.window > 0 {
                let granted = flow.window.min(u32::try_from(wanted.min(self.max_data)).unwrap_or(u32::MAX));
                flow.window -= granted;
                return Ok(granted);
            }
            flow = self.changed.wait(flow).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn grow(&self, bytes: u32) -> Result<(), ProtocolError> {
        let mut flow = lock(&self.flow);
        flow.window = flow.window.checked_add(bytes).ok_or(ProtocolError::Window)?;
        drop(flow);
        self.changed.notify_all();
        Ok(())
    }

    fn end(&self) {
        lock(&self.flow).over = true;
        self.changed.notify_all();
    }
}

/// The half that reads. An end of stream is the far side's own end; a lost master is an error of kind
/// `ConnectionReset`, and bytes that are not the protocol one of kind `InvalidData`.
#[derive(Debug)]
pub struct ChannelReader {
    shared: Arc<Shared>,
    incoming: Incoming,
    /// Bytes of the current data packet not yet given out.
    data_left: usize,
    /// What the peer may still send.
    window: u32,
    /// Consumed since the window was last opened.
    consumed: u32,
    finished: bool,
    timeout: Option<Duration>,
}

impl ChannelReader {
    /// Handles the packet at the front. False when it is not complete yet, which leaves all as it is.
    fn step(&mut self) -> Result<bool, ProtocolError> {
        let bytes = self.incoming.bytes();
        let Some(len) = codec::length(bytes, "packet", codec::MAX_PACKET)? else { return Ok(false) };
        if let Some(header) = bytes.first_chunk()
            && let Some(data) = codec::data_length(header)?
        {
            self.charge(data as u32)?;
            self.incoming.take(codec::DATA_HEADER);
            self.data_left = data;
            return Ok(true);
        }
        let Some(body) = bytes.get(4..4 + len) else { return Ok(false) };
        let channel = self.shared.channel;
        // What cannot be sent is of no consequence here: the next read finds the master gone.
        match codec::packet(body)? {
            Packet::WindowAdjust { bytes } => self.shared.grow(bytes)?,
            Packet::ExtendedData { bytes } => {
                self.charge(bytes)?;
                self.consume(bytes);
            }
            Packet::Eof => self.finish(),
            Packet::Close => {
                let _ = self.shared.send(&codec::close(channel), &[], true);
                self.finish();
            }
            Packet::ChannelRequest { want_reply: true } => {
                let _ = self.shared.send(&codec::channel_failure(channel), &[], false);
            }
            Packet::GlobalRequest { want_reply: true } => {
                let _ = self.shared.send(&codec::request_failure(), &[], false);
            }
            Packet::ChannelRequest { .. } | Packet::GlobalRequest { .. } => {}
            Packet::Confirmation { .. } | Packet::OpenFailure { .. } => {
                let number = body.get(1).copied().unwrap_or_default().into();
                return Err(ProtocolError::Unexpected { number, expected: "a packet of an open channel" });
            }
        }
        self.incoming.take(4 + len);
        Ok(true)
    }

    fn charge(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.window = self.window.checked_sub(bytes).ok_or(ProtocolError::Window)?;
        Ok(())
    }

    fn consume(&mut self, bytes: u32) {
        self.consumed += bytes;
        if self.consumed >= ADJUST_AFTER {
            let packet = codec::window_adjust(self.shared.channel, self.consumed);
            if self.shared.send(&packet, &[], false).is_ok() {
                self.window += self.consumed;
            }
            self.consumed = 0;
        }
    }

    fn finish(&mut self) {
        self.finished = true;
        self.shared.end();
    }
}

impl Read for ChannelReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut given = 0;
        while given < out.len() {
            let available = self.data_left.min(self.incoming.bytes().len());
            if available > 0 {
                let len = available.min(out.len() - given);
                out[given..given + len].copy_from_slice(&self.incoming.bytes()[..len]);
                self.incoming.take(len);
                self.data_left -= len;
                given += len;
                self.consume(len as u32);
                continue;
            }
            if self.data_left == 0 {
                if self.finished {
                    break;
                }
                match self.step() {
                    Ok(true) => continue,
                    Ok(false) => {}
                    // The bytes stay where they are, so the error comes again with the next read.
                    Err(_) if given > 0 => break,
                    Err(error) => {
                        self.shared.end();
                        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                    }
                }
            }
            if given > 0 {
                break; // what there is now rather than all that was asked for
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut socket = &self.shared.socket;
            match self.incoming.fill(&mut socket) {
                Ok(()) => {}
                Err(error) if is_timeout(&error) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => {
                    self.shared.end();
                    return Err(error);
                }
            }
        }
        Ok(given)
    }
}

impl TimedRead for ChannelReader {
    fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        // Zero means "for ever" to the kernel, and an error to std.
        let timeout = timeout.map(|timeout| timeout.max(Duration::from_millis(1)));
        self.shared.socket.set_read_timeout(timeout)?;
        self.timeout = timeout;
        Ok(())
    }

    fn abandon(&mut self) {
        self.shared.end();
    }
}

impl Drop for ChannelReader {
    fn drop(&mut self) {
        // Without a reader a waiting writer would never learn of more window.
        self.shared.end();
    }
}

/// The half that writes. Fails with `BrokenPipe` once the far side has ended the channel (or its own
/// sending), when the reader half is gone, and when the master is.
#[derive(Debug)]
pub struct ChannelWriter {
    shared: Arc<Shared>,
    ended: bool,
}

impl Write for ChannelWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.is_empty() {
            return Ok(0);
        }
        if self.ended {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the channel was shut down for writing"));
        }
        let len = self.shared.reserve(data.len())?;
        let header = codec::data_header(self.shared.channel, len);
        self.shared.send(&header, &data[..len as usize], false)?;
        Ok(len as usize)
    }

    /// Nothing is held back, so there is nothing to do.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl CloseWrite for ChannelWriter {
    fn shutdown(&mut self) -> io::Result<()> {
        if self.ended {
            return Ok(());
        }
        self.ended = true;
        self.shared.send(&codec::eof(self.shared.channel), &[], false)
    }
}

/// Bytes from the master that were not looked at yet.
struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Incoming({} bytes)", self.end - self.start)
    }
}

impl Incoming {
    fn new() -> Self {
        Incoming { buffer: vec![0; BUFFER].into_boxed_slice(), start: 0, end: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn take(&mut self, len: usize) {
        self.start += len;
    }

    /// Adds what one read brings. Every packet fits, so there is room as long as packets are taken.
    fn fill(&mut self, socket: &mut impl Read) -> io::Result<()> {
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

fn write_both(mut socket: &UnixStream, mut header: &[u8], mut data: &[u8]) -> io::Result<()> {
    while !header.is_empty() || !data.is_empty() {
        match socket.write_vectored(&[IoSlice::new(header), IoSlice::new(data)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(len) => {
                let of_header = len.min(header.len());
                header = &header[of_header..];
                data = &data[len - of_header..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
