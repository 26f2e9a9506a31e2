//! Outputs arrive as they are, and are registered as the stock hook would.

use std::time::Instant;

use harness::{Builder, Client, ClientPlan, Hook, Mode, Release, World, drv, event};

use crate::support::SOON;

use crate::support::NO_SAMPLES;

/// Everything a file system can hold that a store path may.
const ZOO: &str = r#"d "zoo" ''
    mkdir -p $out/deep/$(seq -s / 40) $out/empty
    : > $out/empty-file
    printf '#!/bin/sh\n' > $out/run; chmod 755 $out/run
    printf x > $out/odd-mode; chmod 7 $out/odd-mode; chmod u+r $out/odd-mode
    ln -s run $out/link; ln -s /no/such/file $out/dangling; ln -s $out/deep $out/absolute; ln -s link $out/twice
    printf a > "$out/a blank"; printf b > "$out/a
line"; printf c > "$out/$(printf 'bytes-\377\376')"; printf d > "$out/-rf"; printf e > "$out/"'"quotes"'
    printf f > "$out/$(head -c 255 /dev/zero | tr '\0' n)"
    printf g > "$out/Case"; printf h > "$out/case"
    head -c 300001 /dev/zero > $out/big; printf 1234567 > $out/seven; printf 12345678 > $out/eight
    touch -d 2001-01-01 $out/run
    ln $out/seven $out/hard-link
  '' { }"#;

const FAMILY: &str = r#"d "family" ''
    mkdir $out $lib $dev; echo $out > $out/self; echo $lib > $out/lib; echo $lib $dev > $lib/both; echo $dev > $dev/self
  '' { outputs = [ "out" "lib" "dev" ]; }"#;

fn stock_and_ours(world: &World, change: impl Fn(ClientPlan) -> ClientPlan) -> [Client; 2] {
    let client = |name: &str, hook| change(world.client().named(name).hook(hook)).start();
    [client("stock", Hook::Stock), client("ours", Hook::Ours)]
}

/// What the database says of a path, without the time; with the derivation that made it.
fn row(client: &Client, path: &str) -> String {
    let json = client.run(&format!("nix path-info --json {path}"));
    let mut info: serde_json::Value = serde_json::from_str(&json).unwrap();
    let object = info[0].as_object_mut().unwrap();
    assert!(object["registrationTime"].as_u64().unwrap() > 1_600_000_000, "{json}");
    object.remove("registrationTime");
    let deriver = client.run(&format!("nix-store -q --deriver {path}"));
    format!("{info:#}\n{deriver}")
}

/// Every file of a path with its kind, permissions, owner, time, size and link target.
fn files(client: &Client, path: &str) -> String {
    client.run(&format!(
        "find {path} -printf '%P\\t%y %m %U %G %T@ %s %l\\0' | sort -z | cat -v; \
         find {path} -type f -print0 | sort -z | xargs -0 sha256sum | cat -v"
    ))
}

/// Builds the same with both hooks and compares all there is.
fn assert_same(clients: &[Client; 2], expression: &str) -> Vec<String> {
    let built = clients.each_ref().map(|client| {
        let built = client.nix_build(expression, &["-j0"]);
        built.assert_success().out_paths()
    });
    assert_eq!(built[0], built[1]);
    assert!(!built[0].is_empty());
    for path in &built[0] {
        let [stock, ours] = clients.each_ref().map(|client| (row(client, path), files(client, path)));
        assert_eq!(stock.0, ours.0, "the rows of {path} differ");
        assert_eq!(stock.1, ours.1, "the files of {path} differ");
    }
    built[1].clone()
}

fn assert_clean(mac: &Builder, clients: &[Client]) {
    clients.iter().for_each(|client| client.verify_store());
    mac.verify_store();
}

#[test]
fn files_of_every_kind_and_name_arrive_as_with_the_stock_hook() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let clients = stock_and_ours(&world, |plan| plan.uses(&mac, "ssh-ng", 1));
    let paths = assert_same(&clients, &drv::expression(ZOO));
    let files = files(&clients[1], &paths[0]);
    for sign in [
        "dangling\tl 777",
        "run\tf 555",
        "empty-file\tf 444",
        "M-^?M-~\tf 444",
        "a blank\tf",
        "\tf 444 0 0 1.",
    ] {
        assert!(files.contains(sign), "{sign:?} is missing:\n{files}");
    }
    for text in
        ["echo x > $out", ": > $out", "ln -s /no/such $out", "mkdir $out", "echo x > $out; chmod 755 $out"]
    {
        assert_same(&clients, &drv::script("single", text));
    }
    assert_clean(&mac, &clients);
}

