//! What is known to be down: failures are kept in a directory of the runtime directory, one file for each way to a host,
//! so that other processes fail at once instead of waiting for the same nothing. Who wants to know of a thousand ways reads
//! that directory once ([`Downs`]).
//!
//! The pause grows with each failure and is forgotten with the first success. When it is over, one process tries, and the
//! others go on leaving the way alone until that has ended: a way that is dead costs one attempt for each pause, however
//! many want it.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions, TryLockError},
    hash::{BuildHasher, Hasher, RandomState},
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::small_file::{in_directory, write_whole};

/// The pause after the first failure, unless the caller has another. Short: somebody may just be starting the host.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How much of a pause chance may add or take away, so that not all come back at the same moment.
const JITTER: f64 = 0.2;
/// In the runtime directory.
const DIRECTORY: &str = "down";
/// Of the files in it.
const EXTENSION: &str = "down";
/// Bytes of the hash that make a file's name.
const NAME_BYTES: usize = 10;
/// How long an attempt is waited for: if it takes longer its process is stopped, perhaps.
const PROBE_BOUND: Duration = Duration::from_secs(60);
/// Held while a note is changed, for microseconds; who has waited for the bound goes on without.
const TURN: &str = "down.lock";
const TURN_BOUND: Duration = Duration::from_millis(200);

/// All ways that failed and were not seen to be well since, at one moment.
#[derive(Debug, Clone, Default)]
pub struct Downs {
    directory: PathBuf,
    ways: HashMap<String, Down>,
}

/// The memory of one way to one host.
#[derive(Debug, Clone)]
pub struct Memory {
    path: PathBuf,
    way: String,
    first_pause: Duration,
}

/// A way that failed lately.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Down {
    /// Why, as it was said then.
    pub reason: String,
    /// How many times in a row.
    pub failures: u32,
    /// When it is to be tried again.
    pub next: SystemTime,
    /// Whether somebody has told people of it, see [`Memory::take_news`].
    told: bool,
}

/// The right to try a way whose pause is over. As long as this, or a copy of its descriptor in another process, is open
/// the others leave the way alone. It ends with its process, whatever becomes of that.
#[derive(Debug)]
pub struct Probe(File);

impl From<Probe> for OwnedFd {
    fn from(probe: Probe) -> Self {
        probe.0.into()
    }
}

impl Down {
    /// Whether it is not yet time to try again.
    pub fn lasts(&self, now: SystemTime) -> bool {
        // A time further away than any pause was noted under another clock.
        let longest = LONGEST_PAUSE.mul_f64(1.0 + JITTER);
        self.next.duration_since(now).is_ok_and(|left| !left.is_zero() && left <= longest)
    }
}

impl Downs {
    /// Reads them from the runtime directory. Where nothing is down that costs one look.
    pub fn read(directory: &Path) -> Self {
        let entries = fs::read_dir(directory.join(DIRECTORY)).into_iter().flatten().flatten();
        let notes = entries.map(|entry| entry.path());
        let notes = notes.filter(|path| path.extension().is_some_and(|extension| extension == EXTENSION));
        Self { directory: directory.to_owned(), ways: notes.filter_map(|note| read(&note)).collect() }
    }

    /// Whether nothing is down.
    pub fn is_empty(&self) -> bool {
        self.ways.is_empty()
    }

    /// The last failure of a way since its last success, however long ago.
    pub fn of(&self, way: &str) -> Option<&Down> {
        self.ways.get(way)
    }

    /// The same, if the way is to be left alone; see [`Memory::pause`].
    pub fn pause(&self, way: &str, now: SystemTime) -> Option<&Down> {
        let down = self.of(way)?;
        (down.lasts(now) || Memory::of(&self.directory, way.to_owned()).is_probed()).then_some(down)
    }
}

impl Memory {
    /// The memory of a way, by any text that tells it from others, in the runtime directory.
    pub fn of(directory: &Path, way: String) -> Self {
        let hash = Sha256::digest(way.as_bytes());
        let name: String = hash.iter().take(NAME_BYTES).map(|byte| format!("{byte:02x}")).collect();
        let path = directory.join(DIRECTORY).join(format!("{name}.{EXTENSION}"));
        Memory { path, way, first_pause: FIRST_PAUSE }
    }

    /// The same with another pause after the first failure.
    #[must_use]
    pub fn pausing_first(self, first_pause: Duration) -> Self {
        Memory { first_pause, ..self }
    }

    /// The last failure since the last success, however long ago.
    pub fn look(&self) -> Option<Down> {
        read(&self.path).map(|(_, down)| down)
    }

