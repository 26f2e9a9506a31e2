//! How long builds took and how large their outputs were, by the name of the package.

use super::Ledger;
use std::path::Path;

/// How much a new build counts in the average.
const NEWEST: f64 = 0.4;

/// And in that of all builds.
const NEWEST_OF_ALL: f64 = 1.0 / 64.0;

/// How many builds it takes until one that was like them is not written down.
const SETTLED: u64 = 3;

/// The fewest seconds that a build takes, which is as exact as they are kept. One that was over before its hook looked at
/// the clock is noted as 0, with which all machines would be done at the same time, however crowded they are.
const LEAST: f64 = 0.001;

/// Where the average of all builds is. No derivation can have this name.
const ALL: &str = "*";

/// The memory of earlier builds: some 16,000 names.
#[derive(Debug, Clone)]
pub struct History(Ledger);

/// What is known of builds of one name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Record {
    /// Seconds on an idle machine of speed factor 1; a moving average.
    pub seconds: f64,
    /// Bytes of the outputs' NARs together; a moving average.
    pub output: f64,
    /// How many builds it is made of.
    pub builds: u64,
}

impl History {
    /// The memory in a state directory.
    pub fn at(state: &Path) -> Self {
        Self(Ledger { directory: state.join("history"), files: 256, keep: 64 })
    }

    /// What is known of builds of a derivation's name.
    pub fn of(&self, name: &str) -> Option<Record> {
        self.read(&package(name))
    }

    /// The average of all builds lately.
    pub fn usual(&self) -> Option<Record> {
        self.read(ALL)
    }

    /// Seconds that builds of many names take, where it is known. No file is read twice.
    pub fn seconds_of(&self, names: &[&str]) -> Vec<Option<f64>> {
        let keys: Vec<String> = names.iter().map(|name| package(name)).collect();
        let seconds = |text: Option<String>| Some(Record::parse(&text?)?.seconds);
        self.0.get_all(&keys).into_iter().map(seconds).collect()
    }

    /// Notes how many seconds a build took, and how many bytes its outputs have. That it cannot be noted only costs time.
    pub fn note(&self, name: &str, seconds: f64, output: u64) {
        if !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        let new = Record { seconds, output: output as f64, builds: 1 };
        self.fold(&package(name), &new, NEWEST);
        self.fold(ALL, &new, NEWEST_OF_ALL);
    }

    fn fold(&self, key: &str, new: &Record, newest: f64) {
        let before = self.read(key);
        if before.is_some_and(|old| old.builds >= SETTLED && old.is_like(new)) {
            return;
        }
        let record = before.map_or(*new, |old| {
            let builds = old.builds.saturating_add(1);
            // The first ones count the same.
            let newest = newest.max(1.0 / builds as f64);
            let mean = |old: f64, new: f64| old + (new - old) * newest;
            Record { seconds: mean(old.seconds, new.seconds), output: mean(old.output, new.output), builds }
        });
        let _ = self.0.put(key, &format!("{:.3} {:.0} {}", record.seconds, record.output, record.builds));
    }

    fn read(&self, key: &str) -> Option<Record> {
        Record::parse(&self.0.get(key)?)
    }
}

impl Record {
    /// Whether another build like that would change nothing that matters.
    fn is_like(&self, new: &Self) -> bool {
        let alike = |old: f64, new: f64, least: f64| (old - new).abs() <= (old * 0.1).max(least);
        alike(self.seconds, new.seconds, 0.1) && alike(self.output, new.output, 100e3)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let mut number = || words.next()?.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0);
        let (seconds, output) = (number()?, number()?);
        Some(Self { seconds: seconds.max(LEAST), output, builds: words.next()?.parse().ok()? })
    }
}

/// The name without the version, which begins at the first `-` before a digit, as in Nix's `DrvName`
/// (`src/libstore/names.cc`, Nix 2.34). Two versions of a package take about as long.
fn package(name: &str) -> String {
    let ends = |(at, _): &(usize, &str)| !name[at + 1..].starts_with(|c: char| c.is_alphabetic());
    let end = name.match_indices('-').find(ends).map_or(name.len(), |(at, _)| at);
    let package = if end == 0 { name } else { &name[..end] };
    package.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_a_package_share_their_history() {
        for (name, expected) in [
            ("zlib-1.2.13", "zlib"),
            ("python3.11-six-1.16", "python3.11-six"),
            ("unit-nix.service", "unit-nix.service"),
            ("a-", "a"),
            ("-1", "-1"),
            ("", ""),
        ] {
            assert_eq!(package(name), expected, "{name}");
        }
    }

    #[test]
    fn many_names_are_looked_up_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::at(directory.path());
        let names: Vec<String> = (0..600).map(|number| format!("p{number}x-1")).collect();
        for (number, name) in names.iter().enumerate().filter(|(number, _)| number % 3 > 0) {
            history.note(name, number as f64, 0);
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let one_by_one: Vec<Option<f64>> =
            names.iter().map(|name| history.of(name).map(|record| record.seconds)).collect();
        assert_eq!(history.seconds_of(&names), one_by_one);
        assert_eq!((one_by_one[0], one_by_one[1]), (None, Some(1.0)));
    }

    #[test]
    fn the_usual_build_is_the_average_of_all() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::at(directory.path());
        assert_eq!(history.usual(), None);
        for (name, seconds) in [("a", 10.0), ("b", 40.0), ("c-2", 100.0)] {
            history.note(name, seconds, 1000);
        }
        assert_eq!(history.usual(), Some(Record { seconds: 50.0, output: 1000.0, builds: 3 }));
        (0..1000).for_each(|number| history.note(&format!("d{number}"), 1.0, 1000));
        let usual = history.usual().unwrap().seconds;
        assert!((1.0..2.0).contains(&usual), "{usual}");
    }

    #[test]
    fn builds_are_averaged_and_nonsense_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::at(directory.path());
        assert_eq!(history.of("a-1"), None);
        history.note("a-1", 10.0, 1000);
        assert_eq!(history.of("a-2"), Some(Record { seconds: 10.0, output: 1000.0, builds: 1 }));
        history.note("a-2", 20.0, 2000);
        assert_eq!(history.of("a"), Some(Record { seconds: 15.0, output: 1500.0, builds: 2 }));
        history.note("c", 0.0, 1);
        assert_eq!(history.of("c").unwrap().seconds, LEAST);
        history.note("a-2", f64::NAN, 1);
        history.note("a-2", -1.0, 1);
        assert_eq!(history.of("a").unwrap().builds, 2);
        for _ in 0..9 {
            history.note("b", 1.0, 1000);
        }
        assert_eq!(history.of("b").unwrap().builds, SETTLED);
        history.note("b", 2.0, 1000);
        assert_eq!(history.of("b").unwrap().builds, SETTLED + 1);
        for nonsense in ["", "1", "nan 1 1", "-1 1 1", "1 inf 1", "1 1 x"] {
            history.0.put("a", nonsense).unwrap();
            assert_eq!(history.of("a"), None, "{nonsense}");
        }
    }
}
