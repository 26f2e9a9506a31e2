//! How hooks say that they want to know the load of machines, and the sampler hears it.
//!
//! For each list of machines there is one file: what is in it says which machines, its time says when somebody last
//! wanted to know. A hook that finds no sampler starts one. Must never cost a hook more than some microseconds while
//! there is one, nor keep it from anything.

use crate::plan::machine::{Machine, Scheme, StoreUri};
use crate::reach::Reach;
use nix::unistd::geteuid;
use nix_offload_proxy::small_file;
use serde::{Deserialize, Serialize};
use std::cell::OnceCell;
use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

/// In the runtime directory.
const DIRECTORY: &str = "sample";
/// Held by the sampler as long as it lives.
const LOCK: &str = "lock";
const EXTENSION: &str = "list";
/// A list of more bytes is not read.
const MOST_BYTES: u64 = 16 << 20;
/// Changed with the form of a list.
const FORM: u8 = 1;

/// What a sampler is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct List {
    /// Milliseconds from one sample of a machine to the next.
    pub(super) every_ms: u64,
    /// `NIX_SSHOPTS`, on which it depends which master is a machine's.
    pub(super) ssh_options: Option<String>,
    /// The directory of the lock files of slots.
    pub(super) slots: PathBuf,
    pub(super) machines: Vec<Subject>,
}

/// A machine of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Subject {
    /// Its store URI, by which slots are named, too.
    pub(super) name: String,
    pub(super) identity: Option<String>,
    pub(super) host_key: Option<String>,
    pub(super) max_jobs: u64,
    /// The directory of its store.
    pub(super) store_dir: Option<String>,
}

/// Shows the sampler that a hook wants to know about the machines of its list.
#[derive(Debug)]
pub struct Interest<'a> {
    directory: PathBuf,
    machines: &'a [Machine],
    every: Option<Duration>,
    slots: PathBuf,
    store_dir: String,
    file: OnceCell<PathBuf>,
}

impl<'a> Interest<'a> {
    /// `every` is the time from one sample of a machine to the next, none if there are to be none. `slots` is the
    /// directory of the lock files of slots, `store_dir` that of the store here, which is also that of machines that
    /// have no other one.
    pub fn new(
        reach: &Reach,
        machines: &'a [Machine],
        every: Option<Duration>,
        slots: &Path,
        store_dir: &str,
    ) -> Self {
        let directory = directory(reach);
        let (slots, store_dir) = (slots.to_owned(), store_dir.to_owned());
        Self { directory, machines, every, slots, store_dir, file: OnceCell::new() }
    }

    /// Shows it now. To be called when nobody waits.
    pub fn show(&self) {
        let Some(every) = self.every else { return };
        if let Err(error) = self.touch(every).and_then(|()| start(&self.directory)) {
            tracing::debug!(%error, "the load of machines is not looked at");
        }
    }

