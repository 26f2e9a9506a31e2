//! Builds that run are begun anew on a machine that is much faster or has less to do, when that is free and nobody waits.

use std::time::Duration;

use harness::{Client, ClientPlan, Hook, Output, World, drv, event, wait_until};

use crate::support::{
    NO_SAMPLES, OFTEN, SOON, begun, gated, held_locks, open, picky, pretend, sleeping, wait_for_begin,
};

/// A build is looked at when it has run for 20 seconds, and every 10 seconds from then on.
const LOOKED_AT: Duration = Duration::from_secs(90);

fn plan(world: &World, name: &str) -> ClientPlan {
    world.client().named(name).hook(Hook::Ours).journald().env("NIX_OFFLOAD_LOG", "debug")
}

/// Ends on one machine only, and there after [`open`]. Says a word and is silent from then on, and notes where it was begun.
fn endless_but_on(machine: &str, name: &str, seconds: &str) -> String {
    let script = format!(
        "here=$(cat /etc/machine-name); echo begun on $here; echo $here >> /mnt/share/{name}.begun; \
         [ $here = {machine} ] || exec sleep {seconds}; \
         until [ -e /mnt/share/{name}.go ]; do sleep 0.02; done; echo $here > $out"
    );
    drv::script(name, &script)
}

/// Why builds that run were left where they are.
fn left_alone(client: &Client, reason: &str) -> bool {
    let entries = client.journal("-t nix-offload");
    entries.iter().any(|entry| event(entry) == "not begun anew" && entry["REASON"] == reason)
}

/// The one message about it, from the first word on.
fn told(output: &Output) -> String {
    let told: Vec<&str> = output.stderr().lines().filter(|line| line.contains("' anew on '")).collect();
    assert_eq!(told.len(), 1, "{output}");
    told[0].to_owned()
}

#[test]
fn a_long_build_is_begun_anew_on_a_fast_machine_when_nobody_waits_any_more() {
    let world = World::new();
    let [mac, tin] = ["mac", "tin"].map(|name| world.builder(name).start());
    let pi = world.builder("pi").nix_conf("system-features = special").start();
    let client = plan(&world, "client")
        .knows(&mac)
        .knows(&tin)
        .knows(&pi)
        .machines("ssh-ng://mac x86_64-linux - 1 8\nssh-ng://tin x86_64-linux - 1 1\n")
        .machines("ssh-ng://pi x86_64-linux - 1 1 special special\n")
        .start();
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let long = client.spawn_nix_build(&endless_but_on("mac", "long", "4711"), &["-j0"]);
    wait_for_begin(&client, "long", &["tin"]);
    // Somebody waits for a third machine, which is full.
    let on_pi = client.spawn_nix_build(&picky("first", "special"), &["-j0"]);
    wait_for_begin(&client, "first", &["pi"]);
    let waits = client.spawn_nix_build(&picky("second", "special"), &["-j0"]);
    wait_until("a build waits", SOON, || !client.entries("/run/nix-offload/queue").is_empty());
    open(&client, "gate");
    gate.wait().assert_success();
    wait_until("it was looked at", LOOKED_AT, || left_alone(&client, "builds wait for a slot"));
    assert_eq!(begun(&client, "long"), ["tin"]);
    for name in ["first", "second"] {
        open(&client, name);
    }
    on_pi.wait().assert_success();
    waits.wait().assert_success();
    assert_eq!(begun(&client, "long"), ["tin"]);

    wait_until("it is begun anew", LOOKED_AT, || begun(&client, "long") == ["tin", "mac"]);
    wait_until("it has ended on the slow machine", SOON, || sleeping(&tin, "4711").is_empty());
    open(&client, "long");
    let long = long.wait();
    assert_eq!(client.read(&long.assert_success().out_path()), "mac\n");
    assert_eq!(begun(&client, "long"), ["tin", "mac"]);
    let message = told(&long);
    assert!(message.contains("-long.drv' anew on 'ssh-ng://mac': it would take about "), "{message}");
    assert!(message.contains(" more on 'ssh-ng://tin', "), "{message}");
    for never in ["connection was lost", "cannot build", "instead", "error"] {
        long.assert_stderr_lacks(never);
    }
    let log = client.build_log(&long.out_path());
    assert_eq!(log, "begun on tin\nbegun on mac\n");
    assert_eq!(held_locks(&client), "");
    // Only the time on the fast machine counts, where each second is eight.
    let history = client.run("grep -rh '^long\t' /var/lib/nix-offload/history");
    let seconds: f64 = history.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(seconds < 8.0 * 15.0 && history.trim_end().ends_with(" 1"), "{history}");
    let drv = message.split('\'').nth(1).unwrap();
    let last = client.nix_offload(&["explain", "--last", drv]);
    let last = last.assert_success().stdout();
    assert!(last.contains("built on ssh-ng://mac"), "{last}");
    // Nobody is to blame for it, and the slow machine builds on.
    let status = client.nix_offload(&["status"]);
    assert!(!status.assert_success().stdout().contains("failed"), "{status}");
    client.set_machines("ssh-ng://tin x86_64-linux - 1 1\n");
    let next = client.nix_build(&drv::where_built("next"), &["-j0"]);
    assert_eq!(client.read(&next.assert_success().out_path()), "tin\n");
    assert_eq!((mac.logins(), tin.logins()), (1, 1));
    client.verify_store();
    tin.verify_store();
}

