//! How machines are: which of them failed lately and are left alone, who tries them again, and who tells people.
//!
//! Must never decide whether a machine that is to be left alone is used all the same.

use super::{Reach, ReachError, ReachSetupError, endpoint, notes};
use crate::builder::Ahead;
use crate::config;
use crate::plan::machine::Machine;
use nix_derivation::StoreDir;
use nix_offload_proxy::down::{Down, Downs, Memory};
use nix_offload_proxy::exit;
use nix_offload_proxy::master::Endpoint;
use nix_offload_proxy::network::Needs;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

/// How long a machine is left alone after its first failure; doubled with each that follows. Long enough for a crowd of
/// builds to take no notice of it. Since nobody waits for the attempt that follows, it may come soon: a machine that was
/// started again is not to stand idle for long.
pub const FIRST_PAUSE: Duration = Duration::from_secs(10);

/// How long ssh may be asked, all in all, which machines need a network while there is none. What is not known by then is
/// found out for the next decision.
const LEARNING: Duration = Duration::from_millis(200);

/// In the runtime directory: when somebody waited for machines in vain.
const IN_VAIN: &str = "in-vain";

/// How all machines are, as noted at one moment. Where nothing is amiss that costs two looks, however many there are, and
/// nothing for each.
#[derive(Debug)]
pub struct Vitals {
    downs: Downs,
    /// Of hosts, while there is no network.
    outage: Option<Needs>,
}

/// A machine that failed and has not been seen to be well since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ailing {
    /// When somebody may try it again. None if it is time for that, or somebody is doing so.
    pub until: Option<SystemTime>,
    /// How it failed.
    pub why: String,
}

impl Reach {
    /// How all machines are. If there is no network, ssh is asked which of these can do without, for a short while; so this
    /// is not to be done while others wait for a lock.
    pub fn vitals(&self, machines: &[Machine]) -> Vitals {
        let outage = self.pool.outage();
        let outage = outage.lasts().then(|| {
            let endpoints: Vec<Endpoint> =
                machines.iter().filter_map(|machine| endpoint(machine, &self.ssh_options).ok()).collect();
            self.pool.learn_needs(endpoints.iter(), LEARNING);
            outage.needs()
        });
        Vitals { downs: Downs::read(self.pool.directory()), outage }
    }

    /// Whether and how the machine failed since it was last reached: as seen by a hook, or by anything else that uses the
    /// same masters.
    pub fn ailing(&self, machine: &Machine, now: SystemTime) -> Option<Ailing> {
        let host = self.health_of_host(machine).and_then(|memory| memory.look());
        Ailing::of(self.health(machine).look(), self.losses(machine).look(), host, now)
    }

    /// Notes that the machine failed, and how, unless that says nothing of it.
    pub fn note_failure(&self, machine: &Machine, error: &ReachError) {
        self.forget(machine);
        if !error.is_waking() && !error.is_no_network() {
            self.health(machine).failed(&error.describe(), SystemTime::now());
        }
    }

    /// Notes that the machine has not answered within `bound`, so that no other build waits for the same: this process may
    /// end before it knows more. Nobody is told yet, for it may be no more than slow.
    pub fn note_slow(&self, machine: &Machine, bound: Duration) {
        let health = self.health(machine);
        if health.failed(&format!("no answer within {} s", exit::seconds(bound)), SystemTime::now()) {
            health.take_news();
        }
    }

    /// Notes that a hook has waited for machines for as long as it may, and none has answered.
    pub fn note_in_vain(&self) {
        notes::put(&self.pool.directory().join(IN_VAIN), "");
    }

    /// Whether that was within [`FIRST_PAUSE`].
    pub fn was_in_vain(&self) -> bool {
        notes::get(&self.pool.directory().join(IN_VAIN), FIRST_PAUSE).is_some()
    }

    /// Notes that the machine loses the builds that it takes, and how it lost the last one. That it can be connected to says
    /// nothing against that, only [a build that ends there](Reach::note_built).
    pub fn note_lost(&self, machine: &Machine, how: &str) {
        self.forget(machine);
        self.losses(machine).failed(how, SystemTime::now());
    }

    /// Notes that a build ended there, well or not.
    pub fn note_built(&self, machine: &Machine) {
        self.losses(machine).clear();
    }

    /// Notes that the machine can be used, and so the way to its host.
    pub(super) fn note_success(&self, machine: &Machine) {
        self.health(machine).clear();
        if let Some(memory) = self.health_of_host(machine) {
            memory.clear();
        }
    }

    /// How the machine failed, if people are to be told: one process tells them, once for each pause.
    pub fn take_news(&self, machine: &Machine) -> Option<String> {
        let news = self.health(machine).take_news().or_else(|| self.losses(machine).take_news());
        news.map(|down| down.reason)
    }

    /// Whether people are to be told that this machine has no network, which one process does.
    pub fn take_news_of_network(&self) -> bool {
        let outage = self.pool.outage();
        outage.lasts() && outage.take_news()
    }

