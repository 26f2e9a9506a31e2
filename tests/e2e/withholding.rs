//! `drain`, `disable` and `enable`: machines out of service.

use harness::{Client, ClientPlan, Hook, Mode, OURS, Output, Release, World, drv, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{NO_SAMPLES, SOON, begun, gated, open, wait_for_begin};

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

fn json(output: &Output) -> Value {
    serde_json::from_str(output.assert_success().stdout()).unwrap_or_else(|error| panic!("{error}: {output}"))
}

fn built_on(client: &Client, name: &str) -> String {
    let output = client.nix_build(&drv::where_built(name), &["-j0"]);
    client.read(&output.assert_success().out_path()).trim().to_owned()
}

#[test]
fn a_drained_machine_finishes_its_build_and_gets_no_other_one() {
    let world = World::new();
    let (mac, pi) = (world.builder("mac").start(), world.builder("pi").start());
    for release in Release::ALL {
        let name = release.name();
        let client = plan(&world)
            .named(name)
            .release(release)
            .uses(&mac, "ssh-ng", 4)
            .machines("ssh-ng://pi x86_64-linux - 4 0.1\n")
            .knows(&pi)
            .start();
        client.write("/etc/nix/offload.toml", NO_SAMPLES);
        let running = format!("running-{name}");
        let build = client.spawn_nix_build(&gated(&running), &["-j0"]);
        wait_for_begin(&client, &running, &["mac"]);
        let drained = client.nix_offload(&["drain", "mac", "--for", "2h", "--reason", "a new\ndisk"]);
        let text = drained.assert_success().stdout();
        assert!(text.starts_with("ssh-ng://mac is drained until 20"), "{text}");
        assert!(text.contains(" (2 h): a new disk\n  1 build runs there and is left to finish."), "{text}");
        assert!(text.contains(&format!("\n    {running}, for ")), "{text}");
        assert_eq!(built_on(&client, &format!("second-{name}")), "pi");
        open(&client, &running);
        assert_eq!(client.read(&build.wait().assert_success().out_path()), "mac\n");
        assert_eq!(built_on(&client, &format!("third-{name}")), "pi");
        let enabled = client.nix_offload(&["enable", "MAC"]);
        assert_eq!(enabled.assert_success().stdout(), "ssh-ng://mac is enabled: it gets builds again\n");
        assert_eq!(built_on(&client, &format!("fourth-{name}")), "mac");
    }
}

#[test]
fn what_is_said_for_a_time_ends_by_itself() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let list = json(&client.nix_offload(&["drain", "--json", "mac", "--for", "2s"]));
    assert_eq!(
        (&list[0]["machine"], &list[0]["state"], &list[0]["changed"], &list[0]["running"]),
        (&"ssh-ng://mac".into(), &"drained".into(), &true.into(), &0.into())
    );
    assert!(list[0]["until"].as_u64().unwrap() > 1_700_000_000, "{list}");
    assert_eq!((&list[0]["reason"], &list[0]["derivations"]), (&Value::Null, &Value::Array(Vec::new())));
    // It waits, and Nix asks again.
    assert_eq!(built_on(&client, "a"), "mac");
    let said = client.nix_offload(&["enable", "mac"]);
    assert_eq!(said.assert_success().stdout(), "ssh-ng://mac was not out of service\n");
}

