//! A real `nix-store --serve --write` of every release, spoken to in every version, and peers that are none.

use crate::real::{Store, events, expression, forgotten, stream};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix_derivation::{StoreDir, StorePath};
use nix_offload::builder::{Aside, BuilderError, Clocks, Event, ServeStore};
use nix_offload::path_info::PathInfo;
use nix_offload::store::{self, Query};
use nix_offload::wire::put_u64;
use nix_offload::wire::serve::{NEWEST_MINOR, OLDEST_MINOR, Version};
use nix_offload::wire::worker::{Options, Outcome};
use nix_offload_proxy::master::SessionEnd;
use std::env;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

const BOUND: Duration = Duration::from_secs(20);

/// A program's stderr, and the program.
struct Beside {
    stdout: UnixStream,
    stderr: Option<UnixStream>,
    child: Option<Child>,
    kept: Vec<u8>,
}

impl Beside {
    fn drain(&mut self, hear: &mut dyn FnMut(&[u8])) {
        let mut piece = [0; 65536];
        while let Some(stderr) = &mut self.stderr {
            match stderr.read(&mut piece) {
                Ok(0) => self.stderr = None,
                Ok(size) => {
                    self.kept.extend_from_slice(&piece[..size]);
                    hear(&piece[..size]);
                }
                Err(_) => return,
            }
        }
    }
}

impl Aside for Beside {
    fn listen(&mut self, timeout: Option<Duration>, hear: &mut dyn FnMut(&[u8])) -> io::Result<bool> {
        let end = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            self.drain(hear);
            let mut fds = [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(2u8))? > 0 {
                return Ok(true);
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                return Ok(false);
            }
        }
    }

    fn end(&mut self, _bound: Duration) -> SessionEnd {
        // What is said here is heard by whoever listens next; stderr's end needs no hurry in a test.
        let code = self.child.as_mut().and_then(|child| child.wait().unwrap().code());
        let mut end = SessionEnd { exit: code.map(|code| code as u32), stderr: String::new() };
        if let Some(stderr) = &self.stderr {
            let mut text = String::from_utf8_lossy(&self.kept).into_owned();
            let mut rest = [0; 1 << 16];
            let peeked = nix::sys::socket::recv(
                std::os::fd::AsRawFd::as_raw_fd(stderr),
                &mut rest,
                nix::sys::socket::MsgFlags::MSG_PEEK,
            );
            text.push_str(&String::from_utf8_lossy(&rest[..peeked.unwrap_or(0)]));
            end.stderr = text;
        }
        end
    }
}

/// Starts `nix-store --serve` of a release and greets it.
fn serving(store: &Store, minor: u8) -> ServeStore {
    serve(store, minor).0
}

/// The same with what its answers come by.
pub(crate) fn serve(store: &Store, minor: u8) -> (ServeStore, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (stderr, stderr_theirs) = UnixStream::pair().unwrap();
    stderr.set_nonblocking(true).unwrap();
    let theirs = OwnedFd::from(theirs);
    let child = store
        .nix("nix-store")
        .args(["--serve", "--write"])
        .stdin(theirs.try_clone().unwrap())
        .stdout(theirs)
        .stderr(OwnedFd::from(stderr_theirs))
        .spawn()
        .unwrap();
    let (stdout, socket) = (ours.try_clone().unwrap(), ours.try_clone().unwrap());
    let aside = Beside { stdout, stderr: Some(stderr), child: Some(child), kept: Vec::new() };
    let (dir, offer) = (store.location.store_dir.clone(), Version::new(minor).unwrap());
    let store = ServeStore::connect(stream(ours), aside, dir, offer, BOUND);
    (store.map_err(|(error, _)| error).unwrap(), socket)
}

/// The programs of each release, in the small roots that `tests/make-roots` makes. Those of the oldest one, Debian 12, are
/// called "here": where there is no root of it, this system is that.
pub(crate) fn releases() -> Vec<(String, Option<PathBuf>)> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let roots = env::var_os("NIX_OFFLOAD_TEST_ROOTS").map(PathBuf::from).unwrap_or_else(|| {
        env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from).join("test-roots")
    });
    let roots = workspace.join(roots);
    let mut found = vec![("here".to_owned(), fs::canonicalize(roots.join("bookworm")).ok())];
    for name in ["trixie", "sid"] {
        let root = roots.join(name);
        assert!(
            root.join("usr/bin/nix-store").exists(),
            "{} is missing; ./tests/make-roots makes it",
            root.display()
        );
        found.push((name.to_owned(), Some(fs::canonicalize(root).unwrap())));
    }
    found
}