#[test]
fn outputs_that_refer_to_each_other_and_to_themselves() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let clients = stock_and_ours(&world, |plan| plan.uses(&mac, "ssh-ng", 1));
    let paths = assert_same(&clients, &format!("({}).all", drv::expression(FAMILY)));
    let references = |path: &str| clients[1].run(&format!("nix-store -q --references {path}"));
    let counts: Vec<usize> = paths.iter().map(|path| references(path).lines().count()).collect();
    assert_eq!(counts, [2, 2, 1]);
    assert!(references(&paths[0]).contains(&paths[0]));
    assert_clean(&mac, &clients);
}

#[test]
fn one_output_of_several_is_fetched_when_one_is_wanted() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let built = client.nix_build(&format!("({}).lib", drv::expression(FAMILY)), &["-j0"]);
    let path = built.assert_success().out_path();
    assert!(path.ends_with("-family-lib"));
    // What it refers to has to be here too.
    let closure = client.run(&format!("nix-store -qR {path}"));
    assert_eq!(closure.lines().count(), 2, "{closure}");
    client.verify_store();
}

#[test]
fn fixed_outputs_are_checked_and_recorded_as_with_the_stock_hook() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let clients = stock_and_ours(&world, |plan| plan.uses(&mac, "ssh-ng", 1));
    let make = "mkdir -p $out/sub; printf hello > $out/sub/file; ln -s sub/file $out/link";
    clients[1].run(&make.replace("$out", "/tmp/tree"));
    clients[1].run("printf hello > /tmp/file");
    for algorithm in ["sha256", "sha1", "sha512", "md5"] {
        for (mode, source, make) in
            [("flat", "--flat /tmp/file", "printf hello > $out"), ("recursive", "/tmp/tree", make)]
        {
            let hash = clients[1].run(&format!("nix-hash --type {algorithm} {source}"));
            let fixed = |name: &str, make: &str| {
                drv::expression(&format!(
                    r#"d "{name}-{algorithm}-{mode}" {} {{ outputHashMode = "{mode}"; outputHashAlgo = "{algorithm}"; outputHash = "{}"; }}"#,
                    drv::quote(make),
                    hash.trim()
                ))
            };
            let paths = assert_same(&clients, &fixed("right", make));
            let recursive = if mode == "flat" { "" } else { "r:" };
            let ca = format!("fixed:{recursive}{algorithm}:");
            assert!(row(&clients[1], &paths[0]).contains(&ca), "{ca} is not recorded");
            let wrong = clients[1].nix_build(&fixed("wrong", &make.replace("hello", "goodbye")), &["-j0"]);
            assert_eq!(wrong.assert_failure().assert_stderr_has("hash mismatch").stdout(), "", "{wrong}");
        }
    }
    assert_clean(&mac, &clients);
}

#[test]
fn signatures_are_kept() {
    let world = World::new();
    let mac = world.builder("mac").nix_conf("secret-key-files = /etc/nix/secret-key").start();
    mac.run("nix-store --generate-binary-cache-key mac-1 /etc/nix/secret-key /etc/nix/public-key");
    let clients = stock_and_ours(&world, |plan| plan.uses(&mac, "ssh-ng", 1));
    let paths = assert_same(&clients, &drv::trivial("signed"));
    assert!(row(&clients[1], &paths[0]).contains("mac-1:"), "{}", row(&clients[1], &paths[0]));
    let key = mac.read("/etc/nix/public-key");
    clients[1].run(&format!(
        "nix store verify --option trusted-public-keys '{}' --sigs-needed 1 {}",
        key.trim(),
        paths[0]
    ));
}

/// A derivation with `n` source files, which its output names.
fn many_inputs(n: u32) -> String {
    drv::expression(&format!(
        r#"d "many-inputs" "cat $sources > $out" {{
          sources = builtins.genList (i: builtins.toFile "source-${{toString i}}" "${{toString i}}\n") {n};
        }}"#
    ))
}

