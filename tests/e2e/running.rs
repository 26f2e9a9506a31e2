//! Which builds really run on a machine and how many slots are held.

use std::fs::{self, File};

use harness::{Client, Machine};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// What the command line of a build's shell begins with, before the name.
const MARK: &str = ": build-of ";

/// The shell of a build.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Build {
    /// What was given to [`marked`].
    pub(crate) name: String,
    pub(crate) pid: u32,
    /// The daemon's process that started it.
    pub(crate) parent: u32,
    /// When it was started, in the kernel's ticks: a number may be used again.
    start: u64,
}

/// A build's script by which [`builds`] knows it.
pub(crate) fn marked(name: &str, script: &str) -> String {
    format!("{MARK}{name} ; {script}")
}

/// The name in a command line that has such a script in it.
pub(crate) fn name_in(command_line: &str) -> Option<&str> {
    command_line.split_once(MARK)?.1.split_once(" ;").map(|(name, _)| name)
}

/// The marked builds that run there now.
pub(crate) fn builds(machine: &Machine) -> Vec<Build> {
    let mut found = Vec::new();
    for entry in machine.entries("/proc") {
        let Ok(pid) = entry.parse::<u32>() else { continue };
        let Ok(line) = fs::read(machine.path(&format!("/proc/{pid}/cmdline"))) else { continue };
        let line = String::from_utf8_lossy(&line);
        let Some(name) = name_in(&line) else { continue };
        // What it has forked looks the same, but Nix makes the first one the leader of a session.
        if let Some(Stat { parent, session, start }) = stat(machine, pid)
            && session == pid
        {
            found.push(Build { name: name.to_owned(), pid, parent, start });
        }
    }
    found
}

/// The number of the process that started this one, in the machine.
pub(crate) fn parent(machine: &Machine, pid: u32) -> Option<u32> {
    stat(machine, pid).map(|stat| stat.parent)
}

struct Stat {
    parent: u32,
    session: u32,
    start: u64,
}

/// Source: proc_pid_stat(5).
fn stat(machine: &Machine, pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(machine.path(&format!("/proc/{pid}/stat"))).ok()?;
    let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
    let number = |index: usize| fields.get(index)?.parse().ok();
    Some(Stat { parent: number(1)?, session: number(3)?, start: fields.get(19)?.parse().ok()? })
}

/// Where a client's slots are.
const SLOTS: &str = "/nix/var/nix/current-load";

/// The lock files of a machine's slots that a client ever made.
pub(crate) fn slot_files(client: &Client, machine: &str) -> Vec<String> {
    let head = format!("{}-", machine.replace('/', "_"));
    let mut files = client.entries(SLOTS);
    files.retain(|file| file.strip_prefix(&head).is_some_and(|rest| rest.parse::<u32>().is_ok()));
    files
}

/// How many slots of a machine are held by processes of a client. Asks as hooks do, who are the only ones to know:
/// `/proc/locks` leaves some out while others come and go.
pub(crate) fn held_slots(client: &Client, machine: &str) -> usize {
    let open = |file: &str| File::open(client.path(&format!("{SLOTS}/{file}")));
    let files = slot_files(client, machine);
    let Ok(main_lock) = open("main-lock") else { return 0 };
    let _counting = Flock::lock(main_lock, FlockArg::LockExclusive).unwrap();
    let is_held = |file: &&String| {
        let tried = Flock::lock(open(file).unwrap(), FlockArg::LockExclusiveNonblock);
        matches!(tried, Err((_, Errno::EWOULDBLOCK)))
    };
    files.iter().filter(is_held).count()
}
