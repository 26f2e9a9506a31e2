//! The simulated world: Nix asks, hooks answer, inputs travel, builds run, machines die. One event after the other, the
//! same for the same seed.
//!
//! The world knows how long everything takes. The rule is told only what it would know in reality.

mod choice;
mod waiting;

#[cfg(test)]
pub(crate) use choice::unmeasured_choice;

use crate::fleet::Spec;
use crate::graph::Graph;
use crate::random::Random;
use crate::sharing::Shared;
use crate::site::Site;
use crate::stock::Edition;
use nix_offload::plan::machine::Machine;
use nix_offload::plan::{Because, Rules, Verdict};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashSet};
use waiting::{Place, Wish};

/// How long after it was postponed Nix asks again for something, unless something ends before.
const NIX_POLL: f64 = 5.0;
/// How often hooks of ours look whether their builds would be done sooner elsewhere.
const LOOK_ELSEWHERE: f64 = 10.0;
/// How long it takes until a connection is given up whose far side is dead.
const SILENCE: f64 = 10.0;
/// How long Nix waits for a stock hook that connects to a dead machine. Without `ConnectTimeout` it is minutes.
const STOCK_CONNECT: f64 = 5.0;
/// And for ours, when it is not known that the machine is down: then another one is asked beside it.
const OUR_CONNECT: f64 = 1.5;
/// How long hooks of ours leave a machine alone that failed.
const COOL_DOWN: f64 = 60.0;
/// Nothing takes this many seconds.
const FOREVER: f64 = 2_000_000.0;
/// Round trips before the inputs travel and before the outputs do. Stock needs more; they are not held against it.
const ROUND_TRIPS: f64 = 2.0;

/// Who decides and who builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    /// Nix's own hook.
    Stock(Edition),
    /// Our hook when nothing is ever measured: it builds as ours does and chooses as stock does, and its builds wait in
    /// the order in which they come.
    Unmeasured,
    /// Our hook, which learns while it builds.
    Ours,
    /// Our hook that built something similar before and knows about how long builds of most names take.
    Experienced,
}

/// What differs between worlds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Conditions {
    /// Nix asks again for what was postponed whenever one of its builds ends, as a comment in it has it
    /// (`derivation-goal.cc` of Nix 2.26.3, at `rpPostpone`). It is kinder to stock hooks than the real one, which does so
    /// every five seconds only (`Worker::waitForInput` in `worker.cc`).
    pub(crate) is_kind: bool,
    /// Hooks of ours send a path to a machine though another one is doing that already.
    pub(crate) sends_twice: bool,
    /// Builds wait in the order in which they come, whatever waits for them.
    pub(crate) is_first_come: bool,
    /// No build is moved to a better machine.
    pub(crate) stays: bool,
}

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Outcome {
    /// Seconds until the last output was here.
    pub(crate) makespan: f64,
    /// Builds that died with their machine.
    pub(crate) lost: u64,
    /// Builds that were moved.
    pub(crate) moved: u64,
    /// Bytes of inputs that were sent.
    pub(crate) sent: u64,
    /// The longest time that a build waited for a machine.
    pub(crate) longest_wait: f64,
    /// Most slots that were taken beyond a machine's maximum; 0 if all is well.
    pub(crate) overbooked: u64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    /// Nix asks for all that is ready.
    Ask,
    /// Nix asks again for all that is postponed.
    Poll,
    /// Builds that wait in hooks look again.
    Look,
    /// Builds that run look for a better machine.
    LookElsewhere,
    /// The connection stands, inputs can travel.
    Send {
        job: usize,
        attempt: u32,
    },
    /// The build is over and outputs can travel.
    Fetch {
        job: usize,
        attempt: u32,
    },
    /// One of those who share it has all, if nothing changed meanwhile.
    Done {
        site: usize,
        what: What,
        version: u64,
    },
    /// The hook notices that the machine is dead.
    Noticed {
        job: usize,
        attempt: u32,
    },
    Foreign {
        site: usize,
    },
    Dies {
        site: usize,
    },
    IsBack {
        site: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    Build,
    Up,
    Down,
}

/// An event at its time; the earlier number first among those at the same time.
struct Due(f64, u64, Event);

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

#[derive(Default, Clone)]
struct Progress {
    unmet: usize,
    attempt: u32,
    was_moved: bool,
    site: Option<usize>,
    asked: Option<f64>,
    /// Whose transfers it waits for.
    pending: HashSet<usize>,
    /// What it sends itself.
    sending: Vec<usize>,
    bytes: f64,
    began: f64,
}

struct World<'a> {
    graph: &'a Graph,
    contender: Contender,
    rules: Rules,
    lines: Vec<Machine>,
    sites: Vec<Site>,
    jobs: Vec<Progress>,
    dependents: Vec<Vec<usize>>,
    /// Nix goes through its goals in the order of their names (`CompareGoalPtrs` in `src/libstore/build/goal.cc`), which
    /// has nothing to do with the graph.
    names: Vec<usize>,
    now: f64,
    due: BinaryHeap<Reverse<Due>>,
    number: u64,
    ready: BTreeSet<(usize, usize)>,
    postponed: Vec<usize>,
    /// Accepted by a hook of ours to wait for a slot.
    waiting: Vec<Place>,
    /// Counts places and turns.
    places: u64,
    nix_busy_until: f64,
    /// Machines that the present hook process could not connect to.
    shunned: Vec<bool>,
    is_polling: bool,
    is_looking: bool,
    conditions: Conditions,
    /// Builds so far, the sum of their seconds at speed 1, and that of their outputs' bytes.
    built: (u64, f64, u64),
    /// What is known of the seconds that each build takes at speed 1.
    history: Vec<Option<f64>>,
    /// Seconds of the longest chain that waits for each build, as far as its hook knows.
    tails: Vec<Option<f64>>,
    left: usize,
    outcome: Outcome,
}