    /// The last failure, if the way is to be left alone: it is not yet time to try again, or somebody is doing so.
    pub fn pause(&self, now: SystemTime) -> Option<Down> {
        self.look().filter(|down| down.lasts(now) || self.is_probed())
    }

    /// Whether the way may be tried. After a failure whose pause is over only one may, and has to keep what it is given
    /// until it knows, and has noted what it knows.
    ///
    /// # Errors
    /// The last failure, if it is to be left alone.
    pub fn admit(&self, now: SystemTime) -> Result<Option<Probe>, Down> {
        let Some(down) = self.look() else { return Ok(None) };
        if down.lasts(now) {
            return Err(down);
        }
        match self.claim(now) {
            Some(probe) => Ok(Some(probe)),
            None => self.look().map_or(Ok(None), Err),
        }
    }

    /// The right to be the one who tries, unless somebody else does, or it is not yet time.
    pub fn claim(&self, now: SystemTime) -> Option<Probe> {
        let claimed = match self.lock_probe() {
            Ok(None) if self.is_overdue() => {
                let _turn = self.turn();
                if !self.is_overdue() {
                    return None;
                }
                // Whoever has the lock keeps it on a file without a name.
                let _ = fs::remove_file(self.probe());
                self.lock_probe()
            }
            other => other,
        };
        let probe = match claimed {
            Ok(Some(file)) => Probe(file),
            Ok(None) => return None,
            Err(error) => {
                let path = self.probe();
                let path = path.display();
                tracing::warn!(event = "cannot tell who tries again", %path, %error, "cannot tell who tries again by {path}: {error}");
                return None;
            }
        };
        // Whoever tried before may have noted what came of it.
        self.look().is_none_or(|down| !down.lasts(now)).then_some(probe)
    }

    /// Notes a failure. One that was noted by another process while we tried is the same outage and counts
    /// once. Says whether it was noted.
    pub fn failed(&self, reason: &str, now: SystemTime) -> bool {
        let _turn = self.turn();
        let before = self.look();
        if before.as_ref().is_some_and(|down| down.lasts(now)) {
            return false;
        }
        let failures = before.map_or(0, |down| down.failures).saturating_add(1);
        let next = now + pause_after(self.first_pause, failures, dice());
        self.write(&Down { reason: reason.to_owned(), failures, next, told: false })
    }

    /// The last failure, if it is to be told to people, which one process does once for each time it was noted.
    pub fn take_news(&self) -> Option<Down> {
        if self.look()?.told {
            return None;
        }
        let _turn = self.turn();
        let down = self.look().filter(|down| !down.told)?;
        self.write(&Down { told: true, ..down.clone() }).then_some(down)
    }

    /// Forgets all failures, and ends the right of whoever tries.
    pub fn clear(&self) {
        let files = [self.path.clone(), self.probe()];
        // Mostly there is nothing to forget, and no need of the turn for that.
        if files.iter().any(|file| fs::symlink_metadata(file).is_ok()) {
            // Who changes the note just now would write it again.
            let _turn = self.turn();
            files.iter().for_each(|file| drop(fs::remove_file(file)));
        }
    }

    /// If it cannot be kept, the next one waits as we did.
    fn write(&self, down: &Down) -> bool {
        let text = json!({
            "way": self.way,
            "reason": down.reason,
            "failures": down.failures,
            "next": down.next.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            "told": down.told,
        })
        .to_string();
        in_directory(&self.path, || write_whole(&self.path, &text)).is_ok()
    }

    /// What whoever tries holds a lock on.
    fn probe(&self) -> PathBuf {
        self.path.with_extension("probe")
    }

    /// Locks it; none if somebody else has it.
    fn lock_probe(&self) -> io::Result<Option<File>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let path = self.probe();
        let file = in_directory(&path, || options.open(&path))?;
        match file.try_lock() {
            Ok(()) => {
                // Since when.
                file.set_modified(SystemTime::now())?;
                Ok(Some(file))
            }
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn is_probed(&self) -> bool {
        let Ok(file) = File::open(self.probe()) else { return false };
        matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) && !self.is_overdue()
    }

    /// Whether the attempt that was begun last has had its time.
    fn is_overdue(&self) -> bool {
        let begun = fs::metadata(self.probe()).and_then(|file| file.modified());
        begun
            .is_ok_and(|begun| SystemTime::now().duration_since(begun).is_ok_and(|since| since > PROBE_BOUND))
    }

