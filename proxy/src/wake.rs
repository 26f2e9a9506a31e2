//! Waking a host that is down: the command that is set for it is run once, however many processes wait for the host,
//! and they all wait until the same moment.
//!
//! The command is started in a process group of its own and not waited for. It holds a lock as long as it runs.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::settings::Wake;

/// The host's name, for the command.
const HOST_VARIABLE: &str = "NIX_OFFLOAD_HOST";
/// How much of what the command said is quoted, in bytes.
const QUOTED: u64 = 400;
/// Bytes of the hash that make a file's name.
const NAME_BYTES: usize = 10;
/// How long the command is not run again after a waking in vain: those who waited for it are to hear that the host is
/// down, also when their last attempt takes its time.
const REST: Duration = Duration::from_secs(60);
/// How long another process may take to note that it has begun.
const NOTE_BOUND: Duration = Duration::from_secs(2);
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// Runs the command and leaves its status behind.
const SCRIPT: &str = r#"/bin/sh -c "$1"; echo $? >"$2.new" && mv -f "$2.new" "$2""#;

/// A host that is being woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waking {
    /// How long ago its command was started.
    pub since: Duration,
    /// How long it is given yet. Nothing when its time is over.
    pub left: Duration,
}

/// Why a host cannot be woken.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WakeError {
    /// The command said that it failed.
    #[error("`{command}` failed with status {status}{}{said}", if said.is_empty() { "" } else { ": " })]
    Failed {
        /// The command.
        command: String,
        /// Its exit status.
        status: i32,
        /// The end of what it said.
        said: String,
    },
    /// It could not be run, or its files not be written.
    #[error("cannot run `{command}`")]
    Io {
        /// The command.
        command: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl WakeError {
    /// What to do about it.
    pub fn cure(&self) -> String {
        format!("correct `wake` of that host in offload.toml; the command finds its name in {HOST_VARIABLE}")
    }
}

/// The waking of one host.
#[derive(Debug, Clone)]
pub struct Waker<'a> {
    wake: &'a Wake,
    host: &'a str,
    /// The lock, and in it when the last waking began.
    note: PathBuf,
    /// The command's exit status.
    status: PathBuf,
    log: PathBuf,
}

impl<'a> Waker<'a> {
    /// Of a host by its name, with its files in the runtime directory.
    pub fn of(directory: &Path, host: &'a str, wake: &'a Wake) -> Self {
        let hash = Sha256::digest(host.to_ascii_lowercase().as_bytes());
        let name: String = hash.iter().take(NAME_BYTES).map(|byte| format!("{byte:02x}")).collect();
        let file = |extension: &str| directory.join(format!("{name}.{extension}"));
        Waker { wake, host, note: file("wake"), status: file("woke"), log: file("wake-log") }
    }

    /// How long the host is given to answer.
    pub fn timeout(&self) -> Duration {
        self.wake.timeout
    }

    /// Whether it is being woken.
    ///
    /// # Errors
    /// If its command failed.
    pub fn look(&self, now: SystemTime) -> Result<Option<Waking>, WakeError> {
        let Some(waking) = self.last(now).filter(|waking| !waking.left.is_zero()) else { return Ok(None) };
        match fs::read_to_string(&self.status).ok().and_then(|text| text.trim().parse().ok()) {
            None | Some(0) => Ok(Some(waking)),
            Some(status) => {
                Err(WakeError::Failed { command: self.wake.command.clone(), status, said: self.said() })
            }
        }
    }

    /// Starts the command, unless the host is being woken already or was so in vain a short while ago. Nothing is left
    /// then of its time.
    ///
    /// # Errors
    /// If the command failed, this time or when another process started it, or cannot be started.
    pub fn wake(&self, now: SystemTime) -> Result<Waking, WakeError> {
        let io_error = |source| WakeError::Io { command: self.wake.command.clone(), source };
        let given_up = Instant::now() + NOTE_BOUND;
        let mut lock = loop {
            if let Some(waking) = self.look(now)? {
                return Ok(waking);
            }
            if let Some(waking) = self.last(now).filter(|waking| waking.since < self.wake.timeout + REST) {
                return Ok(waking);
            }
            match self.lock().map_err(io_error)? {
                Some(lock) => break lock,
                // Another process has just begun, and will say so.
                None if Instant::now() < given_up => thread::sleep(LOOK_INTERVAL),
                // An earlier command still runs, long after its time.
                None => return Ok(Waking { since: self.wake.timeout, left: Duration::ZERO }),
            }
        };
        // Whoever had the lock before us has done it for us too.
        if let Some(waking) = self.look(now)? {
            return Ok(waking);
        }
        self.start(&mut lock, now).map_err(io_error)?;
        tracing::info!(
            event = "waking a host",
            host = self.host,
            command = self.wake.command,
            "waking {}: {}",
            self.host,
            self.wake.command
        );
        Ok(self.since(now, now))
    }

    /// It is awake. The next time it is down it may be woken again.
    pub fn awake(&self) {
        // Still held is the lock of a command that goes on; the name alone is what others look at.
        for path in [&self.note, &self.status] {
            let _ = fs::remove_file(path);
        }
    }

    /// The last time its present command was started, whatever became of that.
    fn last(&self, now: SystemTime) -> Option<Waking> {
        let note: Value = serde_json::from_slice(&fs::read(&self.note).ok()?).ok()?;
        let begun = Duration::try_from_secs_f64(note["begun"].as_f64()?).ok()?;
        // What was corrected since is not held against the host.
        (note["command"] == *self.wake.command).then_some(())?;
        Some(self.since(UNIX_EPOCH.checked_add(begun)?, now))
    }

