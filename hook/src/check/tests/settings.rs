//! What keeps builds from being sent to the machines.

use super::super::files::Program;
use super::super::finding::Finding;
use super::super::nix_conf::{Assignment, assignments, last};
use super::super::settings::{Facts, Reader, hook_program, is_trusted, judge, stale, untrusted};
use crate::config::Settings;
use std::path::Path;
use std::time::{Duration, SystemTime};

const OURS: &str = "/usr/local/bin/nix-offload";
const STOCK: &str = "/usr/bin/nix __build-remote";

fn written(text: &str) -> Vec<Assignment> {
    assignments("/etc/nix/nix.conf", text, &mut |_| None)
}

/// One machine with our hook, as it should be.
struct Case {
    version: (u32, u32),
    hook: &'static str,
    program: Program,
    conf: &'static str,
    others: &'static [(&'static str, &'static str)],
    reader: Reader,
    remote: Option<&'static str>,
    machines: usize,
    has_daemon: bool,
}

impl Case {
    fn new() -> Self {
        Self {
            version: (2, 34),
            hook: OURS,
            program: Program::Runs(OURS.into()),
            conf: "build-hook = /usr/local/bin/nix-offload\n",
            others: &[],
            reader: Reader::Daemon,
            remote: None,
            machines: 2,
            has_daemon: true,
        }
    }

    fn judge(&self) -> (Vec<Finding>, Vec<String>) {
        let mut settings = Settings::default();
        for (name, value) in [("build-hook", self.hook), ("store", "auto")].iter().chain(self.others) {
            settings.0.insert((*name).to_owned(), (*value).to_owned());
        }
        judge(&Facts {
            version_text: &format!("nix (Nix) {}.{}.1", self.version.0, self.version.1),
            version: Some(self.version),
            settings: &settings,
            reader: self.reader,
            written: &written(self.conf),
            hook: &self.program,
            ourselves: Some(Path::new("/opt/x/offload")),
            machines: self.machines,
            usual_machines: 3,
            remote: self.remote,
            has_daemon: self.has_daemon,
        })
    }

    #[track_caller]
    fn assert_one(&self, parts: &[&str]) {
        let (findings, notes) = self.judge();
        assert_eq!((findings.len(), notes.len()), (1, 0), "{findings:#?} {notes:?}");
        let told = findings[0].to_string();
        for part in parts {
            assert!(told.contains(part), "lacks {part:?}: {told}");
        }
    }

    #[track_caller]
    fn assert_none(&self) {
        let (findings, notes) = self.judge();
        assert_eq!((findings.as_slice(), notes.as_slice()), (&[][..], &[][..]));
    }
}

#[test]
fn a_hook_of_ours_is_well() {
    Case::new().assert_none();
    Case { reader: Reader::Caller, has_daemon: false, ..Case::new() }.assert_none();
    // By another name, but this very file.
    let file = Program::Runs("/opt/x/offload".into());
    Case { hook: "/b", conf: "build-hook = /b", program: file, ..Case::new() }.assert_none();
    Case { version: (2, 26), conf: "", ..Case::new() }.assert_none();
    // Nix 2.8 shortens paths.
    Case { conf: "build-hook = /usr//local/lib/../bin/./nix-offload", ..Case::new() }.assert_none();
}

#[test]
fn versions_that_ignore_the_line_are_told_of() {
    for version in [(2, 25), (2, 26), (2, 33)] {
        let case = Case { version, hook: STOCK, ..Case::new() };
        case.assert_one(&[
            "error: /etc/nix/nix.conf:1:1: nix (Nix) 2.",
            "ignores this line",
            "nix-daemon.service.d",
        ]);
        Case { reader: Reader::Caller, ..case }.assert_one(&["ignores this line", "~/.config/nix/nix.conf"]);
        let unseen = Case { version, hook: STOCK, reader: Reader::UnseenDaemon, ..Case::new() };
        let (findings, notes) = unseen.judge();
        assert!(findings.is_empty() && notes[0].contains("as root"), "{findings:?} {notes:?}");
    }
    // It may come from where we may not look, whatever the version.
    let unseen = Case { hook: STOCK, conf: "", reader: Reader::UnseenDaemon, ..Case::new() };
    assert_eq!((unseen.judge().0.len(), unseen.judge().1.len()), (0, 1));
    for version in [(2, 8), (2, 24), (2, 34)] {
        let case = Case { version, hook: STOCK, ..Case::new() };
        case.assert_one(&["error: /etc/nix/nix.conf:1:1: this line does not count", STOCK]);
    }
}

#[test]
fn other_hooks_and_hooks_that_cannot_be_run() {
    Case { hook: STOCK, conf: "", ..Case::new() }.assert_one(&[
        "warning: build-hook: Nix uses a hook of its own",
        "'build-hook = /opt/x/offload' into nix.conf",
    ]);
    Case { hook: STOCK, conf: "", version: (2, 26), ..Case::new() }
        .assert_one(&["into the daemon's NIX_CONFIG"]);
    Case { hook: "", conf: "build-hook =", ..Case::new() }
        .assert_one(&["error: /etc/nix/nix.conf:1:1", "no build hook"]);
    let other = Program::Runs("/bin/true".into());
    Case { hook: "/bin/true", conf: "", program: other, ..Case::new() }
        .assert_one(&["warning", "'/bin/true', and not nix-offload"]);
    Case { program: Program::Absent, ..Case::new() }.assert_one(&["error", "is not there", "no build works"]);
    Case { program: Program::NotExecutable, ..Case::new() }.assert_one(&[
        "error",
        "cannot be run",
        "chmod 755",
    ]);
    let words = Case {
        version: (2, 8),
        hook: "/x/nix-offload hook",
        conf: "build-hook = /x/nix-offload hook",
        program: Program::Absent,
        ..Case::new()
    };
    words.assert_one(&["error", "before Nix 2.17 all of the line is one path"]);
}

