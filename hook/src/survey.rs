//! What is known of the machines at this moment, for a decision or for people: joins slots, health, what people said and
//! what was measured.
//!
//! Must never decide, connect to a machine, or measure anything itself.

mod own_store;

pub use own_store::is_own_store;

use crate::plan::known::Link;
use crate::plan::machine::Machine;
use crate::plan::{self, Health, Known, Load, Request, Work, estimate};
use crate::queue::{Queue, Waiting, Wish};
use crate::reach::{Ailing, Reach, Vitals, Wanted};
use crate::sampler::Samples;
use crate::sending;
use crate::slots::{Count, Holder, SlotError, Slots, Used};
use crate::state::{History, Withholdings};
use crate::store::Location;
use nix_derivation::StorePath;
use std::collections::HashMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The state of things that every decision looks at anew.
#[derive(Debug)]
pub struct Survey<'a> {
    slots: &'a Slots,
    reach: &'a Reach,
    location: &'a Location,
    withheld: Withholdings,
    used: Used,
    samples: Samples,
    vitals: Vitals,
    backlogs: HashMap<String, u64>,
    waiting: Waiting,
    /// Those that come on beside this one and wait for fewer machines: they have no claim on what is free, but they will
    /// have slots that are given back.
    narrower: Waiting,
    /// Bytes of the build's inputs that a machine lacks, where that is known.
    missing: HashMap<String, u64>,
    usual: Option<f64>,
    now: SystemTime,
}

/// What was found out of one machine.
#[derive(Debug)]
pub struct Look {
    /// For the decision.
    pub known: Known,
    /// The number of a free slot, if there is one.
    pub free: Option<u64>,
    /// All builds that wait for a slot there, whether or not they come before this one.
    pub waiting: u64,
}

/// What a build asks of the machines.
#[derive(Debug, Clone, Copy)]
pub struct Needs<'a> {
    /// Its direct inputs with the sizes of their NARs in bytes, if that is known.
    pub inputs: Option<&'a [(StorePath, u64)]>,
    /// Seconds that an average build takes on an idle machine of speed factor 1, if that is known.
    pub usual: Option<f64>,
}

impl<'a> Survey<'a> {
    /// Reads what is noted of all machines, so that little is left to be done for each, and nothing that waits. To be called
    /// without the lock `main-lock`. `state` is the state directory.
    pub fn begin(
        machines: &[Machine],
        slots: &'a Slots,
        reach: &'a Reach,
        location: &'a Location,
        state: Option<&Path>,
        now: SystemTime,
    ) -> Self {
        let withheld = state.map(Withholdings::read).unwrap_or_default();
        let samples = Samples::read(&Samples::path(reach.directory()));
        let waiting = Queue::of(reach.directory(), &location.state_dir).waiting();
        let (vitals, backlogs) = (reach.vitals(machines), sending::backlogs(reach.directory()));
        let (used, narrower) = (slots.used(), Waiting::default());
        let (missing, usual) = (HashMap::new(), None);
        Self {
            slots,
            reach,
            location,
            withheld,
            used,
            samples,
            vitals,
            backlogs,
            waiting,
            narrower,
            missing,
            usual,
            now,
        }
    }

    /// The same with what this build asks of the machines that can do it. That costs two files of each, so this too is to be
    /// called without the lock `main-lock`.
    #[must_use]
    pub fn for_build(self, machines: &[Machine], request: &Request, needs: &Needs<'_>) -> Self {
        let mut missing = HashMap::new();
        if let Some(inputs) = needs.inputs {
            let mut wanted = Wanted::new(inputs);
            // Of a machine that never had a build of ours nothing is noted here.
            let is_looked_at =
                |machine: &&Machine| self.used.has(&machine.name) && plan::suits(machine, request).is_ok();
            for machine in machines.iter().filter(is_looked_at) {
                let lacking = self.reach.seen(machine).lacking(&mut wanted);
                missing.extend(lacking.map(|bytes| (machine.name.clone(), bytes)));
            }
        }
        Self { missing, usual: needs.usual, ..self }
    }

