//! The queue of builds that wait here for a slot: who may wait, and whose turn it is.
//!
//! Builds that can use the same machines, and need as many slots, stand in one line for each user, ordered by the time at
//! which they count as having come (`plan::turn`). The first of each user's line goes on to the line of all, so that users
//! take turns. Only the first in that one looks at the slots; when it has one, the next takes its place. Whoever is the
//! first stays it, whoever comes: its time is set to 0.
//!
//! A place is a file that its process holds a lock on. Each process waits for the lock of the one before it, so whoever
//! is killed holds nobody up, and a slot that is given back wakes one process, not all. The lock alone would not do:
//! who comes in the moment in which it is given back may have it before those who wait (`flock_lock_inode` in
//! fs/locks.c of Linux 6.18), and those who wait get it in an order that nobody promises.
//!
//! Must never look at slots, or know what is built.

use crate::digest;
use nix::unistd::getppid;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// Held while a place is taken or changed, for microseconds. It has the last number in it, so that none is given twice: a
/// file is removed by its name, which must not be another one's by then.
const DOOR: &str = "door";
/// The state directory of the store whose queue has no name of its own.
const USUAL_STORE: &str = "/nix/var/nix";
/// What is not yet a place.
const DRAFT: &str = "draft";
/// The most bytes of the names of machines that are read.
const MOST_NAMES: u64 = 1 << 20;
/// The time of those that nobody overtakes any more.
const FIRST: u64 = 0;

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
    name: Name,
    _held: File,
}

/// What builds wait for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wish {
    /// One of these machines, by their names.
    pub machines: BTreeSet<String>,
    /// How many slots of it, or all if it has fewer.
    pub slots: u64,
}

/// A place among the builds of one user that wait for the same.
#[derive(Debug)]
pub struct Place {
    queue: Queue,
    wish: Wish,
    user: u32,
    /// When it counts as having come, in milliseconds since 1970.
    came: u64,
    ticket: Ticket,
}

/// Builds that wait, at one moment: how many of each line, and for what.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Waiting(Vec<(Wish, u64)>);

/// The turn to look for a slot.
#[derive(Debug)]
pub struct Turn {
    // First, so that it is given back first: the next user is to have it before this one's next build.
    turn: Ticket,
    place: Place,
}

impl Queue {
    /// The one in a runtime directory, to be looked at, for the store with that state directory. Slots are counted for each
    /// store, so nobody waits for those of another one.
    pub fn of(directory: &Path, store: &Path) -> Self {
        let name = if store == Path::new(USUAL_STORE) {
            "queue".to_owned()
        } else {
            format!("queue-{}", digest::short(&store.to_string_lossy()))
        };
        Self { directory: directory.join(name) }
    }

