//! Reaching a store of this machine: a daemon's socket, or a daemon of our own as a child.
//!
//! Must never give a child the descriptors of Nix, nor let it live on without us.

use super::error::last_words;
use super::session::{MORE_DIRECTORIES, shell_word};
use super::{ReachError, Way, left};
use crate::builder::{Ahead, Builder, BuilderError};
use crate::config::Settings;
use crate::plan::here::{self, Here};
use crate::plan::machine::{Machine, Scheme};
use crate::programs;
use crate::wire::worker::Version;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use nix_derivation::StoreDir;
use nix_offload_proxy::exit;
use nix_offload_proxy::master::{self, CloseWrite, Stream, TimedRead};
use std::env;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Bytes of a child's stderr that are kept.
const KEPT: usize = 4096;

/// How long a child that ended may take to be seen so.
const END_BOUND: Duration = Duration::from_secs(1);

/// Most bytes of settings for a child: the kernel takes no more than 128 KiB for one variable.
const MAX_CONFIG: usize = 100 << 10;

/// Why a store of this machine cannot be reached.
#[derive(Debug, Error)]
pub enum LocalError {
    /// Nobody listens to the socket, or not to us.
    #[error("cannot connect to the daemon's socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not even a shell can be started.
    #[error("cannot start '{command}'")]
    Start {
        /// The command.
        command: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The program ended instead of answering.
    #[error("'{command}' {}{}", ended(.status.as_deref()), if stderr.is_empty() { String::new() } else { format!(": {stderr}") })]
    Ended {
        /// The command.
        command: String,
        /// How it ended; none if it goes on.
        status: Option<String>,
        /// What it said.
        stderr: String,
        /// What came instead of a greeting.
        #[source]
        source: Box<BuilderError>,
    },
}

fn ended(status: Option<&str>) -> String {
    status
        .map_or_else(|| "goes on here without an answer".into(), |status| format!("ended here with {status}"))
}

impl LocalError {
    /// What to do about it.
    pub fn cure(&self) -> String {
        match self {
            Self::Socket { .. } => "see whether nix-daemon runs and who may use its socket".into(),
            Self::Start { .. } | Self::Ended { .. } => {
                "run that command here and see what it says; ?remote-program=PATH in the machine's URI names \
                 another program if it is an ssh machine"
                    .into()
            }
        }
    }
}

/// What is known here besides the machine.
#[derive(Debug, Clone)]
pub(super) struct Surroundings {
    socket: PathBuf,
    config: String,
}

impl Surroundings {
    /// From the environment, as `NIX_DAEMON_SOCKET_PATH` and `NIX_STATE_DIR` are read by Nix 2.34
    /// `src/libstore/globals.cc`.
    pub(super) fn new(env: impl Fn(&str) -> Option<OsString>) -> Self {
        let given = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let socket = given("NIX_DAEMON_SOCKET_PATH").unwrap_or_else(|| {
            given("NIX_STATE_DIR")
                .map_or_else(|| super::DAEMON_SOCKET.into(), |state| state.join("daemon-socket/socket"))
        });
        Self { socket, config: String::new() }
    }

