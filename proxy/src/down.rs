//! What is known to be down: failures are kept in the runtime directory, one file for each way to a host, so
//! that other processes fail at once instead of waiting for the same nothing.
//!
//! The pause grows with each failure and is forgotten with the first success.

use std::{
    fs::{self, OpenOptions},
    hash::{BuildHasher, Hasher, RandomState},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The pause after the first failure. Short: somebody may just be starting the host.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How much of a pause chance may add or take away, so that not all come back at the same moment.
const JITTER: f64 = 0.2;
/// Bytes of the hash that make a file's name.
const NAME_BYTES: usize = 10;

/// The memory of one way to one host.
#[derive(Debug, Clone)]
pub struct Memory {
    path: PathBuf,
    way: String,
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
}

impl Memory {
    /// The memory of a way, by any text that tells it from others, in the runtime directory.
    pub fn of(directory: &Path, way: String) -> Self {
        let hash = Sha256::digest(way.as_bytes());
        let name: String = hash.iter().take(NAME_BYTES).map(|byte| format!("{byte:02x}")).collect();
        Memory { path: directory.join(format!("{name}.down")), way }
    }

    /// The last failure, if it is not yet time to try again.
    pub fn pause(&self, now: SystemTime) -> Option<Down> {
        self.read().filter(|down| lasts(down, now))
    }

    /// Notes a failure. One that was noted by another process while we tried is the same outage and counts
    /// once.
    pub fn failed(&self, reason: &str, now: SystemTime) {
        let before = self.read();
        if before.as_ref().is_some_and(|down| lasts(down, now)) {
            return;
        }
        let failures = before.map_or(0, |down| down.failures).saturating_add(1);
        let next = now + pause_after(failures, dice());
        let text = json!({
            "way": self.way,
            "reason": reason,
            "failures": failures,
            "next": next.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
        });
        // If it cannot be kept, the next one waits as we did.
        let temporary =
            self.path.with_extension(format!("{:x}.new", RandomState::new().build_hasher().finish()));
        let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
        let _ = written
            .and_then(|mut file| file.write_all(text.to_string().as_bytes()))
            .and_then(|()| fs::rename(&temporary, &self.path));
    }

    /// Forgets all failures.
    pub fn clear(&self) {
        let _ = fs::remove_file(&self.path);
    }

    fn read(&self) -> Option<Down> {
        let down: Value = serde_json::from_slice(&fs::read(&self.path).ok()?).ok()?;
        let next = Duration::try_from_secs_f64(down["next"].as_f64()?).ok()?;
        Some(Down {
            reason: down["reason"].as_str()?.to_owned(),
            failures: down["failures"].as_u64()?.try_into().ok()?,
            next: UNIX_EPOCH.checked_add(next)?,
        })
    }
}

/// A time further away than any pause was noted under another clock.
fn lasts(down: &Down, now: SystemTime) -> bool {
    down.next
        .duration_since(now)
        .is_ok_and(|left| !left.is_zero() && left <= LONGEST_PAUSE.mul_f64(1.0 + JITTER))
}

/// The pause after so many failures in a row. `dice` is between 0 and 1.
fn pause_after(failures: u32, dice: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let pause = FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
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
        let seconds = |failures, dice| pause_after(failures, dice).as_secs_f64();
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
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn moments_are_written_for_people() {
        assert_eq!(clock(UNIX_EPOCH + Duration::from_secs(86_400 + 3_723)), "01:02:03 UTC");
    }
}
