//! Machines that are not reached by ssh, and what only Nix's own hook can do.

use harness::{Client, Hook, Mode, Output, Release, World, drv};

crate::theirs_and_ours!(
    stores_of_this_machine_build_with_2_8,
    stores_of_this_machine_build_with_2_26,
    stores_of_this_machine_build_with_2_34,
    a_daemon_of_this_machine_builds,
    the_features_of_a_line_are_those_of_its_store,
    a_store_that_is_mounted_builds,
    outputs_known_by_their_content_only_are_built,
    derivations_that_are_made_by_builds_are_built,
    outputs_fixed_in_experimental_ways_are_built,
    a_binary_cache_as_store_gets_what_a_machine_built,
    a_user_without_rights_can_use_another_store,
    the_users_post_build_hook_runs_where_stock_runs_it,
);

/// Not /nix, which is one of the machines.
const STORE: &str = "/root/my-nix";

fn client(world: &World, hook: Hook, release: Release, lines: &[&str]) -> Client {
    let mode = Mode::Private { store: STORE.into(), as_user: false };
    let plan = world.client().named(&format!("client-{}", release.name())).release(release).mode(mode);
    lines.iter().fold(plan.hook(hook), |plan, line| plan.nix_conf(line)).start()
}

/// One that needs another one.
fn pair(name: &str, attrs: &str) -> String {
    drv::expression(&format!(
        r#"let first = d "first-{name}" "echo first > $out" {{ {attrs} }};
           in d "second-{name}" "echo said by {name}; cat ${{first}} > $out; echo second >> $out" {{ {attrs} }}"#
    ))
}

fn build_on(client: &Client, machine: &str, expression: &str) -> Output {
    client.nix_build(expression, &["-j0", "--builders", machine])
}

/// Builds on the machine, whose store has its files in that directory, and finds the result there and at the client.
#[track_caller]
fn assert_builds(client: &Client, number: usize, uri: &str, directory: &str) {
    let name = format!("pair-{number}");
    let built = build_on(client, &format!("{uri} - - 1 1"), &pair(&name, ""));
    built.assert_success().assert_stderr_has(&format!("said by {name}"));
    let path = built.out_path();
    assert_eq!(client.read(&format!("{STORE}{path}")), "first\nsecond\n", "{built}");
    assert!(client.exists(&format!("{directory}{path}")), "{path} is not in {directory}: {built}");
    assert!(client.build_log(&path).contains(&format!("said by {name}")), "{built}");
}

fn stores_of_this_machine_build(hook: Hook, release: Release) {
    let world = World::new();
    let client = client(&world, hook, release, &[]);
    for (number, (uri, directory)) in [
        ("ssh-ng://localhost", ""),
        ("ssh://localhost", ""),
        ("localhost", ""),
        ("auto", ""),
        ("local", ""),
        ("ssh-ng://localhost?remote-store=/srv/one", "/srv/one"),
        ("ssh-ng://localhost?remote-program=/usr/bin/nix-daemon&remote-store=/srv/one", "/srv/one"),
        ("/srv/two", "/srv/two"),
        ("local?root=/srv/three", "/srv/three"),
    ]
    .into_iter()
    .enumerate()
    {
        assert_builds(&client, number, uri, directory);
    }
    client.verify_store_at(STORE);
    client.verify_store();
}

fn stores_of_this_machine_build_with_2_8(hook: Hook) {
    stores_of_this_machine_build(hook, Release::Bookworm);
}

fn stores_of_this_machine_build_with_2_26(hook: Hook) {
    stores_of_this_machine_build(hook, Release::Trixie);
}

fn stores_of_this_machine_build_with_2_34(hook: Hook) {
    stores_of_this_machine_build(hook, Release::Sid);
}

fn a_daemon_of_this_machine_builds(hook: Hook) {
    let world = World::new();
    for release in Release::ALL {
        let client = client(&world, hook.clone(), release, &[]);
        client.run(
            "nix-daemon </dev/null >/tmp/daemon.log 2>&1 & \
             until [ -S /nix/var/nix/daemon-socket/socket ]; do sleep 0.02; done",
        );
        let uris = ["daemon", "unix:///nix/var/nix/daemon-socket/socket", "unix://"];
        for (number, uri) in uris.into_iter().enumerate() {
            if uri == "unix://" && release == Release::Bookworm && hook == Hook::Stock {
                // 2.8 takes it for a socket without a name.
                continue;
            }
            assert_builds(&client, number, uri, "");
        }
        client.verify_store_at(STORE);
    }
}