    /// Has the machine tried again, if it is time for that and nobody else does. Nobody waits for it: it is done by a
    /// process of its own, which outlives this one. Says whether that was begun.
    pub fn try_again(&self, machine: &Machine) -> bool {
        let now = SystemTime::now();
        if self.health_of_host(machine).is_some_and(|memory| memory.pause(now).is_some()) {
            return false;
        }
        let Some(probe) = self.health(machine).claim(now) else { return false };
        tracing::info!(
            event = "trying this machine again",
            builder = machine.name,
            "trying {} again",
            machine.name
        );
        if machine.uri.here().is_some() {
            // What is on this machine answers at once or not at all, and Nix's settings count for it.
            let (reach, machine) = (self.clone(), machine.clone());
            // Where there is no thread to be had it is tried another time.
            let _ = thread::Builder::new().spawn(move || {
                let _ =
                    reach.connect(&machine, &StoreDir::default(), reach.connect_timeout(), &Ahead::default());
                drop(probe);
            });
            return true;
        }
        let child = Command::new("/proc/self/exe")
            .arg0("nix-offload")
            .args(["probe", &machine.name, &config::line(machine)])
            // The right to try is a lock on this file, as long as it is open.
            .stdin(OwnedFd::from(probe))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            // What kills our process group, as Nix does when a hook has ended, must not kill it.
            .process_group(0)
            .spawn();
        match child {
            Ok(mut child) => {
                // Without a thread it is a zombie until this process ends.
                let _ = thread::Builder::new().spawn(move || child.wait());
                true
            }
            Err(error) => {
                tracing::warn!(event = "cannot try this machine again", builder = machine.name, %error, "cannot try {} again: {error}", machine.name);
                false
            }
        }
    }

    /// See [`probe`].
    fn probe(&self, name: &str, line: &str) {
        let fleet = config::parse_machines("probe", line, &BTreeSet::new(), &|_| Ok(None));
        let Some(mut machine) = fleet.machines.into_iter().next() else {
            tracing::error!(
                event = "no machine to try again",
                line,
                "no machine to try again in the line '{line}'"
            );
            return;
        };
        machine.name = name.to_owned();
        // Somebody who knows nothing of Nix may be trying the same host.
        let host = self.health_of_host(&machine).map(|memory| memory.admit(SystemTime::now()));
        if let Some(Err(down)) = &host {
            tracing::info!(
                event = "left alone",
                builder = name,
                reason = down.reason,
                "{name} is left alone: {}",
                exit::first_line(&down.reason)
            );
            return;
        }
        match self.connect(&machine, &StoreDir::default(), self.connect_timeout(), &Ahead::default()) {
            Ok(_) => {
                tracing::info!(event = "this machine is well again", builder = name, "{name} is well again")
            }
            Err(error) => {
                let reason = error.describe();
                tracing::info!(
                    event = "this machine is not well yet",
                    builder = name,
                    reason,
                    "{name} is not well yet: {}",
                    exit::first_line(&reason)
                );
            }
        }
    }

    pub(super) fn health(&self, machine: &Machine) -> Memory {
        Memory::of(self.pool.directory(), self.way(machine)).pausing_first(FIRST_PAUSE)
    }

    /// What is held against it though it can be connected to.
    fn losses(&self, machine: &Machine) -> Memory {
        Memory::of(self.pool.directory(), self.way_of_builds(machine)).pausing_first(FIRST_PAUSE)
    }

    /// By what notes know it.
    fn way(&self, machine: &Machine) -> String {
        format!("machine {}", self.identity(machine))
    }

    fn way_of_builds(&self, machine: &Machine) -> String {
        format!("builds on machine {}", self.identity(machine))
    }

    fn health_of_host(&self, machine: &Machine) -> Option<Memory> {
        endpoint(machine, &self.ssh_options).ok().map(|endpoint| self.pool.memory(&endpoint))
    }
}

/// Connects to the machine of a line of the list, in the place of a hook that called [`Reach::try_again`], and notes what
/// came of it. `name` is what the hook calls the machine. To be called by a process of its own.
///
/// # Errors
/// As of [`Reach::new`]. That the machine cannot be reached is none.
pub fn probe(name: &str, line: &str) -> Result<(), ReachSetupError> {
    Reach::new(|name| std::env::var_os(name)).map(|reach| reach.probe(name, line))
}

impl Vitals {
    /// Whether and how the machine failed since it was last reached; see [`Reach::ailing`].
    pub fn ailing(&self, reach: &Reach, machine: &Machine, now: SystemTime) -> Option<Ailing> {
        if self.downs.is_empty() {
            return None;
        }
        let [own, losses] =
            [reach.way(machine), reach.way_of_builds(machine)].map(|way| self.downs.of(&way).cloned());
        let host = endpoint(machine, &reach.ssh_options).ok();
        let host = host.and_then(|endpoint| self.downs.of(&reach.pool.way(&endpoint)).cloned());
        Ailing::of(own, losses, host, now)
    }

