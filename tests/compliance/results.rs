//! What comes back from a machine.

use std::time::Duration;

use harness::{Hook, Mode, Release, World, drv, wait_until};
use nix::sys::signal::Signal;

crate::theirs_and_ours!(
    a_private_store_gets_the_result,
    a_second_time_nothing_is_built,
    two_outputs_come_back,
    fixed_outputs_come_back,
    only_what_is_needed_is_sent,
    a_failing_build_fails_here_and_others_go_on,
    a_daemon_builds_for_a_user_without_rights,
    a_killed_client_ends_its_build,
    every_release_builds_on_every_release,
    one_slot_is_enough_for_all,
    a_check_that_is_done_elsewhere_leaves_what_is_here_alone,
);

fn a_private_store_gets_the_result(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    for (name, as_user) in [("root", false), ("user", true)] {
        let store = format!("/tmp/private-{name}");
        let client = world
            .client()
            .named(name)
            .mode(Mode::Private { store: store.clone(), as_user })
            .hook(hook.clone())
            .uses(&mac, "ssh-ng", 2)
            .start();
        let path = client.nix_build(&drv::chain(3), &["-j0"]).assert_success().out_path();
        assert_eq!(client.read(&format!("{store}{path}")), "0\n1\n2\n");
        assert_eq!(client.store_entries(), Vec::<String>::new(), "something went to /nix/store");
        client.verify_store_at(&store);
    }
}

fn a_second_time_nothing_is_built(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(hook).uses(&mac, "ssh-ng", 2).start();
    let count = drv::script("counted", "echo built >> /mnt/share/count; echo x > $out");
    let first = client.nix_build(&count, &["-j0"]).assert_success().out_path();
    let second = client.nix_build(&count, &["-j0"]);
    assert_eq!(second.assert_success().out_path(), first);
    assert_eq!(client.read("/mnt/share/count"), "built\n");
}

fn two_outputs_come_back(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    for protocol in ["ssh", "ssh-ng"] {
        let client = world.client().named(protocol).hook(hook.clone()).uses(&mac, protocol, 2).start();
        let built = client.nix_build(&format!("({}).all", drv::multiple_outputs("two")), &["-j0"]);
        let paths = built.assert_success().out_paths();
        let [out, dev] = paths.as_slice() else { panic!("{built}") };
        assert_eq!(client.read(&format!("{out}/dev")), format!("{dev}\n"));
        let references = |path: &str| client.run(&format!("nix-store --query --references {path}"));
        assert_eq!(references(out), format!("{dev}\n"));
        assert_eq!(references(dev), format!("{dev}\n"));
        client.verify_store();
        assert_eq!(mac.read(&format!("{dev}/self")), format!("{dev}\n"));
    }
}

