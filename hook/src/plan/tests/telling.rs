//! What people read.

use super::estimating::{decide_with, idle, with_sample};
use super::*;
use crate::plan::known::{Link, Withheld, Withholding};
use crate::plan::telling::{gist, here, needs, ranking, table};

fn fleet() -> Vec<Machine> {
    let mut machines: Vec<Machine> =
        ["ssh://mac", "ssh://full", "ssh://tired", "ssh://tiny", "ssh://down", "ssh://strict", "ssh://other"]
            .map(|name| machine(name, 8, 1.0))
            .into();
    machines[0].systems = set(&["aarch64-darwin"]);
    machines[5].mandatory_features = set(&["benchmark"]);
    machines[6].systems = set(&["aarch64-darwin"]);
    machines
}

fn known() -> Vec<Known> {
    let until = |seconds| Some(NOW + Duration::from_secs(seconds));
    vec![
        busy(0),
        busy(8),
        Known {
            withheld: Some(Withheld {
                how: Withholding::Drained,
                until: until(7200),
                why: "new disk".into(),
            }),
            ..busy(0)
        },
        with_sample(idle(), |sample| sample.disk_free = Some(300 << 20)),
        busy(0).with_health(Health::CoolDown {
            until: until(42),
            why: "no route to host\n  hint: switch it on".into(),
        }),
        busy(0),
        busy(0),
    ]
}

#[test]
fn the_table_says_of_every_machine_what_is_missing() {
    let machines = fleet();
    let decision = decide_with(&Rules::default(), &Work::default(), &machines, &known());
    assert_eq!(decision.verdict, Verdict::Wait(vec![1]));
    assert_eq!(
        table(&decision, &machines, None),
        "  ssh://mac, ssh://other  does not build for this system\n\
         \x20 ssh://full              full: 8 of 8 slots taken\n\
         \x20 ssh://tired             drained for 2.0 h: new disk\n\
         \x20 ssh://tiny              short of disk: 300.0 MiB left, the minimum is 1.0 GiB\n\
         \x20 ssh://down              failed: no route to host; left alone for 42 s\n\
         \x20                         hint: switch it on\n\
         \x20 ssh://strict            builds only derivations that require the features [benchmark]\n"
    );
}

#[test]
fn the_table_of_many_machines_is_short() {
    let mut machines = vec![machine("a", 1, 1.0); 1000];
    machines.iter_mut().for_each(|machine| machine.systems = set(&["aarch64-linux"]));
    let decision = with_loads(&machines, &request(), &[]);
    assert_eq!(
        table(&decision, &machines, None),
        "  ssh://a, ssh://a and 998 more  does not build for this system\n"
    );
}

#[test]
fn the_ranking_shows_the_arithmetic_and_what_is_assumed() {
    let machines = [machine("slow", 4, 1.0), machine("fast", 8, 4.0), machine("gone", 1, 1.0)];
    let fast = Known {
        sample: Some(Sample { cores: Some(8), load_average: Some(15.0), ..Sample::empty(NOW) }),
        link: Link {
            missing: Some(600 << 20),
            backlog: Some(100 << 20),
            bandwidth: Some((100 << 20) as f64),
            round_trip: Some(0.1),
        },
        ..busy(1)
    };
    let fast = with_sample(fast, |sample| sample.own_load = Some(1.0));
    let work = Work { duration: Some(120.0), output: Some(10 << 20), ..Work::default() };
    let rules = Rules { typical_bandwidth: (50 << 20) as f64, ..Rules::default() };
    let decision = decide_with(&rules, &work, &machines, &[busy(1), fast, failed("no route")]);
    assert_eq!(
        ranking(&decision, &machines),
        "to be built on ssh://fast: it would be done soonest\n\
         \x20 1. ssh://fast  done in 67 s\n\
         \x20      inputs    7.1 s  600.0 MiB, behind 100.0 MiB of other builds, at 100.0 MiB/s, and 0.1 s there and back\n\
         \x20      build      60 s  2 min / (speed 4 x 50 % of a core)\n\
         \x20                        8 cores for 14.0 tasks of others, 1 of our builds, 1 for this one\n\
         \x20      outputs   0.1 s  10.0 MiB at 100.0 MiB/s\n\
         \x20 2. ssh://slow  done in 2 min, 65 s later\n\
         \x20      inputs     12 s  (600.0 MiB) at (50.0 MiB/s)\n\
         \x20      build     2 min  2 min / (speed 1 x 100 % of a core)\n\
         \x20                        (4) cores for (0.0) tasks of others, 1 of our builds, 1 for this one\n\
         \x20      outputs   0.2 s  10.0 MiB at (50.0 MiB/s)\n\
         \x20 -  ssh://gone  failed: no route\n\
         in parentheses: what is not known, and assumed\n"
    );
}

