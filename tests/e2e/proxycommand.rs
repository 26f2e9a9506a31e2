//! A builder behind a bastion: ssh_config names nix-offload-proxy as its ProxyCommand, for the hook and for
//! stock Nix alike.

use std::{net::TcpListener, time::Duration};

use harness::{Builder, Client, ClientPlan, Hook, Output, World, drv, wait_until};

use crate::support::{SOON, assert_only_masters_left, held_locks};

const LIMIT: Duration = Duration::from_secs(10);
const PROXY: &str = "/opt/nix-offload/bin/nix-offload-proxy";

/// The builder `mac` behind the host `bastion`, which has no Nix.
fn plan(world: &World, options: &str, mac: &Builder) -> ClientPlan {
    let fdpass = if options.contains("--fdpass") { " ProxyUseFdpass yes\n" } else { "" };
    world
        .client()
        .hook(Hook::Ours)
        .uses(mac, "ssh-ng", 2)
        .ssh_config(&format!("Host mac\n ProxyCommand {PROXY} {options} --via bastion %h %p\n{fdpass}"))
}

fn behind_bastion(options: &str) -> (Builder, Builder, Client) {
    let world = World::new();
    let bastion = world.builder("bastion").without_nix().start();
    let mac = world.builder("mac").start();
    let client = plan(&world, options, &mac).knows(&bastion).start();
    (bastion, mac, client)
}

fn assert_built_on_mac(client: &Client, output: &Output) -> String {
    let path = output.assert_success().out_path();
    assert_eq!(client.read(&path), "mac\n", "{output}");
    output.assert_stderr_lacks("cannot build on");
    path
}

#[test]
fn builds_behind_a_bastion_cost_one_login_at_each() {
    let (bastion, mac, client) = behind_bastion("");
    for name in ["a", "b"] {
        assert_built_on_mac(&client, &client.nix_build(&drv::where_built(name), &["-j0"]));
    }
    let at_once = ["c", "d", "e", "f"].map(|name| client.spawn_nix_build(&drv::where_built(name), &["-j0"]));
    for build in at_once {
        assert_built_on_mac(&client, &build.wait());
    }
    assert_eq!((bastion.logins(), mac.logins()), (1, 1));
    // What the bastion's master carries needs one process to keep it.
    let keepers = || client.pids_matching(&format!("{PROXY} --via bastion"));
    let masters = || client.pids_matching("ssh: /run/nix-offload/");
    let others =
        || client.processes().into_iter().filter(|process| process.command_line != "nix-offload sample");
    wait_until("the two masters and the keeper of one are left", SOON, || {
        (masters().len(), keepers().len()) == (2, 1) && others().count() == 3
    });
    assert_eq!(held_locks(&client), "");
    client.verify_store();
    mac.verify_store();
    // With the connection to the bastion ends what goes through it, and everything is made anew.
    for pid in bastion.pids_matching("sshd: root") {
        let _ = bastion.command("kill").args(["-KILL", &pid.to_string()]).run();
    }
    wait_until("the keeper is gone", SOON, || keepers().is_empty());
    assert_built_on_mac(&client, &client.nix_build(&drv::where_built("g"), &["-j0"]));
    assert_eq!((bastion.logins(), mac.logins()), (2, 2));
}

#[test]
fn with_a_passed_descriptor_nothing_but_masters_is_left() {
    let (bastion, mac, client) = behind_bastion("--fdpass");
    for name in ["a", "b", "c"] {
        assert_built_on_mac(&client, &client.nix_build(&drv::where_built(name), &["-j0"]));
    }
    assert_eq!((bastion.logins(), mac.logins()), (1, 1));
    assert_only_masters_left(&client, 2);
    client.nix_offload(&["ping-store", "--store", "ssh-ng://mac"]).assert_success();
    assert_eq!((bastion.logins(), mac.logins()), (1, 1));
}

