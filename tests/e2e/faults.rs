//! Machines that cannot be used: the build goes elsewhere or fails soon, and somebody says why.

use std::time::Duration;

use harness::{Builder, Client, ClientPlan, Hook, World, drv};

const LIMIT: Duration = Duration::from_secs(10);

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours).journald()
}

/// With -j0 the build fails soon, without it it is made here; either way the machine and the cause
/// are named, for the user or in the journal.
fn assert_explained(client: &Client, machine: &str, cause: &str) {
    let refused = client.nix_build(&drv::where_built("refused"), &["-j0"]);
    refused.assert_failure();
    assert!(refused.took() < LIMIT, "{refused}");
    let local = client.nix_build(&drv::where_built("local"), &[]);
    let path = local.assert_success().out_path();
    assert_eq!(client.read(&path), format!("{}\n", client.name()));
    assert!(local.took() < LIMIT, "{local}");
    let journal: Vec<String> = client
        .journal("-t nix-offload")
        .iter()
        .map(|entry| entry["MESSAGE"].as_str().unwrap().to_owned())
        .collect();
    let said = format!("{}\n{}", refused.stderr(), journal.join("\n"));
    let explained = said
        .lines()
        .any(|line| line.contains(machine) && line.to_lowercase().contains(&cause.to_lowercase()));
    assert!(explained, "no line names {machine} and {cause:?}:\n{said}");
    client.verify_store();
}

/// The machine is used all the same.
fn assert_used(client: &Client, builder: &Builder) {
    let path = client.nix_build(&drv::where_built("a"), &["-j0"]).assert_success().out_path();
    assert_eq!(client.read(&path), format!("{}\n", builder.name()));
}

#[test]
fn a_machine_that_is_off() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    mac.stop();
    assert_explained(&client, "mac", "refused");
}

#[test]
fn a_key_that_is_not_let_in() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).key(&world.stray_key()).start();
    assert_explained(&client, "mac", "permission denied");
}

#[test]
fn a_host_key_nobody_knows() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client =
        plan(&world).knows_without_host_key(&mac).machines("ssh-ng://mac x86_64-linux - 1 1").start();
    assert_explained(&client, "mac", "host key");
}

#[test]
fn a_machine_without_nix() {
    let world = World::new();
    let mac = world.builder("mac").without_nix().start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    assert_explained(&client, "mac", "not found");
}

#[test]
fn an_sshd_that_does_not_forward() {
    let world = World::new();
    let mac = world.builder("mac").refusing_forwarding().start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    assert_used(&client, &mac);
}

#[test]
fn a_machine_without_daemon() {
    let world = World::new();
    let mac = world.builder("mac").without_daemon().start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    assert_used(&client, &mac);
}

#[test]
fn a_login_shell_that_talks() {
    let world = World::new();
    let mac = world.builder("mac").bashrc("echo Welcome, dear user").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    assert_used(&client, &mac);
}

#[test]
fn an_sshd_with_one_session_only() {
    let world = World::new();
    let mac = world.builder("mac").max_sessions(1).start();
    let client = plan(&world).uses(&mac, "ssh-ng", 4).start();
    assert_eq!(client.nix_build(&drv::independent(8), &["-j0"]).assert_success().out_paths().len(), 8);
}
