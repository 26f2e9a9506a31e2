//! Which process sends a path to a machine, so that no two of this user send the same one at the same time.
//!
//! For each machine there is one file in the runtime directory. A large path is locked by a byte of it, at a place that
//! follows from the path's name, far behind what is written; whatever ends the holder frees it, and nothing has to be
//! cleared away. In the file stands what was sent last, for those who asked the machine before that and lock the path
//! after it. Another file says for each who sends how much is still on its way, for those who choose a machine. Must never
//! speak to a machine, or wait while it holds a lock.

use crate::digest;
use crate::path_info::PathInfo;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix_derivation::StorePath;
use nix_offload_proxy::small_file::in_directory;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// Paths whose NAR is smaller are sent without a word: that takes no longer than asking again.
const LEAST: u64 = 256 << 10;
/// How many paths of one build are locked at most: the largest.
const MOST: usize = 64;
/// How many paths the record has room for.
const ROOM: u64 = 1024;
/// Bytes of a number in the record.
const NUMBER: u64 = 8;
/// The byte that is locked by whoever writes the record. It may be any that belongs to no path.
const RECORD: i64 = 0;
/// How often a lock that somebody else has is looked at, at first and at last.
const INTERVAL: Duration = Duration::from_millis(1);
const LONGEST_INTERVAL: Duration = Duration::from_millis(20);

/// In the runtime directory.
const DIRECTORY: &str = "sending";
/// In that one: what is on its way now.
const LOADS: &str = "now";
/// The longest such file that is read, in bytes.
const LONGEST_LOAD: u64 = 4096;
/// How old a file is that belongs to nobody if nobody has it locked.
const ABANDONED: Duration = Duration::from_secs(10);

/// The sending of paths to one machine.
#[derive(Debug)]
pub struct Sending {
    machine: String,
    path: PathBuf,
    file: OnceLock<File>,
}

/// A moment before the machine was asked what it has: how many paths had been sent to it by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(u64);

/// How missing paths are shared out.
#[derive(Debug)]
pub struct Shares<'a> {
    /// To be sent by us, references first. The large ones are locked until they are told to be there, or this is dropped.
    pub ours: Vec<PathInfo>,
    /// Those that another process sends or has sent since the mark, and what refers to them, references first. The
    /// machine is to be asked again for them.
    pub others: Vec<PathInfo>,
    locked: BTreeSet<i64>,
    load: Option<Load>,
    sending: &'a Sending,
}

/// What one process has on its way to a machine, told to others as long as this is there.
#[derive(Debug)]
struct Load {
    path: PathBuf,
    /// Locked, so that what a process leaves that was killed is not believed.
    file: File,
    machine: String,
    bytes: u64,
}

/// How many bytes are on their way to machines now, by their names. Costs one look, and another for each who sends.
pub fn backlogs(runtime: &Path) -> HashMap<String, u64> {
    let mut backlogs = HashMap::new();
    let entries = fs::read_dir(runtime.join(DIRECTORY).join(LOADS)).into_iter().flatten().flatten();
    for (machine, bytes) in entries.filter_map(|entry| Load::read(&entry.path())) {
        let backlog: &mut u64 = backlogs.entry(machine).or_default();
        *backlog = backlog.saturating_add(bytes);
    }
    backlogs
}

impl Load {
    /// None if there is no place for it, which only makes estimates worse.
    fn tell(sending: &Sending, bytes: u64) -> Option<Self> {
        let directory = sending.path.parent()?.join(LOADS);
        let path = directory.join(unique());
        let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = in_directory(&directory, || in_directory(&path, open));
        let load = Self { file: file.ok()?, path, machine: sending.machine.clone(), bytes };
        load.file.try_lock().ok()?;
        load.write();
        Some(load)
    }

    fn arrived(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.write();
    }

    /// The number has always as many digits, so that it is never seen in part.
    fn write(&self) {
        let _ = self.file.write_all_at(format!("{:020} {}\n", self.bytes, self.machine).as_bytes(), 0);
    }