#[test]
fn builds_end_where_they_were_by_every_way_to_a_machine_and_stay_if_that_is_wanted() {
    let world = World::new();
    let mac = world.builder("mac").nix_conf("system-features = gate").start();
    let slow = [
        world.builder("sock").start(),
        world.builder("pipe").refusing_forwarding().start(),
        world.builder("serve").start(),
    ];
    let uris = ["ssh-ng://sock", "ssh-ng://pipe", "ssh://serve?remote-program=/usr/bin/nix-store"];
    let client = |name: &str, machines: &[&str], settings: &str| {
        let plan = slow.iter().fold(plan(&world, name).knows(&mac), ClientPlan::knows);
        let slots = machines.len();
        let plan = plan.machines(&format!("ssh-ng://mac x86_64-linux - {slots} 8 gate\n"));
        let line = |plan: ClientPlan, uri: &&str| plan.machines(&format!("{uri} x86_64-linux - 1 1\n"));
        let client = machines.iter().fold(plan, line).start();
        client.write("/etc/nix/offload.toml", settings);
        client
    };
    let off = client("off", &uris[..1], &format!("{NO_SAMPLES}begin-anew = false\n"));
    let shared =
        client("shared", &uris[..1], &format!("{NO_SAMPLES}[[machine]]\nname = 'mac'\nshared-slots = 9\n"));
    let moving = client("client", &uris, NO_SAMPLES);
    // Each keeps the fast machine busy while the long builds begin.
    let mut builds = Vec::new();
    for (client, count) in [(&off, 1), (&shared, 1), (&moving, 3)] {
        let gates: Vec<_> = (0..count)
            .map(|number| {
                let name = format!("gate-{}-{number}", client.name());
                let gate = client.spawn_nix_build(&picky(&name, "gate"), &["-j0"]);
                wait_for_begin(client, &name, &["mac"]);
                (name, gate)
            })
            .collect();
        for number in 0..count {
            let name = format!("long-{}-{number}", client.name());
            let seconds = format!("47{}", 20 + builds.len());
            let build = client.spawn_nix_build(&endless_but_on("mac", &name, &seconds), &["-j0"]);
            wait_until("it is begun", SOON, || begun(client, &name).len() == 1);
            builds.push((client, name, seconds, build));
        }
        for (name, gate) in gates {
            open(client, &name);
            gate.wait().assert_success();
        }
    }
    let mut first = Vec::new();
    let moved = builds.split_off(2);
    for (_, name, seconds, _) in &moved {
        wait_until("it is begun anew", LOOKED_AT, || begun(&moving, name).len() == 2);
        let on = begun(&moving, name);
        assert_eq!(on[1], "mac", "{name}");
        let machine = slow.iter().find(|machine| machine.alias() == on[0]).unwrap();
        wait_until("nothing is left of it", SOON, || {
            sleeping(machine, seconds).is_empty() && machine.pids_matching("--serve").is_empty()
        });
        first.extend_from_slice(&on[..1]);
    }
    // The slots are free before the builds are over.
    let held = "cd /nix/var/nix/current-load; for slot in ssh*; do flock -n $slot true || echo $slot; done";
    wait_until("only slots of the fast machine are taken", SOON, || {
        let held = moving.run(held);
        held.lines().count() == 3 && held.lines().all(|slot| slot.contains("mac"))
    });
    for (_, name, _, build) in moved {
        open(&moving, &name);
        let built = build.wait();
        assert_eq!(moving.read(&built.assert_success().out_path()), "mac\n", "{name}");
        assert_eq!(begun(&moving, &name).len(), 2, "{name}");
        told(&built);
    }
    slow.iter().for_each(|machine| machine.verify_store());
    first.sort();
    assert_eq!(first, ["pipe", "serve", "sock"]);
    assert_eq!(held_locks(&moving), "");
    // Those that began before them are still where they were.
    for (client, name, seconds, build) in builds {
        assert_eq!(begun(client, &name), ["sock"], "{name}");
        assert_eq!(sleeping(&slow[0], &seconds).len(), 1, "{name}");
        build.signal(nix::sys::signal::Signal::SIGINT);
        build.wait().assert_failure().assert_stderr_lacks(" anew on ");
    }
}

