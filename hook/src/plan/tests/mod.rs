use super::*;

mod estimating;
mod obstacles;
mod properties;
mod silent;
mod telling;
mod waiting;

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn machine(name: &str, jobs: u64, speed: f32) -> Machine {
    Machine {
        max_jobs: jobs,
        speed_factor: speed,
        ..Machine::for_uri(name, ["x86_64-linux".to_owned()].into()).unwrap()
    }
}

fn request() -> Request {
    Request {
        am_willing: false,
        system: "x86_64-linux".into(),
        drv_path: "/nix/store/x.drv".into(),
        required_features: BTreeSet::new(),
    }
}

fn set(words: &[&str]) -> BTreeSet<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

/// Decides at a fixed time with all settings left to their defaults.
fn decided(
    machines: &[Machine],
    local: &Local,
    request: &Request,
    known: impl FnMut(usize) -> Known,
) -> Decision {
    let (rules, work) = (Rules::default(), Work::default());
    decide(&Question { machines, rules: &rules, local, here: None, request, work: &work, now: NOW }, known)
}

fn with_loads(machines: &[Machine], request: &Request, loads: &[u64]) -> Decision {
    decided(machines, &Local::default(), request, |i| busy(loads[i]))
}

fn busy(taken: u64) -> Known {
    Known::ready(Load { taken })
}

fn failed(why: &str) -> Known {
    busy(0).with_health(Health::Failed(why.into()))
}

fn cooling(why: &str) -> Known {
    busy(0).with_health(Health::CoolDown { until: None, why: why.into() })
}

fn refusals(decision: &Decision) -> Vec<(usize, Refusal)> {
    decision.refusals().map(|(index, refusal)| (index, refusal.clone())).collect()
}

fn full(slots: u64) -> Refusal {
    Refusal::Full { taken: slots, slots, needed: 1, waiting: 0 }
}

#[test]
fn a_machine_of_another_system_is_refused_for_its_system() {
    let mut m = machine("a", 1, 1.0);
    m.systems = set(&["aarch64-linux"]);
    let d = with_loads(&[m], &request(), &[0]);
    assert_eq!((d.verdict.clone(), refusals(&d)), (Verdict::Decline, vec![(0, Refusal::System)]));
}

#[test]
fn what_others_wait_for_is_not_free_to_who_comes_later() {
    let machines = [machine("a", 4, 9.0), machine("b", 4, 1.0)];
    let known = |waiting: [u64; 2]| move |i: usize| Known { waiting: waiting[i], ..busy(2) };
    let decision = decided(&machines, &Local::default(), &request(), known([3, 0]));
    assert_eq!(decision.verdict, Verdict::Accept(1));
    let refusal = decision.standings[0].refusal.as_ref().unwrap();
    assert_eq!(refusal.describe(NOW), "full: 2 of 4 slots taken, and 3 builds wait for one");
    // It stands behind them, or is built here.
    let decision = decided(&machines, &Local::default(), &request(), known([3, 1]));
    assert_eq!((decision.verdict, decision.because), (Verdict::Wait(vec![0, 1]), Because::Full));
    let local = Local { max_jobs: 1, systems: set(&["x86_64-linux"]), features: set(&[]) };
    let willing = Request { am_willing: true, ..request() };
    let decision = decided(&machines, &local, &willing, known([3, 1]));
    assert_eq!((decision.verdict, decision.because), (Verdict::Decline, Because::LocalFree));
}

#[test]
fn builtin_suits_any_machine() {
    let mut m = machine("a", 1, 1.0);
    m.systems = set(&["aarch64-linux"]);
    let d = with_loads(&[m], &Request { system: "builtin".into(), ..request() }, &[0]);
    assert_eq!(d.verdict, Verdict::Accept(0));
}

#[test]
fn features_must_be_supported_and_mandatory_ones_required() {
    let mut plain = machine("plain", 1, 1.0);
    plain.supported_features = set(&["kvm"]);
    let mut strict = machine("strict", 1, 1.0);
    strict.supported_features = set(&["kvm"]);
    strict.mandatory_features = set(&["benchmark"]);
    let machines = [plain, strict];
    let ask = |features: &[&str]| {
        with_loads(&machines, &Request { required_features: set(features), ..request() }, &[0, 0])
    };
    let none = ask(&[]);
    assert_eq!(none.verdict, Verdict::Accept(0));
    assert_eq!(refusals(&none), [(1, Refusal::MandatoryFeatures(set(&["benchmark"])))]);
    let benchmark = ask(&["benchmark"]);
    assert_eq!(benchmark.verdict, Verdict::Accept(1));
    assert_eq!(refusals(&benchmark), [(0, Refusal::MissingFeatures(set(&["benchmark"])))]);
    assert_eq!(ask(&["benchmark", "kvm"]).verdict, Verdict::Accept(1));
    assert_eq!(ask(&["cuda"]).verdict, Verdict::Decline);
}

