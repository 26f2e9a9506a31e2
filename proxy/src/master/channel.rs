//! The data plane of one channel: reads and writes over a mux connection in proxy mode, with flow control.
//!
//! Synchronous, without a thread of its own: the reader half handles whatever the peer sends, the writer
//! half waits for the reader to learn of more window. The rules are those of RFC 4254, section 5.

use std::{
    io::{self, IoSlice, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    CloseWrite, OpenError, TimedRead, connect,
    dialogue::{Broken, Confirmed, Dialogue, Incoming, WINDOW, is_timeout},
    holder::Holder,
    kept::Hold,
    parting::Parting,
    proxy_mode::{self as codec, Packet, ProtocolError},
};

/// The window is opened again whenever this much has been consumed; half a window would halve the speed.
const ADJUST_AFTER: u32 = WINDOW / 32;
/// A master that takes nothing for this long is hung. It reads its clients' sockets whatever the link does, but not while
/// the two sides agree on new keys (every gigabyte), and its own keep-alive would have ended it before.
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
    /// A channel that has just been confirmed. `incoming` is what came behind the confirmation.
    pub(super) fn new(
        socket: UnixStream,
        control: &Path,
        incoming: Incoming,
        confirmed: Confirmed,
        guard: Option<Guard>,
    ) -> Self {
        // Whoever opened it may have had less patience.
        let _ = socket.set_write_timeout(Some(MASTER_STALL));
        let shared = Arc::new(Shared {
            socket,
            control: control.to_owned(),
            channel: confirmed.channel,
            max_data: codec::MAX_DATA.min(confirmed.max_packet as usize).max(1),
            sending: Mutex::new(Sending::Open),
            flow: Mutex::new(Flow { window: confirmed.window, over: false }),
            changed: Condvar::new(),
            guard: Mutex::new(guard),
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
        Channel { reader, writer: ChannelWriter { shared, ended: false } }
    }

    /// The halves, for two threads if need be. A write of more than the peer's window (2 MiB with OpenSSH)
    /// goes on only while another thread reads.
    pub fn split(self) -> (ChannelReader, ChannelWriter) {
        (self.reader, self.writer)
    }
}

/// Opens a channel to a unix socket on the far side (`direct-streamlocal@openssh.com`).
pub(super) fn open(control: &Path, socket_path: &str, bound: Duration) -> Result<Channel, OpenError> {
    let (opened, holder) = begin(control, &Dialogue::opening(socket_path)?, bound)?;
    let guard = holder.map(|holder| shell(holder, opened.confirmed.channel));
    Ok(opened.into_channel(control, guard))
}

/// Runs a command in a session. `is_guarded` is for who is likely to be killed: otherwise nobody closes the channel in our
/// place, other than before it is confirmed.
pub(super) fn open_session(
    control: &Path,
    command: &str,
    bound: Duration,
    is_guarded: bool,
) -> Result<Channel, OpenError> {
    if command.is_empty() || command.contains('\0') || command.len() > codec::MAX_DATA / 2 {
        return Err(OpenError::Argument { what: "command" });
    }
    let deadline = Instant::now() + bound;
    let (opened, holder) = begin(control, &Dialogue::opening_session(), bound)?;
    let guard = holder.and_then(|mut holder| {
        holder.opened(&codec::close(opened.confirmed.channel));
        if is_guarded {
            return Some(Guard::Shell(holder));
        }
        holder.release();
        None
    });
    let mut channel = opened.into_channel(control, guard);
    let gone = |source| OpenError::Gone { control: control.to_owned(), source };
    channel.writer.shared.send(&codec::exec(channel.writer.shared.channel, command), &[]).map_err(gone)?;
    match channel.reader.wait_for_window(deadline) {
        Ok(()) => Ok(channel),
        Err(error) if is_timeout(&error) => Err(OpenError::TimedOut { bound, master_answers: true }),
        Err(error) => Err(gone(error)),
    }
}

/// A channel that has just been confirmed.
struct Opened {
    socket: UnixStream,
    incoming: Incoming,
    confirmed: Confirmed,
}

impl Opened {
    fn into_channel(self, control: &Path, guard: Option<Guard>) -> Channel {
        Channel::new(self.socket, control, self.incoming, self.confirmed, guard)
    }
}

/// Says what opens a channel, and waits until it is confirmed.
fn begin(control: &Path, opening: &[u8], bound: Duration) -> Result<(Opened, Option<Holder>), OpenError> {
    let deadline = Instant::now() + bound;
    let gone = |source| OpenError::Gone { control: control.to_owned(), source };
    let mut socket = connect(control, deadline).map_err(gone)?;
    socket.set_write_timeout(Some(MASTER_STALL)).map_err(gone)?;
    let holder = spawn_holder(&socket);
    let mut dialogue = Dialogue::default();
    let confirmed = match dialogue.run(&mut socket, opening, deadline) {
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
    socket.set_read_timeout(None).map_err(gone)?;
    Ok((Opened { socket, incoming: dialogue.into_rest(), confirmed }, holder))
}

/// Who closes the channel if we do not.
#[derive(Debug)]
pub(super) enum Guard {
    /// A small process of ours.
    Shell(Holder),
    /// The keeper that handed the channel over. Should it end before us, a small process takes its place.
    Keeper(Hold),
}

/// What both halves need.
#[derive(Debug)]
struct Shared {
    socket: UnixStream,
    /// The master's socket.
    control: PathBuf,
    /// The peer's number of the channel.
    channel: u32,
    max_data: usize,
    sending: Mutex<Sending>,
    flow: Mutex<Flow>,
    changed: Condvar,
    /// Closes the channel if we do not.
    guard: Mutex<Option<Guard>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        let guard = lock(&self.guard).take();
        if let Some(Guard::Keeper(hold)) = &guard
            && hold.is_watched()
        {
            // It closes the channel while we have other things to do.
            return;
        }
        // A master that hangs is not waited for.
        let deadline = Instant::now() + CLOSE_BOUND;
        let parting = self.socket.try_clone().map(Parting::begin);
        if parting.is_ok_and(|parting| parting.finish(&self.control, deadline))
            && let Some(Guard::Shell(holder)) = guard
        {
            holder.release();
            return;
        }
        // Else the holder goes on reading in our place, from the same socket, and with its timeout.
        let _ = self.socket.set_read_timeout(None);
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Sending {
    Open,
    /// The far side has closed it: nobody takes anything any more.
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
    fn send(&self, header: &[u8], data: &[u8]) -> io::Result<()> {
        let mut sending = lock(&self.sending);
        if *sending != Sending::Open {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if let Err(error) = write_both(&self.socket, header, data) {
            *sending = Sending::Broken;
            let kind = if is_timeout(&error) { io::ErrorKind::TimedOut } else { error.kind() };
            return Err(io::Error::new(kind, "the SSH master does not take data"));
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

    /// Waits until the socket has something to be read, and sees meanwhile that the channel stays guarded. Returns at
    /// once if nothing can happen to the guard: the read itself waits then.
    fn wait(&self, deadline: Option<Instant>) -> io::Result<()> {
        let mut guard = lock(&self.guard);
        while let Some(Guard::Keeper(hold)) = &*guard {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if hold.wait(&self.socket, left)? {
                return Ok(());
            }
            *guard = spawn_holder(&self.socket).map(|holder| shell(holder, self.channel));
        }
        Ok(())
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
                // The master answers for us when we go: see `parting`.
                *lock(&self.shared.sending) = Sending::Closed;
                self.finish();
            }
            Packet::ChannelRequest { want_reply: true } => {
                let _ = self.shared.send(&codec::channel_failure(channel), &[]);
            }
            Packet::GlobalRequest { want_reply: true } => {
                let _ = self.shared.send(&codec::request_failure(), &[]);
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

    /// Reads until something may be sent. A session has no window before its command runs (`session_set_fds` in session.c).
    fn wait_for_window(&mut self, deadline: Instant) -> io::Result<()> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        while lock(&self.shared.flow).window == 0 {
            if self.finished || self.data_left > 0 {
                return Err(invalid(ProtocolError::Window));
            }
            if self.step().map_err(invalid)? {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.shared.socket.set_read_timeout(Some(left))?;
            let mut socket = &self.shared.socket;
            match self.incoming.fill(&mut socket) {
                Err(error) if is_timeout(&error) => {}
                other => other?,
            }
        }
        self.shared.socket.set_read_timeout(None)
    }

    fn charge(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.window = self.window.checked_sub(bytes).ok_or(ProtocolError::Window)?;
        Ok(())
    }

    fn consume(&mut self, bytes: u32) {
        self.consumed += bytes;
        if self.consumed >= ADJUST_AFTER {
            let packet = codec::window_adjust(self.shared.channel, self.consumed);
            if self.shared.send(&packet, &[]).is_ok() {
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
            match self.shared.wait(deadline).and_then(|()| self.incoming.fill(&mut socket)) {
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
        self.shared.send(&header, &data[..len as usize])?;
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
        self.shared.send(&codec::eof(self.shared.channel), &[])
    }
}

/// The channel is open: should we die, the small process closes it.
fn shell(mut holder: Holder, channel: u32) -> Guard {
    holder.opened(&codec::close(channel));
    Guard::Shell(holder)
}

/// Without one the channel is not guarded.
fn spawn_holder(socket: &UnixStream) -> Option<Holder> {
    Holder::spawn(socket)
        .map_err(|error| tracing::warn!(event = "cannot run /bin/sh", %error, "cannot run /bin/sh: {error}"))
        .ok()
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