    /// The machine and the bytes of one that somebody tells now. What was left by one that was killed is removed.
    fn read(path: &Path) -> Option<(String, u64)> {
        let file = File::open(path).ok()?;
        if !matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
            // One that is only just made is not yet locked.
            let age = file.metadata().and_then(|file| file.modified()).ok()?.elapsed();
            if age.is_ok_and(|age| age > ABANDONED) {
                let _ = fs::remove_file(path);
            }
            return None;
        }
        let mut text = String::new();
        file.take(LONGEST_LOAD).read_to_string(&mut text).ok()?;
        let (bytes, machine) = text.strip_suffix('\n')?.split_once(' ')?;
        Some((machine.to_owned(), bytes.parse().ok()?))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A name that no other one has.
fn unique() -> String {
    format!("{}-{:x}", process::id(), RandomState::new().build_hasher().finish())
}

impl Sending {
    /// To the machine of that name. `directory` is the runtime directory.
    pub fn to(directory: &Path, machine: &str) -> Self {
        Self {
            machine: machine.to_owned(),
            path: directory.join(DIRECTORY).join(digest::short(machine)),
            file: OnceLock::new(),
        }
    }

    /// To be taken before the machine is asked what it has.
    pub fn mark(&self) -> Mark {
        let file = self.file.get().map(File::try_clone).unwrap_or_else(|| File::open(&self.path));
        Mark(file.and_then(|file| number(&file, 0)).unwrap_or_default())
    }

    /// Shares out paths that the machine lacked after `mark`, references first. If there can be no locks, all are ours.
    pub fn share(&self, infos: Vec<PathInfo>, mark: Mark) -> Shares<'_> {
        let mut large: Vec<&PathInfo> = infos.iter().filter(|info| info.nar_size >= LEAST).collect();
        large.sort_by_key(|info| std::cmp::Reverse(info.nar_size));
        large.truncate(MOST);
        let large: HashSet<StorePath> = large.into_iter().map(|info| info.path.clone()).collect();
        let mut shares = self.all(Vec::new());
        let mut left: HashSet<StorePath> = HashSet::new();
        for info in infos {
            let is_left = info.references.iter().any(|path| left.contains(path))
                || (large.contains(&info.path) && !shares.lock(&info.path, mark));
            if is_left {
                left.insert(info.path.clone());
                shares.others.push(info);
            } else {
                shares.ours.push(info);
            }
        }
        shares.tell();
        shares
    }

