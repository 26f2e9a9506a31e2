//! Streams to the daemon that are opened in advance: who gets them, what becomes of them, and that nothing depends on
//! them.

use std::time::Duration;

use harness::{Builder, Client, Hook, World, drv, wait_until};

use crate::support::{SOON, assert_only_masters_left, gate, gated, open, wait_for_begin};

/// Longer than streams are kept after the last build.
const IDLE: Duration = Duration::from_secs(40);

fn one_of_each() -> (World, Builder, Client) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 4).start();
    (world, mac, client)
}

/// Builds on the machine, and gives the process that built: the daemon's own for that connection.
fn build(client: &Client, name: &str) -> u32 {
    let built = client.nix_build(&drv::script(name, "echo $PPID > $out"), &["-j0"]);
    built.assert_stderr_lacks("warning").assert_stderr_lacks("connect");
    client.read(&built.assert_success().out_path()).trim().parse().unwrap()
}

fn keepers(client: &Client) -> Vec<u32> {
    client.pids_matching("nix-offload keep ")
}

/// Daemons that serve a connection. The first one waits for connections.
fn serving(mac: &Builder) -> Vec<u32> {
    let mut daemons = mac.pids_matching("nix-daemon");
    daemons.sort_unstable();
    daemons.drain(..1);
    daemons
}

/// Small processes that hold a connection to the master.
fn holders(client: &Client) -> usize {
    client.pids_matching("/bin/sh -c exec 3>&-").len()
}

/// Two builds, after which streams are opened in advance; gives the daemons behind them.
fn warm_up(mac: &Builder, client: &Client) -> Vec<u32> {
    let first = [build(client, "first"), build(client, "second")];
    let mut ready = Vec::new();
    wait_until("a stream is ready", SOON, || {
        ready = serving(mac);
        ready.retain(|pid| !first.contains(pid));
        !ready.is_empty()
    });
    ready
}

#[test]
fn a_build_that_follows_others_gets_a_daemon_that_was_there_before_it() {
    let (_world, mac, client) = one_of_each();
    build(&client, "alone");
    assert_eq!(keepers(&client).len(), 0, "one build is no reason");
    let ready = warm_up(&mac, &client);
    assert_eq!(keepers(&client).len(), 1);
    let daemon = build(&client, "third");
    assert!(ready.contains(&daemon), "{daemon} built, {ready:?} were ready");
    // Each is used once.
    let others = [build(&client, "fourth"), build(&client, "fifth")];
    assert!(!others.contains(&daemon) && others[0] != others[1], "{daemon}, {others:?}");
    assert_eq!((keepers(&client).len(), mac.logins()), (1, 1));
    wait_until("the keeper is gone", IDLE, || keepers(&client).is_empty());
    wait_until("no daemon is left waiting", SOON, || serving(&mac).is_empty());
    let files = client.run("ls /run/nix-offload");
    assert!(!files.contains("keep"), "{files}");
    assert_only_masters_left(&client, 1);
    client.verify_store();
    mac.verify_store();
}

#[test]
fn many_builds_at_once_share_one_keeper_which_keeps_no_more_than_it_may() {
    let (_world, mac, client) = one_of_each();
    warm_up(&mac, &client);
    client.nix_build(&drv::independent(30), &["-j0"]).assert_success();
    assert_eq!((keepers(&client).len(), mac.logins()), (1, 1));
    wait_until("those that were used are gone", SOON, || serving(&mac).len() <= 4);
    client.verify_store();
}

#[test]
fn builds_go_on_when_the_keeper_is_killed() {
    let (_world, mac, client) = one_of_each();
    warm_up(&mac, &client);
    let running = client.spawn_nix_build(&gated("running"), &["-j0"]);
    wait_for_begin(&client, "running", &["mac"]);
    let killed = keepers(&client);
    client.kill(killed[0], "KILL");
    wait_until("the keeper is gone", SOON, || keepers(&client).is_empty());
    build(&client, "without");
    build(&client, "again");
    assert!(!keepers(&client).is_empty() && keepers(&client) != killed);
    open(&client, "running");
    assert_eq!(client.read(&running.wait().assert_success().out_path()), "mac\n");
    assert_eq!(mac.logins(), 1);
    assert_only_masters_left(&client, 1);
}

