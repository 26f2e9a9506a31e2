//! Graphs of builds: who needs whose outputs, how long each takes, how much has to travel.
//!
//! All durations and sizes of outputs are drawn from distributions; `graphs/debian.txt` has real dependencies and sizes.

use crate::random::Random;

/// One build.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// Seconds on an idle machine of speed 1.
    pub(crate) work: f64,
    /// Processors that it keeps busy all that time.
    pub(crate) threads: u32,
    /// Bytes of its outputs.
    pub(crate) output: u64,
    /// Bytes of sources that only it needs.
    pub(crate) source: u64,
    /// Builds that must be done before, by number; all are smaller than its own.
    pub(crate) needs: Vec<usize>,
    /// Those of them that its outputs refer to.
    refers: Vec<usize>,
}

/// Builds in an order in which each stands behind those that it needs.
#[derive(Debug, Clone)]
pub(crate) struct Graph {
    pub(crate) jobs: Vec<Job>,
    /// For each build the builds whose outputs must be on the machine.
    pub(crate) inputs: Vec<Set>,
}

/// A set of builds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Set(Vec<u64>);

impl Set {
    pub(crate) fn empty(size: usize) -> Self {
        Self(vec![0; size.div_ceil(64)])
    }

    pub(crate) fn insert(&mut self, member: usize) {
        self.0[member / 64] |= 1 << (member % 64);
    }

    fn extend(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(own, other)| *own |= other);
    }

    /// Members that are not in the other set.
    pub(crate) fn without<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = usize> + 'a {
        self.0.iter().zip(&other.0).enumerate().flat_map(|(word, (own, other))| {
            let mut left = own & !other;
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros() as usize;
                left &= left.wrapping_sub(1);
                (bit < 64).then_some(word * 64 + bit)
            })
        })
    }
}

/// The kinds of graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Shape {
    /// Many builds of the same size that need nothing of each other.
    Wide,
    /// Few long chains.
    Deep,
    /// Layers of random sizes with durations of all sorts.
    Mixed,
    /// Like a whole system: most builds are small, a few take very long, some use several processors.
    System,
    /// Packages of Debian with what they depend on.
    Debian,
}

const KIB: f64 = 1024.0;
const MIB: f64 = 1024.0 * KIB;

impl Shape {
    pub(crate) const ALL: [Self; 5] = [Self::Wide, Self::Deep, Self::Mixed, Self::System, Self::Debian];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Wide => "wide",
            Self::Deep => "deep",
            Self::Mixed => "mixed",
            Self::System => "system",
            Self::Debian => "debian",
        }
    }

    /// A graph of this shape. `scale` is 1 for full size and smaller for tests.
    pub(crate) fn make(self, seed: u64, scale: f64) -> Graph {
        let mut random = Random::new(seed);
        let count = |full: usize| ((full as f64 * scale) as usize).max(8);
        let jobs = match self {
            Self::Wide => wide(&mut random, count(600)),
            Self::Deep => deep(&mut random, 6, count(60)),
            Self::Mixed => mixed(&mut random, count(800)),
            Self::System => system(&mut random, count(10_000)),
            Self::Debian => debian(&mut random, count(DEBIAN_PACKAGES)),
        };
        Graph::new(jobs)
    }
}

impl Graph {
    fn new(jobs: Vec<Job>) -> Self {
        let count = jobs.len();
        // What comes along with each output: itself and what it refers to, and so on.
        let mut closures: Vec<Set> = Vec::with_capacity(count);
        let mut inputs = Vec::with_capacity(count);
        for (index, job) in jobs.iter().enumerate() {
            let union = |which: &[usize]| {
                let mut all = Set::empty(count);
                which.iter().for_each(|other| all.extend(&closures[*other]));
                all
            };
            inputs.push(union(&job.needs));
            let mut closure = union(&job.refers);
            closure.insert(index);
            closures.push(closure);
        }
        Self { inputs, jobs }
    }
}

/// A build with what it needs; a part of that is referred to by its outputs.
fn job(random: &mut Random, work: f64, output: f64, source: f64, needs: Vec<usize>) -> Job {
    let mut needs = needs;
    needs.sort_unstable();
    needs.dedup();
    let refers = needs.iter().copied().filter(|_| random.chance(0.4)).collect();
    Job { work, threads: 1, output: output as u64, source: source as u64, needs, refers }
}

fn wide(random: &mut Random, count: usize) -> Vec<Job> {
    let toolchain = job(random, 1.0, 200.0 * MIB, 1.0 * MIB, vec![]);
    let mut jobs = vec![toolchain];
    for _ in 1..count {
        let (work, output) = (random.between(20.0, 40.0), random.log_normal(2.0 * MIB, 1.0));
        jobs.push(job(random, work, output, 0.2 * MIB, vec![0]));
    }
    jobs
}