#[test]
fn the_hook_is_one_path_or_a_list_of_words() {
    let mut settings = Settings::default();
    settings.0.insert("build-hook".into(), "/a b".into());
    assert_eq!(hook_program(&settings, Some((2, 8))), "/a b");
    assert_eq!(hook_program(&settings, Some((2, 17))), "/a");
}

#[test]
fn settings_that_leave_nobody_to_build() {
    let none = Case { others: &[("max-jobs", "0")], machines: 0, conf: "x = 1\nmax-jobs = 0", ..Case::new() };
    none.assert_one(&["warning: /etc/nix/nix.conf:2:1: it is 0 and there are no machines"]);
    Case { machines: 1, ..none }.assert_none();
    let empty = Case { others: &[("builders", "")], conf: "builders =\n", ..Case::new() };
    empty.assert_one(&[
        "warning: /etc/nix/nix.conf:1:1: the setting is empty",
        "the 3 machines of /etc/nix/machines",
    ]);
}

#[test]
fn stores_that_are_elsewhere_and_daemons_that_are_not_there() {
    Case { remote: Some("ssh-ng://mac"), ..Case::new() }
        .assert_one(&["warning: NIX_REMOTE: the store is 'ssh-ng://mac'"]);
    Case { others: &[("store", "https://x")], conf: "store = https://x", ..Case::new() }
        .assert_one(&["warning: /etc/nix/nix.conf:1:1: the store is 'https://x'"]);
    let both = [("store", "ssh-ng://mac")];
    let both = Case { remote: Some("ssh-ng://mac"), others: Box::leak(Box::new(both)), ..Case::new() };
    both.assert_one(&["NIX_REMOTE"]);
    let daemon = Case { remote: Some("daemon"), ..Case::new() };
    daemon.assert_none();
    Case { has_daemon: false, ..daemon }.assert_one(&["warning: NIX_REMOTE", "no daemon of Nix runs here"]);
}

#[test]
fn words_of_this_machine_that_nothing_asks_for() {
    let conf = "extra-platforms = i686-linux arm64-linux\nextra-system-features = cuda big_parallel";
    let (findings, _) = Case { conf, ..Case::new() }.judge();
    let told: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 2, "{told:#?}");
    assert!(
        told[0].contains(":1:30: nothing asks for the system 'arm64-linux'")
            && told[0].contains("'aarch64-linux'")
    );
    assert!(
        told[1].contains(":2:30: nothing asks for the feature 'big_parallel'")
            && told[1].contains("'big-parallel'")
    );
}

#[test]
fn what_a_daemon_does_not_take_from_users() {
    let lines = written("builders = x\nmax-jobs = 1\nbuild-hook = /b\nextra-platforms = a\ncores = 2");
    let places =
        |findings: &[Finding]| findings.iter().map(|finding| finding.spot.place.line).collect::<Vec<_>>();
    let findings = untrusted(&lines, false, "eve");
    assert_eq!(places(&findings), [1, 3, 4]);
    assert!(findings[0].message.contains("eve, who is not in 'trusted-users'"), "{findings:?}");
    assert_eq!(places(&untrusted(&lines, true, "root")), [3]);
    let groups = ["wheel".to_owned()];
    for (trusted, expected) in
        [("root eve", true), ("*", true), ("root @wheel", true), ("root @x", false), ("", false)]
    {
        assert_eq!(is_trusted(trusted, "eve", &groups), expected, "{trusted}");
    }
}

#[test]
fn files_that_a_daemon_has_not_read() {
    let started = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let files = [("/old".to_owned(), at(900)), ("/same".to_owned(), at(1001)), ("/new".to_owned(), at(1010))];
    let told: Vec<String> = stale(7, started, &files).iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("warning: /new: it was written after the daemon (process 7)"), "{told:?}");
}

#[test]
fn lines_of_nix_conf_are_found_where_they_stand() {
    let mut asked = Vec::new();
    let text = "# builders = no\n  builders  =  a   b # c\n!include more.conf\nbuilders = c\nnonsense\n";
    let lines = assignments("/etc/nix/nix.conf", text, &mut |file| {
        asked.push(file.to_owned());
        Some("max-jobs = 3\n".to_owned())
    });
    assert_eq!(asked, ["/etc/nix/more.conf"]);
    let found: Vec<_> = lines
        .iter()
        .map(|l| (l.name.as_str(), l.value.as_str(), l.spot.place.line, l.spot.place.column, l.value_column))
        .collect();
    assert_eq!(
        found,
        [("builders", "a b", 2, 3, 16), ("max-jobs", "3", 1, 1, 12), ("builders", "c", 4, 1, 12)]
    );
    assert_eq!(lines[1].spot.place.source, "/etc/nix/more.conf");
    assert_eq!(last(&lines, "builders").unwrap().value, "c");
    // A file that includes itself ends.
    let circle = assignments("/c", "include /c\na = b\n", &mut |_| Some("include /c\na = b\n".to_owned()));
    assert!(circle.len() > 2 && circle.len() < 50);
}