fn the_features_of_a_line_are_those_of_its_store(hook: Hook) {
    let world = World::new();
    for release in Release::ALL {
        let client = client(&world, hook.clone(), release, &[]);
        for (uri, directory) in [("auto", ""), ("/srv/two", "/srv/two")] {
            let machine = format!("{uri} - - 1 1 foo,bar bar");
            let attrs = r#"requiredSystemFeatures = [ "foo" "bar" ];"#;
            let built = build_on(&client, &machine, &pair(directory.trim_start_matches("/srv/"), attrs));
            let path = built.assert_success().out_path();
            assert!(client.exists(&format!("{directory}{path}")), "{built}");
        }
        let machine = "ssh-ng://localhost?remote-store=/srv/three%3Fsystem-features=foo%20bar - - 1 1 foo";
        let attrs = r#"requiredSystemFeatures = [ "foo" ];"#;
        build_on(&client, machine, &pair("far", attrs)).assert_success();
    }
}

fn a_store_that_is_mounted_builds(hook: Hook) {
    let world = World::new();
    for release in [Release::Trixie, Release::Sid] {
        let client =
            client(&world, hook.clone(), release, &["extra-experimental-features = mounted-ssh-store"]);
        assert_builds(&client, 0, "mounted-ssh-ng://localhost", "");
        client.verify_store_at(STORE);
    }
}

fn outputs_known_by_their_content_only_are_built(hook: Hook) {
    let world = World::new();
    let features = "extra-experimental-features = ca-derivations";
    for release in Release::ALL {
        let name = format!("mac-{}", release.name());
        let mac = world.builder(&name).release(release).nix_conf(features).start();
        let client = world
            .client()
            .named(&format!("client-{}", release.name()))
            .release(release)
            .hook(hook.clone())
            .nix_conf(features)
            .knows(&mac)
            .machines(&format!("ssh-ng://{name} x86_64-linux - 2 1 ca-derivations"))
            .start();
        let attrs = r#"__contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";"#;
        let built = client.nix_build(&pair("floating", attrs), &["-j0"]);
        let path = built.assert_success().out_path();
        assert_eq!(client.read(&path), "first\nsecond\n", "{built}");
        assert!(mac.exists(&path), "{built}");
        // One of the usual kind that needs one of the other.
        let mixed = drv::expression(&format!(
            r#"d "usual" "cat ${{d "floating" "echo first > $out" {{ {attrs} }}}} > $out" {{ }}"#
        ));
        let built = client.nix_build(&mixed, &["-j0"]);
        assert_eq!(client.read(&built.assert_success().out_path()), "first\n", "{built}");
        let bad = drv::expression(&format!(r#"d "bad" "echo it went wrong; exit 3" {{ {attrs} }}"#));
        client.nix_build(&bad, &["-j0"]).assert_failure().assert_stderr_has("it went wrong");
        client.verify_store();
    }
}

fn derivations_that_are_made_by_builds_are_built(hook: Hook) {
    let world = World::new();
    let features = "extra-experimental-features = ca-derivations dynamic-derivations";
    // 2.26 cannot build them in one go at all.
    let mac = world.builder("mac").release(Release::Sid).nix_conf(features).start();
    let client = world
        .client()
        .release(Release::Sid)
        .hook(hook)
        .nix_conf(features)
        .knows(&mac)
        .machines("ssh-ng://mac x86_64-linux - 2 1 ca-derivations")
        .start();
    let expression = drv::expression(
        r#"let
          inner = d "inner" "cat /etc/machine-name > $out" { };
          outer = d "inner.drv" "cat ${builtins.unsafeDiscardOutputDependency inner.drvPath} > $out" {
            __contentAddressed = true; outputHashMode = "text"; outputHashAlgo = "sha256";
          };
        in d "user" "cat ${builtins.outputOf outer.outPath "out"} > $out" { }"#,
    );
    let built = client.nix_build(&expression, &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n", "{built}");
    client.verify_store();
}

fn outputs_fixed_in_experimental_ways_are_built(hook: Hook) {
    let world = World::new();
    let features = "extra-experimental-features = git-hashing dynamic-derivations";
    // 2.26 cannot build the first kind at all.
    let mac = world.builder("mac").release(Release::Sid).nix_conf(features).start();
    let client =
        world.client().release(Release::Sid).hook(hook).nix_conf(features).uses(&mac, "ssh-ng", 1).start();
    // What `git hash-object` says of it.
    let git = drv::expression(
        r#"d "git" "cat /etc/machine-name >&2; echo hello > $out" {
              outputHashMode = "git"; outputHashAlgo = "sha1"; outputHash = "ce013625030ba8dba906f756967f9e9ca394464a";
            }"#,
    );
    let built = client.nix_build(&git, &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "hello\n", "{built}");
    built.assert_stderr_has(mac.name());
    // What is built is a derivation, as one file with a known hash.
    let inner = drv::trivial("inner");
    let made = client.run(&format!(
        "drv=$(nix-instantiate -E '{inner}' 2>/dev/null); sha256sum < $drv | cut -d ' ' -f 1; base64 -w0 $drv; \
         nix-store --delete $drv > /dev/null 2>&1"
    ));
    let (hash, text) = made.split_once('\n').unwrap();
    let outer = drv::expression(&format!(
        r#"d "inner.drv" "cat /etc/machine-name >&2; echo {text} | base64 -d > $out" {{
          outputHashMode = "text"; outputHashAlgo = "sha256"; outputHash = "{hash}";
        }}"#
    ));
    let built = client.nix_build(&outer, &["-j0"]);
    assert!(client.read(&built.assert_success().out_path()).starts_with("Derive("), "{built}");
    built.assert_stderr_has(mac.name());
    client.verify_store();
}

