//! What no schedule can beat, and what a schedule that knows everything reaches.

use crate::fleet::Spec;
use crate::graph::Graph;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Seconds that no schedule can be below: the longest chain on the fastest machine, and all work on all machines without a
/// pause, as far as their foreign load leaves something of them and they are not dead. Transfers are left out of account.
pub(crate) fn lower(graph: &Graph, fleet: &[Spec]) -> f64 {
    let speed = |spec: &Spec| f64::from(spec.line.speed_factor);
    let fastest = fleet.iter().map(speed).fold(0.0, f64::max);
    let chain = ranks(graph).into_iter().fold(0.0, f64::max) / fastest;
    let work: f64 = graph.jobs.iter().map(|job| job.work).sum();
    let tasks: f64 = graph.jobs.iter().map(|job| job.work * f64::from(job.threads)).sum();
    let slots = |spec: &Spec| spec.line.max_jobs as f64;
    let most_threads = graph.jobs.iter().map(|job| job.threads).max().map_or(1.0, f64::from);
    chain
        .max(time_for(work, fleet, |spec, foreign| {
            slots(spec) * speed(spec) * (spec.cores / (foreign + slots(spec))).min(1.0)
        }))
        .max(time_for(tasks, fleet, |spec, foreign| {
            let tasks = slots(spec) * most_threads;
            tasks * speed(spec) * (spec.cores / (foreign + tasks)).min(1.0)
        }))
}

/// Seconds until the fleet has done that work, if `rate` is what each machine does per second beside that many foreign tasks.
fn time_for(work: f64, fleet: &[Spec], rate: impl Fn(&Spec, f64) -> f64) -> f64 {
    let events = fleet.iter().flat_map(|spec| {
        let outages = spec.outages.iter().flat_map(|(from, to)| [*from, *to]);
        spec.foreign.iter().map(|(at, _)| *at).chain(outages)
    });
    let mut events: Vec<f64> = events.chain([f64::INFINITY]).collect();
    events.sort_by(f64::total_cmp);
    let (mut now, mut left) = (0.0, work);
    for next in events {
        let all: f64 = fleet
            .iter()
            .filter(|spec| !spec.outages.iter().any(|(from, to)| (*from..*to).contains(&now)))
            .map(|spec| rate(spec, foreign_at(spec, now)))
            .sum();
        if left <= all * (next - now) {
            return now + left / all;
        }
        left -= all * (next - now);
        now = next;
    }
    now
}

/// Tasks of others at that time.
pub(crate) fn foreign_at(spec: &Spec, time: f64) -> f64 {
    spec.foreign.iter().take_while(|(at, _)| *at <= time).last().map_or(0.0, |(_, tasks)| *tasks)
}

/// For each build the seconds from its begin to the end of the longest chain behind it, at speed 1.
fn ranks(graph: &Graph) -> Vec<f64> {
    let mut behind = vec![0.0; graph.jobs.len()];
    let mut ranks = vec![0.0; graph.jobs.len()];
    for (index, job) in graph.jobs.iter().enumerate().rev() {
        ranks[index] = job.work + behind[index];
        for need in &job.needs {
            behind[*need] = f64::max(behind[*need], ranks[index]);
        }
    }
    ranks
}

/// Seconds of a list schedule on equal machines of speed 1: whenever a slot is free, the build with the longest chain
/// behind it begins. It knows all durations, and nothing has to travel. Builds of several threads share processors as in
/// the simulated world only through the bound of [`lower`].
pub(crate) fn list_schedule(graph: &Graph, fleet: &[Spec]) -> f64 {
    let slots: u64 = fleet.iter().map(|spec| spec.line.max_jobs).sum();
    let ranks = ranks(graph);
    let mut unmet: Vec<usize> = graph.jobs.iter().map(|job| job.needs.len()).collect();
    let mut dependents = vec![Vec::new(); graph.jobs.len()];
    for (index, job) in graph.jobs.iter().enumerate() {
        job.needs.iter().for_each(|need| dependents[*need].push(index));
    }
    // Both sorted by the bits of numbers that are not negative, which is their own order.
    let mut ready: BinaryHeap<(u64, Reverse<usize>)> = (0..graph.jobs.len())
        .filter(|index| unmet[*index] == 0)
        .map(|index| (ranks[index].to_bits(), Reverse(index)))
        .collect();
    let mut running: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut now = 0.0_f64;
    loop {
        while (running.len() as u64) < slots {
            let Some((_, Reverse(index))) = ready.pop() else { break };
            running.push(Reverse(((now + graph.jobs[index].work).to_bits(), index)));
        }
        let Some(Reverse((end, index))) = running.pop() else { break };
        now = f64::from_bits(end);
        for dependent in &dependents[index] {
            unmet[*dependent] -= 1;
            if unmet[*dependent] == 0 {
                ready.push((ranks[*dependent].to_bits(), Reverse(*dependent)));
            }
        }
    }
    now.max(lower(graph, fleet))
}