    /// Builds of our own daemons follow these settings of Nix, as they do when stock opens the store itself.
    pub(super) fn follow(&mut self, settings: &Settings) {
        // What is about the client's choices, and what must not be handed on by words that others may read.
        const NOT: [&str; 6] =
            ["access-tokens", "build-hook", "builders", "max-jobs", "plugin-files", "store"];
        // What the format of nix.conf cannot hold is left to the files the child reads itself.
        let plain = |value: &str| !value.contains(['\n', '#']) && value.trim() == value;
        let settings =
            settings.0.iter().filter(|(name, value)| !NOT.contains(&name.as_str()) && plain(value));
        let config: String = settings.map(|(name, value)| format!("{name} = {value}\n")).collect();
        if config.len() <= MAX_CONFIG {
            self.config = config;
        }
    }
}

/// Connects to a store of this machine. Nothing is sent ahead: a pipe holds less, and answers come at once.
pub(super) fn connect(
    machine: &Machine,
    here: &Here,
    around: &Surroundings,
    store_dir: &StoreDir,
    bound: Duration,
) -> Result<(Builder, Way), ReachError> {
    let deadline = Instant::now() + bound;
    let greet = |stream| {
        Builder::connect(stream, store_dir.clone(), Version::newest(), left(deadline), Ahead::default())
    };
    let command = match here {
        Here::Socket(path) => {
            let path = path.as_ref().map_or(around.socket.as_path(), Path::new);
            let stream = socket(path, deadline, bound)
                .map_err(|source| LocalError::Socket { path: path.to_owned(), source })?;
            return Ok((greet(stream).map_err(ReachError::Daemon)?, Way::LocalSocket));
        }
        Here::Program => {
            let mut command = format!("{} --stdio", program(machine)?);
            if let Some(store) = machine.uri.param("remote-store") {
                command.push_str(&format!(" --store {}", shell_word(store)));
            }
            command
        }
        Here::Store(base) => {
            format!("nix-daemon --stdio --store {}", shell_word(&here::store_uri(machine, base)))
        }
    };
    let config = if *here == Here::Program { "" } else { &around.config };
    let (stream, child) =
        start(&command, config).map_err(|source| LocalError::Start { command: command.clone(), source })?;
    match greet(stream) {
        Ok(builder) => Ok((builder, Way::Child)),
        Err(error @ (BuilderError::NoDaemon { .. } | BuilderError::Lost { .. })) => {
            let (status, stderr) = child.end();
            child.kill();
            Err(LocalError::Ended { command, status, stderr, source: Box::new(error) }.into())
        }
        Err(error) => Err(ReachError::Daemon(error)),
    }
}

/// The daemon's program, by the machine's `remote-program`. That of an `ssh://` machine is `nix-store`; the daemon is its
/// neighbour.
fn program(machine: &Machine) -> Result<String, ReachError> {
    let Some(named) = machine.uri.param("remote-program") else { return Ok("nix-daemon".into()) };
    let refused = || ReachError::RemoteProgram(named.to_owned());
    let words: Vec<String> = named.split_whitespace().map(shell_word).collect();
    match (words.as_slice(), &machine.uri.scheme) {
        ([], _) => Ok("nix-daemon".into()),
        ([only], Scheme::Ssh) => {
            let directory = only.strip_suffix("nix-store").ok_or_else(refused)?;
            Ok(format!("{directory}nix-daemon"))
        }
        (_, Scheme::Ssh) => Err(refused()),
        (words, _) => Ok(words.join(" ")),
    }
}

fn socket(path: &Path, deadline: Instant, bound: Duration) -> io::Result<Stream> {
    let reader = master::connect(path, deadline).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            let text = format!("it took no connection within {} s", exit::seconds(bound));
            io::Error::new(io::ErrorKind::TimedOut, text)
        }
        _ => error,
    })?;
    let writer = reader.try_clone()?;
    Ok(Stream { reader: Box::new(Socket(reader)), writer: Box::new(Socket(writer)) })
}

/// Starts a daemon that speaks on its standard input and output.
///
/// Pipes, because older daemons splice what they pass on. It is in a process group of its own: what kills ours with
/// SIGKILL would leave it no time to end its builders. It ends, with them, at the end of its input, which comes
/// whatever becomes of us (`MonitorFdHup` in Nix 2.8 to 2.34 `src/libstore/daemon.cc`).
pub(super) fn start(command: &str, config: &str) -> io::Result<(Stream, Arc<Process>)> {
    let text = |name| env::var_os(name).unwrap_or_default();
    let mut path = programs::running_nix().map(OsString::from).unwrap_or_default();
    if !path.is_empty() {
        path.push(":");
    }
    path.push(text("PATH"));
    // What it is asked to build is to be built by it, though this client may build nothing itself and offer all to
    // machines, this one among them. Stock does the former (`maxBuildJobs` in `build-remote.cc`).
    let mut settings = text("NIX_CONFIG");
    settings.push(format!("\n{config}builders =\nmax-jobs = 1\n"));
    let mut child = Command::new("/bin/sh")
        .args(["-c", &format!("PATH=\"$PATH:{MORE_DIRECTORIES}\"; export PATH; exec {command}")])
        .env("PATH", path)
        .env("NIX_CONFIG", settings)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .current_dir("/")
        .process_group(0)
        .spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let process = Arc::new(Process { child: Mutex::new(child), said: Arc::default() });
    let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    let said = Arc::clone(&process.said);
    thread::Builder::new().spawn(move || keep(stderr, &said))?;
    let reader = ChildReader { stdout, timeout: None, process: Arc::clone(&process) };
    let writer = ChildWriter { stdin: Some(stdin), _process: Arc::clone(&process) };
    Ok((Stream { reader: Box::new(reader), writer: Box::new(writer) }, process))
}

/// Reads what a child says so that it never waits for that, and keeps the beginning.
fn keep(mut stderr: ChildStderr, said: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 1024];
    while let Ok(n @ 1..) = stderr.read(&mut buffer) {
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        let room = KEPT.saturating_sub(said.len());
        said.extend_from_slice(&buffer[..n.min(room)]);
    }
}