pub(crate) fn store_in(directory: &Path, root: Option<PathBuf>) -> Store {
    let mut store = Store::new(directory.join("nix"), &directory.join("store"));
    store.programs = root;
    store
}

fn out_path(drv: &nix_derivation::Derivation) -> StorePath {
    drv.outputs()["out"].path_in(drv.store_dir(), drv.name(), "out").unwrap().unwrap()
}

#[test]
fn every_version_of_every_release_uploads_builds_and_fetches() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let store = store_in(directory.path(), root);
        for minor in OLDEST_MINOR..=NEWEST_MINOR {
            let name = format!("v{minor}");
            let context = format!("{release} 2.{minor}");
            let (info, nar) = forgotten(&store, &name, format!("from {name}").as_bytes());
            let input = info.path.clone();
            let script = format!("x=$(cat {}); echo log $x; echo $x > $out", store.location.render(&input));
            let (drv_path, drv) = store.instantiate(&expression(&name, &script));

            let mut serving = serving(&store, minor);
            assert_eq!(serving.version().minor(), minor, "{context}");
            let ask = std::slice::from_ref(&input);
            assert!(serving.hold_and_query(ask, false, &mut |_| {}).unwrap().is_empty(), "{context}");
            let dump = |_: &StorePath, to: &mut dyn Write| to.write_all(&nar);
            let mut arrived = Vec::new();
            let mut note = |part: &[PathInfo]| arrived.extend_from_slice(part);
            serving.upload(std::slice::from_ref(&info), &dump, &|_| {}, &mut note, &mut |_| {}).unwrap();
            assert_eq!(arrived.as_slice(), std::slice::from_ref(&info), "{context}");
            let valid = serving.hold_and_query(ask, false, &mut |_| {}).unwrap();
            assert_eq!(valid, [input.clone()].into(), "{context}");
            let there = serving.path_infos(ask, &mut |_| {}).unwrap().remove(0).unwrap();
            assert_eq!((there.nar_hash, there.nar_size), (info.nar_hash, info.nar_size), "{context}");

            let mut log = Vec::new();
            let built =
                serving.build(&drv_path, &drv, &[input], Clocks::default(), &mut events(&mut log)).unwrap();
            assert_eq!(built.outcome(false), Outcome::Built, "{context}: {built:?}");
            // Nix 2.4 to 2.10 answer with 2.6's list of outputs in every version, by a misplaced parenthesis.
            if release == "here" && minor < 6 {
                continue;
            }
            let out = out_path(&drv);
            let asked = [out.clone(), drv_path.clone()];
            let infos = serving.path_infos(&asked, &mut events(&mut log)).unwrap();
            assert!(infos[1].is_some(), "{context}: a derivation is a path like others");
            let info = infos[0].clone().unwrap();
            let mut fetched = Vec::new();
            let receive = |_: &PathInfo, nar: &mut dyn Read| nar.read_to_end(&mut fetched).map(drop);
            serving.nars(std::slice::from_ref(&info), receive, &mut |_| {}).unwrap();
            let mut expected = Vec::new();
            store::dump(&store.location, &out, &mut expected).unwrap();
            assert_eq!(fetched, expected, "{context}");
            let registered = Query::open(&store.location).unwrap().path_info(&out).unwrap().unwrap();
            assert_eq!(
                (info.nar_hash, info.nar_size),
                (registered.nar_hash, registered.nar_size),
                "{context}"
            );
            assert!(serving.round_trip(BOUND).unwrap() < BOUND);
            serving.finish(&mut events(&mut log));
            assert_eq!(log, [format!("log from {name}")], "{context}");
        }
        store.output("nix-store", &["--verify", "--check-contents"]);
    }
}

#[test]
fn a_large_input_and_thousands_of_questions_pass_in_both_ways_of_sending() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let store = store_in(directory.path(), root);
        for minor in [4, NEWEST_MINOR] {
            let (info, nar) = forgotten(&store, "large", &vec![7; 20 << 20]);
            let path = info.path.clone();
            let mut serving = serving(&store, minor);
            let strangers: Vec<StorePath> = (0u32..20_000)
                .map(|n| {
                    let mut digest = [0; 20];
                    digest[..4].copy_from_slice(&n.to_le_bytes());
                    StorePath::from_parts(digest, "stranger").unwrap()
                })
                .collect();
            assert!(serving.hold_and_query(&strangers, false, &mut |_| {}).unwrap().is_empty());
            let dump = |_: &StorePath, to: &mut dyn Write| to.write_all(&nar);
            serving.upload(&[info], &dump, &|_| {}, &mut |_| {}, &mut |_| {}).unwrap();
            assert!(Query::open(&store.location).unwrap().is_valid(&path).unwrap(), "{release} 2.{minor}");
        }
    }
}

