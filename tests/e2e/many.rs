//! Many builds: all right, and nothing left of them but one master.

use std::time::Duration;

use harness::{Builder, Client, Hook, World, drv, wait_until};

use crate::support::assert_only_masters_left;

const END_LIMIT: Duration = Duration::from_secs(5);

fn world() -> (World, Builder, Client) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 8).start();
    (world, mac, client)
}

fn assert_only_the_master_is_left(mac: &Builder, client: &Client) {
    assert_only_masters_left(client, 1);
    assert_eq!(mac.logins(), 1, "more than one connection was made");
    let locks: Vec<String> =
        client.store_entries().into_iter().filter(|name| name.ends_with(".lock")).collect();
    assert_eq!(locks, Vec::<String>::new());
    wait_until("no build is left there", END_LIMIT, || mac.pids_matching("/bin/sh -c").is_empty());
    client.verify_store();
    mac.verify_store();
}

#[test]
fn a_hundred_builds_at_once() {
    let (_world, mac, client) = world();
    let built = client.nix_build(&drv::independent(100), &["-j0"]);
    let paths = built.assert_success().out_paths();
    assert_eq!(paths.len(), 100);
    for (number, path) in paths.iter().enumerate() {
        assert_eq!(client.read(path), format!("{number}\n"));
    }
    assert_only_the_master_is_left(&mac, &client);
}

#[test]
fn a_hundred_builds_at_once_in_sessions() {
    let world = World::new();
    let mac = world.builder("mac").refusing_forwarding().start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 8).start();
    let built = client.nix_build(&drv::independent(100), &["-j0"]);
    assert_eq!(built.assert_success().out_paths().len(), 100);
    // Eight builds and the outputs of others on their way may be more than the ten sessions of one connection.
    assert!(mac.logins() <= 2, "{} logins", mac.logins());
    client.verify_store();
    mac.verify_store();
}

#[test]
fn a_chain_of_twenty() {
    let (_world, mac, client) = world();
    let path = client.nix_build(&drv::chain(20), &["-j0"]).assert_success().out_path();
    let expected: String = (0..20).map(|number| format!("{number}\n")).collect();
    assert_eq!(client.read(&path), expected);
    assert_only_the_master_is_left(&mac, &client);
}