    fn turn(&self) -> Option<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let path = self.path.with_file_name(TURN);
        let file = in_directory(&path, || options.open(&path)).ok()?;
        let end = Instant::now() + TURN_BOUND;
        loop {
            match file.try_lock() {
                Ok(()) => return Some(file),
                Err(TryLockError::WouldBlock) if Instant::now() < end => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(_) => return None,
            }
        }
    }
}

/// A note: which way, and how it failed.
fn read(note: &Path) -> Option<(String, Down)> {
    let down: Value = serde_json::from_slice(&fs::read(note).ok()?).ok()?;
    let next = Duration::try_from_secs_f64(down["next"].as_f64()?).ok()?;
    let known = Down {
        reason: down["reason"].as_str()?.to_owned(),
        failures: down["failures"].as_u64()?.try_into().ok()?,
        next: UNIX_EPOCH.checked_add(next)?,
        told: down["told"].as_bool().unwrap_or(false),
    };
    Some((down["way"].as_str()?.to_owned(), known))
}

/// The pause after that many failures in a row. `dice` is between 0 and 1.
fn pause_after(first: Duration, failures: u32, dice: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let pause = first.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
    pause.mul_f64(1.0 - JITTER + 2.0 * JITTER * dice.clamp(0.0, 1.0))
}

/// A number between 0 and 1.
pub fn dice() -> f64 {
    f64::from(RandomState::new().build_hasher().finish() as u32) / f64::from(u32::MAX)
}

