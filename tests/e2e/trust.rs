//! Builders whose daemon does not trust the account we log in with: builds go there by the closure of the derivation, inputs
//! need a signature, and who must do what is told.

use std::time::Duration;

use harness::{
    Builder, BuilderPlan, Client, ClientPlan, Hook, Mode, Output, Release, World, drv, wait_until,
};
use nix::sys::signal::Signal;

use crate::support::{NO_SAMPLES, SOON, begun, gated, open, wait_for_begin};

const LIMIT: Duration = Duration::from_secs(10);

/// Shown when a derivation is sent to a builder.
const SENT: &str = ".drv' from 'local' to ";

/// How the account of the builders here is named to the user.
const ACCOUNT: &str = "does not trust the account 'user@";

fn plan(world: &World, release: Release) -> ClientPlan {
    world.client().named(&format!("client-{}", release.name())).hook(Hook::Ours)
}

fn untrusted(world: &World, release: Release) -> BuilderPlan {
    world.builder(release.name()).release(release).as_user()
}

/// The last of three, each with a source file of its own.
fn chain(name: &str) -> String {
    drv::expression(&format!(
        r#"let one = d "one-{name}" "cat ${{builtins.toFile "a-{name}" "a\n"}} > $out" {{ }};
             two = d "two-{name}" "cat ${{one}} ${{builtins.toFile "b-{name}" "b\n"}} > $out" {{ }};
           in d "three-{name}" "cat ${{two}} ${{builtins.toFile "c-{name}" "c\n"}} /etc/machine-name > $out" {{ }}"#
    ))
}

/// One that needs an input of that name and tells where it was built.
fn second(input: &str) -> String {
    drv::expression(&format!(
        r#"d "second-{input}" "cat ${{{}}} /etc/machine-name > $out" {{ }}"#,
        first(input)
    ))
}

