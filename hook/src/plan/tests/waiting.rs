//! Who waits for whom: chains, turns, and builds that begin anew on a faster machine.

use super::estimating::{decide_with, idle, with_sample};
use super::*;
use crate::plan::chain::{Step, tails};
use crate::plan::moving::{Running, is_worth_a_look, rivals, worth_moving};
use crate::plan::turn::{LONGEST_HEAD_START, ticket};
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;

fn step(seconds: Option<f64>, dependents: &[usize]) -> Step {
    Step { seconds, dependents: dependents.to_vec() }
}

fn at(seconds: u64) -> SystemTime {
    NOW + Duration::from_secs(seconds)
}

#[test]
fn a_tail_is_the_longest_chain_that_waits() {
    let steps = [step(Some(5.0), &[1, 2]), step(Some(10.0), &[3]), step(None, &[3]), step(Some(3.0), &[])];
    // What is not known counts as the mean of the others, 6 s.
    assert_eq!(tails(&steps, 30.0), [18.0, 13.0, 9.0, 3.0]);
    let unknown = steps.map(|step| Step { seconds: None, ..step });
    assert_eq!(tails(&unknown, 30.0), [90.0, 60.0, 60.0, 30.0]);
    let nonsense = [step(Some(f64::NAN), &[1, 7]), step(Some(-1.0), &[0])];
    assert_eq!(tails(&nonsense, 2.0).len(), 2, "a circle comes to an end");
    assert_eq!(tails(&[], 30.0), [0.0; 0]);
}

#[test]
fn a_chain_of_a_hundred_thousand_needs_no_stack() {
    let steps: Vec<Step> = (0..100_000).map(|index| step(None, &[index + 1])).collect();
    assert_eq!(tails(&steps, 1.0)[0], 100_000.0);
}

#[test]
fn the_longer_chain_goes_first_but_not_before_everybody() {
    let first = ticket(at(100), Some(30.0));
    assert!(ticket(at(101), Some(300.0)) < first);
    assert!(ticket(at(100_000), Some(1e9)) > first, "it came too late");
    assert_eq!(ticket(at(7), None), at(7));
    assert_eq!(ticket(at(700), Some(30.0)), at(550));
}

proptest! {
    #[test]
    fn nobody_is_overtaken_by_those_who_come_much_later(
        one in (0_u64..100_000, of(-10.0_f64..1e7)), other in (0_u64..100_000, of(-10.0_f64..1e7)),
        nonsense in prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(-f64::INFINITY)],
    ) {
        let of = |(since, tail): (u64, Option<f64>)| ticket(at(since), tail);
        if of(other) < of(one) {
            prop_assert!(at(other.0) <= at(one.0) + LONGEST_HEAD_START);
            prop_assert!(other.1.is_some_and(|tail| tail > 0.0) || other.0 < one.0);
        }
        let odd = of((one.0, Some(nonsense)));
        prop_assert!(odd <= at(one.0) && odd + LONGEST_HEAD_START >= at(one.0));
    }

    #[test]
    fn a_tail_is_never_shorter_than_those_behind_it(
        seconds in vec(of(0.0_f64..1e4), 1..30), edges in vec((0_usize..30, 0_usize..30), 0..60),
    ) {
        let count = seconds.len();
        let mut steps: Vec<Step> = seconds.iter().map(|seconds| step(*seconds, &[])).collect();
        for (from, to) in edges.into_iter().filter(|(from, to)| from < to && *to < count) {
            steps[from].dependents.push(to);
        }
        let tails = tails(&steps, 30.0);
        for (step, tail) in steps.iter().zip(&tails) {
            prop_assert!(*tail >= step.seconds.unwrap_or(0.0));
            prop_assert!(step.dependents.iter().all(|behind| *tail >= tails[*behind]));
        }
    }
}

#[test]
fn only_machines_that_could_do_it_are_rivals_and_without_samples_only_much_faster_ones() {
    let other = Machine { systems: set(&["aarch64-linux"]), ..machine("other", 1, 9.0) };
    let machines = [
        machine("slow", 1, 1.0),
        machine("like", 1, 1.4),
        machine("fast", 1, 1.5),
        machine("none", 0, 9.0),
        other,
        machine("https://x", 1, 9.0),
        machine("ssh://y", 1, 9.0),
    ];
    let request = request();
    let of = |on, is_measured| rivals(&machines, &request, on, is_measured).collect::<Vec<_>>();
    assert_eq!(
        [of(0, false), of(2, false), of(6, false), of(7, false)],
        [vec![2, 6], vec![6], vec![], vec![]]
    );
    assert_eq!([of(0, true), of(6, true), of(7, true)], [vec![1, 2, 6], vec![0, 1, 2], vec![]]);
}

