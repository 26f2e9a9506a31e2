//! A cable between a client with a network of its own and the network that all other machines share.

use std::process::{self, Command, Stdio};

use crate::Machine;

/// The name of the client's end.
const INSIDE: &str = "up0";

/// A cable. Its far end has an address that builders can listen at; the near end is plugged into one client.
pub struct Uplink {
    outside: String,
    network: String,
}

impl Uplink {
    /// Lays one, to be plugged in.
    #[expect(clippy::new_without_default, reason = "it changes the machine's network")]
    pub fn new() -> Self {
        let number = process::id();
        let network = format!("10.{}.{}", 64 + (number >> 8) % 64, number % 256);
        let uplink = Self { outside: format!("nxo{number}"), network };
        ip(&["link", "add", &uplink.outside, "type", "veth", "peer", "name", &format!("p{number}")]);
        ip(&["addr", "add", &format!("{}/24", uplink.far_address()), "dev", &uplink.outside]);
        ip(&["link", "set", &uplink.outside, "up"]);
        uplink
    }

    /// The address at the far end.
    pub fn far_address(&self) -> String {
        format!("{}.1", self.network)
    }

    /// Takes the other end to a machine with a network of its own. It is not yet up.
    pub fn lead_to(&self, machine: &Machine) {
        let inside = format!("p{}", process::id());
        ip(&["link", "set", &inside, "netns", &machine.init().to_string(), "name", INSIDE]);
    }

    /// Plugs it in: the machine has an address and a route to everywhere.
    pub fn plug_in(&self, machine: &Machine) {
        let Self { network, .. } = self;
        machine.run(&format!(
            "ip link set {INSIDE} up; ip addr add {network}.2/24 dev {INSIDE}; ip route add default via {network}.1"
        ));
    }

    /// Pulls it out, with its address and route.
    pub fn pull_out(&self, machine: &Machine) {
        machine.run(&format!("ip addr flush dev {INSIDE}; ip link set {INSIDE} down"));
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        // It goes with the client's network if that was sooner.
        let _ = Command::new("ip").args(["link", "del", &self.outside]).stderr(Stdio::null()).status();
    }
}

fn ip(words: &[&str]) {
    let status = Command::new("ip").args(words).status().expect("ip is missing; ./tests/run installs it");
    assert!(status.success(), "ip {}", words.join(" "));
}