    /// All are ours, whoever else sends them.
    pub fn all(&self, infos: Vec<PathInfo>) -> Shares<'_> {
        let mut shares =
            Shares { ours: infos, others: Vec::new(), locked: BTreeSet::new(), load: None, sending: self };
        shares.tell();
        shares
    }

    /// Waits until nobody else sends one of these, or until the deadline. False if it had come before.
    pub fn wait(&self, infos: &[PathInfo], deadline: Instant) -> bool {
        let begin = Instant::now();
        for info in infos.iter().filter(|info| info.nar_size >= LEAST) {
            while self.file().is_ok_and(|file| is_locked(file, place(&info.path))) {
                if Instant::now() >= deadline {
                    return false;
                }
                thread::sleep((begin.elapsed() / 8).clamp(INTERVAL, LONGEST_INTERVAL));
            }
        }
        true
    }

    /// The first one that somebody else is sending now.
    pub fn in_progress<'a>(&self, infos: &'a [PathInfo]) -> Option<&'a PathInfo> {
        let file = self.file().ok()?;
        infos.iter().filter(|info| info.nar_size >= LEAST).find(|info| is_locked(file, place(&info.path)))
    }

    fn file(&self) -> io::Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = in_directory(&self.path, || options.open(&self.path))?;
        Ok(self.file.get_or_init(|| file))
    }

    /// Notes what was sent. If it cannot be noted, somebody may send it again.
    fn note(&self, places: &[i64]) -> io::Result<()> {
        let file = self.file()?;
        change(file, RECORD, libc::F_WRLCK, true)?;
        let written = (|| {
            let mut count = number(file, 0)?;
            for place in places {
                file.write_all_at(&place.to_le_bytes(), NUMBER * (1 + count % ROOM))?;
                count += 1;
            }
            file.write_all_at(&count.to_le_bytes(), 0)
        })();
        let freed = change(file, RECORD, libc::F_UNLCK, false);
        written.and(freed.map(drop))
    }

    /// Whether that was sent since, or may have been.
    fn was_sent(&self, place: i64, since: Mark) -> io::Result<bool> {
        let file = self.file()?;
        let count = number(file, 0)?;
        if count < since.0 || count - since.0 > ROOM {
            return Ok(true);
        }
        for index in since.0..count {
            if number(file, NUMBER * (1 + index % ROOM))? == place as u64 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn free(&self, places: impl IntoIterator<Item = i64>) {
        let Some(file) = self.file.get() else { return };
        for place in places {
            // That they are freed with the file, at the end of the process, is soon enough if this fails.
            let _ = change(file, place, libc::F_UNLCK, false);
        }
    }
}

impl Shares<'_> {
    /// These are valid on the machine now.
    pub fn arrived(&mut self, infos: &[PathInfo]) {
        if let Some(load) = &mut self.load {
            load.arrived(weight(infos));
        }
        let places: Vec<i64> =
            infos.iter().map(|info| place(&info.path)).filter(|place| self.locked.remove(place)).collect();
        if places.is_empty() {
            return;
        }
        if let Err(error) = self.sending.note(&places) {
            tracing::debug!(path = %self.sending.path.display(), %error, "cannot note what was sent");
        }
        self.sending.free(places);
    }

    /// Whether this one is large, and so waited for by others perhaps.
    pub fn is_locked(&self, info: &PathInfo) -> bool {
        self.locked.contains(&place(&info.path))
    }

    /// Tells others how much is on its way, if that takes longer than telling it.
    fn tell(&mut self) {
        let bytes = weight(&self.ours);
        if bytes >= LEAST {
            self.load = Load::tell(self.sending, bytes);
        }
    }

    /// False if it is for another process to send, or there already.
    fn lock(&mut self, path: &StorePath, mark: Mark) -> bool {
        let place = place(path);
        // Two paths may have the same place, though hardly ever.
        if self.locked.contains(&place) {
            return true;
        }
        let sending = self.sending;
        let locked = sending.file().and_then(|file| change(file, place, libc::F_WRLCK, false));
        match locked.and_then(|locked| Ok((locked, locked && sending.was_sent(place, mark)?))) {
            Ok((true, false)) => {
                self.locked.insert(place);
                true
            }
            Ok((true, true)) => {
                sending.free([place]);
                false
            }
            Ok((false, _)) => false,
            Err(error) => {
                tracing::debug!(path = %sending.path.display(), %error, "sending without a lock");
                true
            }
        }
    }
}

impl Drop for Shares<'_> {
    fn drop(&mut self) {
        self.sending.free(std::mem::take(&mut self.locked));
    }
}

/// Bytes of their NARs.
fn weight(infos: &[PathInfo]) -> u64 {
    infos.iter().fold(0, |sum, info| sum.saturating_add(info.nar_size))
}

/// The byte for a path: FNV-1a of its name, which begins with a digest already, in the upper half of what a file can
/// have.
fn place(path: &StorePath) -> i64 {
    const UPPER_HALF: u64 = 1 << 62;
    let hash = path.to_basename().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (hash >> 2 | UPPER_HALF) as i64
}

fn byte(place: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: place,
        l_len: 1,
        l_pid: 0,
    }
}

