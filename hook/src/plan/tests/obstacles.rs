//! Machines that are out of service or short of something, builds of more than one slot, and the client's own machine.

use super::estimating::{decide_with, idle, with_sample};
use super::*;
use crate::plan::known::{Withheld, Withholding};

fn seconds(seconds: u64) -> SystemTime {
    NOW + Duration::from_secs(seconds)
}

fn here(max_jobs: u64) -> Local {
    Local { max_jobs, systems: set(&["x86_64-linux"]), features: set(&["big-parallel"]) }
}

#[test]
fn a_machine_that_is_short_of_something_gets_nothing_even_if_it_is_the_only_one() {
    let machines = [machine("a", 1, 1.0)];
    type Change = fn(&mut Sample);
    let short: [(Change, Resource); 3] = [
        (|sample| sample.disk_free = Some(1 << 20), Resource::Disk),
        (|sample| sample.inodes_free = Some(9), Resource::Inodes),
        (|sample| sample.memory_free = Some(1 << 20), Resource::Memory),
    ];
    for (change, what) in short {
        let known = [with_sample(idle(), change)];
        let decision = decide_with(&Rules::default(), &Work::default(), &machines, &known);
        assert_eq!((decision.verdict, decision.because), (Verdict::Postpone(vec![0]), Because::Obstacles));
        assert!(
            matches!(decision.standings[0].refusal, Some(Refusal::Short { of, .. }) if of == what),
            "{what}"
        );
    }
    let enough = with_sample(idle(), |sample| {
        sample.disk_free = Some(1 << 40);
        sample.inodes_free = Some(1 << 20);
        sample.memory_free = Some(1 << 30);
    });
    let decision = decide_with(&Rules::default(), &Work::default(), &machines, &[enough]);
    assert_eq!(decision.verdict, Verdict::Accept(0));
}

#[test]
fn a_machine_that_was_short_of_something_is_asked_before_it_gets_a_build_again() {
    let machines = [machine("a", 1, 1.0)];
    let at = NOW - Duration::from_secs(3600);
    let short = |sample: &mut Sample| (sample.at, sample.disk_free) = (at, Some(1 << 20));
    let decide = |rules: &Rules, known: Known| decide_with(rules, &Work::default(), &machines, &[known]);
    let rules = Rules::default();
    let recalled = decide(&rules, with_sample(idle(), short));
    assert_eq!((&recalled.verdict, recalled.because), (&Verdict::Postpone(vec![0]), Because::Obstacles));
    let said =
        "short of disk: 1.0 MiB left, the minimum is 1.0 GiB; that was 60 min ago, it is to be asked again";
    assert_eq!(recalled.standings[0].refusal.as_ref().unwrap().describe(NOW), said);
    let fresh = decide(&rules, with_sample(idle(), |sample| sample.disk_free = Some(1 << 20)));
    let gist = |decision: &Decision| crate::plan::telling::gist(decision, &request());
    assert_eq!(gist(&recalled), gist(&fresh), "nobody is told twice");
    let inhibited = |sample: &mut Sample| (sample.at, sample.inhibited) = (at, Some("a talk".into()));
    assert!(matches!(
        refusals(&decide(&rules, with_sample(idle(), inhibited)))[0].1,
        Refusal::Recalled { .. }
    ));
    // What was good then is no reason to ask, and nobody asks where that is set.
    let stale = with_sample(idle(), |sample| (sample.at, sample.disk_free) = (at, Some(1 << 40)));
    assert_eq!(decide(&rules, stale).verdict, Verdict::Accept(0));
    let never = Rules { looks_again: false, ..Rules::default() };
    assert_eq!(decide(&never, with_sample(idle(), short)).verdict, Verdict::Accept(0));
}

#[test]
fn the_machines_owner_has_the_last_word() {
    let machines = [machine("a", 1, 1.0), machine("b", 1, 1.0)];
    let inhibited = with_sample(idle(), |sample| sample.inhibited = Some("a talk".into()));
    let decision = decide_with(&Rules::default(), &Work::default(), &machines, &[inhibited, idle()]);
    assert_eq!(decision.verdict, Verdict::Accept(1));
    assert_eq!(refusals(&decision), [(0, Refusal::Inhibited("a talk".into()))]);
}