    /// Whether the machine is being woken and did not answer just now.
    pub fn is_asleep(&self, reach: &Reach, machine: &Machine, now: SystemTime) -> bool {
        let is_down = || {
            let endpoint = endpoint(machine, &reach.ssh_options).ok();
            endpoint.is_some_and(|endpoint| self.downs.pause(&reach.pool.way(&endpoint), now).is_some())
        };
        !self.downs.is_empty() && is_down() && reach.waking(machine).is_some()
    }

    /// Whether the machine cannot be reached because this one has no network.
    pub fn is_cut_off(&self, reach: &Reach, machine: &Machine) -> bool {
        self.outage.as_ref().is_some_and(|needs| {
            endpoint(machine, &reach.ssh_options)
                .is_ok_and(|endpoint| reach.pool.is_cut_off(&endpoint, needs))
        })
    }
}

impl Ailing {
    /// From what is noted of the machine itself, of the builds that it lost, and of the way to its host. Only a build can
    /// show that it does not lose them any more, so when that pause is over it gets some.
    fn of(own: Option<Down>, losses: Option<Down>, host: Option<Down>, now: SystemTime) -> Option<Self> {
        let losses = losses.filter(|down| down.lasts(now));
        let all = [own, losses, host];
        let until = all.iter().flatten().filter(|down| down.lasts(now)).map(|down| down.next).max();
        all.into_iter().flatten().next().map(|down| Ailing { until, why: down.reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(uri: &str) -> Machine {
        Machine::for_uri(uri, BTreeSet::new()).unwrap()
    }

    /// With a runtime directory of its own.
    fn reach(directory: &std::path::Path) -> Reach {
        let env = |name: &str| (name == "NIX_OFFLOAD_RUNTIME_DIR").then(|| directory.as_os_str().to_owned());
        Reach::new(env).unwrap()
    }

    #[test]
    fn one_look_tells_how_all_machines_are() {
        let directory = tempfile::tempdir().unwrap();
        let reach = reach(&directory.path().join("run"));
        let (mac, pc, well) = (machine("ssh-ng://mac"), machine("ssh-ng://pc"), machine("ssh-ng://well"));
        let now = SystemTime::now();
        reach.note_lost(&mac, "it was lost");
        reach.health_of_host(&pc).unwrap().failed("no route", now);
        let vitals = reach.vitals(&[]);
        for machine in [&mac, &pc, &well] {
            assert_eq!(vitals.ailing(&reach, machine, now), reach.ailing(machine, now), "{}", machine.name);
        }
        let why = |machine| {
            vitals.ailing(&reach, machine, now).map(|ailing| (ailing.why, ailing.until > Some(now)))
        };
        assert_eq!(why(&mac), Some(("it was lost".into(), true)));
        assert_eq!((why(&pc), why(&well)), (Some(("no route".into(), true)), None));
        assert!(!vitals.is_asleep(&reach, &pc, now), "nobody wakes it");
    }

    #[test]
    fn success_ends_what_is_held_against_the_machine_and_against_its_host() {
        let directory = tempfile::tempdir().unwrap();
        let reach = reach(&directory.path().join("run"));
        let mac = machine("ssh-ng://mac");
        reach.health(&mac).failed("refused", SystemTime::now());
        reach.health_of_host(&mac).unwrap().failed("no route", SystemTime::now());
        reach.note_success(&mac);
        assert_eq!(reach.ailing(&mac, SystemTime::now()), None);
    }

    #[test]
    fn a_machine_that_loses_builds_is_left_alone_for_longer_each_time_until_one_ends_there() {
        let directory = tempfile::tempdir().unwrap();
        let reach = reach(&directory.path().join("run"));
        let mac = machine("ssh-ng://mac");
        let left = |now: SystemTime| {
            let until = reach.ailing(&mac, now).and_then(|ailing| ailing.until)?;
            Some(until.duration_since(now).unwrap().as_secs_f64())
        };
        reach.note_lost(&mac, "it was lost");
        reach.note_success(&mac);
        assert_eq!(reach.take_news(&mac).as_deref(), Some("it was lost"), "a connection is no cure");
        let first = left(SystemTime::now()).unwrap();
        assert!((7.0..=12.0).contains(&first), "{first}");
        let then = SystemTime::now() + Duration::from_secs(60);
        assert_eq!(reach.ailing(&mac, then), None, "it gets builds");
        assert_eq!(reach.vitals(&[]).ailing(&reach, &mac, then), None);
        reach.losses(&mac).failed("it was lost again", then);
        let second = left(then).unwrap();
        assert!((16.0..=24.0).contains(&second), "{second}");
        assert_eq!(reach.vitals(&[]).ailing(&reach, &mac, then), reach.ailing(&mac, then));
        reach.note_built(&mac);
        assert_eq!(reach.ailing(&mac, then), None);
    }
}
