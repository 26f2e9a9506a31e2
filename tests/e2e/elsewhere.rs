//! Machines that are not reached by ssh, and what is left to Nix's own hook.

use std::time::Duration;

use harness::{Client, Hook, Mode, Release, Running, World, drv, event, wait_until};
use nix::sys::signal::Signal;

use crate::support::{SOON, begun, gated, open, sleeping, wait_for_begin};

/// Not /nix, which is one of the machines.
const STORE: &str = "/root/my-nix";

/// Where nix.conf does not count.
const HOOK_BY_ENVIRONMENT: &str = "build-hook = /opt/nix-offload/bin/nix-offload";

fn client(world: &World, release: Release) -> Client {
    let mode = Mode::Private { store: STORE.into(), as_user: false };
    world.client().named(release.name()).release(release).mode(mode).hook(Hook::Ours).start()
}

fn start_daemon(client: &Client) {
    client.run(
        "nix-daemon </dev/null >/tmp/daemon.log 2>&1 & \
         until [ -S /nix/var/nix/daemon-socket/socket ]; do sleep 0.02; done",
    );
}

fn start(client: &Client, expression: &str, machines: &str) -> Running {
    client.spawn_nix_build(expression, &["-j0", "--builders", machines])
}

#[test]
fn a_cancelled_build_ends_with_its_daemon() {
    let world = World::new();
    for (index, release) in Release::ALL.into_iter().enumerate() {
        let client = client(&world, release);
        start_daemon(&client);
        let before = client.pids_matching("nix-daemon");
        let machines = ["auto", "ssh-ng://localhost", "daemon", "/srv/store"];
        for (number, uri) in machines.into_iter().enumerate() {
            for (signal, name) in [(Signal::SIGKILL, "kill"), (Signal::SIGINT, "int")] {
                let seconds = format!("4{index}{number}{}", signal as i32 + 10);
                let sleep = drv::silent_sleep(&format!("sleeper-{number}-{name}"), &seconds);
                let build = start(&client, &sleep, &format!("{uri} - - 1 1"));
                wait_until("the build has begun", SOON, || !sleeping(&client, &seconds).is_empty());
                build.signal(signal);
                wait_until(&format!("the build on {uri} has ended"), SOON, || {
                    sleeping(&client, &seconds).is_empty()
                });
                build.wait().assert_failure();
                wait_until(&format!("the daemon for {uri} has gone"), SOON, || {
                    let hooks = client.processes();
                    let mut hooks =
                        hooks.iter().filter(|process| process.command_line != "nix-offload sample");
                    client.pids_matching("nix-daemon") == before
                        && !hooks.any(|process| process.command_line.contains("nix-offload"))
                });
            }
        }
        client.verify_store_at(STORE);
    }
}

#[test]
fn a_daemon_of_our_own_has_none_of_nixs_descriptors() {
    let world = World::new();
    let client = client(&world, Release::Bookworm);
    for (number, uri) in ["auto", "ssh-ng://localhost"].into_iter().enumerate() {
        let name = format!("gate-{number}");
        let build = start(&client, &gated(&name), &format!("{uri} - - 1 1"));
        wait_for_begin(&client, &name, &["bookworm"]);
        let hook =
            client.processes().into_iter().find(|p| p.command_line.ends_with("nix-offload 3")).unwrap();
        let daemon = client.pids_matching("nix-daemon --stdio")[0];
        let link = |pid: u32, number: &str| client.run(&format!("readlink /proc/{pid}/fd/{number}"));
        for number in ["2", "4"] {
            let theirs =
                client.run(&format!("cd /proc/{daemon}/fd; for fd in *; do readlink $fd; done || true"));
            assert!(!theirs.contains(link(hook.pid, number).trim()), "{number}: {theirs}");
        }
        open(&client, &name);
        build.wait().assert_success();
    }
}

#[test]
fn a_daemon_of_our_own_that_dies_is_started_again() {
    let world = World::new();
    let client = client(&world, Release::Bookworm);
    let build = start(&client, &gated("again"), "auto - - 1 1");
    wait_for_begin(&client, "again", &["bookworm"]);
    client.kill(client.pids_matching("nix-daemon --stdio")[0], "KILL");
    wait_for_begin(&client, "again", &["bookworm", "bookworm"]);
    open(&client, "again");
    build.wait().assert_success().assert_stderr_has("connecting again");
    client.verify_store_at(STORE);
}