#[test]
fn a_ranking_without_measurements_says_so() {
    let machines = [machine("a", 1, 1.0)];
    let text = ranking(&with_loads(&machines, &request(), &[0]), &machines);
    assert_eq!(
        text,
        "to be built on ssh://a: nothing is measured, and it is the least loaded for its speed\n\
         the places follow the rule of Nix 2.20, since no machine is measured; the times are guesses\n\
         \x20 1. ssh://a  done in 30 s\n\
         \x20      build      30 s  (30 s) / (speed 1 x 100 % of a core)\n\
         \x20                        (1) cores for (0.0) tasks of others, 0 of our builds, 1 for this one\n\
         in parentheses: what is not known, and assumed\n"
    );
}

#[test]
fn that_a_better_machine_is_full_is_the_reason_that_is_told() {
    let machines = [machine("small", 1, 1.0), machine("big", 1, 2.0)];
    let idle = |taken| Known { load: Load { taken }, ..idle() };
    let told = |big: Known| {
        let decision = decide_with(&Rules::default(), &Work::default(), &machines, &[idle(0), big]);
        assert_eq!(decision.verdict, Verdict::Accept(0));
        ranking(&decision, &machines)
    };
    let text = told(idle(1));
    let answer = "to be built on ssh://small: it would be done soonest of those with a free slot; \
                  ssh://big would be sooner, but it is full\n";
    assert!(text.starts_with(answer), "{text}");
    assert!(
        text.contains("2. ssh://big  done in 15 s once it has a slot; full: 1 of 1 slots taken\n"),
        "{text}"
    );
    // With the time until then it is known to be later, and no reason.
    let text = told(Known { slot_wait: Some(60.0), ..idle(1) });
    assert!(text.starts_with("to be built on ssh://small: it would be done soonest\n"), "{text}");
    assert!(text.contains("2. ssh://big  done in 75 s; full: 1 of 1 slots taken\n"), "{text}");
    let unmeasured = with_loads(&machines, &request(), &[0, 1]);
    let said = ": nothing is measured, and of those with a free slot it is the least loaded for its speed\n";
    assert!(ranking(&unmeasured, &machines).contains(said));
}

#[test]
fn the_ranking_of_many_machines_is_short() {
    let mut machines = vec![machine("a", 1, 1.0); 50];
    machines[49].systems = set(&["aarch64-linux"]);
    let text = ranking(&with_loads(&machines, &request(), &[0; 50]), &machines);
    assert_eq!(text.matches("done in").count(), 20);
    assert!(text.contains("\n     and 29 more\n  -  ssh://a  does not build for this system\n"), "{text}");
}

#[test]
fn what_keeps_a_build_from_all_machines_is_the_same_whatever_the_figures() {
    let machines = [machine("a", 4, 1.0), machine("b", 1, 1.0)];
    let request = request();
    let gist = |known: [Known; 2]| {
        gist(&decide_with(&Rules::default(), &Work::default(), &machines, &known), &request)
    };
    let drained = |until| Known {
        withheld: Some(Withheld { how: Withholding::Drained, until, why: "disk".into() }),
        ..busy(0)
    };
    let short = |left| with_sample(idle(), |sample| sample.disk_free = Some(left));
    let soon = Some(NOW + Duration::from_secs(9));
    assert_eq!(gist([drained(soon), failed("a")]), gist([drained(None), failed("b")]));
    assert_eq!(gist([short(1), failed("a")]), gist([short(2), failed("a")]));
    assert_ne!(gist([short(1), failed("a")]), gist([drained(None), failed("a")]));
    assert_ne!(gist([short(1), failed("a")]), gist([failed("a"), short(1)]));
}

#[test]
fn the_clients_own_machine_has_its_reason_too() {
    let request = Request { required_features: set(&["kvm", "x"]), ..request() };
    let local = |max_jobs, system: &str| Local { max_jobs, systems: set(&[system]), features: set(&["x"]) };
    assert_eq!(needs(&request), "x86_64-linux, features [kvm, x]");
    for (local, expected) in [
        (local(0, "x86_64-linux"), "builds nothing (max-jobs is 0)"),
        (local(1, "aarch64-linux"), "does not build for this system"),
        (local(1, "x86_64-linux"), "lacks the features [kvm]"),
    ] {
        assert_eq!(here(&local, &request).as_deref(), Some(expected));
    }
    let could = Local { features: set(&["x", "kvm"]), ..local(1, "x86_64-linux") };
    assert_eq!(here(&could, &request), None);
    let machines = [machine("a", 1, 1.0)];
    let decision = decided(&machines, &local(0, "x86_64-linux"), &request, |_| busy(0));
    assert_eq!(
        table(&decision, &machines, here(&local(0, ""), &request).as_deref()),
        "  ssh://a       lacks the features [kvm, x]\n  this machine  builds nothing (max-jobs is 0)\n"
    );
}
