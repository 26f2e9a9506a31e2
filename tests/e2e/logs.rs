//! What a build says on its machine is seen here as it is said, and kept; clocks end it there and here.

use std::time::Duration;

use harness::{Builder, Client, Hook, Mode, Release, World, drv, wait_until};

use crate::support::{SOON, open, wait_for_begin};

fn one_of_each(world: &World, release: Release) -> (Builder, Client) {
    let mac = world.builder("mac").start();
    let client = world
        .client()
        .named(&format!("client-{}", release.name()))
        .release(release)
        .hook(Hook::Ours)
        .uses(&mac, "ssh-ng", 1)
        .start();
    (mac, client)
}

#[test]
fn lines_are_seen_while_the_build_runs_and_kept() {
    let world = World::new();
    for release in Release::ALL {
        let (_mac, client) = one_of_each(&world, release);
        let gate = format!("gate-{}", release.name());
        let talks = drv::script(
            &gate,
            &format!(
                "echo before; echo to stderr >&2; cat /etc/machine-name >> /mnt/share/{gate}.begun; \
                 until [ -e /mnt/share/{gate}.go ]; do sleep 0.02; done; echo after; echo x > $out"
            ),
        );
        let build = client.spawn_nix_build(&talks, &["-j0"]);
        wait_for_begin(&client, &gate, &["mac"]);
        wait_until("the lines are seen", SOON, || {
            let seen = build.stderr_so_far();
            seen.contains("before\n") && seen.contains("to stderr\n")
        });
        assert!(!build.stderr_so_far().contains("after"), "{}", build.stderr_so_far());
        open(&client, &gate);
        let built = build.wait();
        built.assert_success().assert_stderr_has("after\n");
        assert_eq!(client.build_log(&built.out_path()), "before\nto stderr\nafter\n");
    }
}

/// The values of `key` in the lines of `--log-format internal-json` with that action and type.
fn of_json(stderr: &str, action: &str, kind: u64) -> Vec<serde_json::Value> {
    stderr
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line.strip_prefix("@nix ")?).ok())
        .filter(|value| value["action"] == action && value["type"] == kind)
        .collect()
}

#[test]
fn phases_and_lines_come_as_results_of_the_builds_activity() {
    const BUILD: u64 = 105;
    const LINE: u64 = 101;
    const PHASE: u64 = 104;
    let world = World::new();
    for release in Release::ALL {
        let (_mac, client) = one_of_each(&world, release);
        let phases = drv::expression(
            r#"d "phases" "echo '@nix {\"action\":\"setPhase\",\"phase\":\"buildPhase\"}' >&2; echo a line; echo x > $out" { }"#,
        );
        let built = client.nix_build(&phases, &["-j0", "--log-format", "internal-json", "-v"]);
        built.assert_success();
        let activities = of_json(built.stderr(), "start", BUILD);
        assert_eq!(activities.len(), 1, "{built}");
        assert_eq!(activities[0]["fields"][1], "ssh-ng://mac", "{built}");
        let results = |kind| -> Vec<serde_json::Value> {
            let mut results = of_json(built.stderr(), "result", kind);
            results.retain(|value| value["id"] == activities[0]["id"]);
            results.into_iter().map(|value| value["fields"][0].clone()).collect()
        };
        assert_eq!(results(PHASE), ["buildPhase"], "{built}");
        assert_eq!(results(LINE), ["a line"], "{built}");
    }
}

