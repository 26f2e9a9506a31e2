//! The Nix daemon of this machine: whether there is one, since when, and with which environment.
//!
//! Must never connect to it: each connection is a process and a line in its log.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::unistd::geteuid;

/// Clock ticks in a second, in what Linux tells of processes (`USER_HZ`, the same on all of Nix's platforms).
const TICKS: u64 = 100;

/// A daemon.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// Its process, if it runs: systemd starts it with the first connection.
    pub process: Option<Process>,
    /// The user it runs as.
    pub uid: u32,
}

/// A process of a daemon.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it was started.
    pub started: Option<SystemTime>,
    /// Its program's file, if we may know.
    pub program: Option<PathBuf>,
    /// Its environment, if we may know.
    pub environment: Option<Vec<(OsString, OsString)>>,
    /// Its arguments.
    pub words: Vec<String>,
}

/// Finds the daemon. Anybody can give a process its name, so only one of the user whose socket that is, or of root, is
/// believed in. Root believes in nobody but root, because what is found beside the daemon's program is run.
pub fn find(socket: &Path) -> Option<Daemon> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let owner = fs::metadata(socket).map_or(0, |socket| socket.uid());
    let is_believed = |uid: u32| uid == 0 || (uid == owner && !geteuid().is_root());
    // Its children, one for each connection, came later.
    let process =
        pids.filter_map(look_at).filter(|(_, uid, _)| is_believed(*uid)).min_by_key(|(ticks, ..)| *ticks);
    match process {
        Some((ticks, uid, process)) => {
            Some(Daemon { uid, process: Some(Process { started: since_boot(ticks), ..process }) })
        }
        None if socket.exists() && Path::new("/run/systemd/system").exists() => {
            Some(Daemon { process: None, uid: fs::metadata(socket).map_or(0, |socket| socket.uid()) })
        }
        None => None,
    }
}

fn look_at(pid: u32) -> Option<(u64, u32, Process)> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let line = fs::read(directory.join("cmdline")).ok()?;
    let words: Vec<String> = line
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .filter(|word| !word.is_empty())
        .collect();
    let name = Path::new(words.first()?).file_name()?.to_str()?;
    let is_daemon =
        name == "nix-daemon" || (name == "nix" && words.get(1).is_some_and(|word| word == "daemon"));
    if !is_daemon || words.iter().any(|word| word == "--stdio") {
        return None;
    }
    // One in a container is not ours.
    let place = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    if place(&directory.join("root")).is_some_and(|root| Some(root) != place(Path::new("/"))) {
        return None;
    }
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    // The name in parentheses may contain anything, a closing parenthesis too.
    let ticks = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    let environment = fs::read(directory.join("environ")).ok().map(|environment| {
        let pairs = environment.split(|byte| *byte == 0).filter_map(|pair| {
            let at = pair.iter().position(|byte| *byte == b'=')?;
            Some((OsString::from_vec(pair[..at].to_vec()), OsString::from_vec(pair[at + 1..].to_vec())))
        });
        pairs.collect()
    });
    let program = fs::read_link(directory.join("exe")).ok();
    let uid = fs::metadata(&directory).ok()?.uid();
    Some((ticks, uid, Process { pid, started: None, program, environment, words }))
}

fn since_boot(ticks: u64) -> Option<SystemTime> {
    let uptime: f64 = fs::read_to_string("/proc/uptime").ok()?.split(' ').next()?.parse().ok()?;
    let age =
        Duration::try_from_secs_f64(uptime).ok()?.checked_sub(Duration::from_millis(ticks * 1000 / TICKS))?;
    SystemTime::now().checked_sub(age)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    #[test]
    fn a_strangers_process_is_no_daemon_whatever_it_is_called() {
        if !geteuid().is_root() {
            // Only root can be somebody else.
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        fs::write(&socket, "").unwrap();
        let child = |uid| {
            let mut command = Command::new("sleep");
            command.arg0("nix-daemon").arg("60").uid(uid).stdin(Stdio::null()).spawn().unwrap()
        };
        let found = |pid: u32| {
            let entries = find(&socket).and_then(|daemon| daemon.process);
            entries.is_some_and(|process| process.pid == pid)
        };
        let mut stranger = child(54321);
        std::os::unix::fs::chown(&socket, Some(54321), None).unwrap();
        assert!(look_at(stranger.id()).is_some() && !found(stranger.id()), "not for root");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn the_time_of_a_start_is_that_of_the_clock() {
        let before = SystemTime::now();
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let ticks = stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap().parse().unwrap();
        let started = since_boot(ticks).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let apart = started.duration_since(before).unwrap_or_else(|early| early.duration());
        assert!(apart < Duration::from_secs(20), "{apart:?}");
        assert!(look_at(child.id()).is_none());
    }
}
