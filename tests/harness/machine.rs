//! A machine: its first process, its files seen from outside, and commands run inside.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command as Process1, Stdio},
    time::Duration,
};

use crate::{
    command::Command,
    paths::{self, Release},
    wait::wait_until,
    world::World,
};

/// How long a machine may take to end.
pub(crate) const END_LIMIT: Duration = Duration::from_secs(10);

/// A small computer of its own that lives as long as this value.
pub struct Machine {
    name: String,
    release: Release,
    directory: PathBuf,
    unshare: Option<Child>,
    stdin: Option<ChildStdin>,
    init: u32,
    world: World,
}

/// A process of a machine.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its number inside the machine.
    pub pid: u32,
    /// Its arguments, joined by blanks.
    pub command_line: String,
}

impl Machine {
    pub(crate) fn start(
        world: &World,
        name: &str,
        release: Release,
        with_nix: bool,
        own_network: bool,
    ) -> Self {
        let directory = world.machine_directory(name);
        let stage = directory.join("root");
        fs::create_dir(&stage).unwrap();
        let share = world.directory().join("share");
        fs::create_dir_all(&share).unwrap();
        fs::set_permissions(&share, fs::Permissions::from_mode(0o1777)).unwrap();
        let log = File::create(directory.join("machine.log")).unwrap();
        let mut unshare = Process1::new("unshare")
            .args(["--mount", "--pid", "--uts", "--fork", "--kill-child", "--propagation", "private"])
            .args(own_network.then_some("--net"))
            .arg("--")
            .arg("/bin/bash")
            .arg(paths::machine_script())
            .arg(name)
            .arg(&stage)
            .arg(release.root())
            .arg(paths::binaries())
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HIDE_NIX", if with_nix { "0" } else { "1" })
            .env("OWN_NETWORK", if own_network { "1" } else { "0" })
            .env("SHARE", &share)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("unshare is missing; ./tests/run installs it");
        let stdin = unshare.stdin.take();
        let mut ready = String::new();
        BufReader::new(unshare.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        if ready != "READY\n" {
            let _ = unshare.wait();
            let why = fs::read_to_string(directory.join("machine.log")).unwrap();
            panic!("machine {name} did not start: {why}");
        }
        let init = only_child(unshare.id());
        Self {
            name: name.into(),
            release,
            directory,
            unshare: Some(unshare),
            stdin,
            init,
            world: world.clone(),
        }
    }

    /// The machine's host name, also readable inside as `/etc/machine-name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The release whose programs it runs.
    pub fn release(&self) -> Release {
        self.release
    }

    /// The machine's file `path` as seen from the test. Absolute symbolic links on the way lead
    /// astray; use [`Machine::run`] where there are any.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// Writes a file inside, making its directories.
    pub fn write(&self, path: &str, text: &str) {
        self.write_mode(path, text, 0o644);
    }

    /// Writes a file inside with these permissions, making its directories.
    pub fn write_mode(&self, path: &str, text: &str, mode: u32) {
        self.write_bytes(path, text.as_bytes());
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Writes a file inside that need not be text, making its directories.
    pub fn write_bytes(&self, path: &str, bytes: &[u8]) {
        let outside = self.path(path);
        fs::create_dir_all(outside.parent().unwrap()).unwrap();
        fs::write(&outside, bytes).unwrap();
    }

    /// Gives a file inside to the user without rights.
    pub fn give_to_user(&self, path: &str) {
        chown(self.path(path), Some(crate::command::USER_ID), Some(crate::command::USER_ID)).unwrap();
    }

    /// Reads a file inside.
    pub fn read(&self, path: &str) -> String {
        let outside = self.path(path);
        String::from_utf8_lossy(&fs::read(&outside).unwrap_or_else(|error| panic!("{path}: {error}"))).into()
    }

    /// Whether there is anything at this place inside.
    pub fn exists(&self, path: &str) -> bool {
        self.path(path).symlink_metadata().is_ok()
    }

    /// The names in a directory inside, sorted; none if there is no such directory.
    pub fn entries(&self, path: &str) -> Vec<String> {
        let Ok(directory) = fs::read_dir(self.path(path)) else { return Vec::new() };
        let mut names: Vec<String> =
            directory.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// A command to be run inside as root, with a clean environment.
    pub fn command(&self, program: &str) -> Command {
        Command::new(self.init, program)
    }

    /// Runs a line of shell inside, which must succeed, and returns what it printed.
    pub fn run(&self, line: &str) -> String {
        let output = self.command("bash").args(["-c", line]).run();
        output.assert_success();
        output.stdout().into()
    }

    /// All processes inside but the first one and those the harness itself is running.
    pub fn processes(&self) -> Vec<Process> {
        let mut found = Vec::new();
        for name in self.entries("/proc") {
            let Ok(pid) = name.parse::<u32>() else { continue };
            let Ok(raw) = fs::read(self.path(&format!("/proc/{pid}/cmdline"))) else { continue };
            let command_line = String::from_utf8_lossy(&raw).replace('\0', " ").trim_end().to_owned();
            // Zombies and kernel threads have no command line.
            if pid != 1 && !command_line.is_empty() {
                found.push(Process { pid, command_line });
            }
        }
        found
    }

    /// The processes inside whose command line contains `text`.
    pub fn pids_matching(&self, text: &str) -> Vec<u32> {
        self.processes().iter().filter(|process| process.command_line.contains(text)).map(|p| p.pid).collect()
    }

    /// Sends a signal (by name, as for kill) to one process inside.
    pub fn kill(&self, pid: u32, signal: &str) {
        self.command("kill").args(["-s", signal, &pid.to_string()]).run().assert_success();
    }

    /// Starts a program inside that runs until the machine ends; its output goes to NAME.log.
    pub(crate) fn start_service(&self, log: &str, command: Command) -> crate::command::Running {
        let path = self.directory.join(format!("{log}.log"));
        command.log_to(File::options().create(true).append(true).open(path).unwrap()).spawn()
    }

    /// What a service of this machine has printed so far.
    pub fn log(&self, service: &str) -> String {
        let path = self.directory.join(format!("{service}.log"));
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into()
    }

    /// Checks every path of the machine's store against its database: nothing missing, nothing changed.
    pub fn verify_store(&self) {
        self.verify_store_at("auto");
    }

    /// The same for a private store.
    pub fn verify_store_at(&self, store: &str) {
        let output = self.command("nix-store").args(["--verify", "--check-contents", "--store", store]).run();
        output.assert_success();
        for complaint in ["disappeared", "modified", "error", "was not"] {
            assert!(!output.stderr().contains(complaint), "{}: {}", self.name, output.stderr());
        }
    }

    /// Names in /nix/store, without lock files and the directory of links.
    pub fn store_entries(&self) -> Vec<String> {
        let mut names = self.entries("/nix/store");
        names.retain(|name| name != ".links");
        names
    }

    /// Number of the machine's first process, seen from outside.
    pub(crate) fn init(&self) -> u32 {
        self.init
    }

    /// Ends the machine now, as if its power had been cut.
    pub fn stop(&mut self) {
        drop(self.stdin.take());
        if let Some(mut unshare) = self.unshare.take() {
            wait_until("the machine has ended", END_LIMIT, || unshare.try_wait().unwrap().is_some());
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Ending takes a moment; the world waits for all its machines at once.
        drop(self.stdin.take());
        if let Some(unshare) = self.unshare.take() {
            self.world.reap_later(unshare);
        }
    }
}

fn only_child(pid: u32) -> u32 {
    children(pid).first().copied().unwrap_or_else(|| panic!("process {pid} has no child"))
}

pub(crate) fn children(pid: u32) -> Vec<u32> {
    let path = Path::new("/proc").join(format!("{pid}/task/{pid}/children"));
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().map(|number| number.parse().unwrap()).collect()
}