fn first(input: &str) -> String {
    format!(r#"(d "{input}" "echo {input} > $out" {{ }})"#)
}

fn build_here(client: &Client, input: &str) -> String {
    let built = client.nix_build(&drv::expression(&first(input)), &["--option", "builders", ""]);
    built.assert_success().out_path()
}

#[track_caller]
fn assert_built_on(client: &Client, built: &Output, machine: &str) {
    let text = client.read(&built.assert_success().out_path());
    assert_eq!(text.lines().last(), Some(machine), "{built}");
}

#[test]
fn a_chain_of_builds_with_sources_is_made_there() {
    let world = World::new();
    for release in Release::ALL {
        let mac = untrusted(&world, release).start();
        let client = plan(&world, release).uses(&mac, "ssh-ng", 2).start();
        for name in ["cold", "warm"] {
            let built = client.nix_build(&chain(name), &["-j0"]);
            let path = built.assert_success().out_path();
            assert_eq!(client.read(&path), format!("a\nb\nc\n{}\n", mac.name()), "{built}");
            built.assert_stderr_lacks("cannot").assert_stderr_lacks("error").assert_stderr_lacks("trust");
            built.assert_stderr_has(SENT);
        }
        assert_eq!(mac.logins(), 1);
        let fixed = drv::fixed_flat("fixed", "cat /etc/machine-name > $out", &sha256_of_name(&client, &mac));
        let built = client.nix_build(&fixed, &["-j0"]);
        assert_built_on(&client, &built, mac.name());
        // What is fixed needs no closure.
        built.assert_stderr_lacks(SENT);
        client.verify_store();
        mac.verify_store();
    }
}

fn sha256_of_name(client: &Client, mac: &Builder) -> String {
    let hash = client.run(&format!("echo {} | sha256sum", mac.name()));
    format!("sha256:{}", hash.split_whitespace().next().unwrap())
}

#[test]
fn logs_failures_and_all_outputs_come_back() {
    let world = World::new();
    for release in Release::ALL {
        let mac = untrusted(&world, release).start();
        let client = plan(&world, release).uses(&mac, "ssh-ng", 1).start();
        let talks =
            drv::script("talks", "for i in 1 2 3; do echo line $i; done; cat /etc/machine-name > $out");
        let built = client.nix_build(&talks, &["-j0"]);
        assert_built_on(&client, &built, mac.name());
        assert_eq!(client.build_log(&built.out_path()), "line 1\nline 2\nline 3\n", "{built}");

        let counted =
            format!("echo built >> /mnt/share/{}; mkdir $out $dev; echo $dev > $out/dev", mac.name());
        let attrs = r#"{ outputs = [ "out" "dev" ]; }"#;
        let two = drv::expression(&format!(r#"(d "two" {} {attrs}).all"#, drv::quote(&counted)));
        let both = client.nix_build(&two, &["-j0"]);
        let paths = both.assert_success().out_paths();
        assert_eq!(client.read(&format!("{}/dev", paths[0])), format!("{}\n", paths[1]));
        // What is there already is not built again.
        client.run(&format!("nix-store --delete {}", paths.join(" ")));
        let again = client.nix_build(&two, &["-j0"]);
        assert_eq!(again.assert_success().out_paths(), paths);
        assert_eq!(client.read(&format!("/mnt/share/{}", mac.name())), "built\n");

        let evidence = "echo it went wrong; echo evidence > evidence; exit 3";
        let failed = client.nix_build(&drv::script("bad", evidence), &["-j0", "--keep-failed"]);
        failed
            .assert_failure()
            .assert_stderr_has("it went wrong")
            .assert_stderr_has("failed with exit code 3");
        failed.assert_stderr_has("kept on the remote builder").assert_stderr_lacks("instead");
        let kept = failed.stderr().lines().find(|line| line.contains("keeping build directory"));
        let kept = kept.unwrap().split(['\'', '"']).find(|word| word.starts_with('/')).unwrap();
        // From 2.34 the build's own directory is one below.
        let found = mac.run(&format!("cat {kept}/evidence {kept}/build/evidence 2>/dev/null || true"));
        assert_eq!(found, "evidence\n", "{failed}");
        client.verify_store();
    }
}

#[test]
fn both_clocks_and_a_kill_end_the_build_there() {
    let world = World::new();
    for (number, release) in Release::ALL.into_iter().enumerate() {
        let mac = untrusted(&world, release).start();
        let client = plan(&world, release).uses(&mac, "ssh-ng", 1).start();
        for (clock, words) in [("max-silent-time", "timed out after 1 seconds"), ("timeout", "timed out")] {
            let seconds = format!("47{number}{}", clock.len());
            let build = drv::silent_sleep(&format!("slow-{clock}"), &seconds);
            let ended = client.nix_build(&build, &["-j0", "--option", clock, "1"]);
            ended.assert_failure().assert_stderr_has(words);
            wait_until("the builder has stopped", SOON, || {
                mac.pids_matching(&format!("sleep {seconds}")).is_empty()
            });
        }
        let seconds = format!("48{number}");
        let sleeping = || mac.pids_matching(&format!("sleep {seconds}"));
        let build = client.spawn_nix_build(&drv::silent_sleep("killed", &seconds), &["-j0"]);
        wait_until("the build has begun", SOON, || !sleeping().is_empty());
        build.signal(Signal::SIGKILL);
        wait_until("the builder has stopped", Duration::from_secs(2), || sleeping().is_empty());
        build.wait().assert_failure();
        let next = client.nix_build(&chain("next"), &["-j0"]);
        assert_built_on(&client, &next, mac.name());
    }
}

#[test]
fn an_input_without_signature_is_named_with_all_cures_and_the_build_is_made_here() {
    let world = World::new();
    for release in Release::ALL {
        let mac = untrusted(&world, release).start();
        let client = plan(&world, release).mode(Mode::Daemon).uses(&mac, "ssh-ng", 1).start();
        // Before and after it is known, and with a master that lives.
        for input in ["cold", "warm"] {
            let path = build_here(&client, input);
            let refused = client.nix_build(&second(input), &["-j0"]);
            assert_eq!(refused.assert_failure().stdout(), "", "{refused}");
            assert!(refused.took() < LIMIT, "{refused}");
            refused
                .assert_stderr_has(&format!("cannot build on 'ssh-ng://{}'", mac.name()))
                .assert_stderr_has(&format!("{ACCOUNT}{}'", mac.name()))
                .assert_stderr_has(&format!("does not take {path}, which nobody has signed; it says: "))
                .assert_stderr_has("cannot add path")
                .assert_stderr_has(&format!("add 'user' to trusted-users in nix.conf on {}", mac.name()))
                .assert_stderr_has("restart its nix-daemon")
                .assert_stderr_has("secret-key-files")
                .assert_stderr_has(&format!("trusted-public-keys in nix.conf on {}", mac.name()));
            let local = client.nix_build(&second(input), &["-j1"]);
            assert_built_on(&client, &local, client.name());
            local.assert_stderr_has(ACCOUNT);
        }
        client.verify_store();
    }
}

#[test]
fn an_input_is_taken_that_is_signed_by_a_key_known_there_and_by_no_other() {
    let world = World::new();
    for release in Release::ALL {
        // The key is made by another machine, for the builder must know it when its daemon starts.
        let keys =
            world.builder(&format!("keys-{}", release.name())).release(release).without_daemon().start();
        for name in ["good", "bad"] {
            keys.run(&format!(
                "nix-store --generate-binary-cache-key {name}-1 /tmp/{name} /tmp/{name}.public"
            ));
        }
        let trusted = format!("trusted-public-keys = {}", keys.read("/tmp/good.public").trim());
        let mac = untrusted(&world, release).nix_conf(&trusted).start();
        let client = plan(&world, release).uses(&mac, "ssh-ng", 1).start();
        for name in ["good", "bad"] {
            client.write(&format!("/tmp/{name}"), &keys.read(&format!("/tmp/{name}")));
            let path = build_here(&client, name);
            client.run(&format!(
                "nix --extra-experimental-features nix-command store sign --key-file /tmp/{name} {path}"
            ));
        }
        assert_built_on(&client, &client.nix_build(&second("good"), &["-j0"]), mac.name());
        let local = client.nix_build(&second("bad"), &["-j1"]);
        assert_built_on(&client, &local, client.name());
        local.assert_stderr_has("signed by no key that it trusts, only by bad-1");
    }
}

#[test]
fn a_builder_that_wants_no_signatures_takes_every_input() {
    let world = World::new();
    for release in Release::ALL {
        let mac = untrusted(&world, release).nix_conf("require-sigs = false").start();
        let client = plan(&world, release).uses(&mac, "ssh-ng", 1).start();
        build_here(&client, "unsigned");
        assert_built_on(&client, &client.nix_build(&second("unsigned"), &["-j0"]), mac.name());
        client.verify_store();
        mac.verify_store();
    }
}

#[test]
fn an_input_that_the_builder_can_fetch_need_not_be_taken_from_us() {
    let world = World::new();
    for release in Release::ALL {
        let cache = format!("substituters = file:///mnt/share/{}?trusted=1", release.name());
        let mac = untrusted(&world, release).nix_conf(&cache).start();
        let settings = "builders-use-substitutes = true";
        let client = plan(&world, release).nix_conf(settings).uses(&mac, "ssh-ng", 1).start();
        for input in ["known", "unknown"] {
            let path = build_here(&client, input);
            if input == "known" {
                let to = format!("file:///mnt/share/{}", release.name());
                client.run(&format!("nix --extra-experimental-features nix-command copy --to {to} {path}"));
            }
        }
        assert_built_on(&client, &client.nix_build(&second("known"), &["-j0"]), mac.name());
        let local = client.nix_build(&second("unknown"), &["-j1"]);
        assert_built_on(&client, &local, client.name());
        local.assert_stderr_has(ACCOUNT);
    }
}

#[test]
fn what_one_builder_does_not_take_goes_to_one_that_trusts_us() {
    let world = World::new();
    for release in Release::ALL {
        let strict = world.builder("strict").release(release).as_user().start();
        let kind = world.builder("kind").start();
        let client = plan(&world, release)
            .knows(&strict)
            .knows(&kind)
            .machines("ssh-ng://strict x86_64-linux - 2 9\nssh-ng://kind x86_64-linux - 2 1")
            .start();
        client.write("/etc/nix/offload.toml", NO_SAMPLES);
        assert_built_on(&client, &client.nix_build(&chain("fast"), &["-j0"]), "strict");
        build_here(&client, "unsigned");
        let built = client.nix_build(&second("unsigned"), &["-j0"]);
        assert_built_on(&client, &built, "kind");
        built.assert_stderr_has("cannot build on 'ssh-ng://strict'").assert_stderr_has(ACCOUNT);
        // It is this one build that it does not get.
        assert_built_on(&client, &client.nix_build(&chain("faster"), &["-j0"]), "strict");
    }
}

#[test]
fn what_a_builder_does_not_take_keeps_nothing_else_from_it() {
    let world = World::new();
    for release in Release::ALL {
        let mac = untrusted(&world, release).start();
        let client = plan(&world, release).uses(&mac, "ssh-ng", 16).start();
        build_here(&client, "unsigned");
        client.nix_build(&drv::expression(&first("shared")), &["-j0"]).assert_success();
        // One hook is asked for some of each kind, one after the other.
        let all = drv::expression(&format!(
            r#"let here = i: d "here-${{toString i}}" "cat ${{{}}} /etc/machine-name > $out" {{ }};
                   there = i: d "there-${{toString i}}" "cat ${{{}}} /etc/machine-name > $out" {{ }};
               in builtins.genList here 6 ++ builtins.genList there 6"#,
            first("unsigned"),
            first("shared")
        ));
        let built = client.nix_build(&all, &["-j1"]);
        for path in built.assert_success().out_paths() {
            let machine = if path.contains("-here-") { client.name() } else { mac.name() };
            assert_eq!(client.read(&path).lines().last(), Some(machine), "{path}: {built}");
        }
    }
}

#[test]
fn a_build_that_waited_unseen_goes_there_all_the_same() {
    let world = World::new();
    for release in Release::ALL {
        let mac = untrusted(&world, release).start();
        let client = plan(&world, release).uses(&mac, "ssh-ng", 1).start();
        let name = format!("first-{}", release.name());
        let gate = client.spawn_nix_build(&gated(&name), &["-j0"]);
        wait_for_begin(&client, &name, &[mac.name()]);
        // As it is for a hook that has never heard of the machine.
        client.run("rm /run/nix-offload/answered/*.untrusted");
        let waits = client.spawn_nix_build(&chain("waits"), &["-j0"]);
        wait_until("it waits for the slot", SOON, || !held_places(&client).is_empty());
        open(&client, &name);
        gate.wait().assert_success();
        let built = waits.wait();
        assert_built_on(&client, &built, mac.name());
        built.assert_stderr_lacks("cannot").assert_stderr_lacks("trust");
    }
}

/// Places in the queue of builds that wait in a hook.
fn held_places(client: &Client) -> Vec<String> {
    crate::support::held_locks(client)
        .lines()
        .filter(|path| path.contains("/queue/"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_builder_that_trusts_us_again_is_used_the_normal_way_at_once() {
    let world = World::new();
    for release in Release::ALL {
        let mut mac = untrusted(&world, release).start();
        let client = plan(&world, release).uses(&mac, "ssh-ng", 1).start();
        client.nix_build(&chain("before"), &["-j0"]).assert_success();
        mac.stop_daemon();
        mac.run("echo 'trusted-users = root user' >> /etc/nix/nix.conf");
        mac.start_daemon();
        if release == Release::Bookworm {
            // It does not say so, and until it is asked again it is not believed.
            let ping = client.nix_offload(&["ping-store"]);
            assert!(ping.stdout().contains("\nTrusted: 1\n"), "{ping}");
        }
        build_here(&client, "unsigned");
        let built = client.nix_build(&second("unsigned"), &["-j0"]);
        assert_built_on(&client, &built, mac.name());
        built.assert_stderr_lacks("trust");
        built.assert_stderr_lacks(SENT);
    }
}

#[test]
fn a_refusal_that_was_not_foreseen_sends_the_build_elsewhere_or_ends_it() {
    let world = World::new();
    for release in Release::ALL {
        let strict = world.builder("strict").release(release).as_user().start();
        let kind = world.builder("kind").start();
        let client = plan(&world, release).knows(&strict).knows(&kind).start();
        let strict_line = "ssh-ng://strict x86_64-linux - 1 9";
        for (input, machines) in
            [("two", &[strict_line, "ssh-ng://kind x86_64-linux - 1 1"][..]), ("one", &[strict_line][..])]
        {
            client.set_machines(&machines.join("\n"));
            build_here(&client, input);
            let names: Vec<String> =
                (0..machines.len()).map(|slot| format!("{input}-{slot}-{}", release.name())).collect();
            let gates: Vec<_> = names
                .iter()
                .map(|name| {
                    let gate = client.spawn_nix_build(&gated(name), &["-j0"]);
                    wait_until("it is begun", SOON, || !begun(&client, name).is_empty());
                    gate
                })
                .collect();
            // With all slots taken it is accepted before any machine is asked.
            let waits = client.spawn_nix_build(&second(input), &["-j0"]);
            wait_until("it waits for the slot", SOON, || !held_places(&client).is_empty());
            let on_strict = names.iter().position(|name| begun(&client, name) == ["strict"]).unwrap();
            open(&client, &names[on_strict]);
            if machines.len() > 1 {
                wait_until("it is told", SOON, || waits.stderr_so_far().contains(ACCOUNT));
            }
            names.iter().for_each(|name| open(&client, name));
            let ended = waits.wait();
            ended.assert_stderr_has(ACCOUNT).assert_stderr_has("which nobody has signed; it says: ");
            assert_eq!(ended.stderr().matches("cannot build on 'ssh-ng://strict'").count(), 1, "{ended}");
            if machines.len() > 1 {
                assert_built_on(&client, &ended, "kind");
            } else {
                assert_eq!(ended.assert_failure().stdout(), "", "{ended}");
                ended.assert_stderr_has("could not be built on any machine");
            }
            for gate in gates {
                gate.wait().assert_success();
            }
        }
    }
}

#[test]
fn a_forced_command_without_trust_builds_too() {
    const FORCED: &str = r#"command="nix-daemon --stdio --force-untrusted",restrict"#;
    let world = World::new();
    for release in [Release::Trixie, Release::Sid] {
        let feature = "extra-experimental-features = daemon-trust-override";
        let mac =
            world.builder(release.name()).release(release).key_options(FORCED).nix_conf(feature).start();
        let client = plan(&world, release).uses(&mac, "ssh-ng", 1).start();
        for name in ["cold", "warm"] {
            let built = client.nix_build(&chain(name), &["-j0"]);
            assert_built_on(&client, &built, mac.name());
            built.assert_stderr_has(SENT).assert_stderr_lacks("cannot");
        }
        let input = build_here(&client, "unsigned");
        let refused = client.nix_build(&second("unsigned"), &["-j0"]);
        refused.assert_failure().assert_stderr_has(&format!("does not take {input}"));
        client.verify_store();
        mac.verify_store();
    }
}

#[test]
fn the_daemon_of_this_machine_builds_for_a_user_without_rights() {
    const STORE: &str = "/home/user/store";
    let world = World::new();
    for release in Release::ALL {
        let mode = Mode::Private { store: STORE.into(), as_user: true };
        let client = plan(&world, release).release(release).mode(mode).start();
        client.run(
            "nix-daemon </dev/null >/tmp/daemon.log 2>&1 & \
             until [ -S /nix/var/nix/daemon-socket/socket ]; do sleep 0.02; done",
        );
        let machine = ["--builders", "daemon - - 1 1"];
        let built = client.nix_build(&chain("a"), &[&["-j0"], &machine[..]].concat());
        let path = built.assert_success().out_path();
        assert_eq!(client.read(&format!("{STORE}{path}")), format!("a\nb\nc\n{}\n", client.name()));
        built.assert_stderr_has(SENT);
        let here = client.nix_build(&drv::expression(&first("unsigned")), &["--option", "builders", ""]);
        here.assert_success();
        let refused = client.nix_build(&second("unsigned"), &[&["-j0"], &machine[..]].concat());
        refused.assert_failure().assert_stderr_has("does not trust the account 'user@this machine'");
        refused.assert_stderr_has("add 'user' to trusted-users in nix.conf on this machine");
        client.verify_store_at(STORE);
        client.verify_store();
    }
}
