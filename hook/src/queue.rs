//! The queue of builds that wait here for a slot: who may wait, and whose turn it is.
//!
//! Builds that can use the same machines stand in one line for each user, in the order in which they were accepted. The
//! first of each user's line goes on to the line of all, so that users take turns. Only the first in that one looks at
//! the slots; when it has one, the next takes its place.
//!
//! A place is a file that its process holds a lock on. Each process waits for the lock of the one before it, so whoever
//! is killed holds nobody up, and a slot that is given back wakes one process, not all. The lock alone would not do:
//! who comes in the moment in which it is given back may have it before those who wait (`flock_lock_inode` in
//! fs/locks.c of Linux 6.18), and those who wait get it in an order that nobody promises.
//!
//! Must never look at slots, or know what is built.

use nix::unistd::getppid;
use nix_derivation::{HashAlgorithm, hash_bytes};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Held while a place is taken, for microseconds.
const DOOR: &str = "door";
/// What is not yet a place.
const DRAFT: &str = "draft";
/// The most bytes of the names of machines that are read.
const MOST_NAMES: u64 = 1 << 20;
/// Digits of the hash of the names of machines.
const SET_DIGITS: usize = 20;

/// Why there is no place in the queue.
#[derive(Debug, Error)]
#[error("cannot use {} to wait for a slot", path.display())]
pub struct QueueError {
    path: PathBuf,
    source: io::Error,
}

/// The places of all processes of a user of this system, who is root if builds are done by the Nix daemon.
#[derive(Debug, Clone)]
pub struct Queue {
    directory: PathBuf,
}

/// A place in a line, free when dropped, or when the process ends in whatever way.
#[derive(Debug)]
struct Ticket {
    path: PathBuf,
    line: String,
    number: u64,
    _held: File,
}

/// A place among the builds of one user that wait for the same machines.
#[derive(Debug)]
pub struct Place {
    queue: Queue,
    machines: Vec<String>,
    ticket: Ticket,
}

/// The turn to look for a slot.
#[derive(Debug)]
pub struct Turn {
    // First, so that it is given back first: the next user is to have it before this one's next build.
    turn: Ticket,
    place: Place,
}

impl Queue {
    /// The one in a runtime directory, to be looked at.
    pub fn of(directory: &Path) -> Self {
        Self { directory: directory.join("queue") }
    }

    /// The same, to be used; it is made if need be.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(directory: &Path) -> Result<Self, QueueError> {
        let queue = Self::of(directory);
        match fs::create_dir(&queue.directory) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(QueueError { path: queue.directory, source })
            }
            _ => Ok(queue),
        }
    }

    /// A place behind the builds of this user that wait for these machines. None if so many (`most`) wait for them already,
    /// whoever's they are.
    ///
    /// # Errors
    /// If files cannot be written.
    pub fn place(&self, machines: &[&str], user: u32, most: u64) -> Result<Option<Place>, QueueError> {
        let set = set_of(machines);
        let of_set = format!("{set}-u");
        let is_full =
            || self.names().iter().filter(|name| name.line.starts_with(&of_set)).count() as u64 >= most;
        // Some of them may have been killed.
        if is_full() {
            for name in self.names().into_iter().filter(|name| name.line.starts_with(&of_set)) {
                self.is_alive(&name);
            }
            if is_full() {
                return Ok(None);
            }
        }
        let ticket = self.ticket(format!("{of_set}{user}"), machines)?;
        let machines = machines.iter().map(|name| (*name).to_owned()).collect();
        Ok(Some(Place { queue: self.clone(), machines, ticket }))
    }

    /// How many builds wait for a slot of each machine.
    pub fn waiting(&self) -> BTreeMap<String, u64> {
        let mut sets: BTreeMap<String, Vec<Name>> = BTreeMap::new();
        for name in self.names() {
            if let Some((set, _)) = name.line.split_once("-u") {
                sets.entry(set.to_owned()).or_default().push(name);
            }
        }
        let mut waiting = BTreeMap::new();
        for mut names in sets.into_values() {
            names.sort_by_key(|name| name.number);
            // One that lives is enough to believe in those before it, who are asked when it is their turn.
            while names.last().is_some_and(|last| !self.is_alive(last)) {
                names.pop();
            }
            for machine in names.last().map(|last| self.machines_of(last)).unwrap_or_default() {
                *waiting.entry(machine).or_default() += names.len() as u64;
            }
        }
        waiting
    }

    /// The last place in a line.
    fn ticket(&self, line: String, machines: &[&str]) -> Result<Ticket, QueueError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| QueueError { path, source }
        };
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(true).mode(0o600).open(path)
        };
        let door = self.directory.join(DOOR);
        let _door = open(&door).and_then(|file| lock(&file).map(|()| file)).map_err(failed(&door))?;
        let number = self.names().iter().map(|name| name.number).max().unwrap_or(0) + 1;
        // It has its name when it is locked, so one that is not is nobody's.
        let draft = self.directory.join(DRAFT);
        let _ = fs::remove_file(&draft);
        let path = self.directory.join(format!("{line}.{number}"));
        let made = open(&draft).and_then(|mut file| {
            lock(&file)?;
            file.write_all(machines.join("\n").as_bytes())?;
            fs::rename(&draft, &path)?;
            Ok(file)
        });
        let held = made.map_err(failed(&draft))?;
        Ok(Ticket { path, line, number, _held: held })
    }

    /// Waits until a ticket is the first of its line.
    fn wait_for(&self, ticket: &Ticket) -> Result<(), QueueError> {
        loop {
            let before = self
                .names()
                .into_iter()
                .filter(|name| name.is_in(&ticket.line) && name.number < ticket.number);
            let Some(before) = before.max_by_key(|name| name.number) else { return Ok(()) };
            let path = self.path(&before);
            let ended = File::open(&path).and_then(|file| {
                loop {
                    match file.lock_shared() {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        other => break other,
                    }
                }
            });
            match ended {
                // Nobody is there any more. If it was killed its file is still there.
                Ok(()) => drop(fs::remove_file(&path)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(QueueError { path, source }),
            }
        }
    }

    /// Whether somebody has this place. If not it is removed.
    fn is_alive(&self, name: &Name) -> bool {
        let path = self.path(name);
        let Ok(file) = File::open(&path) else { return false };
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => true,
            // It cannot be told, and nobody is to be overtaken.
            Err(TryLockError::Error(_)) => true,
            Ok(()) => {
                let _ = fs::remove_file(&path);
                false
            }
        }
    }

    fn machines_of(&self, name: &Name) -> BTreeSet<String> {
        let mut text = String::new();
        let read =
            File::open(self.path(name)).and_then(|file| file.take(MOST_NAMES).read_to_string(&mut text));
        // It may be free by now.
        let _ = read;
        text.lines().map(str::to_owned).collect()
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.directory.join(format!("{}.{}", name.line, name.number))
    }

    /// All places of all lines.
    fn names(&self) -> Vec<Name> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| Name::parse(entry.file_name().to_str()?)).collect()
    }
}

