//! When Nix first asked for what was postponed. Nix may ask again through another hook process.

use super::Ledger;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Nix asks again every few seconds. If it has not for so long, it was another time.
const SAME: Duration = Duration::from_secs(120);
/// It asks again within so long, if it still wants to.
const AGAIN: Duration = Duration::from_secs(7);

/// The memory of requests that were postponed.
#[derive(Debug, Clone)]
pub struct Asked(Ledger);

impl Asked {
    /// The memory in a runtime directory.
    pub fn at(runtime: &Path) -> Self {
        Self(Ledger { directory: runtime.join("asked"), files: 256, keep: 64 })
    }

    /// When this derivation was first asked for, if it was postponed a short while ago.
    pub fn since(&self, drv_path: &str, now: SystemTime) -> Option<SystemTime> {
        let text = self.0.get(drv_path)?;
        let (first, last) = text.split_once(' ')?;
        let time = |text: &str| {
            let time = UNIX_EPOCH.checked_add(Duration::from_secs_f64(text.parse::<u32>().ok()?.into()))?;
            now.duration_since(time).is_ok().then_some(time)
        };
        let (first, last) = (time(first)?, time(last)?);
        now.duration_since(last).is_ok_and(|age| age <= SAME).then_some(first)
    }

    /// Whether anything was postponed so short a while ago that it is still to be asked for again.
    pub fn is_anything_postponed(&self, now: SystemTime) -> bool {
        let entries = fs::read_dir(&self.0.directory).into_iter().flatten().flatten();
        let mut times = entries.filter_map(|entry| entry.metadata().and_then(|data| data.modified()).ok());
        times.any(|time| now.duration_since(time).is_ok_and(|age| age <= AGAIN))
    }

    /// It was postponed now, and first asked for then.
    pub fn postponed(&self, drv_path: &str, first: SystemTime, now: SystemTime) {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let _ = self.0.put(drv_path, &format!("{} {}", seconds(first), seconds(now)));
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
        assert_eq!(asked.since("/d", at(0)), None);
        asked.postponed("/d", at(0), at(0));
        assert_eq!(asked.since("/d", at(100)), Some(at(0)));
        asked.postponed("/d", at(0), at(100));
        assert_eq!(asked.since("/d", at(200)), Some(at(0)));
        assert_eq!((asked.since("/d", at(221)), asked.since("/e", at(1))), (None, None));
        // The clock was set back.
        assert_eq!(asked.since("/d", at(50)), None);
        let is_postponed = |now| asked.is_anything_postponed(now);
        assert!(is_postponed(SystemTime::now()) && !is_postponed(SystemTime::now() + AGAIN * 2));
        assert!(!Asked::at(&directory.path().join("none")).is_anything_postponed(SystemTime::now()));
    }
}