#[test]
fn a_failing_build_is_a_result_with_its_whole_log() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let store = store_in(directory.path(), root);
        let (drv_path, drv) =
            store.instantiate(&expression("fails", "for i in 1 2 3 4 5 6 7 8 9; do echo $i; done; exit 5"));
        let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
        let mut serving = serving(&store, NEWEST_MINOR);
        let mut log = Vec::new();
        let result =
            serving.build(&drv_path, &drv, &inputs, Clocks::default(), &mut events(&mut log)).unwrap();
        assert_eq!(result.outcome(false), Outcome::Failed, "{release}");
        assert!(result.message.contains("failed with exit code 5"), "{release}: {}", result.message);
        let lines: Vec<&String> = log.iter().filter(|line| line.len() == 1).collect();
        assert_eq!(lines, ["1", "2", "3", "4", "5", "6", "7", "8", "9"], "{release}: {log:?}");
    }
}

#[test]
fn a_hundred_thousand_lines_are_complete() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let store = store_in(directory.path(), root);
        let (drv_path, drv) = store.instantiate(&expression("chatty", "seq 100000; echo x > $out"));
        let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
        let mut serving = serving(&store, NEWEST_MINOR);
        let mut log = Vec::new();
        serving.build(&drv_path, &drv, &inputs, Clocks::default(), &mut events(&mut log)).unwrap();
        serving.finish(&mut events(&mut log));
        let differs = log.iter().enumerate().find(|(number, line)| **line != (number + 1).to_string());
        assert!(log.len() == 100_000 && differs.is_none(), "{release}: {} lines, {differs:?}", log.len());
    }
}

#[test]
fn both_clocks_end_a_build_there() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let store = store_in(directory.path(), root);
        let clock = |max_silent_time, timeout| Clocks { max_silent_time, timeout, ..Clocks::default() };
        let cases = [
            ("silent", "sleep 30", clock(1, 20)),
            ("long", "while :; do echo on; sleep 0.1; done", clock(20, 1)),
        ];
        for (name, script, clocks) in cases {
            let (drv_path, drv) = store.instantiate(&expression(name, script));
            let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
            let mut serving = serving(&store, NEWEST_MINOR);
            let begin = Instant::now();
            let ended = serving.build(&drv_path, &drv, &inputs, clocks, &mut |_| {});
            assert!(begin.elapsed() < Duration::from_secs(10), "{release} {name}");
            match (name, ended) {
                (_, Ok(result)) => {
                    assert_eq!(result.outcome(false), Outcome::TimedOut, "{release} {name}: {result:?}");
                }
                ("silent", Err(BuilderError::Silent(1))) | ("long", Err(BuilderError::TimedOut(1))) => {}
                (name, Err(error)) => panic!("{release} {name}: {error}"),
            }
        }
    }
}

#[test]
fn a_build_that_ends_no_line_is_not_silent() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let store = store_in(directory.path(), root);
        let dots = "for i in 1 2 3 4 5 6 7 8; do printf .; sleep 0.4; done; echo x > $out";
        let (drv_path, drv) = store.instantiate(&expression("dots", dots));
        let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
        let mut serving = serving(&store, NEWEST_MINOR);
        let clocks = Clocks { max_silent_time: 1, ..Clocks::default() };
        let built = serving.build(&drv_path, &drv, &inputs, clocks, &mut |_| {});
        assert_eq!(built.unwrap().outcome(false), Outcome::Built, "{release}");
    }
}

#[test]
fn a_failed_builds_directory_is_kept_when_asked_for() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let store = store_in(directory.path(), root);
        let (drv_path, drv) =
            store.instantiate(&expression("kept", "echo evidence > $NIX_BUILD_TOP/evidence; exit 1"));
        let inputs: Vec<StorePath> = drv.input_sources().iter().cloned().collect();
        let mut serving = serving(&store, NEWEST_MINOR);
        serving.set_options(Options { keep_failed: true, timeout: 60, ..Options::default() });
        let mut log = Vec::new();
        serving.build(&drv_path, &drv, &inputs, Clocks::default(), &mut events(&mut log)).unwrap();
        let said = log.join("\n");
        let mut words = said.split(['\'', '"']);
        let kept = words.find(|word| word.starts_with('/')).unwrap_or_else(|| panic!("{said}"));
        assert_eq!(fs::read_to_string(Path::new(kept).join("evidence")).unwrap(), "evidence\n", "{release}");
        fs::remove_dir_all(kept).unwrap();
    }
}

