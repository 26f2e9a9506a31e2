//! The runtime directories and the masters of all users, as root sees them.
//!
//! A line here must not open a file of another user's directory.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{directory, name, process};

/// A runtime directory that is its owner's alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The directory.
    pub directory: PathBuf,
    /// Its owner's number.
    pub owner: u32,
}

/// A process that is, or is about to become, a master.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survivor {
    /// Its number.
    pub pid: u32,
    /// Its user's number.
    pub owner: u32,
    /// The runtime directory it was started for, which need not be there any more.
    pub directory: PathBuf,
    born: String,
}

/// The runtime directories of all users that are where they should be, and those of masters that run.
pub fn places() -> Vec<Place> {
    let mut found = directory::of_all_users(|name| std::env::var_os(name));
    found.extend(survivors().into_iter().map(|master| (master.directory, master.owner)));
    found.sort();
    found.dedup();
    found.retain(|(path, owner)| directory::is_private(path, *owner));
    found.into_iter().map(|(directory, owner)| Place { directory, owner }).collect()
}

/// The masters of all users by the list of processes, whether or not their files are there.
pub fn survivors() -> Vec<Survivor> {
    let masters = process::running("ssh").into_iter().filter_map(|process| {
        let directory = directory_of(&control_path(&process.words)?)?;
        Some(Survivor { pid: process.pid, owner: process.owner, directory, born: process.born })
    });
    masters.collect()
}

impl Survivor {
    /// Ends it: politely, and by force when it has not gone within `patience`. True when it is gone.
    pub fn end(&self, patience: Duration) -> bool {
        process::end(self.pid, &self.born, patience);
        process::birth(self.pid).as_ref() != Some(&self.born)
    }
}

/// The control socket in the words of an ssh: in the title that a master in the background gives itself
/// (`setproctitle` in `control_persist_detach`, ssh.c), or behind `-S` before that, where `%` stands twice.
fn control_path(words: &[OsString]) -> Option<PathBuf> {
    let title = words.first()?.as_bytes();
    if let Some(path) = title.strip_prefix(b"ssh: ").and_then(|rest| rest.strip_suffix(b" [mux]")) {
        return Some(OsStr::from_bytes(path).into());
    }
    let at = words.iter().rposition(|word| word == "-S")?;
    let path = words.get(at + 1)?.as_bytes();
    let mut last = 0;
    let literal = path.iter().copied().filter(|byte| {
        let second = *byte == b'%' && last == b'%';
        last = if second { 0 } else { *byte };
        !second
    });
    Some(OsString::from_vec(literal.collect()).into())
}

/// The runtime directory, if the socket is called as ours are: users have masters of their own.
fn directory_of(socket: &Path) -> Option<PathBuf> {
    let ours = socket.file_name()?.to_str()?.strip_suffix(".sock").is_some_and(name::is_name);
    if ours && socket.is_absolute() { Some(socket.parent()?.to_owned()) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(words: &[&str]) -> Option<String> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        Some(directory_of(&control_path(&words)?)?.to_str()?.to_owned())
    }

    #[test]
    fn masters_of_ours_are_known_by_title_or_by_their_words() {
        let name = "0123456789abcdef0123";
        let running = format!("ssh: /run/a b/{name}.sock [mux]");
        assert_eq!(directory(&[&running, ""]).as_deref(), Some("/run/a b"));
        let starting = format!("/tmp/100%%/{name}.sock");
        let words = ["ssh", "-o", "ControlMaster=yes", "-S", "/other", "-S", &starting, "--", "mac"];
        assert_eq!(directory(&words).as_deref(), Some("/tmp/100%"));
    }

    #[test]
    fn masters_of_somebody_else_are_left_alone() {
        let theirs = format!("ssh: /root/.ssh/{}.sock [mux]", "0123456789".repeat(4));
        assert_eq!(directory(&[&theirs]), None);
        assert_eq!(directory(&["ssh: /root/.ssh/mac-22 [mux]"]), None);
        assert_eq!(directory(&["ssh", "-S", "0123456789abcdef0123.sock", "mac"]), None);
        assert_eq!(directory(&["ssh", "mac", "-S"]), None);
        assert_eq!(directory(&[]), None);
    }
}
