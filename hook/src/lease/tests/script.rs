use super::*;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Instant;

const LONG: Duration = Duration::from_secs(30);

/// A shell that runs the script.
struct Run {
    shell: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Run {
    fn with(shell: &[&str], slots: u32, quiet: Duration, directory: &Path, path: Option<&str>) -> Self {
        let mut command = Command::new(shell[0]);
        command.args(&shell[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut shell = command.spawn().unwrap();
        let mut input = shell.stdin.take().unwrap();
        let text = text(slots, quiet, directory.to_str().unwrap());
        let text = path
            .map_or(text.clone(), |path| text.replace("PATH=\"$PATH:", &format!("PATH=\"{path}\"; : \"")));
        input.write_all(text.as_bytes()).unwrap();
        let output = BufReader::new(shell.stdout.take().unwrap());
        Self { shell, input: Some(input), output }
    }

    fn start(slots: u32, directory: &Path) -> Self {
        Self::with(&["sh"], slots, LONG, directory, None)
    }

    /// The next word; none at the end.
    fn word(&mut self) -> Option<Word> {
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(word) = word(&line) {
                return Some(word);
            }
        }
    }

    #[track_caller]
    fn assert_says(&mut self, words: &[Word]) {
        for expected in words {
            assert_eq!(self.word().as_ref(), Some(expected));
        }
    }

    /// It gets a slot. Somebody else may be looking for one at the same moment.
    #[track_caller]
    fn assert_held(&mut self) {
        loop {
            match self.word() {
                Some(Word::Here | Word::Waiting) => {}
                word => return assert_eq!(word, Some(Word::Held)),
            }
        }
    }

    fn ends(mut self) {
        drop(self.input.take());
        self.shell.wait().unwrap();
    }

    /// Why there are no slots.
    #[track_caller]
    fn assert_none(mut self, why: &str) {
        self.assert_says(&[Word::Here]);
        let Some(Word::None(reason)) = self.word() else { panic!("it goes on") };
        assert!(reason.contains(why), "{reason}");
        assert_eq!(self.word(), None);
        self.ends();
    }
}

fn directory() -> (tempfile::TempDir, std::path::PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("slots");
    (parent, directory)
}

#[test]
fn so_many_have_a_slot_and_the_next_gets_one_when_it_is_given_back() {
    for shell in [&["sh"][..], &["bash"], &["bash", "--posix"], &["busybox", "sh"]] {
        if Command::new(shell[0]).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err()
        {
            continue;
        }
        let (_parent, directory) = directory();
        let start = || Run::with(shell, 2, LONG, &directory, None);
        let mut first = start();
        let mut second = start();
        first.assert_held();
        second.assert_held();
        let mut third = start();
        third.assert_says(&[Word::Here, Word::Waiting]);
        let mut fourth = start();
        fourth.assert_says(&[Word::Here, Word::Waiting]);
        // In their order.
        first.ends();
        third.assert_held();
        // One that waits in vain does not keep the others from it.
        fourth.ends();
        let mut fifth = start();
        fifth.assert_says(&[Word::Here, Word::Waiting]);
        second.ends();
        fifth.assert_held();
        for run in [third, fifth] {
            run.ends();
        }
    }
}

#[test]
fn a_shell_that_is_killed_has_no_slot_any_more() {
    let (_parent, directory) = directory();
    let mut first = Run::start(1, &directory);
    first.assert_held();
    let mut second = Run::start(1, &directory);
    second.assert_says(&[Word::Here, Word::Waiting]);
    first.shell.kill().unwrap();
    second.assert_held();
    first.ends();
    second.ends();
}

#[test]
fn who_is_not_heard_of_any_more_has_no_slot_and_who_is_keeps_it() {
    const QUIET: Duration = Duration::from_secs(2);
    let (_parent, directory) = directory();
    let mut talks = Run::with(&["sh"], 2, QUIET, &directory, None);
    let mut silent = Run::with(&["sh"], 2, QUIET, &directory, None);
    for run in [&mut talks, &mut silent] {
        run.assert_held();
    }
    let mut input = talks.input.take().unwrap();
    let talking = thread::spawn(move || {
        let begin = Instant::now();
        while begin.elapsed() < QUIET * 3 {
            input.write_all(b"\n").unwrap();
            thread::sleep(Duration::from_millis(100));
        }
        input
    });
    assert_eq!(silent.word(), None, "it ended by itself");
    let mut next = Run::start(2, &directory);
    next.assert_held();
    let mut other = Run::start(2, &directory);
    other.assert_says(&[Word::Here, Word::Waiting]);
    talks.input = Some(talking.join().unwrap());
    other.assert_held();
    for run in [talks, silent, next, other] {
        run.ends();
    }
}

#[test]
fn the_files_are_for_everybody_whatever_the_umask() {
    let (_parent, directory) = directory();
    let shell = ["sh", "-c", "umask 077; exec sh"];
    let mut run = Run::with(&shell, 1, LONG, &directory, None);
    run.assert_held();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&directory), 0o1777);
    assert_eq!((mode(&directory.join("queue")), mode(&directory.join("slot-0"))), (0o666, 0o666));
    run.ends();
    // Those of somebody else, who lets us read them only.
    for file in ["queue", "slot-0"] {
        fs::set_permissions(directory.join(file), fs::Permissions::from_mode(0o444)).unwrap();
    }
    let mut run = Run::start(1, &directory);
    run.assert_held();
    run.ends();
}

#[test]
fn a_machine_without_the_means_says_what_is_missing() {
    let (parent, path) = directory();
    let bare = parent.path().join("bin");
    fs::create_dir(&bare).unwrap();
    Run::with(&["/bin/sh"], 1, LONG, &path, Some(bare.to_str().unwrap()))
        .assert_none("flock(1) is not there");
    symlink("/tmp", &path).unwrap();
    Run::start(1, &path).assert_none("is not a directory");
    fs::remove_file(&path).unwrap();
    symlink("/no/such", &path).unwrap();
    Run::start(1, &path).assert_none("is not a directory");
    fs::remove_file(&path).unwrap();
    File::create(&path).unwrap();
    Run::start(1, &path).assert_none("is not a directory");
    fs::remove_file(&path).unwrap();
    fs::create_dir_all(path.join("queue")).unwrap();
    Run::start(1, &path).assert_none("queue is not a file");
    fs::remove_dir(path.join("queue")).unwrap();
    symlink("/etc/passwd", path.join("slot-0")).unwrap();
    Run::start(1, &path).assert_none("no file can be made");
    // Another one will do.
    let mut run = Run::start(2, &path);
    run.assert_held();
    run.ends();
}

#[test]
fn only_its_own_words_are_heard() {
    assert_eq!(word("nix-offload-lease held\n"), Some(Word::Held));
    assert_eq!(word("nix-offload-lease none no\u{1b}[31m reason"), Some(Word::None("no[31m reason".into())));
    for line in
        ["held", "", "nix-offload-lease", "nix-offload-lease strange", "welcome nix-offload-lease held"]
    {
        assert_eq!(word(line), None, "{line}");
    }
}