/// The master has much to say to a hook that is killed, and nobody is there who would have closed its channel.
#[test]
fn a_hook_that_is_killed_after_its_keeper_leaves_neither_a_daemon_nor_a_broken_master() {
    let (_world, mac, client) = one_of_each();
    warm_up(&mac, &client);
    let talker = drv::script(
        "talker",
        &format!(
            "echo $PPID > /mnt/share/daemon; {}; for i in $(seq 20000); do echo line $i of a hundred characters, {}; done; \
             touch /mnt/share/said; sleep 600",
            gate("talker"),
            "or nearly so".repeat(6)
        ),
    );
    let running = client.spawn_nix_build(&talker, &["-j0"]);
    wait_for_begin(&client, "talker", &["mac"]);
    let daemon: u32 = client.read("/mnt/share/daemon").trim().parse().unwrap();
    let hook = client.pids_matching("nix-offload 3")[0];
    client.kill(keepers(&client)[0], "KILL");
    wait_until("somebody else watches over the channel", SOON, || holders(&client) == 1);
    let beside = client.spawn_nix_build(&gated("beside"), &["-j0"]);
    wait_for_begin(&client, "beside", &["mac"]);
    client.kill(hook, "STOP");
    open(&client, "talker");
    wait_until("the master has much to say", SOON, || client.path("/mnt/share/said").exists());
    client.kill(hook, "KILL");
    running.wait().assert_failure();
    wait_until("its daemon is gone", SOON, || !serving(&mac).contains(&daemon));
    open(&client, "beside");
    assert_eq!(client.read(&beside.wait().assert_success().out_path()), "mac\n");
    assert_eq!(mac.logins(), 1);
    wait_until("the keeper is gone", IDLE, || keepers(&client).is_empty());
    wait_until("no daemon is left", SOON, || serving(&mac).is_empty());
    assert_only_masters_left(&client, 1);
}

#[test]
fn a_keeper_that_is_stopped_holds_nobody() {
    let (_world, mac, client) = one_of_each();
    warm_up(&mac, &client);
    let stopped = keepers(&client);
    client.kill(stopped[0], "STOP");
    let begin = std::time::Instant::now();
    build(&client, "without");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    client.kill(stopped[0], "CONT");
    build(&client, "with");
    assert_eq!((keepers(&client), mac.logins()), (stopped, 1));
}

#[test]
fn streams_that_died_while_they_waited_are_not_used() {
    let (_world, mut mac, client) = one_of_each();
    for pid in warm_up(&mac, &client) {
        mac.kill(pid, "KILL");
    }
    build(&client, "after-a-kill");
    mac.stop_daemon();
    mac.start_daemon();
    build(&client, "after-a-restart");
    // The master too.
    client.kill(client.pids_matching("ssh: /run/nix-offload")[0], "KILL");
    build(&client, "after-the-master");
    assert_eq!(mac.logins(), 2);
    mac.verify_store();
}

#[test]
fn none_are_opened_in_advance_if_that_is_set() {
    let (_world, mac, client) = one_of_each();
    client.write("/etc/nix/offload.toml", "[ssh]\nready-streams = 0\n");
    for name in ["a", "b", "c", "d"] {
        build(&client, name);
    }
    assert_eq!(keepers(&client).len(), 0);
    wait_until("no daemon is left waiting", SOON, || serving(&mac).is_empty());
}

#[test]
fn the_journal_tells_of_the_keeper_and_of_what_it_gave() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world
        .client()
        .hook(Hook::Ours)
        .journald()
        .env("NIX_OFFLOAD_LOG", "debug")
        .uses(&mac, "ssh-ng", 1)
        .start();
    warm_up(&mac, &client);
    build(&client, "third");
    let said = |text: &str| {
        let entries = client.journal("-t nix-offload");
        entries.iter().filter(|entry| entry["MESSAGE"].as_str().is_some_and(|it| it.contains(text))).count()
    };
    assert_eq!(said("keeping streams ready"), 1);
    assert_eq!(said("by a stream that was opened in advance"), 1);
    wait_until("the keeper is gone", IDLE, || keepers(&client).is_empty());
    assert_eq!(said("no more streams are wanted"), 1);
}
