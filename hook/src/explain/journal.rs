//! What the journal has of a decision of earlier.
//!
//! Must never be taken for more than a note: it is there only where journald is, and the level lets it.

use crate::nix_here;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long journalctl may take.
const BOUND: Duration = Duration::from_secs(20);
/// Entries about one derivation that are looked at, the newest first.
const MOST: &str = "200";
/// The events that are decisions, by `EVENT`; `MESSAGE` was the same before there was that.
const DECISIONS: [&str; 8] = [
    "answered first",
    "asked Nix's own hook",
    "chosen",
    "declined",
    "known to answer",
    "not for us",
    "postponed",
    "waiting",
];

/// A decision as the journal has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Noted {
    /// When it was made.
    pub(super) at: SystemTime,
    /// What was decided, and why.
    pub(super) text: String,
}

/// The last decision about a derivation that the journal has.
pub(super) fn last(drv_path: &str) -> Option<Noted> {
    // The service of a daemon may have no PATH to speak of.
    let program = ["/usr/bin/journalctl", "/run/current-system/sw/bin/journalctl"];
    let program = program.into_iter().find(|program| Path::new(program).exists()).unwrap_or("journalctl");
    let mut command = Command::new(program);
    command.args(["-t", "nix-offload", "-o", "json", "--all", "--no-pager", "-q", "-r", "-n", MOST]);
    let answer = nix_here::run(command.arg(format!("DERIVATION={drv_path}")), BOUND).ok()?;
    answer.stdout.lines().find_map(noted)
}

fn noted(line: &str) -> Option<Noted> {
    let entry: Value = serde_json::from_str(line).ok()?;
    let message = entry["EVENT"].as_str().or_else(|| entry["MESSAGE"].as_str())?;
    if !DECISIONS.contains(&message) {
        return None;
    }
    let at: u64 = entry["__REALTIME_TIMESTAMP"].as_str()?.parse().ok()?;
    let field = |name: &str| entry[name].as_str().filter(|text| !text.is_empty());
    let text = match (field("REASON"), field("BUILDER")) {
        // It begins with the answer.
        (Some(reason), _) if matches!(message, "chosen" | "declined" | "postponed" | "waiting") => {
            reason.to_owned()
        }
        (Some(reason), _) => format!("{message}: {reason}"),
        (None, Some(builder)) => format!("{message}: {builder}"),
        (None, None) => message.to_owned(),
    };
    Some(Noted { at: UNIX_EPOCH + Duration::from_micros(at), text: format!("{}\n", text.trim_end()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_are_told_from_other_events() {
        let text = |line: &str| noted(line).map(|noted| noted.text);
        let at = r#""__REALTIME_TIMESTAMP":"1700000000000000""#;
        let chosen = format!(
            r#"{{"MESSAGE":"chosen","BUILDER":"ssh://a","REASON":"to be built on ssh://a: x",{at}}}"#
        );
        assert_eq!(
            noted(&chosen),
            Some(Noted {
                at: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
                text: "to be built on ssh://a: x\n".into()
            })
        );
        let first = format!(r#"{{"MESSAGE":"answered first","BUILDER":"ssh://b",{at}}}"#);
        assert_eq!(text(&first).as_deref(), Some("answered first: ssh://b\n"));
        let unfit = format!(r#"{{"MESSAGE":"not for us","REASON":"it cannot be parsed",{at}}}"#);
        assert_eq!(text(&unfit).as_deref(), Some("not for us: it cannot be parsed\n"));
        let named = format!(
            r#"{{"EVENT":"declined","MESSAGE":"'a': left to Nix: y","REASON":"left to Nix: y\n  row",{at}}}"#
        );
        assert_eq!(text(&named).as_deref(), Some("left to Nix: y\n  row\n"));
        let built = format!(r#"{{"EVENT":"built","MESSAGE":"chosen",{at}}}"#);
        assert_eq!(text(&built), None);
        for other in [format!(r#"{{"MESSAGE":"built",{at}}}"#), r#"{"MESSAGE":"chosen"}"#.into(), "x".into()]
        {
            assert_eq!(text(&other), None, "{other}");
        }
    }
}
