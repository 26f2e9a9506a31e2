//! The first words of a TCP connection. To those it turns away (MaxStartups, PerSourcePenalties) sshd says nothing or a
//! line that is no greeting: then what the client has said so far is said again on another connection, a little later.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::AsFd,
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

/// What every SSH client says first (RFC 4253, section 4.2). What others say may not bear being said twice.
const CLIENTS_WORDS: &[u8] = b"SSH-";
/// What sshd says to those it turns away, in one piece (`drop_connection` in sshd.c), unless it is old and silent.
const REFUSALS: [&[u8]; 2] = [b"Exceeded MaxStartups", b"Not allowed at this time"];
/// As much of the host's words as tells.
const GREETING: usize = 32;
/// How long a client may take to say its first words, in milliseconds.
const SOON: u16 = 500;
/// More than this no client says before it has heard anything, in bytes.
const MOST_WORDS: usize = 4096;

/// Passes on what the client says until the host has greeted, or will not. `again` makes another connection after
/// one was turned away, as often as it wants to.
///
/// Returns the connection, with the client's words in it and the host's to be read, and whether the client's input has
/// ended.
pub(super) fn pass(
    mut stream: TcpStream,
    input: &mut File,
    mut again: impl FnMut() -> Option<TcpStream>,
) -> io::Result<(TcpStream, bool)> {
    let mut words = Vec::new();
    loop {
        let [host, client] = wait(&stream, input)?;
        if host {
            let mut greeting = [0; GREETING];
            let end = match stream.peek(&mut greeting) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(len) if len > 0 && !REFUSALS.iter().any(|words| greeting[..len].starts_with(words)) => {
                    return Ok((stream, false));
                }
                end => end,
            };
            if words.is_empty() {
                words = first_words(input)?;
            }
            let next = if words.starts_with(CLIENTS_WORDS) { again() } else { None };
            let Some(next) = next else {
                // An error is seen only once.
                return end.map(|_| (stream, false));
            };
            stream = next;
            // If this fails it is seen at the next look.
            let _ = stream.write_all(&words);
        } else if client {
            let mut chunk = [0; MOST_WORDS];
            let len = match input.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if len == 0 {
                // The host may be waiting for just that.
                return Ok((stream, true));
            }
            words.extend_from_slice(&chunk[..len]);
            if stream.write_all(&chunk[..len]).is_err() {
                continue; // turned away: seen at the next look
            }
            if words.len() > MOST_WORDS {
                return Ok((stream, false));
            }
        }
    }
}

/// What the client says first, if it does soon: that it has not yet is an accident.
fn first_words(input: &mut File) -> io::Result<Vec<u8>> {
    let mut fds = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    if !matches!(poll(&mut fds, SOON), Ok(1..)) {
        return Ok(Vec::new());
    }
    let mut words = vec![0; MOST_WORDS];
    let len = input.read(&mut words)?;
    words.truncate(len);
    Ok(words)
}

/// Who has something to say.
fn wait(stream: &TcpStream, input: &File) -> io::Result<[bool; 2]> {
    let mut fds = [stream.as_fd(), input.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) => return Ok(fds.map(|fd| fd.any().unwrap_or_default())),
        }
    }
}

/// How long to wait before the next try, and after how many there is none.
pub(super) fn pauses() -> impl Iterator<Item = Duration> {
    (0..5).map(|doublings| Duration::from_millis(300) * (1 << doublings))
}
