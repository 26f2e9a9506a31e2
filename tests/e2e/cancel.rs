//! A cancelled build ends on the builder at once and leaves nothing behind.

use std::time::Duration;

use harness::{Builder, BuilderPlan, Client, ClientPlan, Hook, Mode, Relay, Running, World, drv, wait_until};
use nix::sys::signal::Signal;

use crate::support::{
    SOON, assert_masters_and_holder_left, assert_only_masters_left, begun, gated, open, sleeping,
    wait_for_begin,
};

const AT_ONCE: Duration = Duration::from_secs(1);
const TIMES: u32 = 6;

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// Starts a silent build and returns when it runs on the builder.
fn start_silent(mac: &Builder, client: &Client, seconds: &str) -> Running {
    let build = client.spawn_nix_build(&drv::silent_sleep(&format!("sleeper-{seconds}"), seconds), &["-j0"]);
    wait_until("the build has begun", SOON, || !sleeping(mac, seconds).is_empty());
    build
}

fn assert_ended_at_once(mac: &Builder, seconds: &str) {
    wait_until("the builder has stopped", AT_ONCE, || sleeping(mac, seconds).is_empty());
}

/// Kills nix-build again and again; each time the build ends there, and the next one succeeds.
fn kill_again_and_again(mac: &Builder, client: &Client) {
    client.nix_build(&drv::trivial("first"), &["-j0"]).assert_success();
    for time in 0..TIMES {
        let seconds = format!("{}", 4320 + time);
        let build = start_silent(mac, client, &seconds);
        build.signal(Signal::SIGKILL);
        assert_ended_at_once(mac, &seconds);
        let killed = build.wait();
        assert_eq!((killed.code(), killed.stdout()), (137, ""), "{killed}");
        let next = client.nix_build(&drv::where_built(&format!("next-{time}")), &["-j0"]);
        let path = next.assert_success().out_path();
        assert_eq!(client.read(&path), "mac\n");
    }
    assert_eq!(mac.logins(), 1, "the master did not live through it");
    wait_until("no build is left on the builder", SOON, || mac.pids_matching("sleep 43").is_empty());
    client.verify_store();
    mac.verify_store();
}

#[test]
fn killing_nix_build_ends_a_silent_build_within_a_second() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    kill_again_and_again(&mac, &client);
    assert_only_masters_left(&client, 1);
}

#[test]
fn killing_nix_build_ends_a_silent_build_in_a_session_too() {
    let world = World::new();
    let mac = world.builder("mac").refusing_forwarding().start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    kill_again_and_again(&mac, &client);
    assert_masters_and_holder_left(&client, 1);
}

#[test]
fn killing_nix_build_ends_a_silent_build_of_the_daemon() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).mode(Mode::Daemon).uses(&mac, "ssh-ng", 1).start();
    kill_again_and_again(&mac, &client);
    assert_only_masters_left(&client, 1);
}

#[test]
fn interrupting_nix_build_ends_a_silent_build() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let build = start_silent(&mac, &client, "4329");
    build.signal(Signal::SIGINT);
    assert_ended_at_once(&mac, "4329");
    let interrupted = build.wait();
    interrupted.assert_failure().assert_stderr_has("interrupted by the user");
    assert_eq!(interrupted.stdout(), "");
    client.nix_build(&drv::trivial("next"), &["-j0"]).assert_success();
    assert_only_masters_left(&client, 1);
}

/// By this way a silent build ends when nix-build is killed and when it is interrupted, and so does what was started
/// for it there.
fn assert_ended_by(way: &str, plan_of_mac: impl FnOnce(BuilderPlan) -> BuilderPlan, uri: &str) {
    let world = World::new();
    let mac = plan_of_mac(world.builder("mac")).start();
    let client = plan(&world).knows(&mac).machines(&format!("{uri} x86_64-linux - 1 1")).start();
    let ping = client.nix_offload(&["ping-store", "--store", uri]);
    assert!(ping.assert_success().stdout().contains(&format!("\nWay: {way}\n")), "{ping}");
    let begun = || mac.pids_matching("--stdio").len() + mac.pids_matching("--serve").len();
    wait_until("what answered has gone", SOON, || begun() == 0);
    for (number, signal) in [Signal::SIGKILL, Signal::SIGINT, Signal::SIGKILL].into_iter().enumerate() {
        let seconds = format!("{}", 4340 + number);
        let build = start_silent(&mac, &client, &seconds);
        build.signal(signal);
        wait_until("the builder has stopped", SOON, || sleeping(&mac, &seconds).is_empty());
        wait_until("nothing is left there", SOON, || begun() == 0);
        build.wait().assert_failure();
    }
    let next = client.nix_build(&drv::where_built("next"), &["-j0"]);
    assert_eq!(client.read(&next.assert_success().out_path()), "mac\n");
    assert_eq!(mac.logins(), 1, "the master did not live through it");
    client.verify_store();
    mac.verify_store();
}

