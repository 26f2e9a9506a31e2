//! Scenes: a graph and a fleet. Each is made anew for each seed and played by all contenders.

use crate::bounds;
use crate::fleet::{Fleet, Spec};
use crate::graph::Shape;
use crate::stock::Edition;
use crate::world::{self, Conditions, Contender, Outcome};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// A graph on a fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Scene {
    pub(crate) fleet: Fleet,
    pub(crate) shape: Shape,
}

/// How often what is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rounds {
    /// How many graphs each scene has.
    pub(crate) seeds: u64,
    /// How often each graph is played by each contender, every time with another order of names and with other foreign
    /// load and outages, the same for all contenders. Without that a rule would be judged by its luck: a graph in another
    /// order may take much longer with any rule, and so it may if a machine dies a minute later. Where that costs little,
    /// or luck decides most, it is a multiple of that ([`Scene::oftener`]).
    pub(crate) plays: u64,
}

/// Seconds of each play of a graph.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plays(Vec<f64>);

impl Plays {
    pub(crate) fn of(seconds: Vec<f64>) -> Self {
        Self(seconds)
    }

    pub(crate) fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// How much less these take than those, which were played in the same weather, as a part of those; and the standard
    /// error of that, as of a ratio of two means (the delta method), or 0 if there is only one play.
    pub(crate) fn gain(&self, against: &Self) -> (f64, f64) {
        let ratio = self.mean() / against.mean();
        let count = self.0.len() as f64;
        let residues = self.0.iter().zip(&against.0).map(|(own, other)| (own - ratio * other).powi(2));
        let variance = residues.sum::<f64>() / (count * (count - 1.0).max(1.0));
        (1.0 - ratio, variance.sqrt() / against.mean())
    }
}

/// One scene with one seed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Played {
    pub(crate) stock: Plays,
    /// With the hook of Nix up to 2.19. Where all speed factors are 1 it does the same and is not played again.
    pub(crate) older: Plays,
    pub(crate) unmeasured: Plays,
    pub(crate) ours: Plays,
    pub(crate) experienced: Plays,
    /// The worst of ours: slots taken beyond a machine's maximum, and the part of the makespan for which a build waited.
    pub(crate) overbooked: u64,
    pub(crate) longest_wait: f64,
    /// Seconds that no schedule can be below.
    pub(crate) lower: Plays,
    /// Seconds of the list schedule, on equal machines.
    pub(crate) list: Option<f64>,
}

/// One scene with all seeds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Result {
    pub(crate) scene: Scene,
    pub(crate) played: Vec<Played>,
}

/// All scenes.
pub(crate) fn all() -> Vec<Scene> {
    Fleet::ALL
        .into_iter()
        .flat_map(|fleet| Shape::ALL.into_iter().map(move |shape| Scene { fleet, shape }))
        .collect()
}

impl Scene {
    pub(crate) fn name(self) -> String {
        format!("{}, {}", self.fleet.label(), self.shape.label())
    }

    /// How many times as often as the large graphs of other fleets it is played. In a large graph on machines that die
    /// the standard error of a gain is 2 to 4 % with 20 plays.
    fn oftener(self) -> u64 {
        match (self.shape, self.fleet) {
            (Shape::System, Fleet::Dying) => 5,
            (Shape::System, _) => 1,
            _ => 4,
        }
    }

    pub(crate) fn play(self, seed: u64, plays: u64, scale: f64, conditions: Conditions) -> Played {
        let plays = self.oftener() * plays;
        let graph = self.shape.make(seed, scale);
        let fleets: Vec<Vec<Spec>> = (0..plays).map(|play| self.fleet.make(seed * plays + play)).collect();
        let run = |contender| -> Vec<Outcome> {
            let run =
                |(naming, fleet): (u64, &Vec<Spec>)| world::run(&graph, fleet, contender, conditions, naming);
            (0..).zip(&fleets).map(run).collect()
        };
        let makespan =
            |outcomes: &[Outcome]| Plays::of(outcomes.iter().map(|outcome| outcome.makespan).collect());
        let stock = |edition| makespan(&run(Contender::Stock(edition)));
        let newer = stock(Edition::Since2_20);
        let ours = run(Contender::Ours);
        Played {
            older: if self.fleet.has_speeds() { stock(Edition::UpTo2_19) } else { newer.clone() },
            stock: newer,
            unmeasured: makespan(&run(Contender::Unmeasured)),
            ours: makespan(&ours),
            experienced: makespan(&run(Contender::Experienced)),
            overbooked: ours.iter().map(|outcome| outcome.overbooked).max().unwrap_or_default(),
            longest_wait: ours
                .iter()
                .map(|outcome| outcome.longest_wait / outcome.makespan)
                .fold(0.0, f64::max),
            lower: Plays::of(fleets.iter().map(|fleet| bounds::lower(&graph, fleet)).collect()),
            list: (self.fleet == Fleet::Equal).then(|| bounds::list_schedule(&graph, &fleets[0])),
        }
    }
}

