//! Being a ProxyCommand: from a host and a port to a byte stream on stdin and stdout, or to a connected
//! descriptor for the ssh that asked.
//!
//! The ways, in this order: the masters of a jump host, if one is named; else TCP; else a living master to the host
//! itself. A way that failed lately is not tried again before its time.

mod error;
mod jump;
mod opening;

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    net::TcpStream,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use crate::{
    dial::{DialError, dial},
    down::{Memory, Probe, dice},
    exit,
    master::{CloseWrite, Endpoint, Forward, Master, OpenError, Pool, StartError, TimedRead, pace::Pace},
    network,
    passing::send_descriptor,
    wake::Waker,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, Shutdown, SockaddrLike, SockaddrStorage, getsockname, setsockopt, shutdown, sockopt,
    },
    unistd::{dup2_stdin, dup2_stdout},
};

pub use error::TunnelError;

/// How long a master that nobody asked for may take to connect.
const UNASKED_BOUND: Duration = Duration::from_secs(3);
/// How long a waiting process leaves a host alone between two attempts; chance makes it up to half longer.
const WAIT_INTERVAL: Duration = Duration::from_secs(1);
/// How long a connection counts as one that is logging in.
const LOGIN_TIME: Duration = Duration::from_secs(2);
/// How long to wait for a turn at least: two hundred that take their time to log in.
const TURN_BOUND: Duration = Duration::from_secs(45);
/// What is copied at once, in bytes.
const CHUNK: usize = 128 * 1024;

/// What a ProxyCommand is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The host.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The jump host.
    pub via: Option<Endpoint>,
    /// Hand over a descriptor (`ProxyUseFdpass yes`).
    pub fdpass: bool,
    /// How long one attempt may take.
    pub bound: Duration,
    /// Wait that long for a host that is down.
    pub wait: Option<Duration>,
}

/// What was found.
enum Link {
    /// The master carries stdin and stdout.
    Carried {
        forward: Forward,
        via: String,
    },
    /// A socket to the host, or to the master that carries it there.
    Socket(UnixStream),
    Tcp(TcpStream),
}

/// Finds a way and serves it to its end, which with `fdpass` is at once.
///
/// # Errors
/// [`TunnelError`]
pub fn run(pool: &Pool, request: &Request) -> Result<(), TunnelError> {
    if request.fdpass && !is_unix_socket(io::stdout().as_fd()) {
        return Err(TunnelError::NoSocket);
    }
    let deadline = request.wait.and_then(|wait| Instant::now().checked_add(wait));
    let given_up = pool.time_for_start().and_then(|time| Instant::now().checked_add(time));
    let mut deadline = deadline;
    let link = loop {
        let error = match find(pool, request, deadline) {
            Ok(link) => break link,
            Err(error) => error,
        };
        // Who was told to wake up is waited for, all by itself.
        if let TunnelError::Waking { waking, .. } | TunnelError::Start(StartError::Waking { waking, .. }) =
            &error
        {
            deadline = deadline.max(Instant::now().checked_add(waking.left));
            deadline = deadline.into_iter().chain(given_up).min();
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match left {
            Some(left) if !left.is_zero() && error.is_worth_waiting() && !keeps(request, &error) => {
                thread::sleep(WAIT_INTERVAL.mul_f64(1.0 + dice() / 2.0).min(left));
            }
            _ => return Err(error),
        }
    };
    tracing::debug!(host = request.host, port = request.port, way = link.name(), "connected");
    match link {
        Link::Carried { forward, via } => {
            release_stdio().map_err(|source| TunnelError::Broken { host: request.host.clone(), source })?;
            forward.wait().map_err(|source| TunnelError::MasterLost {
                host: request.host.clone(),
                via,
                source,
            })
        }
        Link::Socket(socket) if request.fdpass => hand_over(socket),
        Link::Tcp(stream) if request.fdpass => hand_over(stream),
        Link::Socket(socket) => io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .and_then(|input| copy(socket, File::from(input), false))
            .map_err(|source| TunnelError::Broken { host: request.host.clone(), source }),
        Link::Tcp(stream) => serve(pool, request, stream)
            .map_err(|source| TunnelError::Broken { host: request.host.clone(), source }),
    }
}

/// How a host that answers was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    /// Over a master that was there.
    Found,
    /// Over a new one.
    Started,
}

