//! Looking at slots from outside: which ones are taken, as the kernel tells, without touching a lock.
//!
//! Who tries a lock to see whether it is taken holds it for a moment, and needs `main-lock` for that. Who looks all the
//! time must not be in the way of those who choose.

use super::Slots;
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How many slots of one machine are looked at, at most.
const MOST_SLOTS: u64 = 512;

/// The files that somebody on this machine has locked, at one moment.
#[derive(Debug, Default)]
pub struct FileLocks(HashSet<u64>);

impl FileLocks {
    /// Reads `/proc/locks` (proc(5)); none if there is no such file.
    pub fn read() -> Option<Self> {
        fs::read_to_string("/proc/locks").ok().map(|text| Self::parse(&text))
    }

    /// `1: FLOCK  ADVISORY  WRITE 11938 fe:00:5341263 0 EOF`: the last part of the sixth word is the inode. The device in
    /// front of it is not that of stat(2) on btrfs, so it is left out of account. Who waits for a lock has `->` as the
    /// second word. Nix takes slots by flock(2) (`lockFile` in `src/libstore/unix/pathlocks.cc` of 2.8 to 2.34).
    fn parse(text: &str) -> Self {
        let inode = |line: &str| {
            let mut words = line.split_ascii_whitespace().skip(1);
            let is_lock = words.next() == Some("FLOCK") && words.nth(1) == Some("WRITE");
            if is_lock { words.nth(1)?.rsplit(':').next()?.parse().ok() } else { None }
        };
        Self(text.lines().filter_map(inode).collect())
    }

    fn holds(&self, file: &Path) -> bool {
        fs::symlink_metadata(file).is_ok_and(|metadata| self.0.contains(&metadata.ino()))
    }
}

impl Slots {
    /// How many of a machine's slots are taken. Nothing is locked for that.
    pub fn look(&self, machine: &str, max_jobs: u64, locks: &FileLocks) -> u64 {
        let slots = (0..max_jobs.min(MOST_SLOTS)).map(|number| self.path(machine, number));
        slots.filter(|slot| locks.holds(slot)).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let locks = FileLocks::parse(
            "1: FLOCK  ADVISORY  WRITE 11938 fe:00:5341263 0 EOF\n\
             1: -> FLOCK  ADVISORY  WRITE 11939 fe:00:99 0 EOF\n\
             2: FLOCK  ADVISORY  READ 11938 fe:00:672 0 EOF\n\
             3: POSIX  ADVISORY  WRITE 1 00:19:5 0 EOF\n\
             4: OFDLCK ADVISORY  WRITE -1 00:19:6 0 EOF\n\
             5: FLOCK  ADVISORY  WRITE\n\nnonsense\n",
        );
        assert_eq!(locks.0, HashSet::from([5_341_263]));
    }

    #[test]
    fn taken_slots_are_seen_while_they_are_taken() {
        let directory = tempfile::tempdir().unwrap();
        let slots = Slots::open(directory.path().to_owned()).unwrap();
        let look = || slots.look("ssh://m", 4, &FileLocks::read().unwrap());
        assert_eq!(look(), 0);
        assert!(fs::read_dir(directory.path()).unwrap().next().is_none(), "a look makes no files");
        let held = [slots.take("ssh://m", 1), slots.take("ssh://m", 3), slots.take("ssh://other", 0)];
        assert_eq!(look(), 2);
        assert_eq!(slots.count("ssh://m", 4).unwrap().load.taken, 2);
        drop(held);
        assert_eq!(look(), 0);
    }
}
