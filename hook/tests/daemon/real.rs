//! A real daemon with a store of its own, spoken to in every version.

use nix_derivation::{Derivation, StoreDir, StorePath};
use nix_offload::builder::{Ahead, Builder, BuilderError, Clocks, Event};
use nix_offload::path_info::PathInfo;
use nix_offload::store::{self, Location, Query};
use nix_offload::wire::worker::{NEWEST_MINOR, OLDEST_MINOR, Options, Outcome, Version};
use nix_offload_proxy::master::{CloseWrite, Stream, TimedRead};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const BOUND: Duration = Duration::from_secs(20);

/// One end of a socket pair whose other end is a daemon's standard input and output.
struct End(UnixStream);

impl Read for End {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
    }
}

impl TimedRead for End {
    fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(timeout)
    }

    fn abandon(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

impl Write for End {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl CloseWrite for End {
    fn shutdown(&mut self) -> io::Result<()> {
        self.0.shutdown(std::net::Shutdown::Write)
    }
}

pub(crate) fn stream(socket: UnixStream) -> Stream {
    Stream { reader: Box::new(End(socket.try_clone().unwrap())), writer: Box::new(End(socket)) }
}

/// A store directory with what Nix needs around it.
pub(crate) struct Store {
    pub(crate) root: PathBuf,
    pub(crate) location: Location,
    /// A root whose programs are run instead of this system's.
    pub(crate) programs: Option<PathBuf>,
    daemons: Vec<Child>,
}

impl Store {
    /// Both stores of a test have the same logical directory, as a client and its builders must.
    pub(crate) fn new(root: PathBuf, store_dir: &Path) -> Self {
        fs::create_dir_all(root.join("etc")).unwrap();
        let settings = "sandbox = false\nsubstituters =\nbuild-users-group =\nmax-jobs = 4\n\
                        experimental-features = nix-command daemon-trust-override\n";
        fs::write(root.join("etc/nix.conf"), settings).unwrap();
        let location = Location {
            store_dir: StoreDir::new(store_dir.to_str().unwrap()).unwrap(),
            real_store_dir: store_dir.to_owned(),
            state_dir: root.join("var"),
        };
        Self { root, location, programs: None, daemons: Vec::new() }
    }

    pub(crate) fn nix(&self, program: &str) -> Command {
        let mut command = match &self.programs {
            None => Command::new(program),
            Some(root) => {
                let mut loader = Command::new(root.join("lib64/ld-linux-x86-64.so.2"));
                let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|d| root.join(d));
                loader.arg("--library-path").arg(std::env::join_paths(libraries).unwrap());
                // Nix finds its own hook by the name it was started by, and here that is the loader's. 2.26 reads this
                // setting in no file.
                loader.env("NIX_CONFIG", "build-hook =");
                loader.arg("--argv0").arg(program).arg(root.join("usr/bin").join(program));
                loader
            }
        };
        command
            .env_remove("NIX_REMOTE")
            .env("NIX_STORE_DIR", &self.location.real_store_dir)
            .env("NIX_STATE_DIR", &self.location.state_dir)
            .env("NIX_LOG_DIR", self.root.join("log"))
            .env("NIX_CONF_DIR", self.root.join("etc"))
            .env("NIX_LOCALSTATE_DIR", self.root.join("localstate"))
            .env("HOME", &self.root);
        command
    }

    pub(crate) fn output(&self, program: &str, args: &[&str]) -> String {
        let output = self.nix(program).args(args).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn daemon(&mut self, minor: u8) -> Builder {
        self.daemon_with(minor, &[])
    }

    pub(crate) fn daemon_with(&mut self, minor: u8, args: &[&str]) -> Builder {
        self.daemon_and_socket(minor, args).0
    }

    /// The same with what its answers come by.
    pub(crate) fn daemon_and_socket(&mut self, minor: u8, args: &[&str]) -> (Builder, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs = OwnedFd::from(theirs);
        let child = self
            .nix("nix-daemon")
            .arg("--stdio")
            .args(args)
            .stdin(theirs.try_clone().unwrap())
            .stdout(theirs)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.daemons.push(child);
        let offer = Version::new(minor).unwrap();
        let (socket, store_dir) = (ours.try_clone().unwrap(), self.location.store_dir.clone());
        (Builder::connect(stream(ours), store_dir, offer, BOUND, Ahead::default()).unwrap(), socket)
    }

    pub(crate) fn instantiate(&self, expression: &str) -> (StorePath, Derivation) {
        let path = self.output("nix-instantiate", &["-E", expression]);
        let drv_path = self.location.store_dir.parse_path(path.as_bytes()).unwrap();
        let name = drv_path.name().strip_suffix(".drv").unwrap().to_owned();
        let text = fs::read(&path).unwrap();
        let drv = Derivation::from_aterm_bytes_in(&text, &name, self.location.store_dir.clone()).unwrap();
        (drv_path, drv)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Derivation of a script with one input file.
pub(crate) fn expression(name: &str, script: &str) -> String {
    format!(
        r#"derivation {{ name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/bin:/usr/bin";
            input = builtins.toFile "input-{name}" "from {name}"; args = [ "-c" ''{script}'' ]; }}"#
    )
}

pub(crate) fn events(log: &mut Vec<String>) -> impl FnMut(Event<'_>) {
    |event| match event {
        Event::LogLine(line) => log.push(String::from_utf8_lossy(line).into_owned()),
        Event::Phase(phase) => log.push(format!("phase {}", String::from_utf8_lossy(phase))),
        _ => {}
    }
}

/// A path that the store had and has forgotten, to be sent to it: two stores of the same logical directory would
/// need namespaces.
pub(crate) fn forgotten(store: &Store, name: &str, content: &[u8]) -> (PathInfo, Vec<u8>) {
    let file = store.root.join(name);
    fs::write(&file, content).unwrap();
    let rendered = store.output("nix-store", &["--add", file.to_str().unwrap()]);
    let path = store.location.store_dir.parse_path(rendered.as_bytes()).unwrap();
    let info = Query::open(&store.location).unwrap().path_info(&path).unwrap().unwrap();
    let mut nar = Vec::new();
    store::dump(&store.location, &path, &mut nar).unwrap();
    store.output("nix-store", &["--delete", &rendered]);
    assert!(!Query::open(&store.location).unwrap().is_valid(&path).unwrap());
    (info, nar)
}

#[test]
fn every_version_uploads_builds_and_fetches() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::new(directory.path().join("nix"), &directory.path().join("store"));
    for minor in OLDEST_MINOR..=NEWEST_MINOR {
        let name = format!("v{minor}");
        let (info, nar) = forgotten(&store, &name, format!("from {name}").as_bytes());
        let input = info.path.clone();
        let script = format!("x=$(cat {}); echo log $x; echo $x > $out", store.location.render(&input));
        let (drv_path, drv) = store.instantiate(&expression(&name, &script));

        let mut builder = store.daemon(minor);
        assert!(builder.peer().version.minor() <= minor);
        let valid = builder.hold_and_query(std::slice::from_ref(&input), false, &mut |_| {}).unwrap();
        assert!(valid.is_empty(), "1.{minor}");
        let dump = |_: &StorePath, to: &mut dyn Write| to.write_all(&nar);
        builder.upload(&[&[info]], &dump, &|_| {}, &mut |_| {}, Ahead::default(), &mut |_| {}).unwrap();
        let valid = builder.hold_and_query(std::slice::from_ref(&input), false, &mut |_| {}).unwrap();
        assert_eq!(valid, [input.clone()].into(), "1.{minor}");

        let mut log = Vec::new();
        let result =
            builder.build(&drv_path, &drv, &[input], Clocks::default(), &mut events(&mut log)).unwrap();
        assert_eq!(result.outcome(false), Outcome::Built, "1.{minor}: {result:?}");
        assert_eq!(log, [format!("log from {name}")], "1.{minor}");

        let out = drv.outputs()["out"].path_in(drv.store_dir(), drv.name(), "out").unwrap().unwrap();
        let infos = builder.path_infos(&[out.clone(), drv_path.clone()], &mut |_| {}).unwrap();
        let info = infos[0].clone().unwrap();
        let mut fetched = Vec::new();
        let receive = |_: &PathInfo, nar: &mut dyn Read| nar.read_to_end(&mut fetched).map(drop);
        builder.nars(std::slice::from_ref(&info), receive, &mut |_| {}).unwrap();
        let mut expected = Vec::new();
        store::dump(&store.location, &out, &mut expected).unwrap();
        assert_eq!(fetched, expected, "1.{minor}");
        let registered = Query::open(&store.location).unwrap().path_info(&out).unwrap().unwrap();
        assert_eq!((info.nar_hash, info.nar_size), (registered.nar_hash, registered.nar_size), "1.{minor}");
        assert!(builder.round_trip(BOUND).unwrap() < BOUND);
    }
    store.output("nix-store", &["--verify", "--check-contents"]);
}

#[test]
fn a_large_input_and_thousands_of_questions_pass_in_every_way_of_sending() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::new(directory.path().join("nix"), &directory.path().join("store"));
    for minor in [22, 31, NEWEST_MINOR] {
        let (info, nar) = forgotten(&store, "large", &vec![7; 20 << 20]);
        let path = info.path.clone();
        let mut builder = store.daemon(minor);
        let strangers: Vec<StorePath> = (0u32..5000)
            .map(|n| {
                let mut digest = [0; 20];
                digest[..4].copy_from_slice(&n.to_le_bytes());
                StorePath::from_parts(digest, "stranger").unwrap()
            })
            .collect();
        assert!(builder.hold_and_query(&strangers, false, &mut |_| {}).unwrap().is_empty());
        let dump = |_: &StorePath, to: &mut dyn Write| to.write_all(&nar);
        builder.upload(&[&[info]], &dump, &|_| {}, &mut |_| {}, Ahead::default(), &mut |_| {}).unwrap();
        assert!(Query::open(&store.location).unwrap().is_valid(&path).unwrap(), "1.{minor}");
    }
}

