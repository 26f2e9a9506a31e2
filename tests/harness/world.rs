//! One test's world: a directory for logs and keys that outlives its machines.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use tempfile::TempDir;

use crate::{builder::BuilderPlan, client::ClientPlan, machine::END_LIMIT, wait::wait_for_end};

const LOG_TAIL: usize = 40;

/// Everything one test needs; machines hold on to it, so the order of dropping does not matter.
#[derive(Clone)]
pub struct World {
    inner: Arc<Inner>,
}

struct Inner {
    directory: Option<TempDir>,
    failed: AtomicBool,
    ending: Mutex<Vec<process::Child>>,
    machines: AtomicUsize,
}

impl World {
    /// A new world with an ssh key for its clients. Needs root, as it makes namespaces.
    #[expect(clippy::new_without_default, reason = "making a world does a good deal of work")]
    pub fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make mount and PID namespaces and must be run as root"
        );
        let directory = tempfile::Builder::new().prefix("nix-offload-test-").tempdir().unwrap();
        generate_key(&directory.path().join("client-key"));
        let inner = Inner {
            directory: Some(directory),
            failed: AtomicBool::new(false),
            ending: Mutex::new(Vec::new()),
            machines: AtomicUsize::new(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Plans a builder that clients call `name`.
    pub fn builder(&self, name: &str) -> BuilderPlan {
        BuilderPlan::new(self.clone(), name)
    }

    /// Plans a client.
    pub fn client(&self) -> ClientPlan {
        ClientPlan::new(self.clone())
    }

    /// The directory of this world outside its machines: logs and keys.
    pub fn directory(&self) -> &Path {
        self.inner.directory.as_ref().unwrap().path()
    }

    /// A private key no builder knows, for tests of refusals.
    pub fn stray_key(&self) -> String {
        let path = self.directory().join("stray-key");
        if !path.exists() {
            generate_key(&path);
        }
        fs::read_to_string(path).unwrap()
    }

    pub(crate) fn client_key(&self) -> PathBuf {
        self.directory().join("client-key")
    }

    /// A fresh directory for one machine.
    pub(crate) fn machine_directory(&self, name: &str) -> PathBuf {
        let number = self.inner.machines.fetch_add(1, Ordering::Relaxed);
        let path = self.directory().join(format!("{number}-{name}"));
        fs::create_dir(&path).unwrap();
        path
    }

    /// Takes over a machine that has been told to end.
    pub(crate) fn reap_later(&self, machine: process::Child) {
        self.inner.ending.lock().unwrap().push(machine);
    }

    /// Called by whatever notices that the test is failing.
    pub(crate) fn note_failure(&self) {
        if thread::panicking() {
            self.inner.failed.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.note_failure();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let deadline = Instant::now() + END_LIMIT;
        for machine in self.ending.get_mut().unwrap() {
            wait_for_end(machine, deadline.saturating_duration_since(Instant::now()));
            // Killing unshare kills the first process inside, if that did not end by itself.
            let _ = machine.kill();
            let _ = machine.wait();
        }
        let directory = self.directory.take().unwrap();
        if !self.failed.load(Ordering::Relaxed) {
            directory.close().unwrap();
            return;
        }
        let path = directory.keep();
        print_logs(&path);
    }
}

#[expect(clippy::print_stderr, reason = "the logs are what one wants to see of a failed test")]
fn print_logs(directory: &Path) {
    for key in ["client-key", "stray-key"] {
        let _ = fs::remove_file(directory.join(key));
    }
    let mut logs: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .filter_map(|entry| fs::read_dir(entry.unwrap().path()).ok())
        .flatten()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    logs.sort();
    for log in logs {
        let text = String::from_utf8_lossy(&fs::read(&log).unwrap()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_TAIL)..];
        if !tail.is_empty() {
            eprintln!("---- {}\n{}", log.display(), tail.join("\n"));
        }
    }
    eprintln!("---- logs kept in {}", directory.display());
}

/// Makes an ed25519 key without passphrase at `path`, and its public half beside it.
pub(crate) fn generate_key(path: &Path) {
    let status = process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "test-world", "-f"])
        .arg(path)
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .stdin(process::Stdio::null())
        .status()
        .expect("ssh-keygen is missing; ./tests/run installs it");
    assert!(status.success(), "ssh-keygen failed: {status}");
}
