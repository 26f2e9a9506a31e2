//! What people are told of the choice: `explain`, and the table where nothing fits.

use harness::{Client, ClientPlan, Hook, Mode, OURS, Output, Release, World, drv, wait_until};
use serde_json::Value;

use crate::support::{NO_SAMPLES, SOON, gated, open, wait_for_begin};

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// The path of an expression's derivation, which is not built.
fn instantiated(client: &Client, expression: &str) -> String {
    let output = client.nix("nix-instantiate").args(["-E", expression]).run();
    output.assert_success().stdout().trim().to_owned()
}

fn json(output: &Output) -> Value {
    let list: Value =
        serde_json::from_str(output.stdout()).unwrap_or_else(|error| panic!("{error}: {output}"));
    list[0].clone()
}

fn explained(client: &Client, drv_path: &str) -> Value {
    let output = client.nix_offload(&["explain", "--json", "-j0", drv_path]);
    json(output.assert_success().assert_stderr_lacks("warning"))
}

/// Explains first, builds then: what was said is what is done.
fn assert_agrees(client: &Client, name: &str, machine: &str) {
    let expression = drv::where_built(name);
    let drv_path = instantiated(client, &expression);
    let told = explained(client, &drv_path);
    assert_eq!(
        (&told["verdict"], &told["named"][0]),
        (&"build".into(), &format!("ssh-ng://{machine}").into()),
        "{told}"
    );
    let built = client.nix_build(&expression, &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), format!("{machine}\n"), "{told}");
}

#[test]
fn what_is_explained_is_what_is_then_done() {
    let world = World::new();
    let (mac, pi) = (world.builder("mac").start(), world.builder("pi").start());
    for release in Release::ALL {
        let name = |name: &str| format!("{name}-{}", release.name());
        let client = plan(&world)
            .named(release.name())
            .release(release)
            .uses(&mac, "ssh-ng", 1)
            .machines("ssh-ng://pi x86_64-linux - 1 0.25\n")
            .knows(&pi)
            .start();
        client.write("/etc/nix/offload.toml", NO_SAMPLES);
        assert_agrees(&client, &name("idle"), "mac");
        let held = name("held");
        let build = client.spawn_nix_build(&gated(&held), &["-j0"]);
        wait_for_begin(&client, &held, &["mac"]);
        assert_agrees(&client, &name("busy"), "pi");
        // Of a slot that Nix's own hook has it is not known how long it will be taken.
        client.run("truncate -s 0 /nix/var/nix/current-load/*mac*");
        let told = explained(&client, &instantiated(&client, &drv::where_built(&name("busier"))));
        let answer = told["answer"].as_str().unwrap();
        assert!(answer.contains("ssh-ng://mac would be sooner, but it is full"), "{told}");
        client.nix_offload(&["drain", "pi"]).assert_success();
        let waiting = instantiated(&client, &drv::trivial(&name("waiting")));
        let told = explained(&client, &waiting);
        assert_eq!((&told["verdict"], &told["named"][0]), (&"wait".into(), &"ssh-ng://mac".into()), "{told}");
        assert_eq!(told["machines"][1]["reason"], "drained", "{told}");
        open(&client, &held);
        build.wait().assert_success();
        assert_agrees(&client, &name("drained"), "mac");
    }
}

