//! The sampler: one process for all hooks of a user that looks at the load of machines while builds go on.
//!
//! It looks only at machines whose master lives, over that master, and writes down what they say of themselves. It
//! must never start a master, wake a machine, or be of consequence to a build: whatever goes wrong in it costs knowledge
//! only.
//!
//! A shell on the far side takes one of the sessions that sshd gives on a connection. Where builds do not need those it
//! is kept; elsewhere there is one for each sample, more seldom.

mod conversation;
mod hangs;
mod interest;
mod own_load;
mod samples;

pub use interest::Interest;
pub use samples::{Entry, Samples};

use crate::plan::machine::Machine;
use crate::plan::rules::SPARING;
use crate::reach::{Open, Reach, ReachSetupError};
use crate::slots::{FileLocks, SlotError, Slots};
use conversation::{Conversation, Silence};
use hangs::Hangs;
use interest::{List, Post};
use nix_offload_proxy::exit::{self, Failure};
use own_load::{Builds, OwnLoad};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};
use thiserror::Error;

/// How long after the last hook wanted to know something it ends, if none of their builds run.
const IDLE: Duration = Duration::from_secs(30);
/// How often it looks for hooks, masters and slots.
const TICK: Duration = Duration::from_secs(1);
/// No machine is asked more often.
const SHORTEST: Duration = Duration::from_secs(1);
/// How long a machine is left alone after it could not be asked.
const PAUSE: Duration = Duration::from_secs(15);
/// How long an account is left alone that has no shell for us.
const MUTE: Duration = Duration::from_secs(600);
/// What is older is left out when something new is written down. Until then a machine that was short of something is asked before it gets a build.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// How many machines are looked at, at most: each costs a thread. Others have to wait until one of these is not used any more.
const MOST_WATCHED: usize = 512;
/// How long shells may take to be ended at the end.
const PARTING: Duration = Duration::from_secs(3);
/// Of the stack of such a thread, in bytes.
const STACK: usize = 512 * 1024;