#[test]
fn a_silent_build_ends_by_the_daemons_socket() {
    assert_ended_by("daemon socket", |mac| mac, "ssh-ng://mac");
    assert_ended_by("daemon socket", |mac| mac, "ssh://mac");
}

#[test]
fn a_silent_build_ends_by_a_daemon_in_a_session() {
    assert_ended_by("nix-daemon --stdio", |mac| mac.refusing_forwarding(), "ssh-ng://mac");
}

#[test]
fn a_silent_build_ends_by_a_store_in_a_session() {
    assert_ended_by("nix-store --serve", |mac| mac, "ssh://mac?remote-program=/usr/bin/nix-store");
}

#[test]
fn a_silent_build_ends_by_forced_commands() {
    for (command, way, uri) in [
        ("nix-daemon --stdio", "nix-daemon --stdio", "ssh-ng://mac"),
        ("nix-store --serve --write", "nix-store --serve", "ssh://mac"),
    ] {
        let options = format!("command=\"{command}\",restrict");
        assert_ended_by(way, |mac| mac.key_options(&options), uri);
    }
}

#[test]
fn killing_the_daemon_ends_its_builds() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let mut client = plan(&world).mode(Mode::Daemon).uses(&mac, "ssh-ng", 1).start();
    let build = start_silent(&mac, &client, "4330");
    client.stop_daemon();
    assert_ended_at_once(&mac, "4330");
    build.wait().assert_failure();
    assert_only_masters_left(&client, 1);
}

#[test]
fn a_killed_client_leaves_the_builds_of_others_alone() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 4).start();
    let stays = client.spawn_nix_build(&gated("stays"), &["-j0"]);
    wait_for_begin(&client, "stays", &["mac"]);
    let dies = start_silent(&mac, &client, "4331");
    dies.signal(Signal::SIGKILL);
    assert_ended_at_once(&mac, "4331");
    dies.wait().assert_failure();
    open(&client, "stays");
    let stayed = stays.wait();
    assert_eq!(client.read(&stayed.assert_success().out_path()), "mac\n");
    stayed.assert_stderr_lacks("connection was lost");
    assert_eq!(begun(&client, "stays"), ["mac"], "it was begun again");
    assert_eq!(mac.logins(), 1);
    assert_only_masters_left(&client, 1);
}

/// What the builder says while its client goes away must not end the master, which others use.
#[test]
fn killing_nix_build_of_a_build_that_talks_leaves_the_master_alive() {
    for settings in ["", "[ssh]\nready-streams = 0\n"] {
        let world = World::new();
        let mac = world.builder("mac").start();
        let relay = Relay::to(mac.port(), Duration::from_millis(20));
        let alias = relay.ssh_config("far", &mac);
        let client = world
            .client()
            .hook(Hook::Ours)
            .knows(&mac)
            .ssh_config(&alias)
            .machines("ssh-ng://far x86_64-linux - 4 1")
            .start();
        client.write("/etc/nix/offload.toml", settings);
        client.nix_build(&drv::trivial("first"), &["-j0"]).assert_success();
        for time in 0..TIMES {
            let talker = drv::expression(&format!(
                r#"d "talker-{time}" "i=0; while :; do echo line $i; i=$((i + 1)); done" {{ }}"#
            ));
            let build = client.spawn_nix_build(&talker, &["-j0"]);
            wait_until("the build talks", SOON, || build.stderr_so_far().contains("line 100"));
            build.signal(Signal::SIGKILL);
            let _ = build.wait();
            let next = client.nix_build(&drv::where_built(&format!("after-{time}")), &["-j0"]);
            assert_eq!(client.read(&next.assert_success().out_path()), "mac\n");
        }
        assert_eq!(mac.logins(), 1, "the master did not live through it with {settings:?}");
    }
}
