//! Which paths a machine was seen to have, a short while ago: those that were built there, sent there, or found there.
//!
//! It is for guesses. A path may be gone from the machine meanwhile; whoever believes it must be able to do without.

use nix_derivation::StorePath;
use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long it is believed. Short, for a builder's garbage collector may run; long enough for one build after another.
const BELIEVED: Duration = Duration::from_secs(60);
/// When the file has so many bytes it becomes the old one, and a new one is begun: some 2,000 paths each.
const ROTATE: u64 = 100 << 10;

/// The memory of one machine.
#[derive(Debug, Clone)]
pub struct Seen {
    path: PathBuf,
}

impl Seen {
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Whether all of these were seen there lately.
    pub fn has_all(&self, paths: &[StorePath]) -> bool {
        if paths.is_empty() {
            return true;
        }
        let now = seconds(SystemTime::now());
        let mut missing: HashSet<String> = paths.iter().map(digest).collect();
        for file in [&self.path, &old(&self.path)] {
            let Ok(text) = fs::read_to_string(file) else { continue };
            for line in text.lines() {
                let Some((time, digest)) = line.split_once(' ') else { continue };
                // One from the future was noted under another clock.
                let age = time.parse::<u64>().ok().and_then(|time| now.checked_sub(time));
                if age.is_some_and(|age| age <= BELIEVED.as_secs()) {
                    missing.remove(digest);
                }
            }
            if missing.is_empty() {
                return true;
            }
        }
        false
    }

    /// Bytes of these paths that the machine was not seen to have, ever so long ago; none if nothing is known of it. For an
    /// estimate only.
    pub fn lacking(&self, paths: &[(StorePath, u64)]) -> Option<u64> {
        let mut texts = [&self.path, &old(&self.path)].map(|file| fs::read_to_string(file).ok());
        texts.iter().any(Option::is_some).then_some(())?;
        let texts = texts.each_mut().map(|text| text.take().unwrap_or_default());
        let seen: HashSet<&str> = texts
            .iter()
            .flat_map(|text| text.lines())
            .filter_map(|line| Some(line.split_once(' ')?.1))
            .collect();
        let lacking = paths.iter().filter(|(path, _)| !seen.contains(digest(path).as_str()));
        Some(lacking.fold(0, |sum: u64, (_, size)| sum.saturating_add(*size)))
    }

    /// These are there now. That it cannot be noted only costs time.
    pub fn note<'a>(&self, paths: impl Iterator<Item = &'a StorePath>) {
        let now = seconds(SystemTime::now());
        let lines: String = paths.map(|path| format!("{now} {}\n", digest(path))).collect();
        if lines.is_empty() {
            return;
        }
        if fs::metadata(&self.path).is_ok_and(|file| file.len() > ROTATE) {
            let _ = fs::rename(&self.path, old(&self.path));
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path);
        let _ = file.and_then(|mut file| file.write_all(lines.as_bytes()));
    }

    /// Nothing of it is believed any more.
    pub fn forget(&self) {
        for file in [&self.path, &old(&self.path)] {
            let _ = fs::remove_file(file);
        }
    }
}

fn old(path: &Path) -> PathBuf {
    path.with_extension("seen-before")
}

fn digest(path: &StorePath) -> String {
    let name = path.to_basename();
    name.split_once('-').map_or(name.clone(), |(digest, _)| digest.to_owned())
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(number: usize) -> StorePath {
        StorePath::from_basename(format!("{number:0>32}-x").as_bytes()).unwrap()
    }

    #[test]
    fn what_was_noted_is_believed_until_it_is_old_or_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let seen = Seen::at(directory.path().join("m.seen"));
        assert!(seen.has_all(&[]) && !seen.has_all(&[path(1)]));
        seen.note([path(1), path(2)].iter());
        assert!(seen.has_all(&[path(2), path(1)]) && !seen.has_all(&[path(1), path(3)]));
        for time in [seconds(SystemTime::now()) - BELIEVED.as_secs() - 2, seconds(SystemTime::now()) + 100] {
            fs::write(&seen.path, format!("{time} {}\n", digest(&path(4)))).unwrap();
            assert!(!seen.has_all(&[path(4)]), "{time}");
        }
        seen.note([path(5)].iter());
        seen.forget();
        assert!(!seen.has_all(&[path(5)]));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_lacking_is_counted_in_bytes_whatever_the_age_of_the_memory() {
        let directory = tempfile::tempdir().unwrap();
        let seen = Seen::at(directory.path().join("m.seen"));
        let inputs = [(path(1), 10), (path(2), 200), (path(3), 3000)];
        assert_eq!(seen.lacking(&inputs), None);
        fs::write(&seen.path, format!("1000 {}\n", digest(&path(2)))).unwrap();
        assert_eq!(seen.lacking(&inputs), Some(3010));
        seen.note([path(1), path(3)].iter());
        assert_eq!(seen.lacking(&inputs), Some(0));
    }

    #[test]
    fn the_memory_stays_small_and_keeps_the_newest() {
        let directory = tempfile::tempdir().unwrap();
        let seen = Seen::at(directory.path().join("m.seen"));
        for number in 0..200 {
            let paths: Vec<_> = (number * 50..number * 50 + 50).map(path).collect();
            seen.note(paths.iter());
        }
        assert!(seen.has_all(&[path(9_999), path(9_000)]) && !seen.has_all(&[path(0)]));
        let bytes: u64 = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(bytes < 3 * ROTATE, "{bytes}");
    }
}
