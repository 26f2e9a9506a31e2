//! Builders that sleep: /etc/nix/offload.toml says how they are woken, and builds wait for them if that is best.

use std::{collections::HashSet, fs, time::Duration};

use harness::{Builder, Client, ClientPlan, Hook, Output, Running, World, drv, event, wait_until};
use nix::sys::signal::Signal;

use crate::support::{SOON, gated, held_locks, open, wait_for_begin};

const LIMIT: Duration = Duration::from_secs(20);
const PROXY: &str = "/opt/nix-offload/bin/nix-offload-proxy";
const WOKEN: &str = "/mnt/share/woken";
const SETTINGS: &str = "/etc/nix/offload.toml";

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// Notes that it was run and for whom. The test does the rest.
fn set_wake(client: &Client, timeout: &str) {
    let text = format!(
        "[[host]]\nname = 'mac'\nwake = 'echo $NIX_OFFLOAD_HOST >>{WOKEN}'\nwake-timeout = '{timeout}'\n"
    );
    client.write(SETTINGS, &text);
}

/// The hosts for which the command was run.
fn woken(client: &Client) -> String {
    fs::read_to_string(client.path(WOKEN)).unwrap_or_default()
}

/// Comes up some time after it was woken.
fn come_up_when_woken(client: &Client, mac: &mut Builder) {
    wait_until("the command ran", SOON, || !woken(client).is_empty());
    let mut notes = HashSet::new();
    // Each attempt in vain is noted anew.
    wait_until("it was tried again", SOON, || {
        let names =
            client.entries("/run/nix-offload/down").into_iter().filter(|name| name.ends_with(".down"));
        let read = |name| fs::read(client.path(&format!("/run/nix-offload/down/{name}"))).ok();
        notes.extend(names.filter_map(read));
        notes.len() > 1
    });
    mac.start_sshd();
}

fn asleep(slots: u32) -> (Builder, Client) {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let client = plan(&world).journald().uses(&mac, "ssh-ng", slots).start();
    mac.stop_sshd();
    (mac, client)
}

fn assert_built_on(client: &Client, output: &Output, machine: &str) {
    for path in output.assert_success().out_paths() {
        assert_eq!(client.read(&path), format!("{machine}\n"), "{output}");
    }
}

fn five() -> String {
    drv::expression(r#"builtins.genList (i: d "five-${toString i}" "cat /etc/machine-name > $out" { }) 5"#)
}

#[test]
fn five_builds_wait_for_one_sleeping_builder() {
    let (mut mac, client) = asleep(8);
    set_wake(&client, "60s");
    let build = client.spawn_nix_build(&five(), &["-j0"]);
    come_up_when_woken(&client, &mut mac);
    let built = build.wait();
    assert_built_on(&client, &built, "mac");
    assert_eq!(built.out_paths().len(), 5);
    assert_eq!(woken(&client), "mac\n");
    assert_eq!(built.stderr().matches("waking 'ssh-ng://mac'").count(), 1, "{built}");
    built.assert_stderr_lacks("cannot build on");
    // Not what Nix warns of when five register at the same moment: that its database is busy.
    assert!(!built.stderr().lines().any(|line| line.trim_start().starts_with("error")), "{built}");
    // They waited in their hooks, which know at once, not in Nix, which asks again every five seconds.
    let entries = client.journal("-t nix-offload");
    let waited = entries.iter().filter(|entry| event(entry) == "waited for a slot").count();
    assert!(waited >= 5, "{waited}: {entries:?}");
    assert_eq!(mac.logins(), 1);
    assert_eq!(held_locks(&client), "");
    client.verify_store();
}

#[test]
fn five_commands_of_nix_at_once_wake_a_builder_once() {
    let (mut mac, client) = asleep(8);
    set_wake(&client, "60s");
    let builds: Vec<Running> = (0..5)
        .map(|number| client.spawn_nix_build(&drv::where_built(&format!("apart-{number}")), &["-j0"]))
        .collect();
    come_up_when_woken(&client, &mut mac);
    let mut told = 0;
    for build in builds {
        let built = build.wait();
        assert_built_on(&client, &built, "mac");
        told += built.stderr().matches("waking 'ssh-ng://mac'").count();
    }
    assert_eq!((&*woken(&client), told), ("mac\n", 1));
}

#[test]
fn what_could_be_built_here_is_asked_for_again_while_the_builder_wakes() {
    let (mut mac, client) = asleep(8);
    set_wake(&client, "60s");
    // Nix asks for all it can begin before it begins any. So the second is kept back until the first has the only local
    // slot: by another command, which has its lock.
    let other = client.spawn_nix_build(&gated("two"), &["-j1", "--option", "builders", ""]);
    wait_for_begin(&client, "two", &["client"]);
    let both = format!("[ ({}) ({}) ]", gated("one"), gated("two"));
    let build = client.spawn_nix_build(&both, &["-j1"]);
    wait_for_begin(&client, "one", &["client"]);
    other.signal(Signal::SIGINT);
    other.wait().assert_failure();
    wait_until("the second is asked for", SOON, || {
        let entries = client.journal("-t nix-offload");
        entries.iter().any(|entry| event(entry) == "postponed")
    });
    come_up_when_woken(&client, &mut mac);
    wait_for_begin(&client, "two", &["client", "mac"]);
    open(&client, "one");
    open(&client, "two");
    assert_eq!(build.wait().assert_success().out_paths().len(), 2);
    assert_eq!(woken(&client), "mac\n");
}

#[test]
fn nobody_waits_for_a_sleeping_builder_while_another_is_up() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let up = world.builder("up").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 8).uses(&up, "ssh-ng", 8).start();
    set_wake(&client, "300s");
    mac.stop_sshd();
    for args in [["-j0"], ["-j1"]] {
        let built = client.nix_build(&drv::where_built(&format!("a{}", args[0])), &args);
        assert!(built.took() < LIMIT, "{built}");
        assert_built_on(&client, &built, "up");
    }
    assert_eq!(woken(&client), "mac\n");
    assert_eq!(held_locks(&client), "");
}