pub(super) struct Process {
    child: Mutex<Child>,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Process {
    /// How it ended, if it did, and what it said.
    fn end(&self) -> (Option<String>, String) {
        let deadline = Instant::now() + END_BOUND;
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Some(status.to_string()),
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
                _ => break None,
            }
        };
        // What it said last may still be on its way to the thread that reads it.
        thread::sleep(Duration::from_millis(5));
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        (status, last_words(&String::from_utf8_lossy(&said)))
    }

    fn kill(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has been waited for has no number any more that would be its own.
        if let (Ok(None), Ok(pid)) = (child.try_wait(), i32::try_from(child.id())) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Both pipes are closed by now. It ends by itself, and its parent will not be there for long.
        let _ = child.try_wait();
    }
}

struct ChildReader {
    // Before the process, so that it is closed when that is dropped.
    stdout: ChildStdout,
    timeout: Option<Duration>,
    process: Arc<Process>,
}

impl Read for ChildReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(timeout) = self.timeout {
            let deadline = Instant::now().checked_add(timeout);
            loop {
                let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                // A part of a millisecond would be cut off.
                let left = left.map(|left| PollTimeout::try_from(left + Duration::from_millis(1)));
                let left = left.and_then(Result::ok).unwrap_or(PollTimeout::MAX);
                match poll(&mut [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)], left) {
                    Ok(0) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                    Ok(_) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        self.stdout.read(buffer)
    }
}

impl TimedRead for ChildReader {
    fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.timeout = timeout;
        Ok(())
    }

    fn abandon(&mut self) {
        // A write to its full pipe ends in no other way.
        self.process.kill();
    }
}

struct ChildWriter {
    stdin: Option<ChildStdin>,
    _process: Arc<Process>,
}

impl Write for ChildWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl CloseWrite for ChildWriter {
    fn shutdown(&mut self) -> io::Result<()> {
        self.stdin = None;
        Ok(())
    }
}

struct Socket(UnixStream);

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer) {
            // What the kernel says when the timeout is over.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
            other => other,
        }
    }
}

impl TimedRead for Socket {
    fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(timeout)
    }

    fn abandon(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Write for Socket {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl CloseWrite for Socket {
    fn shutdown(&mut self) -> io::Result<()> {
        match self.0.shutdown(Shutdown::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, listen};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_daemon_that_takes_no_connections_is_waited_for_within_a_bound() {
        const LONG: Duration = Duration::from_secs(20);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        // A shorter queue than the library's.
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let mut queue = Vec::new();
        while let Ok(stream) = master::connect(&path, Instant::now()) {
            queue.push(stream);
        }
        let bound = Duration::from_millis(100);
        let error = socket(&path, Instant::now() + bound, bound).unwrap_err();
        assert_eq!(error.to_string(), "it took no connection within 0.1 s");
        let waiting = thread::spawn(move || socket(&path, Instant::now() + LONG, LONG).map(drop));
        listener.accept().unwrap();
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn a_program_that_closes_its_output_and_goes_on_is_told_from_one_that_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        let said = |script: &str| {
            std::fs::write(&path, script).unwrap();
            let uri = format!("ssh-ng://localhost?remote-program=sh%20{}", path.display());
            let machine = Machine::for_uri(&uri, Default::default()).unwrap();
            let around = Surroundings::new(|_| None);
            let bound = Duration::from_secs(20);
            match connect(&machine, &Here::Program, &around, &StoreDir::default(), bound) {
                Err(error) => error.to_string(),
                Ok(_) => panic!("that is no daemon"),
            }
        };
        let on = said("exec >&-\nexec sleep 4715\n");
        assert!(on.ends_with("--stdio' goes on here without an answer"), "{on}");
        let ended = said("echo no >&2; exit 3\n");
        assert!(ended.ends_with("--stdio' ended here with exit status: 3: no"), "{ended}");
    }

    #[test]
    fn the_remote_program_is_followed_here() {
        let words = |uri: &str| program(&Machine::for_uri(uri, Default::default()).unwrap());
        assert_eq!(words("ssh-ng://localhost").unwrap(), "nix-daemon");
        assert_eq!(words("ssh-ng://localhost?remote-program=%20").unwrap(), "nix-daemon");
        assert_eq!(words("ssh-ng://localhost?remote-program=nix%20daemon").unwrap(), "nix daemon");
        assert_eq!(words("ssh://localhost?remote-program=/o/bin/nix-store").unwrap(), "/o/bin/nix-daemon");
        assert!(matches!(
            words("ssh://localhost?remote-program=/o/wrapper"),
            Err(ReachError::RemoteProgram(_))
        ));
    }
}
