//! Builds that wait here for a slot: in order, users in turns, whoever is killed, whatever others want.

use std::{collections::HashSet, fs};

use harness::{Builder, Client, ClientPlan, Hook, Mode, Release, Running, World, drv, wait_until};
use nix::sys::signal::Signal;

use crate::support::{
    NO_SAMPLES, SOON, UNANSWERED, assert_only_masters_left, assert_only_masters_left_after,
    begun as begun_on, gated, held_locks, open, picky, wait_for_begin,
};

const OTHER_USER: &str = "1001";

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// How many wait, of a user or of all. The names of places are `LINE-uUSER.TIME.NUMBER`.
fn waiting(client: &Client, user: &str) -> usize {
    let is_place = |name: &&String| {
        let whose = name.split_once("-u").and_then(|(_, rest)| rest.split('.').next());
        whose.is_some_and(|whose| user.is_empty() || whose == user)
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
    // One of those that were interrupted may just have asked the master for a channel.
    assert_only_masters_left_after(&client, 1, UNANSWERED);
}

#[test]
fn a_build_for_which_much_waits_comes_first_and_nobody_starves() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    // By their names the chain is asked for last.
    let expression = drv::expression(
        r#"let step = name: before: d name "echo ${name} >> /mnt/share/begun; sleep 0.5; echo > $out # ${before}" { };
               chain = builtins.foldl' (before: name: step name before) (step "z1" "") [ "z2" "z3" "z4" "z5" ];
           in map (name: step name "") [ "a1" "a2" "a3" "a4" "a5" "a6" ] ++ [ chain ]"#,
    );
    let build = client.spawn_nix_build(&expression, &["-j0"]);
    wait_until("all that can begin wait", SOON, || waiting(&client, "") == 7);
    wait_until("it is known what waits for what", SOON, || {
        // All are held up but the one that has the turn, in a line of their own.
        let places = client.entries("/run/nix-offload/queue");
        places.iter().filter(|name| name.contains(".0000000000000.")).count() == 2
    });
    let status = client.nix_offload(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(status.assert_success().stdout()).unwrap();
    assert_eq!(status[0]["waiting"], 7, "{status}");
    open(&client, "gate");
    gate.wait().assert_success();
    assert_eq!(build.wait().assert_success().out_paths().len(), 7);
    let order = begun(&client);
    let place = |name: &str| order.iter().position(|begun| begun == name).unwrap();
    assert_eq!(order.len(), 11, "{order:?}");
    // One may have had the turn before it was known of the chain; whoever has it keeps it.
    assert!(place("z1") < 2 && place("z2") < 5, "{order:?}");
    // The last of the chain is as good as any other, and came later.
    assert_eq!(place("z5"), 10, "{order:?}");
    let alone: Vec<&String> = order.iter().filter(|name| name.starts_with('a')).collect();
    assert!(alone.is_sorted(), "{order:?}");
    assert_only_masters_left(&client, 1);
}

/// A fast machine and a slow one, which have one slot each, and a client that knows how long builds take there and what their
/// loads are. Each has a build, which goes on until it is let.
fn fast_and_slow(world: &World, choice: &str) -> (Client, [Builder; 2], [Running; 2]) {
    let builders = ["fast", "slow"].map(|name| world.builder(name).start());
    let client = plan(world)
        .knows(&builders[0])
        .knows(&builders[1])
        .machines("ssh-ng://fast x86_64-linux - 1 8 big-parallel\nssh-ng://slow x86_64-linux - 1 1")
        .start();
    client.write("/etc/nix/offload.toml", choice);
    // Earlier builds took this long, and all together a second (*). In which file that stands depends on the names.
    client.run(
        "mkdir -p -m 700 /var/lib/nix-offload/history; cd /var/lib/nix-offload/history; \
         for i in $(seq 0 255); do printf 'fastgate\\t80.000 10 5\\nlong\\t8000.000 10 5\\n*\\t1.000 10 500\\n' > $(printf %04x $i); done",
    );
    let gates = ["fastgate", "slowgate"].map(|name| {
        let gate = client.spawn_nix_build(&gated(name), &["-j0"]);
        wait_until("a machine is full", SOON, || client.exists(&format!("/mnt/share/{name}.begun")));
        gate
    });
    wait_for_begin(&client, "fastgate", &["fast"]);
    wait_for_begin(&client, "slowgate", &["slow"]);
    wait_until("both have been looked at", SOON, || {
        let known = client
            .run("cat /run/nix-offload/load.json /run/nix-offload/sample/load.json 2>/dev/null || true");
        known.matches("load_average").count() == 2
    });
    (client, builders, gates)
}

#[test]
fn while_one_is_held_back_for_a_fast_machine_the_next_takes_what_is_free() {
    let world = World::new();
    let (client, _builders, gates) = fast_and_slow(&world, "");
    let long = client.spawn_nix_build(&gated("long"), &["-j0"]);
    wait_until("it waits", SOON, || waiting(&client, "") == 1);
    let short = client.spawn_nix_build(&gated("short"), &["-j0"]);
    wait_until("the next one, too", SOON, || waiting(&client, "") == 2);
    open(&client, "slowgate");
    // On the slow machine the first would take much longer than it has to wait for the fast one.
    wait_for_begin(&client, "short", &["slow"]);
    assert_eq!((crate::support::begun(&client, "long").len(), waiting(&client, "")), (0, 1));
    open(&client, "fastgate");
    wait_for_begin(&client, "long", &["fast"]);
    for name in ["long", "short"] {
        open(&client, name);
    }
    for build in gates.into_iter().chain([long, short]) {
        build.wait().assert_success();
    }
    assert_only_masters_left(&client, 2);
}

#[test]
fn one_that_is_held_back_waits_behind_others_for_no_longer_than_it_is_to() {
    let world = World::new();
    let (client, _builders, [fastgate, slowgate]) = fast_and_slow(&world, "[choice]\nhold-back = '12s'\n");
    // It can go nowhere else, and nobody knows when it will.
    let only = r#"d "only" "echo > $out" { requiredSystemFeatures = [ "big-parallel" ]; }"#;
    let only = client.spawn_nix_build(&drv::expression(only), &["-j0"]);
    wait_until("it waits", SOON, || waiting(&client, "") == 1);
    open(&client, "slowgate");
    slowgate.wait().assert_success();
    let long = client.spawn_nix_build(&gated("long"), &["-j0"]);
    wait_until("it waits, too", SOON, || waiting(&client, "") == 2);
    wait_for_begin(&client, "long", &["slow"]);
    assert_eq!(waiting(&client, ""), 1);
    for name in ["long", "fastgate"] {
        open(&client, name);
    }
    for build in [fastgate, long, only] {
        build.wait().assert_success();
    }
}

#[test]
fn a_build_that_waits_says_so_and_where_it_is_built_in_the_end() {
    let world = World::new();
    let (mac, pi) = (world.builder("mac").start(), world.builder("pi").start());
    for release in Release::ALL {
        let name = |name: &str| format!("{name}-{}", release.name());
        let client = plan(&world)
            .named(release.name())
            .release(release)
            .uses(&mac, "ssh-ng", 1)
            .uses(&pi, "ssh-ng", 1)
            .start();
        client.write("/etc/nix/offload.toml", NO_SAMPLES);
        let gates = [name("one"), name("two")];
        let running = gates.each_ref().map(|gate| {
            let running = client.spawn_nix_build(&gated(gate), &["-j0"]);
            wait_until("a machine is full", SOON, || !begun_on(&client, gate).is_empty());
            running
        });
        let [first, second] = ["first", "second"].map(|it| {
            let waits = client.spawn_nix_build(&gated(&name(it)), &["-j0"]);
            let said = ".drv' waits for a slot of ssh-ng://mac, ssh-ng://pi";
            wait_until("it says so", SOON, || waits.stderr_so_far().contains(said));
            waits
        });
        let queued = second.stderr_so_far();
        assert!(queued.contains("ssh-ng://pi, and so does 1 other build\n"), "{queued}");
        // Nix has said that both are built on the first of the list.
        let on_pi = gates.iter().position(|gate| begun_on(&client, gate) == ["pi"]).unwrap();
        open(&client, &gates[on_pi]);
        wait_for_begin(&client, &name("first"), &["pi"]);
        open(&client, &gates[1 - on_pi]);
        wait_for_begin(&client, &name("second"), &["mac"]);
        for it in ["first", "second"] {
            open(&client, &name(it));
        }
        let (first, second) = (first.wait(), second.wait());
        first
            .assert_success()
            .assert_stderr_has(&format!("-{}.drv' on 'ssh-ng://pi' instead\n", name("first")));
        first.assert_stderr_lacks("other build");
        second.assert_success().assert_stderr_lacks("instead");
        for build in running {
            build.wait().assert_success();
        }
    }
}

#[test]
fn a_build_that_waits_bears_it_that_slots_cannot_be_looked_at_for_a_while() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let before = hooks(&client);
    let first = client.spawn_nix_build(&list([noting("first", "")].into_iter()), &["-j0"]);
    wait_until("it waits", SOON, || waiting(&client, "") == 1);
    let hook = *hooks(&client).difference(&before).next().unwrap();
    let second = client.spawn_nix_build(&list([noting("second", "")].into_iter()), &["-j0"]);
    wait_until("the second, too", SOON, || waiting(&client, "") == 2);
    client.run("mv /nix/var/nix/current-load /nix/var/nix/away");
    // Now it is the turn of the second, which can neither watch nor count.
    client.kill(hook, "KILL");
    first.wait().assert_failure();
    let trouble = "cannot use /nix/var/nix/current-load";
    wait_until("the user is told", SOON, || second.stderr_so_far().contains(trouble));
    client.run("mv /nix/var/nix/away /nix/var/nix/current-load");
    open(&client, "gate");
    gate.wait().assert_success();
    let second = second.wait();
    assert_eq!(second.assert_success().stderr().matches(trouble).count(), 1, "{second}");
    assert_eq!(begun(&client), ["second"]);
    assert_eq!(held_locks(&client), "");
}