/// Builds the graph on the fleet. `naming` is the seed of the names of the builds.
pub(crate) fn run(
    graph: &Graph,
    fleet: &[Spec],
    contender: Contender,
    conditions: Conditions,
    naming: u64,
) -> Outcome {
    let count = graph.jobs.len();
    let mut names: Vec<usize> = (0..count).collect();
    let mut random = Random::new(naming);
    (1..count).rev().for_each(|index| names.swap(index, random.below(index + 1)));
    let mut dependents = vec![Vec::new(); count];
    for (index, job) in graph.jobs.iter().enumerate() {
        job.needs.iter().for_each(|need| dependents[*need].push(index));
    }
    let history = choice::history(graph, contender, naming);
    let is_first_come = conditions.is_first_come || !contender.is_learning();
    let tails = if is_first_come { vec![None; count] } else { choice::tails(&history, &dependents) };
    let progress = graph.jobs.iter().map(|job| Progress { unmet: job.needs.len(), ..Progress::default() });
    let mut world = World {
        graph,
        contender,
        rules: Rules::default(),
        lines: fleet.iter().map(|spec| spec.line.clone()).collect(),
        sites: fleet.iter().map(|spec| Site::new(spec, count)).collect(),
        jobs: progress.collect(),
        dependents,
        now: 0.0,
        due: BinaryHeap::new(),
        number: 0,
        ready: (0..count)
            .filter(|index| graph.jobs[*index].needs.is_empty())
            .map(|index| (names[index], index))
            .collect(),
        names,
        postponed: Vec::new(),
        waiting: Vec::new(),
        places: 0,
        nix_busy_until: 0.0,
        shunned: vec![false; fleet.len()],
        is_polling: false,
        is_looking: false,
        conditions,
        built: (0, 0.0, 0),
        history,
        tails,
        left: count,
        outcome: Outcome { makespan: 0.0, lost: 0, moved: 0, sent: 0, longest_wait: 0.0, overbooked: 0 },
    };
    for (site, spec) in fleet.iter().enumerate() {
        spec.foreign.iter().for_each(|(at, _)| world.at(*at, Event::Foreign { site }));
        for (dies, back) in &spec.outages {
            world.at(*dies, Event::Dies { site });
            world.at(*back, Event::IsBack { site });
        }
    }
    world.at(0.0, Event::Ask);
    if contender.is_learning() && !conditions.stays {
        world.at(LOOK_ELSEWHERE, Event::LookElsewhere);
    }
    while world.left > 0 {
        let Reverse(Due(at, _, event)) = world.due.pop().expect("a world that goes on until all is built");
        assert!(at < FOREVER, "{} builds are never done", world.left);
        world.now = at;
        world.happens(event);
    }
    world.outcome.makespan = world.now;
    world.outcome
}