#[test]
fn one_that_cannot_be_used_is_left_alone_while_another_will_do() {
    let world = World::new();
    let client = client(&world, Release::Bookworm);
    let machines = "unix:///no/such - - 1 9; auto - - 1 1";
    for (name, first) in [("one", true), ("two", false)] {
        let built = client.nix_build(&drv::trivial(name), &["-j0", "--builders", machines]);
        built.assert_success().assert_stderr_has("on 'auto'");
        let said = built
            .stderr()
            .contains("cannot build on 'unix:///no/such': cannot connect to the daemon's socket");
        assert_eq!(said, first, "{built}");
    }
}

#[test]
fn slots_count_for_them_too() {
    let world = World::new();
    let client = client(&world, Release::Bookworm);
    let first = start(&client, &gated("first"), "auto - - 1 1");
    wait_for_begin(&client, "first", &["bookworm"]);
    let mut second = start(&client, &gated("second"), "auto - - 1 1");
    let needs = drv::expression(r#"d "needs" "" { requiredSystemFeatures = [ "no-such" ]; }"#);
    start(&client, &needs, "auto - - 1 1").wait().assert_failure();
    assert_eq!(begun(&client, "second"), Vec::<String>::new());
    assert!(second.is_running());
    open(&client, "first");
    first.wait().assert_success();
    wait_for_begin(&client, "second", &["bookworm"]);
    open(&client, "second");
    second.wait().assert_success();
    assert!(client.entries(&format!("{STORE}/nix/var/nix/current-load")).contains(&"auto-0".to_owned()));
}

#[test]
fn ping_store_names_the_way() {
    let world = World::new();
    for release in Release::ALL {
        let client = client(&world, release);
        start_daemon(&client);
        for (uri, way) in [
            ("ssh-ng://localhost", "nix-daemon --stdio here"),
            ("ssh://localhost?remote-store=/srv/one", "nix-daemon --stdio here"),
            ("auto", "nix-daemon --stdio here"),
            ("/srv/two", "nix-daemon --stdio here"),
            ("local?root=/srv/three", "nix-daemon --stdio here"),
            ("daemon", "daemon socket here"),
            ("unix:///nix/var/nix/daemon-socket/socket", "daemon socket here"),
        ] {
            let output = client.nix_offload(&["ping-store", "--store", uri]);
            output.assert_success();
            assert!(output.stdout().contains(&format!("\nWay: {way}\n")), "{output}");
            assert!(output.stdout().starts_with(&format!("Store URL: {uri}\nVersion: ")), "{output}");
        }
        for (uri, word) in [
            ("unix:///no/such/socket", "cannot connect to the daemon's socket /no/such/socket"),
            ("ssh-ng://localhost?remote-program=no-such-program", "no-such-program"),
            ("/dev/null/store", "/dev/null/store"),
        ] {
            let output = client.nix_offload(&["ping-store", "--store", uri]);
            assert_eq!(output.code(), 69, "{output}");
            assert!(output.stdout().contains(word) && output.stdout().contains("\nHint: "), "{output}");
        }
    }
}

#[test]
fn a_store_that_is_the_clients_own_is_left_out_at_once() {
    let world = World::new();
    for release in Release::ALL {
        let client = world.client().named(release.name()).release(release).hook(Hook::Ours).start();
        start_daemon(&client);
        let uris = [
            "auto",
            "ssh-ng://localhost",
            "local",
            "daemon",
            "ssh-ng://localhost?remote-store=auto",
            "ssh-ng://localhost?remote-store=daemon",
            "ssh-ng://localhost?remote-store=unix:///nix/var/nix/daemon-socket/socket",
        ];
        for (number, uri) in uris.into_iter().enumerate() {
            // With the stock hook this waits for ever.
            let name = format!("own-{number}");
            let machines = format!("{uri} - - 1 1");
            let args = ["-j1", "--builders", &machines];
            let built = client
                .nix_build_command(&drv::where_built(&name), &args)
                .limit(Duration::from_secs(30))
                .run();
            built.assert_success().assert_stderr_lacks(&format!("on '{uri}'"));
            let needs_it = drv::where_built(&format!("needed-{number}"));
            let failed = client.nix_build(&needs_it, &["-j0", "--builders", &machines]);
            failed.assert_failure().assert_stderr_has("its store is this client's own");
        }
        client.verify_store();
    }
}

#[test]
fn the_store_in_a_home_is_its_users_own_where_there_is_no_other() {
    let world = World::new();
    // `nix-daemon --stdio` has taken that store since Nix 2.34.
    let client = world.client().release(Release::Sid).hook(Hook::Ours).start();
    client.run("rm -rf /nix");
    let args = ["--no-out-link", "-j0", "--builders", "ssh-ng://localhost - - 1 1", "-E"];
    let build = client.nix("nix-build").args(args).arg(&drv::where_built("own")).as_user();
    // With the stock hook this waits for ever.
    let failed = build.limit(Duration::from_secs(30)).run();
    failed.assert_failure().assert_stderr_has("its store is this client's own");
    assert!(client.exists("/home/user/.local/share/nix/root/nix/var/nix/db/db.sqlite"), "{failed}");
}

#[test]
fn a_machine_whose_file_system_hangs_holds_up_no_build_for_another_one() {
    let world = World::new();
    let client = client(&world, Release::Trixie);
    // Whoever looks at what is below it waits for an answer that never comes.
    client.run(
        "mknod /dev/fuse c 10 229 && mkdir /mnt/dead && exec 9<>/dev/fuse && \
         mount -i -t fuse -o fd=9,rootmode=40000,user_id=0,group_id=0 none /mnt/dead && \
         { setsid sleep infinity >/dev/null 2>&1 & }",
    );
    let machines = "/mnt/dead/store - - 1 9 ; /srv/well - - 1 1";
    for name in ["one", "two"] {
        let args = ["-j0", "--builders", machines];
        let built = client.nix_build_command(&drv::trivial(name), &args).limit(Duration::from_secs(30)).run();
        built.assert_success().assert_stderr_has("on 'local:///srv/well'");
    }
    let status = client.nix_offload(&["status", "--store", STORE, "--builders", machines]);
    status.assert_success();
}

#[test]
fn what_another_hook_does_stands_beside_what_we_do() {
    let world = World::new();
    for release in [Release::Trixie, Release::Sid] {
        let mode = Mode::Private { store: STORE.into(), as_user: false };
        let client = world
            .client()
            .named(release.name())
            .release(release)
            .mode(mode)
            .hook(Hook::Ours)
            .nix_conf("extra-experimental-features = mounted-ssh-store")
            .nix_conf("system-features = special usual")
            .start();
        // On the command line, so that the far daemon does not ask them again.
        let machines = "mounted-ssh-ng://localhost - - 1 9 special; local?root=/srv/ours - - 1 1 usual";
        let graph = |name: &str| {
            drv::expression(&format!(
                r#"let
                  plain = d "plain-{name}" "echo plain > $out" {{ requiredSystemFeatures = [ "usual" ]; }};
                  special = d "special-{name}" "cat ${{plain}} > $out; echo special >> $out" {{
                    requiredSystemFeatures = [ "special" ];
                  }};
                in d "all-{name}" "cat ${{special}} > $out; echo all >> $out" {{ }}"#
            ))
        };
        let built = client.nix_build(&graph("a"), &["-j0", "--builders", machines]);
        let path = built.assert_success().out_path();
        assert_eq!(client.read(&format!("{STORE}{path}")), "plain\nspecial\nall\n");
        built.assert_stderr_has("-special-a.drv' on 'mounted-ssh-ng://localhost'");
        for ours in ["plain-a", "all-a"] {
            built.assert_stderr_has(&format!("-{ours}.drv' on 'local://?root=/srv/ours'"));
        }
        client.verify_store_at(STORE);
    }
}

#[test]
fn what_is_to_be_done_here_is_not_offered_to_the_machines_of_another_hook() {
    let world = World::new();
    let client = world.client().hook(Hook::Ours).journald().start();
    client.set_machines("file:///srv/cache x86_64-linux - 1 1\n");
    let asked = || {
        let entries = client.journal("-t nix-offload");
        entries.iter().filter(|entry| event(entry) == "asked Nix's own hook").count()
    };
    let settings = [
        ("policy = 'local-first'", 0),
        // For whom this one is full, and another one may be free.
        ("policy = 'remote-first'", 1),
    ];
    for (number, (policy, times)) in settings.into_iter().enumerate() {
        client.write("/etc/nix/offload.toml", &format!("[choice]\n{policy}\n"));
        let built = client.nix_build(&drv::where_built(&format!("policy-{number}")), &["-j1"]);
        assert_eq!(asked(), times, "{policy}: {built}");
    }
}

#[test]
fn a_hook_that_asked_another_one_still_does_its_own_work() {
    let world = World::new();
    let client = world
        .client()
        .mode(Mode::Private { store: STORE.into(), as_user: false })
        .hook(Hook::Ours)
        .env("NIX_OFFLOAD_STOCK_HOOK", "/tmp/other hook")
        .nix_conf("system-features = special")
        .start();
    let machines = "plugin://x - - 1 1 special; auto - - 1 1";
    let both = |name: &str| {
        drv::expression(&format!(
            r#"[ (d "special-{name}" "" {{ requiredSystemFeatures = [ "special" ]; }})
                 (d "plain-{name}" "echo x > $out" {{ }}) ]"#
        ))
    };
    let count = "echo $$ $* >> /tmp/asked; echo words for the user >&2";
    for (name, script) in [
        ("declines", "while dd bs=1 count=8 >/dev/null 2>&1; do echo '# decline' >&2; sleep 9; done"),
        ("declines-for-ever", "echo '# decline-permanently' >&2"),
        ("dies", "kill -9 $$"),
        ("dies-in-mid-accept", "echo '# accept' >&2"),
        ("talks", "echo '# frobnicate' >&2; sleep 9"),
    ] {
        client.write_mode("/tmp/other", &format!("#!/bin/sh\n{count}\n{script}\n"), 0o755);
        let built = client.nix_build(&both(name), &["-j0", "--keep-going", "--builders", machines]);
        built.assert_failure().assert_stderr_has("words for the user");
        built
            .assert_stderr_has(&format!("-plain-{name}.drv' on 'auto'"))
            .assert_stderr_lacks("bad hook reply");
        assert!(
            client
                .entries(&format!("{STORE}/nix/store"))
                .iter()
                .any(|e| e.ends_with(&format!("-plain-{name}")))
        );
        wait_until("the other hook has gone", SOON, || client.pids_matching("/tmp/other").is_empty());
    }
    assert!(client.read("/tmp/asked").lines().all(|line| line.ends_with(" hook 3")));
    client.verify_store_at(STORE);
}

