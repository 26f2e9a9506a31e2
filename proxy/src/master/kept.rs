//! Streams that another process, the keeper, has opened in advance: asking for one, and what the two say to each
//! other.
//!
//! For each stream there is one connection of packets (`SOCK_SEQPACKET`). It lasts as long as the stream: with its end,
//! whatever the reason, the keeper closes the stream.

use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{self, MsgFlags, SockType},
};

use super::{
    Channel, Endpoint,
    channel::Guard,
    connect_as,
    dialogue::{Confirmed, Incoming, WINDOW},
    handle::{Master, avoided},
    pool::Pool,
    record::Record,
    start::Files,
};
use crate::passing;

/// How long a keeper may take to say a first word. One that does not is stopped, or its machine very busy.
const FIRST_WORD: Duration = Duration::from_millis(250);
/// A packet of the keeper is no longer than this, in bytes.
pub(super) const MAX_PACKET: usize = 64 * 1024;
/// What comes before the bytes that were heard already.
const HEADER: usize = 17;

/// The keeper has the stream, it comes with the packet.
const STREAM: u8 = b's';
/// It is being opened.
const WAIT: u8 = b'w';
/// There will be none.
const NONE: u8 = b'n';
/// Which streams are wanted: to what, and what has been said on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// The socket on the far side, an absolute path.
    pub socket_path: String,
    /// What the far side is told first, at most 4 KiB. A stream is ready when it has answered that.
    pub words: Vec<u8>,
}

impl Recipe {
    /// The longest words, in bytes.
    const MAX_WORDS: usize = 4096;

    /// For another process.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.socket_path.len()).unwrap_or(u32::MAX);
        [&length.to_be_bytes(), self.socket_path.as_bytes(), &self.words].concat()
    }

    /// Reads it back. None if it is none.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (path, words) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        let socket_path = String::from_utf8(path.to_owned()).ok()?;
        (words.len() <= Self::MAX_WORDS).then(|| Recipe { socket_path, words: words.to_owned() })
    }
}

/// What a keeper says.
#[derive(Debug)]
pub(super) enum Word<'a> {
    /// Take this.
    Stream { confirmed: Confirmed, heard: &'a [u8] },
    /// One is being opened.
    Wait,
    /// No.
    None,
}

impl<'a> Word<'a> {
    /// As a packet.
    pub(super) fn to_packet(&self) -> Vec<u8> {
        match self {
            Word::Stream { confirmed, heard } => {
                let mut packet = vec![STREAM];
                for number in [confirmed.channel, confirmed.window, confirmed.max_packet, WINDOW] {
                    packet.extend_from_slice(&number.to_be_bytes());
                }
                packet.extend_from_slice(heard);
                packet
            }
            Word::Wait => vec![WAIT],
            Word::None => vec![NONE],
        }
    }

