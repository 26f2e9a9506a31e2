//! The goals, for a handful of small scenes, and what the world itself promises.

use crate::fleet::Fleet;
use crate::graph::Shape;
use crate::random::Random;
use crate::report::{BETTER, NEAR, NEVER_WORSE};
use crate::scene::{Gain, Plays, Result, Rounds, Scene, run_all};
use crate::stock::Edition;
use crate::world::{self, Conditions, Contender};
use crate::{bounds, stock};
use nix_offload::plan::machine::Machine;

const EDITIONS: [Edition; 2] = [Edition::UpTo2_19, Edition::Since2_20];
const STOCK: Contender = Contender::Stock(Edition::Since2_20);

impl Conditions {
    /// Nix as it is, and hooks that do nothing twice.
    const REAL: Self = Self { is_kind: false, sends_twice: false, is_first_come: false, stays: false };
}

fn play(scenes: &[(Fleet, Shape)], conditions: Conditions) -> Vec<Result> {
    let scenes: Vec<Scene> =
        scenes.iter().map(|(fleet, shape)| Scene { fleet: *fleet, shape: *shape }).collect();
    run_all(&scenes, Rounds { seeds: 2, plays: 5 }, 0.25, conditions, 2)
}

#[test]
fn ours_is_never_slower_than_stock_and_much_faster_where_machines_differ() {
    let scenes = [
        (Fleet::Equal, Shape::Wide),
        (Fleet::Equal, Shape::Deep),
        (Fleet::Equal, Shape::Debian),
        (Fleet::Speeds, Shape::Deep),
        (Fleet::Speeds, Shape::Mixed),
        (Fleet::Speeds, Shape::Debian),
        (Fleet::Foreign, Shape::Deep),
        (Fleet::Links, Shape::Wide),
        (Fleet::Links, Shape::Deep),
        (Fleet::Dying, Shape::Wide),
    ];
    for is_kind in [false, true] {
        for result in play(&scenes, Conditions { is_kind, ..Conditions::REAL }) {
            let name = result.scene.name();
            let Gain { median: gain, worst, .. } = result.gain_of_ours();
            assert!(worst > -NEVER_WORSE, "{name}: {:.1} % slower", -100.0 * worst);
            if result.scene.fleet.differs() {
                assert!(gain >= BETTER, "{name}: only {:.1} % faster", 100.0 * gain);
            }
            if let Some((above, _)) = result.above_list() {
                assert!(above <= NEAR, "{name}: {:.1} % above the list schedule", 100.0 * above);
            }
            for played in &result.played {
                assert_eq!(played.overbooked, 0, "{name}: more builds than slots");
                assert!(played.longest_wait < 0.95, "{name}: a build starved");
                assert!(
                    played.ours.mean().min(played.stock.mean()) > 0.999 * played.lower.mean(),
                    "{name}: below what is possible"
                );
            }
        }
    }
}

#[test]
fn the_rule_alone_is_better_where_machines_differ() {
    let scenes = [(Fleet::Speeds, Shape::Deep), (Fleet::Foreign, Shape::Deep), (Fleet::Links, Shape::Deep)];
    for result in play(&scenes, Conditions::REAL) {
        let gain = result.gain_of_rule().median;
        assert!(gain >= BETTER, "{}: only {:.1} %", result.scene.name(), 100.0 * gain);
    }
}

#[test]
fn waiting_in_the_order_of_chains_and_moving_to_faster_machines_are_worth_something() {
    let better = |fleet: Fleet, shape: Shape, scale: f64, without: Conditions| {
        let (graph, fleet) = (shape.make(1, scale), fleet.make(1));
        let sum = |conditions| -> f64 {
            let run = |naming| world::run(&graph, &fleet, Contender::Ours, conditions, naming).makespan;
            (0..4).map(run).sum()
        };
        1.0 - sum(Conditions::REAL) / sum(without)
    };
    let first_come = Conditions { is_first_come: true, ..Conditions::REAL };
    let chains = better(Fleet::Equal, Shape::Debian, 1.0, first_come);
    assert!(chains > 0.05, "{chains}");
    let stays = Conditions { stays: true, ..Conditions::REAL };
    let moves = better(Fleet::Speeds, Shape::Debian, 1.0, stays);
    assert!(moves > 0.05, "{moves}");
}

#[test]
fn the_error_of_a_gain_is_that_of_its_spread() {
    let plays = |values: &[f64]| Plays::of(values.to_vec());
    // Half of it every time: nothing is left to chance, however much the weather differs.
    let (gain, error) = plays(&[1.0, 4.0, 2.0]).gain(&plays(&[2.0, 8.0, 4.0]));
    assert_eq!((gain, error), (0.5, 0.0));
    // Means of 10 and 10; the differences are 2 and -2, their variance is 8, that of the mean 4, of which the root is 2.
    let (gain, error) = plays(&[12.0, 8.0]).gain(&plays(&[10.0, 10.0]));
    assert_eq!((gain, error), (0.0, 0.2));
    assert_eq!(plays(&[3.0]).gain(&plays(&[4.0])), (0.25, 0.0));
}

