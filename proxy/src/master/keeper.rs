//! The keeper: a process that has streams of one kind ready on one master, for other processes of the same user, and
//! closes them for those that die.
//!
//! A stream is handed out once. The keeper ends by itself soon after the last demand. It must never know what the
//! streams are for, and never end while a channel is being confirmed: the master would end with it (see `holder`).

use std::{
    collections::{HashSet, VecDeque},
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    mem,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::{
            fs::MetadataExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::Flock,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr},
    },
    unistd,
};

use super::{
    connect,
    dialogue::{Broken, Confirmed, Dialogue},
    handle::SocketIdentity,
    holder::Holder,
    kept::{MAX_PACKET, Recipe, Word},
    lock::lock,
    parting::{Parting, wake},
    proxy_mode::{self as codec, Packet},
};
use crate::passing;

/// How long streams are kept after somebody wanted one.
const IDLE: Duration = Duration::from_secs(15);
/// Streams that are being opened at a time. Some servers let no more than five connections wait, and others open some
/// too.
const MOST_OPENING: usize = 3;
/// How long the far side may take to confirm a channel and to answer the first words.
const OPENING: Duration = Duration::from_secs(20);
/// How long nothing is opened after a failure.
const PAUSE: Duration = Duration::from_millis(500);
/// How long the end of a channel may wait for the master to have something else to do.
const WAKE: Duration = Duration::from_millis(10);
/// How much later than one was handed out the next stream is opened, unless somebody waits for it: whoever has the first
/// one is to have the processors first.
const AFTERWARDS: Duration = Duration::from_millis(2);
/// How long a write to the master may take.
const WRITE_BOUND: Duration = Duration::from_millis(500);
/// What the far side may say in answer to the first words, in bytes.
const MOST_HEARD: usize = MAX_PACKET / 2;

/// Is the keeper, until nobody has wanted a stream for a while and all who have one are gone. To be called by a process
/// of its own, after [`detach`]. Reads what is wanted from standard input. `control` is the master's socket, `door` the
/// keeper's own, and `lock` held for that; if another process holds it already, this does nothing.
///
/// # Errors
/// If the door cannot be made.
pub fn keep(control: &Path, door: &Path, lock: &Path) -> io::Result<()> {
    let mut told = Vec::new();
    io::stdin().take(MAX_PACKET as u64).read_to_end(&mut told)?;
    let told = told.split_first().and_then(|(most, recipe)| Some((*most, Recipe::from_bytes(recipe)?)));
    let no_recipe = || io::Error::new(ErrorKind::InvalidInput, "no description of streams on standard input");
    let (most, recipe) = told.ok_or_else(no_recipe)?;
    let opening = Dialogue::opening(&recipe.socket_path).map_err(io::Error::other)?;
    let Some(door) = Door::open(door, lock)? else { return Ok(()) };
    let keeper = Keeper {
        control: control.to_owned(),
        started_with: SocketIdentity::of(control),
        recipe,
        opening,
        target: 1,
        most: most.into(),
        streams: VecDeque::new(),
        waiting: VecDeque::new(),
        guarded: Vec::new(),
        leaving: Vec::new(),
        abandoned: Vec::new(),
        paused_until: None,
        refill_at: None,
        wake_at: None,
        wanted_at: Instant::now(),
        is_closing: false,
    };
    keeper.run(door);
    Ok(())
}

/// Leaves the session of whoever started this process, and closes every descriptor but the first three, for others may
/// wait for the end of one. To be called before anything else is opened, a log for instance.
pub fn detach() {
    let _ = unistd::setsid();
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<i32> = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        let _ = unistd::close(number);
    }
}

/// Where streams are asked for. Its files are removed with it.
struct Door {
    listener: UnixListener,
    path: PathBuf,
    lock_path: PathBuf,
    lock: Flock<File>,
}

impl Door {
    /// None if another keeper has it.
    fn open(path: &Path, lock_path: &Path) -> io::Result<Option<Self>> {
        let Some(lock) = lock(lock_path, Instant::now())? else { return Ok(None) };
        let _ = fs::remove_file(path);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        socket::listen(&socket, Backlog::new(64)?)?;
        let listener = UnixListener::from(socket);
        Ok(Some(Door { listener, path: path.to_owned(), lock_path: lock_path.to_owned(), lock }))
    }

