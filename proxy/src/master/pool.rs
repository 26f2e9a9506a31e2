//! The masters of one user: find a living one, start one once, check it, retire it.
//!
//! A line here must not parse the mux protocol, nor know what the streams are for.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::BorrowedFd,
        unix::{
            fs::{MetadataExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde_json::{Value, json};
use thiserror::Error;

use super::{
    Channel, Forward, OpenError, Session, channel, connect,
    diagnosis::{CURE_OF_PROXY, SAID_BY_PROXY, StartError},
    directory::{self, DirectoryError},
    forward,
    mux::{self, Health},
    name::{self, Endpoint},
    process,
    start::{self, ALIVE_BOUND, Attempt, Files, Setback},
};

/// How often a lock that somebody else holds is tried again.
const LOCK_INTERVAL: Duration = Duration::from_millis(5);
/// How long stopping waits for the lock, and for ssh to go before it is killed.
const STOP_BOUND: Duration = Duration::from_secs(5);
/// How much longer than its own bound a start waits for that of another, so that two which began together
/// end with the same error.
const SHARE_GRACE: Duration = Duration::from_secs(1);
/// How long retiring waits for the lock: who holds it is about to replace the master anyway.
const RETIRE_BOUND: Duration = Duration::from_millis(500);

/// The port of ssh where none is given.
const SSH_PORT: u16 = 22;
/// How many masters may be started for each other's sake.
const LONGEST_CHAIN: usize = 8;

/// The masters of this user, in one runtime directory.
#[derive(Debug, Clone)]
pub struct Pool {
    directory: PathBuf,
}

/// Why the masters could not be listed, or one not be stopped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PoolError {
    /// A file of the runtime directory cannot be used.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another process is starting or stopping it.
    #[error("another process is starting or stopping the master to {destination}")]
    Busy {
        /// Its destination.
        destination: String,
    },
    /// It does not go.
    #[error("the master to {destination} does not end")]
    Stubborn {
        /// Its destination.
        destination: String,
    },
}

/// What is known of a master.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MasterInfo {
    /// The destination as it was given.
    pub destination: String,
    /// Its process.
    pub pid: u32,
    /// Its control socket.
    pub control_path: PathBuf,
    /// Its log.
    pub log_path: PathBuf,
    /// When it was started.
    pub started_at: SystemTime,
    /// It answers.
    pub alive: bool,
    /// How many clients have connections to it: streams, sessions, forwards. None where the kernel does not tell.
    pub channels: Option<usize>,
    name: String,
    born: Option<String>,
    port: Option<u16>,
}

/// A master that was alive when this value was made.
#[derive(Debug, Clone)]
pub struct Master {
    files: Files,
    destination: String,
    socket_identity: Option<(u64, i64, i64)>,
}