#[test]
fn daemons_of_our_own_do_not_ask_the_same_machines_again() {
    let world = World::new();
    for release in Release::ALL {
        let client = world
            .client()
            .named(release.name())
            .release(release)
            .mode(Mode::Daemon)
            .hook(Hook::Ours)
            .machines("ssh-ng://localhost?remote-store=/srv/one x86_64-linux - 2 1")
            .machines("ssh-ng://localhost?remote-store=/srv/two x86_64-linux - 2 1")
            .machines("/srv/three x86_64-linux - 2 1")
            .nix_conf("max-jobs = 0")
            .daemon_env("NIX_CONFIG", if release == Release::Trixie { HOOK_BY_ENVIRONMENT } else { "" })
            .start();
        let many = drv::expression(
            r#"builtins.genList (i: d "many-${toString i}" "echo ${toString i} > $out" { }) 6"#,
        );
        let built = client.nix_build_command(&many, &[]).limit(SOON * 2).run();
        assert_eq!(built.assert_success().out_paths().len(), 6, "{built}");
        client.verify_store();
    }
}

#[test]
fn large_inputs_and_outputs_pass_through_a_daemon_of_our_own() {
    let world = World::new();
    for release in Release::ALL {
        let client = client(&world, release);
        let large = drv::expression(
            r#"let
              large = d "large" "head -c 40M /dev/urandom > $out" { requiredSystemFeatures = [ "one" ]; };
            in d "larger" "cat ${large} ${large} > $out" { requiredSystemFeatures = [ "two" ]; }"#,
        );
        let machines = "auto - - 1 1 one; /srv/two - - 1 1 two";
        let built = client.nix_build(&large, &["-j0", "--builders", machines]);
        let path = built.assert_success().out_path();
        assert_eq!(client.path(&format!("{STORE}{path}")).metadata().unwrap().len(), 80 << 20);
        client.verify_store_at(STORE);
    }
}

