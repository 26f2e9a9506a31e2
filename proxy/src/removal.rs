//! Ending the masters of all users, so that the program can be taken away.
//!
//! What is in another user's directory, and what comes from there, is not believed: root starts a process that becomes
//! that user first and then does what the user could do alone. A line here must not open a file of such a directory.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    unistd::{Gid, Uid, User, geteuid, setgid, setgroups, setsid, setuid},
};
use thiserror::Error;

use crate::master::{self, DIRECTORY_VARIABLE, Place};

/// How long ending the masters of one directory may take. A user can halt the process that does it.
const USER_BOUND: Duration = Duration::from_secs(60);
/// How long a master that is still there may take to go before it is killed.
const LAST_PATIENCE: Duration = Duration::from_secs(2);
/// How often a process is looked at that is about to end.
const INTERVAL: Duration = Duration::from_millis(5);
/// How much is read of what a process says, in bytes.
const WORDS_READ: u64 = 64 * 1024;
/// The group of a user who is in no list of users: `nogroup`.
const NO_GROUP: u32 = 65534;

/// Why it could not be tried.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RemovalError {
    /// We are not root.
    #[error("only root can end the SSH masters of all users")]
    NotRoot,
    /// Becoming another user failed.
    #[error("cannot become user {uid}")]
    Become {
        /// The user.
        uid: u32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

/// What became of the masters in one directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Whose they were.
    pub uid: u32,
    /// The same by name, if there is one.
    pub user: Option<String>,
    /// The runtime directory.
    pub directory: PathBuf,
    /// Their destinations; of those that had to be found in the list of processes, their numbers.
    pub stopped: Vec<String>,
    /// What went wrong.
    pub error: Option<String>,
}

/// Ends the masters of all users. First those in the runtime directories, each by its own user; then whatever master
/// still runs, because its directory is gone for instance. Tells of all where there was something to do.
///
/// # Errors
/// For anybody but root. What fails with one user is in the outcome.
pub fn stop_all() -> Result<Vec<Outcome>, RemovalError> {
    if !geteuid().is_root() {
        return Err(RemovalError::NotRoot);
    }
    let mut outcomes: Vec<Outcome> = master::places().iter().map(stop_as_owner).collect();
    for left in master::survivors() {
        let name = format!("process {}", left.pid);
        let gone = left.end(LAST_PATIENCE);
        let same = |outcome: &Outcome| outcome.directory == left.directory && outcome.uid == left.owner;
        let at = outcomes.iter().position(same).unwrap_or_else(|| {
            outcomes.push(Outcome::new(left.owner, left.directory.clone()));
            outcomes.len() - 1
        });
        let outcome = &mut outcomes[at];
        if gone {
            outcome.stopped.push(name);
        } else {
            outcome.error.get_or_insert_with(|| format!("{name} does not end"));
        }
    }
    outcomes.retain(|outcome| !outcome.stopped.is_empty() || outcome.error.is_some());
    Ok(outcomes)
}

/// Ends the masters of this user in a runtime directory that are in no list any more: those that take no more streams
/// because ssh_config has changed, and those without a record. Gives the number of each, and whether it is gone.
pub fn stop_unlisted(directory: &Path) -> Vec<(u32, bool)> {
    let ours = geteuid().as_raw();
    let unlisted = master::survivors().into_iter();
    let unlisted = unlisted.filter(|left| left.owner == ours && left.directory == directory);
    unlisted.map(|left| (left.pid, left.end(LAST_PATIENCE))).collect()
}

/// Makes this process one of that user, for good: with the user's own group and no others, and without the terminal,
/// into which the user could type for root otherwise. Since no program is started afterwards, the kernel lets the user
/// neither look into this process nor steer it, except by signals.
///
/// # Errors
/// For anybody but root.
pub fn become_user(uid: u32) -> Result<(), RemovalError> {
    let failed = |source| RemovalError::Become { uid, source };
    let user = Uid::from_raw(uid);
    let group = match User::from_uid(user) {
        Ok(Some(account)) => account.gid,
        _ if user.is_root() => Gid::from_raw(0),
        _ => Gid::from_raw(NO_GROUP),
    };
    match setsid() {
        // We lead a process group, so a person started us by hand.
        Err(Errno::EPERM) | Ok(_) => {}
        Err(errno) => return Err(failed(errno)),
    }
    setgroups(&[]).and_then(|()| setgid(group)).and_then(|()| setuid(user)).map_err(failed)
}

fn stop_as_owner(place: &Place) -> Outcome {
    let mut outcome = Outcome::new(place.owner, place.directory.clone());
    match run_as_owner(place) {
        Ok((status, said, complaint)) => {
            outcome.stopped = serde_json::from_str::<Vec<String>>(&said).unwrap_or_default();
            outcome.stopped.iter_mut().for_each(|name| *name = harmless(name));
            if !status.success() {
                let first = complaint.lines().next().unwrap_or_default();
                let first = harmless(first.strip_prefix("error: ").unwrap_or(first));
                outcome.error = Some(if first.is_empty() { status.to_string() } else { first });
            }
        }
        Err(error) => outcome.error = Some(error.to_string()),
    }
    outcome
}

/// How it ended, and what it said on stdout and stderr.
fn run_as_owner(place: &Place) -> io::Result<(ExitStatus, String, String)> {
    // The very program that runs now, also when its file has another place or none.
    let mut child = Command::new("/proc/self/exe")
        .args(["stop", "--all", "--json", "--become", &place.owner.to_string()])
        .env_clear()
        .env(DIRECTORY_VARIABLE, &place.directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .current_dir("/")
        .spawn()?;
    let said = child.stdout.take().map(reader);
    let complaint = child.stderr.take().map(reader);
    let status = wait(&mut child)?;
    let text = |thread: Option<JoinHandle<String>>| thread.and_then(|thread| thread.join().ok());
    Ok((status, text(said).unwrap_or_default(), text(complaint).unwrap_or_default()))
}

fn reader(from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before a fault counts.
        let _ = from.take(WORDS_READ).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait(child: &mut Child) -> io::Result<ExitStatus> {
    let deadline = Instant::now() + USER_BOUND;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            return child.wait();
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Without what a terminal would obey.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl Outcome {
    fn new(uid: u32, directory: PathBuf) -> Self {
        let account = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        Outcome { uid, user: account.map(|user| user.name), directory, stopped: Vec::new(), error: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_wrote_cannot_steer_roots_terminal() {
        assert_eq!(harmless("mac\u{1b}[2J\u{9b}31m\n"), "mac?[2J?31m?");
    }
}