impl Pool {
    /// The masters of a runtime directory, which is made (0700) if need be; its parent must exist.
    ///
    /// # Errors
    /// When the directory cannot be made or others could meddle with it.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, DirectoryError> {
        let directory = directory.into();
        directory::ensure(&directory)?;
        Ok(Pool { directory })
    }

    /// The masters of the usual directory: `NIX_OFFLOAD_RUNTIME_DIR`, else `/run/nix-offload` for root,
    /// `$XDG_RUNTIME_DIR/nix-offload` for others, else `/tmp/nix-offload-UID`.
    ///
    /// # Errors
    /// As [`Pool::open`].
    pub fn from_env() -> Result<Self, DirectoryError> {
        Pool::open(directory::by_environment(|name| std::env::var_os(name)))
    }

    /// The runtime directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The master if there is one that takes connections. Starts nothing and does not wait: microseconds.
    pub fn live(&self, endpoint: &Endpoint) -> Option<Master> {
        let files = self.files(endpoint);
        connect(&files.socket, Instant::now()).ok()?;
        Some(Master::new(files, endpoint))
    }

    /// The master, started if there is none that answers within a second. Concurrent calls, of whatever
    /// process, start one and share its success or its failure. `first_command` runs on a new master once;
    /// what it prints is [`Master::first_output`]. Returns after `bound`, or up to
    /// two seconds later if a hung master or another process's start is in the way.
    ///
    /// # Errors
    /// What was in the way, with its cure: [`StartError::cure`].
    pub fn start(
        &self,
        endpoint: &Endpoint,
        bound: Duration,
        first_command: &str,
    ) -> Result<Master, StartError> {
        let deadline = Instant::now() + bound;
        endpoint.check()?;
        let files = self.files(endpoint);
        if let Some(excess) = name::excess_length(&files.socket) {
            return Err(StartError::PathTooLong { control: files.socket, excess });
        }
        if let Health::Alive { .. } = mux::health(&files.socket, ALIVE_BOUND) {
            return Ok(Master::new(files, endpoint));
        }
        let failed_before = fs::read(&files.failure).ok();
        let io_error = |source| StartError::Io { path: files.lock.clone(), source };
        let Some(_lock) = lock(&files.lock, deadline + SHARE_GRACE).map_err(io_error)? else {
            return Err(StartError::Busy { destination: endpoint.destination.clone(), bound });
        };
        // Whoever had the lock before us has tried for us too.
        match mux::health(&files.socket, ALIVE_BOUND) {
            Health::Alive { .. } => return Ok(Master::new(files, endpoint)),
            Health::Hung => {
                tracing::warn!(
                    destination = endpoint.destination,
                    "SSH master does not answer, replacing it"
                );
                kill_recorded(&files);
            }
            Health::Absent => {}
        }
        let failed_now = fs::read(&files.failure).ok();
        if let Some(setback) =
            failed_now.filter(|now| Some(now) != failed_before.as_ref()).as_deref().and_then(read_failure)
        {
            return Err(setback.explain(endpoint, &files, bound));
        }
        remove(&files.socket).map_err(|source| StartError::Io { path: files.socket.clone(), source })?;
        forward::remove_all(&files.socket);

        let began = Instant::now();
        let left = deadline.saturating_duration_since(began);
        match start::attempt(endpoint, &files, left, first_command)? {
            Attempt::Started { pid } => {
                let took = began.elapsed().as_millis() as u64;
                tracing::info!(
                    destination = endpoint.destination,
                    pid,
                    milliseconds = took,
                    "SSH master started"
                );
                if let Err(error) = start::write_whole(&files.record, &record(endpoint, pid)) {
                    tracing::warn!(path = %files.record.display(), %error, "cannot record the SSH master");
                }
                let _ = remove(&files.failure);
                Ok(Master::new(files, endpoint))
            }
            Attempt::Failed(setback) => {
                // If it cannot be shared, the others try for themselves.
                let _ = start::write_whole(&files.failure, &failure(&setback));
                let error = setback.explain(endpoint, &files, bound);
                tracing::warn!(destination = endpoint.destination, %error, "SSH master not started");
                Err(error)
            }
        }
    }

    /// All masters that were started and not stopped, by destination. Each is asked whether it lives.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<MasterInfo>, PoolError> {
        let io_error = |source| PoolError::Io { path: self.directory.clone(), source };
        let mut masters = Vec::new();
        // Before we ask, for that makes a connection too.
        let sockets = fs::read_to_string("/proc/net/unix").ok();
        for entry in fs::read_dir(&self.directory).map_err(io_error)? {
            let name = entry.map_err(io_error)?.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".json")) else { continue };
            let files = Files::new(&self.directory, name);
            if let Some(mut info) = read_record(&files) {
                info.alive = matches!(mux::health(&files.socket, ALIVE_BOUND), Health::Alive { .. });
                info.channels = sockets.as_deref().and_then(|text| clients(text, &files.socket));
                masters.push(info);
            }
        }
        masters.sort_by(|a, b| (&a.destination, &a.name).cmp(&(&b.destination, &b.name)));
        Ok(masters)
    }

    /// The master to a host, if a living one was started with that very name (and port, 22 if it had none).
    /// Aliases of ssh_config are not looked through. Starts nothing and does not wait.
    pub fn live_to(&self, host: &str, port: u16) -> Option<Master> {
        for entry in fs::read_dir(&self.directory).ok()?.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".json")) else { continue };
            let files = Files::new(&self.directory, name);
            let Some(info) = read_record(&files) else { continue };
            let its_host = info.destination.rsplit_once('@').map_or(&*info.destination, |(_, host)| host);
            if its_host == host
                && info.port.unwrap_or(SSH_PORT) == port
                && connect(&files.socket, Instant::now()).is_ok()
            {
                return Some(Master::of(files, info.destination));
            }
        }
        None
    }

    /// Whether this process works for the start of a master: it is the ProxyCommand of an ssh that a pool
    /// started. Then it must not wait for that master, nor use one to the same host.
    pub fn serves_a_start(&self) -> bool {
        !start::starting().is_empty()
    }

    /// Whether this process works for the start of that very master, so that waiting for it would be a circle.
    /// A chain of starts that is too long for any sensible configuration counts as one too.
    pub fn is_starting(&self, endpoint: &Endpoint) -> bool {
        let starting = start::starting();
        starting.len() >= LONGEST_CHAIN || starting.contains(&endpoint.name())
    }

    /// How much time this process has, if it works for the start of a master: whoever waits for that gives up soon
    /// afterwards, and would not hear why there is no way.
    pub fn time_for_start(&self) -> Option<Duration> {
        start::time_left()
    }

    /// Leaves a line, and one with the cure, for whoever waits for the start that this process works for: such an
    /// ssh throws its ProxyCommand's stderr away (`ssh_proxy_connect` in sshconnect.c).
    pub fn tell_starter(&self, line: &str, cure: Option<&str>) {
        let Some(name) = start::starting().pop() else { return };
        // Its own log must be there; a new file would be nobody's.
        let log = OpenOptions::new().append(true).open(Files::new(&self.directory, &name).log);
        let cure = cure.map_or_else(String::new, |cure| format!("{CURE_OF_PROXY}{cure}\n"));
        let _ = log.and_then(|mut log| log.write_all(format!("{SAID_BY_PROXY}{line}\n{cure}").as_bytes()));
    }

    /// Ends a master at once, with all its streams, and removes its files except the log.
    ///
    /// # Errors
    /// When another process is busy with it, or when it does not go.
    pub fn stop(&self, master: &MasterInfo) -> Result<(), PoolError> {
        let files = Files::new(&self.directory, &master.name);
        let io_error = |path: &Path| {
            let path = path.to_owned();
            move |source| PoolError::Io { path, source }
        };
        let Some(_lock) = lock(&files.lock, Instant::now() + STOP_BOUND).map_err(io_error(&files.lock))?
        else {
            return Err(PoolError::Busy { destination: master.destination.clone() });
        };
        match mux::health(&files.socket, ALIVE_BOUND) {
            // The socket is ours alone, so what answers there is the master.
            Health::Alive { pid } => {
                if let Some(born) = process::birth(pid) {
                    process::end(pid, &born, STOP_BOUND);
                }
            }
            Health::Hung => {
                kill_recorded(&files);
            }
            Health::Absent => {}
        }
        if !matches!(mux::health(&files.socket, ALIVE_BOUND), Health::Absent) {
            return Err(PoolError::Stubborn { destination: master.destination.clone() });
        }
        tracing::info!(destination = master.destination, pid = master.pid, "SSH master stopped");
        forward::remove_all(&files.socket);
        // The lock last, and while it is held: see `lock`.
        for path in [&files.socket, &files.record, &files.output, &files.hosts, &files.failure, &files.lock] {
            remove(path).map_err(io_error(path))?;
        }
        Ok(())
    }

    fn files(&self, endpoint: &Endpoint) -> Files {
        Files::new(&self.directory, &endpoint.name())
    }
}