fn a_binary_cache_as_store_gets_what_a_machine_built(hook: Hook) {
    let world = World::new();
    for release in [Release::Trixie, Release::Sid] {
        let name = format!("client-{}", release.name());
        let client = world.client().named(&name).release(release).hook(hook.clone()).start();
        // Stock dies without the directory.
        client.run("nix-store --init");
        let build = |args: &[&str]| {
            let args = [&["--store", "file:///tmp/cache"], args].concat();
            client.nix_build(&pair("cached", ""), &args)
        };
        build(&[]).assert_failure();
        let built = build(&["--builders", "auto - - 1 1", "-j0"]);
        let path = built.assert_success().out_path();
        let hash = path.trim_start_matches("/nix/store/").split('-').next().unwrap();
        assert!(client.exists(&format!("/tmp/cache/{hash}.narinfo")), "{built}");
        build(&["-j0"]).assert_success();
    }
}

fn the_users_post_build_hook_runs_where_stock_runs_it(hook: Hook) {
    let world = World::new();
    for release in Release::ALL {
        let client = client(&world, hook.clone(), release, &[]);
        let count = format!("/tmp/count-{}", release.name());
        client.write_mode("/tmp/after", &format!("#!/bin/sh\necho $OUT_PATHS >> {count}\n"), 0o755);
        let args = ["-j0", "--builders", "auto - - 1 1", "--option", "post-build-hook", "/tmp/after"];
        client.nix_build(&pair("hooked", ""), &args).assert_success();
        // Each of two once by the client and once where it was built.
        assert_eq!(client.read(&count).lines().count(), 4, "{}", client.read(&count));
    }
}

fn a_user_without_rights_can_use_another_store(hook: Hook) {
    let world = World::new();
    for release in Release::ALL {
        let store = "/home/user/my-nix";
        let mode = Mode::Private { store: store.into(), as_user: true };
        let client =
            world.client().named(release.name()).release(release).mode(mode).hook(hook.clone()).start();
        let built = build_on(&client, "/home/user/other - - 1 1", &pair("user", ""));
        let path = built.assert_success().out_path();
        assert!(client.exists(&format!("/home/user/other{path}")), "{built}");
        client.verify_store_at(store);
    }
}
