//! Asking machines before the reply when none is known to answer. Nix waits meanwhile, so one that is slow to answer does
//! not hold up the next: the first to answer gets the build, and the others keep their masters for later.

use crate::builder::Ahead;
use crate::plan::machine::Machine;
use crate::reach::{Reach, ReachError, Reached};
use nix_derivation::StoreDir;
use nix_offload_proxy::master::OpenError;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// How long a machine is alone in the race before the next one enters it: one that is well has answered by then, and
/// with several that are well the choice is not left to chance.
pub(super) const STAGGER: Duration = Duration::from_millis(1500);

/// Each keeps its own time limit, give or take this.
const GRACE: Duration = Duration::from_secs(3);

/// One machine, and how long it may take.
pub(super) struct Runner<'a> {
    /// Its place in the list.
    pub(super) index: usize,
    pub(super) machine: &'a Machine,
    pub(super) bound: Duration,
}

/// A machine and what became of it.
type Arrival = (usize, Result<Reached, ReachError>);

/// How it went.
pub(super) struct Raced {
    /// The first that can be used, with the connection if it is still of use.
    pub(super) winner: Option<(usize, Option<Box<Reached>>)>,
    /// Those that had more time than a machine takes that is well, and have not answered.
    pub(super) slow: Vec<usize>,
    /// Those that failed before that.
    pub(super) failed: Vec<(usize, ReachError)>,
}

/// Connects to them in their order, to the next one when those before it have failed or taken too long, until one is
/// reached that is `good`. If there is another one that is known to answer (`has_other`), it stands behind the first.
pub(super) fn race(
    reach: &Reach,
    store_dir: &StoreDir,
    runners: &[Runner<'_>],
    has_other: bool,
    good: impl Fn(usize, Reached) -> Result<Option<Reached>, ReachError>,
) -> Raced {
    let mut raced = Raced { winner: None, slow: Vec::new(), failed: Vec::new() };
    let (done, results) = mpsc::channel();
    let longest = runners.iter().map(|runner| runner.bound).max().unwrap_or_default() + GRACE;
    let mut waiting = runners.iter();
    let mut running: Vec<(&Runner<'_>, Instant)> = Vec::new();
    loop {
        let next = if has_other && running.len() + raced.failed.len() > 0 { None } else { waiting.next() };
        match next {
            Some(runner) => {
                running.push((runner, Instant::now()));
                start(reach, store_dir, runner, done.clone());
            }
            None if running.is_empty() => return raced,
            None => {}
        }
        let is_followed = has_other || waiting.len() > 0;
        let (index, reached): Arrival =
            match results.recv_timeout(if is_followed { STAGGER } else { longest }) {
                Ok(arrival) => arrival,
                Err(_) if is_followed && !has_other => continue,
                Err(_) => {
                    if has_other {
                        raced.slow = running.iter().map(|(runner, _)| runner.index).collect();
                    } else {
                        // They had their time, or met with a fault of ours.
                        raced.failed.extend(running.iter().map(|(runner, _)| {
                            let late = OpenError::TimedOut { bound: runner.bound, master_answers: false };
                            (runner.index, late.into())
                        }));
                    }
                    return raced;
                }
            };
        running.retain(|(runner, _)| runner.index != index);
        match reached.and_then(|reached| good(index, reached)) {
            Ok(reached) => {
                raced.winner = Some((index, reached.map(Box::new)));
                let slow = running.iter().filter(|(_, begin)| begin.elapsed() >= STAGGER);
                raced.slow = slow.map(|(runner, _)| runner.index).collect();
                return raced;
            }
            Err(error) => raced.failed.push((index, error)),
        }
    }
}

/// Nobody waits for those that come too late; what they learn of their machine is noted all the same, if this process lives
/// so long.
fn start(reach: &Reach, store_dir: &StoreDir, runner: &Runner<'_>, done: Sender<Arrival>) {
    let (reach, store_dir, machine) = (reach.clone(), store_dir.clone(), runner.machine.clone());
    let (index, bound) = (runner.index, runner.bound);
    thread::spawn(move || {
        let reached = reach.connect(&machine, &store_dir, bound, &Ahead::default());
        let _ = done.send((index, reached));
    });
}
