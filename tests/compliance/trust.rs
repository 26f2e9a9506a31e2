//! Builders whose daemon does not trust the account that is logged in to. Stock Nix has a way to build there since 2.16.

use harness::{Builder, Client, Hook, Output, Release, World, drv};

crate::theirs_and_ours!(
    an_untrusted_account_builds_by_the_closure,
    an_untrusted_account_builds_what_is_fixed,
    an_input_without_signature_is_refused_in_the_builders_words,
    an_input_signed_by_a_known_key_is_taken,
    a_failing_build_of_an_untrusted_account_tells_why,
);

const RELEASES: [Release; 2] = [Release::Trixie, Release::Sid];

fn scene(world: &World, hook: &Hook, release: Release, lines: &[&str]) -> (Builder, Client) {
    let mac = world.builder(release.name()).release(release).as_user();
    let mac = lines.iter().fold(mac, |plan, line| plan.nix_conf(line)).start();
    let client = world.client().named(&format!("client-{}", release.name())).release(release);
    let client = client.hook(hook.clone()).uses(&mac, "ssh-ng", 1).start();
    (mac, client)
}

fn first(name: &str) -> String {
    format!(r#"(d "first-{name}" "cat ${{builtins.toFile "source" "first\n"}} > $out" {{ }})"#)
}

fn second(name: &str) -> String {
    drv::expression(&format!(
        r#"d "second-{name}" "echo said by $name; cat ${{{}}} /etc/machine-name > $out" {{ }}"#,
        first(name)
    ))
}

fn build_here(client: &Client, name: &str) -> String {
    let built = client.nix_build(&drv::expression(&first(name)), &["--option", "builders", ""]);
    built.assert_success().out_path()
}

#[track_caller]
fn assert_built_there(client: &Client, mac: &Builder, built: &Output) {
    let path = built.assert_success().out_path();
    assert_eq!(client.read(&path), format!("first\n{}\n", mac.name()), "{built}");
}

fn an_untrusted_account_builds_by_the_closure(hook: Hook) {
    let world = World::new();
    for release in RELEASES {
        let (mac, client) = scene(&world, &hook, release, &[]);
        let built = client.nix_build(&second("a"), &["-j0"]);
        assert_built_there(&client, &mac, &built);
        assert!(client.build_log(&built.out_path()).contains("said by second-a"), "{built}");
        let deriver = client.run(&format!("nix-store --query --deriver {}", built.out_path()));
        mac.run(&format!("nix-store --check-validity {}", deriver.trim()));
        let two = client.nix_build(&format!("({}).all", drv::multiple_outputs("two")), &["-j0"]);
        assert_eq!(two.assert_success().out_paths().len(), 2, "{two}");
        client.verify_store();
        mac.verify_store();
    }
}

fn an_untrusted_account_builds_what_is_fixed(hook: Hook) {
    let world = World::new();
    for release in RELEASES {
        let (mac, client) = scene(&world, &hook, release, &[]);
        let hash = client.run(&format!("echo {} | sha256sum", mac.name()));
        let hash = format!("sha256:{}", hash.split_whitespace().next().unwrap());
        let built =
            client.nix_build(&drv::fixed_flat("fixed", "cat /etc/machine-name > $out", &hash), &["-j0"]);
        built.assert_success();
        client.verify_store();
    }
}

fn an_input_without_signature_is_refused_in_the_builders_words(hook: Hook) {
    let world = World::new();
    for release in RELEASES {
        let (_mac, client) = scene(&world, &hook, release, &[]);
        let path = build_here(&client, "unsigned");
        let refused = client.nix_build(&second("unsigned"), &["-j0"]);
        refused.assert_failure().assert_stderr_has("cannot add path").assert_stderr_has(&path);
        refused.assert_stderr_has("because it lacks a signature by a trusted key");
    }
}

fn an_input_signed_by_a_known_key_is_taken(hook: Hook) {
    let world = World::new();
    for release in RELEASES {
        let keys =
            world.builder(&format!("keys-{}", release.name())).release(release).without_daemon().start();
        keys.run("nix-store --generate-binary-cache-key good-1 /tmp/secret /tmp/public");
        let trusted = format!("trusted-public-keys = {}", keys.read("/tmp/public").trim());
        let (mac, client) = scene(&world, &hook, release, &[&trusted]);
        client.write("/tmp/secret", &keys.read("/tmp/secret"));
        let path = build_here(&client, "signed");
        client.run(&format!("nix store sign --key-file /tmp/secret {path}"));
        assert_built_there(&client, &mac, &client.nix_build(&second("signed"), &["-j0"]));
    }
}

fn a_failing_build_of_an_untrusted_account_tells_why(hook: Hook) {
    let world = World::new();
    for release in RELEASES {
        let (_mac, client) = scene(&world, &hook, release, &[]);
        let failed = client.nix_build(&drv::failing("bad", "it went wrong", 3), &["-j0"]);
        failed.assert_failure().assert_stderr_has("it went wrong");
        assert_eq!(failed.stdout(), "", "{failed}");
    }
}
