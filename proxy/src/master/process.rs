//! Processes that are not our children: whether a number still is the process it was, and ending it. And children
//! that have only so much time to say something.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read},
    os::unix::{ffi::OsStrExt, fs::MetadataExt, process::CommandExt},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
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

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Activity {
    /// It is stopped by a signal or a debugger.
    pub(super) stopped: bool,
    /// It runs, waits for a processor, or for a disk.
    pub(super) runnable: bool,
    /// How long it has run so far, in nanoseconds.
    pub(super) ran: u64,
}

/// What the process that began then is doing (`/proc/PID/stat`, `/proc/PID/schedstat`). None if it is gone.
pub(super) fn activity(pid: u32, born: &str) -> Option<Activity> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") || fields.nth(18) != Some(born) {
        return None;
    }
    // Not every kernel counts it; then its state must do.
    let ran = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok();
    let ran = ran.and_then(|text| text.split(' ').next()?.parse().ok()).unwrap_or_default();
    Some(Activity { stopped: matches!(state, "T" | "t"), runnable: matches!(state, "R" | "D"), ran })
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
            thread::sleep(POLL_INTERVAL);
        }
    }
}

/// What a command says on stdout and stderr, each up to 256 KiB. It has its own process group, which is killed when it
/// takes longer than `bound`.
pub(super) fn output(command: &mut Command, bound: Duration) -> io::Result<(String, String)> {
    const MOST: u64 = 256 * 1024;
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn()?;
    let (done, results) = mpsc::channel();
    let pipes: [(usize, Option<Box<dyn Read + Send>>); 2] = [
        (0, child.stdout.take().map(|p| Box::new(p) as _)),
        (1, child.stderr.take().map(|p| Box::new(p) as _)),
    ];
    for (index, pipe) in pipes {
        let (done, Some(pipe)) = (done.clone(), pipe) else { continue };
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = pipe.take(MOST).read_to_end(&mut bytes);
            // Nobody listens any more when it took too long.
            let _ = done.send((index, read.map(|_| String::from_utf8_lossy(&bytes).into_owned())));
        });
    }
    let deadline = Instant::now() + bound;
    let mut texts = [String::new(), String::new()];
    let mut result = Ok(());
    for _ in 0..2 {
        match results.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((index, Ok(text))) => texts[index] = text,
            Ok((_, Err(error))) => result = Err(error),
            Err(_) => result = Err(io::ErrorKind::TimedOut.into()),
        }
    }
    if result.is_err()
        && let Ok(leader) = i32::try_from(child.id())
    {
        // It may be gone in between, which is what we want.
        let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
    }
    child.wait()?;
    let [stdout, stderr] = texts;
    result.map(|()| (stdout, stderr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_has_only_so_much_time() {
        let shell = |script: &str, bound| {
            output(Command::new("sh").args(["-c", script]), Duration::from_millis(bound))
        };
        assert_eq!(shell("echo a; echo b >&2", 10_000).unwrap(), ("a\n".into(), "b\n".into()));
        let begin = Instant::now();
        let error = shell("sleep 60 & sleep 60", 200).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_a_process_does_is_seen() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let (pid, born) = (child.id(), birth(child.id()).unwrap());
        let before = activity(pid, &born).unwrap();
        thread::sleep(Duration::from_millis(300));
        let after = activity(pid, &born).unwrap();
        assert!(after.runnable && after.ran > before.ran, "{before:?} {after:?}");
        kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGSTOP).unwrap();
        thread::sleep(Duration::from_millis(50));
        assert!(activity(pid, &born).unwrap().stopped);
        assert_eq!(activity(pid, "1"), None);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(activity(pid, &born), None);
    }

    #[test]
    fn a_process_is_told_from_another_of_the_same_number() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
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
