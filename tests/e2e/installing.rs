//! What an administrator puts in place, used as it is, with the Nix versions it is for.

use std::{fs, os::unix::fs::PermissionsExt};

use harness::{Client, ClientPlan, Hook, Mode, OURS, Release, World, drv, workspace};

const INSTALLED: &str = "/usr/local/bin/nix-offload";
/// Only hooks of ours leave this behind.
const RUNTIME: &str = "/run/nix-offload";

fn shipped(path: &str) -> String {
    let path = workspace().join("packaging").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Puts the program where the shipped files say it is.
fn install(client: &Client) {
    client.run(&format!("install -D {OURS} {INSTALLED}"));
}

fn plan(world: &World, release: Release) -> ClientPlan {
    world.client().named(&format!("client-{}", release.name())).release(release)
}

/// Builds on the machine `mac`, and tells whether that was our doing.
#[track_caller]
fn built_by_us(client: &Client) -> bool {
    let built = client.nix_build(&drv::where_built("a"), &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n");
    client.exists(RUNTIME)
}

#[test]
fn a_path_in_nix_conf_is_enough() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for release in [Release::Bookworm, Release::Sid] {
        let plan = plan(&world, release).hook(Hook::Path(OURS.into())).hook_only_in_nix_conf();
        assert!(built_by_us(&plan.uses(&mac, "ssh-ng", 1).start()), "{release:?}");
    }
}

#[test]
fn words_in_nix_conf_are_understood_where_nix_splits_them() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let plan = plan(&world, Release::Sid).hook(Hook::Path(format!("{OURS} hook"))).hook_only_in_nix_conf();
    assert!(built_by_us(&plan.uses(&mac, "ssh-ng", 1).start()));
}

#[test]
fn the_shipped_line_of_nix_conf_installs_the_hook() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let fragment = shipped("nix/nix-offload.conf");
    for release in [Release::Bookworm, Release::Sid] {
        let client =
            plan(&world, release).hook(Hook::Stock).nix_conf(&fragment).uses(&mac, "ssh-ng", 1).start();
        install(&client);
        assert!(built_by_us(&client), "{release:?}");
    }
}

#[test]
fn taking_the_line_out_again_restores_what_was_there() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world, Release::Bookworm)
        .hook(Hook::Stock)
        .nix_conf(&shipped("nix/nix-offload.conf"))
        .uses(&mac, "ssh-ng", 1)
        .start();
    install(&client);
    assert!(built_by_us(&client));
    let without: String = client
        .read("/etc/nix/nix.conf")
        .lines()
        .filter(|line| !line.starts_with("build-hook"))
        .fold(String::new(), |text, line| text + line + "\n");
    client.write("/etc/nix/nix.conf", &without);
    client.run(&format!("rm -r {INSTALLED} {RUNTIME}"));
    let built = client.nix_build(&drv::where_built("again"), &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n");
    assert!(!client.exists(RUNTIME), "{built}");
}

/// The assignments of `Environment=` lines in a unit file, as systemd reads them: words, each of
/// which may stand in double quotes.
fn environment(unit: &str) -> Vec<(String, String)> {
    let mut section = "";
    let mut found = Vec::new();
    for line in unit.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
        }
        let Some(words) = line.strip_prefix("Environment=").filter(|_| section == "[Service]") else {
            continue;
        };
        let mut rest = words.trim();
        while !rest.is_empty() {
            let (word, after) = match rest.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"').unwrap(),
                None => rest.split_once(' ').unwrap_or((rest, "")),
            };
            let (name, value) = word.split_once('=').unwrap();
            found.push((name.to_owned(), value.to_owned()));
            rest = after.trim_start();
        }
    }
    found
}

#[test]
fn nix_that_ignores_the_line_obeys_the_shipped_drop_in() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let fragment = shipped("nix/nix-offload.conf");
    let plan = |name: &str| {
        plan(&world, Release::Trixie)
            .named(name)
            .mode(Mode::Daemon)
            .hook(Hook::Stock)
            .nix_conf(&fragment)
            .uses(&mac, "ssh-ng", 1)
    };
    let ignoring = plan("ignoring").start();
    install(&ignoring);
    assert!(!built_by_us(&ignoring), "this Nix does not ignore the line; the drop-in is not needed");

    let variables = environment(&shipped("systemd/nix-daemon.service.d/nix-offload.conf"));
    assert_eq!(variables.len(), 1, "{variables:?}");
    let obeying =
        variables.iter().fold(plan("obeying"), |plan, (name, value)| plan.daemon_env(name, value)).start();
    install(&obeying);
    assert!(built_by_us(&obeying));
}

#[test]
fn systemd_finds_no_fault_with_the_drop_in() {
    let world = World::new();
    let client = plan(&world, Release::Bookworm).hook(Hook::Stock).start();
    let drop_in = shipped("systemd/nix-daemon.service.d/nix-offload.conf");
    client.write("/etc/systemd/system/nix-daemon.service", "[Service]\nExecStart=/usr/bin/nix-daemon\n");
    client.write("/etc/systemd/system/nix-daemon.service.d/nix-offload.conf", &drop_in);
    let checked = client
        .command("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no", "/etc/systemd/system/nix-daemon.service"])
        .run();
    checked.assert_success();
    assert!(!checked.stderr().contains("nix-offload"), "{checked}");
}

#[test]
fn the_shipped_tmpfiles_line_makes_a_private_runtime_directory() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world, Release::Bookworm).hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    client.write("/etc/tmpfiles.d/nix-offload.conf", &shipped("tmpfiles.d/nix-offload.conf"));
    client.run("mkdir /tmp/tree");
    client.write("/tmp/tree/etc/tmpfiles.d/nix-offload.conf", &shipped("tmpfiles.d/nix-offload.conf"));
    client.run("cp /etc/passwd /etc/group /tmp/tree/etc/; mkdir /tmp/tree/run");
    client.run("systemd-tmpfiles --create --root=/tmp/tree nix-offload.conf");
    let made = fs::metadata(client.path(&format!("/tmp/tree{RUNTIME}"))).unwrap();
    assert!(made.is_dir());
    assert_eq!(made.permissions().mode() & 0o7777, 0o700);
    // The hook makes the same itself when nobody did.
    assert!(!client.exists(RUNTIME));
    assert!(built_by_us(&client));
    let own = fs::metadata(client.path(RUNTIME)).unwrap();
    assert_eq!(own.permissions().mode() & 0o7777, 0o700);
}