/// Runs a command on the far side, on another master if the one that is there cannot, on a new one if its link turns out
/// to be dead. `bound` is for each.
///
/// # Errors
/// [`TunnelError`]
pub fn check(pool: &Pool, endpoint: &Endpoint, bound: Duration) -> Result<Checked, TunnelError> {
    let found = pool.live(endpoint);
    if found.is_none() {
        pool.start_waking(endpoint, bound, "true")?;
    }
    let socket = found.map(|master| master.control_path().to_owned());
    let ran_on = pool.with_master(
        endpoint,
        Instant::now() + bound.saturating_mul(2),
        "true",
        |master| match run_true(master, bound, bound) {
            Ok(true) => Ok(master.control_path().to_owned()),
            Ok(false) => Err(TunnelError::Endless { destination: endpoint.destination.clone(), bound }),
            Err(source) => Err(unanswered(endpoint, source)),
        },
        |error| match error {
            TunnelError::Unanswered { source, .. } => Some(source),
            _ => None,
        },
    )?;
    Ok(if socket == Some(ran_on) { Checked::Found } else { Checked::Started })
}

fn unanswered(endpoint: &Endpoint, source: OpenError) -> TunnelError {
    TunnelError::Unanswered { destination: endpoint.destination.clone(), source }
}

/// Has the far side run `true`. That it is begun within `bound` takes an answer from there. Whether it has ended `grace` later
/// is another matter: sshd may run something else instead (ForceCommand), which is given no input to wait for.
fn run_true(master: &Master, bound: Duration, grace: Duration) -> Result<bool, OpenError> {
    let (mut reader, mut writer, _status) = master.open_session("true", bound)?.split();
    // If this fails the session has ended already.
    let _ = writer.shutdown();
    // A login shell may say something first; what counts is that it comes to an end.
    let _ = reader.set_timeout(Some(grace.max(Duration::from_millis(1))));
    let end = Instant::now() + grace;
    let mut chunk = [0; 4096];
    loop {
        match reader.read(&mut chunk) {
            Ok(0) => return Ok(true),
            Ok(_) if Instant::now() < end => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => return Ok(false),
        }
    }
}

impl Link {
    fn name(&self) -> &'static str {
        match self {
            Link::Carried { .. } | Link::Socket(_) => "master",
            Link::Tcp(_) => "tcp",
        }
    }
}

fn find(pool: &Pool, request: &Request, deadline: Option<Instant>) -> Result<Link, TunnelError> {
    // The master to the jump host may itself be started through us: its way there is a direct one.
    match request.via.as_ref().filter(|via| !pool.is_starting(via)) {
        Some(via) => jump::through(pool, via, request, deadline),
        None => direct(pool, request, deadline),
    }
}

fn direct(pool: &Pool, request: &Request, deadline: Option<Instant>) -> Result<Link, TunnelError> {
    let (host, port) = (&request.host, request.port);
    let memory = Memory::of(pool.directory(), format!("{host} {port}"));
    if deadline.is_none()
        && memory.pause(SystemTime::now()).is_some()
        && let Some(link) = over_its_master(pool, request, || take_turn(pool, request).is_ok())
    {
        return Ok(link);
    }
    let _probe = not_down(&memory, pool, deadline, host, || format!("{host} port {port}"))?;
    take_turn(pool, request)?;
    let source = match connect(request) {
        Ok(stream) => {
            reached(&memory, pool, host);
            return Ok(Link::Tcp(stream));
        }
        Err(source) => source,
    };
    let lacks_network = source.may_lack_network() && network::is_absent();
    let error = TunnelError::Direct { host: host.clone(), port, source };
    if let Some(link) = over_its_master(pool, request, || true) {
        // The host is up; it is this way to it that need not be tried again at once.
        memory.failed(&exit::reason(&error), SystemTime::now());
        return Ok(link);
    }
    // A lack of network is no fault of the host's.
    Err(if lacks_network { error } else { failed(&memory, pool, host, error) })
}

/// The last way: over a living master to the host itself, which nobody asked for. It comes behind TCP, because sshd sees
/// such a login come from itself (`from=` and `Match Address` would count only while a master lives), and many a host
/// cannot reach its own address. The master gets none of our descriptors, so that another attempt can follow; and it is not
/// ended whatever comes of this, for it has its own users.
fn over_its_master(pool: &Pool, request: &Request, turn: impl Fn() -> bool) -> Option<Link> {
    let (host, port) = (&request.host, request.port);
    // What serves the start of a master must not hang on another one to the same host.
    if pool.serves_a_start() {
        return None;
    }
    let master = pool.live_to(host, port)?;
    let memory = Memory::of(pool.directory(), format!("{host} {port} over its own master"));
    let _probe = memory.admit(SystemTime::now()).ok()?;
    if !turn() {
        return None;
    }
    match master.connect_to(host, port, request.bound.min(UNASKED_BOUND)) {
        Ok(socket) => {
            memory.clear();
            Some(Link::Socket(socket))
        }
        Err(error) => {
            tracing::debug!(host, %error, "the master to the host itself is of no use");
            memory.failed(&exit::reason(&error), SystemTime::now());
            None
        }
    }
}