#[test]
fn the_same_seed_gives_the_same_world() {
    for shape in [Shape::Mixed, Shape::System] {
        let graph = shape.make(3, 0.02);
        let fleet = Fleet::Dying.make(3);
        let stock = EDITIONS.map(Contender::Stock);
        let ours = [Contender::Unmeasured, Contender::Ours, Contender::Experienced];
        for contender in stock.into_iter().chain(ours) {
            let run = |naming| world::run(&graph, &fleet, contender, Conditions::REAL, naming);
            assert_eq!(run(1), run(1), "{contender:?}");
        }
    }
}

#[test]
fn builds_that_die_with_their_machine_are_made_elsewhere() {
    let graph = Shape::Wide.make(1, 0.5);
    let mut fleet = Fleet::Equal.make(1);
    fleet[0].outages = vec![(30.0, 1e9)];
    for contender in [STOCK, Contender::Ours] {
        let outcome = world::run(&graph, &fleet, contender, Conditions::REAL, 1);
        assert!(outcome.lost > 0, "{contender:?} lost nothing");
        // Every stock hook asks the dead machine again, and Nix waits for each.
        let is_ours = contender == Contender::Ours;
        assert!(!is_ours || outcome.makespan < 2.0 * bounds::lower(&graph, &fleet), "{outcome:?}");
    }
}

#[test]
fn all_is_built_though_all_machines_are_dead_for_a_while() {
    let graph = Shape::Wide.make(1, 0.1);
    let mut fleet = Fleet::Equal.make(1);
    fleet.iter_mut().for_each(|spec| spec.outages = vec![(30.0, 300.0)]);
    for contender in [STOCK, Contender::Unmeasured, Contender::Ours] {
        let outcome = world::run(&graph, &fleet, contender, Conditions::REAL, 1);
        assert!(outcome.makespan > 300.0 && outcome.makespan < 900.0, "{contender:?}: {outcome:?}");
    }
}

#[test]
fn one_machine_with_one_slot_needs_the_sum_of_all_durations() {
    let graph = Shape::Deep.make(2, 0.1);
    let mut fleet = Fleet::Equal.make(2);
    fleet.truncate(1);
    fleet[0].line.max_jobs = 1;
    fleet[0].bandwidth = 1e15;
    fleet[0].round_trip = 0.0;
    let sum: f64 = graph.jobs.iter().map(|job| job.work).sum();
    let outcome = world::run(&graph, &fleet, Contender::Ours, Conditions::REAL, 2);
    assert!((outcome.makespan - sum).abs() < 1e-6 * sum, "{} instead of {sum}", outcome.makespan);
    assert_eq!(bounds::list_schedule(&graph, &fleet), sum);
}

#[test]
fn both_models_of_stocks_rule_agree() {
    // The world's model goes through the list as Nix does; the hook's puts all machines in order.
    let mut random = Random::new(5);
    for _ in 0..2000 {
        let count = 1 + random.below(6);
        let mut fleet = Fleet::Equal.make(1);
        fleet.extend(Fleet::Equal.make(1));
        fleet.truncate(count);
        let speeds = [0.5, 1.0, 2.0, 8.0];
        fleet.iter_mut().for_each(|spec| spec.line.speed_factor = speeds[random.below(4)]);
        let taken: Vec<u64> = (0..count).map(|_| random.below(10) as u64).collect();
        let lines: Vec<_> = fleet.iter().map(|spec| spec.line.clone()).collect();
        let chosen = stock::choose(Edition::Since2_20, &lines, &taken, &vec![false; count]);
        assert_eq!(chosen, world::unmeasured_choice(&lines, &taken));
    }
}

#[test]
fn stock_up_to_2_19_divides_loads_as_integers() {
    let lines: Vec<_> = Fleet::Speeds.make(1).into_iter().map(|spec| spec.line).collect();
    let lines: [Machine; 3] = lines.try_into().expect("three machines");
    // Slots taken after so many builds on idle machines of the speeds 1, 8 and 1.
    let taken_after = |edition: Edition, builds: usize| {
        let mut taken = [0; 3];
        for _ in 0..builds {
            taken[stock::choose(edition, &lines, &taken, &[false; 3]).expect("a free slot")] += 1;
        }
        taken
    };
    assert_eq!(taken_after(Edition::UpTo2_19, 6), [0, 6, 0]);
    assert_eq!(taken_after(Edition::Since2_20, 6), [1, 4, 1]);
    assert_eq!(taken_after(Edition::UpTo2_19, 10), [1, 8, 1]);
}

#[test]
fn where_all_speed_factors_are_1_both_editions_of_stock_choose_alike() {
    let mut random = Random::new(6);
    for fleet in Fleet::ALL.into_iter().filter(|fleet| !fleet.has_speeds()) {
        let lines: Vec<_> = fleet.make(1).into_iter().map(|spec| spec.line).collect();
        for _ in 0..500 {
            let taken: Vec<u64> = lines.iter().map(|_| random.below(10) as u64).collect();
            let choose = |edition| stock::choose(edition, &lines, &taken, &vec![false; lines.len()]);
            assert_eq!(choose(Edition::UpTo2_19), choose(Edition::Since2_20), "{taken:?}");
        }
    }
}
