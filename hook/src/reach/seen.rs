//! Which paths a machine was seen to have, a short while ago: those that were built there, sent there, or found there.
//!
//! It is for guesses. A path may be gone from the machine meanwhile; whoever believes it must be able to do without.

use nix_derivation::StorePath;
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{iter, mem};

/// How long it is believed. Short, for a builder's garbage collector may run; long enough for one build after another.
const BELIEVED: Duration = Duration::from_secs(60);
/// How many bytes the file has when it becomes the old one, and a new one is begun: some 2,000 paths each.
const ROTATE: u64 = 100 << 10;

/// The first part of a path's name.
type Digest = [u8; 32];
/// A power of two: bytes that stay in the processor, and many times as many as a build has direct inputs.
const MARKS: usize = 4096;

/// The memory of one machine.
#[derive(Debug, Clone)]
pub struct Seen {
    path: PathBuf,
    /// What was noted before that.
    old: PathBuf,
}

impl Seen {
    pub(super) fn at(path: PathBuf, old: PathBuf) -> Self {
        Self { path, old }
    }

    /// Whether all of these were seen there lately.
    pub fn has_all(&self, paths: &[StorePath]) -> bool {
        if paths.is_empty() {
            return true;
        }
        let now = seconds(SystemTime::now());
        let mut missing: HashSet<Digest> = paths.iter().map(digest).collect();
        for file in [&self.path, &self.old] {
            let Ok(text) = fs::read(file) else { continue };
            for (time, digest) in entries(&text) {
                // One from the future was noted under another clock.
                let time = str::from_utf8(time).ok().and_then(|time| time.trim_start().parse::<u64>().ok());
                let age = time.and_then(|time| now.checked_sub(time));
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

    /// Bytes of the wanted paths that the machine was not seen to have, however long ago; none if nothing is known of it.
    /// For an estimate only.
    pub fn lacking(&self, wanted: &mut Wanted) -> Option<u64> {
        wanted.begin();
        let mut is_known = false;
        for file in [&self.path, &self.old] {
            is_known |= wanted.strike_out(file);
            if is_known && wanted.is_complete() {
                break;
            }
        }
        is_known.then(|| wanted.bytes_left())
    }

    /// These are there now. That it cannot be noted only costs time.
    pub fn note<'a>(&self, paths: impl Iterator<Item = &'a StorePath>) {
        let now = seconds(SystemTime::now());
        let mut lines = Vec::new();
        for digest in paths.map(digest) {
            lines.extend_from_slice(format!("{now} ").as_bytes());
            lines.extend_from_slice(&digest);
            lines.push(b'\n');
        }
        if lines.is_empty() {
            return;
        }
        if fs::metadata(&self.path).is_ok_and(|file| file.len() > ROTATE) {
            let _ = fs::rename(&self.path, &self.old);
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path);
        let _ = file.and_then(|mut file| file.write_all(&lines));
    }

    /// Nothing of it is believed any more.
    pub fn forget(&self) {
        for file in [&self.path, &self.old] {
            let _ = fs::remove_file(file);
        }
    }
}

/// Paths that are looked for in the memories of many machines, one after another.
#[derive(Debug)]
pub struct Wanted {
    /// With the sizes in bytes, in the order of the digests.
    paths: Vec<(Digest, u64)>,
    /// The marks of these paths. Most of what a memory holds has none of them.
    marks: [bool; MARKS],
    /// Which of the paths were not found yet, and how many.
    missing: Vec<bool>,
    left: usize,
    buffer: Vec<u8>,
}

impl Wanted {
    /// Paths with their sizes in bytes.
    pub fn new(paths: &[(StorePath, u64)]) -> Self {
        let mut paths: Vec<_> = paths.iter().map(|(path, size)| (digest(path), *size)).collect();
        paths.sort_unstable();
        paths.dedup_by_key(|(digest, _)| *digest);
        let mut marks = [false; MARKS];
        for (digest, _) in &paths {
            marks[mark(digest)] = true;
        }
        Self { paths, marks, missing: Vec::new(), left: 0, buffer: Vec::new() }
    }

    fn begin(&mut self) {
        self.left = self.paths.len();
        self.missing.clear();
        self.missing.resize(self.left, true);
    }

    /// Finds what it can in a file. Whether it could be read.
    fn strike_out(&mut self, file: &Path) -> bool {
        self.buffer.clear();
        if File::open(file).and_then(|mut file| file.read_to_end(&mut self.buffer)).is_err() {
            return false;
        }
        for (_, digest) in entries(&self.buffer) {
            if !self.marks[mark(digest)] {
                continue;
            }
            if let Ok(index) = self.paths.binary_search_by_key(digest, |(digest, _)| *digest)
                && mem::take(&mut self.missing[index])
            {
                self.left -= 1;
                if self.left == 0 {
                    break;
                }
            }
        }
        true
    }

    fn is_complete(&self) -> bool {
        self.left == 0
    }

    fn bytes_left(&self) -> u64 {
        let sizes = self.paths.iter().zip(&self.missing).filter(|(_, missing)| **missing);
        sizes.fold(0, |sum, ((_, size), _)| sum.saturating_add(*size))
    }
}

/// What is noted in a file, as it stands there: the time, behind the end of the line before, and the digest. A torn line takes
/// the one behind it with it at most.
fn entries(text: &[u8]) -> impl Iterator<Item = (&[u8], &Digest)> {
    let (mut rest, mut before) = (text, 0);
    iter::from_fn(move || {
        // Times have as many digits for centuries, so that it need not be looked for.
        let space = match rest.get(before) {
            Some(b' ') => before,
            _ => rest.iter().position(|byte| *byte == b' ')?,
        };
        before = space;
        let (time, after) = rest.split_at_checked(space)?;
        let (digest, after) = after.get(1..)?.split_first_chunk()?;
        // What comes next is the end of the line.
        rest = after;
        Some((time, digest))
    })
}

/// One of a few thousand numbers. The end of a digest is as good as any part of it.
fn mark(digest: &Digest) -> usize {
    let [.., a, b, c, d] = *digest;
    let number = u32::from_le_bytes([a, b, c, d]).wrapping_mul(0x9e37_79b1);
    (number >> (u32::BITS - MARKS.ilog2())) as usize
}

fn digest(path: &StorePath) -> Digest {
    path.to_basename().as_bytes().first_chunk().copied().unwrap_or_default()
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

    fn seen_of(directory: &tempfile::TempDir, machine: &str) -> Seen {
        let file = |extension| directory.path().join(machine).with_extension(extension);
        Seen::at(file("new"), file("old"))
    }

    fn line(time: u64, number: usize) -> String {
        format!("{time} {number:0>32}\n")
    }

    #[test]
    fn what_was_noted_is_believed_until_it_is_old_or_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let seen = seen_of(&directory, "m");
        assert!(seen.has_all(&[]) && !seen.has_all(&[path(1)]));
        seen.note([path(1), path(2)].iter());
        assert!(seen.has_all(&[path(2), path(1)]) && !seen.has_all(&[path(1), path(3)]));
        for time in [seconds(SystemTime::now()) - BELIEVED.as_secs() - 2, seconds(SystemTime::now()) + 100] {
            fs::write(&seen.path, line(time, 4)).unwrap();
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
        let seen = seen_of(&directory, "m");
        let mut inputs = Wanted::new(&[(path(1), 10), (path(2), 200), (path(3), 3000)]);
        assert_eq!(seen.lacking(&mut inputs), None);
        fs::write(&seen.path, line(1000, 2)).unwrap();
        assert_eq!(seen.lacking(&mut inputs), Some(3010));
        fs::rename(&seen.path, &seen.old).unwrap();
        assert_eq!(seen.lacking(&mut inputs), Some(3010));
        seen.note([path(1), path(3)].iter());
        assert_eq!(seen.lacking(&mut inputs), Some(0));
        // Nothing is left of it for the next machine.
        let other = seen_of(&directory, "other");
        other.note([path(3)].iter());
        assert_eq!(other.lacking(&mut inputs), Some(210));
        assert_eq!(seen.lacking(&mut Wanted::new(&[])), Some(0));
        assert_eq!(other.lacking(&mut Wanted::new(&[(path(1), u64::MAX), (path(2), 1)])), Some(u64::MAX));
    }

    #[test]
    fn among_thousands_of_others_each_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let seen = seen_of(&directory, "m");
        for first in [0, 2_000] {
            seen.note((first..first + 2_000).map(path).collect::<Vec<_>>().iter());
            fs::rename(&seen.path, &seen.old).unwrap();
        }
        seen.note((4_000..6_000).map(path).collect::<Vec<_>>().iter());
        let wanted: Vec<_> = (0..100).map(|number| (path(number * 90), 1)).collect();
        // Those below 2,000 were forgotten, those from 6,000 on were never there.
        let lacking =
            wanted.iter().filter(|(it, _)| !(2_000..6_000).map(path).any(|there| there == *it)).count();
        assert_eq!(seen.lacking(&mut Wanted::new(&wanted)), Some(lacking as u64));
    }

    #[test]
    fn a_torn_line_costs_one_more_at_most() {
        let directory = tempfile::tempdir().unwrap();
        let seen = seen_of(&directory, "m");
        let (first, second, third) = (line(9000, 1), line(9000, 2), line(9000, 3));
        let mut inputs = Wanted::new(&[(path(1), 1), (path(2), 20), (path(3), 300)]);
        for kept in 0..first.len() - 1 {
            fs::write(&seen.path, [&first[..kept], &second, &third].concat()).unwrap();
            assert!(matches!(seen.lacking(&mut inputs), Some(1 | 21)), "{kept}");
        }
        fs::write(&seen.path, [&first, &third[..20]].concat()).unwrap();
        assert_eq!(seen.lacking(&mut inputs), Some(320));
    }

    #[test]
    fn the_memory_stays_small_and_keeps_the_newest() {
        let directory = tempfile::tempdir().unwrap();
        let seen = seen_of(&directory, "m");
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
