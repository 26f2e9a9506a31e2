//! Slots are counted by Nix's own lock files, so the stock hook and ours can run side by side.

use std::time::Duration;

use harness::{Client, Hook, Output, Running, World, drv};

use crate::support::{assert_only_masters_left, begun, gated, open, wait_for_begin};

/// nix.conf without our line.
const STOCK: &str = "/etc/nix-stock";

fn start(client: &Client, expression: &str, stock: bool, jobs: &str) -> Running {
    let command = client.nix_build_command(expression, &[jobs]);
    let command = if stock { command.env("NIX_CONF_DIR", STOCK) } else { command };
    client.spawn_beside_others(command)
}

#[track_caller]
fn assert_built_on(client: &Client, output: &Output, machine: &str) {
    assert_eq!(client.read(&output.assert_success().out_path()), format!("{machine}\n"), "{output}");
}

#[test]
fn a_slot_taken_by_one_hook_is_taken_for_the_other() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    client.run(&format!(
        "mkdir {STOCK}; cp /etc/nix/machines {STOCK}/; grep -v build-hook /etc/nix/nix.conf > {STOCK}/nix.conf"
    ));
    for holder_is_stock in [false, true] {
        let (held, other) = (format!("held-{holder_is_stock}"), format!("other-{holder_is_stock}"));
        let holder = start(&client, &gated(&held), holder_is_stock, "-j0");
        wait_for_begin(&client, &held, &["mac"]);
        // What can be built here is not kept waiting.
        let local = start(&client, &drv::where_built(&other), !holder_is_stock, "-j1").wait();
        assert_built_on(&client, &local, "client");
        open(&client, &held);
        assert_built_on(&client, &holder.wait(), "mac");
        let free =
            start(&client, &drv::where_built(&format!("free-{other}")), !holder_is_stock, "-j1").wait();
        assert_built_on(&client, &free, "mac");
    }
    assert_only_masters_left(&client, 1);
}

#[test]
fn a_build_waits_for_the_slot_and_no_longer() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let first = start(&client, &gated("first"), false, "-j0");
    wait_for_begin(&client, "first", &["mac"]);
    let mut second = start(&client, &gated("second"), false, "-j0");
    // A third one that is refused at once shows that requests have been answered meanwhile.
    let needs = drv::expression(r#"d "needs" "" { requiredSystemFeatures = [ "no-such" ]; }"#);
    start(&client, &needs, false, "-j0").wait().assert_failure();
    assert_eq!(begun(&client, "second"), Vec::<String>::new());
    assert!(second.is_running());
    open(&client, "first");
    assert_built_on(&client, &first.wait(), "mac");
    wait_for_begin(&client, "second", &["mac"]);
    open(&client, "second");
    assert_built_on(&client, &second.wait(), "mac");
    assert_only_masters_left(&client, 1);
}

#[test]
fn builds_that_wait_do_not_wait_for_nixs_clock() {
    /// How often Nix asks again for what was postponed (`build-poll-interval`).
    const CLOCK: Duration = Duration::from_secs(5);
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let built = client.nix_build(&drv::independent(6), &["-j0"]);
    assert_eq!(built.assert_success().out_paths().len(), 6);
    assert!(built.took() < CLOCK, "{built}");
}

#[test]
fn a_slot_is_free_while_outputs_travel() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 1).start();
    let large = drv::script(
        "large",
        "cat /etc/machine-name >> /mnt/share/large.begun; head -c 300M /dev/zero > $out",
    );
    let first = start(&client, &large, false, "-j0");
    wait_for_begin(&client, "large", &["mac"]);
    let second = start(&client, &gated("second"), false, "-j0");
    wait_for_begin(&client, "second", &["mac"]);
    // It was begun while the output of the first was not valid yet.
    let mut first = first;
    assert!(first.is_running(), "the first build had ended before");
    open(&client, "second");
    first.wait().assert_success();
    assert_built_on(&client, &second.wait(), "mac");
}

#[test]
fn more_builds_than_sessions_lose_none() {
    let world = World::new();
    let mac = world.builder("mac").refusing_forwarding().max_sessions(2).start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 4).start();
    let built = client.nix_build(&drv::independent(12), &["-j0"]);
    assert_eq!(built.assert_success().out_paths().len(), 12);
    client.verify_store();
}