#[test]
fn stock_nix_copies_through_the_same_proxy_command() {
    for options in ["", "--fdpass"] {
        let (bastion, mac, client) = behind_bastion(options);
        let local = |name: &str| -> String {
            let built = client.nix_build(&drv::trivial(name), &["--option", "builders", ""]);
            built.assert_success().out_path()
        };
        let (one, two) = (local("one"), local("two"));
        let copy = |args: &[&str]| {
            client.nix("nix").args(["copy", "--no-check-sigs"]).args(args).run().assert_success();
        };
        copy(&["--to", "ssh-ng://mac", &one]);
        client.nix("nix-copy-closure").args(["--to", "mac", &two]).run().assert_success();
        for path in [&one, &two] {
            mac.run(&format!("nix-store --check-validity {path}"));
            assert_eq!(mac.read(path), client.read(path));
        }
        let [third, fourth] = ["third", "fourth"].map(|name| -> String {
            let expression = drv::where_built(name);
            mac.run(&format!("nix-build --no-out-link -E '{expression}'")).trim().into()
        });
        copy(&["--from", "ssh-ng://mac", &third]);
        client.nix("nix-copy-closure").args(["--from", "mac", &fourth]).run().assert_success();
        for path in [&third, &fourth] {
            assert!(client.is_valid(path));
            assert_eq!(client.read(path), "mac\n");
        }
        // Stock Nix logs in at the builder for each command. At the bastion it does not, nor does the hook.
        assert_built_on_mac(&client, &client.nix_build(&drv::where_built("ours"), &["-j0"]));
        assert_eq!((bastion.logins(), mac.logins()), (1, 5), "{options}");
        client.verify_store();
        mac.verify_store();
    }
}

/// The one line of the report that begins with this name.
fn value<'a>(output: &'a Output, name: &str) -> &'a str {
    let prefix = format!("{name}: ");
    let found: Vec<_> = output.stdout().lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
    assert_eq!(found.len(), 1, "{output}");
    found[0]
}

#[test]
fn a_bastion_that_is_down_is_named_with_the_cure() {
    for options in ["", "--fdpass"] {
        let (mut bastion, mac, client) = behind_bastion(options);
        bastion.stop();
        let ping = client.nix_offload(&["ping-store", "--store", "ssh-ng://mac"]);
        assert!(ping.took() < LIMIT, "{ping}");
        assert_eq!((ping.code(), ping.stderr()), (69, ""), "{ping}");
        assert!(value(&ping, "Error").contains("cannot connect to bastion: connection refused"), "{ping}");
        let hint = value(&ping, "Hint");
        assert!(hint.contains("sshd runs on bastion"), "{ping}");
        assert!(hint.contains(&bastion.port().to_string()), "{ping}");
        // While it is known to be down, it is still said why.
        let again = client.nix_offload(&["ping-store", "--store", "ssh-ng://mac"]);
        assert!(again.took() < LIMIT, "{again}");
        assert!(value(&again, "Error").contains("bastion: connection refused"), "{again}");
        let build = client.nix_build(&drv::where_built("a"), &["-j0"]);
        build.assert_failure().assert_stderr_has("bastion: connection refused");
        assert!(build.took() < LIMIT, "{build}");
        assert_eq!(mac.logins(), 0);
    }
}

#[test]
fn a_bastion_that_does_not_answer_is_named_with_the_cure() {
    let world = World::new();
    // The kernel takes connections in; nobody ever says a word.
    let hole = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = hole.local_addr().unwrap().port();
    let mac = world.builder("mac").start();
    let silent = format!("Host bastion\n HostName 127.0.0.1\n Port {port}\n");
    let client = plan(&world, "", &mac).ssh_config(&silent).start();
    let ping = client.nix_offload(&["ping-store", "--store", "ssh-ng://mac"]);
    assert!(ping.took() < LIMIT, "{ping}");
    assert_eq!(ping.code(), 69, "{ping}");
    assert!(value(&ping, "Error").contains("cannot connect to bastion"), "{ping}");
    let hint = value(&ping, "Hint");
    assert!(hint.contains("whether sshd is well") && hint.contains("bastion"), "{ping}");
}