/// What is decided of a machine with an inhibit file about a build that has waited since 0, and was kept from all machines
/// since then.
fn ask_inhibited(now: u64, obstructed: Option<u64>, am_willing: bool, local: &Local) -> Decision {
    let machines = [machine("a", 1, 1.0)];
    let inhibited = with_sample(idle(), |sample| sample.inhibited = Some(String::new()));
    let (waiting_since, obstructed_since) = (Some(seconds(0)), obstructed.map(seconds));
    let work = Work { waiting_since, obstructed_since, ..Work::default() };
    let request = Request { am_willing, ..request() };
    let now = seconds(now);
    let question = Question {
        machines: &machines,
        rules: &Rules::default(),
        local,
        here: None,
        request: &request,
        work: &work,
        now,
    };
    decide(&question, |_| Known {
        sample: inhibited.sample.clone().map(|s| Sample { at: now, ..s }),
        ..idle()
    })
}

#[test]
fn obstacles_are_waited_for_with_a_bound_and_not_where_it_can_be_built_here() {
    let patience = Rules::default().obstacle_patience.as_secs();
    let nowhere = Local::default();
    assert_eq!(ask_inhibited(0, None, false, &nowhere).verdict, Verdict::Postpone(vec![0]));
    let late = ask_inhibited(patience, Some(0), false, &nowhere);
    assert_eq!((late.verdict, late.because), (Verdict::Decline, Because::ObstaclesTooLong));
    assert_eq!(ask_inhibited(0, None, false, &here(1)).verdict, Verdict::Decline);
    assert_eq!(ask_inhibited(0, None, true, &here(1)).because, Because::LocalFree);
}

#[test]
fn patience_with_obstacles_begins_with_them_and_not_with_the_wait_for_a_slot() {
    let patience = Rules::default().obstacle_patience.as_secs();
    let nowhere = Local::default();
    // It has been in a queue for an hour.
    let first = ask_inhibited(3600, None, false, &nowhere);
    assert_eq!((first.because, first.obstructed_since(None)), (Because::Obstacles, Some(seconds(3600))));
    let still = ask_inhibited(3600 + patience - 1, Some(3600), false, &nowhere);
    assert_eq!(
        (still.because, still.obstructed_since(Some(seconds(3600)))),
        (Because::Obstacles, Some(seconds(3600)))
    );
    let late = ask_inhibited(3600 + patience, Some(3600), false, &nowhere);
    assert_eq!(late.because, Because::ObstaclesTooLong);
    assert_eq!(late.obstructed_since(Some(seconds(3600))), Some(seconds(3600)));
    // They are gone.
    let accepted = decide_with(&Rules::default(), &Work::default(), &[machine("a", 1, 1.0)], &[idle()]);
    assert_eq!(accepted.obstructed_since(Some(seconds(0))), None);
}

#[test]
fn a_client_without_a_network_postpones_what_it_cannot_build_itself() {
    let machines = [machine("a", 1, 1.0), machine("b", 1, 1.0)];
    let cut_off = || busy(0).with_health(Health::CutOff);
    let ask = |local: &Local, known: [Known; 2]| {
        decided(&machines, local, &request(), |index| known[index].clone())
    };
    let alone = ask(&Local::default(), [cut_off(), cut_off()]);
    assert_eq!((alone.verdict.clone(), alone.because), (Verdict::Postpone(vec![0, 1]), Because::Obstacles));
    assert_eq!(refusals(&alone), [(0, Refusal::CutOff), (1, Refusal::CutOff)]);
    assert_eq!(ask(&here(1), [cut_off(), cut_off()]).verdict, Verdict::Decline);
    assert_eq!(ask(&Local::default(), [cut_off(), busy(0)]).verdict, Verdict::Accept(1));
}

#[test]
fn a_machine_out_of_service_gets_nothing_until_that_is_over() {
    let machines = [machine("a", 1, 1.0)];
    let withheld =
        |how, until| Known { withheld: Some(Withheld { how, until, why: "disk swap".into() }), ..busy(0) };
    let ask = |how, until| {
        decide_with(&Rules::default(), &Work::default(), &machines, &[withheld(how, until)]).verdict
    };
    for until in [None, Some(seconds(1))] {
        assert_eq!(ask(Withholding::Drained, until), Verdict::Postpone(vec![0]));
        assert_eq!(ask(Withholding::Disabled, until), Verdict::Decline, "it is not waited for");
    }
    for how in [Withholding::Drained, Withholding::Disabled] {
        assert_eq!(ask(how, Some(NOW)), Verdict::Accept(0));
    }
}

#[test]
fn a_cool_down_that_is_over_counts_no_more() {
    let machines = [machine("a", 1, 2.0), machine("b", 1, 1.0)];
    let ask = |until| {
        let cooling = busy(0).with_health(Health::CoolDown { until: Some(until), why: "no route".into() });
        decide_with(&Rules::default(), &Work::default(), &machines, &[cooling, busy(0)]).verdict
    };
    assert_eq!(ask(seconds(1)), Verdict::Accept(1));
    assert_eq!(ask(NOW), Verdict::Accept(0));
}