/// What would be sent to it in advance, and what it answers to the first half of that, are each more than a pipe holds.
#[test]
fn a_daemon_of_our_own_with_many_inputs_and_their_user_do_not_wait_for_each_other() {
    let world = World::new();
    let client = client(&world, Release::Bookworm);
    for name in ["first", "when-they-are-known-to-be-there"] {
        let many = drv::expression(&format!(
            r#"let
              input = i: builtins.toFile "input-of-the-usual-length-${{toString (100 + i)}}" "x";
            in d "{name}" "set -- $inputs; echo $# > $out" {{ inputs = builtins.genList input 720; }}"#
        ));
        let command = client.nix_build_command(&many, &["-j0", "--builders", "auto - - 1 1"]);
        let path = command.limit(SOON * 3).run().assert_success().out_path();
        assert_eq!(client.read(&format!("{STORE}{path}")), "720\n");
    }
}

#[test]
fn a_silent_build_on_this_machine_is_ended() {
    let world = World::new();
    for (number, release) in Release::ALL.into_iter().enumerate() {
        let client = client(&world, release);
        for (kind, uri) in ["auto", "ssh-ng://localhost"].into_iter().enumerate() {
            let seconds = format!("46{number}{kind}");
            let machine = format!("{uri} - - 1 1");
            let args = ["-j0", "--builders", &machine, "--option", "max-silent-time", "1"];
            let built = client.nix_build(&drv::silent_sleep(&format!("silent-{kind}"), &seconds), &args);
            built.assert_failure().assert_stderr_has("timed out after 1 seconds");
            wait_until("the build has ended", SOON, || {
                client.pids_matching(&format!("sleep {seconds}")).is_empty()
                    && client.pids_matching("nix-daemon").is_empty()
            });
        }
    }
}

