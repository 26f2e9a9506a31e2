//! Machines that have nothing but `nix-store --serve` for us, or run one command whatever is asked for.

use std::time::Duration;

use harness::{Builder, BuilderPlan, Client, ClientPlan, Hook, Mode, Release, World, drv, wait_until};
use nix::sys::signal::Signal;

use crate::support::{NO_SAMPLES, SOON, assert_masters_and_holder_left, gated, hide, open, wait_for_begin};

const WAY: &str = "Way: nix-store --serve\n";

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// A builder with Nix's programs, but no daemon and no program of that name to start one.
fn without_daemon(plan: BuilderPlan) -> Builder {
    let mac = plan.without_daemon().start();
    hide(&mac, "nix-daemon");
    mac
}

fn assert_built_there(client: &Client, mac: &Builder, name: &str) {
    let built = client.nix_build(&drv::where_built(name), &["-j0"]);
    let path = built.assert_success().out_path();
    assert_eq!(client.read(&path), format!("{}\n", mac.name()));
    built.assert_stderr_lacks("cannot").assert_stderr_lacks("error");
}

fn assert_both_clean(client: &Client, mac: &Builder) {
    client.verify_store();
    mac.verify_store();
}

/// What `ping-store` says of a machine that answers.
fn ping(client: &Client, url: &str) -> String {
    let output = client.nix_offload(&["ping-store", "--store", url]);
    output.assert_success();
    output.stdout().to_owned()
}

#[test]
fn every_release_builds_where_no_daemon_can_be_started() {
    let world = World::new();
    for release in Release::ALL {
        let mac = without_daemon(world.builder(release.name()).release(release));
        let client = plan(&world)
            .named(&format!("client-{}", release.name()))
            .release(release)
            .uses(&mac, "ssh", 4)
            .start();
        assert_built_there(&client, &mac, "one");
        let several = client.nix_build(&drv::multiple_outputs("several"), &["-j0", "-A", "all"]);
        several.assert_success();
        let path = client.nix_build(&drv::chain(6), &["-j0"]).assert_success().out_path();
        assert_eq!(client.read(&path), "0\n1\n2\n3\n4\n5\n");
        assert_eq!(client.nix_build(&drv::independent(12), &["-j0"]).assert_success().out_paths().len(), 12);
        let said = ping(&client, &format!("ssh://{}", mac.alias()));
        let version = mac.run("nix --version");
        let version = format!("Version: {}", version.trim().rsplit(' ').next().unwrap());
        for line in [WAY, "Trusted: unknown\n", version.as_str(), "Detour: no daemon can be started"] {
            assert!(said.contains(line), "{line:?} is missing: {said}");
        }
        assert_both_clean(&client, &mac);
    }
}

#[test]
fn a_machine_of_the_other_kind_does_not_take_this_way() {
    let world = World::new();
    let mac = without_daemon(world.builder("mac"));
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    let refused = client.nix_build(&drv::where_built("a"), &["-j0"]);
    refused
        .assert_failure()
        .assert_stderr_has("nix-daemon: not found")
        .assert_stderr_has("install Nix there");
}

#[test]
fn the_way_is_remembered_and_the_better_ones_are_taken_when_it_fails() {
    let world = World::new();
    let mut mac = without_daemon(world.builder("mac"));
    let client = plan(&world).uses(&mac, "ssh", 1).start();
    // Only the sessions of builds are counted.
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    assert_built_there(&client, &mac, "first");
    let before = mac.sessions();
    assert_built_there(&client, &mac, "second");
    assert_eq!(mac.sessions(), before + 1, "it looked for a daemon again");
    mac.run("umount -l /usr/bin");
    hide(&mac, "nix-store");
    mac.start_daemon();
    let path = client.nix_build(&drv::where_built("third"), &["-j0"]).assert_success().out_path();
    assert_eq!(client.read(&path), "mac\n");
    mac.run("umount -l /usr/bin");
    assert_both_clean(&client, &mac);
}