#[test]
fn a_failing_build_is_a_result_and_the_connection_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::new(directory.path().join("nix"), &directory.path().join("store"));
    let (drv_path, drv) = store.instantiate(&expression("fails", "echo why; exit 5"));
    let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
    let mut builder = store.daemon(NEWEST_MINOR);
    let mut log = Vec::new();
    let result = builder.build(&drv_path, &drv, &inputs, Clocks::default(), &mut events(&mut log)).unwrap();
    assert_eq!(result.outcome(false), Outcome::Failed);
    assert!(result.message.contains("failed with exit code 5"), "{}", result.message);
    assert_eq!(log, ["why"]);
    assert!(builder.round_trip(BOUND).is_ok());
}

#[test]
fn both_clocks_end_a_build() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::new(directory.path().join("nix"), &directory.path().join("store"));
    let clock = |max_silent_time, timeout| Clocks { max_silent_time, timeout, ..Clocks::default() };
    let cases = [
        ("silent", "sleep 30", clock(1, 20)),
        ("long", "while :; do echo on; sleep 0.1; done", clock(20, 1)),
        ("both", "sleep 30", clock(0, 1)),
    ];
    for ((name, script, clocks), by_path) in cases.iter().flat_map(|case| [(case, false), (case, true)]) {
        let (drv_path, drv) = store.instantiate(&expression(name, script));
        let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
        let mut builder = store.daemon(NEWEST_MINOR);
        let begin = Instant::now();
        let built = if by_path {
            builder.build_outputs(&drv_path, &["out".to_owned()].into(), *clocks, &mut |_| {})
        } else {
            builder.build(&drv_path, &drv, &inputs, *clocks, &mut |_| {})
        };
        assert!(begin.elapsed() < Duration::from_secs(10), "{name}");
        match (*name, built.unwrap_err()) {
            ("silent", BuilderError::Silent(1)) | ("long" | "both", BuilderError::TimedOut(1)) => {}
            (name, error) => panic!("{name}: {error}"),
        }
    }
}

