//! How often a build waits for the link: counted by a relay between ssh and sshd, not timed.

use std::time::Duration;

use harness::{Builder, Client, Hook, Relay, Release, World, drv};

use crate::support::NO_SAMPLES;

const ROUND_TRIP: Duration = Duration::from_millis(60);
const NOTHING_IN_ADVANCE: &str = "[ssh]\nready-streams = 0\n";

struct Far {
    client: Client,
    mac: Builder,
    relay: Relay,
    _world: World,
}

/// A client and a builder with a long link between them.
fn far(release: Release, offload: &str) -> Far {
    let world = World::new();
    let mac = world.builder("mac").release(release).start();
    let relay = Relay::to(mac.port(), ROUND_TRIP);
    let alias = relay.ssh_config("far", &mac);
    let client = world
        .client()
        .release(release)
        .hook(Hook::Ours)
        .knows(&mac)
        .ssh_config(&alias)
        .machines("ssh-ng://far x86_64-linux - 4 1")
        .start();
    client.write("/etc/nix/offload.toml", &format!("{offload}{NO_SAMPLES}"));
    Far { client, mac, relay, _world: world }
}

impl Far {
    /// Builds, and says how many flights that took.
    fn flights(&self, expression: &str) -> u64 {
        self.flights_with(expression, &[])
    }

    fn flights_with(&self, expression: &str, options: &[&str]) -> u64 {
        let before = self.relay.flights();
        self.client.nix_build(expression, &[&["-j0"], options].concat()).assert_success();
        self.relay.flights() - before
    }
}

#[test]
fn a_chain_costs_two_round_trips_for_each_build_if_nothing_is_opened_in_advance() {
    for release in Release::ALL {
        let far = far(release, NOTHING_IN_ADVANCE);
        far.client.nix_build(&drv::trivial("warm-up"), &["-j0"]).assert_success();
        let flights = far.flights(&drv::chain(10));
        println!("{}: {flights} flights", release.name());
        // Opening the channel and one flight; the last is closed after the count, or before.
        assert!((19..=22).contains(&flights), "{} flights on {}", flights, release.name());
        far.client.verify_store();
        far.mac.verify_store();
    }
}

/// What is opened in advance is opened beside the builds, so a flight may be one of theirs or not. There are no more in
/// all, although none of the builds waits for two.
#[test]
fn what_is_opened_in_advance_makes_no_more_flights() {
    for release in Release::ALL {
        let far = far(release, "");
        for name in ["warm-up", "second"] {
            far.client.nix_build(&drv::trivial(name), &["-j0"]).assert_success();
        }
        let flights = far.flights(&drv::chain(10));
        println!("{}: {flights} flights", release.name());
        assert!(flights <= 25, "{} flights on {}", flights, release.name());
    }
}

#[test]
fn options_cost_no_round_trip_once_the_machine_was_asked_for_its_own() {
    let far = far(Release::Bookworm, NOTHING_IN_ADVANCE);
    let options = ["--keep-failed", "--option", "max-silent-time", "600"];
    far.client.nix_build(&drv::trivial("warm-up"), &[&["-j0"], &options[..]].concat()).assert_success();
    let flights = far.flights_with(&drv::chain(10), &options);
    assert!((19..=22).contains(&flights), "{flights} flights");
}

#[test]
fn inputs_that_were_never_there_cost_one_more() {
    let far = far(Release::Bookworm, NOTHING_IN_ADVANCE);
    far.client.nix_build(&drv::trivial("warm-up"), &["-j0"]).assert_success();
    // The channel, the question, and the input with everything behind it.
    let text = drv::expression(r#"d "reader" "cat ${builtins.toFile "text" "hello"} > $out" { }"#);
    let flights = far.flights(&text);
    assert!((3..=4).contains(&flights), "{flights} flights");
    // It is there now.
    let again = drv::expression(r#"d "again" "cat ${builtins.toFile "text" "hello"} > $out" { }"#);
    let flights = far.flights(&again);
    assert!((2..=3).contains(&flights), "{flights} flights");
}

#[test]
fn inputs_that_are_gone_again_are_sent_again() {
    let far = far(Release::Bookworm, NOTHING_IN_ADVANCE);
    let input = far.client.nix_build(&drv::trivial("input"), &["-j0"]).assert_success().out_path();
    // The daemon of the first build holds it until it has seen that nobody is there any more.
    far.mac.run(&format!("timeout 20 sh -c 'until nix-store --delete {input}; do sleep 0.1; done'"));
    let next = drv::expression(
        r#"let input = d "input" "echo input > $out" { }; in d "next" "cat ${input} > $out" { }"#,
    );
    let built = far.client.nix_build(&next, &["-j0"]);
    built.assert_success();
    assert_eq!(far.client.read(&built.out_path()), "input\n");
    built.assert_stderr_lacks("cannot build on");
    assert!(far.mac.exists(&input));
    far.client.verify_store();
    far.mac.verify_store();
}