impl Master {
    fn new(files: Files, endpoint: &Endpoint) -> Self {
        Master::of(files, endpoint.destination.clone())
    }

    fn of(files: Files, destination: String) -> Self {
        let socket_identity = socket_identity(&files.socket);
        Master { files, destination, socket_identity }
    }

    /// What the first command wrote to stdout (its first 4 KiB, without blanks around it), if it succeeded.
    pub fn first_output(&self) -> Option<String> {
        start::first_output(&self.files)
    }

    /// Opens a stream to a unix socket on the far side: no shell, no process, and it is closed there as soon
    /// as it is dropped here. Does not count against sshd's MaxSessions.
    ///
    /// A refusal costs: OpenSSH bears it only while the connection is held, so a small process holds it (and
    /// the master never gets idle) until the master ends. Whoever is refused should not ask again soon.
    ///
    /// # Errors
    /// `Refused` when there is no such socket, nobody listens, or sshd does not allow it; see [`OpenError`].
    pub fn open_unix_socket(&self, path: &str, bound: Duration) -> Result<Channel, OpenError> {
        channel::open(&self.files.socket, path, bound)
    }

    /// Has the far side connect to a host (`ssh -W`), and the master carry `input` there and what comes back
    /// to `output`: nothing passes through this process, which only keeps the value as long as the stream is to
    /// last. Does not count against sshd's MaxSessions.
    ///
    /// # Errors
    /// `Refused` when the far side cannot connect there, or sshd does not allow it; see [`OpenError`].
    pub fn carry(
        &self,
        host: &str,
        port: u16,
        input: BorrowedFd<'_>,
        output: BorrowedFd<'_>,
        bound: Duration,
    ) -> Result<Forward, OpenError> {
        Forward::open(&self.files.socket, host, port, [input, output], bound)
    }