/// As after a suspended terminal, which keeps whoever passes the log on from reading.
#[test]
fn what_came_while_we_were_held_up_is_read_before_a_clock_ends_the_build() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::new(directory.path().join("nix"), &directory.path().join("store"));
    for (max_silent_time, timeout) in [(1, 0), (0, 1)] {
        let gate = directory.path().join(format!("gate-{timeout}"));
        let done = directory.path().join(format!("done-{timeout}"));
        let script = format!(
            "echo begun; until [ -e {} ]; do sleep 0.02; done; echo x > $out; : > {}",
            gate.display(),
            done.display()
        );
        let (drv_path, drv) = store.instantiate(&expression(&format!("held-up-{timeout}"), &script));
        let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
        let mut builder = store.daemon(NEWEST_MINOR);
        let begin = Instant::now();
        let mut hold = |event: Event<'_>| {
            if matches!(event, Event::LogLine(_)) {
                fs::write(&gate, "").unwrap();
                // Until the build has ended and the clock has run out, and some time for the result to come.
                while !done.exists() || begin.elapsed() < Duration::from_secs(3) {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        };
        let clocks = Clocks { max_silent_time, timeout, ..Clocks::default() };
        let result = builder.build(&drv_path, &drv, &inputs, clocks, &mut hold);
        assert_eq!(result.unwrap().outcome(false), Outcome::Built);
    }
}