fn deep(random: &mut Random, chains: usize, length: usize) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    for step in 0..length {
        for chain in 0..chains {
            let mut needs = Vec::new();
            if step > 0 {
                needs.push((step - 1) * chains + chain);
                // Now and then the chains exchange something.
                if random.chance(0.05) {
                    needs.push((step - 1) * chains + random.below(chains));
                }
            }
            let (work, output) = (random.log_normal(15.0, 0.6), random.log_normal(20.0 * MIB, 1.0));
            jobs.push(job(random, work, output, 0.2 * MIB, needs));
        }
    }
    jobs
}

fn mixed(random: &mut Random, count: usize) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut layer = 0..0;
    while jobs.len() < count {
        let start = jobs.len();
        let width = 1 + random.log_normal(15.0, 1.0).min(100.0) as usize;
        for _ in 0..width {
            let needs = (0..1 + random.below(3))
                .filter(|_| !layer.is_empty())
                .map(|_| layer.start + random.below(layer.len()))
                .collect();
            let (work, output) = (random.log_normal(12.0, 1.3), random.log_normal(3.0 * MIB, 1.5));
            jobs.push(job(random, work, output, 0.5 * MIB, needs));
        }
        layer = start..jobs.len();
    }
    jobs
}

/// Most of what a system is made of are small files and wrappers that take a second, a part are packages of some
/// minutes, and a few are compilers, browsers and kernels that keep several processors busy for a long time. New builds
/// need older ones, popular ones more often.
fn system(random: &mut Random, count: usize) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    for index in 0..count {
        let mut needs = Vec::new();
        if index > 0 {
            let wanted = 1 + random.exponential(3.0).min(30.0) as usize;
            for _ in 0..wanted {
                let pick = if random.chance(0.3) {
                    random.below(index.min(40))
                } else {
                    // Those made lately are needed most.
                    let back = random.exponential(count as f64 / 20.0) as usize;
                    index.saturating_sub(1 + back)
                };
                needs.push(pick);
            }
        }
        let kind = random.unit();
        let (work, threads, output) = if kind < 0.70 {
            (random.log_normal(1.0, 0.7), 1, random.log_normal(20.0 * KIB, 1.5))
        } else if kind < 0.97 {
            (random.log_normal(40.0, 1.1), 1 + random.below(2) as u32, random.log_normal(3.0 * MIB, 1.5))
        } else {
            let work = random.log_normal(300.0, 0.9).min(5400.0);
            (work, 2 + random.below(3) as u32, random.log_normal(60.0 * MIB, 1.0))
        };
        let source = random.log_normal(if kind < 0.70 { 2.0 * KIB } else { 1.0 * MIB }, 1.5);
        jobs.push(Job { threads, ..job(random, work, output.min(2048.0 * MIB), source, needs) });
    }
    jobs
}

const DEBIAN: &str = include_str!("graphs/debian.txt");
const DEBIAN_PACKAGES: usize = 869;

/// Real dependencies and sizes. How long a package takes to build is drawn around a figure that grows with its size.
fn debian(random: &mut Random, count: usize) -> Vec<Job> {
    let lines = DEBIAN.lines().filter(|line| !line.starts_with('#'));
    lines
        .take(count)
        .map(|line| {
            let mut words = line.split(' ').skip(1);
            let kib: f64 = words.next().and_then(|word| word.parse().ok()).expect("a size");
            let needs = words.next().expect("a list").split(',').filter(|word| *word != "-");
            let needs: Vec<usize> = needs.map(|word| word.parse().expect("a line")).collect();
            let work = random.log_normal(2.0 * kib.max(1.0).powf(0.4), 0.8);
            Job { refers: needs.clone(), ..job(random, work, kib * KIB, kib * KIB / 4.0, needs) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn graphs_are_the_same_for_the_same_seed_and_need_only_what_stands_before() {
        for shape in Shape::ALL {
            let (graph, again) = (shape.make(7, 0.05), shape.make(7, 0.05));
            let facts = |graph: &Graph| -> Vec<(u64, usize)> {
                graph.jobs.iter().map(|job| (job.work.to_bits(), job.needs.len())).collect()
            };
            assert_eq!(facts(&graph), facts(&again));
            assert_ne!(facts(&graph), facts(&shape.make(8, 0.05)), "{}", shape.label());
            for (index, job) in graph.jobs.iter().enumerate() {
                assert!(job.needs.iter().all(|need| *need < index), "{}", shape.label());
            }
        }
        assert_eq!(Shape::Debian.make(1, 1.0).jobs.len(), DEBIAN_PACKAGES);
        assert_eq!(Shape::System.make(1, 1.0).jobs.len(), 10_000);
    }
}