    fn touch(&self, every: Duration) -> io::Result<()> {
        let file = self.file.get_or_init(|| self.directory.join(self.file_name(every)));
        match OpenOptions::new().write(true).open(file) {
            Ok(file) => file.set_modified(SystemTime::now()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.write(file, every),
            Err(error) => Err(error),
        }
    }

    /// The same for all hooks with this list, and another one for any other list.
    fn file_name(&self, every: Duration) -> String {
        let mut digest = DefaultHasher::new();
        (FORM, every, &self.slots, &self.store_dir, ssh_options()).hash(&mut digest);
        for machine in self.machines {
            (&machine.name, &machine.identity, &machine.host_key, machine.max_jobs).hash(&mut digest);
        }
        format!("{:016x}.{EXTENSION}", digest.finish())
    }

    fn write(&self, file: &Path, every: Duration) -> io::Result<()> {
        let subject = |machine: &Machine| Subject {
            name: machine.name.clone(),
            identity: machine.identity.clone(),
            host_key: machine.host_key.clone(),
            max_jobs: machine.max_jobs,
            store_dir: store_dir(machine, &self.store_dir),
        };
        let list = List {
            every_ms: u64::try_from(every.as_millis()).unwrap_or(u64::MAX),
            ssh_options: ssh_options(),
            slots: self.slots.clone(),
            machines: self.machines.iter().filter(|machine| machine.uri.is_ours()).map(subject).collect(),
        };
        let text = serde_json::to_string(&list)?;
        small_file::in_directory(file, || small_file::write_whole(file, &text))
    }
}

fn ssh_options() -> Option<String> {
    std::env::var("NIX_SSHOPTS").ok()
}

/// Where the store of a machine is on its disks, if its line tells. A `remote-store` that is a path, or has one as its
/// parameter `root`, has the store under that (`LocalFSStoreConfig` in Nix 2.34 `src/libstore/local-fs-store.hh`).
fn store_dir(machine: &Machine, own: &str) -> Option<String> {
    let is_path = |path: &str| path.starts_with('/');
    let under = |root: &str| format!("{}{own}", root.trim_end_matches('/'));
    let store = match (machine.uri.param("remote-store"), &machine.uri.scheme) {
        (Some(store), _) => StoreUri::parse(store).ok()?,
        (None, Scheme::Other(_)) => machine.uri.clone(),
        (None, _) => return Some(own.to_owned()),
    };
    if let Some(real) = store.param("real").filter(|real| is_path(real)) {
        return Some(real.to_owned());
    }
    if let Some(root) = store.param("root").filter(|root| is_path(root)) {
        return Some(under(root));
    }
    let Scheme::Other(base) = &store.scheme else { return None };
    let base = base.strip_prefix("local:").map_or(base.as_str(), |path| path.trim_start_matches("//"));
    match base {
        "" | "auto" | "local" | "daemon" => Some(own.to_owned()),
        path if is_path(path) => Some(under(path)),
        _ => None,
    }
}

/// Starts a sampler if there is none, unless this program was replaced: it would end at once, and hooks of the new one start
/// theirs. It is given its lock in the place of standard input, so that there is never a moment at which two could be
/// started.
fn start(directory: &Path) -> io::Result<()> {
    let path = directory.join(LOCK);
    let lock =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Ok(()),
        Err(fs::TryLockError::Error(error)) => return Err(error),
    }
    if !is_installed() {
        return Ok(());
    }
    let mut child = Command::new("/proc/self/exe")
        .arg0("nix-offload")
        .arg("sample")
        .stdin(lock)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        // What kills our process group, as Nix does when a hook has ended, must not kill it.
        .process_group(0)
        .spawn()?;
    // A hook may live longer than several of them, and is to leave no dead ones about.
    thread::Builder::new().spawn(move || child.wait()).map(drop)
}

/// Whether the program that runs is still in a directory.
fn is_installed() -> bool {
    fs::metadata("/proc/self/exe").is_ok_and(|program| program.nlink() > 0)
}

fn directory(reach: &Reach) -> PathBuf {
    reach.directory().join(DIRECTORY)
}

/// The sampler's side: its right to be the only one, and what is wanted of it.
pub(super) struct Post {
    directory: PathBuf,
    lock: File,
}

impl Post {
    /// Takes over the lock that whoever started this process took. None if this is not it.
    pub(super) fn take(reach: &Reach, lock: File) -> Option<Self> {
        let post = Self { directory: directory(reach), lock };
        (post.is_held() && post.lock.try_lock().is_ok()).then_some(post)
    }

    /// Whether there is anything left to do it for: the lock is where others look for it, and the program is still
    /// installed. A new one starts a new sampler.
    pub(super) fn is_held(&self) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let there = fs::symlink_metadata(self.directory.join(LOCK)).map(identity);
        let is_ours = |there| self.lock.metadata().map(identity).is_ok_and(|ours| ours == there);
        there.is_ok_and(is_ours) && is_installed()
    }

    /// The files of lists, and when each was last wanted.
    pub(super) fn lists(&self) -> Vec<(PathBuf, SystemTime)> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let lists = entries.filter_map(|entry| {
            let (path, metadata) = (entry.path(), entry.metadata().ok()?);
            let is_list = path.extension().is_some_and(|extension| extension == EXTENSION);
            let is_ours = metadata.is_file() && metadata.uid() == geteuid().as_raw();
            (is_list && is_ours && metadata.len() <= MOST_BYTES).then_some((path, metadata.modified().ok()?))
        });
        lists.collect()
    }

    /// What is wanted in a file.
    pub(super) fn read(&self, list: &Path) -> Option<List> {
        serde_json::from_slice(&fs::read(list).ok()?).ok()
    }

    /// Nobody wants that any more.
    pub(super) fn remove(&self, list: &Path) {
        let _ = fs::remove_file(list);
    }
}

#[cfg(test)]
#[path = "tests/interest.rs"]
mod tests;
