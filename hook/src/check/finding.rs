//! What is wrong, where, and the cure: the noun, and its forms for people and for scripts.
//!
//! Must never look for faults itself.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::config::Problem;
use crate::plan::machine::Place;
use serde_json::{Value, json};
use std::fmt;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Severity {
    /// It cannot work as it is configured.
    Error,
    /// It is allowed, and surely not what was meant.
    Warning,
}

impl Severity {
    /// The word for people and scripts.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// A piece of a text that a finding can point at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Spot {
    /// Where it begins. Line 0 stands for a whole file, and an empty source for no text at all.
    pub(super) place: Place,
    /// The whole line it stands in.
    pub(super) line: String,
    /// Its length in characters.
    pub(super) width: usize,
}

impl Spot {
    /// A whole file.
    pub(super) fn file(source: &str) -> Self {
        Self { place: Place { source: source.to_owned(), ..Place::default() }, ..Self::default() }
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    /// How bad it is.
    pub(super) severity: Severity,
    /// The culprit.
    pub(super) spot: Spot,
    /// What is wrong.
    pub(super) message: String,
    /// What to do about it.
    pub(super) cure: String,
}

impl Finding {
    /// Something that cannot work.
    pub(super) fn error(spot: &Spot, message: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { severity: Severity::Error, spot: spot.clone(), message: message.into(), cure: cure.into() }
    }

    /// Something that is allowed and surely not meant.
    pub(super) fn warning(spot: &Spot, message: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(spot, message, cure) }
    }

    /// As an object; `null` stands for a place that there is not.
    pub(super) fn json(&self) -> Value {
        let Place { source, line, column } = &self.spot.place;
        let number = |number: usize| if number == 0 { Value::Null } else { number.into() };
        json!({
            "severity": self.severity.as_str(),
            "source": if source.is_empty() { Value::Null } else { source.as_str().into() },
            "line": number(*line),
            "column": number(*column),
            "width": number(if *line == 0 { 0 } else { self.spot.width }),
            "message": self.message,
            "hint": self.cure,
        })
    }
}

impl From<Problem> for Finding {
    fn from(problem: Problem) -> Self {
        let Problem { place, line, width, message, cure } = problem;
        Self { severity: Severity::Error, spot: Spot { place, line, width }, message, cure }
    }
}

impl fmt::Display for Finding {
    /// Several lines: place and message, the line itself, a caret under the culprit, the cure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { source, line, column } = &self.spot.place;
        write!(f, "{}: ", self.severity.as_str())?;
        match (source.as_str(), line) {
            ("", _) => {}
            (source, 0) => write!(f, "{source}: ")?,
            (source, line) => write!(f, "{source}:{line}:{column}: ")?,
        }
        writeln!(f, "{}", self.message)?;
        if *line > 0 {
            // A byte order mark takes no room on a screen.
            let plain = |c: char| if c.is_control() || c == '\u{feff}' { ' ' } else { c };
            let shown: String = self.spot.line.chars().map(plain).collect();
            writeln!(f, "  {}", shown.trim_end())?;
            writeln!(f, "  {}{}", " ".repeat(column.saturating_sub(1)), "^".repeat(self.spot.width.max(1)))?;
        }
        write!(f, "  {}", self.cure)
    }
}

/// In the order of their places; what has none comes first.
pub(super) fn sort(findings: &mut Vec<Finding>) {
    findings.sort_by(|a, b| {
        let key = |finding: &Finding| {
            let Place { source, line, column } = finding.spot.place.clone();
            (source, line, column, finding.severity)
        };
        key(a).cmp(&key(b))
    });
    findings.dedup();
}

/// How many there are of that kind.
pub(super) fn count(findings: &[Finding], severity: Severity) -> usize {
    findings.iter().filter(|finding| finding.severity == severity).count()
}
