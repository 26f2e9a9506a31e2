//! What the user of one Nix command has been told already. Nix starts a new hook for each build that one accepted.

use crate::digest;
use nix::unistd::getppid;
use nix_offload_proxy::small_file::in_directory;
use std::cell::{OnceCell, RefCell};
use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// How many different things are told in one command, at most.
const MOST: usize = 32;

/// The memory of one Nix command: the process that started this one.
#[derive(Debug, Clone)]
pub struct Told {
    directory: PathBuf,
    /// The process and its time of birth, if that is known.
    command: OnceCell<Option<(i32, u64)>>,
    /// What this process told, by its hash.
    here: RefCell<HashSet<String>>,
}

impl Told {
    /// The memory in a runtime directory.
    pub fn at(runtime: &Path) -> Self {
        Self { directory: runtime.join("told"), command: OnceCell::new(), here: RefCell::default() }
    }

    /// Whether this is still to be told; it counts as told from now on. What cannot be kept for others is told by them, too.
    pub fn is_first(&self, what: &str) -> bool {
        let digest = digest::short(what);
        let mut here = self.here.borrow_mut();
        if here.len() >= MOST || !here.insert(digest.clone()) {
            return false;
        }
        let parent = getppid().as_raw();
        let command = self.command.get_or_init(|| born(parent).map(|born| (parent, born)));
        let Some((pid, born)) = *command else { return true };
        let path = self.directory.join(format!("{pid}-{born}-{digest}"));
        let create = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        match in_directory(&path, create) {
            Ok(_) if self.clean(pid, born) <= MOST => true,
            Ok(_) => {
                let _ = fs::remove_file(&path);
                false
            }
            Err(error) => error.kind() != io::ErrorKind::AlreadyExists,
        }
    }

    /// Forgets what was told in commands that are over. Gives the number of things told in this one.
    fn clean(&self, pid: i32, born_then: u64) -> usize {
        let mut living: HashMap<i32, Option<u64>> = HashMap::new();
        let mut told = 0;
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let mut words = name.to_str().unwrap_or_default().split('-');
            let mut number = || words.next()?.parse::<u64>().ok();
            let of = number().and_then(|pid| Some((i32::try_from(pid).ok()?, number()?)));
            if of == Some((pid, born_then)) {
                told += 1;
            } else if of
                .is_none_or(|(pid, then)| *living.entry(pid).or_insert_with(|| born(pid)) != Some(then))
            {
                let _ = fs::remove_file(entry.path());
            }
        }
        told
    }
}

/// When a process was started, in the kernel's ticks since it booted; none if there is no such process.
fn born(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything, a closing parenthesis too.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(told: &Told) -> usize {
        fs::read_dir(&told.directory).unwrap().count()
    }

    #[test]
    fn a_thing_is_told_once_in_a_command_whichever_hook_tells_it() {
        let runtime = tempfile::tempdir().unwrap();
        let told = Told::at(runtime.path());
        assert!(told.is_first("a") && told.is_first("b"));
        assert!(!told.is_first("a") && !Told::at(runtime.path()).is_first("b"));
        // Another command is told too, and what was told in one that is over is forgotten.
        let (pid, born) = told.command.get().unwrap().unwrap();
        for over in [(pid, born + 1), (i32::MAX, 7)] {
            let other = Told { command: Some(over).into(), ..Told::at(runtime.path()) };
            assert!(other.is_first("a"));
        }
        fs::write(told.directory.join("nonsense"), "").unwrap();
        assert!(told.is_first("c"));
        assert_eq!(names(&told), 3);
    }

    #[test]
    fn one_command_is_not_told_ever_so_many_things() {
        let runtime = tempfile::tempdir().unwrap();
        let told = Told::at(runtime.path());
        let first = |told: &Told, numbers: std::ops::Range<u32>| {
            numbers.filter(|number| told.is_first(&number.to_string())).count()
        };
        assert_eq!(first(&told, 0..20) + first(&Told::at(runtime.path()), 0..100), MOST);
        assert_eq!(first(&told, 200..300), 0);
        assert_eq!(names(&told), MOST);
    }

    #[test]
    fn what_cannot_be_kept_is_told() {
        for command in [None, Some((1, 1))] {
            let told =
                Told { directory: "/proc/nothing".into(), command: command.into(), here: RefCell::default() };
            assert!(told.is_first("a") && !told.is_first("a") && told.is_first("b"));
        }
    }
}