#[test]
fn an_explanation_says_what_is_asked_and_what_is_missing_where() {
    let world = World::new();
    let client = plan(&world)
        .machines("ssh://a x86_64-linux - 2 1 kvm\nssh://b aarch64-linux\nssh://c x86_64-linux - 0 1 kvm\n")
        .start();
    let needs = |body: &str| instantiated(&client, &drv::expression(&format!(r#"d "x-1" "" {body}"#)));
    let structured = needs(r#"{ __structuredAttrs = true; requiredSystemFeatures = [ "kvm" ]; }"#);
    let output = client.nix_offload(&["explain", "-j0", &structured]);
    let text = output.assert_success().stdout();
    assert!(
        text.starts_with(&format!(
            "{structured}\n  for x86_64-linux, requires the features [kvm]; no build of that name is remembered\n  \
             to be built on ssh://a: "
        )),
        "{text}"
    );
    for line in [
        "    1. ssh://a  done in 30 s\n",
        "    -  ssh://b  does not build for this system\n",
        "note: ssh://a has not answered within the last minute, so it is connected to first",
        "note: Nix builds nothing here (max-jobs is 0)\n",
    ] {
        assert!(text.contains(line), "{line:?}: {text}");
    }
    let told = explained(&client, &structured);
    assert_eq!((&told["features"][0], &told["system"]), (&"kvm".into(), &"x86_64-linux".into()));
    assert_eq!(
        (&told["measured"], &told["slots"], &told["derivation"]),
        (&false.into(), &1.into(), &structured.as_str().into())
    );
    assert_eq!(told["machines"][0]["seconds"]["total"], 30.0, "{told}");
    assert_eq!(told["machines"][0]["place"], 1);
    let none = explained(&client, &needs(r#"{ requiredSystemFeatures = [ "no-such" ]; }"#));
    assert_eq!((&none["verdict"], none["named"].as_array().unwrap().len()), (&"decline".into(), 0));
    assert_eq!(none["machines"][0]["reason"], "lacks the features [no-such]");
    let local = client.nix_offload(&["explain", &needs("{ preferLocalBuild = true; }")]);
    assert!(
        local.assert_success().stdout().contains("note: it says preferLocalBuild, so Nix builds it here"),
        "{local}"
    );
    let builtin = needs(r#"{ builder = "builtin:fetchurl"; system = "builtin"; }"#);
    let local = client.nix_offload(&["explain", &builtin]);
    assert!(local.assert_success().stdout().contains("left to Nix: it is done by Nix itself"), "{local}");
}

#[test]
fn an_experimental_kind_is_left_to_nixs_own_hook() {
    let world = World::new();
    let client = plan(&world)
        .nix_conf("experimental-features = ca-derivations")
        .machines("ssh://a x86_64-linux")
        .start();
    let expression = drv::expression(
        r#"d "x" "" { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }"#,
    );
    let output = client.nix_offload(&["explain", &instantiated(&client, &expression)]);
    assert!(output.assert_success().stdout().contains("  left to Nix's own hook: "), "{output}");
}

#[test]
fn paths_files_and_installables_lead_to_derivations() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for release in Release::ALL {
        let client = plan(&world).named(release.name()).release(release).uses(&mac, "ssh-ng", 1).start();
        let expression = drv::where_built("hello-1");
        let drv_path = instantiated(&client, &expression);
        client.write("/root/x/default.nix", &expression);
        client.write("/root/y.nix", &format!("{{ hello = {expression}; }}"));
        client.write(
            "/root/flake/flake.nix",
            &format!(
                "{{ outputs = _: {{ hello = {}; }}; }}",
                expression.replace("builtins.currentSystem", "\"x86_64-linux\"")
            ),
        );
        let built = client.nix_build(&expression, &["-j0"]);
        let out = built.assert_success().out_path();
        client.run(&format!("ln -s {out} /root/result"));
        for words in [
            &[drv_path.as_str()][..],
            &[&format!("{drv_path}!out")],
            &[&out],
            &["/root/result"],
            &["/root/x"],
            &["/root/x/default.nix"],
            &["-f", "/root/y.nix", "hello"],
            &["path:/root/flake#hello"],
            &["-f", "/root/x"],
        ] {
            let output = client.nix_offload(&[&["explain", "--json"], words].concat());
            let told = json(output.assert_success());
            assert_eq!(told["derivation"], drv_path.as_str(), "{words:?}: {output}");
            let note = told["notes"][0].as_str().unwrap();
            assert!(note.starts_with("its outputs are there already"), "{output}");
        }
        for (words, code, part) in [
            (&["/root/flake#nothing"][..], 2, "does not provide attribute"),
            (&["-f", "/root/y.nix", "nothing"], 2, "error: Nix cannot evaluate 'nothing' ('nix-instantiate "),
            (&["/nix/store/00000000000000000000000000000000-x"], 2, "is not in the store"),
            (&["/nix/store/00000000000000000000000000000000-x.drv"], 2, "is not in the store"),
        ] {
            let output = client.nix_offload(&[&["explain"], words].concat());
            assert_eq!(output.code(), code, "{output}");
            output.assert_stderr_has(part);
        }
        let source = client.run("nix-store --add /root/y.nix");
        let output = client.nix_offload(&["explain", source.trim()]);
        assert_eq!(output.code(), 2, "{output}");
        output.assert_stderr_has("it is not known which derivation made");
    }
}

#[test]
fn what_was_decided_last_is_told_with_its_time() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for mode in [Mode::SingleUser, Mode::Daemon] {
        let name = format!("{mode:?}").to_lowercase();
        let client = plan(&world).named(&name).mode(mode.clone()).uses(&mac, "ssh-ng", 1).start();
        let last = |drv_path: &str| client.nix_offload(&["explain", "--last", drv_path]);
        let built = instantiated(&client, &drv::where_built("built"));
        let nothing = last(&built);
        assert_eq!((nothing.code(), nothing.stderr()), (1, ""), "{nothing}");
        assert!(nothing.stdout().contains("nothing is kept of a decision about it"), "{nothing}");
        client.nix_build(&drv::where_built("built"), &["-j0"]).assert_success();
        let told = last(&built);
        let text = told.assert_success().stdout();
        assert!(text.starts_with(&format!("{built}\nbuilt on ssh-ng://mac ")), "{text}");
        assert!(text.contains("\ndecided on 20"), "{text}");
        assert!(text.contains(" ago:\n  to be built on ssh-ng://mac: "), "{text}");
        let needs = drv::expression(r#"d "needs" "" { requiredSystemFeatures = [ "no-such" ]; }"#);
        let declined = instantiated(&client, &needs);
        client.nix_build(&needs, &["-j0"]).assert_failure();
        let told = client.nix_offload(&["explain", "--last", "--json", &declined]);
        let told = json(told.assert_success());
        assert_eq!((&told["source"], &told["derivation"]), (&"state".into(), &declined.as_str().into()));
        assert!(told["at"].as_u64().unwrap() > 1_700_000_000, "{told}");
        let text = told["text"].as_str().unwrap();
        assert!(text.starts_with("left to Nix: no machine can take it\n"), "{text}");
        assert!(text.contains("lacks the features [no-such]"), "{text}");
        if mode == Mode::Daemon {
            let refused = client.nix(OURS).args(["explain", "--last", &built]).run();
            assert_eq!(refused.code(), 77, "{refused}");
            refused.assert_stderr_has(&format!("hint: run: sudo nix-offload explain --last {built}\n"));
        }
    }
}

#[test]
fn the_last_word_on_a_build_is_where_it_was_built_and_not_where_it_was_to_be() {
    let world = World::new();
    let (mut small, mut off) = (world.builder("small").start(), world.builder("off").start());
    let client = plan(&world)
        .knows(&small)
        .knows(&off)
        .machines("ssh-ng://small x86_64-linux - 2 1\nssh-ng://off x86_64-linux - 2 2")
        .start();
    off.stop_sshd();
    let told = |expression: &str| {
        let drv_path = instantiated(&client, expression);
        let output = client.nix_offload(&["explain", "--last", &drv_path]);
        let text = output.assert_success().stdout().strip_prefix(&format!("{drv_path}\n")).unwrap();
        let json = client.nix_offload(&["explain", "--last", "--json", &drv_path]);
        (text.to_owned(), self::json(json.assert_success())["trials"].clone())
    };
    let running = client.spawn_nix_build(&gated("a"), &["-j0"]);
    wait_for_begin(&client, "a", &["small"]);
    wait_until("it is known to run", SOON, || told(&gated("a")).0.starts_with("begun on ssh-ng://small "));
    open(&client, "a");
    running.wait().assert_success();
    let (text, trials) = told(&gated("a"));
    assert!(text.starts_with("built on ssh-ng://small "), "{text}");
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[1].starts_with("  before that: not built on ssh-ng://off "), "{text}");
    assert!(lines[1].contains("connection refused") && lines[2].starts_with("decided on "), "{text}");
    let of =
        |trial: usize| (trials[trial]["machine"].as_str().unwrap(), trials[trial]["end"].as_str().unwrap());
    assert_eq!([of(0), of(1)], [("ssh-ng://off", "given-up"), ("ssh-ng://small", "built")], "{trials}");
    assert_eq!(trials.as_array().unwrap().len(), 2, "{trials}");
    let failing = drv::failing("b", "no good", 3);
    client.nix_build(&failing, &["-j0"]).assert_failure();
    let (text, _) = told(&failing);
    assert!(text.starts_with("failed on ssh-ng://small ") && text.contains("exit code 3"), "{text}");
    let lost = client.spawn_nix_build(&gated("c"), &["-j0"]);
    wait_for_begin(&client, "c", &["small"]);
    small.stop_sshd();
    lost.wait().assert_failure();
    let (text, _) = told(&gated("c"));
    assert!(text.contains("broken off on ssh-ng://small ") && text.contains("connect to small"), "{text}");
}

#[test]
fn why_slots_cannot_be_looked_at_is_told_of_that_machine() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).machines("ssh-ng://odd x86_64-linux - 1 9\n").start();
    let slot = "/nix/var/nix/current-load/ssh-ng:__odd-0";
    client.run(&format!("mkdir -p /nix/var/nix/current-load; ln -s ssh-ng:__odd-0 {slot}"));
    let expression = drv::where_built("x");
    let drv_path = instantiated(&client, &expression);
    let reason = format!("failed: cannot use {slot}: ");
    let text = explained(&client, &drv_path)["machines"][1]["reason"].to_string();
    assert!(text.starts_with(&format!("\"{reason}")), "{text}");
    client.nix_build(&expression, &["-j0"]).assert_success();
    let told = client.nix_offload(&["explain", "--last", &drv_path]);
    let text = told.assert_success().stdout();
    assert!(text.contains(&format!("ssh-ng://odd  {reason}")), "{text}");
}

#[test]
fn what_was_forgotten_is_looked_for_in_the_journal() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).journald().uses(&mac, "ssh-ng", 1).start();
    let drv_path = instantiated(&client, &drv::where_built("a"));
    client.nix_build(&drv::where_built("a"), &["-j0"]).assert_success();
    client.run("journalctl --sync; rm -r /var/lib/nix-offload/decided");
    let told = client.nix_offload(&["explain", "--last", &drv_path]);
    let text = told.assert_success().stdout();
    assert!(text.contains(" ago, from the journal:\n  to be built on ssh-ng://mac: "), "{text}");
}

#[test]
fn why_a_machine_failed_and_what_helps_is_said_once() {
    const CURE: &str = "check that sshd runs";
    let world = World::new();
    for (number, mode) in [Mode::SingleUser, Mode::Daemon].into_iter().enumerate() {
        let mut mac = world.builder(&format!("mac{number}")).start();
        let name = format!("{mode:?}").to_lowercase();
        let client = plan(&world).named(&name).mode(mode).uses(&mac, "ssh-ng", 1).start();
        let count = |output: &Output, text: &str| output.stderr().matches(text).count();
        // Its connection goes with it while it builds.
        let mid = format!("mid{number}");
        let running = client.spawn_nix_build(&gated(&mid), &["-j0"]);
        wait_for_begin(&client, &mid, &[mac.name()]);
        mac.stop_sshd();
        let lost = running.wait();
        let machine = format!("ssh-ng://{}", mac.name());
        lost.assert_failure()
            .assert_stderr_has(&format!("-{mid}.drv' on '{machine}': the connection was lost"));
        assert_eq!((count(&lost, CURE), count(&lost, "failed, see above")), (1, 1), "{lost}");
        // Whoever sees nothing but the last error knows why.
        let error =
            lost.stderr().lines().find(|line| line.starts_with(&format!("  {machine}: cannot connect")));
        assert!(error.is_some_and(|line| line.contains("connection refused")), "{lost}");
        // It was told of to the last command, and what was said there is not right above.
        let known = client.nix_build(&drv::where_built("known"), &["-j0"]);
        assert_eq!((count(&known, CURE), count(&known, "see above")), (1, 0), "{known}");
        client.run("rm -r /run/nix-offload/down");
        let first = client.nix_build(&drv::where_built("first"), &["-j0"]);
        assert_eq!((count(&first, CURE), count(&first, "failed, see above")), (1, 1), "{first}");
        assert_eq!(count(&first, "connection refused"), 1, "{first}");
    }
}

/// 30 builds that require this feature, and after every third one that does not, which a new hook is started for.
fn thirty(feature: &str, script: &str) -> String {
    drv::expression(&format!(
        r#"builtins.genList (i: d "x-${{toString (100 + i)}}" "{script}"
             (if builtins.bitAnd i 3 == 3 then {{ }} else {{ requiredSystemFeatures = [ "{feature}" ]; }})) 40"#
    ))
}

