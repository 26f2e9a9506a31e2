//! What must hold for every fleet, state and request.

use super::*;
use crate::plan::known::{Link, Withheld, Withholding};
use crate::plan::rules::Floors;
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;
use proptest::sample::subsequence;

const SYSTEMS: [&str; 3] = ["x86_64-linux", "aarch64-linux", "builtin"];
const FEATURES: [&str; 3] = ["kvm", "big-parallel", "benchmark"];
const LATER: u64 = 10_000;

fn time() -> SystemTime {
    NOW + Duration::from_secs(LATER)
}

fn features() -> impl Strategy<Value = BTreeSet<String>> {
    subsequence(FEATURES.to_vec(), 0..=3).prop_map(|words| set(&words))
}

prop_compose! {
    fn any_machine()(
        systems in subsequence(SYSTEMS[..2].to_vec(), 1..=2),
        max_jobs in 0_u64..6,
        speed in prop::sample::select(vec![0.5_f32, 1.0, 1.5, 2.0, 8.0]),
        supported in features(),
        mandatory in prop_oneof![4 => Just(BTreeSet::new()), 1 => features()],
    ) -> Machine {
        Machine {
            systems: set(&systems),
            supported_features: supported,
            mandatory_features: mandatory,
            ..machine("m", max_jobs, speed)
        }
    }
}

prop_compose! {
    fn any_sample()(
        age in 0_u64..120,
        cores in of(1_u32..64),
        load in of(0.0_f64..100.0),
        own in of(0.0_f64..10.0),
        pressure in of(0.0_f64..=100.0),
        disk in of(0_u64..4096),
        inodes in of(0_u64..40_000),
        memory in of(0_u64..1024),
        inhibited in prop_oneof![5 => Just(None), 1 => Just(Some("no".to_owned()))],
    ) -> Sample {
        Sample {
            at: time() - Duration::from_secs(age),
            cores,
            load_average: load,
            own_load: own,
            cpu_pressure: pressure,
            memory_free: memory.map(|mib| mib << 20),
            disk_free: disk.map(|mib| mib << 20),
            inodes_free: inodes,
            inhibited,
        }
    }
}

fn any_health() -> impl Strategy<Value = Health> {
    let until = of(0..2 * LATER).prop_map(|at| at.map(|at| NOW + Duration::from_secs(at)));
    prop_oneof![
        6 => Just(Health::Well),
        2 => until.prop_map(|until| Health::CoolDown { until, why: "x".into() }),
        1 => Just(Health::Waking),
        1 => Just(Health::Unasked),
        1 => Just(Health::Failed("x".into())),
        1 => Just(Health::Unreachable("x".into())),
        1 => Just(Health::CutOff),
    ]
}

prop_compose! {
    fn any_link()(
        missing in of(0_u64..1 << 34),
        backlog in of(0_u64..1 << 30),
        bandwidth in of(1.0_f64..1e9),
        round_trip in of(0.0_f64..1.0),
    ) -> Link {
        Link { missing, backlog, bandwidth, round_trip }
    }
}

prop_compose! {
    fn any_known()(
        taken in 0_u64..7,
        sample in of(any_sample()),
        link in any_link(),
        slot_wait in of(0.0_f64..100.0),
        health in any_health(),
        until in prop_oneof![4 => Just(None), 1 => of(0..2 * LATER).prop_map(Some)],
        how in prop::sample::select(vec![Withholding::Drained, Withholding::Disabled]),
    ) -> Known {
        let withheld = until.map(|until| Withheld {
            how,
            until: until.map(|at| NOW + Duration::from_secs(at)),
            why: String::new(),
        });
        Known { load: Load { taken }, sample, link, slot_wait, waiting: 0, health, withheld }
    }
}

prop_compose! {
    fn any_rules()(
        policy in prop::sample::select(vec![Policy::RemoteFirst, Policy::LocalFirst, Policy::Cost]),
        big_parallel_slots in 1_u64..5,
    ) -> Rules {
        Rules { policy, big_parallel_slots, ..Rules::default() }
    }
}