#[test]
fn a_thousand_inputs_are_sent() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let path = client.nix_build(&many_inputs(1000), &["-j0"]).assert_success().out_path();
    let expected: String = (0..1000).map(|number| format!("{number}\n")).collect();
    assert_eq!(client.read(&path), expected);
    assert_clean(&mac, &[client]);
}

#[test]
fn inputs_that_refer_to_each_other_are_sent_in_their_order() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    // Built here, so that the builder has none of them.
    let family = format!("({}).all", drv::expression(FAMILY));
    client.nix_build(&family, &["--builders", ""]).assert_success();
    client.nix_build(&drv::chain(9), &["--builders", ""]).assert_success();
    let user = format!(
        r#"let family = {}; chain = {}; in {}"#,
        drv::expression(FAMILY),
        drv::chain(9),
        drv::expression(r#"d "user" "cat ${family}/lib ${chain} > $out" { }"#)
    );
    let path = client.nix_build(&user, &["-j0"]).assert_success().out_path();
    assert!(client.read(&path).ends_with("7\n8\n"));
    assert_clean(&mac, &[client]);
}

#[test]
fn substitution_by_builders_without_substituters_is_no_hindrance() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world
        .client()
        .hook(Hook::Ours)
        .nix_conf("builders-use-substitutes = true")
        .uses(&mac, "ssh-ng", 1)
        .start();
    client.nix_build(&many_inputs(3), &["-j0"]).assert_success();
    client.verify_store();
}

#[test]
fn builders_fetch_inputs_from_their_substituters_when_told_to() {
    let world = World::new();
    let mac = world
        .builder("mac")
        .nix_conf("substituters = file:///mnt/share/cache?trusted=1")
        .nix_conf("require-sigs = false")
        .start();
    for substitute in [false, true] {
        let name = format!("client-{substitute}");
        let client = world
            .client()
            .named(&name)
            .hook(Hook::Ours)
            .journald()
            .nix_conf(&format!("builders-use-substitutes = {substitute}"))
            .uses(&mac, "ssh-ng", 1)
            .start();
        let source = drv::expression(&format!(r#"builtins.toFile "source-{substitute}" "text""#));
        let path =
            client.run(&format!("nix-instantiate --eval --read-write-mode -E '{source}' | tr -d '\"'"));
        client.run(&format!("nix copy --to file:///mnt/share/cache {}", path.trim()));
        let user = drv::expression(&format!(
            r#"d "user-{substitute}" "cat ${{builtins.toFile "source-{substitute}" "text"}} > $out" {{ }}"#
        ));
        client.nix_build(&user, &["-j0"]).assert_success();
        let built =
            client.journal("-t nix-offload").into_iter().find(|entry| event(entry) == "built").unwrap();
        assert_eq!(built["SENT_PATHS"], if substitute { "0" } else { "1" }, "{built}");
    }
}

#[test]
fn a_private_store_gets_files_like_those_of_the_stock_hook() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for as_user in [false, true] {
        let store = "/tmp/private";
        let mode = Mode::Private { store: store.into(), as_user };
        let [stock, ours] = [Hook::Stock, Hook::Ours].map(|hook| {
            let name = format!("{}-{as_user}", if hook == Hook::Ours { "ours" } else { "stock" });
            world.client().named(&name).mode(mode.clone()).hook(hook).uses(&mac, "ssh-ng", 1).start()
        });
        let [first, second] = [&stock, &ours].map(|client| {
            let path = client.nix_build(&drv::expression(ZOO), &["-j0"]).assert_success().out_path();
            client.verify_store_at(store);
            assert!(client.is_valid(&path));
            files(client, &format!("{store}{path}"))
        });
        assert_eq!(first, second);
        assert_eq!(ours.store_entries(), Vec::<String>::new(), "something went to /nix/store");
    }
}

#[test]
fn equal_files_are_linked_when_the_store_is_to_be_optimised() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let clients =
        stock_and_ours(&world, |plan| plan.nix_conf("auto-optimise-store = true").uses(&mac, "ssh-ng", 1));
    let twins = drv::script("twins", "mkdir $out; echo same > $out/a; echo same > $out/b; : > $out/empty");
    let paths = assert_same(&clients, &twins);
    let [stock, ours] = clients.each_ref().map(|client| {
        let links = client.run(&format!("cd {}; stat -c '%n %h' a b empty; ls /nix/store/.links", paths[0]));
        assert_eq!(client.run(&format!("cd {}; stat -c %i a b | uniq | wc -l", paths[0])).trim(), "1");
        links
    });
    assert_eq!(stock, ours);
    assert_clean(&mac, &clients);
}

