//! Slots: lock files that say how many builds of this client run on a machine.
//!
//! They have Nix's own names in Nix's own directory, so a stock hook beside ours counts the same slots. Must
//! never choose a machine.
//!
//! Source: Nix 2.34 `src/nix/build-remote/build-remote.cc` (`openSlotLock`, `main-lock`).

mod look;

pub use look::FileLocks;

use crate::plan::Load;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix_derivation::{HashAlgorithm, hash_bytes};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// The file of [`Slots::lock_choice`], by the name that stock hooks have for it.
const MAIN_LOCK: &str = "main-lock";

/// Longest thing that a holder says, in bytes.
const MOST_SAID: u64 = 4096;

/// Why slots cannot be counted.
#[derive(Debug, Error)]
#[error("cannot use {}", path.display())]
pub struct SlotError {
    path: PathBuf,
    source: io::Error,
}

/// A directory of lock files.
#[derive(Debug, Clone)]
pub struct Slots {
    directory: PathBuf,
}

/// Machines that had a slot taken at some time.
#[derive(Debug, Clone)]
pub struct Used(HashSet<String>);

impl Used {
    /// Whether this one is among them.
    pub fn has(&self, machine: &str) -> bool {
        self.0.contains(&stem(machine))
    }
}

/// A lock that is free again when dropped, or when the process ends in whatever way.
#[derive(Debug)]
pub struct Held(Vec<Flock<File>>);

/// What a holder says of the build it has the slot for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process.
    pub pid: u32,
    /// Full path of the derivation.
    pub derivation: String,
    /// When it took the slot, in seconds since 1970.
    pub since: f64,
    /// Seconds that this was expected to take then, if earlier builds tell.
    pub expected: Option<f64>,
}

/// A machine's slots, counted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Count {
    /// How many of them are taken.
    pub load: Load,
    /// The number of the first free one, from 0 on; none if all are taken.
    pub free: Option<u64>,
}

/// Watches for slots becoming free.
#[derive(Debug)]
pub struct Watch(Inotify);

