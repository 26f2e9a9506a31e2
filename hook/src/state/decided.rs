//! The last decision about each derivation and what came of it, for people who ask later.

use super::Ledger;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What is kept of how a build ended on one machine, in characters: a builder may have said much in one line.
const MOST_TEXT: usize = 300;

/// The memory of decisions: some 4,000 derivations.
#[derive(Debug, Clone)]
pub struct Decided(Ledger);

/// A decision of earlier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Last {
    /// Seconds since 1970.
    at: u64,
    /// The ranking as it was told then.
    pub ranking: String,
    /// Where it was tried since Nix asked for it, in the order of time.
    #[serde(default)]
    pub trials: Vec<Trial>,
}

/// How a build fared on one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// Seconds since 1970.
    at: u64,
    /// The machine's name.
    pub machine: String,
    /// How it ended.
    pub end: End,
    /// One line more of that; may be empty.
    pub text: String,
}

/// How it ended on one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// It has not, as far as is known.
    Open,
    /// The outputs are here.
    Built,
    /// The build itself failed.
    Failed,
    /// The machine could not be used.
    GivenUp,
    /// The same when it had begun there.
    BrokenOff,
    /// It was stopped there to begin anew on a better machine.
    Moved,
}

impl Last {
    /// When it was.
    pub fn time(&self) -> SystemTime {
        time(self.at)
    }
}

impl Trial {
    /// The first line of `text` is kept, or its beginning.
    pub fn new(machine: &str, end: End, text: &str, now: SystemTime) -> Self {
        let line = text.lines().next().unwrap_or_default();
        let text = match line.char_indices().nth(MOST_TEXT) {
            Some((end, _)) => format!("{}...", &line[..end]),
            None => line.to_owned(),
        };
        Self { at: seconds(now), machine: machine.to_owned(), end, text }
    }

    /// When it ended, or began if it has not ended.
    pub fn time(&self) -> SystemTime {
        time(self.at)
    }
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn time(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds.min(u32::MAX.into()))
}

impl Decided {
    /// The memory in a state directory.
    pub fn at(state: &Path) -> Self {
        Self(Ledger { directory: state.join("decided"), files: 1024, keep: 4 })
    }

    /// The last decision about a derivation.
    pub fn last(&self, drv_path: &str) -> Option<Last> {
        serde_json::from_str(&self.0.get(drv_path)?).ok()
    }

    /// Keeps a decision that was made at a time, and what came of it. That it cannot be kept only leaves somebody without
    /// an answer.
    pub fn note(&self, drv_path: &str, ranking: &str, trials: &[Trial], at: SystemTime) {
        let last = Last { at: seconds(at), ranking: ranking.to_owned(), trials: trials.to_vec() };
        if let Ok(text) = serde_json::to_string(&last) {
            let _ = self.0.put(drv_path, &text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_decision_is_kept_with_all_its_lines() {
        let directory = tempfile::tempdir().unwrap();
        let decided = Decided::at(directory.path());
        assert_eq!(decided.last("/nix/store/x.drv"), None);
        let now = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        decided.note("/nix/store/x.drv", "first", &[], now);
        let trials = [Trial::new("mac", End::GivenUp, "refused\nhint", now)];
        decided.note("/nix/store/x.drv", "1. mac\n\tsecond \"line\"\n", &trials, now);
        let last = decided.last("/nix/store/x.drv").unwrap();
        assert_eq!((last.time(), last.ranking.as_str()), (now, "1. mac\n\tsecond \"line\"\n"));
        assert_eq!((last.trials[0].text.as_str(), last.trials[0].time()), ("refused", now));
        let long = "ü".repeat(1 << 20);
        let trials = [Trial::new("mac", End::Failed, &long, now)];
        decided.note("/nix/store/x.drv", "again", &trials, now);
        let last = decided.last("/nix/store/x.drv").unwrap();
        assert_eq!(last.trials[0].text, format!("{}...", "ü".repeat(300)));
        // As it was kept before there were trials.
        decided.0.put("/nix/store/y.drv", r#"{"at":1700000000,"ranking":"x"}"#).unwrap();
        assert_eq!(decided.last("/nix/store/y.drv").unwrap().trials, []);
    }
}