#[test]
fn a_builder_that_does_not_wake_up_is_given_up_in_time() {
    let (_mac, client) = asleep(8);
    set_wake(&client, "4s");
    let failed = client.nix_build(&drv::where_built("refused"), &["-j0"]);
    assert_eq!(failed.assert_failure().stdout(), "", "{failed}");
    assert!(failed.took() >= Duration::from_secs(4), "{failed}");
    assert!(failed.took() < LIMIT, "{failed}");
    failed.assert_stderr_has("waking 'ssh-ng://mac'").assert_stderr_has("connection refused");
    failed.assert_stderr_has("check that sshd runs on mac");
    failed.assert_stderr_has("; it was woken and did not answer within 4 s (wake-timeout)");
    let local = client.nix_build(&drv::where_built("local"), &["-j1"]);
    assert!(local.took() < LIMIT, "{local}");
    assert_built_on(&client, &local, "client");
    assert_eq!(woken(&client), "mac\n");
    assert_eq!(held_locks(&client), "");
}

#[test]
fn a_command_that_fails_fails_the_build_with_its_words() {
    let (_mac, client) = asleep(8);
    client.write(SETTINGS, "[[host]]\nname = 'mac'\nwake = 'echo no such card; exit 3'\n");
    let failed = client.nix_build(&drv::where_built("refused"), &["-j0"]);
    failed.assert_failure().assert_stderr_has("failed with status 3: no such card");
    failed.assert_stderr_has("offload.toml");
    assert!(failed.took() < LIMIT, "{failed}");
    let local = client.nix_build(&drv::where_built("local"), &["-j1"]);
    assert!(local.took() < LIMIT, "{local}");
    assert_built_on(&client, &local, "client");
}

#[test]
fn a_mistake_in_the_file_is_told_and_nothing_is_built_remotely() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    client.write(SETTINGS, "[[host]]\nname = 'mac'\nwkae = 'true'\n");
    let told = "/etc/nix/offload.toml:3:1: unknown field `wkae`";
    let local = client.nix_build(&drv::where_built("local"), &["-j1"]);
    assert_built_on(&client, &local, "client");
    let line = local.stderr().lines().find(|line| line.contains(told));
    assert!(line.is_some_and(|line| line.contains("nix-offload cannot build remotely")), "{local}");
    local.assert_stderr_has("did you mean `wake`?");
    let refused = client.nix_build(&drv::where_built("refused"), &["-j0"]);
    refused.assert_failure().assert_stderr_has(told);
    let ping = client.nix_offload(&["ping-store", "--store", "ssh-ng://mac"]);
    assert_eq!(ping.code(), 78, "{ping}");
    let said = format!("{}{}", ping.stdout(), ping.stderr());
    assert!(said.contains(told) && said.contains("did you mean `wake`?"), "{ping}");
    assert_eq!(mac.logins(), 0);
}

#[test]
fn what_the_proxy_saw_down_the_hook_leaves_alone_and_the_other_way_round() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let other = world.builder("other").start();
    let client = plan(&world).journald().uses(&mac, "ssh-ng", 1).uses(&other, "ssh-ng", 1).start();
    mac.stop_sshd();
    let proxy = |args: &[&str]| client.command(PROXY).args(args).run();
    assert_eq!(proxy(&["check", "mac"]).code(), 69);
    // Several times, so that the pause outlasts what comes next.
    for _ in 0..3 {
        let again = || proxy(&["--via", "mac", "localhost", "22"]).code();
        wait_until("the pause is over", SOON, || again() == 69);
        assert_eq!(again(), 75);
    }
    let built = client.nix_build(&drv::where_built("a"), &["-j0"]);
    assert_built_on(&client, &built, "other");
    built.assert_stderr_lacks("mac");
    let entries = client.journal("-t nix-offload");
    assert!(entries.iter().all(|entry| event(entry) != "SSH master not started"), "{entries:?}");

    let client = plan(&world).named("second").uses(&mac, "ssh-ng", 1).start();
    let refused = client.nix_build(&drv::where_built("refused"), &["-j0"]);
    refused.assert_failure().assert_stderr_has("connection refused");
    let known = client.command(PROXY).args(["--via", "mac", "localhost", "22"]).run();
    assert_eq!(known.code(), 75, "{known}");
    known.assert_stderr_has("mac is not tried again before").assert_stderr_has("connection refused");
}
