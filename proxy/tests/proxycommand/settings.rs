//! Mistakes in offload.toml, and what else is read before anything is connected.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use nix_offload_proxy::down::Memory;

use crate::world::{Said, World, free_port};

/// Every action says the same, and ssh shows it.
fn assert_told(world: &World, file: &Path, error: &str, hint: &str) {
    let set = |mut command: Command, words: &[&str]| -> Said {
        command.env("NIX_OFFLOAD_CONFIG", file).args(words).output().unwrap().into()
    };
    let port = world.bastion_port.to_string();
    for words in [&["127.0.0.1", &port][..], &["start", "bastion"], &["check", "bastion"]] {
        let said = set(world.proxy(), words);
        assert_eq!((said.code, &*said.out), (Some(78), ""), "{words:?}: {said:?}");
        assert!(said.err.starts_with(&format!("error: {error}")), "{words:?} lacks {error:?}: {said:?}");
        assert_eq!(said.err.contains("\nhint: "), !hint.is_empty(), "{said:?}");
        assert!(said.err.contains(hint), "{words:?} lacks {hint:?}: {said:?}");
    }
    // Looking at masters and ending them goes on.
    for words in [&["list", "--json"][..], &["stop", "--all"]] {
        assert_eq!(set(world.proxy(), words).code, Some(0), "{words:?}");
    }
    for host in ["direct", "host2"] {
        let said = set(world.client("ssh"), &[host, "true"]);
        assert_eq!(said.code, Some(255), "{said:?}");
        assert!(said.err.contains(error) && said.err.contains(hint), "{said:?}");
    }
}

#[test]
fn mistakes_in_the_file_are_told_with_place_and_cure() {
    let world = World::new();
    let file = world.path("offload.toml");
    let at = |place: &str| format!("{}:{place}", file.display());
    let write = |text: &str| fs::write(&file, text).unwrap();

    write("[[host]]\nname = 'mac'\nwkae = 'x'\n");
    assert_told(&world, &file, &at("3:1: unknown field `wkae`"), "did you mean `wake`?");
    write("[ssh]\nidle = true\n");
    assert_told(&world, &file, &at("2:8: expected seconds"), "man nix-offload-proxy");

    write("");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    let error = format!("{} can be written by others (mode 0666)", file.display());
    assert_told(&world, &file, &error, "chmod go-w");

    fs::remove_file(&file).unwrap();
    let error = format!("cannot read {}: No such file", file.display());
    assert_told(&world, &file, &error, "NIX_OFFLOAD_CONFIG names it");
    assert_eq!(world.bastion_logins(), 0);

    // Corrected, all is well.
    write("[[host]]\nname = 'mac'\nwake = 'x'\n");
    let mut ssh = world.client("ssh");
    let said: Said = ssh.env("NIX_OFFLOAD_CONFIG", &file).args(["host2", "true"]).output().unwrap().into();
    assert_eq!(said.code, Some(0), "{said:?}");
}

#[test]
fn a_host_that_is_known_to_be_down_fails_in_milliseconds() {
    let world = World::new();
    let port = free_port().to_string();
    let memory = Memory::of(world.pool.directory(), format!("127.0.0.1 {port}"));
    // Several times in a row, so that the pause outlasts this test.
    let mut now = SystemTime::now() - Duration::from_secs(63);
    while memory.pause(SystemTime::now()).is_none() {
        memory.failed("it was asleep", now);
        now = memory.pause(now).unwrap().next;
    }
    let mut fastest = Duration::MAX;
    for _ in 0..20 {
        let begin = Instant::now();
        let said = world.proxy_says(&["127.0.0.1", &port]);
        fastest = fastest.min(begin.elapsed());
        assert_eq!(said.code, Some(75), "{said:?}");
        let (way, rest) = said.err.split_once(" is not tried again before ").unwrap();
        assert_eq!(way, format!("error: 127.0.0.1 port {port}"));
        let (time, reason) = rest.split_once(", because it failed: ").unwrap();
        assert_eq!(time.split_once(" UTC (in ").map(|(clock, _)| clock.len()), Some(8), "{time}");
        assert!(reason.starts_with("it was asleep\nhint: "), "{reason}");
    }
    println!("a known failure takes {fastest:?}");
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}
