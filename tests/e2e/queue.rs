//! Builds that wait here for a slot: in order, users in turns, whoever is killed, whatever others want.

use std::{collections::HashSet, fs};

use harness::{Client, ClientPlan, Hook, Mode, Running, World, drv, wait_until};
use nix::sys::signal::Signal;

use crate::support::{SOON, assert_only_masters_left, gated, held_locks, open, wait_for_begin};

const OTHER_USER: &str = "1001";

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// How many wait, of a user or of all.
fn waiting(client: &Client, user: &str) -> usize {
    let is_place = |name: &&String| {
        name.rsplit_once('.').is_some_and(|(line, number)| {
            number.parse::<u64>().is_ok()
                && line.split_once("-u").is_some_and(|(_, whose)| whose.contains(user))
        })
    };
    client.entries("/run/nix-offload/queue").iter().filter(is_place).count()
}

/// Notes its name when it is begun.
fn noting(name: &str, more: &str) -> String {
    format!(r#"(d "{name}" "echo {name} >> /mnt/share/begun; cat /etc/machine-name > $out" {{ {more} }})"#)
}

fn list(names: impl Iterator<Item = String>) -> String {
    drv::expression(&format!("[ {} ]", names.collect::<Vec<_>>().join(" ")))
}

fn begun(client: &Client) -> Vec<String> {
    let text = fs::read_to_string(client.path("/mnt/share/begun")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// The processes of hooks that serve Nix.
fn hooks(client: &Client) -> HashSet<u32> {
    let is_hook = |words: &str| words.contains("nix-offload") && words.ends_with(" 3");
    client
        .processes()
        .into_iter()
        .filter(|process| is_hook(&process.command_line))
        .map(|hook| hook.pid)
        .collect()
}

#[test]
fn users_of_one_daemon_take_turns() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).mode(Mode::Daemon).uses(&mac, "ssh-ng", 1).start();
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let first = client.spawn_nix_build(&list((0..6).map(|i| noting(&format!("a{i}"), ""))), &["-j0"]);
    wait_until("the builds of the first user wait", SOON, || waiting(&client, "1000") == 6);
    let expression = list((0..2).map(|i| noting(&format!("b{i}"), "")));
    let second = client
        .command("setpriv")
        .args([&format!("--reuid={OTHER_USER}"), &format!("--regid={OTHER_USER}"), "--clear-groups"])
        .args([
            "env",
            "HOME=/tmp",
            "NIX_REMOTE=daemon",
            "nix-build",
            "--no-out-link",
            "-j0",
            "-E",
            &expression,
        ])
        .spawn();
    wait_until("those of the second too", SOON, || waiting(&client, OTHER_USER) == 2);
    open(&client, "gate");
    gate.wait().assert_success();
    assert_eq!(first.wait().assert_success().out_paths().len(), 6);
    assert_eq!(second.wait().assert_success().out_paths().len(), 2);
    let order = begun(&client);
    assert_eq!(order.len(), 8, "{order:?}");
    let place = |name: &str| order.iter().position(|begun| begun == name).unwrap();
    // One of each in turns: a, b, a, b, and what is left.
    assert!(place("b0").max(place("b1")) < 5, "{order:?}");
    assert_only_masters_left(&client, 1);
}

#[test]
fn twenty_wait_in_their_order_and_those_that_are_killed_hold_nobody_up() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let mut known = hooks(&client);
    let mut waiters: Vec<(u32, Running)> = Vec::new();
    for number in 0..20 {
        let build = client.spawn_nix_build(&list([noting(&format!("w{number}"), "")].into_iter()), &["-j0"]);
        wait_until("it waits", SOON, || waiting(&client, "") == number + 1);
        let hook = *hooks(&client).difference(&known).next().unwrap();
        known.insert(hook);
        waiters.push((hook, build));
    }
    // The first, the last, some that stand together.
    let killed = [0, 1, 4, 9, 10, 11, 19];
    for number in killed {
        client.kill(waiters[number].0, "KILL");
    }
    open(&client, "gate");
    gate.wait().assert_success();
    let mut expected = Vec::new();
    for (number, (_, build)) in waiters.into_iter().enumerate() {
        let built = build.wait();
        if killed.contains(&number) {
            built.assert_failure();
        } else {
            built.assert_success();
            expected.push(format!("w{number}"));
        }
    }
    assert_eq!(begun(&client), expected);
    assert_eq!(waiting(&client, ""), 0);
    assert_only_masters_left(&client, 1);
}

