//! Whether this machine has a network at all. A laptop without one reaches no host but itself, and need not try each.
//!
//! That there are no routes is believed only after a connection has failed for want of one, and as long as there are
//! none: some hosts are reached without any, through a tunnel on this machine for instance.

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// The kernel's tables of routes, of this process's network.
const TABLES: [&str; 2] = ["/proc/net/route", "/proc/net/ipv6_route"];
const INTERFACES: &str = "/sys/class/net";

/// Whether hosts, by the names of their masters, need a network.
pub type Needs = HashMap<String, bool>;

/// What is known of the present time without a network, for all processes.
#[derive(Debug, Clone)]
pub struct Outage {
    note: PathBuf,
    told: PathBuf,
}

impl Outage {
    /// In the runtime directory.
    pub fn of(directory: &Path) -> Self {
        Outage { note: directory.join("no-network"), told: directory.join("no-network.told") }
    }

    /// Whether this machine has no network: a connection has failed, and there has been no route since.
    pub fn lasts(&self) -> bool {
        if !self.note.exists() {
            return false;
        }
        if is_absent() {
            return true;
        }
        self.end();
        false
    }

    /// Notes that a host was not reached because there is no network. `name` stands for it.
    pub fn began(&self, name: &str) {
        self.note_host(name, true);
    }

    /// Which hosts are known to need a network or not to need one.
    pub fn needs(&self) -> Needs {
        let text = fs::read_to_string(&self.note).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        lines.map(|(name, needs)| (name.to_owned(), needs == "1")).collect()
    }

    /// Notes whether a host needs a network, for as long as there is none.
    pub fn note_host(&self, name: &str, needs_network: bool) {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.note);
        // If it cannot be kept, each process finds out for itself.
        let _ = file
            .and_then(|mut file| file.write_all(format!("{name} {}\n", u8::from(needs_network)).as_bytes()));
    }

    /// Whether people are to be told of it, which one process does.
    pub fn take_news(&self) -> bool {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.told).is_ok()
    }

    fn end(&self) {
        for path in [&self.note, &self.told] {
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether there is no route but to this machine itself. If the kernel does not say, there may be one.
pub fn is_absent() -> bool {
    let [Ok(four), six] = TABLES.map(fs::read_to_string) else { return false };
    let is_down = |interface: &str| {
        let state = fs::read_to_string(Path::new(INTERFACES).join(interface).join("operstate"));
        state.is_ok_and(|state| matches!(state.trim(), "down" | "lowerlayerdown" | "notpresent"))
    };
    !leads_somewhere(&four, &six.unwrap_or_default(), is_down)
}

/// Whether a route in these tables (`fib_route_seq_show` and `ipv6_route_seq_show` in Linux, net/ipv4/fib_trie.c and
/// net/ipv6/route.c) leads to another machine. One of an interface without a cable, or of a bridge that nobody uses, does
/// not; nor do those that each interface has by itself in IPv6.
fn leads_somewhere(four: &str, six: &str, is_down: impl Fn(&str) -> bool) -> bool {
    const UP: u32 = 0x1;
    const REJECT: u32 = 0x200;
    const LOCAL: u32 = 0x8000_0000;
    let leads = |interface: &str, flags: &str| {
        let flags = u32::from_str_radix(flags, 16).unwrap_or(UP);
        interface != "lo" && flags & UP != 0 && flags & (REJECT | LOCAL) == 0 && !is_down(interface)
    };
    let mut four = four.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut six = six.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    four.any(|words| words.len() > 3 && leads(words[0], words[3]))
        || six.any(|words| {
            words.len() > 9
                && !words[0].starts_with("fe8")
                && !words[0].starts_with("ff")
                && leads(words[9], words[8])
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n";
    const LO6: &str = "\
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
00000000000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 80200001       lo
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000002 00000000 00000001     eth0
fe8000000000000000fc00fffe000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 80200001     eth0
ff000000000000000000000000000000 08 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000003 00000000 00000001     eth0
";

    #[test]
    fn routes_to_other_machines_are_told_from_those_that_lead_nowhere() {
        let up = |_: &str| false;
        let four = |lines: &str| format!("{HEAD}{lines}");
        let default = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        let bridge = "docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        let own = "lo\t0000320A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        let reject = "*\t0000320A\t00000000\t0200\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        assert!(!leads_somewhere(&four(""), "", up));
        assert!(!leads_somewhere(&four(&format!("{own}{reject}")), LO6, up));
        assert!(leads_somewhere(&four(default), "", up));
        assert!(leads_somewhere(&four(bridge), LO6, up));
        assert!(!leads_somewhere(&four(bridge), LO6, |interface| interface == "docker0"));
        let global = "fd000000000000000000000000000000 40 00000000000000000000000000000000 00 \
            00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n";
        assert!(leads_somewhere(&four(""), &format!("{LO6}{global}"), up));
    }

    #[test]
    fn an_outage_is_over_when_there_are_routes() {
        // Where the tests run without a network it lasts, and that is as it should be.
        let directory = tempfile::tempdir().unwrap();
        let outage = Outage::of(directory.path());
        assert!(!outage.lasts(), "nothing has failed");
        assert!(outage.needs().is_empty());
        outage.began("a");
        outage.note_host("b", false);
        assert_eq!(outage.needs(), Needs::from([("a".into(), true), ("b".into(), false)]));
        assert!(outage.take_news() && !outage.take_news());
        let absent = is_absent();
        assert_eq!(outage.lasts(), absent);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), if absent { 2 } else { 0 });
    }
}