/// The clock is not stopped by what goes on coming.
#[test]
fn a_build_that_never_stops_talking_is_ended_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::new(directory.path().join("nix"), &directory.path().join("store"));
    let (drv_path, drv) = store.instantiate(&expression("yes", "exec yes"));
    let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
    let mut builder = store.daemon(NEWEST_MINOR);
    let begin = Instant::now();
    let clocks = Clocks { timeout: 1, ..Clocks::default() };
    let error = builder.build(&drv_path, &drv, &inputs, clocks, &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuilderError::TimedOut(1)), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn options_are_obeyed() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::new(directory.path().join("nix"), &directory.path().join("store"));
    let (drv_path, drv) =
        store.instantiate(&expression("kept", "echo evidence > $NIX_BUILD_TOP/evidence; exit 1"));
    let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
    let mut builder = store.daemon(NEWEST_MINOR);
    let options = Options { keep_failed: true, timeout: 60, ..Options::default() };
    builder.set_options(options, &mut |_| {}).unwrap();
    let mut texts = String::new();
    let mut collect = |event: Event<'_>| {
        if let Event::Text(text) = event {
            texts.push_str(&String::from_utf8_lossy(text));
        }
    };
    builder.build(&drv_path, &drv, &inputs, Clocks::default(), &mut collect).unwrap();
    let kept = texts.split('\'').find(|word| word.starts_with('/')).unwrap_or_else(|| panic!("{texts}"));
    assert_eq!(fs::read_to_string(Path::new(kept).join("evidence")).unwrap(), "evidence\n");
    fs::remove_dir_all(kept).unwrap();
}

#[test]
fn an_input_that_cannot_be_read_is_the_error_and_nothing_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::new(directory.path().join("nix"), &directory.path().join("store"));
    for minor in [22, 31, NEWEST_MINOR] {
        let (info, _) = forgotten(&store, "unreadable", b"x");
        let mut builder = store.daemon(minor);
        let dump = |_: &StorePath, to: &mut dyn Write| {
            to.write_all(b"\x0d\0\0\0\0\0\0\0nix-archive-1")?;
            Err(io::Error::other("the disk is gone"))
        };
        match builder.upload(&[&[info]], &dump, &|_| {}, &mut |_| {}, Ahead::default(), &mut |_| {}) {
            Err(BuilderError::Dump { source, .. }) => assert_eq!(source.to_string(), "the disk is gone"),
            other => panic!("1.{minor}: {other:?}"),
        }
    }
}
