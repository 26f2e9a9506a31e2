//! Which machine gets a derivation.

use std::time::Duration;

use harness::{Client, Hook, World, drv};

crate::theirs_and_ours!(
    nothing_is_built_here_with_j0,
    a_feature_leads_to_its_machine,
    two_machines_with_a_slot_each_get_one_each,
    the_first_of_equals_is_taken,
    a_faster_machine_is_preferred,
    a_machine_that_is_away_is_left_out,
    an_absent_machines_file_means_no_machines,
);

/// The text of a text file in the client's store.
fn text(client: &Client, path: &str) -> String {
    client.read(path).trim().to_owned()
}

fn nothing_is_built_here_with_j0(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    for protocol in ["ssh", "ssh-ng"] {
        let client = world.client().named(protocol).hook(hook.clone()).uses(&mac, protocol, 2).start();
        let graph = drv::expression(&format!(
            r#"let
              one = d "one-{protocol}" "cat /etc/machine-name > $out" {{ }};
              two = d "two-{protocol}" "cat /etc/machine-name > $out" {{ }};
              three = d "three-{protocol}" "cat ${{two}} /etc/machine-name > $out" {{ }};
            in d "all-{protocol}" "cat ${{one}} ${{two}} ${{three}} /etc/machine-name > $out" {{ }}"#
        ));
        let path = client.nix_build(&graph, &["-j0"]).assert_success().out_path();
        assert_eq!(text(&client, &path), ["mac"; 5].join("\n"));
        client.verify_store();
    }
    mac.verify_store();
}

fn a_feature_leads_to_its_machine(hook: Hook) {
    let world = World::new();
    // The features of a machine are the client's view of it; the builder has to agree.
    let builder = |name: &str, feature: &str| {
        world.builder(name).nix_conf(&format!("system-features = {feature}")).start()
    };
    let (with_foo, bar, with_baz) =
        (builder("with-foo", "foo"), builder("with-bar", "bar"), builder("with-baz", "baz"));
    let client = world
        .client()
        .hook(hook)
        .knows(&with_foo)
        .knows(&bar)
        .knows(&with_baz)
        .machines("ssh://with-foo x86_64-linux - 1 1 foo")
        .machines("ssh-ng://with-bar x86_64-linux - 1 1 bar,other")
        .machines("ssh-ng://with-baz x86_64-linux - 1 1 baz")
        .start();
    let graph = drv::expression(
        r#"let
          needs = feature: more: d "needs-${feature}" "{ cat /etc/machine-name; ${more} } > $out"
            { requiredSystemFeatures = [ feature ]; };
          bar = needs "bar" "";
          baz = needs "baz" "cat ${bar};";
        in d "all" "cat ${needs "foo" ""} ${bar} ${baz} > $out" { }"#,
    );
    let path = client.nix_build(&graph, &["-j0"]).assert_success().out_path();
    assert_eq!(text(&client, &path), "with-foo\nwith-bar\nwith-baz\nwith-bar");
    // The result of one was carried to the next one as an input; nothing else went there.
    assert!(with_baz.store_entries().iter().any(|name| name.ends_with("-needs-bar")));
    assert!(!bar.store_entries().iter().any(|name| name.ends_with("-needs-baz")));
    for builder in [&with_foo, &bar, &with_baz] {
        assert!(!builder.store_entries().iter().any(|name| name.ends_with("-all.drv")), "{}", builder.name());
        builder.verify_store();
    }
}

fn two_machines_with_a_slot_each_get_one_each(hook: Hook) {
    let world = World::new();
    let (left, right) = (world.builder("left").start(), world.builder("right").start());
    let client = world.client().hook(hook).uses(&left, "ssh-ng", 1).uses(&right, "ssh-ng", 1).start();
    // Each waits until the other one has been started, so one machine alone would never get through.
    let meet = |own: &str, other: &str| {
        format!(
            r#"d "meet-{own}" ("touch /mnt/share/{own}; for i in $(seq 400); do [ -e /mnt/share/{other} ] && "
               + "cat /etc/machine-name > $out && exit 0; sleep 0.05; done; echo nobody came; exit 1") {{ }}"#
        )
    };
    let both = drv::expression(&format!("[ ({}) ({}) ]", meet("a", "b"), meet("b", "a")));
    let built = client.nix_build(&both, &["-j0"]);
    let mut names: Vec<String> =
        built.assert_success().out_paths().iter().map(|path| text(&client, path)).collect();
    names.sort();
    assert_eq!(names, ["left", "right"]);
}

fn the_first_of_equals_is_taken(hook: Hook) {
    let world = World::new();
    let (first, second) = (world.builder("first").start(), world.builder("second").start());
    let client = world.client().hook(hook).uses(&first, "ssh-ng", 1).uses(&second, "ssh-ng", 1).start();
    for build in ["a", "b"] {
        let path = client.nix_build(&drv::where_built(build), &["-j0"]).assert_success().out_path();
        assert_eq!(text(&client, &path), "first");
    }
}

fn a_faster_machine_is_preferred(hook: Hook) {
    let world = World::new();
    let (slow, fast) = (world.builder("slow").start(), world.builder("fast").start());
    let client = world
        .client()
        .hook(hook)
        .uses(&slow, "ssh-ng", 1)
        .knows(&fast)
        .machines("ssh-ng://fast x86_64-linux - 1 2")
        .start();
    let path = client.nix_build(&drv::where_built("a"), &["-j0"]).assert_success().out_path();
    assert_eq!(text(&client, &path), "fast");
}

fn a_machine_that_is_away_is_left_out(hook: Hook) {
    let world = World::new();
    let mut away = world.builder("away").start();
    let there = world.builder("there").start();
    let client = world
        .client()
        .hook(hook)
        .knows(&away)
        .machines("ssh-ng://away x86_64-linux - 1 5")
        .uses(&there, "ssh-ng", 1)
        .start();
    away.stop();
    let built =
        client.nix_build_command(&drv::where_built("a"), &["-j0"]).limit(Duration::from_secs(20)).run();
    assert_eq!(text(&client, &built.assert_success().out_path()), "there");
}

fn an_absent_machines_file_means_no_machines(hook: Hook) {
    let world = World::new();
    let client = world.client().hook(hook).nix_conf("builders = @/etc/nix/no-such-file").start();
    client.nix_build(&drv::multiple_outputs("two"), &["-A", "all"]).assert_success();
    client.nix_build(&drv::trivial("again"), &[]).assert_success();
    client.nix_build(&drv::trivial("again"), &["--check"]).assert_success();
    let failed = client.nix_build(&drv::failing("bad", "it went wrong", 1), &[]);
    failed.assert_failure().assert_stderr_has("it went wrong");
    let late = client.nix_build(&drv::silent_sleep("late", "30"), &["--option", "max-silent-time", "1"]);
    late.assert_failure().assert_stderr_has("timed out after 1 seconds of silence");
    assert!(late.took() < Duration::from_secs(20), "{late}");
    let fixed = drv::fixed_flat("fixed", "printf hello > $out", HELLO);
    client.nix_build(&fixed, &[]).assert_success();
    client.nix_build(&drv::trivial("nowhere"), &["-j0"]).assert_failure();
    client.verify_store();
}

const HELLO: &str = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