#[test]
fn what_was_said_before_is_not_lost_because_a_part_of_it_cannot_be_read() {
    const FILE: &str = "/var/lib/nix-offload/withheld.json";
    let world = World::new();
    let (mac, pi) = (world.builder("mac").start(), world.builder("pi").start());
    let client = plan(&world).uses(&mac, "ssh-ng", 1).uses(&pi, "ssh-ng", 1).start();
    client.nix_offload(&["disable", "mac", "--reason", "on fire"]).assert_success();
    let written = client.read(FILE);
    let edited = written.replacen('{', r#"{ "ssh-ng://old": "disabled","#, 1);
    client.write_mode(FILE, &edited, 0o600);
    for (command, machine) in [("drain", "pi"), ("enable", "mac")] {
        let refused = client.nix_offload(&[command, machine]);
        assert_eq!(refused.code(), 78, "{refused}");
        refused.assert_stderr_has(FILE).assert_stderr_has("'ssh-ng://old'").assert_stderr_has("or delete it");
        assert_eq!(client.read(FILE), edited);
    }
    assert_eq!(built_on(&client, "a"), "pi", "what can be read counts");
    client.write_mode(FILE, &written, 0o600);
    client.nix_offload(&["enable", "mac"]).assert_success();
    assert_eq!(built_on(&client, "b"), "mac");
}

#[test]
fn a_build_that_only_a_drained_machine_can_do_waits_until_it_is_enabled() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for release in Release::ALL {
        let name = release.name();
        let client = plan(&world).named(name).release(release).uses(&mac, "ssh-ng", 1).start();
        client.nix_offload(&["drain", "mac", "--reason", "new disk"]).assert_success();
        let build = client.spawn_nix_build(&drv::where_built(&format!("a-{name}")), &["-j0"]);
        wait_until("the user is told", SOON, || build.stderr_so_far().contains("drained: new disk"));
        client.nix_offload(&["enable", "mac"]).assert_success();
        let build = build.wait();
        assert_eq!(client.read(&build.assert_success().out_path()), "mac\n");
        assert_eq!(build.stderr().matches("drained: new disk").count(), 1, "{build}");
    }
}

#[test]
fn a_build_that_waits_for_a_slot_says_so_when_its_machine_is_drained_meanwhile() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let build = client.spawn_nix_build(&drv::where_built("a"), &["-j0"]);
    wait_until("it waits here", SOON, || {
        client.entries("/run/nix-offload/queue").iter().any(|name| name.contains("-all."))
    });
    client.nix_offload(&["drain", "mac", "--reason", "new disk"]).assert_success();
    open(&client, "gate");
    gate.wait().assert_success();
    wait_until("the user is told", SOON, || build.stderr_so_far().contains("drained: new disk"));
    client.nix_offload(&["enable", "mac"]).assert_success();
    let build = build.wait();
    assert_eq!(client.read(&build.assert_success().out_path()), "mac\n");
    assert_eq!(build.stderr().matches("drained: new disk").count(), 1, "{build}");
    build.assert_stderr_has("it waits for one, for 10 min at most");
}

/// Sets back by that many seconds what is kept of requests: by what, when it was first asked for, the last time, and since
/// when there are obstacles.
fn set_back(client: &Client, first: u64, obstructed: u64) {
    client.run(&format!(
        "for file in /run/nix-offload/asked/*; do \
         awk -F '\t' '{{ split($2, t, \" \"); print $1 \"\\t\" t[1] - {first} \" \" t[2] \" \" t[3] - {obstructed} }}' \
         $file > /tmp/asked; cat /tmp/asked > $file; done"
    ));
}

#[test]
fn those_behind_need_not_wait_for_an_obstacle_as_long_again() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    // The second has waited for long when it comes to stand behind the first.
    client.nix_offload(&["drain", "mac"]).assert_success();
    let second = client.spawn_nix_build(&drv::where_built("second"), &["-j0"]);
    wait_until("it is told", SOON, || second.stderr_so_far().contains("no machine can take"));
    second.signal(Signal::SIGINT);
    second.wait().assert_failure();
    set_back(&client, 1000, 0);
    client.nix_offload(&["enable", "mac"]).assert_success();
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let wait = |name: &str, count: usize| {
        let build = client.spawn_nix_build(&drv::where_built(name), &["-j0"]);
        wait_until("it waits here", SOON, || {
            client.entries("/run/nix-offload/queue").iter().filter(|name| name.contains("-u")).count()
                == count
        });
        build
    };
    let (first, second) = (wait("first", 1), wait("second", 2));
    client.nix_offload(&["drain", "mac", "--reason", "new disk"]).assert_success();
    open(&client, "gate");
    gate.wait().assert_success();
    wait_until("the first is told", SOON, || first.stderr_so_far().contains("no machine can take"));
    // As if it had been told that long ago.
    set_back(&client, 0, 1000);
    first.signal(Signal::SIGINT);
    first.wait().assert_failure();
    second.wait().assert_failure().assert_stderr_has("nothing can build").assert_stderr_has("new disk");
}