prop_compose! {
    fn any_request()(
        am_willing in any::<bool>(),
        system in prop::sample::select(SYSTEMS.to_vec()),
        required_features in prop_oneof![3 => Just(BTreeSet::new()), 1 => features()],
    ) -> Request {
        Request { am_willing, system: system.into(), required_features, ..request() }
    }
}

prop_compose! {
    fn any_local()(max_jobs in 0_u64..3, systems in subsequence(SYSTEMS[..2].to_vec(), 0..=2), features in features()) -> Local {
        Local { max_jobs, systems: set(&systems), features }
    }
}

prop_compose! {
    fn any_work()(
        duration in of(0.1_f64..1e4), usual in of(0.1_f64..1e4), output in of(0_u64..1 << 32),
        since in of(0..LATER), obstructed in of(0..LATER), silent in of(0..LATER),
    ) -> Work {
        let [waiting_since, obstructed_since, silent_since] =
            [since, obstructed, silent].map(|since| since.map(|at| NOW + Duration::from_secs(at)));
        Work { duration, usual, output, waiting_since, obstructed_since, silent_since }
    }
}

#[derive(Debug, Clone)]
struct Case {
    fleet: Vec<(Machine, Known)>,
    rules: Rules,
    local: Local,
    request: Request,
    work: Work,
}

prop_compose! {
    fn any_case()(
        fleet in vec((any_machine(), any_known()), 0..8),
        rules in any_rules(),
        local in any_local(),
        request in any_request(),
        work in any_work(),
    ) -> Case {
        Case { fleet, rules, local, request, work }
    }
}

impl Case {
    fn decide(&self) -> Decision {
        let machines: Vec<Machine> = self.fleet.iter().map(|(machine, _)| machine.clone()).collect();
        let question = Question {
            machines: &machines,
            rules: &self.rules,
            local: &self.local,
            here: None,
            request: &self.request,
            work: &self.work,
            now: time(),
        };
        decide(&question, |index| self.fleet[index].1.clone())
    }

    fn is_short(&self, known: &Known) -> bool {
        let Floors { disk, inodes, memory } = self.rules.floors;
        let below = |left: Option<u64>, floor: u64| left.is_some_and(|left| left < floor);
        known.sample.as_ref().is_some_and(|sample| {
            let is_fresh = sample.at + self.rules.stale_after >= time();
            is_fresh
                && (sample.inhibited.is_some()
                    || below(sample.disk_free, disk)
                    || below(sample.inodes_free, inodes)
                    || below(sample.memory_free, memory))
        })
    }

    /// Makes a machine worse in one way.
    fn worsen(&mut self, index: usize, way: u8) {
        let known = &mut self.fleet[index].1;
        let sample = known.sample.get_or_insert(Sample::empty(time()));
        match way {
            0 => sample.load_average = Some(sample.load_average.unwrap_or(0.0) + 5.0),
            1 => sample.cpu_pressure = sample.cpu_pressure.map(|pressure| (pressure + 20.0).min(100.0)),
            2 => known.link.missing = known.link.missing.map(|missing| missing + (1 << 30)),
            3 => known.link.bandwidth = known.link.bandwidth.map(|bandwidth| bandwidth / 2.0),
            _ => known.link.backlog = Some(known.link.backlog.unwrap_or(0) + (1 << 30)),
        }
    }
}

/// The rule of Nix 2.20 and newer, written down once more: sorts by load for its speed, then speed, load and place.
fn stock(fleet: &[(Machine, u64)]) -> Option<usize> {
    let free = fleet.iter().enumerate().filter(|(_, (machine, taken))| *taken < machine.max_jobs);
    let key = |(index, (machine, taken)): (usize, &(Machine, u64))| {
        (*taken as f32 / machine.speed_factor, -machine.speed_factor, *taken, index)
    };
    free.map(key).min_by(|a, b| a.partial_cmp(b).unwrap()).map(|(.., index)| index)
}