/// Why there can be no sampler.
#[derive(Debug, Error)]
pub enum SamplerError {
    /// The runtime directory, or what is set.
    #[error(transparent)]
    Reach(#[from] ReachSetupError),
    /// No standard input.
    #[error("standard input cannot be used")]
    Input(#[from] io::Error),
    /// It was not started by a hook.
    #[error("standard input is not the sampler's lock, so this program was not started by a hook")]
    NotStartedByHook,
}

impl From<SamplerError> for Failure {
    fn from(error: SamplerError) -> Self {
        Failure::new(&error, None, exit::FAILURE)
    }
}

/// Is the sampler, until nobody wants to know anything any more. To be called by a process of its own. Standard input is
/// the lock that makes it the only one.
///
/// # Errors
/// If it was not started as [`Interest::show`] does it.
pub fn run() -> Result<(), SamplerError> {
    let env = |name: &str| std::env::var_os(name);
    let reach = Reach::new(env)?;
    let lock = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let post = Post::take(&reach, lock).ok_or(SamplerError::NotStartedByHook)?;
    let path = Samples::path(reach.directory());
    let (tell, hear) = mpsc::channel();
    let samples = Samples::read(&path);
    let (lists, watched) = Default::default();
    let mut sampler = Sampler { post, path, samples, lists, watched, left_out: 0, tell };
    tracing::debug!("looking at the load of machines");
    while sampler.tick() {
        sampler.listen(&hear);
    }
    sampler.end();
    tracing::debug!("nobody wants to know the load of machines any more");
    Ok(())
}

/// The machines of one list.
struct Fleet {
    reach: Arc<Reach>,
    slots: Option<Slots>,
    every: Duration,
    /// How long a connection is kept that nobody uses.
    idle: Duration,
    machines: Vec<Arc<Target>>,
}

/// A machine to look at.
struct Target {
    key: String,
    machine: Machine,
    store_dir: Option<String>,
}

/// What is kept of a machine that can be looked at.
struct Watched {
    own_load: OwnLoad,
    /// Whoever looks at it now.
    watcher: Option<JoinHandle<()>>,
    /// They are to stop.
    is_over: Arc<AtomicBool>,
    /// Somebody still wants to know of it.
    is_wanted: bool,
    /// When a build was last seen there.
    used: Option<Instant>,
    /// It is not to be looked at before.
    not_before: Instant,
}

/// The slots that are taken on each machine, by its key.
type Taken = HashMap<String, Builds>;

/// What a watcher tells.
struct News {
    key: String,
    what: Result<Entry, Silence>,
    /// How long the machine is to be left alone, if the watcher leaves it now.
    pause: Duration,
    /// Whether the file system of its store answers.
    hangs: Hangs,
}

struct Sampler {
    post: Post,
    path: PathBuf,
    samples: Samples,
    lists: HashMap<PathBuf, Option<Fleet>>,
    watched: HashMap<String, Watched>,
    /// Machines that were too many to be looked at, a moment ago.
    left_out: usize,
    tell: Sender<News>,
}

impl Watched {
    fn is_watched(&self) -> bool {
        self.watcher.as_ref().is_some_and(|watcher| !watcher.is_finished())
    }

    /// Has its shell ended, if there is one. Nothing is waited for.
    fn leave(&self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(watcher) = &self.watcher {
            watcher.thread().unpark();
        }
    }
}

impl Sampler {
    /// Has all shells ended, as far as they are not waited for.
    fn end(&self) {
        self.watched.values().for_each(Watched::leave);
        let watchers: Vec<&JoinHandle<()>> =
            self.watched.values().filter_map(|watched| watched.watcher.as_ref()).collect();
        let deadline = Instant::now() + PARTING;
        while watchers.iter().any(|watcher| !watcher.is_finished()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Looks for hooks, masters and slots. False if there is nothing more to do.
    fn tick(&mut self) -> bool {
        if !self.post.is_held() {
            return false;
        }
        let locks = FileLocks::read();
        let mut taken = Taken::new();
        let mut wanted = Vec::new();
        for (path, last) in self.post.lists() {
            let post = &self.post;
            let fleet =
                self.lists.entry(path.clone()).or_insert_with(|| post.read(&path).and_then(Fleet::new));
            let is_recent = SystemTime::now().duration_since(last).is_ok_and(|age| age < IDLE)
                // After the clock was set back.
                || last > SystemTime::now();
            let has_builds = fleet
                .as_ref()
                .zip(locks.as_ref())
                .is_some_and(|(fleet, locks)| fleet.look_at_slots(locks, &self.watched, &mut taken));
            if is_recent || has_builds {
                wanted.push(path);
            } else {
                self.lists.remove(&path);
                self.post.remove(&path);
            }
        }
        let now = Instant::now();
        for (key, watched) in &mut self.watched {
            let count = taken.get(key).map(Builds::count);
            watched.own_load.count(count, now);
            watched.used = count.filter(|count| *count > 0).map_or(watched.used, |_| Some(now));
            watched.is_wanted = false;
        }
        let mut left_out = 0;
        for path in &wanted {
            if let Some(Some(fleet)) = self.lists.get(path) {
                left_out += fleet.watch(&mut self.watched, &taken, &self.samples, &self.tell);
            }
        }
        // A shell keeps its connection alive, which must not be the only reason for there being one.
        self.watched.values().filter(|watched| !watched.is_wanted).for_each(Watched::leave);
        // Those that nobody wants any more are not to keep others out.
        if self.watched.len() >= MOST_WATCHED {
            self.watched.retain(|_, watched| watched.is_wanted || watched.is_watched());
        }
        // Else there is room for them now.
        let left_out = if self.watched.len() >= MOST_WATCHED { left_out } else { 0 };
        if left_out > 0 && self.left_out == 0 {
            tracing::warn!(
                event = "too many machines are in use",
                "{MOST_WATCHED} machines are looked at; of {left_out} more that are in use the load is not known"
            );
        }
        self.left_out = left_out;
        !wanted.is_empty()
    }

    /// Takes in what watchers tell until it is time to look again, and writes it down.
    fn listen(&mut self, hear: &Receiver<News>) {
        let end = Instant::now() + TICK;
        let mut is_new = false;
        while let Ok(news) = hear.recv_timeout(end.saturating_duration_since(Instant::now())) {
            is_new |= self.hear(news);
        }
        if !is_new {
            return;
        }
        if let Some(before) = SystemTime::now().checked_sub(KEPT) {
            self.samples.forget(before);
        }
        if let Err(error) = self.samples.write(&self.path) {
            tracing::debug!(%error, "cannot write down the load of machines");
        }
    }

    /// Takes in what a watcher tells. Whether there is anything to be written down.
    fn hear(&mut self, News { key, what, pause, hangs }: News) -> bool {
        let now = SystemTime::now();
        let Some(watched) = self.watched.get_mut(&key) else { return false };
        watched.not_before = Instant::now() + pause;
        let silence = match what {
            Ok(mut entry) => {
                entry.sample.own_load = watched.own_load.value();
                self.samples.put(&key, entry);
                self.samples.put_hangs(&key, hangs);
                return true;
            }
            Err(silence) => silence,
        };
        tracing::debug!(key, reason = silence.describe(), "no sample of a machine");
        let is_past = |entry: &Entry| now.duration_since(entry.sample.at).is_ok_and(|age| age > MUTE);
        let is_old = self.samples.of(&key).is_none_or(is_past);
        let is_mute = match silence {
            // One that was only slow, or is, has answered before.
            Silence::NoShell => is_old,
            Silence::NoLastingSession(_) => true,
            Silence::NoSession(_) | Silence::Lost => false,
        };
        if is_mute {
            self.samples.put_mute(&key, now);
        }
        if is_mute && is_old {
            // What it was short of then would be held against it for ever.
            self.samples.remove(&key);
        }
        is_mute
    }
}

impl Fleet {
    fn new(list: List) -> Option<Self> {
        let options = list.ssh_options;
        let env = |name: &str| {
            if name == "NIX_SSHOPTS" { options.clone().map(Into::into) } else { std::env::var_os(name) }
        };
        let reach = Reach::new(env).ok()?;
        let target = |subject: interest::Subject| {
            let mut machine = Machine::for_uri(&subject.name, BTreeSet::new()).ok()?;
            machine.identity = subject.identity;
            machine.host_key = subject.host_key;
            machine.max_jobs = subject.max_jobs;
            let (key, store_dir) = (reach.key(&machine), subject.store_dir);
            Some(Arc::new(Target { key, machine, store_dir }))
        };
        let machines = list.machines.into_iter().filter_map(target).collect();
        let slots = Slots::open(list.slots).map_err(|error: SlotError| tracing::debug!(%error, "no slots"));
        let every = Duration::from_millis(list.every_ms).max(SHORTEST);
        let idle = reach.idle();
        Some(Self { reach: Arc::new(reach), slots: slots.ok(), every, idle, machines })
    }

    /// Counts the slots of machines that builds have reached. Whether one is taken.
    fn look_at_slots(
        &self,
        locks: &FileLocks,
        watched: &HashMap<String, Watched>,
        taken: &mut Taken,
    ) -> bool {
        let Some(slots) = &self.slots else { return false };
        let mut has_builds = false;
        for target in &self.machines {
            let machine = &target.machine;
            if !watched.contains_key(&target.key) && !self.reach.was_reached(machine) {
                continue;
            }
            let count = slots.look(&machine.name, machine.max_jobs, locks);
            has_builds |= count > 0;
            taken.entry(target.key.clone()).or_default().note(slots.directory(), count);
        }
        has_builds
    }

    /// Has machines looked at that are not, and can be. Gives how many there are too many.
    fn watch(
        &self,
        watched: &mut HashMap<String, Watched>,
        taken: &Taken,
        samples: &Samples,
        tell: &Sender<News>,
    ) -> usize {
        let now = Instant::now();
        let mut left_out = 0;
        for target in &self.machines {
            let known = watched.get(&target.key);
            let has_builds = || taken.get(&target.key).is_some_and(|builds| builds.count() > 0);
            let used = known.map_or_else(|| has_builds().then_some(now), |watched| watched.used);
            let is_used = used.is_some_and(|used| now.saturating_duration_since(used) < self.idle);
            if !is_used && !self.reach.was_wanted(&target.machine, self.idle) {
                continue;
            }
            let mute = samples.mute_since(&target.key);
            if mute.is_some_and(|since| since.elapsed().is_ok_and(|age| age < MUTE)) {
                continue;
            }
            if known.is_none() && watched.len() >= MOST_WATCHED {
                left_out += 1;
                continue;
            }
            let state = watched.entry(target.key.clone()).or_insert_with(|| {
                let before = samples.of(&target.key).map(|entry| &entry.sample);
                let own_load = OwnLoad::after(before, now);
                let is_over = Arc::default();
                Watched { own_load, watcher: None, is_over, is_wanted: true, used, not_before: now }
            });
            state.is_wanted = true;
            if now < state.not_before || state.watcher.as_ref().is_some_and(|watcher| !watcher.is_finished())
            {
                continue;
            }
            let Some(open) = self.reach.open(&target.machine) else { continue };
            let (reach, target, every) = (Arc::clone(&self.reach), Arc::clone(target), self.every);
            state.is_over = Arc::default();
            let (tell, is_over) = (tell.clone(), Arc::clone(&state.is_over));
            let hangs = samples.hangs(&target.key);
            state.not_before = now + PAUSE;
            let watcher = thread::Builder::new().stack_size(STACK);
            state.watcher =
                watcher.spawn(move || look(&reach, &target, &open, every, hangs, &tell, &is_over)).ok();
        }
        left_out
    }
}

/// Looks at one machine until that is no longer possible, or needs another session.
fn look(
    reach: &Reach,
    target: &Target,
    open: &Open,
    every: Duration,
    mut hangs: Hangs,
    tell: &Sender<News>,
    is_over: &AtomicBool,
) {
    let say = |what, pause, hangs| tell.send(News { key: target.key.clone(), what, pause, hangs }).is_ok();
    let stays = || {
        !is_over.load(Ordering::Relaxed)
            && open.is_current()
            && open.is_by_socket()
            && reach.is_by_socket(&target.machine)
    };
    let mut conversation = match Conversation::begin(open) {
        Ok(begun) => begun,
        Err(silence) => {
            say(Err(silence), PAUSE.max(every), hangs);
            return;
        }
    };
    loop {
        let begin = Instant::now();
        let is_asked = hangs.may_be_asked(SystemTime::now());
        let store_dir = target.store_dir.as_deref().filter(|_| is_asked);
        let answer = conversation.sample(store_dir);
        match &answer {
            Ok(answer) if answer.hangs => {
                tracing::debug!(builder = target.machine.name, "its file system does not answer");
                hangs.hung(SystemTime::now());
            }
            Ok(_) if is_asked => hangs.answered(),
            _ => {}
        }
        // Where the machine is left now, for how long.
        let pause = match &answer {
            Err(_) => Some(PAUSE),
            Ok(answer) if answer.hangs => Some(every),
            Ok(_) => (!stays()).then_some(every * SPARING),
        };
        let is_heard = say(answer.map(|answer| answer.entry), pause.unwrap_or_default(), hangs);
        if pause.is_some() || !is_heard || !rests(begin + every, stays) {
            return;
        }
    }
}

/// Rests until then. False if the machine is to be left.
fn rests(until: Instant, stays: impl Fn() -> bool) -> bool {
    while let left = until.saturating_duration_since(Instant::now())
        && !left.is_zero()
    {
        thread::park_timeout(left.min(TICK));
        if !stays() {
            return false;
        }
    }
    true
}

#[cfg(test)]
#[path = "tests/run.rs"]
mod tests;
