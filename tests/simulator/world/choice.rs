//! The choice: what a hook is told in the simulated world, and whom it asks.

use super::waiting::Ahead;
use super::{Contender, Progress, World};
use crate::graph::Graph;
use crate::random::Random;
use crate::site::clock;
use crate::stock;
use nix_offload::plan::chain::{self, Step};
use nix_offload::plan::estimate::slot_wait;
use nix_offload::plan::known::Link;
#[cfg(test)]
use nix_offload::plan::machine::Machine;
use nix_offload::plan::moving::{Running, worth_moving};
use nix_offload::plan::{
    self, Because, Decision, Health, Known, Load, Local, Question, Request, Rules, Verdict, Work,
};
use std::collections::BTreeSet;

/// How many of the names a history has, and by how much its durations are off (two thirds are within a factor of
/// `e^sigma`).
const KNOWN_NAMES: f64 = 0.85;
const KNOWN_SIGMA: f64 = 0.3;

impl Contender {
    pub(super) fn is_stock(self) -> bool {
        matches!(self, Self::Stock(_))
    }

    pub(super) fn is_learning(self) -> bool {
        matches!(self, Self::Ours | Self::Experienced)
    }
}

impl World<'_> {
    pub(super) fn decide(&mut self, job: usize) -> (Verdict, Because) {
        if let Contender::Stock(edition) = self.contender {
            let taken: Vec<u64> = self.sites.iter().map(|site| site.taken.len() as u64).collect();
            let best = stock::choose(edition, &self.lines, &taken, &self.shunned);
            return (best.map_or(Verdict::Postpone(Vec::new()), Verdict::Accept), Because::Best);
        }
        let decision = self.decided(job);
        if self.contender.is_learning() {
            let now = self.now;
            self.sites.iter_mut().for_each(|site| site.look(now));
        }
        (decision.verdict, decision.because)
    }

    /// Where the build would be done sooner if it began anew.
    pub(super) fn better_place(&self, job: usize, on: usize) -> Option<usize> {
        let Progress { began, was_moved, .. } = self.jobs[job];
        let running = Running { on, elapsed: self.now - began, was_moved };
        let better = worth_moving(&self.lines, &self.decided(job), &running)?;
        Some(better.to)
    }

    fn decided(&self, job: usize) -> Decision {
        let now = clock(self.now);
        let (built, _, bytes) = self.built;
        let is_learning = self.contender.is_learning();
        let work = Work {
            duration: if is_learning { self.history[job] } else { None },
            usual: if is_learning { self.usual() } else { None },
            output: (built > 0 && is_learning).then(|| bytes / built),
            waiting_since: self.jobs[job].asked.map(clock),
            obstructed_since: None,
            silent_since: None,
        };
        let request = any_request();
        let local = Local::default();
        let question = Question {
            machines: &self.lines,
            rules: &self.rules,
            local: &local,
            here: None,
            request: &request,
            work: &work,
            now,
        };
        let ahead = self.ahead(job);
        plan::decide(&question, |index| self.known(job, index, &ahead))
    }

    /// Seconds of an average build at speed 1.
    fn usual(&self) -> Option<f64> {
        let (built, seconds, _) = self.built;
        (built > 0).then(|| seconds / built as f64)
    }

    /// When slots will be free, from the times of the lock files and how long builds take. One that has run for longer
    /// than usual is expected to go on for half as long again.
    fn slot_wait(&self, index: usize, ahead: u64) -> Option<f64> {
        let site = &self.sites[index];
        let usual = self.usual()? / f64::from(site.spec.line.speed_factor);
        let ages = site.taken.iter().map(|(_, since)| self.now - since);
        let ends: Vec<f64> = ages.map(|age| (usual - age).max(age / 2.0)).collect();
        slot_wait(&ends, ahead, usual)
    }

    /// What a hook of ours knows of a machine.
    fn known(&self, job: usize, index: usize, ahead: &Ahead) -> Known {
        let site = &self.sites[index];
        let health = if self.shunned[index] {
            Health::Failed("no connection".into())
        } else if self.now < site.cool_until {
            Health::CoolDown { until: Some(clock(site.cool_until)), why: "no connection".into() }
        } else {
            Health::Well
        };
        let ready = Known::ready(Load { taken: site.taken.len() as u64 }).with_health(health);
        let waiting = if ahead.is_waiting { 0 } else { ahead.of[index] };
        let known = Known { waiting, ..ready };
        if !self.contender.is_learning() {
            return known;
        }
        let missing = |path: &usize| self.conditions.sends_twice || !site.coming.contains_key(path);
        let outputs = self.graph.inputs[job].without(&site.holds).filter(missing);
        let missing = outputs.map(|path| self.graph.jobs[path].output).sum::<u64>();
        Known {
            slot_wait: if site.is_free() { None } else { self.slot_wait(index, ahead.of[index]) },
            sample: site.sample.clone(),
            link: Link {
                missing: Some(missing + self.graph.jobs[job].source),
                backlog: None,
                bandwidth: site.bandwidth,
                round_trip: Some(site.spec.round_trip),
            },
            ..known
        }
    }
}

fn any_request() -> Request {
    Request {
        am_willing: false,
        system: "x86_64-linux".into(),
        drv_path: String::new(),
        required_features: BTreeSet::new(),
    }
}

/// What our rule chooses when nothing is measured.
#[cfg(test)]
pub(crate) fn unmeasured_choice(lines: &[Machine], taken: &[u64]) -> Option<usize> {
    let (rules, local, request, work) = (Rules::default(), Local::default(), any_request(), Work::default());
    let now = clock(0.0);
    let question = Question {
        machines: lines,
        rules: &rules,
        local: &local,
        here: None,
        request: &request,
        work: &work,
        now,
    };
    let decision = plan::decide(&question, |index| Known::ready(Load { taken: taken[index] }));
    match decision.verdict {
        Verdict::Accept(index) => Some(index),
        _ => None,
    }
}

/// An earlier build of a similar graph: most of its names occur again and take about as long.
pub(super) fn history(graph: &Graph, contender: Contender, seed: u64) -> Vec<Option<f64>> {
    let mut random = Random::new(seed ^ 0x0415);
    let mut about = |work: f64| random.chance(KNOWN_NAMES).then(|| random.log_normal(work, KNOWN_SIGMA));
    let known = graph.jobs.iter().map(|job| about(job.work));
    known.map(|known| known.filter(|_| contender == Contender::Experienced)).collect()
}

/// The chains that wait for each build. The graph is in the client's store; of the durations a hook knows its history.
pub(super) fn tails(history: &[Option<f64>], dependents: &[Vec<usize>]) -> Vec<Option<f64>> {
    let steps = history.iter().zip(dependents);
    let steps: Vec<Step> = steps
        .map(|(seconds, dependents)| Step { seconds: *seconds, dependents: dependents.clone() })
        .collect();
    let tails = chain::tails(&steps, Rules::default().typical_duration);
    tails.into_iter().map(Some).collect()
}
