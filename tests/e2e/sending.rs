//! What several builds need at the same time is sent to their machine once.

use std::time::Duration;

use harness::{Builder, Client, Hook, Relay, Running, World, drv, wait_until};
use nix::sys::signal::Signal;

use crate::support::{NO_SAMPLES, SOON};

const MEBIBYTE: u64 = 1 << 20;
/// Long enough that a large input takes seconds: a channel's window goes once in each round trip.
const ROUND_TRIP: Duration = Duration::from_millis(100);
const LIMIT: Duration = Duration::from_secs(60);
const WAITING: &str = "waiting for another build to send";

struct Far {
    client: Client,
    mac: Builder,
    relay: Relay,
    _world: World,
}

fn far() -> Far {
    let world = World::new();
    let mac = world.builder("mac").start();
    let relay = Relay::to(mac.port(), ROUND_TRIP);
    let alias = relay.ssh_config("far", &mac);
    let client = world
        .client()
        .hook(Hook::Ours)
        .knows(&mac)
        .ssh_config(&alias)
        .machines("ssh-ng://far x86_64-linux - 8 1")
        .start();
    client.nix_build(&drv::trivial("warm-up"), &["-j0"]).assert_success();
    Far { client, mac, relay, _world: world }
}

impl Far {
    /// A path of that size in the client's store, which no compression makes smaller.
    fn input(&self, name: &str, mebibytes: u64) -> String {
        let line = format!(
            "head -c {mebibytes}M /dev/urandom > /tmp/{name}; nix-store --add /tmp/{name}; rm /tmp/{name}"
        );
        self.client.run(&line).trim().to_owned()
    }

    fn is_there(&self, path: &str) -> bool {
        self.mac.command("nix-store").args(["--check-validity", path]).run().code() == 0
    }

    /// How many files are left of it, and that nobody holds a lock of them.
    fn assert_nothing_left(&self) {
        self.client.run("test \"$(find /run/nix-offload/sending -maxdepth 1 -type f | wc -l)\" -le 1");
        let locks = self.client.run(
            "for f in /run/nix-offload/sending/*; do grep \":$(stat -c %i \"$f\") \" /proc/locks || true; done",
        );
        assert_eq!(locks, "");
        self.client.verify_store();
        self.mac.verify_store();
    }
}

/// Builds with these inputs.
fn user_of(name: &str, inputs: &[&str]) -> String {
    let inputs: Vec<String> = inputs.iter().map(|path| format!("(builtins.storePath {path})")).collect();
    let attributes = format!("inputs = [ {} ];", inputs.join(" "));
    format!("(d \"{name}\" \"cat $inputs | head -c 100 | cksum > $out\" {{ {attributes} }})")
}

fn start(far: &Far, name: &str, inputs: &[&str]) -> Running {
    let build = far.client.nix_build_command(&drv::expression(&user_of(name, inputs)), &["-j0", "-v"]);
    far.client.spawn_beside_others(build.limit(LIMIT))
}

#[test]
fn an_input_that_several_builds_share_travels_once() {
    const SIZE: u64 = 64;
    for count in [2, 8] {
        let far = far();
        let input = far.input("shared", SIZE);
        let before = far.relay.sent();
        let builds: Vec<String> =
            (0..count).map(|number| user_of(&format!("user-{number}"), &[&input])).collect();
        let expression = drv::expression(&format!("[ {} ]", builds.join(" ")));
        let built = far.client.nix_build_command(&expression, &["-j0", "-v"]).limit(LIMIT).run();
        assert_eq!(built.assert_success().out_paths().len(), count);
        let sent = (far.relay.sent() - before) / MEBIBYTE;
        assert!((SIZE..SIZE + SIZE / 8).contains(&sent), "{count} builds: {sent} MiB");
        let copied = built.stderr().matches(&format!("copying path '{input}'")).count();
        let waited = built.stderr().matches(WAITING).count();
        assert_eq!((copied, waited), (1, count - 1), "{built}");
        far.assert_nothing_left();
    }
}

