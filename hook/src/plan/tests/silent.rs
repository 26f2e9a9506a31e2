//! Machines that are not known to answer.

use super::*;

fn here() -> Local {
    Local { max_jobs: 1, systems: set(&["x86_64-linux"]), features: BTreeSet::new() }
}

fn unasked() -> Known {
    busy(0).with_health(Health::Unasked)
}

/// What is decided after that many seconds of waiting.
fn after(waited: u64, am_willing: bool, local: &Local, known: &[Known]) -> Decision {
    ask(waited, 0, am_willing, local, known)
}

/// The same if the builds before it found nobody for that many seconds.
fn ask(waited: u64, silent: u64, am_willing: bool, local: &Local, known: &[Known]) -> Decision {
    let now = NOW + Duration::from_secs(1000);
    let before = |seconds| Some(now - Duration::from_secs(seconds));
    let machines: Vec<Machine> =
        (0..known.len()).map(|number| machine(&format!("m{number}"), 1, 1.0)).collect();
    let question = Question {
        machines: &machines,
        rules: &Rules::default(),
        local,
        here: None,
        request: &Request { am_willing, ..request() },
        work: &Work { waiting_since: before(waited), silent_since: before(silent), ..Work::default() },
        now,
    };
    decide(&question, |index| known[index].clone())
}

/// Its pause lasts a minute more.
fn paused(why: &str) -> Known {
    let until = Some(NOW + Duration::from_secs(1060));
    busy(0).with_health(Health::CoolDown { until, why: why.into() })
}

#[test]
fn machines_that_all_failed_are_asked_for_what_nix_cannot_build() {
    let all = [paused("no route"), paused("no answer")];
    let nowhere = Local::default();
    for am_willing in [false, true] {
        assert_eq!(after(0, am_willing, &nowhere, &all).verdict, Verdict::Accept(0));
    }
    let decision = after(0, true, &here(), &all);
    assert_eq!((&decision.verdict, decision.because), (&Verdict::Decline, Because::Silent));
    let left_alone: Vec<bool> =
        refusals(&decision).iter().map(|(_, why)| matches!(why, Refusal::CoolDown { .. })).collect();
    assert_eq!(left_alone, [true, true]);
}

#[test]
fn a_machine_whose_pause_is_over_is_asked_if_there_is_no_other_one() {
    for local in [here(), Local::default()] {
        let all = [paused("no route"), cooling("no answer")];
        let expected = if local.max_jobs > 0 { 1 } else { 0 };
        assert_eq!(after(0, true, &local, &all).verdict, Verdict::Accept(expected));
        assert_eq!(after(0, true, &local, &[cooling("no answer"), busy(0)]).verdict, Verdict::Accept(1));
    }
}

#[test]
fn what_nix_could_build_later_waits_until_a_failed_machine_can_have_been_tried_again() {
    for all in [[paused("no route"), paused("no answer")], [unasked(), unasked()]] {
        let at = |waited| after(waited, false, &here(), &all);
        assert_eq!((at(0).verdict, at(0).because), (Verdict::Postpone(vec![0, 1]), Because::Silent));
        assert_eq!(at(19).verdict, Verdict::Postpone(vec![0, 1]));
        assert_eq!((at(20).verdict, at(20).because), (Verdict::Decline, Because::Silent));
        // Those that follow do not wait for as long once more.
        assert_eq!(ask(0, 20, false, &here(), &all).verdict, Verdict::Decline);
        let (began, later) = (NOW, at(0));
        assert_eq!(later.silent_since(None), Some(later.at));
        assert_eq!(later.silent_since(Some(began)), Some(began));
        assert_eq!(after(0, false, &here(), &[busy(1)]).silent_since(Some(began)), None);
    }
}

#[test]
fn what_is_not_to_be_asked_gets_nothing_but_is_worth_waiting_for() {
    let nowhere = Local::default();
    let alone = after(1000, false, &nowhere, &[unasked(), cooling("no route")]);
    assert_eq!((alone.verdict.clone(), alone.because), (Verdict::Postpone(vec![0, 1]), Because::Silent));
    assert_eq!(refusals(&alone)[0], (0, Refusal::Unasked));
    assert_eq!(after(0, true, &here(), &[unasked()]).verdict, Verdict::Decline);
    let beside = |other: Known| after(0, false, &nowhere, &[unasked(), other]);
    assert_eq!(beside(busy(0)).verdict, Verdict::Accept(1));
    let full = beside(busy(1));
    assert_eq!((full.verdict, full.because), (Verdict::Wait(vec![0, 1]), Because::Full));
    // A machine without slots is nobody.
    let nobody = [Machine { max_jobs: 0, ..machine("a", 0, 1.0) }];
    let decision = decided(&nobody, &nowhere, &request(), |_| unasked());
    assert_eq!((decision.verdict, decision.because), (Verdict::Decline, Because::NothingFits));
}