#[test]
fn a_build_is_begun_anew_once_at_most() {
    let world = World::new();
    let [tin, mac, top] = ["tin", "mac", "top"].map(|name| {
        let features = format!("system-features = gate-{name}");
        world.builder(name).nix_conf(&features).start()
    });
    let client = plan(&world, "client")
        .knows(&tin)
        .knows(&mac)
        .knows(&top)
        .machines("ssh-ng://tin x86_64-linux - 1 1\nssh-ng://mac x86_64-linux - 1 8 gate-mac\n")
        .machines("ssh-ng://top x86_64-linux - 2 64 gate-top\n")
        .start();
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    let gates = [("one", "gate-mac"), ("two", "gate-top"), ("three", "gate-top")].map(|(name, feature)| {
        let gate = client.spawn_nix_build(&picky(name, feature), &["-j0"]);
        wait_until("a machine is busy", SOON, || begun(&client, name).len() == 1);
        gate
    });
    let first = client.spawn_nix_build(&gated("first"), &["-j0"]);
    wait_for_begin(&client, "first", &["tin"]);
    open(&client, "one");
    wait_until("it is begun anew", LOOKED_AT, || begun(&client, "first") == ["tin", "mac"]);
    let second = client.spawn_nix_build(&gated("second"), &["-j0"]);
    wait_for_begin(&client, "second", &["tin"]);
    for name in ["two", "three"] {
        open(&client, name);
    }
    for gate in gates {
        gate.wait().assert_success();
    }
    // By then the first one has run on its second machine for longer.
    wait_until("the second is begun anew", LOOKED_AT, || begun(&client, "second") == ["tin", "top"]);
    assert_eq!(begun(&client, "first"), ["tin", "mac"]);
    for (name, build, machine) in [("first", first, "mac\n"), ("second", second, "top\n")] {
        open(&client, name);
        let built = build.wait();
        assert_eq!(client.read(&built.assert_success().out_path()), machine);
        told(&built);
    }
    assert_eq!(held_locks(&client), "");
}

