//! The SSH connection: one for all, replaced when it is gone, and no build lost with it.

use std::os::unix::net::UnixListener;
use std::time::Duration;

use harness::{Builder, Client, ClientPlan, Hook, Output, Running, World, drv, wait_until};

use crate::support::{
    SOON, UNANSWERED, assert_masters_and_holder_left, assert_only_masters_left,
    assert_only_masters_left_after, begun, gated, open, wait_for_begin,
};

const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";
const LIMIT: Duration = Duration::from_secs(10);

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

fn one_of_each(protocol: &str, slots: u32) -> (World, Builder, Client) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, protocol, slots).start();
    (world, mac, client)
}

fn assert_built_on(client: &Client, output: &Output, machine: &str) {
    let path = output.assert_success().out_path();
    assert_eq!(client.read(&path), format!("{machine}\n"), "{output}");
}

/// The one master of the client.
fn master(client: &Client) -> u32 {
    let masters: Vec<u32> = client
        .processes()
        .iter()
        .filter(|process| process.command_line.starts_with("ssh"))
        .map(|process| process.pid)
        .collect();
    assert_eq!(masters.len(), 1, "{:?}", client.processes());
    masters[0]
}

/// Ends the builder's end of every connection, as a cut line or a killed sshd does.
fn cut_connections(mac: &Builder) {
    let sessions = mac.pids_matching("sshd: root");
    assert!(!sessions.is_empty(), "{:?}", mac.processes());
    for pid in sessions {
        // Ending one may end another.
        let _ = mac.command("kill").args(["-KILL", &pid.to_string()]).run();
    }
}

#[test]
fn twenty_hooks_at_once_log_in_once() {
    let (_world, mac, client) = one_of_each("ssh-ng", 20);
    let builds: Vec<Running> = (0..20)
        .map(|number| client.spawn_nix_build(&drv::where_built(&format!("at-once-{number}")), &["-j0"]))
        .collect();
    for build in builds {
        assert_built_on(&client, &build.wait(), "mac");
    }
    assert_eq!(mac.logins(), 1);
    assert_only_masters_left(&client, 1);
    client.verify_store();
    mac.verify_store();
}

#[test]
fn both_protocols_of_one_machine_share_a_connection() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    assert_built_on(&client, &client.nix_build(&drv::where_built("a"), &["-j0"]), "mac");
    client.set_machines("ssh://mac x86_64-linux - 1 1\n");
    assert_built_on(&client, &client.nix_build(&drv::where_built("b"), &["-j0"]), "mac");
    client.nix_offload(&["ping-store", "--store", "ssh://mac"]).assert_success();
    assert_eq!(mac.logins(), 1);
}

#[test]
fn a_master_outlives_its_hook_and_is_used_by_the_next() {
    let (_world, mac, client) = one_of_each("ssh-ng", 1);
    assert_built_on(&client, &client.nix_build(&drv::where_built("a"), &["-j0"]), "mac");
    let first = master(&client);
    assert_built_on(&client, &client.nix_build(&drv::where_built("b"), &["-j0"]), "mac");
    assert_eq!(master(&client), first);
    assert_eq!(mac.logins(), 1);
}

#[test]
fn a_killed_master_is_replaced_without_losing_the_next_build() {
    let (_world, mac, client) = one_of_each("ssh-ng", 1);
    assert_built_on(&client, &client.nix_build(&drv::where_built("a"), &["-j0"]), "mac");
    let first = master(&client);
    client.kill(first, "KILL");
    let next = client.nix_build(&drv::where_built("b"), &["-j0"]);
    assert_built_on(&client, &next, "mac");
    next.assert_stderr_lacks("cannot build on");
    assert_ne!(master(&client), first);
    assert_eq!(mac.logins(), 2);
    // A channel that the dying master was asked for is held for a while.
    assert_only_masters_left_after(&client, 1, UNANSWERED);
}