    /// The same, to be used; it is made if need be.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(directory: &Path, store: &Path) -> Result<Self, QueueError> {
        let queue = Self::of(directory, store);
        match fs::create_dir(&queue.directory) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(QueueError { path: queue.directory, source })
            }
            _ => Ok(queue),
        }
    }

    /// A place among the builds of this user that wait for the same, as if it had come at that time. None if `most`
    /// of this user wait for it already.
    ///
    /// # Errors
    /// If files cannot be written.
    pub fn place(
        &self,
        wish: Wish,
        user: u32,
        came: SystemTime,
        most: u64,
    ) -> Result<Option<Place>, QueueError> {
        let line = Line::of(&wish, Whose::User(user));
        let door = self.door()?;
        let theirs = || self.names().into_iter().filter(|name| name.line == line);
        // Some of them may have been killed.
        if theirs().count() as u64 >= most
            && theirs().filter(|name| self.is_alive(name)).count() as u64 >= most
        {
            return Ok(None);
        }
        let came = milliseconds(came);
        let ticket = self.ticket(&door, line, came, &wish)?;
        Ok(Some(Place { queue: self.clone(), wish, user, came, ticket }))
    }

    /// How many builds wait, and for what.
    pub fn waiting(&self) -> Waiting {
        const TRIES: usize = 3;
        (0..TRIES).find_map(|_| self.try_waiting()).unwrap_or_default()
    }

    /// The same; none if a place that matters was given another name or left meanwhile.
    fn try_waiting(&self) -> Option<Waiting> {
        let mut lines: BTreeMap<Line, Vec<Name>> = BTreeMap::new();
        for name in self.names() {
            if name.line.whose != Whose::All {
                lines.entry(name.line.clone()).or_default().push(name);
            }
        }
        let mut waiting = Vec::new();
        for mut names in lines.into_values() {
            // Whoever was given another name meanwhile may be there twice.
            names.sort_by_key(|name| name.number);
            names.dedup_by_key(|name| name.number);
            names.sort_by_key(Name::key);
            // One that lives is enough to believe in those before it in its line, who are asked when it is their turn.
            while let Some(last) = names.last() {
                let file = File::open(self.path(last)).ok()?;
                if self.is_held(&file, last) {
                    waiting.push((wish_in(file), names.len() as u64));
                    break;
                }
                names.pop();
            }
        }
        Some(Waiting(waiting))
    }

    /// The right to take a place or to change it.
    fn door(&self) -> Result<File, QueueError> {
        let path = self.directory.join(DOOR);
        let mut options = OpenOptions::new();
        let door = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let locked = door.and_then(|file| lock(&file).map(|()| file));
        locked.map_err(|source| QueueError { path, source })
    }

    /// A place in a line. Needs the door.
    fn ticket(&self, door: &File, line: Line, time: u64, wish: &Wish) -> Result<Ticket, QueueError> {
        let number = self.next_number(door);
        let name = Name { line, time, number };
        // It has its name when it is locked, so one that is not is nobody's.
        let draft = self.directory.join(DRAFT);
        let _ = fs::remove_file(&draft);
        let path = self.path(&name);
        let mut options = OpenOptions::new();
        let made = options.read(true).write(true).create_new(true).mode(0o600).open(&draft);
        let made = made.and_then(|mut file| {
            // It is written first, for without it the number would be given again.
            door.write_all_at(format!("{number:020}\n").as_bytes(), 0)?;
            lock(&file)?;
            file.write_all(wish.to_text().as_bytes())?;
            fs::rename(&draft, &path)?;
            Ok(file)
        });
        let held = made.map_err(|source| QueueError { path: draft, source })?;
        Ok(Ticket { path, name, _held: held })
    }

    fn next_number(&self, door: &File) -> u64 {
        let mut text = String::new();
        let mut door = door;
        let last = door.read_to_string(&mut text).ok().and_then(|_| text.trim().parse::<u64>().ok());
        // The door may be new, while places are not.
        let highest = || self.names().iter().map(|name| name.number).max();
        last.or_else(highest).unwrap_or(0) + 1
    }

    /// Gives a ticket another time. Needs the door.
    fn set_time(&self, ticket: &mut Ticket, time: u64) -> Result<(), QueueError> {
        let name = Name { time, line: ticket.name.line.clone(), ..ticket.name };
        let path = self.path(&name);
        if path != ticket.path {
            fs::rename(&ticket.path, &path)
                .map_err(|source| QueueError { path: ticket.path.clone(), source })?;
            (ticket.name, ticket.path) = (name, path);
        }
        Ok(())
    }

    /// Waits until a ticket is the first of its line, and then makes it stay that.
    /// With `until`, no longer than that; whether it is the first.
    fn wait_for(&self, ticket: &mut Ticket, until: Option<Instant>) -> Result<bool, QueueError> {
        loop {
            let before = {
                let _door = self.door()?;
                let is_before = |name: &Name| name.line == ticket.name.line && name.key() < ticket.name.key();
                match self.names().into_iter().filter(is_before).max_by_key(Name::key) {
                    Some(before) => before,
                    None => return self.set_time(ticket, FIRST).map(|()| true),
                }
            };
            let path = self.path(&before);
            match File::open(&path).and_then(|file| until_free(file, until)) {
                // Nobody is there any more. If it was killed its file is still there.
                Ok(true) => drop(fs::remove_file(&path)),
                Ok(false) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(QueueError { path, source }),
            }
        }
    }

    /// Whether somebody has this place. If not it is removed.
    fn is_alive(&self, name: &Name) -> bool {
        File::open(self.path(name)).is_ok_and(|file| self.is_held(&file, name))
    }

    fn is_held(&self, file: &File, name: &Name) -> bool {
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => true,
            // It cannot be told, and nobody is to be overtaken.
            Err(TryLockError::Error(_)) => true,
            Ok(()) => {
                let _ = fs::remove_file(self.path(name));
                false
            }
        }
    }

    fn wish_of(&self, name: &Name) -> Wish {
        // It may be free by now.
        File::open(self.path(name)).map(wish_in).unwrap_or_default()
    }

    fn path(&self, name: &Name) -> PathBuf {
        // As many digits for every time, for people who look at the directory.
        self.directory.join(format!("{}.{:013}.{}", name.line, name.time, name.number))
    }

    /// All places of all lines.
    fn names(&self) -> Vec<Name> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| Name::parse(entry.file_name().to_str()?)).collect()
    }
}