/// What a build may say to the Nix that runs it, with things in the places of others.
#[test]
fn no_words_of_a_build_end_the_command() {
    const HOSTILE: &str = r#"
@nix {"action":"start","id":1,"level":4294967295,"type":101,"text":"a download","fields":[7]}
@nix {"action":"result","id":1,"type":101,"fields":[7]}
@nix {"action":"result","id":1,"type":101}
@nix {"action":"result","id":1,"type":104,"fields":[7]}
@nix {"action":"result","id":1,"type":105,"fields":["x"]}
@nix {"action":"result","id":1,"type":105,"fields":[1]}
@nix {"action":"result","id":1,"type":106,"fields":[]}
@nix {"action":"result","id":1,"type":107,"fields":[7]}
@nix {"action":"result","id":1,"type":100,"fields":["x"]}
@nix {"action":"result","id":1,"type":4711,"fields":["x"]}
@nix {"action":"stop","id":1}
@nix {"action":"msg","level":99,"msg":"hello"}
"#;
    // A Nix that reads this in a build's log for itself ends, if it is 2.8.
    const MALFORMED: &str = "@nix {\"action\":\"start\"}\n";
    let world = World::new();
    for builder in Release::ALL {
        let mac = world.builder(&format!("mac-{}", builder.name())).release(builder).start();
        let hostile =
            if builder == Release::Bookworm { HOSTILE.into() } else { format!("{HOSTILE}{MALFORMED}") };
        mac.write("/hostile", &hostile);
        for release in Release::ALL {
            let name = format!("from-{}-to-{}", builder.name(), release.name());
            let client =
                world.client().named(&name).release(release).hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
            let says = drv::script(&name, "cat /hostile; echo the end; echo x > $out");
            // With a terminal's bar, with lines for programs, and as they come.
            for format in ["bar", "internal-json", "raw"] {
                let says = says.replace(&name, &format!("{name}-{format}"));
                let built = client.nix_build(&says, &["-j0", "--log-format", format]);
                let log = client.build_log(&built.assert_success().out_path());
                assert!(log.ends_with("the end\n"), "{log}");
            }
        }
    }
}

#[test]
fn bytes_that_are_no_text_survive_in_the_log() {
    let world = World::new();
    let (_mac, client) = one_of_each(&world, Release::Bookworm);
    let odd =
        drv::script("odd", r"printf 'a\377\376b\n'; printf '\303\244\n'; printf 'no end'; echo x > $out");
    let path = client.nix_build(&odd, &["-j0"]).assert_success().out_path();
    let bytes = client.run(&format!("nix-store --read-log {path} | od -An -c | tr -s ' \\n' ' '"));
    assert_eq!(bytes.trim(), r"a 377 376 b \n 303 244 \n n o e n d \n");
}

#[test]
fn a_hundred_thousand_lines_are_complete_and_in_order() {
    let world = World::new();
    let (_mac, client) = one_of_each(&world, Release::Bookworm);
    let chatty = drv::script("chatty", "seq 100000; echo x > $out");
    let built = client.nix_build(&chatty, &["-j0"]);
    let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    // Messages to the user come on another way and may stand in between.
    let is_number = |line: &&str| line.parse::<u32>().is_ok();
    let seen: String =
        built.assert_success().stderr().lines().filter(is_number).map(|line| format!("{line}\n")).collect();
    assert!(seen == expected, "lines are missing");
    assert!(client.build_log(&built.out_path()) == expected, "lines are missing in the log");
}

/// A build that is ended by a clock, here and there.
fn assert_timed_out(client: &Client, mac: &Builder, seconds: &str, option: &str, message: &str) {
    let slow =
        drv::script(&format!("slow-{seconds}"), &format!("echo begun; sleep {seconds}; echo done > $out"));
    let late = client.nix_build(&slow, &["-j0", "--option", option, "1"]);
    late.assert_failure().assert_stderr_has(message);
    assert_eq!(late.stdout(), "", "{late}");
    assert!(late.took() < Duration::from_secs(10), "{late}");
    wait_until("the builder has stopped", Duration::from_secs(2), || {
        mac.pids_matching(&format!("sleep {seconds}")).is_empty()
    });
    client.nix_build(&drv::trivial(&format!("next-{seconds}")), &["-j0"]).assert_success();
}

#[test]
fn silence_and_slowness_end_a_build_here_and_there() {
    let world = World::new();
    for (number, release) in Release::ALL.into_iter().enumerate() {
        let (mac, client) = one_of_each(&world, release);
        let silent = format!("{}", 5000 + number);
        assert_timed_out(&client, &mac, &silent, "max-silent-time", "timed out after 1 seconds of silence");
        let slow = format!("{}", 6000 + number);
        assert_timed_out(&client, &mac, &slow, "timeout", "timed out after 1 seconds");
    }
}

#[test]
fn a_build_that_ends_no_line_is_not_silent() {
    const DOTS: &str = "for i in 1 2 3 4 5 6 7 8 9 10; do printf .; sleep 0.4; done; echo; echo x > $out";
    let world = World::new();
    for release in Release::ALL {
        let mac = world.builder(release.name()).release(release).start();
        let name = format!("to-{}", release.name());
        let client = world.client().named(&name).hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
        // A machine that has never been asked, and one that has.
        for dots in ["first", "next"] {
            let dots =
                client.nix_build(&drv::script(dots, DOTS), &["-j0", "--option", "max-silent-time", "1"]);
            assert_eq!(client.build_log(&dots.assert_success().out_path()), "..........\n", "{dots}");
        }
        let silent = drv::script("silent", "printf .; sleep 4711; echo x > $out");
        let ended = client.nix_build(&silent, &["-j0", "--option", "max-silent-time", "1"]);
        ended.assert_failure().assert_stderr_has("timed out after 1 seconds");
        assert_eq!(ended.code(), 101, "{ended}");
        assert!(ended.took() < Duration::from_secs(20), "{ended}");
    }
}