#[test]
fn a_shell_so_slow_that_the_last_way_comes_too_late_is_reached_in_the_end() {
    let world = World::new();
    let mac = without_daemon(world.builder("mac").bashrc("sleep 2.1"));
    let client = plan(&world).knows(&mac).start();
    let ping = || client.nix_offload(&["ping-store", "--store", "ssh://mac"]);
    assert_ne!(ping().code(), 0, "three shells within six seconds");
    let reached = (0..3).map(|_| ping()).find(|output| output.code() == 0).unwrap();
    assert!(reached.stdout().contains(WAY), "{reached}");
}

#[test]
fn forced_commands_of_both_kinds() {
    let world = World::new();
    for (name, forced, way) in [
        ("stores", r#"command="nix-store --serve --write",restrict"#, WAY),
        ("serves", r#"command="nix-store --serve --write""#, "Way: daemon socket\n"),
        ("daemon", r#"command="nix-daemon --stdio",restrict"#, "Way: nix-daemon --stdio\n"),
    ] {
        let mac = world.builder(name).key_options(forced).start();
        let client = plan(&world).named(&format!("client-{name}")).uses(&mac, "ssh", 2).start();
        for build in ["one", "two"] {
            assert_built_there(&client, &mac, build);
        }
        let said = ping(&client, &format!("ssh://{name}"));
        assert!(said.contains(way), "{said}");
        assert_both_clean(&client, &mac);
    }
}

#[test]
fn a_forced_daemon_is_recognised_where_nix_store_is_named() {
    let world = World::new();
    let mac = world.builder("mac").key_options(r#"command="nix-daemon --stdio",restrict"#).start();
    let url = "ssh://mac?remote-program=/usr/bin/nix-store";
    let client = plan(&world).knows(&mac).machines(&format!("{url} x86_64-linux - 1 1")).start();
    assert_built_there(&client, &mac, "a");
    assert!(ping(&client, url).contains("Way: nix-daemon --stdio\n"));
    assert_both_clean(&client, &mac);
}

#[test]
fn a_forced_daemon_serves_the_other_kind_too() {
    let world = World::new();
    let mac = world.builder("mac").key_options(r#"command="nix-daemon --stdio",restrict"#).start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    assert_built_there(&client, &mac, "a");
    assert_both_clean(&client, &mac);
}

#[test]
fn an_account_without_rights_whose_nix_store_asks_the_daemon() {
    const FORCED: &str = r#"command="nix-store --serve --write",restrict"#;
    let world = World::new();
    for release in Release::ALL {
        let name = release.name();
        let mac = world
            .builder(name)
            .release(release)
            .key_options(FORCED)
            .nix_conf("trusted-users = root user")
            .as_user()
            .start();
        let client = plan(&world).named(&format!("c-{name}")).uses(&mac, "ssh", 1).start();
        let talks =
            drv::script("talks", "for i in 1 2 3; do echo line $i; done; cat /etc/machine-name > $out");
        let built = client.nix_build(&talks, &["-j0"]);
        let path = built.assert_success().out_path();
        assert_eq!(client.build_log(&path), "line 1\nline 2\nline 3\n", "{built}");
        let late = client.nix_build(&drv::silent_sleep("late", "5300"), &["-j0", "--option", "timeout", "1"]);
        late.assert_failure().assert_stderr_has("timed out after 1 seconds");
        wait_until("the builder has stopped", Duration::from_secs(2), || {
            mac.pids_matching("sleep 5300").is_empty()
        });
        assert_both_clean(&client, &mac);
        let other = format!("other-{name}");
        let strict = world.builder(&other).release(release).key_options(FORCED).as_user().start();
        client.set_machines("");
        let client = plan(&world).named(&format!("d-{name}")).uses(&strict, "ssh", 1).start();
        let refused = client.nix_build(&drv::where_built("a"), &["-j0"]);
        refused.assert_failure().assert_stderr_has("does not trust").assert_stderr_has("trusted-users");
    }
}

#[test]
fn a_remote_program_is_run_as_it_is_named_with_the_store_that_is_named() {
    let world = World::new();
    let mac = world.builder("mac").start();
    mac.write_mode(
        "/opt/my store",
        "#!/bin/sh\nfor word; do echo \"$word\"; done >> /mnt/share/called\nshift\nexec nix-store \"$@\"\n",
        0o755,
    );
    mac.run("ln -s '/opt/my store' /opt/wrapper");
    let url = "ssh://mac?remote-program=/opt/wrapper%20extra&remote-store=local?log=/tmp/a%2520b%26c";
    let client = plan(&world).knows(&mac).machines(&format!("{url} x86_64-linux - 1 1")).start();
    assert_built_there(&client, &mac, "a");
    assert_eq!(
        client.read("/mnt/share/called"),
        "extra\n--serve\n--write\n--store\nlocal?log=/tmp/a%20b&c\n"
    );
    assert_both_clean(&client, &mac);
}

#[test]
fn a_machine_without_nix_and_an_account_that_only_talks() {
    let world = World::new();
    let bare = world.builder("bare").without_nix().start();
    let talks = world.builder("talks").key_options(r#"command="echo Not for you; exit 3",restrict"#).start();
    let client = plan(&world).knows(&bare).knows(&talks).start();
    for (name, cause) in [("bare", "nix-daemon: not found"), ("talks", "Not for you")] {
        client.set_machines(&format!("ssh://{name} x86_64-linux - 1 1\n"));
        let failed = client.nix_build(&drv::where_built("a"), &["-j0"]);
        failed.assert_failure().assert_stderr_has(cause).assert_stderr_has("hint:");
    }
}

#[test]
fn lines_are_seen_while_the_build_runs_and_kept() {
    let world = World::new();
    let mac = without_daemon(world.builder("mac").bashrc("echo a shell that talks; echo and warns >&2"));
    let client = plan(&world).uses(&mac, "ssh", 1).start();
    let talks = drv::script(
        "gate",
        "echo before; echo to stderr >&2; cat /etc/machine-name >> /mnt/share/gate.begun; \
         until [ -e /mnt/share/gate.go ]; do sleep 0.02; done; echo after; printf 'no end'; echo x > $out",
    );
    let build = client.spawn_nix_build(&talks, &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    wait_until("the lines are seen", SOON, || {
        let seen = build.stderr_so_far();
        seen.contains("before\n") && seen.contains("to stderr\n")
    });
    assert!(!build.stderr_so_far().contains("after"), "{}", build.stderr_so_far());
    open(&client, "gate");
    let built = build.wait();
    built.assert_success().assert_stderr_has("after\n");
    assert_eq!(client.build_log(&built.out_path()), "before\nto stderr\nafter\nno end\n");
}

#[test]
fn a_hundred_thousand_lines_are_complete_and_in_order() {
    let world = World::new();
    for release in Release::ALL {
        let mac = without_daemon(world.builder(release.name()).release(release));
        let client = plan(&world).named(&format!("c-{}", release.name())).uses(&mac, "ssh", 1).start();
        let chatty = drv::script("chatty", "seq 100000; echo x > $out");
        let built = client.nix_build(&chatty, &["-j0"]);
        let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
        let log = client.build_log(&built.assert_success().out_path());
        let differs = log.lines().zip(expected.lines()).find(|(said, line)| said != line);
        assert!(log == expected, "{} lines, first difference: {differs:?}", log.lines().count());
    }
}

#[test]
fn a_failing_build_keeps_the_end_of_a_long_log_by_either_protocol() {
    let world = World::new();
    for protocol in ["ssh-ng", "ssh"] {
        let plan_of = world.builder(protocol);
        let mac = if protocol == "ssh" { without_daemon(plan_of) } else { plan_of.start() };
        for release in Release::ALL {
            let name = format!("{protocol}-{}", release.name());
            let client = plan(&world).named(&name).release(release).uses(&mac, protocol, 1).start();
            let failed = client.nix_build(&drv::script("chatty", "seq 50000; exit 1"), &["-j0"]);
            let stderr = failed.assert_failure().stderr();
            let drv = stderr.split('\'').find(|word| word.ends_with("-chatty.drv")).unwrap();
            let log = client.build_log(drv);
            assert!(log.ends_with("\n49999\n50000\n"), "{name}: {:?}", &log[log.len().saturating_sub(40)..]);
        }
    }
}

#[test]
fn a_failing_build_shows_its_log_and_its_message() {
    let world = World::new();
    for (name, mode) in [("single", Mode::SingleUser), ("daemon", Mode::Daemon)] {
        let mac = without_daemon(world.builder(name));
        let client = plan(&world).named(&format!("c-{name}")).mode(mode).uses(&mac, "ssh", 1).start();
        let bad = drv::script("bad", "for i in 1 2 3; do echo line $i; done; exit 7");
        let failed = client.nix_build(&bad, &["-j0"]);
        assert_eq!(failed.assert_failure().stdout(), "", "{failed}");
        failed.assert_stderr_has("failed with exit code 7").assert_stderr_has(&format!("ssh://{name}"));
        failed.assert_stderr_has("line 1").assert_stderr_has("line 3");
        failed.assert_stderr_lacks("connection was lost");
        assert_both_clean(&client, &mac);
    }
}

#[test]
fn clocks_end_a_build_there_and_here() {
    let world = World::new();
    for (number, release) in Release::ALL.into_iter().enumerate() {
        let mac = without_daemon(world.builder(release.name()).release(release));
        let client = plan(&world).named(&format!("c-{}", release.name())).uses(&mac, "ssh", 1).start();
        for (option, seconds, message) in [
            // The builder's own words; those of Nix 2.34 are the same for both.
            ("max-silent-time", 5100 + number, "timed out after 1 seconds"),
            ("timeout", 6100 + number, "timed out after 1 seconds"),
        ] {
            let slow = drv::script(&format!("slow-{seconds}"), &format!("echo begun; sleep {seconds}"));
            let late = client.nix_build(&slow, &["-j0", "--option", option, "1"]);
            late.assert_failure().assert_stderr_has(message).assert_stderr_has("begun");
            assert!(late.took() < Duration::from_secs(10), "{late}");
            wait_until("the builder has stopped", Duration::from_secs(2), || {
                mac.pids_matching(&format!("sleep {seconds}")).is_empty()
            });
        }
        assert_built_there(&client, &mac, "next");
        assert_both_clean(&client, &mac);
    }
}

#[test]
fn the_directory_of_a_failed_build_is_kept_there() {
    let world = World::new();
    let mac = without_daemon(world.builder("mac"));
    let client = plan(&world).uses(&mac, "ssh", 1).start();
    let bad = drv::script("bad", "echo evidence > $NIX_BUILD_TOP/evidence; exit 1");
    let failed = client.nix_build(&bad, &["-j0", "--keep-failed"]);
    failed.assert_failure().assert_stderr_has("The failed build directory was kept on the remote builder");
    let kept = failed.stderr().split('\'').find(|word| word.contains("nix-build-bad")).unwrap();
    assert_eq!(mac.read(&format!("{kept}/evidence")), "evidence\n", "{failed}");
}

#[test]
fn killing_nix_build_ends_a_silent_build_within_a_second() {
    let world = World::new();
    for (number, release) in Release::ALL.into_iter().enumerate() {
        let mac = without_daemon(world.builder(release.name()).release(release));
        let client = plan(&world).named(&format!("c-{}", release.name())).uses(&mac, "ssh", 1).start();
        for time in 0..3 {
            let seconds = format!("{}", 4700 + number * 10 + time);
            let sleeping = || mac.pids_matching(&format!("sleep {seconds}"));
            let build =
                client.spawn_nix_build(&drv::silent_sleep(&format!("s-{seconds}"), &seconds), &["-j0"]);
            wait_until("the build has begun", SOON, || !sleeping().is_empty());
            build.signal(Signal::SIGKILL);
            wait_until("the builder has stopped", Duration::from_secs(1), || sleeping().is_empty());
            build.wait().assert_failure();
            assert_built_there(&client, &mac, &format!("next-{time}"));
        }
        assert_eq!(mac.logins(), 1, "the master did not live through it");
        wait_until("no program is left there", SOON, || mac.pids_matching("--serve").is_empty());
        assert_masters_and_holder_left(&client, 1);
        assert_both_clean(&client, &mac);
    }
}

#[test]
fn a_link_cut_in_mid_build_is_not_taken_for_a_refusal() {
    let world = World::new();
    let mac = without_daemon(world.builder("mac"));
    let client = plan(&world).uses(&mac, "ssh", 1).start();
    let build = client.spawn_nix_build(&gated("mid"), &["-j0"]);
    wait_for_begin(&client, "mid", &["mac"]);
    for pid in mac.pids_matching("sshd: root") {
        mac.kill(pid, "KILL");
    }
    wait_for_begin(&client, "mid", &["mac", "mac"]);
    open(&client, "mid");
    let built = build.wait();
    built.assert_success().assert_stderr_has("connection was lost").assert_stderr_has("connecting again");
    assert_both_clean(&client, &mac);
}

#[test]
fn a_thousand_inputs_and_a_large_output() {
    let world = World::new();
    let mac = without_daemon(world.builder("mac"));
    let client = plan(&world).uses(&mac, "ssh", 1).start();
    let many = drv::expression(
        r#"d "many" "cat $all | wc -l > $out" {
             all = builtins.genList (i: builtins.toFile "input-${toString i}" "${toString i}\n") 1000; }"#,
    );
    let path = client.nix_build(&many, &["-j0"]).assert_success().out_path();
    assert_eq!(client.read(&path).trim(), "1000");
    let large = drv::script(
        "large",
        "mkdir $out; head -c 200000000 /dev/urandom > $out/data; sha256sum < $out/data > $out/sum",
    );
    let path = client.nix_build(&large, &["-j0"]).assert_success().out_path();
    client.run(&format!("[ \"$(sha256sum < {path}/data)\" = \"$(cat {path}/sum)\" ]"));
    // And there again, as an input.
    let copy = drv::expression(&format!(
        r#"d "copy" "sha256sum < ${{builtins.storePath {path}}}/data > $out" {{ }}"#
    ));
    mac.run(&format!("nix-store --delete {path}"));
    let again = client.nix_build(&copy, &["-j0"]).assert_success().out_path();
    assert_eq!(client.read(&again), client.read(&format!("{path}/sum")));
    assert_both_clean(&client, &mac);
}

#[test]
fn an_upload_that_is_refused_is_told_in_the_builders_words() {
    let world = World::new();
    let mac = without_daemon(world.builder("mac"));
    let client = plan(&world).uses(&mac, "ssh", 1).start();
    let input = client.run("echo an input > /tmp/input; nix-store --add /tmp/input").trim().to_owned();
    let expression = drv::expression(&format!(r#"d "a" "cat ${{builtins.storePath {input}}} > $out" {{ }}"#));
    // Its database says something else of it than its files.
    client.run(&format!("chmod 644 {input}; echo no input > {input}"));
    let failed = client.nix_build(&expression, &["-j0"]);
    failed.assert_failure().assert_stderr_has("hash mismatch importing path");
    failed.assert_stderr_lacks("connection was lost");
}
