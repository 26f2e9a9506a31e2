//! Asking machines before the reply when none is known to answer. Nix waits meanwhile, so one that is slow to answer does
//! not hold up the next: the first to answer gets the build, and the others keep their masters for later.

use crate::builder::Ahead;
use crate::derivation;
use crate::plan::machine::Machine;
use crate::reach::{Reach, ReachError, Reached};
use nix_derivation::StoreDir;
use nix_offload_proxy::master::OpenError;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a machine is alone in the race before the next one enters it: one that is well has answered by then, and
/// with several that are well the choice is not left to chance.
pub(super) const STAGGER: Duration = Duration::from_millis(1500);

/// It has no more than this share of its time for itself.
const FIRST_SHARE: f64 = 0.3;

/// When one has not answered, those behind it follow in these parts of that time: the next one so that it has a start, and
/// when that is silent too, all others soon.
const NEXT: [u32; 2] = [3, 15];

/// Each keeps its own time limit, give or take this.
const GRACE: Duration = Duration::from_secs(3);

/// When nobody is to wait any longer, those whose time is over by then have this long to say how they failed.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Machines that have answered in the last moment have this long, all together, to say that they take the build.
pub(super) const CHECKING: Duration = Duration::from_secs(1);

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
#[derive(Default)]
pub(super) struct Raced {
    /// The first that can be used, with the connection if it is still of use.
    pub(super) winner: Option<(usize, Option<Box<Reached>>)>,
    /// Those that had more time than a machine takes that is well, and have not answered.
    pub(super) slow: Vec<usize>,
    /// Those that failed before that.
    pub(super) failed: Vec<(usize, ReachError)>,
    /// Those that were still being asked when nobody was to wait any longer.
    pub(super) late: Option<Late>,
}

/// Machines that are still being asked while nobody waits for their answer.
pub(super) struct Late {
    /// Their places in the list.
    pub(super) asked: HashSet<usize>,
    results: Receiver<Arrival>,
}

impl Late {
    /// What has come of one of them, if anything has by now.
    pub(super) fn hear(&mut self) -> Option<Arrival> {
        match self.results.try_recv() {
            Ok(arrival) => {
                self.asked.remove(&arrival.0);
                Some(arrival)
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                // A fault of ours.
                self.asked.clear();
                None
            }
        }
    }
}

/// Connects to one while there is another machine that is known to answer, which is not to wait for it any longer than a
/// machine takes that is well, nor longer than `until`. It is to be `good`, too.
pub(super) fn ask_one(
    reach: &Reach,
    store_dir: &StoreDir,
    runner: &Runner<'_>,
    until: Option<Instant>,
    good: impl Fn(usize, Reached) -> Result<Option<Reached>, ReachError>,
) -> Raced {
    let mut raced = Raced::default();
    let (done, results) = mpsc::channel();
    let running = vec![(runner, Instant::now())];
    start(reach, store_dir, runner, done);
    let end = until.map(|until| until + last_words(&running, until));
    let left = end.map(|end| end.saturating_duration_since(Instant::now()));
    match results.recv_timeout(left.map_or(STAGGER, |left| left.min(STAGGER))) {
        Ok(arrival) => drop(raced.see(arrival, good)),
        Err(_) if end.is_some_and(|end| Instant::now() >= end) => raced.end(running, results),
        Err(_) => raced.slow.push(runner.index),
    }
    raced
}