#[test]
fn an_output_that_was_there_but_broken_is_replaced() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let path = client.run(&format!(
        "nix-store -q --outputs $(nix-instantiate -E '{}' 2>/dev/null)",
        drv::where_built("a")
    ));
    let path = path.trim();
    // As a crash in mid-build would leave it: there, and not valid.
    client.run(&format!("mkdir -p {path}/half; echo rest > {path}/half/file; chmod -R a-w {path}"));
    let built = client.nix_build(&drv::where_built("a"), &["-j0"]);
    assert_eq!(built.assert_success().out_path(), path);
    assert_eq!(client.read(path), "mac\n");
    client.verify_store();
}

/// Its output is another one each time.
const RANDOM: &str = "mkdir $out; od -An -N16 -tx1 /dev/urandom > $out/number";

/// What of a path would change if it were replaced by an equal one.
fn identity(client: &Client, path: &str) -> String {
    client.run(&format!("find {path} -printf '%P %i %C@ %s\\n' | sort"))
}

/// Nix up to 2.33 asks its hook even where it only checks or repairs a build, if it may not build by itself.
#[test]
fn a_check_replaces_nothing_and_says_what_it_found() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for release in [Release::Bookworm, Release::Trixie] {
        for protocol in ["ssh", "ssh-ng"] {
            let name = format!("{}-{protocol}", release.name());
            let client =
                world.client().named(&name).release(release).hook(Hook::Ours).uses(&mac, protocol, 1).start();
            let random = drv::script(&name, RANDOM);
            let path = client.nix_build(&random, &["-j0"]).assert_success().out_path();
            let before = (identity(&client, &path), client.read(&format!("{path}/number")));

            let idle = client.nix_build(&random, &["-j0", "--check"]);
            idle.assert_success()
                .assert_stderr_has("did not build them again")
                .assert_stderr_lacks("deterministic");
            mac.run(&format!("nix-store --delete {path}"));
            let other = client.nix_build(&random, &["-j0", "--check"]);
            other
                .assert_success()
                .assert_stderr_has(&format!("may not be deterministic: output '{path}' differs"))
                .assert_stderr_lacks("did not build them again");
            assert_ne!(mac.read(&format!("{path}/number")), before.1, "it was not built again");
            assert_eq!((identity(&client, &path), client.read(&format!("{path}/number"))), before);
            client.verify_store();
        }
    }
}

#[test]
fn a_damaged_output_is_repaired_with_what_is_registered_and_with_nothing_else() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for release in [Release::Bookworm, Release::Trixie] {
        let client = world
            .client()
            .named(release.name())
            .release(release)
            .hook(Hook::Ours)
            .uses(&mac, "ssh-ng", 1)
            .start();
        for (name, make) in [("equal", "mkdir $out; echo right > $out/number"), ("random", RANDOM)] {
            let expression = drv::script(&format!("{name}-{}", release.name()), make);
            let path = client.nix_build(&expression, &["-j0"]).assert_success().out_path();
            let text = client.read(&format!("{path}/number"));
            mac.run(&format!("nix-store --delete {path}"));
            client.run(&format!("chmod u+w {path}/number; echo wrong > {path}/number"));
            let repaired = client.nix_build(&expression, &["-j0", "--repair"]);
            if name == "equal" {
                // What this Nix says of it is what it found before.
                assert_eq!(client.read(&format!("{path}/number")), text, "{repaired}");
                client.verify_store();
            } else {
                repaired
                    .assert_failure()
                    .assert_stderr_has("may not be deterministic")
                    .assert_stderr_has("--repair");
                assert!(!client.exists(&path), "{repaired}");
                client.nix_build(&expression, &["--builders", "", "--repair"]).assert_success();
                client.verify_store();
            }
        }
    }
}

