//! Processes that are not our children: whether a number still is the process it was, and ending it.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::POLL_INTERVAL;

/// When a process began (clock ticks since boot, field 22 of `/proc/PID/stat`), which no later process with
/// the same number shares. None if it is gone, or if the system has no `/proc`.
pub(super) fn birth(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything, a closing parenthesis too.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18).map(str::to_owned) }
}

/// A process as the table shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) owner: u32,
    pub(super) born: String,
    pub(super) words: Vec<OsString>,
}

/// All processes, of whatever user, whose program's file is called that.
pub(super) fn running(program: &str) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let born = birth(pid)?;
            // A program that was replaced since has a mark behind its name.
            let file = fs::read_link(entry.path().join("exe")).ok()?;
            if file.file_name()?.to_str()?.trim_end_matches(" (deleted)") != program {
                return None;
            }
            let owner = entry.metadata().ok()?.uid();
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let words = line.split(|byte| *byte == 0).map(|word| OsStr::from_bytes(word).to_owned());
            Some(Process { pid, owner, born, words: words.collect() })
        })
        .collect()
}

/// Ends the process if it is still the one that began then: politely, and by force when it has not gone
/// within `patience`. Returns when it is gone, or after another `patience`.
pub(super) fn end(pid: u32, born: &str, patience: Duration) {
    let Ok(number) = i32::try_from(pid) else { return };
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        if number <= 1 || birth(pid).as_deref() != Some(born) {
            return;
        }
        // It may be gone in between, which is what we want.
        let _ = kill(Pid::from_raw(number), signal);
        let deadline = Instant::now() + patience;
        while birth(pid).as_deref() == Some(born) && Instant::now() < deadline {
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_another_of_the_same_number() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        let born = birth(pid).unwrap();
        end(pid, "1", Duration::from_secs(1));
        assert_eq!(birth(pid), Some(born.clone()));
        end(pid, &born, Duration::from_secs(1));
        assert_eq!(birth(pid), None, "it is a zombie, which counts as gone");
        child.wait().unwrap();
        assert_eq!(birth(u32::MAX), None);
    }
}