/// A machine of 8 processors with that many tasks, of which as many are this client's as it has slots taken.
fn busy(tasks: f64, taken: u64) -> Known {
    with_sample(Known { load: Load { taken }, ..idle() }, |sample| {
        sample.cores = Some(8);
        sample.load_average = Some(tasks);
        sample.own_load = Some(taken as f64);
    })
}

#[test]
fn a_build_that_goes_on_for_long_begins_anew_where_that_is_sooner() {
    let machines = [machine("slow", 8, 1.0), machine("fast", 8, 8.0), machine("same", 8, 1.0)];
    let running = Running { on: 0, elapsed: 600.0, was_moved: false };
    let with = |work: Work, fast: Known, running: Running| {
        let known = [Known { load: Load { taken: 1 }, ..idle() }, fast, idle()];
        worth_moving(&machines, &decide_with(&Rules::default(), &work, &machines, &known), &running)
    };
    let unknown = || Work::default();
    let better = with(unknown(), idle(), running).unwrap();
    // It has done 600 s and is expected to go on for 600 more; all 1200 take an eighth there.
    assert_eq!((better.to, better.stay.round(), better.go, better.is_known), (1, 600.0, 150.0, true));
    let known = Work { duration: Some(610.0), ..Work::default() };
    assert_eq!(with(known, idle(), running), Some(better), "what was known was wrong");
    let known = Work { duration: Some(6000.0), ..Work::default() };
    assert_eq!(with(known, idle(), running).unwrap().stay.round(), 5400.0);
    assert_eq!(with(unknown(), idle(), Running { was_moved: true, ..running }), None);
    assert_eq!(with(unknown(), idle(), Running { elapsed: 10.0, ..running }), None);
    assert_eq!(with(unknown(), idle(), Running { elapsed: f64::NAN, ..running }), None);
    let full = Known { load: Load { taken: 8 }, ..idle() };
    assert_eq!(with(unknown(), full, running), None, "there is no slot");
    // Of 8 processors and 79 tasks a build has a ninth.
    assert_eq!(with(unknown(), busy(79.0, 0), running), None, "it is as slow there");
}

#[test]
fn a_build_begins_anew_where_nobody_else_is_but_does_not_flee_from_itself() {
    let machines = ["crowded", "idle"].map(|name| machine(name, 8, 1.0));
    let running = Running { on: 0, elapsed: 600.0, was_moved: false };
    let rules = Rules::default();
    let moves = |here: &Known, there: Known, duration: Option<f64>| {
        let work = Work { duration, ..Work::default() };
        let decision = decide_with(&rules, &work, &machines, &[here.clone(), there]);
        let is_worth_a_look =
            is_worth_a_look(&machines, &request(), 0, here.sample.as_ref(), &rules, decision.at);
        let worth = worth_moving(&machines, &decision, &running);
        assert!(is_worth_a_look || worth.is_none());
        (is_worth_a_look, worth)
    };
    // 39 tasks, of which eight may be its own: it has a quarter of a processor, has done 150 s of 300, and needs 600 more.
    let crowded = || busy(39.0, 1);
    let (_, better) = moves(&crowded(), busy(0.0, 0), None);
    let better = better.unwrap();
    assert_eq!((better.to, better.stay, better.go, better.is_known), (1, 600.0, 300.0, true));
    // Of 30 tasks it is not certain enough, unless it has only just begun.
    assert_eq!(moves(&busy(30.0, 1), busy(0.0, 0), None), (true, None));
    assert_eq!(moves(&busy(23.0, 1), busy(0.0, 0), Some(9000.0)).1.map(|better| better.to), Some(1));
    // Ten tasks are one build with two too many.
    assert_eq!(moves(&busy(10.0, 1), busy(0.0, 0), Some(9000.0)), (false, None));
    assert_eq!(moves(&crowded(), busy(20.0, 0), None).1, None, "others are there too");
    // Many builds of ours that wait for something are no crowd.
    assert_eq!(moves(&busy(0.5, 8), busy(0.0, 0), Some(9000.0)), (false, None));
    let unknown = moves(&crowded(), Known { sample: None, ..idle() }, None).1.unwrap();
    assert!(!unknown.is_known, "nobody knows who is there");
    let was_long_ago = with_sample(crowded(), |sample| sample.at = NOW - Duration::from_secs(61));
    assert_eq!(moves(&was_long_ago, busy(0.0, 0), None), (false, None));
}