    /// Nobody has removed its lock, as whoever stops the master does. Then the files may be another keeper's.
    fn is_ours(&self) -> bool {
        self.lock.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if !self.is_ours() {
            return;
        }
        let _ = fs::remove_file(&self.path);
        // The lock last, and while it is held: see `lock`.
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// A stream that nobody has yet.
struct Prepared {
    socket: UnixStream,
    dialogue: Dialogue,
    confirmed: Option<Confirmed>,
    /// The far side answered the first words.
    answered: bool,
    since: Instant,
}

impl Prepared {
    /// Takes in what came. False when the stream is lost or was ended by the far side.
    fn advance(&mut self, words: &[u8]) -> Result<bool, Broken> {
        self.dialogue.fill(&mut self.socket)?;
        if self.confirmed.is_none()
            && let Some(mut confirmed) = self.dialogue.advance()?
        {
            let len = words.len() as u32;
            if !words.is_empty() && len <= confirmed.max_packet && len <= confirmed.window {
                self.socket.write_all(&[&codec::data_header(confirmed.channel, len), words].concat())?;
                confirmed.window -= len;
            }
            self.answered = words.is_empty();
            self.confirmed = Some(confirmed);
        }
        if self.confirmed.is_none() {
            return Ok(true);
        }
        if self.dialogue.rest().len() > MOST_HEARD {
            return Ok(false);
        }
        // They stay where they are, for whoever gets the stream.
        let mut rest = self.dialogue.rest();
        while let Some(len) = codec::length(rest, "packet", codec::MAX_PACKET)? {
            let Some(packet) = rest.get(..4 + len) else { break };
            if let Some(header) = packet.first_chunk()
                && codec::data_length(header)?.is_some()
            {
                self.answered = true;
            } else if matches!(codec::packet(&packet[4..])?, Packet::Eof | Packet::Close) {
                return Ok(false);
            }
            rest = &rest[4 + len..];
        }
        Ok(true)
    }

    fn is_ready(&self) -> bool {
        self.answered
    }

    /// Begins to close it, which is possible when it is confirmed.
    fn close(self) -> Result<Parting, Self> {
        if self.confirmed.is_some() { Ok(Parting::begin(self.socket)) } else { Err(self) }
    }
}

/// A stream that a client has: until it closes this connection, or dies.
struct Guarded {
    client: UnixStream,
    socket: UnixStream,
}

/// Somebody who connected.
struct Client {
    connection: UnixStream,
    /// It said what it wants, and that is what we have.
    asked: bool,
}

/// Which descriptors have something to be read, by their numbers.
#[derive(Default)]
struct Ready(HashSet<RawFd>);

impl Ready {
    fn of(polled: &[PollFd<'_>]) -> Self {
        let ready = polled.iter().filter(|fd| fd.any().unwrap_or(true));
        Self(ready.map(|fd| fd.as_fd().as_raw_fd()).collect())
    }

    fn has(&self, what: &impl AsFd) -> bool {
        self.0.contains(&what.as_fd().as_raw_fd())
    }
}

struct Keeper {
    control: PathBuf,
    /// Of the control socket of the master that the streams are on.
    started_with: Option<SocketIdentity>,
    recipe: Recipe,
    opening: Vec<u8>,
    /// How many streams there are to be now, ready or being opened: one at first, and one more each time that somebody has
    /// to wait.
    target: usize,
    /// The most that `target` becomes.
    most: usize,
    streams: VecDeque<Prepared>,
    waiting: VecDeque<Client>,
    guarded: Vec<Guarded>,
    /// Streams that are being closed. That takes as long as it takes: see [`super::parting`].
    leaving: Vec<Parting>,
    /// Streams that are not wanted any more and not confirmed yet.
    abandoned: Vec<Prepared>,
    paused_until: Option<Instant>,
    refill_at: Option<Instant>,
    /// When the master is to be woken, if no connection does it before.
    wake_at: Option<Instant>,
    wanted_at: Instant,
    /// There are to be no more streams.
    is_closing: bool,
}

impl Keeper {
    fn run(mut self, door: Door) {
        tracing::debug!(control = %self.control.display(), "keeping streams ready");
        let mut door = Some(door);
        loop {
            let now = Instant::now();
            // Another master may take the place of ours, started from another configuration.
            let master = SocketIdentity::of(&self.control);
            if door.as_ref().is_some_and(|door| !door.is_ours()) || master != self.started_with {
                self.is_closing = true;
            }
            if self.is_closing || (!self.is_wanted() && now >= self.wanted_at + IDLE) {
                door = None;
                self.waiting.clear();
            }
            self.give_up_late_ones(now);
            if self.wake_at.is_some_and(|at| now >= at) {
                self.wake_at = None;
                wake(&self.control);
            }
            if door.is_some() {
                self.hand_out();
                self.refill(now);
            } else {
                mem::take(&mut self.streams).into_iter().for_each(|stream| self.discard(stream));
                let is_idle = self.abandoned.is_empty() && self.guarded.is_empty() && self.leaving.is_empty();
                if is_idle && self.wake_at.is_none() {
                    tracing::debug!(control = %self.control.display(), "no more streams are wanted");
                    return;
                }
            }
            if let Err(error) = self.wait(door.as_ref(), now) {
                tracing::error!(event = "cannot wait for events", %error, "the keeper of streams cannot wait for events: {error}");
                // It must go on, for the sake of what is not confirmed.
                thread::sleep(PAUSE);
            }
        }
    }

    /// Closes a stream that nobody has, now or when that is possible.
    fn discard(&mut self, stream: Prepared) {
        match stream.close() {
            Ok(parting) => self.leaving.push(parting),
            Err(stream) => self.abandoned.push(stream),
        }
    }

    /// Sleeps until something happens and takes it in.
    fn wait(&mut self, door: Option<&Door>, now: Instant) -> Result<(), Errno> {
        let ready = self.sleep(door, now)?;
        for stream in mem::take(&mut self.streams) {
            let kept = if ready.has(&stream.socket) { self.advance(stream) } else { Some(stream) };
            self.streams.extend(kept);
        }
        for stream in mem::take(&mut self.abandoned) {
            let kept = if ready.has(&stream.socket) { self.advance(stream) } else { Some(stream) };
            kept.into_iter().for_each(|stream| self.discard(stream));
        }
        let is_gone = |guarded: &Guarded| ready.has(&guarded.client) && has_ended(&guarded.client);
        let (gone, rest): (Vec<_>, Vec<_>) = mem::take(&mut self.guarded).into_iter().partition(is_gone);
        self.guarded = rest;
        for mut parting in mem::take(&mut self.leaving) {
            if ready.has(&parting) && parting.is_over() {
                self.wake_at.get_or_insert(now + WAKE);
            } else {
                self.leaving.push(parting);
            }
        }
        self.leaving.extend(gone.into_iter().map(|guarded| Parting::begin(guarded.socket)));
        for client in mem::take(&mut self.waiting) {
            let kept = if ready.has(&client.connection) { self.listen(client) } else { Some(client) };
            self.waiting.extend(kept);
        }
        if let Some(door) = door.filter(|door| ready.has(&door.listener)) {
            self.let_in(door);
        }
        Ok(())
    }

    /// Sleeps until something happens, or it is time for something. What has happened is in what was found.
    fn sleep(&self, door: Option<&Door>, now: Instant) -> Result<Ready, Errno> {
        let until = self
            .streams
            .iter()
            .filter(|stream| !stream.is_ready())
            .map(|stream| stream.since + OPENING)
            .chain(door.and(self.paused_until))
            .chain(door.and(self.refill_at))
            .chain(self.wake_at)
            .chain(door.filter(|_| !self.is_wanted()).map(|_| self.wanted_at + IDLE))
            .min();
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            // Rounded up, or the last millisecond would be spent in a loop.
            let left = until.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let streams = self.streams.iter().chain(&self.abandoned).map(|stream| stream.socket.as_fd());
        let guarded = self.guarded.iter().map(|guarded| guarded.client.as_fd());
        let leaving = self.leaving.iter().map(|parting| parting.as_fd());
        let waiting = self.waiting.iter().map(|client| client.connection.as_fd());
        let door = door.filter(|_| !self.is_paused()).map(|door| door.listener.as_fd());
        let watched = streams.chain(guarded).chain(leaving).chain(waiting).chain(door);
        let mut fds: Vec<PollFd<'_>> = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => Ok(Ready::default()),
            Err(errno) => Err(errno),
            Ok(_) => Ok(Ready::of(&fds)),
        }
    }

    fn let_in(&mut self, door: &Door) {
        loop {
            match door.listener.accept() {
                Ok((connection, _)) => {
                    let _ = connection.set_nonblocking(true);
                    self.waiting.push_back(Client { connection, asked: false });
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(event = "cannot let anybody in", %error, "the keeper of streams cannot let anybody in: {error}");
                    self.paused_until = Some(Instant::now() + PAUSE);
                    return;
                }
            }
        }
    }

    /// Something came for a stream that nobody has.
    fn advance(&mut self, mut stream: Prepared) -> Option<Prepared> {
        match stream.advance(&self.recipe.words) {
            Ok(true) => return Some(stream),
            Ok(false) => self.discard(stream),
            Err(Broken::Lost(error)) => tracing::debug!(%error, "a stream was lost"),
            Err(Broken::Refused { reason }) => {
                tracing::debug!(reason, "no stream");
                // The master needs the connection for the rest of its life.
                if let Ok(holder) = Holder::spawn(&stream.socket) {
                    holder.keep();
                }
                // Each refusal costs, so there are not to be more.
                self.is_closing = true;
                return None;
            }
            Err(reason) => tracing::debug!(?reason, "a stream was broken"),
        }
        self.fail();
        None
    }

    /// Whoever waits may have better luck without us.
    fn fail(&mut self) {
        self.paused_until = Some(Instant::now() + PAUSE);
        let (asked, rest): (VecDeque<Client>, VecDeque<Client>) =
            mem::take(&mut self.waiting).into_iter().partition(|client| client.asked);
        self.waiting = rest;
        for client in asked {
            let _ = (&client.connection).write_all(&Word::None.to_packet());
        }
    }

    /// Hears what a client wants. None if it has left, or wants something else.
    fn listen(&mut self, mut client: Client) -> Option<Client> {
        let mut packet = vec![0; MAX_PACKET];
        match client.connection.read(&mut packet) {
            Ok(len) if len > 0 && !client.asked => {
                if Recipe::from_bytes(&packet[..len]).as_ref() != Some(&self.recipe) || self.is_paused() {
                    let _ = client.connection.write_all(&Word::None.to_packet());
                    return None;
                }
                client.asked = true;
                self.wanted_at = Instant::now();
                let ahead = self.waiting.iter().filter(|client| client.asked).count();
                if self.streams.iter().filter(|stream| stream.is_ready()).count() <= ahead {
                    self.target = (self.target + 1).min(self.most);
                    client.connection.write_all(&Word::Wait.to_packet()).ok()?;
                }
                Some(client)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Some(client)
            }
            _ => None,
        }
    }

    /// Whether somebody waits for a stream.
    fn is_wanted(&self) -> bool {
        self.waiting.iter().any(|client| client.asked)
    }

    fn is_paused(&self) -> bool {
        self.paused_until.is_some_and(|until| Instant::now() < until)
    }

    /// Gives ready streams, oldest first, to those who have waited longest.
    fn hand_out(&mut self) {
        while let Some(next) = self.waiting.iter().position(|client| client.asked)
            && let Some(ready) = self.streams.iter().position(Prepared::is_ready)
        {
            let (Some(client), Some(stream)) = (self.waiting.remove(next), self.streams.remove(ready)) else {
                return;
            };
            let Some(confirmed) = stream.confirmed else { continue };
            let packet = Word::Stream { confirmed, heard: stream.dialogue.rest() }.to_packet();
            match passing::send_with_descriptor(&client.connection, &packet, stream.socket.as_fd()) {
                Ok(()) => {
                    self.refill_at = Some(Instant::now() + AFTERWARDS);
                    self.guarded.push(Guarded { client: client.connection, socket: stream.socket });
                }
                // It has left.
                Err(_) => self.streams.push_front(stream),
            }
        }
    }

    /// Opens as many as are wanted.
    fn refill(&mut self, now: Instant) {
        if self.is_paused() {
            return;
        }
        self.paused_until = None;
        if self.refill_at.is_some_and(|at| now < at) && !self.is_wanted() {
            return;
        }
        self.refill_at = None;
        let opening = self.streams.iter().filter(|stream| stream.confirmed.is_none()).count();
        let wanted = self.target.saturating_sub(self.streams.len());
        for _ in 0..wanted.min(MOST_OPENING.saturating_sub(opening)) {
            let opened = connect(&self.control, now).and_then(|mut socket| {
                socket.set_write_timeout(Some(WRITE_BOUND))?;
                socket.write_all(&self.opening)?;
                Ok(socket)
            });
            match opened {
                Ok(socket) => {
                    // Which wakes the master.
                    self.wake_at = None;
                    let dialogue = Dialogue::default();
                    let stream = Prepared { socket, dialogue, confirmed: None, answered: false, since: now };
                    self.streams.push_back(stream);
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot connect to the master");
                    self.is_closing =
                        matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
                    self.fail();
                    return;
                }
            }
        }
    }

    /// A far side that does not answer in time is not asked again at once.
    fn give_up_late_ones(&mut self, now: Instant) {
        let is_late = |stream: &Prepared| !stream.is_ready() && now >= stream.since + OPENING;
        let (late, rest): (VecDeque<Prepared>, VecDeque<Prepared>) =
            mem::take(&mut self.streams).into_iter().partition(is_late);
        self.streams = rest;
        if !late.is_empty() {
            late.into_iter().for_each(|stream| self.discard(stream));
            self.fail();
        }
    }
}

/// Whether nobody is at the other end any more. Who has a stream has nothing to say.
fn has_ended(mut client: &UnixStream) -> bool {
    match client.read(&mut [0]) {
        Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        Ok(len) => len == 0,
    }
}

#[cfg(test)]
#[path = "tests/keeper.rs"]
mod tests;
