//! The arithmetic, and choices that rest on it.

use super::*;
use crate::plan::estimate::slot_wait;
use crate::plan::known::Link;

/// An idle machine of 8 processors that lacks nothing.
pub(super) fn idle() -> Known {
    Known {
        sample: Some(Sample { cores: Some(8), load_average: Some(0.0), ..Sample::empty(NOW) }),
        link: Link { missing: Some(0), bandwidth: Some(1e6), ..Link::default() },
        ..busy(0)
    }
}

pub(super) fn with_sample(known: Known, change: impl FnOnce(&mut Sample)) -> Known {
    let mut sample = known.sample.clone().unwrap_or(Sample::empty(NOW));
    change(&mut sample);
    Known { sample: Some(sample), ..known }
}

fn with_link(known: Known, change: impl FnOnce(&mut Link)) -> Known {
    let mut link = known.link;
    change(&mut link);
    Known { link, ..known }
}

/// Decides with the settings and what is known of the build as given.
pub(super) fn decide_with(rules: &Rules, work: &Work, machines: &[Machine], known: &[Known]) -> Decision {
    let (local, request) = (Local::default(), request());
    let question = Question { machines, rules, local: &local, here: None, request: &request, work, now: NOW };
    decide(&question, |index| known[index].clone())
}

fn estimate_of(work: Work, known: &Known) -> Estimate {
    let machines = [machine("a", 4, 2.0)];
    let decision = decide_with(&Rules::default(), &work, &machines, std::slice::from_ref(known));
    decision.standings[0].estimate.clone().unwrap()
}

#[test]
fn an_estimate_is_the_sum_of_its_terms() {
    let work = Work { duration: Some(60.0), output: Some(3_000_000), ..Work::default() };
    let known = with_link(
        with_sample(Known { load: Load { taken: 3 }, ..idle() }, |sample| {
            sample.load_average = Some(15.0);
            sample.own_load = Some(3.0);
        }),
        |link| {
            link.missing = Some(4_000_000);
            link.backlog = Some(1_000_000);
            link.round_trip = Some(0.5);
        },
    );
    let estimate = estimate_of(work, &known);
    // 12 foreign tasks, 3 of ours and this one share 8 processors; speed factor 2.
    assert_eq!(estimate.terms.share, 0.5);
    assert_eq!((estimate.transfer, estimate.build, estimate.fetch), (5.5, 60.0, 3.0));
    assert_eq!(estimate.total, 68.5);
    let full = Known { load: Load { taken: 4 }, slot_wait: Some(7.0), ..known.clone() };
    assert_eq!(estimate_of(work, &full).wait, 7.0);
    assert_eq!(estimate_of(work, &Known { slot_wait: Some(7.0), ..known }).wait, 0.0);
}

#[test]
fn what_is_not_known_is_assumed_and_marked_so() {
    let unknown = estimate_of(Work::default(), &busy(1));
    assert_eq!(unknown.total, 15.0);
    let known = [unknown.terms.cores, unknown.terms.foreign, unknown.terms.missing, unknown.terms.duration]
        .map(|figure| figure.is_known);
    assert_eq!(known, [false; 4]);
    assert_eq!(unknown.terms.cores.value, 4.0);
    let old = with_sample(idle(), |sample| sample.load_average = Some(50.0));
    let later = NOW + Rules::default().stale_after + Duration::from_secs(1);
    let (rules, local, request, work) = (Rules::default(), Local::default(), request(), Work::default());
    let machines = [machine("a", 4, 2.0)];
    let question = Question {
        machines: &machines,
        rules: &rules,
        local: &local,
        here: None,
        request: &request,
        work: &work,
        now: later,
    };
    let estimate = decide(&question, |_| old.clone()).standings[0].estimate.clone().unwrap();
    assert!(!estimate.terms.foreign.is_known && estimate.terms.cores.is_known, "an old load is forgotten");
    assert_eq!(estimate.terms.share, 1.0);
}

#[test]
fn a_machine_whose_missing_bytes_are_unknown_is_not_taken_to_have_everything() {
    let machines = [machine("a", 4, 1.0), machine("b", 4, 1.0)];
    let rules = Rules { typical_bandwidth: 1e6, ..Rules::default() };
    let known = [busy(0), with_link(idle(), |link| link.missing = Some(1_000_000))];
    let decision = decide_with(&rules, &Work::default(), &machines, &known);
    let missing = |index: usize| decision.standings[index].estimate.as_ref().unwrap().terms.missing;
    assert_eq!((missing(0).value, missing(0).is_known), (1e6, false));
    assert_eq!(missing(1).value, 1e6);
}