#[test]
fn a_machine_whose_copy_is_rotten_does_not_fail_the_build() {
    let world = World::new();
    let [rotten, sound] = ["rotten", "sound"].map(|name| world.builder(name).start());
    let first = world.client().named("first").hook(Hook::Ours).uses(&rotten, "ssh-ng", 1).start();
    let fixed = drv::fixed_flat(
        "fixed",
        "printf hello > $out",
        "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    );
    let expressions = [drv::trivial("plain"), fixed];
    for expression in &expressions {
        let path = first.nix_build(expression, &["-j0"]).assert_success().out_path();
        rotten.run(&format!("chmod u+w {path}; printf jelly | dd of={path} conv=notrunc 2>/dev/null"));
    }
    let client = world
        .client()
        .hook(Hook::Ours)
        .knows(&rotten)
        .knows(&sound)
        .machines("ssh-ng://rotten x86_64-linux - 1 9\nssh-ng://sound x86_64-linux - 1 1")
        .start();
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    for expression in &expressions {
        let built = client.nix_build(expression, &["-j0"]);
        built.assert_success().assert_stderr_has("hash mismatch").assert_stderr_has("--repair-path");
        let path = built.out_path();
        assert_eq!(client.read(&path), sound.read(&path), "{built}");
    }
    client.verify_store();
}

#[test]
fn directories_nested_too_deeply_are_named_as_our_limit() {
    let world = World::new();
    let [mac, other] = ["mac", "other"].map(|name| world.builder(name).start());
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).uses(&other, "ssh-ng", 1).start();
    let nested = |name: &str, depth: u32| {
        drv::script(
            name,
            &format!(
                "echo x >> /mnt/share/{name}; mkdir -p $out/$(seq -s / {depth}); : > $out/$(seq -s / {depth})/x"
            ),
        )
    };
    client.nix_build(&nested("shallow", 62), &["-j0"]).assert_success();
    let built = client.nix_build(&nested("deep", 63), &["-j0"]);
    built
        .assert_failure()
        .assert_stderr_has("64 directories or more")
        .assert_stderr_has("more than nix-offload brings home");
    assert_eq!(client.read("/mnt/share/deep"), "x\n", "another machine was asked: {built}");

    client.nix_build(&nested("input", 63), &["--builders", ""]).assert_success();
    let needs = |name: &str| {
        format!(
            "let input = {}; in {}",
            nested("input", 63),
            drv::expression(&format!(r#"d "{name}" "ls ${{input}} > $out" {{ }}"#))
        )
    };
    let built = client.nix_build(&needs("user"), &["-j0"]);
    built
        .assert_failure()
        .assert_stderr_has("more than nix-offload sends")
        .assert_stderr_lacks("could not be built on any");
    // The cure.
    client.nix_build(&needs("user"), &["--builders", ""]).assert_success();
    client.verify_store();
}

/// A builder whose store lost contents in a crash: the path is valid there, and its file is empty.
#[test]
fn an_output_that_lost_its_contents_over_there_is_refused_at_once() {
    for protocol in ["ssh-ng", "ssh"] {
        let world = World::new();
        let mac = world.builder("mac").start();
        let client = world.client().hook(Hook::Ours).uses(&mac, protocol, 1).start();
        let big = drv::script("big", "mkdir $out; head -c 100000 /dev/zero > $out/file");
        let path = client.nix_build(&big, &["-j0"]).assert_success().out_path();
        client.run(&format!("nix-store --delete {path}"));
        mac.run(&format!("chmod u+w {path}/file; : > {path}/file"));
        let begin = Instant::now();
        let built = client.nix_build(&big, &["-j0"]);
        built.assert_failure().assert_stderr_has("shorter than the");
        assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
        assert!(!client.exists(&path), "half of it is left");
        client.verify_store();
    }
}

#[test]
fn an_output_may_refer_to_whatever_is_valid_here() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let refers = drv::script("refers", "echo x > $out");
    let path = client.nix_build(&refers, &["-j0"]).assert_success().out_path();
    client.run(&format!("nix-store --delete {path}"));
    let add = "echo stranger > /tmp/stranger; nix-store --add /tmp/stranger";
    let stranger = mac.run(add).trim().to_owned();
    // As after a build that was allowed to add to the store.
    mac.run(&format!("printf '{path}\\n\\n1\\n{stranger}\\n' | nix-store --register-validity --reregister"));
    client
        .nix_build(&refers, &["-j0"])
        .assert_failure()
        .assert_stderr_has(&stranger)
        .assert_stderr_has("neither an input nor an output, nor valid here");
    assert_eq!(client.run(add).trim(), stranger);
    assert_eq!(client.nix_build(&refers, &["-j0"]).assert_success().out_path(), path);
    assert_eq!(client.run(&format!("nix-store -q --references {path}")).trim(), stranger);
    client.verify_store();
}