#[test]
fn thirty_builds_that_fit_nowhere_have_one_table() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for release in Release::ALL {
        for mode in [Mode::SingleUser, Mode::Daemon] {
            let name = format!("{}-{mode:?}", release.name()).to_lowercase();
            let client = plan(&world)
                .named(&name)
                .release(release)
                .mode(mode)
                .uses(&mac, "ssh-ng", 2)
                .machines("ssh://arm aarch64-linux\nssh://bench x86_64-linux - 1 1 no-such benchmark\n")
                .start();
            for round in 0..2 {
                let told = client.nix_build(&thirty("no-such", "echo > $out"), &["-j0", "-k"]);
                told.assert_failure();
                let table = |text: &str| told.stderr().matches(text).count();
                assert_eq!(table("nix-offload: nothing can build '/nix/store/"), 1, "{name} {round}: {told}");
                for line in [
                    "' (x86_64-linux, features [no-such]):\n",
                    "  ssh-ng://mac  lacks the features [no-such]\n",
                    "  ssh://arm     does not build for this system\n",
                    "  ssh://bench   builds only derivations that require the features [benchmark]\n",
                    "  this machine  builds nothing (max-jobs is 0)\n",
                ] {
                    assert_eq!(table(line), 1, "{line:?} {name}: {told}");
                }
                // Nix's own words are still there.
                let words = if release == Release::Sid {
                    "local builds are disabled"
                } else {
                    "nable to start any build"
                };
                told.assert_stderr_has(words);
            }
            // Another reason is told, too.
            let other = client.nix_build(&thirty("another", "echo > $out"), &["-j0", "-k"]);
            other.assert_failure().assert_stderr_has("(x86_64-linux, features [another]):");
        }
    }
}

#[test]
fn what_can_be_built_here_is_told_of_only_to_those_who_want_to_know() {
    let world = World::new();
    let client =
        plan(&world).nix_conf("system-features = no-such").machines("ssh://mac x86_64-linux - 2").start();
    let built = client.nix_build(&thirty("no-such", "echo > $out"), &["-j2", "-v"]);
    let count = |output: &Output| output.stderr().matches("lacks the features [no-such]").count();
    assert_eq!(count(&built), 1, "{built}");
    built.assert_stderr_has("' (x86_64-linux, features [no-such]), but this one can:\n");
    let quiet = client.nix_build(&thirty("no-such", "echo 2 > $out"), &["-j2"]);
    assert_eq!(count(&quiet), 0, "{quiet}");
    // Machines for other systems are not to blame.
    client.set_machines("ssh://arm aarch64-linux\n");
    let built = client.nix_build(&drv::trivial("a"), &["-j2", "-v"]);
    built.assert_success().assert_stderr_lacks("nix-offload: ");
}