#[test]
fn what_the_far_side_refuses_is_told_in_its_words_and_is_not_the_transport() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let store = store_in(directory.path(), root);
        let (mut info, nar) = forgotten(&store, "wrong", b"wrong");
        info.nar_hash = [9; 32];
        let mut serving = serving(&store, NEWEST_MINOR);
        let dump = |_: &StorePath, to: &mut dyn Write| to.write_all(&nar);
        let error = serving.upload(&[info], &dump, &|_| {}, &mut |_| {}, &mut |_| {}).unwrap_err();
        assert!(matches!(&error, BuilderError::Refused { .. }), "{release}: {error:?}");
        assert!(error.to_string().contains("hash mismatch importing path"), "{release}: {error}");
    }
}

#[test]
fn an_input_that_cannot_be_read_is_the_error_and_nothing_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_in(directory.path(), None);
    for minor in [4, NEWEST_MINOR] {
        let (info, _) = forgotten(&store, "unreadable", b"x");
        let mut serving = serving(&store, minor);
        let dump = |_: &StorePath, to: &mut dyn Write| {
            to.write_all(b"\x0d\0\0\0\0\0\0\0nix-archive-1")?;
            Err(io::Error::other("the disk is gone"))
        };
        match serving.upload(std::slice::from_ref(&info), &dump, &|_| {}, &mut |_| {}, &mut |_| {}) {
            Err(BuilderError::Dump { source, .. }) => assert_eq!(source.to_string(), "the disk is gone"),
            other => panic!("2.{minor}: {other:?}"),
        }
    }
    let (info, _) = forgotten(&store, "grown", b"x");
    let short = |_: &StorePath, to: &mut dyn Write| to.write_all(&[0; 24]);
    let error =
        serving(&store, NEWEST_MINOR).upload(&[info], &short, &|_| {}, &mut |_| {}, &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuilderError::Dump { .. }), "{error}");
}

/// A peer that says `bytes` to our greeting and, if it is to stay, listens until we leave.
fn scripted(bytes: Vec<u8>, stay: bool, bound: Duration) -> Result<ServeStore, BuilderError> {
    const GREETING: usize = 16;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let _ = theirs.read_exact(&mut [0; GREETING]);
        let _ = theirs.write_all(&bytes);
        if stay {
            let _ = io::copy(&mut theirs, &mut io::sink());
        }
    });
    let aside = Beside { stdout: ours.try_clone().unwrap(), stderr: None, child: None, kept: Vec::new() };
    let dir = StoreDir::default();
    ServeStore::connect(stream(ours), aside, dir, Version::newest(), bound).map_err(|(error, _)| error)
}

fn greeting() -> Vec<u8> {
    let mut bytes = b"Welcome\n".to_vec();
    put_u64(&mut bytes, 0x5452_eecb);
    put_u64(&mut bytes, 0x207);
    bytes
}

#[test]
fn peers_that_are_silent_or_break_off_are_given_up() {
    let begin = Instant::now();
    let error = scripted(Vec::new(), true, Duration::from_millis(300)).err().unwrap();
    assert!(matches!(error, BuilderError::NoAnswer { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5));
    let whole = greeting();
    for end in 0..whole.len() {
        let error = scripted(whole[..end].to_vec(), false, BOUND).err().unwrap();
        assert!(error.is_transport(), "{end}: {error}");
    }
    let error = scripted(b"not for you\n".to_vec(), false, BOUND).err().unwrap();
    assert_eq!(error.to_string(), "no Nix daemon answered; instead came 'not for you'");
}

#[test]
fn answers_out_of_the_protocol_or_cut_short_end_the_talk() {
    let path = StorePath::from_parts([1; 20], "x").unwrap();
    let after = |bytes: &[u8], stay| scripted([&greeting(), bytes].concat(), stay, BOUND).unwrap();
    let error = after(&[0xee; 64], true).path_infos(std::slice::from_ref(&path), &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuilderError::Protocol { .. }), "{error}");
    let error = after(&[0; 4], false).path_infos(std::slice::from_ref(&path), &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuilderError::Lost { .. }), "{error}");
    let many = 3u64.to_le_bytes();
    let error = after(&many, true).hold_and_query(&[path], false, &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuilderError::Protocol { .. }), "more paths than were asked for: {error}");
}

#[test]
fn what_is_said_before_the_greeting_is_no_log() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_in(directory.path(), None);
    let mut serving = serving(&store, NEWEST_MINOR);
    let mut said = Vec::new();
    let mut on = |event: Event<'_>| {
        if let Event::LogLine(line) | Event::Text(line) = event {
            said.push(String::from_utf8_lossy(line).into_owned());
        }
    };
    serving.hold_and_query(&[], false, &mut on).unwrap();
    serving.finish(&mut on);
    assert_eq!(said, [""; 0]);
}