    fn since(&self, begun: SystemTime, now: SystemTime) -> Waking {
        // A clock that was set back: nobody knows, so it has just begun.
        let since = now.duration_since(begun).unwrap_or_default();
        Waking { since, left: self.wake.timeout.saturating_sub(since) }
    }

    /// The lock lives as long as any copy of the descriptor.
    fn lock(&self) -> io::Result<Option<File>> {
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&self.note)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn start(&self, lock: &mut File, now: SystemTime) -> io::Result<()> {
        match fs::remove_file(&self.status) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let log = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.log)?;
        // A copy that the command inherits; it must not be inherited by anything else that starts just now, so
        // the time is short.
        let inherited = lock.as_fd().try_clone_to_owned()?;
        fcntl(&inherited, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let child = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "sh", &self.wake.command])
            .arg(&self.status)
            .env(HOST_VARIABLE, self.host)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .current_dir("/")
            // What ends us must not end it.
            .process_group(0)
            .spawn();
        drop(inherited);
        let mut child = child?;
        let text = json!({
            "host": self.host,
            "command": self.wake.command,
            "pid": child.id(),
            "begun": now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
        });
        thread::spawn(move || child.wait());
        lock.set_len(0)?;
        lock.seek(SeekFrom::Start(0))?;
        lock.write_all(text.to_string().as_bytes())
    }

    fn said(&self) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(&self.log)?;
            let len = file.metadata()?.len();
            file.seek(SeekFrom::Start(len.saturating_sub(QUOTED)))?;
            let mut bytes = Vec::new();
            file.take(QUOTED).read_to_end(&mut bytes)?;
            let text = String::from_utf8_lossy(&bytes).into_owned();
            Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        read().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < deadline, "waited in vain: {what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_host_is_woken_once_until_it_is_awake_or_its_time_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let count = directory.path().join("count");
        let command = format!("echo $NIX_OFFLOAD_HOST >>{}", count.display());
        let wake = Wake { command, timeout: Duration::from_secs(60) };
        let waker = Waker::of(directory.path(), "Mac", &wake);
        let ran = || fs::read_to_string(&count).unwrap_or_default().lines().count();
        let now = SystemTime::now();
        assert_eq!(waker.look(now).unwrap(), None);
        let first = waker.wake(now).unwrap();
        assert_eq!((first.since, first.left), (Duration::ZERO, wake.timeout));
        let later = Waker::of(directory.path(), "mac", &wake).wake(now + Duration::from_secs(20)).unwrap();
        assert_eq!(later.left.as_secs_f64().round(), 40.0);
        until("the command ended", || waker.status.exists() && waker.lock().unwrap().is_some());
        assert_eq!(waker.wake(now + Duration::from_secs(59)).unwrap().left.as_secs_f64().round(), 1.0);
        assert_eq!(ran(), 1);
        // In vain, so it is tried again, but not by those who waited.
        let over = now + Duration::from_secs(61);
        assert_eq!(waker.look(over).unwrap(), None);
        assert_eq!((waker.wake(over).unwrap().left, ran()), (Duration::ZERO, 1));
        waker.wake(over + REST).unwrap();
        until("it ran again", || ran() == 2);
        waker.awake();
        assert_eq!(waker.look(now).unwrap(), None);
        until("its lock is free", || waker.lock().unwrap().is_some());
        waker.wake(now).unwrap();
        until("it ran again", || ran() == 3);
    }

    #[test]
    fn however_many_begin_at_the_same_moment_the_command_runs_once() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let count = directory.path().join(format!("count{round}"));
            let wake =
                Wake { command: format!("echo >>{}", count.display()), timeout: Duration::from_secs(60) };
            let host = format!("h{round}");
            let waker = Waker::of(directory.path(), &host, &wake);
            let together = std::sync::Barrier::new(16);
            let one = || {
                together.wait();
                waker.wake(SystemTime::now()).unwrap().left
            };
            let left: Vec<Duration> = thread::scope(|scope| {
                let all: Vec<_> = (0..16).map(|_| scope.spawn(one)).collect();
                all.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(left.iter().all(|left| !left.is_zero()), "{left:?}");
            until("the command ended", || waker.status.exists() && waker.lock().unwrap().is_some());
            assert_eq!(fs::read_to_string(&count).unwrap(), "\n");
        }
    }

    #[test]
    fn a_command_that_fails_is_quoted_and_one_that_hangs_is_not_run_again() {
        let directory = tempfile::tempdir().unwrap();
        let wake = Wake { command: "echo no such card; exit 3".into(), timeout: Duration::from_secs(60) };
        let waker = Waker::of(directory.path(), "h", &wake);
        let now = SystemTime::now();
        waker.wake(now).unwrap();
        until("it failed", || waker.status.exists());
        let error = waker.wake(now).unwrap_err();
        assert_eq!(error.to_string(), "`echo no such card; exit 3` failed with status 3: no such card");
        assert!(error.cure().contains("offload.toml"));

        let wake = Wake { command: "exec sleep 30".into(), timeout: Duration::from_secs(2) };
        let waker = Waker::of(directory.path(), "other", &wake);
        waker.wake(now).unwrap();
        let note =
            || serde_json::from_slice::<Value>(&fs::read(&waker.note).unwrap()).unwrap()["pid"].as_u64();
        let pid = note();
        let late = waker.wake(now + wake.timeout + REST).unwrap();
        assert_eq!((late.left, note()), (Duration::ZERO, pid));
        nix::sys::signal::killpg(
            nix::unistd::Pid::from_raw(pid.unwrap().try_into().unwrap()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        until("its lock is free", || waker.lock().unwrap().is_some());
    }
}
