//! What is kept between processes: small files, each written whole.
//!
//! Owns where they are and their form. What is lost or cannot be read is as if it had never been: nothing here may
//! keep a build from being done.

mod asked;
mod decided;
mod history;
mod told;
mod withheld;

pub use asked::{Asked, Times};
pub use decided::{Decided, End, Last, Trial};
pub use history::{History, Record};
pub use told::Told;
pub use withheld::{Entry, Withholdings};

use crate::digest;
use nix::unistd::geteuid;
use nix_offload_proxy::small_file::{NEW, read_own, write_whole};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Names another directory.
const VARIABLE: &str = "NIX_OFFLOAD_STATE_DIR";
/// Root's.
const SYSTEM: &str = "/var/lib/nix-offload";
/// How many writes there are to one that looks for what was left of others.
const TIDYING: u64 = 64;
/// A file with more bytes is not read.
const MOST_BYTES: u64 = 4 << 20;

/// The directory of what is to survive a restart of this machine: `$NIX_OFFLOAD_STATE_DIR`, else
/// `/var/lib/nix-offload` for root, else `nix-offload` in `$XDG_STATE_HOME` or `~/.local/state`. None if the
/// environment leads nowhere.
pub fn directory(env: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set(VARIABLE).or_else(|| {
        if geteuid().is_root() {
            return Some(SYSTEM.into());
        }
        let home = || Some(set("HOME")?.join(".local/state"));
        Some(set("XDG_STATE_HOME").or_else(home)?.join("nix-offload"))
    })
}

/// Values by key in a bounded number of files: a file for all keys whose hashes are alike, the newest first. Processes
/// that write to one file at the same moment may lose a value.
#[derive(Debug, Clone)]
struct Ledger {
    directory: PathBuf,
    files: u32,
    keep: usize,
}

impl Ledger {
    /// The value of a key.
    fn get(&self, key: &str) -> Option<String> {
        value_in(&read(&self.file(key))?, key)
    }

    /// The values of many keys. Each file is read once.
    fn get_all(&self, keys: &[String]) -> Vec<Option<String>> {
        let mut texts: HashMap<PathBuf, String> = HashMap::new();
        let mut value = |key: &String| {
            let file = self.file(key);
            let text = texts.entry(file).or_insert_with_key(|file| read(file).unwrap_or_default());
            value_in(text, key)
        };
        keys.iter().map(&mut value).collect()
    }

    /// Keeps a value of one line. The oldest one in its file is forgotten for it, if there are too many. One with which the
    /// file could become too large to be read is not kept.
    fn put(&self, key: &str, value: &str) -> io::Result<()> {
        debug_assert!(!key.contains(['\t', '\n']) && !value.contains('\n'));
        if (key.len() + value.len() + 2) as u64 > MOST_BYTES / self.keep as u64 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let file = self.file(key);
        let mut text = format!("{key}\t{value}\n");
        let before = read(&file).unwrap_or_default();
        let is_another = |line: &&str| line.split_once('\t').is_some_and(|(other, _)| other != key);
        for line in before.lines().filter(is_another).take(self.keep.saturating_sub(1)) {
            text.push_str(line);
            text.push('\n');
        }
        write(&file, &text)
    }

    fn file(&self, key: &str) -> PathBuf {
        let digest = digest::short(key);
        let number = digest.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0);
        self.directory.join(format!("{:04x}", number % self.files))
    }
}

fn value_in(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|line| Some(line.strip_prefix(key)?.strip_prefix('\t')?.to_owned()))
}

/// A file's text; none unless it is ours.
fn read(path: &Path) -> Option<String> {
    read_own(path, MOST_BYTES).ok()
}

/// Writes a file whole, and makes its directory if need be.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let written = write_whole(path, text).or_else(|error| match (error.kind(), path.parent()) {
        (io::ErrorKind::NotFound, Some(directory)) => make(directory).and_then(|()| write_whole(path, text)),
        _ => Err(error),
    });
    if RandomState::new().build_hasher().finish().is_multiple_of(TIDYING) {
        tidy(path);
    }
    written
}

/// Makes a directory that is ours alone, and those above it that are missing.
fn make(directory: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).recursive(true).create(directory)
}