#[test]
fn a_machine_that_was_down_gets_a_build_that_waits_for_another_one() {
    let world = World::new();
    let (mut back, mac) = (world.builder("back").start(), world.builder("mac").start());
    let client = plan(&world)
        .knows(&back)
        .knows(&mac)
        .machines("ssh-ng://mac x86_64-linux - 1 1\nssh-ng://back x86_64-linux - 1 1")
        .start();
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    back.stop_sshd();
    // The hook that is to wait has found it down itself.
    let build = client.spawn_nix_build(&drv::where_built("a"), &["-j0"]);
    wait_until("it waits for the other one", SOON, || waiting(&client, "") == 1);
    wait_until("the user is told", SOON, || {
        build.stderr_so_far().contains("cannot build on 'ssh-ng://back'")
    });
    back.start_sshd();
    assert_eq!(client.read(&build.wait().assert_success().out_path()), "back\n");
    open(&client, "gate");
    gate.wait().assert_success();
}

#[test]
fn the_time_that_a_build_ran_is_no_time_that_it_waited() {
    let world = World::new();
    let mac = world.builder("mac").nix_conf("system-features = special").start();
    let mut tin = world.builder("tin").start();
    let client = plan(&world)
        .knows(&mac)
        .knows(&tin)
        .machines("ssh-ng://mac x86_64-linux - 1 1 special\nssh-ng://tin x86_64-linux - 1 1\n")
        .start();
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    let special = |name: &str| picky(name, "special");
    let gate = client.spawn_nix_build(&special("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let runs = client.spawn_nix_build(&gated("runs"), &["-j0"]);
    wait_for_begin(&client, "runs", &["tin"]);
    // Whoever has the turn keeps it. Nix asks for the one behind it later than for the one that runs, but it waits first.
    let turn = client.spawn_nix_build(&special("turn"), &["-j0"]);
    wait_until("one has the turn", SOON, || waiting(&client, "") == 1);
    let waits = client.spawn_nix_build(&special("waits"), &["-j0"]);
    wait_until("one waits behind it", SOON, || waiting(&client, "") == 2);
    tin.stop();
    wait_until("the one that ran waits, too", SOON, || waiting(&client, "") == 3);
    open(&client, "gate");
    wait_for_begin(&client, "turn", &["mac"]);
    open(&client, "turn");
    wait_for_begin(&client, "waits", &["mac"]);
    assert_eq!(begun_on(&client, "runs"), ["tin"]);
    open(&client, "waits");
    wait_for_begin(&client, "runs", &["tin", "mac"]);
    open(&client, "runs");
    for build in [gate, turn, waits, runs] {
        let output = build.wait();
        assert_eq!(client.read(&output.assert_success().out_path()), "mac\n", "{output}");
    }
}

#[test]
fn that_there_is_no_place_in_another_line_is_told_once_and_the_build_waits_all_the_same() {
    let world = World::new();
    let (client, _builders, [fastgate, slowgate]) = fast_and_slow(&world, "[choice]\nhold-back = '12s'\n");
    let long = client.spawn_nix_build(&gated("long"), &["-j0"]);
    wait_until("it waits", SOON, || long.stderr_so_far().contains("waits for a slot of"));
    client.run("cd /run/nix-offload/queue && rm door && mkdir door");
    // From now on it is held back for the fast machine, and looks at the slots every two seconds.
    open(&client, "slowgate");
    slowgate.wait().assert_success();
    wait_for_begin(&client, "long", &["slow"]);
    for name in ["long", "fastgate"] {
        open(&client, name);
    }
    fastgate.wait().assert_success();
    let built = long.wait();
    let told = built.assert_success().stderr().matches("to wait for a slot").count();
    assert_eq!(told, 1, "{built}");
}
