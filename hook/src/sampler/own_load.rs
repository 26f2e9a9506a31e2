//! How much of a machine's load average is due to builds of this client: the same average over the same minute, of
//! taken slots.

use crate::plan::Sample;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What is left of a load average over one minute after a millisecond, of whose logarithm a minute makes -1 (`EXP_1` in
/// include/linux/sched/loadavg.h).
const KEPT: f64 = 1.0 - 1.0 / 60_000.5;

/// The average of one machine.
#[derive(Debug, Clone)]
pub(super) struct OwnLoad {
    average: f64,
    at: Instant,
    /// Whether the slots can be seen at all.
    is_known: bool,
}

/// The slots that are taken on one machine at one moment, by the directory of their lock files.
#[derive(Debug, Default)]
pub(super) struct Builds(HashMap<PathBuf, u64>);

impl Builds {
    /// So many are taken, as one line of a list has it. Those lines with the same URI share their slots, of which one may
    /// have more than another.
    pub(super) fn note(&mut self, directory: &Path, taken: u64) {
        match self.0.get_mut(directory) {
            Some(most) => *most = taken.max(*most),
            None => drop(self.0.insert(directory.to_owned(), taken)),
        }
    }

    /// How many that is in all.
    pub(super) fn count(&self) -> u64 {
        self.0.values().sum()
    }
}

impl OwnLoad {
    /// Begins with what was known before, or with nothing: before there was somebody to count there was no build.
    pub(super) fn after(before: Option<&Sample>, now: Instant) -> Self {
        let last = before.and_then(|sample| Some((sample.own_load?, sample.at.elapsed().ok()?)));
        let average = last.filter(|(load, _)| load.is_finite()).map_or(0.0, |(load, age)| faded(load, age));
        Self { average, at: now, is_known: false }
    }

    /// How many slots have been taken since the last count; none if that cannot be seen.
    pub(super) fn count(&mut self, taken: Option<u64>, now: Instant) {
        self.is_known = taken.is_some();
        let Some(taken) = taken.map(|taken| taken as f64) else { return };
        let age = now.saturating_duration_since(self.at);
        self.average = taken + faded(self.average - taken, age);
        self.at = now;
    }

    /// The average, if it is known.
    pub(super) fn value(&self) -> Option<f64> {
        self.is_known.then_some((self.average.max(0.0) * 1000.0).round() / 1000.0)
    }
}

fn faded(load: f64, age: Duration) -> f64 {
    // A power, for `exp` would be all that this program has the mathematical library for, which each hook would load.
    load * KEPT.powi(i32::try_from(age.as_millis()).unwrap_or(i32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn it_rises_and_falls_as_the_load_average_does_however_often_one_counts() {
        let begin = Instant::now();
        let after = |step: u64| {
            let mut load = OwnLoad::after(None, begin);
            for second in (0..=60).step_by(step as usize) {
                load.count(Some(4), begin + Duration::from_secs(second));
            }
            load
        };
        let expected = 4.0 * (1.0 - (-1.0f64).exp());
        for step in [1, 5, 60] {
            assert!((after(step).value().unwrap() - expected).abs() < 0.001, "{step}");
        }
        let mut load = after(1);
        load.count(Some(0), begin + Duration::from_secs(120));
        assert!((load.value().unwrap() - expected * (-1.0f64).exp()).abs() < 0.001);
    }

    #[test]
    fn lines_of_one_machine_share_their_slots_and_stores_have_slots_of_their_own() {
        let mut builds = Builds::default();
        assert_eq!(builds.count(), 0);
        for (directory, taken) in [("/a", 1), ("/a", 3), ("/a", 2), ("/b", 4)] {
            builds.note(Path::new(directory), taken);
        }
        assert_eq!(builds.count(), 7);
    }

    #[test]
    fn what_cannot_be_counted_is_not_known() {
        let begin = Instant::now();
        let mut load = OwnLoad::after(None, begin);
        assert_eq!(load.value(), None);
        load.count(Some(1), begin);
        assert_eq!(load.value(), Some(0.0));
        load.count(None, begin + Duration::from_secs(5));
        assert_eq!(load.value(), None);
    }

    #[test]
    fn it_goes_on_where_an_earlier_process_ended() {
        let at = SystemTime::now() - Duration::from_secs(60);
        let before = Sample { own_load: Some(2.0), ..Sample::empty(at) };
        let mut load = OwnLoad::after(Some(&before), Instant::now());
        load.count(Some(0), Instant::now());
        assert!((load.value().unwrap() - 2.0 * (-1.0f64).exp()).abs() < 0.01);
    }
}
