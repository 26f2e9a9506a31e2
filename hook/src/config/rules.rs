//! The parts of `offload.toml` that are about the choice of machines: `[choice]` and `[[machine]]`.
//!
//! Owns their keys, forms and limits. Must never open a file (see `nix_offload_proxy::settings`), nor ignore a key.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::plan::machine::{Machine, StoreUri};
use crate::plan::rules::{Floors, stale_after};
use crate::plan::{Policy, Rules};
use nix_offload_proxy::settings::{Elsewhere, matches, names, time};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use std::num::NonZeroU32;
use std::time::Duration;

/// How often machines are looked at, unless it is set.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// Where samples are further apart, what is known of a machine's disk for instance says too little of how it is now.
const RAREST_SAMPLE: Duration = Duration::from_secs(300);
/// More processes than that must not wait on one client.
const MOST_WAITING: u64 = 4096;

/// The file, as far as it is for the hook.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Offload {
    #[serde(rename = "ssh")]
    _ssh: Elsewhere,
    #[serde(rename = "host")]
    _host: Elsewhere,
    choice: Choice,
    #[serde(rename = "machine")]
    machines: Vec<MachineBlock>,
}

/// The table `[choice]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Choice {
    policy: Option<PolicyName>,
    #[serde(deserialize_with = "some_factor")]
    local_speed_factor: Option<f64>,
    big_parallel_slots: Option<NonZeroU32>,
    #[serde(deserialize_with = "some_waiting")]
    max_waiting: Option<u64>,
    #[serde(deserialize_with = "some_size")]
    min_free_disk: Option<u64>,
    min_free_inodes: Option<u64>,
    #[serde(deserialize_with = "some_size")]
    min_free_memory: Option<u64>,
    #[serde(deserialize_with = "some_time")]
    hold_back: Option<Duration>,
    begin_anew: Option<bool>,
    #[serde(deserialize_with = "some_interval")]
    sample_every: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PolicyName {
    RemoteFirst,
    LocalFirst,
    Cost,
}

/// A table `[[machine]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MachineBlock {
    #[serde(deserialize_with = "names")]
    name: Vec<String>,
    #[serde(default)]
    shared_slots: Option<NonZeroU32>,
}

/// What is set for one machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MachineRules {
    /// Builds that may run there at a time, of all clients together that have this setting. None: no limit.
    pub shared_slots: Option<u32>,
}

impl Offload {
    /// The settings of the choice, with defaults for what is not set.
    pub fn rules(&self) -> Rules {
        let (set, default) = (&self.choice, Rules::default());
        Rules {
            policy: set.policy.map_or(default.policy, |policy| match policy {
                PolicyName::RemoteFirst => Policy::RemoteFirst,
                PolicyName::LocalFirst => Policy::LocalFirst,
                PolicyName::Cost => Policy::Cost,
            }),
            local_speed_factor: set.local_speed_factor.unwrap_or(default.local_speed_factor),
            big_parallel_slots: set
                .big_parallel_slots
                .map_or(default.big_parallel_slots, |slots| slots.get().into()),
            max_waiting: set.max_waiting.unwrap_or(default.max_waiting),
            floors: Floors {
                disk: set.min_free_disk.unwrap_or(default.floors.disk),
                inodes: set.min_free_inodes.unwrap_or(default.floors.inodes),
                memory: set.min_free_memory.unwrap_or(default.floors.memory),
            },
            hold_back: set.hold_back.unwrap_or(default.hold_back),
            begin_anew: set.begin_anew.unwrap_or(default.begin_anew),
            stale_after: self.sample_every().map_or(default.stale_after, stale_after),
            looks_again: self.sample_every().is_some(),
            ..default
        }
    }

    /// How often a machine that gets builds is asked for its load; none if never.
    pub fn sample_every(&self) -> Option<Duration> {
        Some(self.choice.sample_every.unwrap_or(SAMPLE_EVERY)).filter(|every| !every.is_zero())
    }

    /// Names of `[[machine]]` tables that are no machine's of these.
    pub fn without_machine<'a>(&'a self, machines: &'a [Machine]) -> impl Iterator<Item = &'a str> {
        let names = self.machines.iter().flat_map(|block| &block.name);
        names.filter(|name| !machines.iter().any(|machine| is_meant(name, machine))).map(String::as_str)
    }

    /// What is set for a machine. For each key the first block counts whose name is that of its host, or all of its
    /// store URI; `*` and `?` as in ssh_config.
    pub fn of_machine(&self, machine: &Machine) -> MachineRules {
        let mut blocks =
            self.machines.iter().filter(|block| block.name.iter().any(|name| is_meant(name, machine)));
        MachineRules { shared_slots: blocks.find_map(|block| block.shared_slots).map(NonZeroU32::get) }
    }
}

fn is_meant(pattern: &str, machine: &Machine) -> bool {
    // Newer Nix calls a machine otherwise than its list does.
    let is_its_uri =
        || pattern.contains("://") && StoreUri::parse(pattern).is_ok_and(|uri| uri == machine.uri);
    matches(pattern, machine.host()) || matches(pattern, &machine.name) || is_its_uri()
}

fn some_factor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    match f64::deserialize(deserializer)? {
        factor if factor.is_finite() && factor > 0.0 => Ok(Some(factor)),
        _ => Err(D::Error::custom("it must be above 0")),
    }
}

fn some_waiting<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    match u64::deserialize(deserializer)? {
        number if number <= MOST_WAITING => Ok(Some(number)),
        _ => Err(D::Error::custom(format!("it must be at most {MOST_WAITING}, for each costs a process"))),
    }
}

fn some_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    time(deserializer).map(Some)
}