#[test]
fn a_hung_master_is_replaced_without_losing_the_next_build() {
    let (_world, mac, client) = one_of_each("ssh-ng", 1);
    assert_built_on(&client, &client.nix_build(&drv::where_built("a"), &["-j0"]), "mac");
    let first = master(&client);
    client.kill(first, "STOP");
    let next = client.nix_build(&drv::where_built("b"), &["-j0"]);
    assert_built_on(&client, &next, "mac");
    assert!(next.took() < LIMIT, "{next}");
    assert_eq!(mac.logins(), 2);
    wait_until("the hung master is gone", SOON, || !client.processes().iter().any(|p| p.pid == first));
    assert_only_masters_left_after(&client, 1, UNANSWERED);
}

#[test]
fn a_daemon_too_busy_to_answer_costs_no_other_build_its_connection() {
    let (_world, mac, client) = one_of_each("ssh-ng", 2);
    let build = client.spawn_nix_build(&gated("mid"), &["-j0"]);
    wait_for_begin(&client, "mid", &["mac"]);
    let first = master(&client);
    // The daemon's child goes on with the build; whoever comes now is never answered.
    mac.run(&format!("rm -f {DAEMON_SOCKET}"));
    let silent = UnixListener::bind(mac.path(DAEMON_SOCKET)).unwrap();
    let other = client.nix_build(&drv::where_built("other"), &["-j0"]);
    assert_built_on(&client, &other, "mac");
    assert!(other.took() >= Duration::from_secs(1), "it was answered: {other}");
    drop(silent);
    open(&client, "mid");
    let built = build.wait();
    assert_built_on(&client, &built, "mac");
    built.assert_stderr_lacks("connecting again");
    assert_eq!(master(&client), first);
}

#[test]
fn a_master_killed_in_mid_build_costs_a_second_try_only() {
    let (_world, mac, client) = one_of_each("ssh-ng", 1);
    let build = client.spawn_nix_build(&gated("mid"), &["-j0"]);
    wait_for_begin(&client, "mid", &["mac"]);
    client.kill(master(&client), "KILL");
    wait_for_begin(&client, "mid", &["mac", "mac"]);
    open(&client, "mid");
    let built = build.wait();
    assert_built_on(&client, &built, "mac");
    assert_says_lost(&built, "mac");
    assert_eq!(mac.logins(), 2);
    assert_only_masters_left_after(&client, 1, UNANSWERED);
    client.verify_store();
    mac.verify_store();
}

/// One line names the machine and what happened.
fn assert_says_lost(built: &Output, machine: &str) {
    let named =
        built.stderr().lines().any(|line| line.contains(machine) && line.contains("connection was lost"));
    assert!(named, "the lost connection to {machine} is not told: {built}");
}

#[test]
fn a_link_lost_in_mid_build_costs_a_second_try_only() {
    for refusing in [false, true] {
        let world = World::new();
        let plan_of_mac = world.builder("mac");
        let mac = if refusing { plan_of_mac.refusing_forwarding() } else { plan_of_mac }.start();
        let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
        let build = client.spawn_nix_build(&gated("mid"), &["-j0"]);
        wait_for_begin(&client, "mid", &["mac"]);
        cut_connections(&mac);
        wait_for_begin(&client, "mid", &["mac", "mac"]);
        open(&client, "mid");
        let built = build.wait();
        assert_built_on(&client, &built, "mac");
        assert_says_lost(&built, "mac");
        assert_eq!(mac.logins(), 2);
        assert_only_masters_left(&client, 1);
        client.verify_store();
        mac.verify_store();
    }
}

/// The refused channel must be held as long as the master lives: OpenSSH ends a master that loses one.
#[test]
fn a_refused_channel_does_not_end_the_master_later() {
    let world = World::new();
    let mac = world.builder("mac").refusing_forwarding().start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    // Longer than any bound on the opening of a channel.
    let long = drv::script("long", "echo once >> /mnt/share/begun; sleep 12; cat /etc/machine-name > $out");
    let built = client.nix_build(&long, &["-j0"]);
    assert_built_on(&client, &built, "mac");
    built.assert_stderr_lacks("connection was lost");
    assert_eq!(client.read("/mnt/share/begun"), "once\n");
    assert_eq!(mac.logins(), 1);
    assert_masters_and_holder_left(&client, 1);
}

