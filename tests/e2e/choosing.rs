//! Which machine gets a build, as the settings, the builds and what is known of the machines say.

use harness::{Builder, Client, ClientPlan, Hook, Output, World, drv};

use crate::support::{NO_SAMPLES, begun, gated, open, wait_for_begin};

/// A client with these machines, eight slots each, and a text for offload.toml.
fn client(world: &World, builders: &[&Builder], toml: &str) -> Client {
    let plan = |plan: ClientPlan, builder: &&Builder| {
        let line = format!("ssh-ng://{} x86_64-linux - 8 1 big-parallel\n", builder.alias());
        plan.knows(builder).machines(&line)
    };
    let client = builders.iter().fold(world.client().hook(Hook::Ours), plan).start();
    client.write("/etc/nix/offload.toml", toml);
    client
}

#[track_caller]
fn assert_built_on(client: &Client, output: &Output, machine: &str) {
    assert_eq!(client.read(&output.assert_success().out_path()), format!("{machine}\n"), "{output}");
}

#[test]
fn policies_say_what_the_clients_own_machine_is_for() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac], "");
    for (number, (choice, jobs, expected)) in [
        ("", "-j1", "mac"),
        ("policy = 'remote-first'", "-j1", "mac"),
        ("policy = 'local-first'", "-j1", "client"),
        // Nix could never build it here.
        ("policy = 'local-first'", "-j0", "mac"),
        ("policy = 'cost'\nlocal-speed-factor = 1000", "-j1", "client"),
        ("policy = 'cost'\nlocal-speed-factor = 1000", "-j0", "mac"),
        ("policy = 'cost'\nlocal-speed-factor = 0.001", "-j1", "mac"),
    ]
    .into_iter()
    .enumerate()
    {
        client.write("/etc/nix/offload.toml", &format!("[choice]\n{choice}\n"));
        let built = client.nix_build(&drv::where_built(&format!("policy-{number}")), &[jobs]);
        assert_built_on(&client, &built, expected);
    }
}

#[test]
fn a_big_build_takes_several_slots() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac], "[choice]\nbig-parallel-slots = 5\n");
    let big = |name: &str| {
        let script = format!(
            "cat /etc/machine-name >> /mnt/share/{name}.begun; \
             until [ -e /mnt/share/{name}.go ]; do sleep 0.02; done; cat /etc/machine-name > $out"
        );
        let script = drv::quote(&script);
        drv::expression(&format!(r#"d "{name}" {script} {{ requiredSystemFeatures = [ "big-parallel" ]; }}"#))
    };
    let held = "cd /nix/var/nix/current-load; for slot in *mac-*; do flock -n $slot true || echo $slot; done | wc -l";
    let first = client.spawn_nix_build(&big("first"), &["-j0"]);
    wait_for_begin(&client, "first", &["mac"]);
    assert_eq!(client.run(held).trim(), "5");
    let second = client.spawn_nix_build(&big("second"), &["-j0"]);
    // Of the three that are left a small one is not kept.
    let small = client.spawn_nix_build(&gated("small"), &["-j0"]);
    wait_for_begin(&client, "small", &["mac"]);
    assert_eq!(client.run(held).trim(), "6");
    assert_eq!(begun(&client, "second"), Vec::<String>::new());
    open(&client, "first");
    assert_built_on(&client, &first.wait(), "mac");
    wait_for_begin(&client, "second", &["mac"]);
    for name in ["second", "small"] {
        open(&client, name);
    }
    assert_built_on(&client, &second.wait(), "mac");
    assert_built_on(&client, &small.wait(), "mac");
    assert_eq!(client.run(held).trim(), "0");
}

#[test]
fn what_nix_does_itself_is_not_sent_away_unless_nobody_else_can() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac], "");
    // The file is another one on each machine, so that its hash tells where it was fetched.
    for (machine, jobs) in [("client", "-j1"), ("mac", "-j0")] {
        let hash = client.run(&format!("echo {machine} | sha256sum | cut -d' ' -f1"));
        let fetched = format!(
            r#"derivation {{ name = "fetched"; system = "builtin"; builder = "builtin:fetchurl";
               url = "file:///etc/machine-name"; outputHash = "{}"; outputHashAlgo = "sha256";
               outputHashMode = "flat"; executable = false; unpack = false; }}"#,
            hash.trim()
        );
        assert_built_on(&client, &client.nix_build(&fetched, &[jobs]), machine);
    }
}