proptest! {
    #[test]
    fn a_build_goes_only_where_it_may(case in any_case()) {
        let decision = case.decide();
        if let Verdict::Accept(index) = decision.verdict {
            let (machine, known) = &case.fleet[index];
            prop_assert!(suits(machine, &case.request).is_ok());
            prop_assert!(decision.slots >= 1 && known.load.taken + decision.slots <= machine.max_jobs);
            prop_assert!(!case.is_short(known));
            prop_assert!(!known.withheld.as_ref().is_some_and(|withheld| withheld.holds(time())));
            let is_reachable = matches!(known.health, Health::Well | Health::CoolDown { .. });
            prop_assert!(is_reachable);
            prop_assert_eq!(&decision.standings[index].refusal, &None);
        }
    }

    #[test]
    fn nobody_who_failed_lately_is_asked_for_what_nix_could_build(case in any_case()) {
        if let Verdict::Accept(index) = case.decide().verdict && case.local.could_build(&case.request) {
            let is_left_alone = match &case.fleet[index].1.health {
                Health::CoolDown { until, .. } => until.is_some_and(|until| until > time()),
                _ => false,
            };
            prop_assert!(!is_left_alone);
        }
    }

    #[test]
    fn every_machine_has_a_reason_or_the_build_and_every_candidate_a_place(case in any_case()) {
        let decision = case.decide();
        prop_assert_eq!(decision.standings.len(), case.fleet.len());
        let mut places: Vec<usize> = decision.standings.iter().filter_map(|standing| standing.place).collect();
        places.sort_unstable();
        prop_assert_eq!(&places, &(1..=places.len()).collect::<Vec<_>>());
        for (index, standing) in decision.standings.iter().enumerate() {
            prop_assert_eq!(standing.refusal.is_none(), decision.verdict == Verdict::Accept(index));
            prop_assert_eq!(standing.place.is_some(), standing.estimate.is_some());
            if let Some(estimate) = &standing.estimate {
                let sum = estimate.wait + estimate.transfer + estimate.build + estimate.fetch;
                prop_assert!(estimate.total.is_finite() && (estimate.total - sum).abs() <= 1e-9 * sum);
            }
        }
    }

    #[test]
    fn nobody_waits_for_what_can_never_come(case in any_case()) {
        if let Verdict::Wait(awaited) | Verdict::Postpone(awaited) = case.decide().verdict {
            prop_assert!(!awaited.is_empty());
            for index in awaited {
                prop_assert!(suits(&case.fleet[index].0, &case.request).is_ok());
            }
        }
    }

    #[test]
    fn equal_questions_have_equal_answers(case in any_case()) {
        prop_assert_eq!(case.decide(), case.decide());
    }

    #[test]
    fn one_machine_more_makes_no_request_unsuitable(case in any_case(), more in (any_machine(), any_known()), at in any::<prop::sample::Index>()) {
        let before = case.decide();
        let mut larger = case.clone();
        larger.fleet.insert(at.index(case.fleet.len() + 1), more);
        let after = larger.decide();
        if before.verdict != Verdict::Decline {
            let is_here = !matches!(after.because, Because::NothingFits | Because::ObstaclesTooLong);
            prop_assert!(is_here, "{:?} became {:?}", before.verdict, after.because);
        }
    }

    #[test]
    fn with_nothing_measured_the_order_is_that_of_stock_since_2_20(fleet in vec((any_machine(), 0_u64..7), 1..8)) {
        let plain = |(machine, taken): (Machine, u64)| {
            let systems = set(&["x86_64-linux"]);
            let mandatory_features = BTreeSet::new();
            (Machine { systems, mandatory_features, ..machine }, taken)
        };
        let fleet: Vec<(Machine, u64)> = fleet.into_iter().map(plain).collect();
        let machines: Vec<Machine> = fleet.iter().map(|(machine, _)| machine.clone()).collect();
        let decision = decided(&machines, &Local::default(), &request(), |index| busy(fleet[index].1));
        let accepted = match decision.verdict { Verdict::Accept(index) => Some(index), _ => None };
        prop_assert_eq!(accepted, stock(&fleet));
    }

    #[test]
    fn a_machine_that_gets_worse_does_not_get_the_build_that_it_did_not_get_before(
        case in any_case(), index in any::<prop::sample::Index>(), way in 0_u8..5,
    ) {
        if case.fleet.is_empty() {
            return Ok(());
        }
        let index = index.index(case.fleet.len());
        // Before anything is measured the rule is another one, so all of the fleet is.
        let mut case = case;
        for (_, known) in &mut case.fleet {
            known.link.missing.get_or_insert(1 << 20);
            let sample = known.sample.get_or_insert(Sample::empty(time()));
            sample.at = time();
            sample.load_average.get_or_insert(0.0);
        }
        let before = case.decide();
        let mut worse = case.clone();
        worse.worsen(index, way);
        let after = worse.decide();
        if after.verdict == Verdict::Accept(index) {
            prop_assert_eq!(&before.verdict, &Verdict::Accept(index));
        }
        let total = |decision: &Decision| decision.standings[index].estimate.as_ref().map(|estimate| estimate.total);
        if let (Some(before), Some(after)) = (total(&before), total(&after)) {
            prop_assert!(after >= before, "{after} < {before}");
        }
    }

    #[test]
    fn what_waits_is_served_in_the_end(
        fleet in vec((any_machine(), 1_u64..6), 1..5),
        builds in vec((1_u64..200, any::<bool>()), 1..30),
        big_parallel_slots in 1_u64..5,
    ) {
        // Builds come all at once and are asked for in turns, again and again; the small ones first.
        let rules = Rules { big_parallel_slots, ..Rules::default() };
        let machines: Vec<Machine> = fleet
            .into_iter()
            .map(|(machine, max_jobs)| Machine {
                max_jobs,
                systems: set(&["x86_64-linux"]),
                supported_features: set(&["big-parallel"]),
                mandatory_features: BTreeSet::new(),
                ..machine
            })
            .collect();
        let mut waiting = builds;
        waiting.sort_by_key(|(_, is_big)| *is_big);
        let mut running: Vec<(u64, usize, u64)> = Vec::new();
        let work = Work { waiting_since: Some(NOW), ..Work::default() };
        let local = Local::default();
        let mut second = 0;
        while !waiting.is_empty() {
            prop_assert!(second < 30 * 200 + 1000, "{} builds starve", waiting.len());
            running.retain(|(end, ..)| *end > second);
            waiting.retain(|(seconds, is_big)| {
                let taken = |index: usize| -> u64 {
                    running.iter().filter(|(_, on, _)| *on == index).map(|(.., slots)| *slots).sum()
                };
                let required_features = if *is_big { set(&["big-parallel"]) } else { BTreeSet::new() };
                let request = Request { required_features, ..request() };
                let question = Question {
                    machines: &machines,
                    rules: &rules,
                    local: &local,
                    here: None,
                    request: &request,
                    work: &work,
                    now: NOW + Duration::from_secs(second),
                };
                let decision = decide(&question, |index| Known { slot_wait: Some(1.0), ..busy(taken(index)) });
                let Verdict::Accept(index) = decision.verdict else { return true };
                running.push((second + seconds, index, decision.slots));
                false
            });
            for (index, machine) in machines.iter().enumerate() {
                let taken: u64 = running.iter().filter(|(_, on, _)| *on == index).map(|(.., slots)| *slots).sum();
                prop_assert!(taken <= machine.max_jobs);
            }
            second += 1;
        }
    }
}