/// Plays all, several at a time. Seeds count from 1.
pub(crate) fn run_all(
    scenes: &[Scene],
    Rounds { seeds, plays }: Rounds,
    scale: f64,
    conditions: Conditions,
    workers: usize,
) -> Vec<Result> {
    let games: Vec<(usize, u64)> =
        (0..scenes.len()).flat_map(|scene| (1..=seeds).map(move |seed| (scene, seed))).collect();
    let next = AtomicUsize::new(0);
    let played = Mutex::new(vec![None; games.len()]);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((scene, seed)) = games.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = scenes[*scene].play(*seed, plays, scale, conditions);
                    let place = scene * seeds as usize + (*seed - 1) as usize;
                    played.lock().expect("no panic elsewhere")[place] = Some(outcome);
                }
            });
        }
    });
    let played = played.into_inner().expect("no panic elsewhere");
    let played: Vec<Played> = played.into_iter().map(|played| played.expect("all were played")).collect();
    let results = scenes.iter().zip(played.chunks(seeds as usize));
    results.map(|(scene, played)| Result { scene: *scene, played: played.to_vec() }).collect()
}

/// The middle one of an odd number, the mean of the two in the middle else.
pub(crate) fn median(numbers: impl IntoIterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.into_iter().collect();
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    if numbers.len() % 2 == 1 { numbers[middle] } else { (numbers[middle - 1] + numbers[middle]) / 2.0 }
}

/// How much less the first is than the second, as a part of the second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Gain {
    /// The median over the seeds.
    pub(crate) median: f64,
    /// That of the worst seed.
    pub(crate) worst: f64,
    /// And its standard error over the plays.
    pub(crate) error: f64,
}

impl Result {
    /// The median of what the plays of each seed take.
    pub(crate) fn median(&self, of: impl Fn(&Played) -> &Plays) -> f64 {
        median(self.played.iter().map(|played| of(played).mean()))
    }

    pub(crate) fn gain(&self, of: impl Fn(&Played) -> &Plays, against: impl Fn(&Played) -> &Plays) -> Gain {
        let gains: Vec<(f64, f64)> = self.played.iter().map(|p| of(p).gain(against(p))).collect();
        let (worst, error) =
            gains.iter().copied().min_by(|a, b| a.0.total_cmp(&b.0)).expect("at least one seed");
        Gain { median: median(gains.into_iter().map(|(gain, _)| gain)), worst, error }
    }

    /// How much less than stock's our makespan is.
    pub(crate) fn gain_of_ours(&self) -> Gain {
        self.gain(|p| &p.ours, |p| &p.stock)
    }

    /// The same when builds of most names were seen before.
    pub(crate) fn gain_of_experience(&self) -> Gain {
        self.gain(|p| &p.experienced, |p| &p.stock)
    }

    /// How much of ours is due to the rule alone: against our hook when nothing is measured.
    pub(crate) fn gain_of_rule(&self) -> Gain {
        self.gain(|p| &p.ours, |p| &p.unmeasured)
    }

    /// What stock could lose at most to a schedule that knows everything.
    pub(crate) fn possible(&self) -> f64 {
        self.gain(|p| &p.lower, |p| &p.stock).median
    }

    /// How much longer than the list schedule ours is, on equal machines: the median and the worst.
    pub(crate) fn above_list(&self) -> Option<(f64, f64)> {
        let above: Option<Vec<f64>> =
            self.played.iter().map(|p| Some(p.ours.mean() / p.list? - 1.0)).collect();
        let above = above?;
        Some((median(above.iter().copied()), above.into_iter().fold(f64::NEG_INFINITY, f64::max)))
    }
}