/// A line in which places are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    /// [`Wish::name`] of what all in it wish.
    wish: String,
    whose: Whose,
}

/// Who stands in a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Whose {
    /// The builds of one user.
    User(u32),
    /// The first of each user's line.
    All,
}

impl Line {
    fn of(wish: &Wish, whose: Whose) -> Self {
        Self { wish: wish.name(), whose }
    }

    /// Reads what [`fmt::Display`] writes.
    fn parse(text: &str) -> Option<Self> {
        let (wish, whose) = text.rsplit_once('-')?;
        let whose = match whose.strip_prefix('u') {
            Some(user) => Whose::User(user.parse().ok()?),
            None if whose == "all" => Whose::All,
            None => return None,
        };
        Some(Self { wish: wish.to_owned(), whose })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.whose {
            Whose::User(user) => write!(f, "{}-u{user}", self.wish),
            Whose::All => write!(f, "{}-all", self.wish),
        }
    }
}

/// The name of a place.
#[derive(Debug)]
struct Name {
    line: Line,
    /// In milliseconds since 1970.
    time: u64,
    number: u64,
}

impl Name {
    fn parse(name: &str) -> Option<Self> {
        let (line, number) = name.rsplit_once('.')?;
        let (line, time) = line.rsplit_once('.')?;
        Some(Self { line: Line::parse(line)?, time: time.parse().ok()?, number: number.parse().ok()? })
    }

    /// The lower, the sooner its turn.
    fn key(&self) -> (u64, u64) {
        (self.time, self.number)
    }
}

impl Wish {
    /// A name for those that wish the same.
    pub fn name(&self) -> String {
        digest::short(&self.to_text())
    }

    fn to_text(&self) -> String {
        let machines: Vec<&str> = self.machines.iter().map(String::as_str).collect();
        format!("{}\n{}", self.slots, machines.join("\n"))
    }

    fn parse(text: &str) -> Self {
        let mut lines = text.lines();
        let slots = lines.next().and_then(|number| number.parse().ok()).unwrap_or(1);
        Self { machines: lines.map(str::to_owned).collect(), slots }
    }
}

impl Waiting {
    /// Builds that wait for a machine with `all` slots, and could begin if `free` of them are free. Those
    /// that need more are not to keep others from what is left.
    pub fn of(&self, machine: &str, all: u64, free: u64) -> u64 {
        let could_begin = |wish: &Wish| wish.machines.contains(machine) && wish.slots.min(all) <= free.max(1);
        self.0.iter().filter(|(wish, _)| could_begin(wish)).map(|(_, count)| count).sum()
    }

