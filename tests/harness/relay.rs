//! A long link: a TCP relay that holds back what it passes on, and counts flights.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use crate::Builder;

/// Chunks on their way in one direction of one connection; whoever sends more waits.
const MOST_CHUNKS: usize = 1024;
const CHUNK: usize = 64 << 10;

/// Stands between ssh and an sshd. What it is given comes out half a round trip later, in each direction.
pub struct Relay {
    port: u16,
    flights: Arc<Mutex<Flights>>,
    over: Arc<AtomicBool>,
}

/// A flight is what the client says until it has heard something; a round trip is a flight with its answer.
#[derive(Default)]
struct Flights {
    count: u64,
    /// What the client has said, in bytes.
    bytes: u64,
    /// The client has heard something since it last spoke.
    heard: bool,
}

impl Relay {
    /// Starts one to a port of this machine.
    pub fn to(target: u16, round_trip: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let relay = Self { port, flights: Arc::default(), over: Arc::default() };
        let (flights, over) = (Arc::clone(&relay.flights), Arc::clone(&relay.over));
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { break };
                if over.load(Ordering::Relaxed) {
                    break;
                }
                // A target that is gone looks so to the client, too.
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                carry(&client, &server, round_trip / 2, &flights);
            }
        });
        relay
    }

    /// Where it listens, at 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Lines of ssh_config by which `name` is the builder at the other end.
    pub fn ssh_config(&self, name: &str, builder: &Builder) -> String {
        format!(
            "Host {name}\n  HostName 127.0.0.1\n  Port {}\n  User {}\n  HostKeyAlias [127.0.0.1]:{}\n",
            self.port,
            builder.login(),
            builder.port()
        )
    }

    /// How many flights the client has made so far.
    pub fn flights(&self) -> u64 {
        self.flights.lock().unwrap().count
    }

    /// How many bytes the client has sent so far.
    pub fn sent(&self) -> u64 {
        self.flights.lock().unwrap().bytes
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // The listener is to see it.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn carry(client: &TcpStream, server: &TcpStream, delay: Duration, flights: &Arc<Mutex<Flights>>) {
    for stream in [client, server] {
        stream.set_nodelay(true).unwrap();
    }
    let up = Arc::clone(flights);
    one_way(client, server, delay, move |arrives, bytes| {
        let mut flights = up.lock().unwrap();
        if arrives {
            flights.bytes += bytes as u64;
        }
        if arrives && (flights.heard || flights.count == 0) {
            flights.count += 1;
            flights.heard = false;
        }
    });
    let down = Arc::clone(flights);
    one_way(server, client, delay, move |arrives, _| {
        if !arrives {
            down.lock().unwrap().heard = true;
        }
    });
}

/// `passing` is told of each chunk twice: when it arrives here (true), and when it leaves; and how long it is.
fn one_way(
    from: &TcpStream,
    to: &TcpStream,
    delay: Duration,
    passing: impl Fn(bool, usize) + Clone + Send + 'static,
) {
    let (mut from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    let (sender, receiver): (SyncSender<(Instant, Vec<u8>)>, _) = mpsc::sync_channel(MOST_CHUNKS);
    let leaving = passing.clone();
    thread::spawn(move || deliver(&receiver, to, &|bytes| leaving(false, bytes)));
    thread::spawn(move || {
        let mut chunk = vec![0; CHUNK];
        while let Ok(len @ 1..) = from.read(&mut chunk) {
            passing(true, len);
            if sender.send((Instant::now() + delay, chunk[..len].to_vec())).is_err() {
                break;
            }
        }
    });
}

fn deliver(receiver: &Receiver<(Instant, Vec<u8>)>, mut to: TcpStream, leaving: &dyn Fn(usize)) {
    for (due, chunk) in receiver {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        leaving(chunk.len());
        if to.write_all(&chunk).is_err() {
            return;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
