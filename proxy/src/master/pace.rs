//! How fast new connections to one host are made, by all processes of a user together.
//!
//! sshd turns connections away when too many are not yet logged in (MaxStartups), and keeps those out that did so
//! too often (PerSourcePenalties). So each process takes a turn before it connects, and holds one of a few places while
//! it may not be logged in yet. After a connection was turned away nobody connects for a while.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    num::NonZeroU32,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, Flock, fcntl},
    libc,
};
use sha2::{Digest, Sha256};

use super::lock::lock;

/// How many connections may be on their way to being logged in: sshd begins to turn some away when there are ten.
const LOGINS: i64 = 8;
/// How often a place is looked for when all are taken.
const LOGIN_INTERVAL: Duration = Duration::from_millis(10);
/// How long to wait for the file. It is held for microseconds.
const LOCK_BOUND: Duration = Duration::from_millis(500);
/// A shorter pause is none.
const LEAST_PAUSE: Duration = Duration::from_millis(1);
/// A time further away than this was noted under another clock.
const FURTHEST: Duration = Duration::from_secs(60);
/// Bytes of the hash that make a file's name.
const NAME_BYTES: usize = 10;

/// A place among those who are logging in. It is free again when this is dropped, or when the process ends.
#[derive(Debug)]
pub(crate) struct Login(#[expect(dead_code, reason = "held, not read")] Option<File>);

/// The turns at one host.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    path: PathBuf,
    interval: Duration,
    burst: u32,
}

impl Pace {
    /// At a host and port, `per_second` new connections, and half as many at once after a pause.
    pub(crate) fn of(directory: &Path, host: &str, port: u16, per_second: NonZeroU32) -> Self {
        let hash = Sha256::digest(format!("{} {port}", host.to_ascii_lowercase()));
        let name: String = hash.iter().take(NAME_BYTES).map(|byte| format!("{byte:02x}")).collect();
        Pace {
            path: directory.join(format!("{name}.pace")),
            interval: Duration::from_secs(1) / per_second.get(),
            burst: per_second.get().div_ceil(2),
        }
    }

    /// Waits for a turn. False, at once, if none comes before the deadline; then none was taken. Without the file
    /// everybody has a turn.
    pub(crate) fn take_turn(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.reserve(SystemTime::now(), left) {
            Ok(Some(pause)) => {
                thread::sleep(pause);
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::debug!(path = %self.path.display(), %error, "no turn can be taken");
                true
            }
        }
    }

    /// Waits for a place among those who are logging in. None if there is none before the deadline. Without the file
    /// everybody has one.
    pub(crate) fn log_in(&self, deadline: Instant) -> Option<Login> {
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&self.path);
        let Ok(file) = opened else { return Some(Login(None)) };
        loop {
            match take_place(&file) {
                Ok(true) => return Some(Login(Some(file))),
                Ok(false) if Instant::now() < deadline => thread::sleep(LOGIN_INTERVAL),
                Ok(false) => return None,
                Err(_) => return Some(Login(None)),
            }
        }
    }

    /// Nobody connects until that pause is over.
    pub(crate) fn hold_off(&self, pause: Duration) {
        let until = SystemTime::now() + pause + self.interval * (self.burst - 1);
        let noted = self.open().and_then(|mut file| {
            let before = read(&mut file)?;
            write(&mut file, before.max(until))
        });
        if let Err(error) = noted {
            tracing::debug!(path = %self.path.display(), %error, "no pause can be noted");
        }
    }

    /// How long the next in turn has to wait, and makes the one after wait longer. Kept is the time at which the last
    /// turn would be if there were no bursts (the virtual scheduling algorithm of ITU-T I.371).
    fn reserve(&self, now: SystemTime, most: Duration) -> io::Result<Option<Duration>> {
        let mut file = self.open()?;
        let last = read(&mut file)?;
        let last = if last > now + FURTHEST + most { now } else { last.max(now) };
        let tolerance = self.interval * (self.burst - 1);
        let pause =
            last.checked_sub(tolerance).and_then(|at| at.duration_since(now).ok()).unwrap_or_default();
        let pause = if pause < LEAST_PAUSE { Duration::ZERO } else { pause };
        if pause > most {
            return Ok(None);
        }
        write(&mut file, last + self.interval)?;
        Ok(Some(pause))
    }

    fn open(&self) -> io::Result<Flock<File>> {
        lock(&self.path, Instant::now() + LOCK_BOUND)?.ok_or_else(|| io::ErrorKind::TimedOut.into())
    }
}

