//! What must be true of files, with real ones.

use super::super::files::{NotSeen, Program, Runner};
use super::super::finding::{Severity, Spot};
use nix::unistd::geteuid;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

fn me() -> Runner {
    Runner::new(geteuid().as_raw())
}

fn write(directory: &Path, name: &str, text: &str, mode: u32) -> String {
    let path = directory.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn key(file: &str) -> Option<(String, String)> {
    let finding = me().key(&Spot::file("m"), file).unwrap();
    finding.map(|finding| (finding.message, finding.cure))
}

#[test]
fn keys_that_ssh_would_not_take() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name, text, mode| write(directory.path(), name, text, mode);
    assert_eq!(key(&file("good", "-----BEGIN", 0o600)), None);
    assert_eq!(key("%d/.ssh/id"), None);
    let (message, cure) = key(&file("open", "-----BEGIN", 0o644)).unwrap();
    assert!(message.contains("others can read") && message.contains("0644"), "{message}");
    assert!(cure.starts_with("chmod 600 /"), "{cure}");
    let (message, cure) = key(&file("id.pub", "ssh-ed25519 A", 0o644)).unwrap();
    assert!(message.contains("public half") && cure.contains("/id'? If not"), "{message} {cure}");
    let (message, _) = key(&file("hidden", "ssh-ed25519 A", 0o600)).unwrap();
    assert!(message.contains("public half"), "{message}");
    let absent = directory.path().join("absent");
    let (message, cure) = key(absent.to_str().unwrap()).unwrap();
    assert!(message.contains("there is no key file") && cure.contains("ssh-keygen"), "{message} {cure}");
    let (message, _) = key(directory.path().to_str().unwrap()).unwrap();
    assert!(message.contains("is no file"), "{message}");
    let (message, cure) = key("8").unwrap();
    assert!(message.contains("no absolute path") && cure.contains("'-'"), "{message} {cure}");
    assert!(key(".ssh/id").unwrap().1.contains("whole path"));
    let home = me().home().join("no-such-key");
    assert!(key("~/no-such-key").unwrap().0.contains(home.to_str().unwrap()));
}

#[test]
fn a_key_with_a_passphrase_is_no_error_for_an_agent_may_hold_it() {
    let directory = tempfile::tempdir().unwrap();
    let find = |name: &str, passphrase: &str| {
        let path = directory.path().join(name);
        let mut made = Command::new("ssh-keygen");
        made.args(["-q", "-t", "ed25519", "-N", passphrase, "-f"]).arg(&path);
        assert!(made.status().unwrap().success());
        me().key(&Spot::file("m"), path.to_str().unwrap()).unwrap()
    };
    assert_eq!(find("open", ""), None);
    let found = find("locked", "open sesame").unwrap();
    assert_eq!(found.severity, Severity::Warning);
    assert!(found.message.contains("locked has a passphrase"), "{found}");
    assert!(found.cure.contains("ssh-keygen -p -f /") && found.cure.contains("agent"), "{found}");
}

#[test]
fn a_key_of_somebody_else_is_judged_as_that_user_sees_it() {
    let directory = tempfile::tempdir().unwrap();
    let open = write(directory.path(), "open", "-----BEGIN", 0o644);
    // It is not the other user's own, so ssh does not mind.
    let other = Runner::new(geteuid().as_raw() + 4711);
    assert_eq!(other.key(&Spot::default(), &open), Ok(None));
    if !geteuid().is_root() {
        assert_eq!(Runner::new(0).key(&Spot::default(), "/root/.ssh/x"), Err(NotSeen));
    }
}

#[test]
fn files_that_others_can_write() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name, mode| write(directory.path(), name, "", mode);
    let writable = |file: &str| me().writable(Path::new(file)).map(|finding| finding.to_string());
    assert_eq!(writable(&file("good", 0o644)), None);
    let told = writable(&file("bad", 0o666)).unwrap();
    assert!(told.contains("/bad: others can write it") && told.contains("chmod go-w"), "{told}");
    assert_eq!(writable("/absent"), None);
}

#[test]
fn programs_that_can_be_run() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().as_os_str();
    let runs = write(directory.path(), "runs", "", 0o755);
    let dead = write(directory.path(), "dead", "", 0o644);
    for name in [runs.as_str(), "runs"] {
        assert!(matches!(me().program(name, path), Program::Runs(file) if file.ends_with("runs")), "{name}");
    }
    for runner in [me(), Runner::new(geteuid().as_raw() + 4711)] {
        assert_eq!(runner.program(&dead, path), Program::NotExecutable);
    }
    assert_eq!(me().program("/absent/x", path), Program::Absent);
    assert_eq!(me().program("absent", path), Program::Absent);
}