impl Slots {
    /// Uses a directory, and makes it if need be. For slots shared with Nix that is `current-load` in the store's
    /// state directory.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(directory: PathBuf) -> Result<Self, SlotError> {
        match fs::create_dir(&directory) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(SlotError { path: directory, source })
            }
            _ => Ok(Self { directory }),
        }
    }

    /// Uses a directory for looking only. If it is not there no slot is taken.
    pub fn at(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Waits for the right to choose a machine. Whoever counts slots to take one holds it, stock hooks too
    /// (`main-lock`), and for a moment only; so must those who count for another reason, for counting locks each free slot.
    ///
    /// # Errors
    /// If the lock cannot be opened or taken.
    pub fn lock_choice(&self) -> Result<Held, SlotError> {
        wait_for(self.directory.join(MAIN_LOCK))
    }

    /// Which machines ever had a slot taken. Others need not be counted, which matters with a thousand of them.
    pub fn used(&self) -> Used {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let name = |entry: fs::DirEntry| Some(entry.file_name().to_str()?.rsplit_once('-')?.0.to_owned());
        Used(entries.filter_map(name).collect())
    }

    /// Counts a machine's taken slots, and finds a free one, among the first `max_jobs`.
    ///
    /// # Errors
    /// If a lock cannot be opened or tried.
    pub fn count(&self, machine: &str, max_jobs: u64) -> Result<Count, SlotError> {
        let mut count = Count::default();
        for number in 0..max_jobs {
            let path = self.path(machine, number);
            match peek(&path) {
                // Slots above the first free one may be taken and count, so go on.
                Ok(Some(_)) => drop(count.free.get_or_insert(number)),
                Ok(None) => count.load.taken += 1,
                Err(source) => return Err(SlotError { path, source }),
            }
        }
        Ok(count)
    }

    /// Takes a slot; `None` if it is not free after all.
    ///
    /// # Errors
    /// If the lock cannot be opened or tried.
    pub fn take(&self, machine: &str, number: u64) -> Result<Option<Held>, SlotError> {
        let path = self.path(machine, number);
        let held = lock(&path, FlockArg::LockExclusiveNonblock, true);
        held.map(|held| held.map(|held| Held(vec![held]))).map_err(|source| SlotError { path, source })
    }

    /// Takes the first free slot of the first `slots` that a machine, or whatever else `name` stands for, has; `None` if
    /// all are taken.
    ///
    /// # Errors
    /// If a lock cannot be opened or tried.
    pub fn take_any(&self, name: &str, slots: u64) -> Result<Option<Held>, SlotError> {
        for number in 0..slots {
            if let Some(held) = self.take(name, number)? {
                return Ok(Some(held));
            }
        }
        Ok(None)
    }

    /// Takes `needed` of a machine's slots as one, or none at all.
    ///
    /// # Errors
    /// If a lock cannot be opened or tried.
    pub fn take_many(&self, machine: &str, slots: u64, needed: u64) -> Result<Option<Held>, SlotError> {
        let mut taken = Vec::new();
        for number in 0..slots {
            if taken.len() as u64 == needed {
                break;
            }
            if let Some(Held(locks)) = self.take(machine, number)? {
                taken.extend(locks);
            }
        }
        Ok((taken.len() as u64 == needed && needed > 0).then_some(Held(taken)))
    }

    /// The same, but waits up to `bound` for one to be given back. It looks again every few milliseconds, so it is for
    /// short waits; for long ones there is [`Slots::watch`].
    ///
    /// # Errors
    /// If a lock cannot be opened or tried.
    pub fn take_within(&self, name: &str, slots: u64, bound: Duration) -> Result<Option<Held>, SlotError> {
        const AGAIN: Duration = Duration::from_millis(3);
        let end = Instant::now() + bound;
        loop {
            let held = self.take_any(name, slots)?;
            if held.is_some() || Instant::now() >= end {
                return Ok(held);
            }
            thread::sleep(AGAIN);
        }
    }

    /// One entry for each taken slot of a machine: what its holder wrote; `None` where it wrote nothing (a stock hook).
    pub fn holders(&self, machine: &str, max_jobs: u64) -> Vec<Option<Holder>> {
        let taken = |path: &PathBuf| matches!(peek(path), Ok(None));
        (0..max_jobs)
            .map(|number| self.path(machine, number))
            .filter(|path| path.exists() && taken(path))
            .map(|path| Holder::of(&path))
            .collect()
    }

    /// One entry for each build running on the machine; `None` where its hook wrote nothing (a stock hook).
    pub fn running(&self, machine: &str, max_jobs: u64) -> Vec<Option<Holder>> {
        // Looking at a free slot locks it for a moment; a hook that is choosing must not see that.
        let _choosing = self.lock_choice();
        let mut running: Vec<Option<Holder>> = Vec::new();
        for holder in self.holders(machine, max_jobs) {
            if holder.is_none() || !running.contains(&holder) {
                running.push(holder);
            }
        }
        running
    }

    /// Begins to watch for slots becoming free. What happens from now on is not missed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn watch(&self) -> Result<Watch, SlotError> {
        let failed = |errno: Errno| SlotError { path: self.directory.clone(), source: errno.into() };
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(failed)?;
        inotify.add_watch(&self.directory, AddWatchFlags::IN_CLOSE_WRITE).map_err(failed)?;
        Ok(Watch(inotify))
    }

    fn path(&self, machine: &str, number: u64) -> PathBuf {
        self.directory.join(format!("{}-{number}", stem(machine)))
    }
}

impl Held {
    /// Says in the lock files what is being done, for people and for those who wait. That it cannot be said harms nobody.
    pub fn say(&self, holder: &Holder) {
        let Ok(text) = serde_json::to_string(holder) else { return };
        for file in &self.0 {
            let _ = file.set_len(0).and_then(|()| file.write_all_at(text.as_bytes(), 0));
        }
    }
}

impl Holder {
    /// The name of what it builds, for people.
    pub fn name(&self) -> &str {
        let base = self.derivation.rsplit('/').next().unwrap_or_default();
        let name = base.split_once('-').map_or(base, |(_, name)| name);
        name.strip_suffix(".drv").unwrap_or(name)
    }

    /// When it took the slot.
    pub fn began(&self) -> SystemTime {
        let since = Duration::try_from_secs_f64(self.since).unwrap_or_default();
        UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
    }

    /// Reads it. A stock hook that has the slot now leaves what the holder before it said, but sets the file's time.
    fn of(path: &Path) -> Option<Self> {
        const SLACK: Duration = Duration::from_secs(2);
        let mut text = String::new();
        let file = File::open(path).ok()?;
        let said = file.metadata().and_then(|metadata| metadata.modified()).ok()?;
        file.take(MOST_SAID).read_to_string(&mut text).ok()?;
        let holder: Self = serde_json::from_str(&text).ok()?;
        let began = UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(holder.since).ok()?)?;
        let apart = said.duration_since(began).unwrap_or_else(|error| error.duration());
        (apart <= SLACK).then_some(holder)
    }
}