#[test]
fn a_build_that_comes_into_a_line_has_its_own_patience() {
    let world = World::new();
    let mac = world.builder("mac").nix_conf("system-features = special").start();
    let mut tin = world.builder("tin").start();
    let client = plan(&world)
        .knows(&mac)
        .knows(&tin)
        .machines("ssh-ng://mac x86_64-linux - 1 1 special\nssh-ng://tin x86_64-linux - 1 1\n")
        .start();
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    let waits_on_mac = |name: &str| {
        let needs = "{ requiredSystemFeatures = [ \"special\" ]; }";
        let build = drv::expression(&format!(r#"d "{name}" "cat /etc/machine-name > $out" {needs}"#));
        client.spawn_nix_build(&build, &["-j0"])
    };
    let waiting =
        || client.entries("/run/nix-offload/queue").iter().filter(|name| name.contains("-u")).count();
    let is_told = |build: &harness::Running| {
        wait_until("it is told", SOON, || build.stderr_so_far().contains("no machine can take"));
    };
    let gate = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let runs = client.spawn_nix_build(&gated("runs"), &["-j0"]);
    wait_for_begin(&client, "runs", &["tin"]);
    let first = waits_on_mac("first");
    wait_until("the first waits", SOON, || waiting() == 1);
    client.nix_offload(&["drain", "mac", "--reason", "new disk"]).assert_success();
    open(&client, "gate");
    gate.wait().assert_success();
    is_told(&first);
    tin.stop();
    wait_until("the other one stands behind it", SOON, || waiting() == 2);
    // As if the first had waited for that long, and gave up.
    set_back(&client, 0, 1000);
    first.signal(Signal::SIGINT);
    first.wait().assert_failure();
    is_told(&runs);
    client.nix_offload(&["enable", "mac"]).assert_success();
    open(&client, "runs");
    let built = runs.wait();
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n", "{built}");
}

#[test]
fn patience_with_a_drained_machine_begins_when_it_is_drained() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    client.nix_offload(&["drain", "mac", "--reason", "new disk"]).assert_success();
    let wait = || {
        let build = client.spawn_nix_build(&drv::where_built("a"), &["-j0"]);
        wait_until("the user is told", SOON, || build.stderr_so_far().contains("no machine can take"));
        build
    };
    let set_back = |first, obstructed| set_back(&client, first, obstructed);
    let interrupt = |build: harness::Running| {
        build.signal(Signal::SIGINT);
        build.wait().assert_failure();
    };
    interrupt(wait());
    // As if it had been in a queue for longer than obstacles are waited for.
    set_back(1000, 0);
    interrupt(wait());
    set_back(0, 1000);
    let refused = client.nix_build(&drv::where_built("a"), &["-j0"]);
    refused.assert_failure().assert_stderr_has("nothing can build");
}

#[test]
fn a_build_does_not_wait_for_a_disabled_machine() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let text = client.nix_offload(&["disable", "ssh-ng://mac"]);
    assert!(
        text.assert_success().stdout().starts_with("ssh-ng://mac is disabled until it is enabled\n"),
        "{text}"
    );
    let build = client.nix_build(&drv::trivial("a"), &["-j0"]);
    build.assert_failure().assert_stderr_has("  ssh-ng://mac  disabled");
    // What can be built here is.
    let build = client.nix_build(&drv::where_built("b"), &["-j1"]);
    assert_eq!(client.read(&build.assert_success().out_path()), "client\n");
    assert_eq!(begun(&client, "a"), [""; 0]);
}

