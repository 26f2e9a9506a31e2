//! The last decision about each derivation, for people who ask later.

use super::Ledger;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
}

impl Last {
    /// When it was.
    pub fn time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.at.min(u32::MAX.into()))
    }
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

    /// Keeps a decision. That it cannot be kept only leaves somebody without an answer.
    pub fn note(&self, drv_path: &str, ranking: &str, now: SystemTime) {
        let at = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if let Ok(text) = serde_json::to_string(&Last { at, ranking: ranking.to_owned() }) {
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
        decided.note("/nix/store/x.drv", "first", now);
        decided.note("/nix/store/x.drv", "1. mac\n\tsecond \"line\"\n", now);
        let last = decided.last("/nix/store/x.drv").unwrap();
        assert_eq!((last.time(), last.ranking.as_str()), (now, "1. mac\n\tsecond \"line\"\n"));
    }
}