    /// Has the far side connect to a host whose server speaks first, as sshd does, and returns a socket that
    /// is connected to it and needs no process of ours any more.
    ///
    /// # Errors
    /// As [`Master::carry`]; the reason of a refusal is not known.
    pub fn connect_to(&self, host: &str, port: u16, bound: Duration) -> Result<UnixStream, OpenError> {
        forward::socket(&self.files.socket, host, port, bound)
    }

    /// Runs a command in the far user's shell.
    ///
    /// # Errors
    /// `Refused` when sshd has no session to give; see [`OpenError`]. A command that does not exist is no
    /// error here: the shell on the far side says so, and exits with 127.
    pub fn open_session(&self, command: &str, bound: Duration) -> Result<Session, OpenError> {
        Session::open(&self.files.socket, command, bound)
    }

    /// Gives the master up, because it is dead, hung, or its link is: it is killed if it is still the process
    /// that was started, and its socket removed, so that the next start makes a new one. Does nothing to
    /// a master that has replaced it meanwhile. True when this one is gone, so that it cannot do any more what it
    /// was asked to do.
    pub fn retire(&self) -> bool {
        let is_there = || {
            let now = socket_identity(&self.files.socket);
            now.is_some() && now == self.socket_identity
        };
        let Ok(Some(_lock)) = lock(&self.files.lock, Instant::now() + RETIRE_BOUND) else {
            return !is_there();
        };
        if !is_there() {
            return true;
        }
        tracing::info!(destination = self.destination, "SSH master retired");
        let gone = kill_recorded(&self.files);
        let _ = remove(&self.files.socket);
        gone
    }

    /// The destination as it was given.
    pub fn destination(&self) -> &str {
        &self.destination
    }

    /// The control socket.
    pub fn control_path(&self) -> &Path {
        &self.files.socket
    }

    /// What ssh has to say: its stderr while it connects, its log afterwards.
    pub fn log_path(&self) -> &Path {
        &self.files.log
    }
}

