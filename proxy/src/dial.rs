//! A TCP connection to a host by its name, on whichever of its addresses answers first.
//!
//! As RFC 8305 has it: the addresses in the resolver's order with both families in turns, the next one tried when
//! one has failed or has not answered for a quarter of a second.

use std::{
    fmt,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;

/// How long an address may take before the next one is tried too.
const STAGGER: Duration = Duration::from_millis(250);
/// More addresses than this are not tried.
const MOST_ADDRESSES: usize = 16;

/// Why there is no connection.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DialError {
    /// The name means nothing.
    #[error("the host name cannot be resolved")]
    Resolve(#[source] io::Error),
    /// The resolver or the host did not answer in time.
    #[error("no answer within {} s", crate::exit::seconds(*bound))]
    TimedOut {
        /// The bound that was given.
        bound: Duration,
    },
    /// Every address said no.
    #[error("{0}")]
    Failed(Refusals),
}

impl DialError {
    /// Where there is no network it fails like this.
    pub fn may_lack_network(&self) -> bool {
        match self {
            DialError::Resolve(_) => true,
            DialError::TimedOut { .. } => false,
            DialError::Failed(Refusals(refusals)) => {
                refusals.iter().any(|(_, error)| error.kind() == ErrorKind::NetworkUnreachable)
            }
        }
    }
}

/// What each address said, in the order in which they failed.
#[derive(Debug)]
pub struct Refusals(Vec<(SocketAddr, io::Error)>);

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (address, error)) in self.0.iter().enumerate() {
            write!(f, "{}{}: {error}", if index > 0 { ", " } else { "" }, address.ip())?;
        }
        Ok(())
    }
}

/// Connects, within `bound`.
///
/// # Errors
/// [`DialError`]
pub fn dial(host: &str, port: u16, bound: Duration) -> Result<TcpStream, DialError> {
    let deadline = Instant::now() + bound;
    let addresses = in_turns(resolve(host, port, deadline, bound)?);
    if addresses.is_empty() {
        return Err(DialError::Resolve(io::Error::new(ErrorKind::NotFound, "it has no address")));
    }
    let (done, results) = mpsc::channel();
    let mut waiting = addresses.into_iter().take(MOST_ADDRESSES);
    let mut running = 0;
    let mut refusals = Vec::new();
    loop {
        if let Some(address) = waiting.next() {
            try_one(address, deadline, done.clone());
            running += 1;
        } else if running == 0 {
            return Err(DialError::Failed(Refusals(refusals)));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let patience = if waiting.len() > 0 { STAGGER.min(left) } else { left };
        match results.recv_timeout(patience) {
            Ok((_, Ok(stream))) => return Ok(stream),
            Ok((address, Err(error))) => {
                running -= 1;
                refusals.push((address, error));
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
            Err(_) => return Err(DialError::TimedOut { bound }),
        }
    }
}

/// The resolver has clocks of its own, so it works in a thread that is not waited for.
fn resolve(host: &str, port: u16, deadline: Instant, bound: Duration) -> Result<Vec<SocketAddr>, DialError> {
    let (done, result) = mpsc::channel();
    // Brackets are a way to write an IPv6 address, not part of it.
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned();
    thread::spawn(move || done.send((bare.as_str(), port).to_socket_addrs().map(Vec::from_iter)));
    match result.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(found) => found.map_err(DialError::Resolve),
        Err(_) => Err(DialError::TimedOut { bound }),
    }
}

fn try_one(address: SocketAddr, deadline: Instant, done: Sender<(SocketAddr, io::Result<TcpStream>)>) {
    thread::spawn(move || {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        // Nobody listens any more when another address was faster.
        let _ = done.send((address, TcpStream::connect_timeout(&address, left)));
    });
}

/// The family of the first address first, then both in turns.
fn in_turns(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let Some(first) = addresses.first().map(SocketAddr::is_ipv6) else { return addresses };
    let (one, other): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|a| a.is_ipv6() == first);
    let len = one.len().max(other.len());
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    (0..len).flat_map(|_| [one.next(), other.next()]).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn both_families_take_turns_and_the_resolvers_first_choice_stays_first() {
        let parse = |list: &[&str]| -> Vec<SocketAddr> { list.iter().map(|a| a.parse().unwrap()).collect() };
        let mixed = parse(&["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1", "2.2.2.2:1"]);
        let turns = parse(&["[::1]:1", "1.1.1.1:1", "[::2]:1", "2.2.2.2:1", "[::3]:1"]);
        assert_eq!(in_turns(mixed), turns);
        assert_eq!(in_turns(parse(&["1.1.1.1:1", "[::1]:1"])), parse(&["1.1.1.1:1", "[::1]:1"]));
        assert_eq!(in_turns(Vec::new()), []);
    }

    #[test]
    fn one_family_that_refuses_does_not_hide_the_other() {
        // localhost has both families where there is IPv6; the listener has only one.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stream = dial("localhost", port, Duration::from_secs(5)).unwrap();
        assert_eq!(stream.peer_addr().unwrap().port(), port);
    }

    #[test]
    fn failures_say_what_each_address_said() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = dial("127.0.0.1", free, Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().starts_with("127.0.0.1: Connection refused"), "{error}");
        let error = dial("no-such-host.invalid", 22, Duration::from_secs(20)).unwrap_err();
        assert!(matches!(error, DialError::Resolve(_)), "{error:?}");
    }

    #[test]
    fn a_full_queue_is_given_up_in_time() {
        // A listener that nobody accepts from drops what comes when its queue is full.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queue = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            queue.push(stream);
        }
        let begin = Instant::now();
        let error = dial("127.0.0.1", address.port(), Duration::from_millis(300)).unwrap_err();
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
        let late = matches!(&error, DialError::TimedOut { .. }) || error.to_string().contains("timed out");
        assert!(late, "{error:?}");
    }
}