#[test]
fn pressure_corrects_a_load_average_that_lags() {
    let share = |load: f64, pressure: Option<f64>| {
        let known = with_sample(idle(), |sample| {
            sample.load_average = Some(load);
            sample.cpu_pressure = pressure;
        });
        estimate_of(Work::default(), &known).terms.share
    };
    assert_eq!(share(31.0, None), 0.25);
    assert_eq!(share(31.0, Some(0.0)), 8.0 / 9.0, "nobody waits, so the load is over");
    assert_eq!(
        share(0.0, Some(100.0)),
        8.0 / 9.0,
        "everybody waits, so there is more than the average knows"
    );
    assert!(share(31.0, Some(50.0)) < share(31.0, Some(10.0)));
}

#[test]
fn own_builds_are_no_foreign_load() {
    let known = with_sample(busy(3), |sample| {
        sample.cores = Some(8);
        sample.load_average = Some(3.0);
    });
    assert_eq!(estimate_of(Work::default(), &known).terms.foreign.value, 0.0);
}

#[test]
fn a_chain_stays_where_its_inputs_are_until_that_costs_more_than_sending_them() {
    let machines = [machine("a", 8, 1.0), machine("b", 8, 1.0)];
    let without = with_link(idle(), |link| link.missing = Some(10_000_000));
    let pick = |load: f64| {
        let holder = with_sample(idle(), |sample| sample.load_average = Some(load));
        let work = Work { duration: Some(20.0), ..Work::default() };
        decide_with(&Rules::default(), &work, &machines, &[without.clone(), holder]).verdict
    };
    // Sending takes 10 s, the build 20 s on an idle machine.
    assert_eq!(pick(0.0), Verdict::Accept(1));
    assert_eq!(pick(10.0), Verdict::Accept(1));
    assert_eq!(pick(12.0), Verdict::Accept(0));
    let full = Known { load: Load { taken: 8 }, ..idle() };
    let decision = decide_with(&Rules::default(), &Work::default(), &machines, &[without, full]);
    assert_eq!(decision.verdict, Verdict::Accept(0), "no machine idles for its sake");
}

#[test]
fn a_fast_machine_is_filled_before_a_slow_one_gets_something() {
    let machines = [machine("slow", 8, 1.0), machine("fast", 8, 8.0)];
    let pick = |taken: u64| {
        let known = [idle(), Known { load: Load { taken }, ..idle() }];
        decide_with(&Rules::default(), &Work::default(), &machines, &known).verdict
    };
    assert_eq!(pick(7), Verdict::Accept(1));
    assert_eq!(pick(8), Verdict::Accept(0));
}

#[test]
fn a_build_is_held_back_for_a_machine_that_is_full_only_if_that_is_sooner_by_much_and_not_for_long() {
    let machines = [machine("slow", 8, 1.0), machine("fast", 8, 8.0)];
    let ask = |slot_wait: Option<f64>, waited: u64| {
        let now = NOW + Duration::from_secs(1000);
        let work = Work {
            duration: Some(80.0),
            waiting_since: Some(now - Duration::from_secs(waited)),
            ..Work::default()
        };
        let known = [idle(), Known { load: Load { taken: 8 }, slot_wait, ..idle() }];
        let (rules, local, request) = (Rules::default(), Local::default(), request());
        let machines = &machines;
        let question = Question {
            machines,
            rules: &rules,
            local: &local,
            here: None,
            request: &request,
            work: &work,
            now,
        };
        decide(&question, |index| known[index].clone())
    };
    let held = ask(Some(10.0), 0);
    assert_eq!((held.verdict.clone(), held.because), (Verdict::Wait(vec![1]), Because::HeldBack));
    assert_eq!(held.standings[0].refusal, Some(Refusal::HeldBack));
    assert_eq!(ask(None, 0).verdict, Verdict::Accept(0));
    assert_eq!(ask(Some(50.0), 0).verdict, Verdict::Accept(0), "60 s are not sooner by much than 80 s");
    let longest = Rules::default().hold_back.as_secs();
    assert_eq!(ask(Some(10.0), longest).verdict, Verdict::Accept(0), "it has waited long enough");
    assert_eq!(
        ask(Some(10.0), longest - 5).verdict,
        Verdict::Accept(0),
        "it would by then have waited for too long"
    );
    assert_eq!(ask(Some(10.0), longest - 15).verdict, Verdict::Wait(vec![1]));
}

#[test]
fn the_wait_for_a_slot_grows_with_those_who_wait_already() {
    assert_eq!(slot_wait(&[], 0, 9.0), None);
    assert_eq!(slot_wait(&[5.0, 3.0], 0, 9.0), Some(3.0));
    assert_eq!(slot_wait(&[5.0, 3.0], 1, 9.0), Some(5.0));
    assert_eq!(slot_wait(&[5.0, 3.0], 2, 9.0), Some(12.0));
    assert_eq!(slot_wait(&[-5.0], 0, 9.0), Some(0.0));
}