/// How many connections the listener at `socket` has accepted, and those at the sockets where it listened for a
/// moment, from `/proc/net/unix`. ssh bound its socket under a longer name (`muxserver_listen` in mux.c).
fn clients(table: &str, socket: &Path) -> Option<usize> {
    /// Where the flags stand, and the state `SS_CONNECTED`; see net/unix/af_unix.c.
    const FLAGS: usize = 3;
    const STATE: usize = 5;
    const LISTENS: &str = "00010000";
    const CONNECTED: &str = "03";
    let bound_as = format!("{}.", socket.display());
    let mut listens = false;
    let mut count = 0;
    for line in table.lines().skip(1) {
        let mut rest = line.split_whitespace();
        let (Some(flags), Some(state)) = (rest.nth(FLAGS), rest.nth(STATE - FLAGS - 1)) else { continue };
        // The path may have blanks.
        let Some(at) = line.find('/') else { continue };
        let path = &line[at..];
        if path.starts_with(&bound_as) && flags == LISTENS {
            listens = true;
        } else if state == CONNECTED
            && (path.starts_with(&bound_as) || forward::belongs(Path::new(path), socket))
        {
            count += 1;
        }
    }
    listens.then_some(count)
}

/// Tells one control socket from its successor of the same name: inode numbers are used again at once.
fn socket_identity(socket: &Path) -> Option<(u64, i64, i64)> {
    let metadata = fs::symlink_metadata(socket).ok()?;
    Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

/// Takes a lock file, or gives up at the deadline. The file may be removed by whoever holds the lock, so
/// one that has no name any more does not count.
fn lock(path: &Path, deadline: Instant) -> io::Result<Option<Flock<File>>> {
    loop {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) if lock.metadata()?.nlink() > 0 => return Ok(Some(lock)),
            Ok(_) => continue,
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_INTERVAL);
            }
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => return Ok(None),
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Ends the process of the record, if it still is that process. True when it is gone.
fn kill_recorded(files: &Files) -> bool {
    let Some(MasterInfo { pid, born: Some(born), .. }) = read_record(files) else { return false };
    // It had its chance to answer.
    process::end(pid, &born, Duration::from_millis(200));
    process::birth(pid) != Some(born)
}

fn record(endpoint: &Endpoint, pid: u32) -> String {
    let started_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    json!({
        "destination": endpoint.destination,
        "port": endpoint.port,
        "pid": pid,
        "born": process::birth(pid),
        "started-at": started_at,
    })
    .to_string()
}

fn read_record(files: &Files) -> Option<MasterInfo> {
    let record: Value = serde_json::from_slice(&fs::read(&files.record).ok()?).ok()?;
    let started_at = Duration::try_from_secs_f64(record["started-at"].as_f64()?).ok()?;
    Some(MasterInfo {
        destination: record["destination"].as_str()?.to_owned(),
        pid: record["pid"].as_u64()?.try_into().ok()?,
        control_path: files.socket.clone(),
        log_path: files.log.clone(),
        started_at: UNIX_EPOCH.checked_add(started_at)?,
        alive: false,
        channels: None,
        port: record["port"].as_u64().and_then(|port| port.try_into().ok()),
        name: files.name.clone(),
        born: record["born"].as_str().map(str::to_owned),
    })
}

/// A failure as text, different each time.
fn failure(setback: &Setback) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let stamp = format!("{}-{count}-{now}", std::process::id());
    json!({ "stamp": stamp, "timed-out": setback.timed_out, "stderr": setback.stderr }).to_string()
}

fn read_failure(text: &[u8]) -> Option<Setback> {
    let failure: Value = serde_json::from_slice(text).ok()?;
    let timed_out = failure["timed-out"].as_bool()?;
    Some(Setback { timed_out, stderr: failure["stderr"].as_str()?.to_owned() })
}