/// Takes or gives back a lock of this open file. False if another one has it.
fn change(file: &File, place: i64, kind: i32, waits: bool) -> io::Result<bool> {
    let lock = byte(place, kind);
    loop {
        let how = if waits { FcntlArg::F_OFD_SETLKW(&lock) } else { FcntlArg::F_OFD_SETLK(&lock) };
        match fcntl(file, how) {
            Ok(_) => return Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether another open file has it.
fn is_locked(file: &File, place: i64) -> bool {
    let mut lock = byte(place, libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && lock.l_type != libc::F_UNLCK as libc::c_short
}

/// A number of the record; 0 behind its end.
fn number(file: &File, at: u64) -> io::Result<u64> {
    let mut bytes = [0; NUMBER as usize];
    match file.read_exact_at(&mut bytes, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
        read => read.map(|()| u64::from_le_bytes(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(number: u64) -> StorePath {
        StorePath::from_basename(format!("{number:0>32}-x").as_bytes()).unwrap()
    }

    fn info(number: u64, nar_size: u64, references: &[u64]) -> PathInfo {
        PathInfo {
            path: path(number),
            deriver: None,
            nar_hash: [0; 32],
            nar_size,
            references: references.iter().map(|number| path(*number)).collect(),
            registration_time: 0,
            ultimate: false,
            signatures: Vec::new(),
            content_address: None,
        }
    }

    /// What is ours and what others', as numbers.
    fn numbers(infos: &[PathInfo]) -> Vec<u64> {
        infos.iter().map(|info| info.path.to_basename()[..32].parse().unwrap()).collect()
    }

    fn assert_shared(shares: &Shares<'_>, ours: &[u64], others: &[u64]) {
        assert_eq!((numbers(&shares.ours).as_slice(), numbers(&shares.others).as_slice()), (ours, others));
    }

    /// Those of two processes.
    fn two() -> (tempfile::TempDir, Sending, Sending) {
        let directory = tempfile::tempdir().unwrap();
        let [one, other] = ["m", "m"].map(|machine| Sending::to(directory.path(), machine));
        (directory, one, other)
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_one_sends_another_leaves_to_it_with_all_that_refers_to_it() {
        let (_directory, one, other) = two();
        let first = one.share(vec![info(1, LEAST, &[])], one.mark());
        assert_shared(&first, &[1], &[]);
        let paths = vec![info(2, 10, &[]), info(1, LEAST, &[1]), info(3, 10, &[1, 2]), info(4, LEAST, &[2])];
        let second = other.share(paths, other.mark());
        assert_shared(&second, &[2, 4], &[1, 3]);
        // Neither waits for what the other does not send.
        assert!(one.in_progress(&[info(1, LEAST, &[]), info(2, 10, &[])]).is_none());
        assert_eq!(other.in_progress(&second.others).unwrap().path, path(1));
        drop(first);
        assert!(other.in_progress(&second.others).is_none());
        assert!(other.wait(&second.others, Instant::now() + LONG));
    }

    #[test]
    fn small_paths_and_other_machines_do_not_matter_and_leave_no_file() {
        let (directory, one, other) = two();
        let _first = one.share(vec![info(1, LEAST - 1, &[])], one.mark());
        assert_shared(&other.share(vec![info(1, LEAST - 1, &[])], other.mark()), &[1], &[]);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        let _large = one.share(vec![info(2, LEAST, &[])], one.mark());
        let elsewhere = Sending::to(directory.path(), "other");
        assert_shared(&elsewhere.share(vec![info(2, LEAST, &[])], elsewhere.mark()), &[2], &[]);
    }

    #[test]
    fn only_the_largest_are_locked() {
        let (_directory, one, other) = two();
        let many =
            || (0..MOST as u64 + 2).map(|number| info(number, LEAST + number, &[])).collect::<Vec<_>>();
        let first = one.share(many(), one.mark());
        assert_eq!(first.ours.len(), MOST + 2);
        let second = other.share(many(), other.mark());
        assert_eq!((numbers(&second.ours), second.others.len()), (vec![0, 1], MOST));
        assert!(first.is_locked(&many()[2]) && !first.is_locked(&many()[1]));
    }

    #[test]
    fn what_was_sent_after_the_machine_was_asked_is_asked_for_again() {
        let (_directory, one, other) = two();
        let before = other.mark();
        let mut first = one.share(vec![info(1, LEAST, &[]), info(2, LEAST, &[])], one.mark());
        first.arrived(&[info(1, LEAST, &[])]);
        // It is free, the other one is not, and neither is ours.
        let second = other.share(vec![info(1, LEAST, &[]), info(2, LEAST, &[])], before);
        assert_shared(&second, &[], &[1, 2]);
        assert_eq!(other.in_progress(&second.others).unwrap().path, path(2));
        // Whoever asks the machine now and hears that it is gone again may send it.
        assert_shared(&other.share(vec![info(1, LEAST, &[])], other.mark()), &[1], &[]);
        // A sender that ended before its time has sent nothing.
        drop(first);
        assert_shared(&other.share(vec![info(2, LEAST, &[])], before), &[2], &[]);
    }

    #[test]
    fn a_record_that_has_gone_around_is_not_trusted() {
        let (_directory, one, other) = two();
        let before = other.mark();
        for number in 0..ROOM + 1 {
            assert_shared(&other.share(vec![info(5000, LEAST, &[])], before), &[5000], &[]);
            one.share(vec![info(number, LEAST, &[])], one.mark()).arrived(&[info(number, LEAST, &[])]);
        }
        assert_shared(&other.share(vec![info(5000, LEAST, &[])], before), &[], &[5000]);
        assert!(fs::metadata(&one.path).unwrap().len() <= NUMBER * (ROOM + 1));
    }

    #[test]
    fn a_wait_ends_with_the_sender_or_at_the_deadline() {
        let (_directory, one, other) = two();
        let paths = [info(1, LEAST, &[])];
        let first = one.share(paths.to_vec(), one.mark());
        let begin = Instant::now();
        assert!(!other.wait(&paths, begin + Duration::from_millis(30)));
        assert!(begin.elapsed() >= Duration::from_millis(30));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| other.wait(&[info(1, LEAST, &[])], Instant::now() + LONG));
            drop(first);
            // Whoever holds it is gone with its file.
            assert!(waiting.join().unwrap());
        });
        let third = Sending::to(one.path.parent().unwrap().parent().unwrap(), "m");
        let held = third.share(paths.to_vec(), third.mark());
        assert!(one.in_progress(&paths).is_some());
        std::mem::forget(held);
        drop(third);
        assert!(one.in_progress(&paths).is_none());
    }

    #[test]
    fn what_is_on_its_way_is_told_until_it_has_arrived_or_its_sender_is_gone() {
        let (directory, one, other) = two();
        let elsewhere = Sending::to(directory.path(), "other machine");
        let backlogs = || {
            let mut all: Vec<_> = backlogs(directory.path()).into_iter().collect();
            all.sort();
            all
        };
        assert_eq!(backlogs(), []);
        let small = one.share(vec![info(9, LEAST - 1, &[])], one.mark());
        assert_eq!(backlogs(), []);
        let mut first = one.share(vec![info(1, LEAST, &[]), info(2, 10, &[])], one.mark());
        let second = other.all(vec![info(3, 7 * LEAST, &[])]);
        let _third = elsewhere.share(vec![info(3, 2 * LEAST, &[])], elsewhere.mark());
        let (m, that) = (|bytes| ("m".to_owned(), bytes), ("other machine".to_owned(), 2 * LEAST));
        assert_eq!(backlogs(), [m(8 * LEAST + 10), that.clone()]);
        first.arrived(&[info(1, LEAST, &[])]);
        assert_eq!(backlogs(), [m(7 * LEAST + 10), that.clone()]);
        drop((small, first));
        assert_eq!(backlogs(), [m(7 * LEAST), that.clone()]);
        // What is left of a process that was killed.
        let loads = directory.path().join(DIRECTORY).join(LOADS);
        let left = loads.join("left");
        fs::copy(&second.load.as_ref().unwrap().path, &left).unwrap();
        assert_eq!(backlogs(), [m(7 * LEAST), that.clone()]);
        assert!(left.exists(), "it may be about to be locked");
        let long_ago = std::time::SystemTime::now() - ABANDONED * 2;
        File::options().write(true).open(&left).unwrap().set_modified(long_ago).unwrap();
        drop(second);
        assert_eq!(backlogs(), [that]);
        assert_eq!(fs::read_dir(&loads).unwrap().count(), 1);
    }

    #[test]
    fn without_a_place_for_locks_everything_is_ours() {
        let nowhere = Sending::to(Path::new("/proc/no-such"), "m");
        let shares = nowhere.share(vec![info(1, LEAST, &[])], nowhere.mark());
        assert_shared(&shares, &[1], &[]);
        assert!(nowhere.wait(&shares.ours, Instant::now() + LONG));
    }
}