#[test]
fn names_mean_every_machine_of_a_host_and_unknown_ones_are_told() {
    let world = World::new();
    let client = plan(&world)
        .machines("ssh-ng://nix@mac x86_64-linux\nssh://mac:2222?compress=true x86_64-linux\nssh://pi x86_64-linux\n")
        .start();
    let list = json(&client.nix_offload(&["disable", "--json", "mac"]));
    let names: Vec<&Value> = list.as_array().unwrap().iter().map(|done| &done["machine"]).collect();
    assert_eq!(names, ["ssh-ng://nix@mac", "ssh://mac:2222?compress=true"]);
    let unknown = client.nix_offload(&["drain", "pii", "mac"]);
    assert_eq!(unknown.code(), 2, "{unknown}");
    unknown.assert_stderr_has("error: no machine is called 'pii'; the machines are ssh-ng://nix@mac, ssh://");
    unknown.assert_stderr_has("hint: did you mean 'pi'?");
    // One that is out of service can be put back though it is in the list no more.
    client.set_machines("ssh://pi x86_64-linux\n");
    let enabled = json(&client.nix_offload(&["enable", "--json", "nix@mac"]));
    assert_eq!((&enabled[0]["machine"], &enabled[0]["changed"]), (&"ssh-ng://nix@mac".into(), &true.into()));
    assert_eq!(client.nix_offload(&["drain", "nix@mac"]).code(), 2);
    // A list of one's own.
    let list = json(&client.nix_offload(&["drain", "--json", "--builders", "ssh://big", "big"]));
    assert_eq!(list[0]["machine"], "ssh://big");
}

#[test]
fn whose_hook_it_is_decides_whose_word_counts() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).mode(Mode::Daemon).uses(&mac, "ssh-ng", 1).start();
    for command in ["drain", "disable", "enable"] {
        let refused = client.nix(OURS).args([command, "mac"]).run();
        assert_eq!(refused.code(), 77, "{refused}");
        refused.assert_stderr_has("its hook, which runs as root; you are ");
        refused.assert_stderr_has("hint: run the same with sudo");
        // With a store of his own it is his own hook.
        let own = client.nix(OURS).args([command, "mac", "--store", "/home/user/nix"]).run();
        own.assert_success();
    }
    assert_eq!(built_on(&client, "a"), "mac");
    client.nix_offload(&["disable", "mac"]).assert_success();
    client.nix_build(&drv::trivial("b"), &["-j0"]).assert_failure().assert_stderr_has("disabled");
    client.nix_offload(&["enable", "mac"]).assert_success();
    assert_eq!(built_on(&client, "c"), "mac");
}

#[test]
fn nixs_own_hook_gets_no_machine_that_is_out_of_service() {
    let world = World::new();
    let features = "extra-experimental-features = ca-derivations";
    let mac = world.builder("mac").release(Release::Sid).nix_conf(features).start();
    let client = plan(&world)
        .release(Release::Sid)
        .nix_conf(features)
        .knows(&mac)
        .machines("ssh-ng://mac x86_64-linux - 2 1 ca-derivations")
        .start();
    let floating = |name: &str| {
        drv::expression(&format!(
            r#"d "{name}" "cat /etc/machine-name > $out" {{
              __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
            }}"#
        ))
    };
    client.nix_offload(&["disable", "mac"]).assert_success();
    let refused = client.nix_build(&floating("a"), &["-j0"]);
    refused
        .assert_failure()
        .assert_stderr_has("the machines that could do it are out of service: ssh-ng://mac");
    client.nix_offload(&["enable", "mac"]).assert_success();
    let built = client.nix_build(&floating("a"), &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n");
}
