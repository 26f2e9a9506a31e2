//! Fleets of machines, and what happens to them: foreign load that comes and goes, machines that die and come back.

use crate::random::Random;
use nix_offload::plan::machine::Machine;
use std::collections::BTreeSet;

/// One machine of the simulated world.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    /// Its line in the list.
    pub(crate) line: Machine,
    /// Its real processors.
    pub(crate) cores: f64,
    /// Bytes per second of its link, in each direction.
    pub(crate) bandwidth: f64,
    /// Seconds of one round trip.
    pub(crate) round_trip: f64,
    /// Tasks of others: from which second on, and how many.
    pub(crate) foreign: Vec<(f64, f64)>,
    /// When it dies and when it is back.
    pub(crate) outages: Vec<(f64, f64)>,
}

/// The kinds of fleets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fleet {
    /// Four equal machines.
    Equal,
    /// One machine that is eight times as fast as each of two others.
    Speeds,
    /// Four equal machines; others use two of them heavily, now and then.
    Foreign,
    /// Four equal machines; two of them are behind slow links.
    Links,
    /// Four equal machines that die and come back.
    Dying,
}

const MBIT: f64 = 1e6 / 8.0;
/// For how many seconds it is planned what happens.
const HORIZON: f64 = 400_000.0;

impl Fleet {
    pub(crate) const ALL: [Self; 5] = [Self::Equal, Self::Speeds, Self::Foreign, Self::Links, Self::Dying];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Speeds => "speeds 1:8",
            Self::Foreign => "foreign load",
            Self::Links => "slow links",
            Self::Dying => "dying",
        }
    }

    /// Whether speeds, load or links differ, so that a choice can be better than the stock hook's by much.
    pub(crate) fn differs(self) -> bool {
        matches!(self, Self::Speeds | Self::Foreign | Self::Links)
    }

    /// Whether speed factors differ, so that it matters how Nix's own hook divides by them.
    pub(crate) fn has_speeds(self) -> bool {
        self == Self::Speeds
    }

    pub(crate) fn make(self, seed: u64) -> Vec<Spec> {
        let mut random = Random::new(seed ^ 0xf1ee7);
        let plain = |index: usize| spec(&format!("builder{index}"), 8, 1.0);
        match self {
            Self::Equal => (0..4).map(plain).collect(),
            Self::Speeds => {
                let speeds = [1.0, 8.0, 1.0];
                speeds.iter().enumerate().map(|(i, speed)| spec(&format!("builder{i}"), 8, *speed)).collect()
            }
            Self::Foreign => (0..4)
                .map(|index| {
                    let foreign = if index % 2 == 0 { comes_and_goes(&mut random) } else { Vec::new() };
                    Spec { foreign, ..plain(index) }
                })
                .collect(),
            Self::Links => (0..4)
                .map(|index| match index % 2 {
                    0 => Spec { bandwidth: 10.0 * MBIT, round_trip: 0.04, ..plain(index) },
                    _ => plain(index),
                })
                .collect(),
            Self::Dying => {
                (0..4).map(|index| Spec { outages: outages(&mut random), ..plain(index) }).collect()
            }
        }
    }
}

fn spec(name: &str, cores: u64, speed: f32) -> Spec {
    let systems: BTreeSet<String> = ["x86_64-linux".to_owned()].into();
    let line = Machine::for_uri(&format!("ssh-ng://{name}"), systems).expect("a URI");
    Spec {
        line: Machine { max_jobs: cores, speed_factor: speed, ..line },
        cores: cores as f64,
        bandwidth: 1000.0 * MBIT,
        round_trip: 0.001,
        foreign: Vec::new(),
        outages: Vec::new(),
    }
}

/// Seconds for which somebody uses a machine or leaves it alone: from two minutes to four hours. Each doubling is as likely
/// as any other, since what people do with computers is mostly short, while most of the time goes to what is long.
fn episode(random: &mut Random) -> f64 {
    120.0 * (14_400.0_f64 / 120.0).powf(random.between(0.0, 1.0))
}

/// Somebody else's builds: 16 to 40 tasks on 8 processors for minutes or hours, then nothing.
fn comes_and_goes(random: &mut Random) -> Vec<(f64, f64)> {
    let mut foreign = Vec::new();
    let mut at = random.between(0.0, 60.0);
    while at < HORIZON {
        foreign.push((at, random.between(16.0, 40.0)));
        at += episode(random);
        foreign.push((at, 0.0));
        at += episode(random);
    }
    foreign
}

/// Dead for some minutes, about once in two hours.
fn outages(random: &mut Random) -> Vec<(f64, f64)> {
    let mut outages = Vec::new();
    let mut at = random.exponential(3600.0);
    while at < HORIZON {
        let back = at + random.between(60.0, 600.0);
        outages.push((at, back));
        at = back + random.exponential(7200.0);
    }
    outages
}