#[test]
fn the_lower_load_for_its_speed_wins_then_speed_then_load_then_place() {
    let pick = |a: (u64, f32), b: (u64, f32)| {
        let machines = [machine("a", 99, a.1), machine("b", 99, b.1)];
        with_loads(&machines, &request(), &[a.0, b.0]).verdict
    };
    assert_eq!(pick((2, 1.0), (3, 2.0)), Verdict::Accept(1));
    assert_eq!(pick((1, 1.0), (3, 2.0)), Verdict::Accept(0));
    assert_eq!(pick((0, 1.0), (0, 2.0)), Verdict::Accept(1));
    assert_eq!(pick((1, 1.0), (2, 2.0)), Verdict::Accept(1));
    assert_eq!(pick((0, 1.0), (0, 1.0)), Verdict::Accept(0));
    assert_eq!(pick((0, 1.5), (0, 1.25)), Verdict::Accept(0));
}

#[test]
fn the_leader_that_is_overtaken_is_reported_as_outranked() {
    let machines = [machine("a", 9, 1.0), machine("b", 9, 2.0)];
    let d = with_loads(&machines, &request(), &[0, 0]);
    assert_eq!(d.verdict, Verdict::Accept(1));
    assert_eq!(refusals(&d), [(0, Refusal::Outranked { by: 1, later: None })]);
}

#[test]
fn full_machines_postpone_unless_a_local_build_can_start_now() {
    let machines = [machine("a", 2, 1.0)];
    let local = Local { max_jobs: 1, systems: set(&["x86_64-linux"]), features: BTreeSet::new() };
    let ask = |am_willing, local: &Local| {
        decided(&machines, local, &Request { am_willing, ..request() }, |_| busy(2))
    };
    assert_eq!(ask(false, &local).verdict, Verdict::Postpone(vec![0]));
    assert_eq!(ask(true, &local).verdict, Verdict::Decline);
    assert_eq!(ask(true, &Local::default()).verdict, Verdict::Wait(vec![0]));
    assert_eq!(ask(false, &Local::default()).verdict, Verdict::Wait(vec![0]));
    assert_eq!(refusals(&ask(false, &local)), [(0, full(2))]);
}

#[test]
fn failed_and_unreachable_machines_are_left_out_with_their_reason() {
    let machines = [machine("a", 1, 1.0), machine("b", 1, 1.0), machine("c", 1, 1.0)];
    let d = decided(&machines, &Local::default(), &request(), |i| match i {
        0 => failed("no route"),
        1 => busy(0).with_health(Health::Unreachable("file://".into())),
        _ => busy(0),
    });
    assert_eq!(d.verdict, Verdict::Accept(2));
    assert_eq!(
        refusals(&d),
        [(0, Refusal::Failed("no route".into())), (1, Refusal::Unreachable("file://".into()))]
    );
}

#[test]
fn an_ailing_machine_is_left_alone_while_another_will_do() {
    let machines = [machine("a", 1, 2.0), machine("b", 1, 1.0)];
    let ask = |taken| {
        decided(&machines, &Local::default(), &request(), |i| match i {
            0 => cooling("no route"),
            _ => busy(taken),
        })
    };
    let free = ask(0);
    assert_eq!(free.verdict, Verdict::Accept(1));
    assert_eq!(refusals(&free), [(0, Refusal::CoolDown { until: None, why: "no route".into() })]);
    assert_eq!(ask(1).verdict, Verdict::Wait(vec![1]));
}

#[test]
fn a_machine_that_wakes_up_is_waited_for_unless_another_is_free() {
    let machines = [machine("a", 4, 1.0), machine("b", 1, 1.0)];
    let nowhere = Local::default();
    let here = Local { max_jobs: 1, systems: set(&["x86_64-linux"]), ..Local::default() };
    let waking = busy(0).with_health(Health::Waking);
    let states = |other: Known| {
        let waking = waking.clone();
        move |index| if index == 0 { waking.clone() } else { other.clone() }
    };
    let decision = decided(&machines, &nowhere, &request(), states(busy(0)));
    assert_eq!(decision.verdict, Verdict::Accept(1));
    assert_eq!(refusals(&decision), [(0, Refusal::Waking)]);
    let full = busy(1);
    let decision = decided(&machines, &nowhere, &request(), states(full));
    assert_eq!(decision.verdict, Verdict::Wait(vec![0, 1]));
    let ill = cooling("no route");
    let decision = decided(&machines, &here, &request(), states(ill));
    assert_eq!(decision.verdict, Verdict::Postpone(vec![0]));
}

#[test]
fn an_ailing_machine_is_asked_when_there_is_no_other() {
    let machines = [machine("a", 1, 1.0), machine("b", 1, 2.0)];
    let d = decided(&machines, &Local::default(), &request(), |i| match i {
        0 => failed("just now"),
        _ => cooling("a while ago"),
    });
    assert_eq!(d.verdict, Verdict::Accept(1));
}

#[test]
fn a_failed_machine_alone_declines_instead_of_postponing_for_ever() {
    let d = decided(&[machine("a", 1, 1.0)], &Local::default(), &request(), |_| failed("x"));
    assert_eq!(d.verdict, Verdict::Decline);
}

#[test]
fn a_machine_without_slots_is_never_free() {
    let d = with_loads(&[machine("a", 0, 1.0)], &request(), &[0]);
    assert_eq!(d.verdict, Verdict::Decline);
    assert_eq!(refusals(&d), [(0, full(0))]);
}