/// Connects to them in their order, to the next one when those before it have failed or taken too long, until one is
/// reached that is `good`. `until` is when nobody is to wait any longer, whoever has had no time then.
pub(super) fn race(
    reach: &Reach,
    store_dir: &StoreDir,
    runners: &[Runner<'_>],
    until: Option<Instant>,
    good: impl Fn(usize, Reached) -> Result<Option<Reached>, ReachError>,
) -> Raced {
    let mut raced = Raced::default();
    let (done, results) = mpsc::channel();
    let longest = runners.iter().map(|runner| runner.bound).max().unwrap_or_default() + GRACE;
    let mut waiting = runners.iter();
    let mut running: Vec<(&Runner<'_>, Instant)> = Vec::new();
    loop {
        let is_begun = running.len() + raced.failed.len() > 0;
        let is_closed = is_begun && until.is_some_and(|until| Instant::now() >= until);
        let next = if is_closed { None } else { waiting.next() };
        match next {
            Some(runner) => {
                running.push((runner, Instant::now()));
                start(reach, store_dir, runner, done.clone());
            }
            None if running.is_empty() => return raced,
            None => {}
        }
        let is_followed = waiting.len() > 0;
        let bound = if is_followed { pause(&running) } else { longest };
        let end = until.map(|until| until + last_words(&running, until));
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        match results.recv_timeout(left.map_or(bound, |left| left.min(bound))) {
            Ok(arrival) => {
                running.retain(|(runner, _)| runner.index != arrival.0);
                if raced.see(arrival, &good) {
                    let slow = running.iter().filter(|(_, begin)| begin.elapsed() >= STAGGER);
                    raced.slow = slow.map(|(runner, _)| runner.index).collect();
                    return raced;
                }
                if until.is_some_and(|until| Instant::now() >= until + CHECKING) {
                    raced.end(running, results);
                    return raced;
                }
            }
            Err(_) if end.is_some_and(|end| Instant::now() >= end) => {
                raced.end(running, results);
                return raced;
            }
            Err(_) if is_followed => {}
            Err(_) => {
                // They had their time, or met with a fault of ours.
                raced.failed.extend(running.iter().map(|(runner, _)| runner.timed_out()));
                return raced;
            }
        }
    }
}

impl Raced {
    /// What has come of one. Whether it gets the build.
    fn see(
        &mut self,
        (index, reached): Arrival,
        good: impl Fn(usize, Reached) -> Result<Option<Reached>, ReachError>,
    ) -> bool {
        match reached.and_then(|reached| good(index, reached)) {
            Ok(reached) => self.winner = Some((index, reached.map(Box::new))),
            Err(error) => self.failed.push((index, error)),
        }
        self.winner.is_some()
    }

    /// Nobody waits any longer.
    fn end(&mut self, mut running: Vec<(&Runner<'_>, Instant)>, results: Receiver<Arrival>) {
        // Of those that answered while another one was seen through, it is known now that they are well.
        while let Ok((index, reached)) = results.try_recv() {
            running.retain(|(runner, _)| runner.index != index);
            self.failed.extend(reached.err().map(|error| (index, error)));
        }
        let mut asked = HashSet::new();
        for (runner, begin) in &running {
            let ran = begin.elapsed();
            if ran >= runner.bound {
                self.failed.push(runner.timed_out());
                continue;
            }
            if ran >= STAGGER {
                self.slow.push(runner.index);
            }
            asked.insert(runner.index);
        }
        self.late = (!asked.is_empty()).then_some(Late { asked, results });
    }
}

impl Runner<'_> {
    fn timed_out(&self) -> (usize, ReachError) {
        (self.index, OpenError::TimedOut { bound: self.bound, master_answers: false }.into())
    }
}

/// Logs that this machine gets the build in the place of the one that was chosen: it was asked too and was the first to
/// answer, or it is known to answer.
pub(super) fn log_instead(derivation: &str, builder: &str, was_asked: bool) {
    let name = derivation::name_in(derivation);
    let (event, why) = match was_asked {
        true => ("answered first", "answered first"),
        false => ("known to answer", "is known to answer"),
    };
    tracing::info!(event, derivation, builder, "{builder} {why} and gets '{name}'");
}

/// How long those that run are left alone.
fn pause(running: &[(&Runner<'_>, Instant)]) -> Duration {
    let first = running.first().map_or(STAGGER, |(runner, _)| STAGGER.min(runner.bound.mul_f64(FIRST_SHARE)));
    match running.len() {
        0 | 1 => first,
        2 => first / NEXT[0],
        _ => first / NEXT[1],
    }
}

/// Whether, and for how long, to wait for those whose own time ends `until` then.
fn last_words(running: &[(&Runner<'_>, Instant)], until: Instant) -> Duration {
    let ends = |(runner, begin): &(&Runner<'_>, Instant)| *begin + runner.bound <= until + LAST_WORDS;
    if running.iter().any(ends) { LAST_WORDS } else { Duration::ZERO }
}

/// Nobody waits for those that come too late; what they learn of their machine is noted all the same, if this process
/// still lives.
fn start(reach: &Reach, store_dir: &StoreDir, runner: &Runner<'_>, done: Sender<Arrival>) {
    let (reach, store_dir, machine) = (reach.clone(), store_dir.clone(), runner.machine.clone());
    let (index, bound) = (runner.index, runner.bound);
    let ask = Arc::new(move || {
        let reached = reach.connect(&machine, &store_dir, bound, &Ahead::default());
        let _ = done.send((index, reached));
    });
    let asks = Arc::clone(&ask);
    if let Err(error) = thread::Builder::new().spawn(move || asks()) {
        tracing::warn!(event = "cannot start a thread", %error, "cannot start a thread, so one machine is asked at a time: {error}");
        ask();
    }
}