/// A moment as people read it: `14:03:22 UTC`.
pub fn clock(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    format!("{:02}:{:02}:{:02} UTC", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_chance_changes_them_by_a_fifth() {
        let seconds = |failures, dice| pause_after(FIRST_PAUSE, failures, dice).as_secs_f64();
        assert_eq!([1, 2, 3, 4].map(|n| seconds(n, 0.5)), [2.0, 4.0, 8.0, 16.0]);
        assert_eq!([9, 100, u32::MAX].map(|n| seconds(n, 0.5)), [300.0; 3]);
        assert_eq!((seconds(1, 0.0), seconds(1, 1.0)), (1.6, 2.4));
        assert!((0..100).all(|_| (0.0..=1.0).contains(&dice())));
    }

    #[test]
    fn a_failure_is_remembered_until_its_pause_is_over_and_grows_when_it_comes_again() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Memory::of(directory.path(), "h 22".into());
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        assert_eq!(memory.pause(now), None);
        memory.failed("no route", now);
        let down = memory.pause(now).unwrap();
        assert_eq!((&*down.reason, down.failures), ("no route", 1));
        assert_eq!(Memory::of(directory.path(), "h 23".into()).pause(now), None);
        // The same outage, seen by another process.
        memory.failed("other", now);
        assert_eq!(memory.pause(now), Some(down.clone()));
        assert_eq!(memory.pause(down.next), None);
        memory.failed("again", down.next);
        assert_eq!(memory.pause(down.next).unwrap().failures, 2);
        // A clock that was set back must not lock anybody out for years.
        assert_eq!(memory.pause(UNIX_EPOCH), None);
        memory.clear();
        memory.clear();
        assert_eq!(memory.pause(down.next), None);
        fs::write(&memory.path, "{").unwrap();
        assert_eq!(memory.pause(now), None);
        let names =
            fs::read_dir(directory.path().join(DIRECTORY)).unwrap().map(|entry| entry.unwrap().path());
        assert_eq!(names.filter(|path| path.file_name() != Some(TURN.as_ref())).count(), 1);
    }

    #[test]
    fn when_the_pause_is_over_one_of_fifty_tries_and_the_others_wait_for_what_it_finds() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Memory::of(directory.path(), "h 22".into());
        let mut now = SystemTime::now() - Duration::from_secs(1000);
        assert!(memory.admit(now).unwrap().is_none(), "nothing has failed");
        assert!(memory.failed("first", now));
        for failures in 1..5 {
            let down = memory.pause(now).unwrap();
            assert_eq!(memory.admit(now).unwrap_err(), down);
            now = down.next;
            let gate = std::sync::Barrier::new(50);
            let came_on = std::sync::Barrier::new(50);
            let tries: usize = thread::scope(|scope| {
                let one = || {
                    gate.wait();
                    let admitted = memory.admit(now);
                    came_on.wait();
                    let tries = matches!(admitted, Ok(Some(_)));
                    if tries {
                        memory.failed("still", now);
                    }
                    // Its right ends after what it found is known.
                    drop(admitted);
                    usize::from(tries)
                };
                let all: Vec<_> = (0..50).map(|_| scope.spawn(one)).collect();
                all.into_iter().map(|one| one.join().unwrap()).sum()
            });
            assert_eq!(tries, 1);
            assert_eq!(memory.pause(now).unwrap().failures, failures + 1);
        }
    }

    #[test]
    fn who_tries_keeps_the_others_away_until_its_process_has_ended_or_taken_too_long() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Memory::of(directory.path(), "h 22".into());
        memory.failed("dead", SystemTime::now() - Duration::from_secs(1000));
        let now = SystemTime::now();
        assert_eq!(memory.pause(now), None);
        let begin = |memory: &Memory| {
            let probe = memory.admit(now).unwrap().unwrap();
            let mut child = std::process::Command::new("sleep");
            child.arg("1000").stdin(OwnedFd::from(probe)).spawn().unwrap()
        };
        let mut child = begin(&memory);
        assert_eq!(memory.admit(now).unwrap_err().reason, "dead");
        assert_eq!(memory.pause(now).unwrap().reason, "dead");
        assert!(memory.claim(now).is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(memory.pause(now), None);
        // One that is stopped is not waited for.
        let mut stopped = begin(&memory);
        assert!(memory.claim(now).is_none());
        let long_ago = SystemTime::now() - PROBE_BOUND - Duration::from_secs(1);
        File::options().write(true).open(memory.probe()).unwrap().set_modified(long_ago).unwrap();
        assert_eq!(memory.pause(now), None);
        let mine = memory.admit(now).unwrap().unwrap();
        assert!(memory.pause(now).is_some() && memory.claim(now).is_none());
        // Success of anybody ends it for all.
        memory.clear();
        assert!(memory.pause(now).is_none() && memory.admit(now).unwrap().is_none());
        drop(mine);
        stopped.kill().unwrap();
        stopped.wait().unwrap();
    }

    #[test]
    fn each_failure_is_news_once() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Memory::of(directory.path(), "h 22".into()).pausing_first(Duration::from_secs(10));
        assert_eq!(memory.take_news(), None);
        let now = SystemTime::now();
        assert!(memory.failed("dead", now) && !memory.failed("dead", now));
        let told: usize = thread::scope(|scope| {
            let all: Vec<_> = (0..20).map(|_| scope.spawn(|| memory.take_news().is_some())).collect();
            all.into_iter().map(|one| usize::from(one.join().unwrap())).sum()
        });
        assert_eq!(told, 1);
        let down = memory.pause(now).unwrap();
        let pause = down.next.duration_since(now).unwrap();
        assert!(pause >= Duration::from_secs(8) && pause <= Duration::from_secs(12), "{pause:?}");
        memory.failed("still", down.next);
        assert_eq!(memory.take_news().map(|down| (down.reason, down.failures)), Some(("still".into(), 2)));
    }

    #[test]
    fn success_leaves_nothing_of_the_way_even_if_its_failure_is_being_told() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Memory::of(directory.path(), "h 22".into());
        for _ in 0..200 {
            let gate = std::sync::Barrier::new(2);
            memory.failed("dead", SystemTime::now());
            thread::scope(|scope| {
                scope.spawn(|| {
                    gate.wait();
                    memory.take_news()
                });
                gate.wait();
                memory.clear();
            });
            assert_eq!(memory.look(), None);
        }
        // The right to try may be left of one who was stopped before it noted what it found.
        let probe = memory.claim(SystemTime::now());
        assert!(probe.is_some() && memory.probe().exists());
        memory.clear();
        assert!(!memory.probe().exists());
    }

    #[test]
    fn all_that_is_down_is_read_at_once() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Downs::read(directory.path()).is_empty());
        let [one, two, well] = ["h 1", "h 2", "h 3"].map(|way| Memory::of(directory.path(), way.into()));
        let now = SystemTime::now();
        let over = now - Duration::from_secs(1000);
        assert!(one.failed("dead", now) && two.failed("late", over));
        well.failed("was", now);
        well.clear();
        fs::write(directory.path().join(DIRECTORY).join("x.down"), "{").unwrap();
        let downs = Downs::read(directory.path());
        assert_eq!(downs.of("h 1").cloned(), one.look());
        assert_eq!(downs.of("h 2").map(|down| &*down.reason), Some("late"));
        assert_eq!((downs.of("h 3"), downs.ways.len()), (None, 2));
        assert!(downs.pause("h 1", now).is_some() && downs.pause("h 2", now).is_none());
        let _probe = two.claim(now);
        assert!(downs.pause("h 2", now).is_some(), "somebody tries it");
    }

    #[test]
    fn moments_are_written_for_people() {
        assert_eq!(clock(UNIX_EPOCH + Duration::from_secs(86_400 + 3_723)), "01:02:03 UTC");
    }
}