fn some_interval<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    match time(deserializer)? {
        every if every <= RAREST_SAMPLE => Ok(Some(every)),
        _ => Err(D::Error::custom(
            "it must be at most 5m, for what is known of machines would be too old; 0 is for never, and then it is not \
             known either what they are short of",
        )),
    }
}

/// Bytes: a number, or one with a unit as in Nix's own settings (`K`, `M`, `G` and `T`, in powers of 1024).
fn some_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a number of bytes, or a text such as \"512M\" or \"2G\"")]
    enum Given {
        Bytes(u64),
        Text(String),
    }
    match Given::deserialize(deserializer)? {
        Given::Bytes(bytes) => Ok(Some(bytes)),
        Given::Text(text) => size(&text).map(Some).ok_or_else(|| {
            D::Error::custom("it must be a number of bytes, or one with K, M, G or T behind it")
        }),
    }
}

fn size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let power = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1024u64.pow(power))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix_offload_proxy::settings;
    use std::collections::BTreeSet;
    use std::path::Path;

    fn read(text: &str) -> Result<Offload, String> {
        settings::parse(text, Path::new("/f")).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_read_and_none_need_be_there() {
        let offload = read("").unwrap();
        assert_eq!((offload.rules(), offload.sample_every()), (Rules::default(), Some(SAMPLE_EVERY)));
        let offload = read(
            "[ssh]\nidle = 5\n[choice]\npolicy = 'cost'\nlocal-speed-factor = 2\nbig-parallel-slots = 4\n\
             max-waiting = 7\nmin-free-disk = '2G'\nmin-free-inodes = 5\nmin-free-memory = 1024\n\
             hold-back = '1m'\nbegin-anew = false\nsample-every = 0\n",
        )
        .unwrap();
        let rules = offload.rules();
        let floors = Floors { disk: 2 << 30, inodes: 5, memory: 1024 };
        assert_eq!((rules.policy, rules.floors, rules.max_waiting), (Policy::Cost, floors, 7));
        assert_eq!((rules.local_speed_factor, rules.big_parallel_slots), (2.0, 4));
        assert_eq!((rules.hold_back, offload.sample_every()), (Duration::from_secs(60), None));
        assert!(Rules::default().begin_anew && !rules.begin_anew);
    }

    #[test]
    fn samples_are_believed_until_two_should_have_followed_them() {
        for (every, expected) in [("0", 60), ("'1s'", 60), ("'5s'", 60), ("'10s'", 120), ("'5m'", 3600)] {
            let rules = read(&format!("[choice]\nsample-every = {every}\n")).unwrap().rules();
            assert_eq!(rules.stale_after, Duration::from_secs(expected), "{every}");
        }
    }

    #[test]
    fn the_first_block_of_a_machine_that_has_a_key_counts() {
        let offload = read(
            "[[machine]]\nname = 'other'\nshared-slots = 9\n[[machine]]\nname = ['m*', 'x']\n\
             [[machine]]\nname = 'MAC'\nshared-slots = 3\n[[machine]]\nname = '*'\nshared-slots = 1\n",
        )
        .unwrap();
        let slots = |uri: &str| {
            let machine = Machine::for_uri(uri, BTreeSet::new()).unwrap();
            offload.of_machine(&machine).shared_slots
        };
        assert_eq!((slots("ssh-ng://nix@mac"), slots("ssh://a.example")), (Some(3), Some(1)));
        let machines = [Machine::for_uri("ssh-ng://nix@mac", BTreeSet::new()).unwrap()];
        assert_eq!(offload.without_machine(&machines).collect::<Vec<_>>(), ["other", "x"]);
    }

    #[test]
    fn a_block_is_of_its_uri_whatever_nix_makes_of_it() {
        let offload =
            read("[[machine]]\nname = 'ssh-ng://mac?ssh-key=/k%20y&compress=true'\nshared-slots = 4\n")
                .unwrap();
        let named = |name: &str, uri: &str| Machine {
            name: name.into(),
            ..Machine::for_uri(uri, BTreeSet::new()).unwrap()
        };
        let rendered = "ssh-ng://mac?compress=true&ssh-key=/k%20y";
        let slots = |machine: &Machine| offload.of_machine(machine).shared_slots;
        assert_eq!(slots(&named(rendered, rendered)), Some(4));
        assert_eq!(slots(&named(rendered, "ssh-ng://mac?ssh-key=/k%20y")), None);
        assert_eq!(offload.without_machine(&[named(rendered, rendered)]).count(), 0);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        for (text, expected) in [
            ("[choice]\npolcy = 'cost'", "/f:2:1: unknown field `polcy`, expected one of "),
            ("[choice]\npolicy = 'best'", "/f:2:10: unknown variant `best`, expected one of "),
            ("[choice]\nlocal-speed-factor = 0", "/f:2:22: it must be above 0"),
            ("[choice]\nmin-free-disk = '1X'", "/f:2:17: it must be a number of bytes"),
            ("[choice]\nmin-free-disk = '99999999999T'", "/f:2:17: it must be a number of bytes"),
            ("[choice]\nmax-waiting = 100000", "/f:2:15: it must be at most 4096"),
            ("[choice]\nbig-parallel-slots = 0", "/f:2:22: "),
            ("[choice]\nbegin-anew = 'no'", "/f:2:14: invalid type"),
            ("[choice]\nsample-every = '6m'", "/f:2:16: it must be at most 5m"),
            ("[choice]\nhold-back = '31d'", "/f:2:13: it must be "),
            ("[[machine]]\nshared-slots = 2", "/f:1:1: missing field `name`"),
            ("[chioce]\n", "/f:1:2: unknown field `chioce`"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