#[test]
fn a_builders_own_settings_stay_whatever_it_is_told_of_a_build() {
    let world = World::new();
    for release in Release::ALL {
        let mac = world.builder(release.name()).release(release).nix_conf("cores = 7").start();
        let name = format!("to-{}", release.name());
        let client = world.client().named(&name).hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
        let cores = |name: &str, options: &[&str]| {
            let args = [&["-j0"], options].concat();
            let built = client.nix_build(&drv::script(name, "echo $NIX_BUILD_CORES > $out"), &args);
            client.read(&built.assert_success().out_path())
        };
        let asked = || client.run("ls /run/nix-offload/answered").contains("settings");
        assert_eq!(cores("plain", &["--option", "timeout", "600"]), "7\n");
        assert!(!asked(), "nothing is asked for without need");
        assert_eq!(cores("kept", &["--keep-failed"]), "7\n", "{}", release.name());
        assert!(asked());
        assert_eq!(cores("kept-again", &["--keep-failed"]), "7\n");
        assert_eq!(cores("silent", &["--option", "max-silent-time", "600"]), "7\n");
    }
}

#[test]
fn builds_that_begin_together_have_a_builder_asked_for_its_settings_once() {
    let world = World::new();
    let mac = world.builder("mac").nix_conf("cores = 7").start();
    mac.write_mode(
        "/usr/local/bin/nix",
        "#!/bin/sh\necho \"$*\" >> /mnt/share/asked\nexec /usr/bin/nix \"$@\"\n",
        0o755,
    );
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 8).start();
    client.nix_build(&drv::independent(8), &["-j0", "--keep-failed"]).assert_success();
    let asked = client.read("/mnt/share/asked");
    assert_eq!(asked.lines().filter(|line| line.ends_with(" config show")).count(), 1, "{asked}");
}

#[test]
fn a_builder_that_cannot_be_asked_again_builds_with_the_settings_that_it_told() {
    let world = World::new();
    let mac = world.builder("mac").nix_conf("cores = 7").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let cores = |name: &str| {
        let built =
            client.nix_build(&drv::script(name, "echo $NIX_BUILD_CORES > $out"), &["-j0", "--keep-failed"]);
        client.read(&built.assert_success().out_path())
    };
    assert_eq!(cores("told"), "7\n");
    // The shell that asks is lost.
    mac.write_mode("/usr/local/bin/nix", "#!/bin/sh\necho x >> /mnt/share/asked\nkill -KILL $PPID\n", 0o755);
    client.run("touch -d '5 hours ago' /run/nix-offload/answered/*.settings");
    assert_eq!(cores("later"), "7\n");
    assert_eq!(cores("soon-after-that"), "7\n");
    assert_eq!(client.read("/mnt/share/asked"), "x\n", "not each build asks");
}

#[test]
fn a_builder_that_cannot_be_asked_for_its_settings_builds_all_the_same() {
    let world = World::new();
    let mac = world.builder("mac").key_options(r#"command="nix-daemon --stdio""#).start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let built = client.nix_build(&drv::trivial("kept"), &["-j0", "--keep-failed"]);
    assert!(built.assert_success().took() < SOON, "{built}");
    let silent = drv::script("silent", "sleep 4712; echo x > $out");
    let ended = client.nix_build(&silent, &["-j0", "--option", "max-silent-time", "1"]);
    ended.assert_failure().assert_stderr_has("timed out after 1 seconds of silence");
    assert_eq!(ended.code(), 101, "{ended}");
}

#[test]
fn the_daemons_clients_see_and_keep_lines_too() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().mode(Mode::Daemon).hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let talks = drv::script("talks", "echo one; echo two >&2; echo x > $out");
    let built = client.nix_build(&talks, &["-j0"]);
    built.assert_success().assert_stderr_has("one\n").assert_stderr_has("two\n");
    assert_eq!(client.build_log(&built.out_path()), "one\ntwo\n");
}