/// The places are locks on bytes far behind the content, which nobody writes. Each belongs to the open file.
fn take_place(file: &File) -> io::Result<bool> {
    const FAR: i64 = 1 << 20;
    for place in 0..LOGINS {
        let lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: FAR + place,
            l_len: 1,
            l_pid: 0,
        };
        match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => return Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(false)
}

fn read(file: &mut File) -> io::Result<SystemTime> {
    let mut text = String::new();
    file.take(64).read_to_string(&mut text)?;
    let since = text.trim().parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    Ok(since.and_then(|since| UNIX_EPOCH.checked_add(since)).unwrap_or(UNIX_EPOCH))
}

fn write(file: &mut File, time: SystemTime) -> io::Result<()> {
    let text = format!("{:.6}\n", time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    file.rewind()?;
    file.write_all(text.as_bytes())?;
    file.set_len(text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(directory: &Path, per_second: u32) -> Pace {
        Pace::of(directory, "h", 22, NonZeroU32::new(per_second).unwrap())
    }

    #[test]
    fn after_a_burst_turns_come_at_the_pace() {
        let directory = tempfile::tempdir().unwrap();
        let pace = pace(directory.path(), 8);
        let now = SystemTime::now();
        let turn = |at| {
            pace.reserve(at, Duration::from_secs(5)).unwrap().map(|pause| pause.as_millis().div_ceil(10) * 10)
        };
        let first: Vec<_> = (0..6).map(|_| turn(now).unwrap()).collect();
        assert_eq!(first, [0, 0, 0, 0, 130, 250]);
        // A second later the pause is over, and one turn more is free.
        assert_eq!(turn(now + Duration::from_secs(1)), Some(0));
        assert_eq!(turn(now + Duration::from_secs(60)), Some(0));
        // Whoever cannot wait takes nothing away from the others.
        let none = Duration::ZERO;
        let later = now + Duration::from_secs(120);
        assert_eq!((0..8).filter(|_| pace.reserve(later, none).unwrap().is_some()).count(), 4);
        assert_eq!(turn(later), Some(130));
        // A clock that was set back does not lock anybody out.
        assert_eq!(turn(now - Duration::from_secs(100_000)), Some(0));
        assert_ne!(Pace::of(directory.path(), "h", 23, NonZeroU32::MIN).path, pace.path);
        assert_eq!(Pace::of(directory.path(), "H", 22, NonZeroU32::MIN).path, pace.path);
    }

    #[test]
    fn only_so_many_log_in_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let pace = pace(directory.path(), 4);
        let soon = || Instant::now() + Duration::from_millis(30);
        let mut all: Vec<Login> = (0..LOGINS).map(|_| pace.log_in(soon()).unwrap()).collect();
        assert!(pace.log_in(soon()).is_none());
        drop(all.pop());
        let again = pace.log_in(soon());
        assert!(again.is_some() && pace.log_in(soon()).is_none());
        // Turns are another matter.
        assert!(pace.take_turn(soon()));
    }

    #[test]
    fn after_a_rebuff_everybody_waits() {
        let directory = tempfile::tempdir().unwrap();
        let pace = pace(directory.path(), 8);
        pace.hold_off(Duration::from_secs(3));
        let pause = pace.reserve(SystemTime::now(), Duration::from_secs(5)).unwrap().unwrap();
        assert!((2900..=3000).contains(&pause.as_millis()), "{pause:?}");
        assert!(!pace.take_turn(Instant::now() + Duration::from_secs(1)));
    }
}