#[test]
fn a_build_is_not_ended_for_a_machine_that_does_not_answer() {
    let world = World::new();
    let mut mac = world.builder("mac").nix_conf("system-features = gate").start();
    let tin = world.builder("tin").start();
    let client = plan(&world, "client")
        .knows(&mac)
        .knows(&tin)
        .machines("ssh-ng://mac x86_64-linux - 1 8 gate\nssh-ng://tin x86_64-linux - 1 1\n")
        .start();
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    let gate = client.spawn_nix_build(&picky("gate", "gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let long = client.spawn_nix_build(&gated("long"), &["-j0"]);
    wait_for_begin(&client, "long", &["tin"]);
    open(&client, "gate");
    gate.wait().assert_success();
    mac.stop();
    let is_why = |reason: &str| reason.starts_with("'ssh-ng://mac': ");
    wait_until("it was looked at", LOOKED_AT, || {
        let entries = client.journal("-t nix-offload");
        entries
            .iter()
            .any(|entry| event(entry) == "not begun anew" && entry["REASON"].as_str().is_some_and(is_why))
    });
    assert_eq!(begun(&client, "long"), ["tin"]);
    assert!(held_locks(&client).lines().all(|lock| lock.contains("tin") || lock.ends_with(".lock")));
    open(&client, "long");
    let long = long.wait();
    assert_eq!(client.read(&long.assert_success().out_path()), "tin\n");
    long.assert_stderr_lacks(" anew on ").assert_stderr_lacks("connection was lost");
    assert_eq!(long.stderr().matches("cannot build on 'ssh-ng://mac'").count(), 1, "{long}");
}

#[test]
fn a_build_leaves_a_machine_that_others_crowd_for_one_that_they_do_not() {
    let world = World::new();
    let [mac, tin] = ["mac", "tin"].map(|name| world.builder(name).start());
    let client = plan(&world, "client").uses(&mac, "ssh-ng", 2).knows(&tin).start();
    client.write("/etc/nix/offload.toml", OFTEN);
    pretend(&mac, 0.5, 0.0);
    // There is a connection to one of them, so that the other is not tried beside it.
    client.nix_build(&drv::where_built("first"), &["-j0"]).assert_success();
    client.set_machines("ssh-ng://mac x86_64-linux - 2 1\nssh-ng://tin x86_64-linux - 2 1\n");
    let long = client.spawn_nix_build(&endless_but_on("tin", "long", "4713"), &["-j0"]);
    wait_for_begin(&client, "long", &["mac"]);
    wait_until("it is looked at", LOOKED_AT, || left_alone(&client, "it goes on well"));
    assert_eq!(tin.logins(), 0);
    pretend(&tin, 900.0, 100.0);
    pretend(&mac, 900.0, 100.0);
    wait_until("the other machine is asked", LOOKED_AT, || {
        left_alone(&client, "'ssh-ng://tin': its load is not known yet")
    });
    wait_until("that one is crowded too", LOOKED_AT, || {
        left_alone(&client, "no machine is that much better")
    });
    assert_eq!(begun(&client, "long"), ["mac"]);
    pretend(&tin, 0.5, 0.0);
    wait_until("it is begun anew", LOOKED_AT, || begun(&client, "long") == ["mac", "tin"]);
    wait_until("it has ended where it was", SOON, || sleeping(&mac, "4713").is_empty());
    open(&client, "long");
    let long = long.wait();
    assert_eq!(client.read(&long.assert_success().out_path()), "tin\n");
    let message = told(&long);
    assert!(message.contains(" more on 'ssh-ng://mac', "), "{message}");
    assert_eq!(begun(&client, "long"), ["mac", "tin"]);
    assert_eq!((held_locks(&client).as_str(), mac.logins(), tin.logins()), ("", 1, 1));
}

#[test]
fn a_machine_that_is_back_gets_the_build_that_it_lost() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let tin = world.builder("tin").start();
    let client = plan(&world, "client")
        .knows(&mac)
        .knows(&tin)
        .machines("ssh-ng://mac x86_64-linux - 4 8\nssh-ng://tin x86_64-linux - 4 1\n")
        .start();
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    let build = client.spawn_nix_build(&endless_but_on("mac", "long", "4711"), &["-j0"]);
    wait_for_begin(&client, "long", &["mac"]);
    mac.stop_sshd();
    client.run("/opt/nix-offload/bin/nix-offload-proxy stop --all");
    wait_until("it goes elsewhere", LOOKED_AT, || begun(&client, "long") == ["mac", "tin"]);
    // No other hook is there to find out: this one has to try the machine, and to forget that it failed.
    mac.start_sshd();
    wait_until("it is begun anew", LOOKED_AT, || begun(&client, "long") == ["mac", "tin", "mac"]);
    drop(build);
}