/// Removes what processes left beside a file that were killed while they wrote it.
fn tidy(written: &Path) {
    const ABANDONED: Duration = Duration::from_secs(60);
    let (Some(directory), Some(stem)) = (written.parent(), written.file_stem()) else { return };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_hex = |text: &OsStr| text.as_bytes().iter().all(u8::is_ascii_hexdigit);
        let chance = path.with_extension("");
        let is_new = path.extension().is_some_and(|extension| extension == NEW)
            && chance.extension().is_some_and(is_hex)
            && chance.file_stem() == Some(stem);
        let age = || entry.metadata().and_then(|file| file.modified()).ok()?.elapsed().ok();
        if is_new && age().is_some_and(|age| age > ABANDONED) {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::time::SystemTime;

    #[test]
    fn the_directory_follows_the_environment() {
        let with = |name: &'static str, value: &'static str| {
            move |asked: &str| (asked == name).then(|| OsString::from(value))
        };
        assert_eq!(directory(with("NIX_OFFLOAD_STATE_DIR", "/x")), Some("/x".into()));
        let expected = if geteuid().is_root() { SYSTEM } else { "/home/a/.local/state/nix-offload" };
        assert_eq!(directory(with("HOME", "/home/a")), Some(expected.into()));
    }

    #[test]
    fn only_what_was_left_beside_this_file_long_ago_is_tidied_away() {
        let directory = tempfile::tempdir().unwrap();
        let make = |name: &str, age: u64| {
            let file = fs::File::create(directory.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        };
        let others = ["told", "told.json", "told.new", "told.xyz.new", "asked.1f.new"];
        others.iter().for_each(|name| make(name, 600));
        make("told.1f.new", 600);
        make("told.2f.new", 5);
        tidy(&directory.path().join("told"));
        let mut left: Vec<String> = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let mut expected = others.to_vec();
        expected.push("told.2f.new");
        expected.sort_unstable();
        assert_eq!(left, expected);
    }

    #[test]
    fn a_ledger_keeps_the_newest_values_and_stays_small() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger { directory: directory.path().join("new/ledger"), files: 2, keep: 3 };
        assert_eq!(ledger.get("a"), None);
        ledger.put("a", "1").unwrap();
        ledger.put("ab", "2").unwrap();
        ledger.put("a", "3").unwrap();
        assert_eq!((ledger.get("a"), ledger.get("ab")), (Some("3".into()), Some("2".into())));
        for number in 0..100 {
            ledger.put(&format!("k{number}"), "v").unwrap();
        }
        let lines = |entry: io::Result<fs::DirEntry>| {
            fs::read_to_string(entry.unwrap().path()).unwrap().lines().count()
        };
        let counts: Vec<usize> = fs::read_dir(&ledger.directory).unwrap().map(lines).collect();
        assert_eq!(counts, [3, 3]);
        assert_eq!(ledger.get("k99").as_deref(), Some("v"));
    }

    #[test]
    fn a_value_that_is_too_large_is_not_kept_and_costs_no_other_one() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger { directory: directory.path().join("ledger"), files: 1, keep: 4 };
        let largest = "x".repeat((1 << 20) - "a\t\n".len());
        for key in ["a", "b", "c", "d"] {
            ledger.put(key, &largest).unwrap();
        }
        ledger.put("e", &(largest.clone() + "x")).unwrap_err();
        ledger.put("d", &largest).unwrap();
        assert_eq!(ledger.get("e"), None);
        assert!(["a", "b", "c", "d"].iter().all(|key| ledger.get(key).as_deref() == Some(&largest)));
    }

    #[test]
    fn what_is_made_is_ours_alone_and_what_the_killed_left_is_removed() {
        let above = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        let (outer, inner) = (above.path().join("state"), above.path().join("state/nix-offload"));
        // The umask of tests lets others read.
        write(&inner.join("f"), "x").unwrap();
        assert_eq!([mode(&outer), mode(&inner), mode(&inner.join("f"))], [0o700, 0o700, 0o600]);
        let [old, young] = ["f.1234.new", "f.5678.new"].map(|name| inner.join(name));
        for left in [&old, &young] {
            fs::write(left, "half").unwrap();
        }
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        fs::File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
        let is_gone = (0..10_000).any(|_| {
            write(&inner.join("f"), "y").unwrap();
            !old.exists()
        });
        assert!(is_gone && young.exists() && fs::read_dir(&inner).unwrap().count() == 2);
    }
}