#[test]
fn a_build_goes_where_its_large_input_is() {
    let world = World::new();
    let [mac, tin] = ["mac", "tin"].map(|name| world.builder(name).start());
    let client = client(&world, &[&mac, &tin], NO_SAMPLES);
    // Nothing is known: the earlier one in the list.
    let mac_only = client.spawn_nix_build(&gated("apart"), &["-j0"]);
    wait_for_begin(&client, "apart", &["mac"]);
    let large = |next: &str| {
        let large = "head -c 200M /dev/urandom > $out; cat /etc/machine-name >> /mnt/share/large.begun";
        let next = drv::quote(&format!("read -rN1 < ${{large}}; cat /etc/machine-name > $out # {next}"));
        let next = next.replace("\\${large}", "${large}");
        drv::expression(&format!(
            r#"let large = d "large" {} {{ }}; in d "next" {next} {{ }}"#,
            drv::quote(large)
        ))
    };
    // The first machine has less to do now, and the second gets it.
    let built = client.nix_build(&large("one"), &["-j0"]);
    assert_built_on(&client, &built, "tin");
    assert_eq!(begun(&client, "large"), ["tin"]);
    open(&client, "apart");
    assert_built_on(&client, &mac_only.wait(), "mac");
    // Now the first one is idle, but would have to be sent the input.
    for again in ["two", "three"] {
        assert_built_on(&client, &client.nix_build(&large(again), &["-j0"]), "tin");
    }
    assert_built_on(&client, &client.nix_build(&drv::where_built("other"), &["-j0"]), "mac");
}

#[test]
fn a_long_build_waits_for_the_fast_machine_if_that_will_be_free_soon() {
    let world = World::new();
    let [mac, tin] = ["mac", "tin"].map(|name| world.builder(name).start());
    let client = world
        .client()
        .hook(Hook::Ours)
        .knows(&mac)
        .knows(&tin)
        .machines("ssh-ng://mac x86_64-linux - 1 8\nssh-ng://tin x86_64-linux - 1 1\n")
        .start();
    // Both have the load of the machine that this test runs on.
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    let waiting = "cd /run/nix-offload/queue 2>/dev/null || exit 0; \
                   for place in *; do flock -n $place true || echo $place; done";
    // While nothing is known a build takes what is free.
    let first = client.spawn_nix_build(&gated("busy-0"), &["-j0"]);
    wait_for_begin(&client, "busy-0", &["mac"]);
    assert_built_on(&client, &client.nix_build(&drv::where_built("unheard-of"), &["-j0"]), "tin");
    open(&client, "busy-0");
    assert_built_on(&client, &first.wait(), "mac");
    // On a machine of speed 8 two seconds are sixteen of the usual ones.
    for name in ["busy-1", "work-1"] {
        let known = drv::script(name, "sleep 2; cat /etc/machine-name > $out");
        assert_built_on(&client, &client.nix_build(&known, &["-j0"]), "mac");
    }
    let busy = client.spawn_nix_build(&gated("busy-2"), &["-j0"]);
    wait_for_begin(&client, "busy-2", &["mac"]);
    let work = client.spawn_nix_build(&gated("work-2"), &["-j0"]);
    harness::wait_until("the build waits", crate::support::SOON, || !client.run(waiting).is_empty());
    assert_eq!(begun(&client, "work-2"), Vec::<String>::new());
    open(&client, "work-2");
    open(&client, "busy-2");
    assert_built_on(&client, &busy.wait(), "mac");
    assert_built_on(&client, &work.wait(), "mac");
}

#[test]
fn how_long_builds_took_is_remembered_by_the_packages_name() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac], "");
    let seconds = || {
        let kept = client.run("grep -rh '^thing\t' /var/lib/nix-offload/history || true");
        kept.split_whitespace().nth(1).map(|text| text.parse::<f64>().unwrap())
    };
    assert_eq!(seconds(), None);
    client.nix_build(&drv::script("thing-1.0", "sleep 1; echo > $out"), &["-j0"]).assert_success();
    assert!(seconds().is_some_and(|seconds| (1.0..20.0).contains(&seconds)), "{:?}", seconds());
    client.nix_build(&drv::trivial("thing-1.1"), &["-j0"]).assert_success();
    let kept = client.run("grep -rh '^thing\t' /var/lib/nix-offload/history");
    assert!(kept.trim_end().ends_with(" 2"), "{kept}");
    // A build that fails tells nothing of how long it takes.
    client.nix_build(&drv::failing("thing-1.2", "no", 1), &["-j0"]).assert_failure();
    assert_eq!(client.run("grep -rh '^thing\t' /var/lib/nix-offload/history"), kept);
}

#[test]
fn a_fault_in_the_settings_is_told_with_its_place_and_builds_go_on_here() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac], "[choice]\npolcy = 'cost'\n");
    let built = client.nix_build(&drv::where_built("here"), &["-j1"]);
    assert_built_on(&client, &built, "client");
    built.assert_stderr_has("/etc/nix/offload.toml:2:1: unknown field `polcy`");
    built.assert_stderr_has("did you mean `policy`?");
    let checked = client.nix_offload(&["check"]);
    checked.assert_failure();
    assert!(checked.stdout().contains("/etc/nix/offload.toml:2:1"), "{checked}");
}

#[test]
fn a_table_for_a_machine_that_is_not_in_the_list_is_told_by_check() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac], "[[machine]]\nname = ['mac', 'mca']\nshared-slots = 3\n");
    let checked = client.nix_offload(&["check"]);
    let told = format!("{}{}", checked.stdout(), checked.stderr());
    assert!(told.contains("[[machine]] for 'mca', and no machine has that host"), "{checked}");
    assert!(!told.contains("for 'mac'"), "{checked}");
}