    /// Builds that wait for a machine, among others perhaps, whatever they need of it.
    pub fn all_of(&self, machine: &str) -> u64 {
        self.0.iter().filter(|(wish, _)| wish.machines.contains(machine)).map(|(_, count)| count).sum()
    }

    /// Those only that wait for some of the machines that `wish` has, and so cannot go to the others.
    #[must_use]
    pub fn narrower(self, wish: &Wish) -> Self {
        let is_narrower = |other: &Wish| {
            other.machines.len() < wish.machines.len() && other.machines.is_subset(&wish.machines)
        };
        Self(self.0.into_iter().filter(|(other, _)| is_narrower(other)).collect())
    }
}

impl Place {
    /// The same place as if it had come at that time.
    ///
    /// # Errors
    /// If its file cannot be renamed.
    pub fn came_at(&mut self, at: SystemTime) -> Result<(), QueueError> {
        let _door = self.queue.door()?;
        self.came = milliseconds(at);
        self.queue.set_time(&mut self.ticket, self.came)
    }

    /// Waits for its turn, with `until` no longer than that. None if it has not come by then; the place is given up.
    ///
    /// # Errors
    /// If files cannot be written or read.
    pub fn wait(mut self, until: Option<Instant>) -> Result<Option<Turn>, QueueError> {
        if !self.queue.wait_for(&mut self.ticket, until)? {
            return Ok(None);
        }
        let line = Line::of(&self.wish, Whose::All);
        let turn = self.queue.door().and_then(|door| self.queue.ticket(&door, line, FIRST, &self.wish));
        let mut turn = turn?;
        let is_first = self.queue.wait_for(&mut turn, until)?;
        Ok(is_first.then_some(Turn { turn, place: self }))
    }
}

impl Turn {
    /// What it waits for.
    pub fn wish(&self) -> &Wish {
        &self.place.wish
    }

    /// Gives the turn to the next, and goes to the line of those that wish something else, to the place that it has there
    /// by the time at which it came. However many wait there it may join them, for it waits already.
    ///
    /// # Errors
    /// If files cannot be written.
    pub fn change(self, wish: Wish) -> Result<Place, QueueError> {
        let Place { queue, user, came, .. } = &self.place;
        let line = Line::of(&wish, Whose::User(*user));
        let ticket = queue.door().and_then(|door| queue.ticket(&door, line, *came, &wish))?;
        Ok(Place { queue: queue.clone(), wish, user: *user, came: *came, ticket })
    }

    /// Whether another line's first build has been first for longer and could use one of these machines. Giving way to it
    /// keeps one set of machines from starving another.
    pub fn has_elder(&self) -> bool {
        let Place { queue, wish, .. } = &self.place;
        let is_elder = |name: &Name| {
            name.line.whose == Whose::All
                && name.line != self.turn.name.line
                && name.number < self.turn.name.number
        };
        queue
            .names()
            .iter()
            .filter(|name| is_elder(name))
            .any(|name| !queue.wish_of(name).machines.is_disjoint(&wish.machines) && queue.is_alive(name))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn wish_in(file: File) -> Wish {
    let mut text = String::new();
    let read = file.take(MOST_NAMES).read_to_string(&mut text);
    if read.is_ok() { Wish::parse(&text) } else { Wish::default() }
}

fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    u64::try_from(since).unwrap_or(u64::MAX).max(FIRST + 1)
}

/// Waits until nobody has a place any more, with `until` no longer than that. Whether it is so.
fn until_free(file: File, until: Option<Instant>) -> io::Result<bool> {
    let wait = move || {
        loop {
            match file.lock_shared() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        }
    };
    let Some(until) = until else { return wait().map(|()| true) };
    // The kernel has no such wait with an end. The thread ends when the place is free, or with this process.
    let (tell, told) = mpsc::channel();
    thread::Builder::new().spawn(move || tell.send(wait()))?;
    match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
        Ok(done) => done.map(|()| true),
        Err(_) => Ok(false),
    }
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