/// By TCP. The end of a host that falls silent is seen by nobody else, where ssh is handed the connection.
fn connect(request: &Request) -> Result<TcpStream, DialError> {
    let stream = dial(&request.host, request.port, request.bound)?;
    // Without it the connection is as good until then.
    let _ = setsockopt(&stream, sockopt::KeepAlive, &true);
    Ok(stream)
}

/// Not all at once: see [`Pace`]. A start of a master has had its turn already.
fn take_turn(pool: &Pool, request: &Request) -> Result<(), TunnelError> {
    let (host, port) = (&request.host, request.port);
    if pool.serves_a_start() {
        return Ok(());
    }
    // Others before us are no fault of the host's, so this is not part of its time.
    let bound = TURN_BOUND.max(request.bound);
    let deadline = Instant::now() + bound;
    let crowded = || TunnelError::Crowded { host: host.clone(), port, bound };
    let pace = pace(pool, request);
    if !pace.take_turn(deadline) {
        return Err(crowded());
    }
    if request.fdpass {
        // Nobody is left to hold a place, so it goes slower.
        return pace.take_turn(deadline).then_some(()).ok_or_else(crowded);
    }
    let login = pace.log_in(deadline).ok_or_else(crowded)?;
    // When the process ends sooner the place is free sooner.
    thread::spawn(move || {
        thread::sleep(LOGIN_TIME);
        drop(login);
    });
    Ok(())
}

fn pace(pool: &Pool, request: &Request) -> Pace {
    let per_second = pool.settings().of_host(&request.host).connections_per_second;
    Pace::of(pool.directory(), &request.host, request.port, per_second)
}

fn reached(memory: &Memory, pool: &Pool, host: &str) {
    memory.clear();
    if let Some(wake) = pool.settings().of_host(host).wake {
        Waker::of(pool.directory(), host, &wake).awake();
    }
}

/// The host is down: that is remembered, and it is woken if it is set how.
fn failed(memory: &Memory, pool: &Pool, host: &str, error: TunnelError) -> TunnelError {
    memory.failed(&exit::reason(&error), SystemTime::now());
    let Some(wake) = pool.settings().of_host(host).wake else { return error };
    let (host, source) = (host.to_owned(), Box::new(error));
    let waking = Waker::of(pool.directory(), &host, &wake).wake(SystemTime::now());
    if waking.is_ok() {
        // It is tried often now, so the pauses must not grow. What is seen at the end is known from then on.
        memory.clear();
        memory.failed(&exit::reason(&*source), SystemTime::now());
    }
    match waking {
        Ok(waking) if waking.left.is_zero() => *source,
        Ok(waking) => TunnelError::Waking { host, waking, source },
        Err(source) => TunnelError::Wake { host, source },
    }
}

fn open_on(master: &Master, request: &Request, bound: Duration) -> Result<Link, OpenError> {
    let Request { host, port, .. } = request;
    if request.fdpass {
        return Ok(Link::Socket(master.connect_to(host, *port, bound)?));
    }
    let forward = master.carry(host, *port, io::stdin().as_fd(), io::stdout().as_fd(), bound)?;
    Ok(Link::Carried { forward, via: master.destination().to_owned() })
}

/// How long a master may take to open a stream. Who waits for the host waits for the jump host's own answer, for one
/// that was given up may still come to life and read what is meant for the next attempt.
fn patience(request: &Request, deadline: Option<Instant>, now: Instant) -> Duration {
    match deadline {
        Some(deadline) if !request.fdpass => deadline.saturating_duration_since(now).max(request.bound),
        _ => request.bound,
    }
}

/// Whether the master may still carry our stdin and stdout somewhere: it has them and has not answered. Then nobody
/// else can have them before it is gone.
fn keeps_descriptors(request: &Request, error: &OpenError) -> bool {
    !request.fdpass && matches!(error, OpenError::TimedOut { .. } | OpenError::Protocol(_))
}

fn keeps(request: &Request, error: &TunnelError) -> bool {
    match error {
        TunnelError::Via { source, .. } | TunnelError::Silent { source, .. } => {
            keeps_descriptors(request, source)
        }
        TunnelError::Waking { source, .. } => keeps(request, source),
        _ => false,
    }
}

/// Whoever is the one to try again keeps what this gives until that has ended.
fn not_down(
    memory: &Memory,
    pool: &Pool,
    deadline: Option<Instant>,
    host: &str,
    way: impl Fn() -> String,
) -> Result<Option<Probe>, TunnelError> {
    // Who waits tries at a pace of its own, and so do all while a host is being woken. A start of a master is made when its
    // starter's own memory says so: refused here it would count as one more attempt that failed, without one.
    if deadline.is_some() || pool.serves_a_start() {
        return Ok(None);
    }
    let down = match memory.admit(SystemTime::now()) {
        Ok(probe) => return Ok(probe),
        Err(down) => down,
    };
    if let Some(wake) = pool.settings().of_host(host).wake {
        // Somebody else may have seen it down this very moment, and be about to wake it.
        let waking = Waker::of(pool.directory(), host, &wake).wake(SystemTime::now());
        if !waking.map_err(|source| TunnelError::Wake { host: host.to_owned(), source })?.left.is_zero() {
            return Ok(None);
        }
    }
    Err(TunnelError::KnownDown { way: way(), down })
}