    /// The same for a build that comes before all that wait, with what it waits for itself.
    #[must_use]
    pub fn at_its_turn(self, own: Option<&Wish>) -> Self {
        let narrower = own.map(|own| self.waiting.narrower(own)).unwrap_or_default();
        Self { waiting: Waiting::default(), narrower, ..self }
    }

    /// Looks at one machine. Who means to take a slot has the lock `main-lock` meanwhile.
    ///
    /// # Errors
    /// If its slots cannot be counted.
    pub fn look(&self, machine: &Machine) -> Result<Look, SlotError> {
        if let Some(reason) = against(machine, self.location) {
            let withheld = self.withheld.of(&machine.name).filter(|withheld| withheld.holds(self.now));
            let known = match withheld {
                // It would get builds from Nix's own hook.
                Some(_) if !machine.uri.is_ours() => Known { withheld, ..Known::ready(Load::default()) },
                _ => Known::ready(Load::default()).with_health(Health::Unreachable(reason)),
            };
            return Ok(Look { known, free: None, waiting: 0 });
        }
        let is_used = self.used.has(&machine.name);
        let Count { load, free } = match is_used {
            true => self.slots.count(&machine.name, machine.max_jobs)?,
            false => Count { load: Load::default(), free: (machine.max_jobs > 0).then_some(0) },
        };
        let waiting =
            self.waiting.of(&machine.name, machine.max_jobs, machine.max_jobs.saturating_sub(load.taken));
        let before = waiting + self.narrower.all_of(&machine.name);
        let slot_wait = if free.is_none() || waiting > 0 { self.slot_wait(machine, before) } else { None };
        let missing = self.missing.get(&machine.name).copied();
        // It may have answered without having had a build of ours, to be looked at before its first one.
        let said = if self.samples.is_empty() { None } else { self.samples.of(&self.reach.key(machine)) };
        let backlog = self.backlogs.get(&machine.name).copied();
        let bandwidth = if is_used { self.reach.speed(machine).bandwidth() } else { None };
        let round_trip = said.and_then(|said| said.round_trip);
        let known = Known {
            sample: said.map(|said| said.sample.clone()),
            link: Link { missing, backlog, bandwidth, round_trip },
            slot_wait,
            waiting,
            health: self.health(machine),
            withheld: self.withheld.of(&machine.name),
            ..Known::ready(load)
        };
        Ok(Look { known, free, waiting: self.waiting.all_of(&machine.name) })
    }

    fn health(&self, machine: &Machine) -> Health {
        if self.vitals.is_asleep(self.reach, machine, self.now) {
            return Health::Waking;
        }
        if self.vitals.is_cut_off(self.reach, machine) {
            return Health::CutOff;
        }
        let ailing = self.vitals.ailing(self.reach, machine, self.now);
        ailing.map_or(Health::Well, |Ailing { until, why }| Health::CoolDown { until, why })
    }

    /// When one of its slots is free, if of all builds that have one it is known since when. One that has run for longer than
    /// expected is taken to go on for half as long again.
    fn slot_wait(&self, machine: &Machine, waiting: u64) -> Option<f64> {
        let usual = self.usual? / f64::from(machine.speed_factor);
        let now = self.now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let holders = self.slots.holders(&machine.name, machine.max_jobs);
        let end = |holder: Option<Holder>| {
            let Holder { since, expected, .. } = holder?;
            let age = (now - since).max(0.0);
            Some((expected.unwrap_or(usual) - age).max(age / 2.0))
        };
        let ends: Vec<f64> = holders.into_iter().map(end).collect::<Option<_>>()?;
        estimate::slot_wait(&ends, waiting, usual)
    }
}

/// What earlier builds tell of one that is to be done. `since` is when Nix first asked for it.
pub fn work(history: Option<&History>, name: &str, since: SystemTime) -> Work {
    let record = history.and_then(|history| history.of(name));
    Work {
        duration: record.map(|record| record.seconds),
        usual: history.and_then(History::usual).map(|usual| usual.seconds),
        output: record.map(|record| record.output as u64),
        waiting_since: Some(since),
        obstructed_since: None,
        silent_since: None,
    }
}