#[test]
fn a_cool_down_is_ignored_when_every_other_machine_is_out_of_service() {
    let machines = [machine("a", 1, 1.0), machine("b", 1, 1.0)];
    let drained = Known {
        withheld: Some(Withheld { how: Withholding::Disabled, until: None, why: String::new() }),
        ..busy(0)
    };
    let decision =
        decide_with(&Rules::default(), &Work::default(), &machines, &[cooling("no route"), drained]);
    assert_eq!(decision.verdict, Verdict::Accept(0));
}

#[test]
fn what_is_big_takes_several_slots_and_after_some_time_what_there_is() {
    let machines = [machine("a", 8, 1.0), machine("small", 2, 1.0)];
    let machines = machines.map(|m| Machine { supported_features: set(&["big-parallel"]), ..m });
    let rules = Rules { big_parallel_slots: 4, ..Rules::default() };
    let request = Request { required_features: set(&["big-parallel"]), ..request() };
    let ask = |taken: [u64; 2], waited: u64| {
        let work = Work { waiting_since: Some(seconds(0)), ..Work::default() };
        let (local, now) = (Local::default(), seconds(waited));
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
        let decision = decide(&question, |index| busy(taken[index]));
        (decision.verdict.clone(), decision.slots)
    };
    assert_eq!(ask([4, 2], 0), (Verdict::Accept(0), 4));
    assert_eq!(ask([5, 2], 0).0, Verdict::Wait(vec![0, 1]));
    assert_eq!(ask([5, 2], rules.hold_back.as_secs()), (Verdict::Accept(0), 3));
    assert_eq!(ask([8, 0], 0), (Verdict::Accept(1), 2), "a machine gives all it has");
    assert_eq!(ask([8, 2], rules.hold_back.as_secs()).0, Verdict::Wait(vec![0, 1]));
}

#[test]
fn what_nix_does_itself_is_sent_away_only_where_nothing_else_can_do_it() {
    let machines = [machine("a", 1, 1.0)];
    let builtin = |am_willing| Request { am_willing, system: "builtin".into(), ..request() };
    let decision = decided(&machines, &here(1), &builtin(false), |_| busy(0));
    assert_eq!((decision.verdict, decision.because), (Verdict::Decline, Because::Builtin));
    assert_eq!(decided(&machines, &here(0), &builtin(false), |_| busy(0)).verdict, Verdict::Accept(0));
}

#[test]
fn policies_say_what_this_machine_is_used_for() {
    let machines = [machine("a", 4, 2.0)];
    let ask = |policy, local_speed_factor, am_willing, known: &Known| {
        let rules = Rules { policy, local_speed_factor, ..Rules::default() };
        let (local, work, request) = (here(4), Work::default(), Request { am_willing, ..request() });
        let machines = &machines;
        let question = Question {
            machines,
            rules: &rules,
            local: &local,
            here: None,
            request: &request,
            work: &work,
            now: NOW,
        };
        decide(&question, |_| known.clone()).because
    };
    assert_eq!(ask(Policy::RemoteFirst, 9.0, true, &busy(0)), Because::Best);
    assert_eq!(ask(Policy::LocalFirst, 1.0, true, &busy(0)), Because::LocalFirst);
    assert_eq!(ask(Policy::LocalFirst, 1.0, false, &busy(0)), Because::Best, "no slot is free here");
    assert_eq!(ask(Policy::Cost, 3.0, true, &busy(0)), Because::LocalSooner);
    assert_eq!(ask(Policy::Cost, 2.0, true, &busy(0)), Because::Best, "the same is not sooner");
    assert_eq!(ask(Policy::Cost, 3.0, false, &busy(0)), Because::Best);
    let loaded = with_sample(idle(), |sample| sample.load_average = Some(31.0));
    assert_eq!(ask(Policy::Cost, 1.0, true, &loaded), Because::LocalSooner);
}

#[test]
fn a_cool_down_is_ignored_when_every_other_machine_has_no_slots() {
    for first_is_cooling in [true, false] {
        let slots = if first_is_cooling { [1, 0] } else { [0, 1] };
        let machines = [machine("a", slots[0], 1.0), machine("b", slots[1], 1.0)];
        let known = if first_is_cooling { [cooling("x"), busy(0)] } else { [busy(0), cooling("x")] };
        let decision = decide_with(&Rules::default(), &Work::default(), &machines, &known);
        assert_eq!(decision.verdict, Verdict::Accept(usize::from(!first_is_cooling)));
    }
}
