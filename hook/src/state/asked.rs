//! When Nix first asked for what was postponed. Nix may ask again through another hook process.

use super::Ledger;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Nix asks again every few seconds. How long it has not when it counts as another time.
const SAME: Duration = Duration::from_secs(120);
/// How long it takes at most until it asks again, if it still wants to.
const AGAIN: Duration = Duration::from_secs(7);

/// The memory of requests that were postponed.
#[derive(Debug, Clone)]
pub struct Asked(Ledger);

/// What is remembered of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// When Nix first asked.
    pub first: SystemTime,
    /// Since when obstacles that may pass have kept it from every machine, if they do.
    pub obstructed: Option<SystemTime>,
}

impl Asked {
    /// The memory in a runtime directory.
    pub fn at(runtime: &Path) -> Self {
        Self(Ledger { directory: runtime.join("asked"), files: 256, keep: 64 })
    }

    /// What is known of a derivation (or of anything else by another key), if it was postponed a short while ago.
    pub fn times(&self, key: &str, now: SystemTime) -> Option<Times> {
        let text = self.0.get(key)?;
        let mut words = text.split(' ');
        let mut time = || {
            let seconds = words.next()?.parse::<u32>().ok()?;
            let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds.into()))?;
            now.duration_since(time).is_ok().then_some(time)
        };
        let (first, last) = (time()?, time()?);
        let obstructed = time();
        now.duration_since(last).is_ok_and(|age| age <= SAME).then_some(Times { first, obstructed })
    }

    /// Whether anything was postponed so short a while ago that it is still to be asked for again.
    pub fn is_anything_postponed(&self, now: SystemTime) -> bool {
        let entries = fs::read_dir(&self.0.directory).into_iter().flatten().flatten();
        let mut times = entries.filter_map(|entry| entry.metadata().and_then(|data| data.modified()).ok());
        times.any(|time| now.duration_since(time).is_ok_and(|age| age <= AGAIN))
    }

    /// It was postponed now.
    pub fn postponed(&self, key: &str, times: Times, now: SystemTime) {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut text = format!("{} {}", seconds(times.first), seconds(now));
        if let Some(obstructed) = times.obstructed {
            let _ = write!(text, " {}", seconds(obstructed));
        }
        let _ = self.0.put(key, &text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_time_is_remembered_while_it_is_asked_again_and_again() {
        let directory = tempfile::tempdir().unwrap();
        let asked = Asked::at(directory.path());
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds);
        let first = Times { first: at(0), obstructed: None };
        assert_eq!(asked.times("/d", at(0)), None);
        asked.postponed("/d", first, at(0));
        assert_eq!(asked.times("/d", at(100)), Some(first));
        let obstructed = Times { obstructed: Some(at(90)), ..first };
        asked.postponed("/d", obstructed, at(100));
        assert_eq!(asked.times("/d", at(200)), Some(obstructed));
        assert_eq!((asked.times("/d", at(221)), asked.times("/e", at(1))), (None, None));
        // The clock was set back.
        assert_eq!(asked.times("/d", at(50)), None);
        // The obstacle is gone.
        asked.postponed("/d", first, at(110));
        assert_eq!(asked.times("/d", at(200)), Some(first));
        let is_postponed = |now| asked.is_anything_postponed(now);
        assert!(is_postponed(SystemTime::now()) && !is_postponed(SystemTime::now() + AGAIN * 2));
        assert!(!Asked::at(&directory.path().join("none")).is_anything_postponed(SystemTime::now()));
    }
}