/// Whether it matters which machine has the inputs: not while there is only one to choose.
pub fn asks_for_inputs(machines: &[Machine], request: &Request) -> bool {
    machines.iter().filter(|machine| plan::suits(machine, request).is_ok()).nth(1).is_some()
}

/// What speaks against a machine whatever is to be built.
pub fn against(machine: &Machine, own: &Location) -> Option<String> {
    if !machine.uri.is_ours() {
        return Some("it is left to Nix's own hook".into());
    }
    is_own_store(machine, own, |name| std::env::var_os(name)).then(|| {
        "its store is this client's own, where the build would wait for the locks that Nix holds".into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;

    #[test]
    fn what_a_machine_said_counts_before_its_first_build() {
        let directory = tempfile::tempdir().unwrap();
        let name =
            |name: &str| (name == "NIX_OFFLOAD_RUNTIME_DIR").then(|| directory.path().join("run").into());
        let reach = Reach::new(name).unwrap();
        let slots = Slots::open(directory.path().join("current-load")).unwrap();
        let location = Location::parse("/srv/store", |_| None).unwrap();
        let machine = Machine::for_uri("ssh-ng://new", BTreeSet::new()).unwrap();
        let said = serde_json::json!({ "at": 1_700_000_000, "inhibited": "being set up" });
        let all = serde_json::json!({ "machines": { reach.key(&machine): said } });
        let file = Samples::path(reach.directory());
        nix_offload_proxy::small_file::write_whole(&file, &all.to_string()).unwrap();
        let machines = std::slice::from_ref(&machine);
        let survey = Survey::begin(machines, &slots, &reach, &location, None, SystemTime::now());
        let sample = survey.look(&machine).unwrap().known.sample;
        assert_eq!(sample.and_then(|sample| sample.inhibited).as_deref(), Some("being set up"));
    }

    #[test]
    fn memories_of_inputs_are_read_before_the_lock_is_held_and_no_more_then() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = directory.path().join("run");
        let name = |name: &str| (name == "NIX_OFFLOAD_RUNTIME_DIR").then(|| runtime.clone().into());
        let reach = Reach::new(name).unwrap();
        let slots = Slots::open(directory.path().join("current-load")).unwrap();
        let root = format!("local?root={}", directory.path().display());
        let location = Location::parse(&root, |_| None).unwrap();
        let machine = |name: &str, system: &str| {
            Machine::for_uri(&format!("ssh-ng://{name}"), BTreeSet::from([system.to_owned()])).unwrap()
        };
        let machines = [
            machine("mac", "x86_64-linux"),
            machine("new", "x86_64-linux"),
            machine("unused", "x86_64-linux"),
            machine("other", "aarch64-linux"),
        ];
        for machine in [&machines[0], &machines[1], &machines[3]] {
            drop(slots.take(&machine.name, 0).unwrap());
        }
        let path = |name: &str| StorePath::from_basename(format!("{:0>32}-{name}", 7).as_bytes()).unwrap();
        let inputs = [(path("seen"), 10), (StorePath::from_parts([1; 20], "unseen").unwrap(), 200)];
        fs::create_dir(runtime.join("answered")).unwrap();
        for machine in [&machines[0], &machines[2], &machines[3]] {
            reach.seen(machine).note([path("seen")].iter());
        }
        let request = Request {
            am_willing: false,
            system: "x86_64-linux".into(),
            drv_path: "/nix/store/x.drv".into(),
            required_features: BTreeSet::new(),
        };
        let survey = Survey::begin(&machines, &slots, &reach, &location, None, SystemTime::now());
        let needs = Needs { inputs: Some(&inputs), usual: None };
        let survey = survey.for_build(&machines, &request, &needs);
        machines.iter().for_each(|machine| reach.seen(machine).forget());
        let missing = machines.each_ref().map(|machine| survey.look(machine).unwrap().known.link.missing);
        assert_eq!(missing, [Some(200), None, None, None]);
    }
}
