//! Where Nix's settings are written down: the lines of nix.conf, so that a finding can point at one.
//!
//! What a setting comes to is asked of Nix. Must never open a file (the caller passes a function for that).

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::finding::Spot;
use crate::plan::machine::Place;
use std::path::Path;

/// Files may include files so deep; more can only be a circle.
const MAX_INCLUDE_DEPTH: usize = 16;

/// A line that gives a setting a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Assignment {
    /// The setting.
    pub(super) name: String,
    /// The value, its words with one blank between them as Nix joins them.
    pub(super) value: String,
    /// The setting's name in the text.
    pub(super) spot: Spot,
    /// The column at which the value begins; that of the name if there is none.
    pub(super) value_column: usize,
}

impl Assignment {
    /// The part of the value that has this word.
    pub(super) fn word(&self, word: &str) -> Spot {
        let behind = self.spot.line.chars().skip(self.value_column.saturating_sub(1)).collect::<String>();
        let Some((before, _)) = behind.split_once(word) else { return self.spot.clone() };
        let mut spot = self.spot.clone();
        spot.place.column = self.value_column + before.chars().count();
        spot.width = word.chars().count();
        spot
    }
}

/// The assignments of a text in their order, with those of the files that it includes (`parseConfigFiles` in Nix 2.34
/// `src/libutil/configuration.cc`). What Nix would refuse is left out: Nix says so itself.
pub(super) fn assignments(
    source: &str,
    text: &str,
    read: &mut dyn FnMut(&str) -> Option<String>,
) -> Vec<Assignment> {
    let mut found = Vec::new();
    collect(source, text, read, 0, &mut found);
    found
}

fn collect(
    source: &str,
    text: &str,
    read: &mut dyn FnMut(&str) -> Option<String>,
    depth: usize,
    found: &mut Vec<Assignment>,
) {
    for (index, line) in text.split('\n').enumerate() {
        let code = line.split('#').next().unwrap_or_default();
        let words: Vec<&str> = code.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["include" | "!include", file] if depth < MAX_INCLUDE_DEPTH => {
                let beside = Path::new(source).parent().unwrap_or(Path::new("/"));
                let path = beside.join(file).to_string_lossy().into_owned();
                if let Some(text) = read(&path) {
                    collect(&path, &text, read, depth + 1, found);
                }
            }
            [name, "=", value @ ..] => {
                let column = |word: &str, behind: usize| {
                    let at = code[behind..].find(word).map_or(0, |at| at + behind);
                    code[..at].chars().count() + 1
                };
                let equals = code.find('=').map_or(0, |at| at + 1);
                let name_column = column(name, 0);
                found.push(Assignment {
                    name: (*name).to_owned(),
                    value: value.join(" "),
                    spot: Spot {
                        place: Place { source: source.to_owned(), line: index + 1, column: name_column },
                        line: line.trim_end().to_owned(),
                        width: name.chars().count(),
                    },
                    value_column: value.first().map_or(name_column, |first| column(first, equals)),
                });
            }
            _ => {}
        }
    }
}

/// The line that gave a setting its value; the last one wins.
pub(super) fn last<'a>(assignments: &'a [Assignment], name: &str) -> Option<&'a Assignment> {
    assignments.iter().rev().find(|assignment| assignment.name == name)
}