/// The name of a place.
#[derive(Debug)]
struct Name {
    line: String,
    number: u64,
}

impl Name {
    fn parse(name: &str) -> Option<Self> {
        let (line, number) = name.rsplit_once('.')?;
        Some(Self { line: line.to_owned(), number: number.parse().ok()? })
    }

    fn is_in(&self, line: &str) -> bool {
        self.line == line
    }
}

impl Place {
    /// Waits for its turn.
    ///
    /// # Errors
    /// If files cannot be written or read.
    pub fn wait(self) -> Result<Turn, QueueError> {
        self.queue.wait_for(&self.ticket)?;
        let machines: Vec<&str> = self.machines.iter().map(String::as_str).collect();
        let turn = self.queue.ticket(format!("{}-all", set_of(&machines)), &machines)?;
        self.queue.wait_for(&turn)?;
        Ok(Turn { turn, place: self })
    }
}

impl Turn {
    /// Whether somebody else has had the turn for longer who would also take one of these machines, among others. Whoever
    /// lets those go first is let go first when others come after him, so that no set of machines starves another.
    pub fn has_elder(&self) -> bool {
        let Place { queue, machines, .. } = &self.place;
        let is_elder = |name: &Name| {
            name.line.ends_with("-all") && !name.is_in(&self.turn.line) && name.number < self.turn.number
        };
        queue.names().iter().filter(|name| is_elder(name)).any(|name| {
            let theirs = queue.machines_of(name);
            machines.iter().any(|machine| theirs.contains(machine)) && queue.is_alive(name)
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A name for a set of machines.
fn set_of(machines: &[&str]) -> String {
    let mut sorted = machines.to_vec();
    sorted.sort_unstable();
    let digest = hash_bytes(HashAlgorithm::Sha256, sorted.join("\n").as_bytes()).to_nix_base16_string();
    digest.chars().skip("sha256:".len()).take(SET_DIGITS).collect()
}

fn lock(file: &File) -> io::Result<()> {
    loop {
        match file.lock() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// The user for whom Nix asks. A daemon does so for all its clients, and its process for one of them has that client's
/// number as its first argument (`savedArgv[1]` in src/nix/daemon.cc of Nix 2.8, src/nix/unix/daemon.cc of 2.26 and 2.34). If
/// it cannot be told it is the user of that process.
pub fn whose() -> u32 {
    let nix = getppid().as_raw();
    let own = || nix::unistd::geteuid().as_raw();
    let owner = |pid: i32| fs::metadata(format!("/proc/{pid}")).ok().map(|process| process.uid());
    let words = fs::read(format!("/proc/{nix}/cmdline")).unwrap_or_default();
    client_in(&words).and_then(owner).or_else(|| owner(nix)).unwrap_or_else(own)
}

/// The number of the client in the words of a daemon's process. What is left of the word that it was written over is
/// filled with zeros.
fn client_in(words: &[u8]) -> Option<i32> {
    let mut words = words.split(|byte| *byte == 0);
    let program = words.next()?;
    let program = program.rsplit(|byte| *byte == b'/').next()?;
    let number = std::str::from_utf8(words.next()?).ok()?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (program.starts_with(b"nix") && is_number).then(|| number.parse().ok())?
}

#[cfg(test)]
mod tests;