#[test]
fn a_daemon_killed_in_mid_build_costs_a_second_try_only() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let build = client.spawn_nix_build(&gated("mid"), &["-j0"]);
    wait_for_begin(&client, "mid", &["mac"]);
    mac.stop_daemon();
    mac.run("rm -f /nix/var/nix/daemon-socket/socket");
    // Without a daemon the hook starts one of its own.
    wait_for_begin(&client, "mid", &["mac", "mac"]);
    open(&client, "mid");
    let built = build.wait();
    assert_built_on(&client, &built, "mac");
    assert_says_lost(&built, "mac");
    assert_eq!(mac.logins(), 1, "the connection was not at fault");
    assert_masters_and_holder_left(&client, 1);
}

#[test]
fn a_machine_switched_off_in_mid_build_hands_over_to_another() {
    let world = World::new();
    let mut first = world.builder("first").start();
    let second = world.builder("second").start();
    let client = plan(&world).uses(&first, "ssh-ng", 1).uses(&second, "ssh-ng", 1).start();
    let build = client.spawn_nix_build(&gated("mid"), &["-j0"]);
    wait_for_begin(&client, "mid", &["first"]);
    first.stop();
    wait_for_begin(&client, "mid", &["first", "second"]);
    open(&client, "mid");
    let built = build.wait();
    assert_built_on(&client, &built, "second");
    assert_says_lost(&built, "first");
    let tells = built.stderr().lines().any(|line| line.contains("on 'ssh-ng://second' instead"));
    assert!(tells, "{built}");
    assert_only_masters_left(&client, 1);
    client.verify_store();
    second.verify_store();
}

#[test]
fn the_only_machine_switched_off_in_mid_build_fails_the_build_soon() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let build = client.spawn_nix_build(&gated("mid"), &["-j0"]);
    wait_for_begin(&client, "mid", &["mac"]);
    mac.stop();
    let stopped = std::time::Instant::now();
    let failed = build.wait();
    assert!(stopped.elapsed() < LIMIT, "{failed}");
    failed.assert_failure().assert_stderr_has("could not be built on any machine");
    assert_eq!(failed.stdout(), "");
    assert_says_lost(&failed, "mac");
    assert_eq!(begun(&client, "mid"), ["mac"]);
    assert_only_masters_left(&client, 0);
    client.verify_store();
}

#[test]
fn a_failed_fixed_output_is_not_tried_again_and_a_machine_without_slots_not_waited_for() {
    let world = World::new();
    let [mac, other] = ["mac", "other"].map(|name| world.builder(name).start());
    let client = plan(&world)
        .uses(&mac, "ssh-ng", 1)
        .uses(&other, "ssh-ng", 1)
        .machines("ssh-ng://off.invalid x86_64-linux - 0")
        .start();
    let hash = format!("sha256:{}", "0".repeat(64));
    let make = "cat /etc/machine-name >> /mnt/share/fixed.begun; exit 3";
    let failed = client.nix_build(&drv::fixed_flat("fixed", make, &hash), &["-j0"]);
    failed.assert_failure().assert_stderr_has("exit code 3");
    assert!(failed.took() < LIMIT, "{failed}");
    assert_eq!(begun(&client, "fixed"), ["mac"], "{failed}");
}

#[test]
fn a_time_limit_beyond_all_time_is_none() {
    let (_world, _mac, client) = one_of_each("ssh-ng", 1);
    for option in ["max-silent-time", "timeout"] {
        let args = ["-j0", "--option", option, "9223372036854775807"];
        client.nix_build(&drv::trivial(option), &args).assert_success();
    }
}

#[test]
fn a_failed_build_is_not_tried_again() {
    let world = World::new();
    let (first, second) = (world.builder("first").start(), world.builder("second").start());
    let client = plan(&world).uses(&first, "ssh-ng", 1).uses(&second, "ssh-ng", 1).start();
    let bad = drv::script("bad", "echo once >> /mnt/share/tries; echo it went wrong; exit 7");
    let failed = client.nix_build(&bad, &["-j0"]);
    failed.assert_failure().assert_stderr_has("it went wrong").assert_stderr_has("failed with exit code 7");
    assert_eq!((failed.code(), failed.stdout()), (100, ""), "{failed}");
    assert_eq!(client.read("/mnt/share/tries"), "once\n");
    assert_eq!(second.logins(), 0);
}