impl Watch {
    /// Waits until a slot may have become free, or `bound` is over.
    pub fn wait(&self, bound: Duration) {
        let end = Instant::now() + bound;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            // A part of a millisecond would be cut off.
            let left = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            if !poll(&mut fds, left).is_ok_and(|ready| ready > 0) {
                return;
            }
            // Whoever counts closes the main lock, we too: that frees no slot.
            let events = self.0.read_events().unwrap_or_default();
            if events.iter().any(|event| event.name.as_deref() != Some(OsStr::new(MAIN_LOCK))) {
                return;
            }
        }
    }
}

/// The name of a machine's lock files without the number.
fn stem(machine: &str) -> String {
    /// Of a file, less a number of four digits.
    const LONGEST_NAME: usize = 250;
    let name = machine.replace('/', "_");
    if name.len() <= LONGEST_NAME {
        return name;
    }
    // Stock fails where the file's name is too long; a digest serves as well, for no stock hook can share such a machine.
    hash_bytes(HashAlgorithm::Sha256, machine.as_bytes()).to_nix_base16_string().replace(':', "-")
}

fn wait_for(path: PathBuf) -> Result<Held, SlotError> {
    lock(&path, FlockArg::LockExclusive, true)
        .and_then(|held| held.ok_or_else(|| io::ErrorKind::WouldBlock.into()))
        .map(|held| Held(vec![held]))
        .map_err(|source| SlotError { path, source })
}

/// Looks whether a slot is free; `None` when another process holds it.
///
/// Only a descriptor for writing tells those who watch when it is closed, so this one is for reading. With that NFS gives no
/// exclusive lock (`nfs4_proc_lock` in fs/nfs/nfs4proc.c of Linux 6.18: EBADF), but a shared one serves as well.
fn peek(path: &Path) -> io::Result<Option<Flock<File>>> {
    lock(path, FlockArg::LockSharedNonblock, false)
}