    /// Reads it back. None if it is not understood, as that of a keeper of another version may be.
    fn from_packet(packet: &'a [u8]) -> Option<Self> {
        match *packet.first()? {
            WAIT => Some(Word::Wait),
            NONE => Some(Word::None),
            STREAM => {
                let (header, heard) = packet.split_at_checked(HEADER)?;
                let number = |index: usize| {
                    header.get(1 + 4 * index..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
                };
                let confirmed = Confirmed { channel: number(0)?, window: number(1)?, max_packet: number(2)? };
                (number(3)? == WINDOW).then_some(Word::Stream { confirmed, heard })
            }
            _ => None,
        }
    }
}

/// The connection to the keeper that watches over a stream. The keeper closes the stream when this is dropped.
#[derive(Debug)]
pub(super) struct Hold(UnixStream);

impl Hold {
    /// Waits until the stream has something to be read. False as soon as the keeper is gone.
    ///
    /// # Errors
    /// `TimedOut` after the limit.
    pub(super) fn wait(&self, stream: &UnixStream, limit: Option<Duration>) -> io::Result<bool> {
        // Rounded up, or the last millisecond would be spent in a loop.
        let limit = limit.map(|limit| PollTimeout::try_from(limit + Duration::from_millis(1)));
        let limit = limit.map_or(PollTimeout::NONE, |limit| limit.unwrap_or(PollTimeout::MAX));
        let mut fds = [&self.0, stream].map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        loop {
            match poll(&mut fds, limit) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(!fds[0].any().unwrap_or(true) || self.is_watched()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Whether the keeper is still there.
    pub(super) fn is_watched(&self) -> bool {
        socket::recv(self.0.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK)
            == Err(Errno::EAGAIN)
    }
}

impl Pool {
    /// Has a process open streams in advance from now on, up to `most` at a time, for [`Pool::take_kept`]. It ends 15
    /// seconds after the last one was wanted. `program` is one that calls [`super::keep`] with its last three arguments.
    /// Nothing is done for a master that [`Pool::take_kept`] would not ask for.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn keep(
        &self,
        endpoint: &Endpoint,
        master: &Master,
        program: Command,
        recipe: &Recipe,
        most: u8,
    ) -> io::Result<()> {
        match self.with_keepers(endpoint).find(|(files, _)| files.socket == master.control_path()) {
            Some((Files { socket, keeper, keeping, .. }, _)) => {
                start(program, [&socket, &keeper, &keeping], recipe, most)
            }
            None => Ok(()),
        }
    }

    /// Whether a keeper has streams opened in advance on a master that [`Pool::live`] would give.
    pub fn is_kept(&self, endpoint: &Endpoint) -> bool {
        self.kept(endpoint).is_some_and(|(files, _)| is_there(&files.keeper))
    }

    /// A stream that a keeper has opened in advance ([`Pool::keep`]), if [`Pool::is_kept`]. Without a keeper this
    /// takes microseconds.
    pub fn take_kept(
        &self,
        endpoint: &Endpoint,
        recipe: &Recipe,
        bound: Duration,
    ) -> Option<(Master, Channel)> {
        let (files, is_foreign) = self.kept(endpoint)?;
        let channel = take(&files.keeper, &files.socket, recipe, bound)?;
        let destination = endpoint.destination.clone();
        let master =
            if is_foreign { Master::foreign(files, destination) } else { Master::of(files, destination) };
        Some((master, channel))
    }

    /// The files of the master whose keeper is asked, and whether it was opened by hand.
    fn kept(&self, endpoint: &Endpoint) -> Option<(Files, bool)> {
        self.with_keepers(endpoint).find(|(files, is_foreign)| {
            let is_current = || *is_foreign || Record::read(files).is_some_and(|record| record.is_current());
            files.keeper.exists() && avoided(files).is_none() && is_current()
        })
    }

    /// The masters that may have a keeper.
    fn with_keepers(&self, endpoint: &Endpoint) -> impl Iterator<Item = (Files, bool)> {
        let foreign = self.foreign(endpoint).map(|files| (files, true));
        foreign.into_iter().chain([(self.files(endpoint), false)])
    }
}

/// Whether a keeper listens there.
fn is_there(keeper: &Path) -> bool {
    connect_as(SockType::SeqPacket, keeper, Instant::now()).is_ok()
}

/// Takes a stream from the keeper that listens there. None if there is no keeper, or it has none within `bound`.
fn take(keeper: &Path, control: &Path, recipe: &Recipe, bound: Duration) -> Option<Channel> {
    let mut connection = connect_as(SockType::SeqPacket, keeper, Instant::now()).ok()?;
    connection.write_all(&recipe.to_bytes()).ok()?;
    let deadline = Instant::now() + bound;
    let mut packet = vec![0; MAX_PACKET];
    let mut patience = FIRST_WORD.min(bound);
    loop {
        connection.set_read_timeout(Some(patience.max(Duration::from_millis(1)))).ok()?;
        let (len, descriptor) = match passing::receive_with_descriptor(&connection, &mut packet) {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "the keeper of streams does not answer");
                return None;
            }
        };
        match Word::from_packet(&packet[..len])? {
            Word::Stream { confirmed, heard } => {
                let socket = UnixStream::from(descriptor?);
                socket.set_read_timeout(None).ok()?;
                let guard = Guard::Keeper(Hold(connection));
                return Some(Channel::new(
                    socket,
                    control,
                    Incoming::holding(heard)?,
                    confirmed,
                    Some(guard),
                ));
            }
            Word::Wait => patience = deadline.saturating_duration_since(Instant::now()),
            Word::None => return None,
        }
    }
}

/// Starts a keeper: a process that calls [`super::keep`] with the paths of a master's control socket, its own and its
/// lock, which `program` is given as its last arguments. It lives on when this process ends, and has `most` streams
/// ready at a time.
fn start(mut program: Command, paths: [&Path; 3], recipe: &Recipe, most: u8) -> io::Result<()> {
    let mut child = program
        .args(paths)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        // What kills our process group, as Nix does when a hook has ended, must not kill it.
        .process_group(0)
        .spawn()?;
    match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(&[&[most], recipe.to_bytes().as_slice()].concat()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_and_what_is_given_survive_the_way() {
        let recipe = Recipe { socket_path: "/a/socket".into(), words: vec![0, 1, 255] };
        let bytes = recipe.to_bytes();
        assert_eq!(Recipe::from_bytes(&bytes), Some(recipe));
        for end in 0..13 {
            assert_eq!(Recipe::from_bytes(&bytes[..end]), None, "cut at {end}");
        }
        let long = Recipe { socket_path: "/s".into(), words: vec![0; Recipe::MAX_WORDS + 1] };
        assert_eq!(Recipe::from_bytes(&long.to_bytes()), None);

        let confirmed = Confirmed { channel: 7, window: 70_000, max_packet: 32_768 };
        let mut packet = Word::Stream { confirmed, heard: b"heard" }.to_packet();
        let Some(Word::Stream { confirmed, heard }) = Word::from_packet(&packet) else { panic!() };
        assert_eq!((confirmed.channel, confirmed.window, confirmed.max_packet), (7, 70_000, 32_768));
        assert_eq!(heard, b"heard");
        assert!((0..HEADER).all(|end| Word::from_packet(&packet[..end]).is_none()));
        // Another window than ours would be counted wrongly.
        packet[16] ^= 1;
        assert!(Word::from_packet(&packet).is_none());
        assert!(Word::from_packet(b"?").is_none() && Word::from_packet(b"").is_none());
    }
}