#[test]
fn when_the_sender_is_killed_another_one_sends_it() {
    let far = far();
    let input = far.input("shared", 64);
    let before = far.relay.sent();
    let first = start(&far, "first", &[&input]);
    wait_until("the input is being sent", SOON, || far.relay.sent() > before + 4 * MEBIBYTE);
    let others = ["second", "third"].map(|name| start(&far, name, &[&input]));
    let waits = |build: &Running| build.stderr_so_far().contains(WAITING);
    wait_until("the others wait for it", SOON, || others.iter().all(waits));
    first.signal(Signal::SIGKILL);
    let _ = first.wait();
    let at_kill = far.relay.sent();
    for build in others {
        let built = build.wait();
        built.assert_success();
        assert_eq!(built.stderr().matches(WAITING).count(), 1, "{built}");
    }
    let sent = (far.relay.sent() - at_kill) / MEBIBYTE;
    assert!(sent < 64 + 8, "{sent} MiB after the kill");
    far.assert_nothing_left();
}

#[test]
fn builds_with_different_inputs_send_at_the_same_time() {
    let far = far();
    let inputs = ["one", "other"].map(|name| far.input(name, 48));
    let builds = [start(&far, "user-of-one", &[&inputs[0]]), start(&far, "user-of-other", &[&inputs[1]])];
    let copies = |build: &Running| build.stderr_so_far().contains("copying path '/nix/store/");
    wait_until("both are being sent", SOON, || builds.iter().all(copies));
    assert!(!far.is_there(&inputs[0]) && !far.is_there(&inputs[1]));
    for build in builds {
        build.wait().assert_success().assert_stderr_lacks(WAITING);
    }
    far.assert_nothing_left();
}

#[test]
fn what_is_on_its_way_counts_for_those_who_choose() {
    let far = far();
    far.client.write("/etc/nix/offload.toml", NO_SAMPLES);
    // Inputs matter only where there is a choice.
    far.client.set_machines("ssh-ng://far x86_64-linux - 8 1\nssh-ng://none x86_64-linux - 1 0.01\n");
    let (input, other) = (far.input("one", 48), far.input("other", 1));
    let expression = drv::expression(&user_of("user-of-other", &[&other]));
    let drv = far.client.nix("nix-instantiate").args(["-E", &expression]).run().assert_success().out_path();
    let behind = || {
        let explained = far.client.command("/opt/nix-offload/bin/nix-offload").args(["explain", &drv]).run();
        explained.assert_success().stdout().contains(", behind 48")
    };
    assert!(!behind());
    let before = far.relay.sent();
    let first = start(&far, "first", &[&input]);
    wait_until("the input is being sent", SOON, || far.relay.sent() > before + 4 * MEBIBYTE);
    assert!(behind());
    first.wait().assert_success();
    assert!(!behind());
    assert!(far.client.entries("/run/nix-offload/sending/now").is_empty());
}

#[test]
fn what_has_arrived_is_not_waited_for_until_the_rest_is_there_too() {
    let far = far();
    let inputs = ["one", "other"].map(|name| far.input(name, 48));
    let before = far.relay.sent();
    let mut first = start(&far, "first", &[&inputs[0], &inputs[1]]);
    wait_until("the inputs are being sent", SOON, || far.relay.sent() > before + 4 * MEBIBYTE);
    let mut others = [start(&far, "second", &[&inputs[0]]), start(&far, "third", &[&inputs[1]])];
    wait_until("one of them has what it needs", LIMIT, || others.iter_mut().any(|build| !build.is_running()));
    assert!(first.is_running());
    assert_eq!(inputs.iter().filter(|path| far.is_there(path)).count(), 1);
    for build in others.into_iter().chain([first]) {
        build.wait().assert_success();
    }
    assert!((far.relay.sent() - before) / MEBIBYTE < 2 * 48 + 12);
    far.assert_nothing_left();
}