fn is_unix_socket(fd: impl AsFd) -> bool {
    let address = getsockname::<SockaddrStorage>(fd.as_fd().as_raw_fd());
    address.is_ok_and(|address| address.family() == Some(AddressFamily::Unix))
}

/// As ssh expects it (`ssh_proxy_fdpass_connect` in sshconnect.c): one byte with the descriptor, then our end.
fn hand_over(connection: impl AsFd) -> Result<(), TunnelError> {
    send_descriptor(io::stdout(), connection.as_fd()).map_err(TunnelError::HandOver)
}

/// The master has stdin and stdout now. Were they open here too, their ends would not be seen.
fn release_stdio() -> io::Result<()> {
    let null = null()?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    Ok(())
}

/// Serves a TCP connection to its end; another one, if the host turns it away before it has said a word.
fn serve(pool: &Pool, request: &Request, stream: TcpStream) -> io::Result<()> {
    let (host, port) = (&request.host, request.port);
    let mut pauses = opening::pauses();
    let again = || {
        let pause = pauses.next()?.mul_f64(1.0 + dice() / 2.0);
        tracing::info!(
            event = "a connection was turned away",
            host,
            port,
            "{host} port {port} turned a connection away, trying again"
        );
        let pace = pace(pool, request);
        pace.hold_off(pause);
        pace.take_turn(Instant::now() + TURN_BOUND).then(|| connect(request).ok())?
    };
    // Not those of the standard library, which keep data back.
    let mut input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let (stream, ended) = opening::pass(stream, &mut input, again)?;
    // ssh cannot do this for a pipe.
    stream.set_nodelay(true)?;
    copy(stream, input, ended)
}

/// Copies both ways until both have ended. The end of each is passed on at once.
fn copy(stream: impl Into<OwnedFd>, mut input: File, ended: bool) -> io::Result<()> {
    let stream = File::from(stream.into());
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let up = stream.try_clone()?;
    let upwards = thread::spawn(move || {
        let result = if ended { Ok(()) } else { pump(&mut input, &mut &up) };
        // What was written before is still sent.
        let _ = shutdown(up.as_raw_fd(), Shutdown::Write);
        result
    });
    // When this fails the other direction is not waited for: the process ends, and with it the connection.
    if downwards(&stream, &output)? == Ending::NobodyReads {
        return Ok(());
    }
    drop(output);
    dup2_stdout(null()?)?;
    match upwards.join() {
        // After its own end the host is free to take no more.
        Ok(Err(error))
            if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

#[derive(PartialEq, Eq)]
enum Ending {
    EndOfStream,
    NobodyReads,
}

/// From the host to stdout. That nobody reads there any more is seen while nothing comes, too.
fn downwards(mut stream: &File, mut output: &File) -> io::Result<Ending> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let mut fds =
            [PollFd::new(stream.as_fd(), PollFlags::POLLIN), PollFd::new(output.as_fd(), PollFlags::empty())];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP;
        if fds[1].revents().is_some_and(|events| events.intersects(gone)) {
            return Ok(Ending::NobodyReads);
        }
        let written = match stream.read(&mut chunk) {
            Ok(0) => return Ok(Ending::EndOfStream),
            Ok(len) => output.write_all(&chunk[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Ending::NobodyReads),
            other => other?,
        }
    }
}

/// Not `io::copy`: between a socket and a pipe it would splice, and the kernel keeps the pipe locked while it
/// waits for the socket, so that what is in the pipe already cannot be read.
fn pump(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(len) => to.write_all(&chunk[..len])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn null() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_with_a_stream_lets_the_jump_host_answer() {
        let bound = Duration::from_secs(10);
        let mut request = Request { host: "h".into(), port: 22, via: None, fdpass: false, bound, wait: None };
        let now = Instant::now();
        let later = |seconds| Some(now + Duration::from_secs(seconds));
        assert_eq!(patience(&request, None, now), bound);
        assert_eq!(patience(&request, later(60), now), Duration::from_secs(60));
        assert_eq!(patience(&request, later(1), now), bound);
        let late = OpenError::TimedOut { bound, master_answers: true };
        assert!(keeps_descriptors(&request, &late));
        assert!(!keeps_descriptors(&request, &OpenError::Refused { reason: String::new() }));
        request.fdpass = true;
        assert_eq!(patience(&request, later(60), now), bound);
        assert!(!keeps_descriptors(&request, &late));
    }
}
