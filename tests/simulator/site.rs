//! One machine at work, and what can be learned of it from outside.

use crate::bounds;
use crate::fleet::Spec;
use crate::graph::Set;
use crate::sharing::Shared;
use nix_offload::plan::Sample;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, SystemTime};

/// How often a machine is looked at, at most.
const SAMPLE_EVERY: f64 = 3.0;
/// Load averages of the kernel forget with these times.
const LOAD_MEMORY: f64 = 60.0;
const PRESSURE_MEMORY: f64 = 10.0;
/// Transfers below this say more of the round trip than of the link.
const TELLING_BYTES: f64 = 256.0 * 1024.0;

/// A machine of the simulated world at one moment.
pub(crate) struct Site {
    pub(crate) spec: Spec,
    pub(crate) is_up: bool,
    /// Slots taken, and since when each is.
    pub(crate) taken: Vec<(usize, f64)>,
    pub(crate) builds: Shared,
    pub(crate) up: Shared,
    pub(crate) down: Shared,
    /// Outputs that are there.
    pub(crate) holds: Set,
    /// Outputs on their way there, and by whom they are sent.
    pub(crate) coming: HashMap<usize, usize>,
    /// The stock hook sends one after the other; the first one is at it.
    pub(crate) upload_lock: VecDeque<usize>,
    pub(crate) answered: f64,
    pub(crate) cool_until: f64,
    pub(crate) sample: Option<Sample>,
    pub(crate) bandwidth: Option<f64>,
    foreign: f64,
    own_tasks: f64,
    load: f64,
    own_load: f64,
    pressure: f64,
    looked: f64,
    since: f64,
}

/// The simulated time as the rule sees it.
pub(crate) fn clock(seconds: f64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds)
}

impl Site {
    pub(crate) fn new(spec: &Spec, jobs: usize) -> Self {
        Self {
            spec: spec.clone(),
            is_up: true,
            taken: Vec::new(),
            builds: Shared::default(),
            up: Shared::default(),
            down: Shared::default(),
            holds: Set::empty(jobs),
            coming: HashMap::new(),
            upload_lock: VecDeque::new(),
            answered: f64::NEG_INFINITY,
            cool_until: f64::NEG_INFINITY,
            sample: None,
            bandwidth: None,
            foreign: 0.0,
            own_tasks: 0.0,
            load: 0.0,
            own_load: 0.0,
            pressure: 0.0,
            looked: f64::NEG_INFINITY,
            since: 0.0,
        }
    }

    pub(crate) fn is_free(&self) -> bool {
        (self.taken.len() as u64) < self.spec.line.max_jobs
    }

    /// Lets the time up to now pass for what the kernel averages. To be called before anything changes.
    pub(crate) fn advance(&mut self, now: f64) {
        let passed = now - self.since;
        self.since = now;
        if passed <= 0.0 {
            return;
        }
        let tasks = self.own_tasks + self.foreign;
        let (load, pressure) = ((-passed / LOAD_MEMORY).exp(), (-passed / PRESSURE_MEMORY).exp());
        let waiting = if tasks > self.spec.cores { 100.0 } else { 0.0 };
        self.load = tasks + (self.load - tasks) * load;
        // What a client knows of its own part are its slots, not how many processes run in them.
        let slots = self.taken.len() as f64;
        self.own_load = slots + (self.own_load - slots) * load;
        self.pressure = waiting + (self.pressure - waiting) * pressure;
    }

    /// Takes over how many tasks run now. Gives the speed at which each of our builds goes on.
    pub(crate) fn pace(&mut self, own_tasks: f64, foreign: f64) -> f64 {
        self.own_tasks = own_tasks;
        self.foreign = foreign;
        f64::from(self.spec.line.speed_factor) * (self.spec.cores / (own_tasks + foreign).max(1.0)).min(1.0)
    }

    pub(crate) fn foreign_at(&self, now: f64) -> f64 {
        bounds::foreign_at(&self.spec, now)
    }

    /// Looks at the machine, unless that was done a moment ago. What is seen is for the next choice, since none waits
    /// for the answer.
    pub(crate) fn look(&mut self, now: f64) {
        if !self.is_up || now < self.looked + SAMPLE_EVERY {
            return;
        }
        self.advance(now);
        self.looked = now;
        self.sample = Some(Sample {
            cores: Some(self.spec.cores as u32),
            load_average: Some(self.load),
            own_load: Some(self.own_load),
            cpu_pressure: Some(self.pressure),
            ..Sample::empty(clock(now))
        });
    }

    /// Learns from a transfer.
    pub(crate) fn transferred(&mut self, bytes: f64, seconds: f64) {
        if bytes < TELLING_BYTES || seconds <= 0.0 {
            return;
        }
        let measured = bytes / seconds;
        self.bandwidth = Some(self.bandwidth.map_or(measured, |before| 0.7 * before + 0.3 * measured));
    }

    pub(crate) fn die(&mut self) {
        self.is_up = false;
        self.builds.clear();
        self.up.clear();
        self.down.clear();
        self.coming.clear();
        self.upload_lock.clear();
    }
}
