//! Commands inside a machine: built like std's, always with a clean environment and a time limit.

use std::{
    fmt,
    fs::File,
    io::Read,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command as StdCommand, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

use crate::{
    machine::children,
    wait::{wait_for_end, wait_until},
};

/// User and group number of the user without rights.
pub(crate) const USER_ID: u32 = 1000;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long after a program's end something else may still hold its outputs.
const OUTPUT_LIMIT: Duration = Duration::from_secs(10);
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// A program to be run inside a machine.
pub struct Command {
    init: u32,
    program: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    as_user: bool,
    limit: Duration,
    log: Option<File>,
}

impl Command {
    pub(crate) fn new(init: u32, program: &str) -> Self {
        Self {
            init,
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            as_user: false,
            limit: DEFAULT_LIMIT,
            log: None,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<str>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable in the otherwise empty environment (HOME, USER and PATH are there).
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Runs it as the user without rights.
    pub fn as_user(mut self) -> Self {
        self.as_user = true;
        self
    }

    /// Changes the time limit, 60 seconds otherwise.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Sends both outputs to a file instead of collecting them.
    pub(crate) fn log_to(mut self, log: File) -> Self {
        self.log = Some(log);
        self
    }

    /// Runs it to its end; one that exceeds its limit is killed and fails the test.
    pub fn run(self) -> Output {
        self.spawn().wait()
    }

    /// Starts it.
    pub fn spawn(self) -> Running {
        let (name, home, runtime) =
            if self.as_user { ("user", "/home/user", USER_ID) } else { ("root", "/root", 0) };
        let mut command = StdCommand::new("nsenter");
        command.args([
            "--target",
            &self.init.to_string(),
            "--mount",
            "--pid",
            "--uts",
            "--net",
            "--root",
            "--",
        ]);
        command.args(["/usr/bin/env", "-i", "-C", home]);
        command.args([
            format!("HOME={home}"),
            format!("USER={name}"),
            format!("LOGNAME={name}"),
            format!("PATH={PATH}"),
            format!("XDG_RUNTIME_DIR=/run/user/{runtime}"),
        ]);
        command.args(self.env.iter().map(|(name, value)| format!("{name}={value}")));
        if self.as_user {
            command.args(["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]);
        }
        let words = format!("{} {}", self.program, self.args.join(" "));
        command.arg(self.program).args(self.args).stdin(Stdio::null()).process_group(0).current_dir("/");
        match &self.log {
            Some(log) => command.stdout(log.try_clone().unwrap()).stderr(log.try_clone().unwrap()),
            None => command.stdout(Stdio::piped()).stderr(Stdio::piped()),
        };
        let mut child = command.spawn().expect("nsenter is missing; ./tests/run installs it");
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        Running { words, child, stdout, stderr, start: Instant::now(), limit: self.limit }
    }
}

/// Reads an output as it comes.
struct Collector {
    thread: JoinHandle<()>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Collector {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap_or_else(PoisonError::into_inner)).into()
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Collector {
    const CHUNK: usize = 64 << 10;
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&bytes);
    let thread = thread::spawn(move || {
        let mut chunk = vec![0; CHUNK];
        while let Ok(length @ 1..) = from.read(&mut chunk) {
            sink.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&chunk[..length]);
        }
    });
    Collector { thread, bytes }
}

/// A program that runs inside a machine.
pub struct Running {
    words: String,
    child: Child,
    stdout: Option<Collector>,
    stderr: Option<Collector>,
    start: Instant,
    limit: Duration,
}

impl Running {
    /// The program's number outside its machine, once it has been started there.
    pub fn outer_pid(&self) -> u32 {
        let nsenter = self.child.id();
        wait_until("nsenter has forked", self.limit, || !children(nsenter).is_empty());
        children(nsenter)[0]
    }

    /// Sends the program itself (not its children) a signal.
    pub fn signal(&self, signal: Signal) {
        signal::kill(Pid::from_raw(i32::try_from(self.outer_pid()).unwrap()), signal).unwrap();
    }

    /// The same if the program runs just now; false if it does not.
    pub fn signal_if_running(&self, signal: Signal) -> bool {
        let pid = children(self.child.id()).first().map(|pid| Pid::from_raw(i32::try_from(*pid).unwrap()));
        pid.is_some_and(|pid| signal::kill(pid, signal).is_ok())
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What it has printed on standard error so far.
    pub fn stderr_so_far(&self) -> String {
        self.stderr.as_ref().map(Collector::text).unwrap_or_default()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Output {
        let left = self.limit.saturating_sub(self.start.elapsed());
        let has_ended = wait_for_end(&mut self.child, left);
        if !has_ended {
            self.kill_program();
        }
        let status = self.child.wait().unwrap();
        let output = self.output(status);
        assert!(has_ended, "not finished after {:?}: {output}", self.limit);
        output
    }

    /// Kills the program and leaves nsenter, its parent, to reap it: an orphan's remains would go to
    /// the host's first process, and until that looks at them the machine cannot end.
    fn kill_program(&self) {
        let inner = children(self.child.id());
        let targets = if inner.is_empty() { vec![self.child.id()] } else { inner };
        for pid in targets {
            let _ = signal::kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL);
        }
    }

    fn output(&mut self, status: ExitStatus) -> Output {
        let took = self.start.elapsed();
        let text = |from: Option<Collector>| {
            let Some(collector) = from else { return String::new() };
            wait_until("its outputs are closed (does a child hold them?)", OUTPUT_LIMIT, || {
                collector.thread.is_finished()
            });
            collector.text()
        };
        Output {
            words: self.words.clone(),
            status,
            stdout: text(self.stdout.take()),
            stderr: text(self.stderr.take()),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill_program();
            let _ = self.child.wait();
        }
    }
}

/// How a program ended and what it printed.
#[must_use]
pub struct Output {
    words: String,
    status: ExitStatus,
    stdout: String,
    stderr: String,
    took: Duration,
}

impl Output {
    /// What it printed on standard output.
    pub fn stdout(&self) -> &str {
        &self.stdout
    }

    /// What it printed on standard error.
    pub fn stderr(&self) -> &str {
        &self.stderr
    }

    /// Its exit code; a signal counts as 128 and its number, as in a shell.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// How long it ran.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Fails the test unless it exited with 0.
    #[track_caller]
    pub fn assert_success(&self) -> &Self {
        assert!(self.status.success(), "should have succeeded: {self}");
        self
    }

    /// Fails the test if it exited with 0.
    #[track_caller]
    pub fn assert_failure(&self) -> &Self {
        assert!(!self.status.success(), "should have failed: {self}");
        self
    }

    /// Fails the test unless standard error contains `text`.
    #[track_caller]
    pub fn assert_stderr_has(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "stderr lacks {text:?}: {self}");
        self
    }

    /// Fails the test if standard error contains `text`.
    #[track_caller]
    pub fn assert_stderr_lacks(&self, text: &str) -> &Self {
        assert!(!self.stderr.contains(text), "stderr has {text:?}: {self}");
        self
    }

    /// The store paths it printed.
    pub fn out_paths(&self) -> Vec<String> {
        self.stdout.lines().filter(|line| line.starts_with("/nix/store/")).map(str::to_owned).collect()
    }

    /// The one store path it printed.
    #[track_caller]
    pub fn out_path(&self) -> String {
        let paths = self.out_paths();
        assert_eq!(paths.len(), 1, "not exactly one path: {self}");
        paths[0].clone()
    }
}

impl fmt::Display for Output {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(to, "{} ({}, {:.1?})", self.words, self.status, self.took)?;
        writeln!(to, "-- stdout\n{}", self.stdout.trim_end())?;
        writeln!(to, "-- stderr\n{}", self.stderr.trim_end())
    }
}