#[test]
fn builds_that_can_use_other_machines_too_and_those_that_cannot_both_go_on() {
    let world = World::new();
    let (mac, other) =
        (world.builder("mac").nix_conf("system-features = special").start(), world.builder("other").start());
    let client = plan(&world)
        .knows(&mac)
        .knows(&other)
        .machines("ssh-ng://other x86_64-linux - 1 1\nssh-ng://mac x86_64-linux - 1 1 special")
        .start();
    let gates = ["one", "two"].map(|name| {
        let gate = client.spawn_nix_build(&gated(name), &["-j0"]);
        wait_until("a machine is full", SOON, || client.exists(&format!("/mnt/share/{name}.begun")));
        gate
    });
    let on_mac = if crate::support::begun(&client, "one") == ["mac"] { "one" } else { "two" };
    let special = r#"requiredSystemFeatures = [ "special" ];"#;
    let picky = client.spawn_nix_build(&list((0..6).map(|i| noting(&format!("p{i}"), special))), &["-j0"]);
    let modest = client.spawn_nix_build(&list((0..6).map(|i| noting(&format!("m{i}"), ""))), &["-j0"]);
    wait_until("all wait", SOON, || waiting(&client, "") == 12);
    // Only the machine that both want becomes free.
    open(&client, on_mac);
    picky.wait().assert_success();
    modest.wait().assert_success();
    let order = begun(&client);
    assert_eq!(order.len(), 12, "{order:?}");
    // In turns, more or less: neither has three of the first eight only.
    let picky = order[..8].iter().filter(|name| name.starts_with('p')).count();
    assert!((3..=5).contains(&picky), "{order:?}");
    for name in ["one", "two"] {
        open(&client, name);
    }
    for gate in gates {
        gate.wait().assert_success();
    }
    assert_only_masters_left(&client, 2);
}

#[test]
fn what_is_new_does_not_overtake_those_that_wait() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let before = hooks(&client);
    let first = client.spawn_nix_build(&list([noting("first", "")].into_iter()), &["-j0"]);
    wait_until("it waits", SOON, || waiting(&client, "") == 1);
    let hook = *hooks(&client).difference(&before).next().unwrap();
    // It cannot take the slot that is about to be free.
    client.kill(hook, "STOP");
    open(&client, "gate");
    gate.wait().assert_success();
    let second = client.spawn_nix_build(&list([noting("second", "")].into_iter()), &["-j0"]);
    wait_until("the new one stands behind it", SOON, || waiting(&client, "") == 2);
    // Who can build here does so.
    let local = client.nix_build(&drv::where_built("local"), &["-j1"]);
    assert_eq!(client.read(&local.assert_success().out_path()), "client\n");
    client.kill(hook, "CONT");
    first.wait().assert_success();
    second.wait().assert_success();
    assert_eq!(begun(&client), ["first", "second"]);
    assert_eq!(held_locks(&client), "");
}

#[test]
fn an_interrupted_build_leaves_its_place() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).mode(Mode::Daemon).uses(&mac, "ssh-ng", 1).start();
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let gone = client.spawn_nix_build(&list((0..5).map(|i| noting(&format!("gone{i}"), ""))), &["-j0"]);
    wait_until("they wait", SOON, || waiting(&client, "1000") == 5);
    let stays = client.spawn_nix_build(&list([noting("stays", "")].into_iter()), &["-j0"]);
    wait_until("one more waits", SOON, || waiting(&client, "1000") == 6);
    gone.signal(Signal::SIGINT);
    gone.wait().assert_failure();
    open(&client, "gate");
    gate.wait().assert_success();
    stays.wait().assert_success();
    assert_eq!(begun(&client), ["stays"]);
    assert_only_masters_left(&client, 1);
}