fn fixed_outputs_come_back(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(hook).uses(&mac, "ssh-ng", 2).start();
    let flat = drv::fixed_flat(
        "flat",
        "printf hello > $out",
        "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    );
    let path = client.nix_build(&flat, &["-j0"]).assert_success().out_path();
    assert_eq!(client.read(&path), "hello");
    let info = client.run(&format!("nix path-info --json {path}"));
    assert!(info.contains("fixed:sha256:"), "the content address is not recorded: {info}");

    // The builder of a tree makes here what it makes there, so Nix itself can say the hash.
    client.run("mkdir -p /tmp/tree/sub; printf hello >/tmp/tree/sub/file; ln -s sub/file /tmp/tree/link");
    let hash = client.run("nix-hash --type sha256 --base32 /tmp/tree");
    let tree = drv::fixed_recursive(
        "tree",
        "mkdir -p $out/sub; printf hello > $out/sub/file; ln -s sub/file $out/link",
        &format!("sha256:{}", hash.trim()),
    );
    let path = client.nix_build(&tree, &["-j0"]).assert_success().out_path();
    assert_eq!(client.read(&format!("{path}/link")), "hello");

    let wrong = drv::fixed_flat(
        "wrong",
        "printf goodbye > $out",
        "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    );
    client.nix_build(&wrong, &["-j0"]).assert_failure().assert_stderr_has("hash mismatch");
    client.verify_store();
}

fn only_what_is_needed_is_sent(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(hook).uses(&mac, "ssh-ng", 2).start();
    let graph = drv::expression(
        r#"let
          tool = d "tool" "echo tool > $out" { };
          left-behind = d "left-behind" "echo x > $out" { };
        in d "product" "cat ${tool} ${builtins.toFile "source" "text"} > $out" { }"#,
    );
    client
        .nix_build(&drv::expression(r#"d "left-behind" "echo x > $out" { }"#), &["--builders", ""])
        .assert_success();
    client.nix_build(&graph, &["-j0"]).assert_success();
    let mut sent: Vec<String> =
        mac.store_entries().iter().map(|name| name.split_once('-').unwrap().1.to_owned()).collect();
    sent.sort();
    assert_eq!(sent, ["product", "source", "tool"]);
}

fn a_failing_build_fails_here_and_others_go_on(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    for protocol in ["ssh", "ssh-ng"] {
        let client = world.client().named(protocol).hook(hook.clone()).uses(&mac, protocol, 2).start();
        let both = drv::expression(&format!(
            r#"[ (d "bad-{protocol}" "echo it went wrong; exit 3" {{ }}) (d "good-{protocol}" "sleep 0.3; echo x > $out" {{ }}) ]"#
        ));
        let built = client.nix_build(&both, &["-j0", "--keep-going"]);
        built
            .assert_failure()
            .assert_stderr_has("it went wrong")
            .assert_stderr_has("failed with exit code 3");
        assert!(
            client.store_entries().iter().any(|name| name.ends_with(&format!("good-{protocol}"))),
            "{built}"
        );
        client.verify_store();
    }
}

fn a_daemon_builds_for_a_user_without_rights(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().mode(Mode::Daemon).hook(hook).uses(&mac, "ssh-ng", 2).start();
    let path = client.nix_build(&drv::where_built("a"), &["-j0"]).assert_success().out_path();
    assert_eq!(client.read(&path), "mac\n");
    client.verify_store();
}

fn a_killed_client_ends_its_build(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(hook).uses(&mac, "ssh-ng", 2).start();
    let sleeper = drv::silent_sleep("sleeper", "4321");
    let build = client.spawn_nix_build(&sleeper, &["-j0"]);
    wait_until("the build has begun", Duration::from_secs(20), || {
        !mac.pids_matching("sleep 4321").is_empty()
    });
    build.signal(Signal::SIGKILL);
    wait_until("the builder has stopped", Duration::from_secs(1), || {
        mac.pids_matching("sleep 4321").is_empty()
    });
    build.wait().assert_failure();
    client.nix_build(&drv::trivial("next"), &["-j0"]).assert_success();
    client.verify_store();
}

fn every_release_builds_on_every_release(hook: Hook) {
    let world = World::new();
    let builders = Release::ALL.map(|release| world.builder(release.name()).release(release).start());
    for release in Release::ALL {
        for builder in &builders {
            let pair = format!("{}-on-{}", release.name(), builder.name());
            let client = world
                .client()
                .named(&pair)
                .release(release)
                .hook(hook.clone())
                .uses(builder, "ssh-ng", 2)
                .start();
            let path = client.nix_build(&drv::where_built(&pair), &["-j0"]).assert_success().out_path();
            assert_eq!(client.read(&path), format!("{}\n", builder.name()), "{pair}");
            client.verify_store();
        }
    }
}

fn one_slot_is_enough_for_all(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(hook).uses(&mac, "ssh-ng", 1).start();
    let built = client.nix_build(&drv::independent(5), &["-j0"]);
    assert_eq!(built.assert_success().out_paths().len(), 5);
}

/// Nix up to 2.33 asks its hook even for a check, if it may not build by itself.
fn a_check_that_is_done_elsewhere_leaves_what_is_here_alone(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    for release in [Release::Bookworm, Release::Trixie] {
        let name = release.name();
        let client =
            world.client().named(name).release(release).hook(hook.clone()).uses(&mac, "ssh-ng", 1).start();
        let random = drv::script(&format!("random-{name}"), "od -An -N16 -tx1 /dev/urandom > $out");
        let path = client.nix_build(&random, &["-j0"]).assert_success().out_path();
        let text = client.read(&path);
        let identity = || client.run(&format!("stat -c '%i %Z' {path}"));
        let before = identity();
        for is_there in [true, false] {
            if !is_there {
                mac.run(&format!("nix-store --delete {path}"));
            }
            client.nix_build(&random, &["-j0", "--check"]).assert_success();
            assert_eq!((identity(), client.read(&path)), (before.clone(), text.clone()));
        }
        assert_ne!(mac.read(&path), text, "it was not built again");
        client.verify_store();
    }
}