impl World<'_> {
    fn at(&mut self, time: f64, event: Event) {
        self.number += 1;
        self.due.push(Reverse(Due(time, self.number, event)));
    }

    fn after(&mut self, seconds: f64, event: Event) {
        self.at(self.now + seconds, event);
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Ask => self.ask(),
            Event::Poll => {
                self.is_polling = false;
                self.ask_again();
            }
            Event::Look => {
                self.is_looking = false;
                self.serve_waiting();
            }
            Event::LookElsewhere => {
                self.move_builds();
                self.after(LOOK_ELSEWHERE, Event::LookElsewhere);
            }
            Event::Send { job, attempt } if self.jobs[job].attempt == attempt => self.send(job),
            Event::Fetch { job, attempt } if self.jobs[job].attempt == attempt => self.fetch(job),
            Event::Noticed { job, attempt } if self.jobs[job].attempt == attempt => self.give_up(job),
            Event::Done { site, what, version } if self.shared(site, what).version == version => {
                self.done(site, what);
            }
            Event::Send { .. } | Event::Fetch { .. } | Event::Noticed { .. } | Event::Done { .. } => {}
            Event::Foreign { site } => self.go_on(site, What::Build),
            Event::Dies { site } => self.die(site),
            Event::IsBack { site } => self.sites[site].is_up = true,
        }
    }

    fn shared(&mut self, site: usize, what: What) -> &mut Shared {
        let site = &mut self.sites[site];
        match what {
            What::Build => &mut site.builds,
            What::Up => &mut site.up,
            What::Down => &mut site.down,
        }
    }

    /// Lets the time pass for those who share it, after which they may change. [`World::go_on`] must follow.
    fn advance(&mut self, site: usize, what: What) {
        let now = self.now;
        self.shared(site, what).advance(now);
        self.sites[site].advance(now);
    }

    /// Shares it anew.
    fn go_on(&mut self, index: usize, what: What) {
        self.advance(index, what);
        let (now, graph) = (self.now, self.graph);
        let site = &mut self.sites[index];
        let rate = match what {
            What::Build => {
                let tasks: f64 = site.builds.users().map(|job| f64::from(graph.jobs[job].threads)).sum();
                let foreign = site.foreign_at(now);
                site.pace(tasks, foreign)
            }
            What::Up => site.spec.bandwidth / site.up.len().max(1) as f64,
            What::Down => site.spec.bandwidth / site.down.len().max(1) as f64,
        };
        let end = self.shared(index, what).go_on(rate);
        let version = self.shared(index, what).version;
        if let Some(end) = end {
            self.at(end, Event::Done { site: index, what, version });
        }
    }

    fn add(&mut self, site: usize, what: What, job: usize, amount: f64) {
        self.advance(site, what);
        self.shared(site, what).add(job, amount);
        self.go_on(site, what);
    }

    fn done(&mut self, site: usize, what: What) {
        self.advance(site, what);
        let finished = self.shared(site, what).finish();
        self.go_on(site, what);
        let Some(job) = finished else { return };
        match what {
            What::Build => self.built(job),
            What::Up => self.sent(site, job),
            What::Down => self.fetched(job),
        }
    }

    // --- Nix ---

    /// Nix asks for everything that is ready, one after the other, as its event loop does.
    fn ask(&mut self) {
        if self.now < self.nix_busy_until {
            return self.at(self.nix_busy_until, Event::Ask);
        }
        while let Some((name, job)) = self.ready.pop_first() {
            self.jobs[job].asked.get_or_insert(self.now);
            let (verdict, because) = self.answer(job);
            match verdict {
                Verdict::Accept(site) if !self.sites[site].is_up && !self.is_trusted(site) => {
                    // The reply has to wait for the connection, and so does Nix.
                    self.shunned[site] = true;
                    let patience = match self.contender {
                        Contender::Stock(_) => STOCK_CONNECT,
                        _ => OUR_CONNECT,
                    };
                    self.sites[site].cool_until = self.now + COOL_DOWN;
                    self.nix_busy_until = self.now + patience;
                    self.ready.insert((name, job));
                    return self.at(self.nix_busy_until, Event::Ask);
                }
                Verdict::Accept(site) => {
                    // The process is the build's now, and the next request comes to a new one.
                    self.shunned.fill(false);
                    self.start(job, site);
                }
                Verdict::Wait(wish) if self.may_wait(Wish::of(&wish)) => {
                    self.shunned.fill(false);
                    self.wait_for(job, Wish::of(&wish), because == Because::HeldBack);
                }
                // Declined is what all machines failed for; the real command fails then, with either hook.
                Verdict::Wait(_) | Verdict::Postpone(_) | Verdict::Decline => self.postponed.push(job),
            }
        }
        if !self.postponed.is_empty() && !self.is_polling {
            self.is_polling = true;
            self.after(NIX_POLL, Event::Poll);
        }
    }

    /// Whether a build is promised there without asking the machine.
    fn is_trusted(&self, site: usize) -> bool {
        !self.contender.is_stock() && self.now - self.sites[site].answered < COOL_DOWN
    }

    fn ask_again(&mut self) {
        if self.shunned.iter().all(|shunned| *shunned) {
            // As if the command were given again.
            self.shunned.fill(false);
        }
        for job in std::mem::take(&mut self.postponed) {
            self.ready.insert((self.names[job], job));
        }
        self.at(self.now, Event::Ask);
    }

    // --- One build ---

    fn start(&mut self, job: usize, index: usize) {
        let now = self.now;
        let site = &mut self.sites[index];
        site.advance(now);
        site.taken.push((job, now));
        let slots = site.spec.line.max_jobs;
        self.outcome.overbooked =
            self.outcome.overbooked.max((site.taken.len() as u64).saturating_sub(slots));
        let waited = now - self.jobs[job].asked.unwrap_or(now);
        self.outcome.longest_wait = self.outcome.longest_wait.max(waited);
        let progress = &mut self.jobs[job];
        progress.site = Some(index);
        let attempt = progress.attempt;
        if !self.sites[index].is_up {
            return self.after(SILENCE, Event::Noticed { job, attempt });
        }
        self.sites[index].answered = now;
        let delay = ROUND_TRIPS * self.sites[index].spec.round_trip;
        self.after(delay, Event::Send { job, attempt });
    }

    fn send(&mut self, job: usize) {
        let Some(index) = self.jobs[job].site else { return };
        if self.contender.is_stock() {
            self.sites[index].upload_lock.push_back(job);
            if self.sites[index].upload_lock.len() > 1 {
                return;
            }
        }
        self.send_missing(job, index);
    }

    fn send_missing(&mut self, job: usize, index: usize) {
        let graph = self.graph;
        let sends_twice = self.conditions.sends_twice;
        let site = &mut self.sites[index];
        let mut bytes = graph.jobs[job].source;
        let mut pending = HashSet::from([job]);
        let mut sending = Vec::new();
        for path in graph.inputs[job].without(&site.holds) {
            match site.coming.get(&path).filter(|_| !sends_twice) {
                // Nobody sends what somebody else is sending.
                Some(sender) => drop(pending.insert(*sender)),
                None => {
                    bytes += graph.jobs[path].output;
                    sending.push(path);
                }
            }
        }
        site.coming.extend(sending.iter().map(|path| (*path, job)));
        self.outcome.sent += bytes;
        let progress = &mut self.jobs[job];
        (progress.pending, progress.sending, progress.bytes) = (pending, sending, bytes as f64);
        progress.began = self.now;
        self.add(index, What::Up, job, bytes as f64);
    }

    fn sent(&mut self, index: usize, sender: usize) {
        let seconds = self.now - self.jobs[sender].began;
        let bytes = self.jobs[sender].bytes;
        let sent = std::mem::take(&mut self.jobs[sender].sending);
        let site = &mut self.sites[index];
        site.transferred(bytes, seconds);
        for path in sent {
            site.coming.remove(&path);
            site.holds.insert(path);
        }
        let there: Vec<usize> = site.taken.iter().map(|(job, _)| *job).collect();
        for job in there {
            if self.jobs[job].pending.remove(&sender) && self.jobs[job].pending.is_empty() {
                self.add(index, What::Build, job, self.graph.jobs[job].work);
                self.jobs[job].began = self.now;
            }
        }
        if self.contender.is_stock() {
            self.sites[index].upload_lock.pop_front();
            if let Some(next) = self.sites[index].upload_lock.front().copied() {
                self.send_missing(next, index);
            }
        }
    }

    fn built(&mut self, job: usize) {
        let Some(index) = self.jobs[job].site else { return };
        self.sites[index].holds.insert(job);
        self.sites[index].answered = self.now;
        let speed = f64::from(self.lines[index].speed_factor);
        let (built, seconds, bytes) = self.built;
        let took = (self.now - self.jobs[job].began) * speed;
        self.built = (built + 1, seconds + took, bytes + self.graph.jobs[job].output);
        let delay = ROUND_TRIPS * self.sites[index].spec.round_trip;
        let attempt = self.jobs[job].attempt;
        self.after(delay, Event::Fetch { job, attempt });
        if !self.contender.is_stock() {
            self.give_back(job, index);
            self.serve_waiting();
        }
    }

    fn fetch(&mut self, job: usize) {
        let Some(index) = self.jobs[job].site else { return };
        self.jobs[job].began = self.now;
        self.add(index, What::Down, job, self.graph.jobs[job].output as f64);
    }

    fn fetched(&mut self, job: usize) {
        let Some(index) = self.jobs[job].site.take() else { return };
        let seconds = self.now - self.jobs[job].began;
        self.sites[index].transferred(self.graph.jobs[job].output as f64, seconds);
        self.give_back(job, index);
        self.jobs[job].attempt += 1;
        self.left -= 1;
        for dependent in std::mem::take(&mut self.dependents[job]) {
            self.jobs[dependent].unmet -= 1;
            if self.jobs[dependent].unmet == 0 {
                self.ready.insert((self.names[dependent], dependent));
            }
        }
        self.ended();
    }

    /// A child of Nix ended.
    fn ended(&mut self) {
        if self.conditions.is_kind {
            self.ask_again();
        } else {
            self.at(self.now, Event::Ask);
        }
    }

    fn give_back(&mut self, job: usize, index: usize) {
        let now = self.now;
        self.sites[index].advance(now);
        self.sites[index].taken.retain(|(taker, _)| *taker != job);
    }

    // --- Death ---

    fn die(&mut self, index: usize) {
        for what in [What::Build, What::Up, What::Down] {
            self.advance(index, what);
        }
        self.sites[index].die();
        for job in 0..self.jobs.len() {
            if self.jobs[job].site == Some(index) {
                self.outcome.lost += 1;
                self.jobs[job].attempt += 1;
                let attempt = self.jobs[job].attempt;
                self.after(SILENCE, Event::Noticed { job, attempt });
            }
        }
    }

    /// The machine is given up. Stock would fail the whole command; here Nix asks again for the build.
    fn give_up(&mut self, job: usize) {
        let Some(index) = self.jobs[job].site.take() else { return };
        self.give_back(job, index);
        self.jobs[job].attempt += 1;
        if self.contender.is_stock() {
            self.ready.insert((self.names[job], job));
            self.ended();
        } else {
            // The hook itself looks for another one.
            self.sites[index].cool_until = self.now + COOL_DOWN;
            self.wait_for(job, self.all(), false);
            self.serve_waiting();
        }
    }
}