/// Opens and locks; `None` when another process holds it.
fn lock(path: &Path, how: FlockArg, write: bool) -> io::Result<Option<Flock<File>>> {
    let mut options = OpenOptions::new();
    options.read(true).mode(0o600);
    let file = match options.clone().write(write).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => options.write(true).create(true).open(path),
        other => other,
    };
    let mut file = file?;
    loop {
        match Flock::lock(file, how) {
            Ok(held) => {
                if write {
                    // As stock does, for people who look at the directory; of no other use.
                    let _ = held.set_modified(SystemTime::now());
                }
                return Ok(Some(held));
            }
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((same, Errno::EINTR)) => file = same,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots() -> (tempfile::TempDir, Slots) {
        let state = tempfile::tempdir().unwrap();
        let slots = Slots::open(state.path().join("current-load")).unwrap();
        (state, slots)
    }

    fn take(slots: &Slots, machine: &str, jobs: u64) -> (u64, Option<Held>) {
        let Count { load, free } = slots.count(machine, jobs).unwrap();
        (load.taken, free.map(|number| slots.take(machine, number).unwrap().unwrap()))
    }

    #[test]
    fn slots_are_counted_taken_and_given_back() {
        let (_state, slots) = slots();
        let (taken, first) = take(&slots, "ssh-ng://mac", 2);
        assert_eq!((taken, first.is_some()), (0, true));
        let (taken, second) = take(&slots, "ssh-ng://mac", 2);
        assert_eq!((taken, second.is_some()), (1, true));
        assert_eq!(take(&slots, "ssh-ng://mac", 2).0, 2);
        drop(first);
        let (taken, again) = take(&slots, "ssh-ng://mac", 2);
        assert_eq!((taken, again.is_some()), (1, true));
        assert_eq!(take(&slots, "ssh-ng://other", 1).0, 0);
        assert!(slots.take_any("ssh-ng://mac", 2).unwrap().is_none());
        assert!(slots.take_any("ssh-ng://mac", 3).unwrap().is_some());
    }

    #[test]
    fn a_look_at_slots_is_in_nobodys_way_who_looks_too() {
        let (_state, slots) = slots();
        let (_, held) = take(&slots, "m", 1);
        drop(held);
        // With a lock that a file system may give for reading alone.
        let looking = peek(&slots.path("m", 0)).unwrap().unwrap();
        assert_eq!(slots.count("m", 1).unwrap().load.taken, 0);
        assert_eq!(slots.holders("m", 1), []);
        assert!(slots.take("m", 0).unwrap().is_none());
        drop(looking);
        assert!(slots.take("m", 0).unwrap().is_some());
    }

    #[test]
    fn one_of_several_slots_is_waited_for_with_a_bound() {
        const LONG: Duration = Duration::from_secs(20);
        let (_state, slots) = slots();
        let first = slots.take_within("m", 2, LONG).unwrap();
        let second = slots.take_within("m", 2, LONG).unwrap();
        assert!(first.is_some() && second.is_some());
        assert!(slots.take_within("m", 2, Duration::from_millis(20)).unwrap().is_none());
        let waiting = thread::spawn({
            let slots = slots.clone();
            move || slots.take_within("m", 2, LONG).unwrap().is_some()
        });
        drop((first, second));
        assert!(waiting.join().unwrap());
    }

    #[test]
    fn several_slots_are_taken_and_given_back_together_or_not_at_all() {
        let (_state, slots) = slots();
        let first = slots.take("m", 1).unwrap();
        assert!(slots.take_many("m", 4, 4).unwrap().is_none());
        assert_eq!(slots.count("m", 4).unwrap().load.taken, 1);
        let three = slots.take_many("m", 4, 3).unwrap();
        assert_eq!(slots.count("m", 4).unwrap().load.taken, 4);
        drop((first, three));
        assert_eq!(slots.count("m", 4).unwrap().load.taken, 0);
        assert!(slots.used().has("m") && !slots.used().has("n"));
    }

    #[test]
    fn holders_say_what_they_do_until_a_stock_hook_has_the_slot() {
        let (_state, slots) = slots();
        // A whole number, which JSON gives back as it was.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as f64;
        let holder = Holder { pid: 1, derivation: "/nix/store/d".into(), since, expected: Some(2.5) };
        let held = slots.take("m", 1).unwrap().unwrap();
        let silent = slots.take("m", 2).unwrap().unwrap();
        held.say(&Holder { derivation: "/a/longer/one".into(), ..holder.clone() });
        held.say(&holder);
        assert_eq!(slots.holders("m", 4), [Some(holder.clone()), None]);
        assert_eq!(slots.running("m", 4), [Some(holder.clone()), None]);
        let second = slots.take("m", 3).unwrap().unwrap();
        second.say(&holder);
        assert_eq!(slots.running("m", 4), [Some(holder.clone()), None], "one build with two slots");
        drop(second);
        drop((held, silent));
        assert_eq!(slots.holders("m", 4), []);
        // As stock does: locked, the time set, nothing said.
        let stock =
            Held(vec![lock(&slots.path("m", 1), FlockArg::LockExclusiveNonblock, true).unwrap().unwrap()]);
        stock.0[0].set_modified(SystemTime::now() + Duration::from_secs(60)).unwrap();
        assert_eq!(slots.holders("m", 4), [None]);
    }

    #[test]
    fn the_files_have_the_names_of_nix() {
        let (state, slots) = slots();
        let _choosing = slots.lock_choice().unwrap();
        let _slot = take(&slots, "ssh://a@b", 1);
        let directory = state.path().join("current-load");
        assert!(directory.join("main-lock").exists());
        assert!(directory.join("ssh:__a@b-0").exists());
    }

    #[test]
    fn a_machine_without_slots_is_never_free_and_a_long_name_works() {
        let (_state, slots) = slots();
        assert!(slots.count("m", 0).unwrap().free.is_none());
        let long = "x".repeat(300);
        let (_, held) = take(&slots, &long, 1);
        assert!(held.is_some());
        assert_eq!(take(&slots, &long, 1).0, 1);
    }

    #[test]
    fn a_watch_wakes_when_a_slot_is_given_back_and_not_when_slots_are_counted() {
        const LONG: Duration = Duration::from_secs(20);
        let (_state, slots) = slots();
        let held = take(&slots, "m", 1).1.unwrap();
        let watch = slots.watch().unwrap();
        let choosing = slots.lock_choice().unwrap();
        slots.count("m", 1).unwrap();
        drop(choosing);
        let begin = Instant::now();
        watch.wait(Duration::from_millis(50));
        assert!(begin.elapsed() >= Duration::from_millis(50), "counting woke the watch");
        drop(held);
        let begin = Instant::now();
        watch.wait(LONG);
        assert!(begin.elapsed() < LONG, "the watch slept on");
    }
}