#[test]
fn an_account_that_is_not_trusted_is_named() {
    let world = World::new();
    let client = world.client().release(Release::Trixie).mode(Mode::Daemon).hook(Hook::Ours).start();
    let output = client.command(harness::OURS).args(["ping-store", "--store", "daemon"]).as_user().run();
    assert!(output.stdout().contains("\nTrusted: 0\n"), "{output}");
    assert!(output.stdout().contains("add 'user' to trusted-users"), "{output}");
}

#[test]
fn impure_derivations_are_built_by_the_client() {
    let world = World::new();
    let features = "extra-experimental-features = ca-derivations impure-derivations";
    for release in [Release::Trixie, Release::Sid] {
        let mac =
            world.builder(&format!("mac-{}", release.name())).release(release).nix_conf(features).start();
        let client = world
            .client()
            .named(release.name())
            .release(release)
            .hook(Hook::Ours)
            .nix_conf(features)
            .knows(&mac)
            .machines(&format!("ssh-ng://{} x86_64-linux - 2 1 ca-derivations", mac.alias()))
            .start();
        let impure = drv::expression(r#"d "impure" "cat /etc/machine-name > $out" { __impure = true; }"#);
        // Nix's own hook takes it to the machine, and Nix then stops everything: outputs are unexpectedly invalid.
        // And nix-build cannot print the path.
        let words = ["build", "--impure", "--no-link", "--print-out-paths", "-j1", "--expr", &impure];
        let path = client.nix("nix").args(words).run().assert_success().out_path();
        assert_eq!(client.read(&path), format!("{}\n", release.name()));
        client.verify_store();
    }
}

#[test]
fn without_nixs_own_hook_there_is_a_line_that_says_so() {
    let world = World::new();
    let client = world
        .client()
        .release(Release::Trixie)
        .hook(Hook::Ours)
        .nix_conf("extra-experimental-features = ca-derivations")
        .machines("ssh-ng://nowhere x86_64-linux - 1 1 ca-derivations")
        .env("NIX_OFFLOAD_STOCK_HOOK", "/no/such/hook --please")
        .start();
    let floating = drv::expression(
        r#"d "floating" "echo x > $out" {
          __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
        }"#,
    );
    let built = client.nix_build(&floating, &["-j0"]);
    built.assert_failure().assert_stderr_has("cannot start Nix's own build hook '/no/such/hook'");
    client.nix_build(&floating, &["-j1"]).assert_success().assert_stderr_has("is left to Nix's own hook");
}

#[test]
fn what_another_hook_builds_ends_with_the_client() {
    let world = World::new();
    let features = "extra-experimental-features = ca-derivations";
    let mac = world.builder("mac").release(Release::Sid).nix_conf(features).start();
    let client = world
        .client()
        .release(Release::Sid)
        .hook(Hook::Ours)
        .nix_conf(features)
        .knows(&mac)
        .machines("ssh-ng://mac x86_64-linux - 2 1 ca-derivations")
        .start();
    let sleeper = drv::expression(
        r#"d "sleeper" "sleep 4777; echo x > $out" {
          __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
        }"#,
    );
    let build = client.spawn_nix_build(&sleeper, &["-j0"]);
    let sleeping = || mac.pids_matching("sleep 4777");
    wait_until("the build has begun", SOON, || !sleeping().is_empty());
    build.signal(Signal::SIGKILL);
    wait_until("the hooks have gone", SOON, || {
        client.pids_matching("build-remote").is_empty() && client.pids_matching("nix-offload").is_empty()
    });
    wait_until("the build has ended", SOON, || sleeping().is_empty());
    build.wait().assert_failure();
}
