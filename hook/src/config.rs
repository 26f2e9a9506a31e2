//! The list of machines and Nix's settings, read into typed values.
//!
//! Owns the machine format: columns, defaults, comments, `@file`. Every fault points at a file, a line and a
//! column. Must never open a file itself (the caller passes a function for that) nor default silently.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod rules;

use crate::plan::Local;
use crate::plan::machine::{Machine, Place};
use base64::Engine as _;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;

/// Files may include files so deep; more can only be a circle.
pub const MAX_INCLUDE_DEPTH: usize = 16;

/// What the caller's reader says of an included file: its text, or `None` when there is no such file.
pub type ReadFile<'a> = &'a dyn Fn(&str) -> io::Result<Option<String>>;

/// The machines that could be read, and what is wrong with the others.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fleet {
    /// Usable machines in the order of the list.
    pub machines: Vec<Machine>,
    /// One entry for each line or file that was skipped.
    pub problems: Vec<Problem>,
    /// Included files that do not exist: no fault to Nix, but good to know when no machine is found.
    pub missing_files: Vec<String>,
}

/// A line of the list that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where the culprit stands.
    pub place: Place,
    /// The whole line it stands in.
    pub line: String,
    /// Length of the culprit in characters.
    pub width: usize,
    /// What is wrong, and what is lost by it.
    pub message: String,
    /// What to do about it.
    pub cure: String,
}

impl fmt::Display for Problem {
    /// Several lines: place and message, the line itself, a caret under the culprit, the cure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { source, line, column } = &self.place;
        writeln!(f, "{source}:{line}:{column}: {}", self.message)?;
        let shown: String = self.line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        writeln!(f, "  {shown}")?;
        let indent = " ".repeat(column.saturating_sub(1));
        writeln!(f, "  {indent}{}", "^".repeat(self.width.max(1)))?;
        write!(f, "  {}", self.cure)
    }
}

/// Reads the value of Nix's setting `builders`.
///
/// `source` is the name that faults in this text are reported under. The rules are those of Nix 2.34
/// `src/libstore/machines.cc`, where a comment ends at the end of its line even if a `;` is in it; unlike there,
/// a fault costs only its own line.
pub fn parse_machines(
    source: &str,
    text: &str,
    default_systems: &BTreeSet<String>,
    read_file: ReadFile<'_>,
) -> Fleet {
    let mut fleet = Fleet::default();
    Reader { default_systems, read_file, fleet: &mut fleet }.text(source, text, 0);
    fleet
}

/// The machines that Nix's setting `builders` names, or another text of that form, called as this Nix calls them.
pub fn fleet(settings: &Settings, source: &str, text: &str, read_file: ReadFile<'_>) -> Fleet {
    let mut fleet = parse_machines(source, text, &settings.default_systems(), read_file);
    if settings.renders_uris() {
        for machine in &mut fleet.machines {
            // The names of slots are made from it, and those are shared with stock hooks.
            machine.name = machine.uri.render().unwrap_or_else(|| machine.name.clone());
        }
    }
    fleet
}

struct Reader<'a> {
    default_systems: &'a BTreeSet<String>,
    read_file: ReadFile<'a>,
    fleet: &'a mut Fleet,
}

/// A word and the character offset at which it begins in its line.
pub type Word<'a> = (usize, &'a str);

/// A machine, or an `@file`, as it stands in a text: between line ends, `;` and comments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Its line's number, from 1.
    pub number: usize,
    /// The whole line.
    pub line: &'a str,
    /// All of the entry, blanks around it included.
    pub text: &'a str,
    /// Its columns, each with the character offset at which it begins in the line. At least one.
    pub words: Vec<Word<'a>>,
}

/// The entries of a list's text that are not empty.
pub fn entries(text: &str) -> impl Iterator<Item = Entry<'_>> {
    text.split('\n').enumerate().flat_map(|(index, line)| {
        let code = line.split('#').next().unwrap_or_default();
        let mut offset = 0;
        code.split(';').filter_map(move |text| {
            let words = words(text, offset);
            offset += text.chars().count() + 1;
            (!words.is_empty()).then_some(Entry { number: index + 1, line, text, words })
        })
    })
}

impl Reader<'_> {
    fn text(&mut self, source: &str, text: &str, depth: usize) {
        for entry in entries(text) {
            self.entry(source, &entry, depth);
        }
    }

    fn entry(&mut self, source: &str, entry: &Entry<'_>, depth: usize) {
        let Some(&(start, first)) = entry.words.first() else { return };
        let problem = |at: Word<'_>, message: String, cure: &str| Problem {
            place: Place { source: source.to_owned(), line: entry.number, column: at.0 + 1 },
            line: entry.line.trim_end().to_owned(),
            width: at.1.chars().count(),
            message,
            cure: cure.to_owned(),
        };
        if let Some(file) = first.strip_prefix('@') {
            // Blanks in a file name are kept, as in Nix: all of the entry is the name.
            let file = entry.text.trim().strip_prefix('@').map_or(file, str::trim);
            if let Err(problem) =
                self.include(file, depth, |message, cure| problem((start, first), message, cure))
            {
                self.fleet.problems.push(problem);
            }
            return;
        }
        let fault = |at: Word<'_>, message: String, cure: &str| {
            problem(at, format!("{message}; this machine is left out"), cure)
        };
        let place = Place { source: source.to_owned(), line: entry.number, column: start + 1 };
        match machine(&entry.words, place, self.default_systems, fault) {
            Ok(machine) => self.fleet.machines.push(machine),
            Err(problem) => self.fleet.problems.push(problem),
        }
    }

    fn include(
        &mut self,
        file: &str,
        depth: usize,
        fault: impl Fn(String, &str) -> Problem,
    ) -> Result<(), Problem> {
        if depth + 1 > MAX_INCLUDE_DEPTH {
            return Err(fault(
                format!("files include each other more than {MAX_INCLUDE_DEPTH} deep"),
                "remove the '@' line that closes the circle",
            ));
        }
        match (self.read_file)(file) {
            Ok(Some(text)) => {
                self.text(file, &text, depth + 1);
                Ok(())
            }
            Ok(None) => {
                self.fleet.missing_files.push(file.to_owned());
                Ok(())
            }
            Err(error) => {
                let message = format!("cannot read '{file}': {error}; its machines are left out");
                Err(fault(message, "name a readable file behind '@'"))
            }
        }
    }
}

/// The words of an entry with their character offsets in the line. Nix splits at blanks, tabs and carriage
/// returns.
fn words(entry: &str, offset: usize) -> Vec<Word<'_>> {
    let mut words = Vec::new();
    let mut start = None;
    for (at, (byte, c)) in entry.char_indices().enumerate() {
        let blank = matches!(c, ' ' | '\t' | '\r' | '\n');
        match (blank, start) {
            (false, None) => start = Some((byte, at)),
            (true, Some((from, column))) => {
                words.push((offset + column, &entry[from..byte]));
                start = None;
            }
            _ => {}
        }
    }
    if let Some((from, column)) = start {
        words.push((offset + column, &entry[from..]));
    }
    words
}

fn machine(
    words: &[Word<'_>],
    place: Place,
    default_systems: &BTreeSet<String>,
    fault: impl Fn(Word<'_>, String, &str) -> Problem,
) -> Result<Machine, Problem> {
    let column = |index: usize| words.get(index).copied().filter(|(_, word)| *word != "-");
    let set = |index: usize| -> Option<BTreeSet<String>> {
        column(index).map(|(_, w)| w.split(',').filter(|s| !s.is_empty()).map(str::to_owned).collect())
    };
    let first = words.first().copied().unwrap_or_default();
    let Some(uri) = column(0) else {
        return Err(fault(
            first,
            "the first column must be a store URI".into(),
            "write the machine as ssh-ng://[user@]host or ssh://[user@]host",
        ));
    };
    let mut machine = Machine::for_uri(uri.1, set(1).unwrap_or_else(|| default_systems.clone()))
        .map_err(|error| fault(uri, error.to_string(), "write it as ssh-ng://[user@]host[:port]"))?;
    machine.place = place;
    machine.identity = column(2).map(|(_, path)| path.to_owned());
    if let Some(at) = column(3) {
        machine.max_jobs = at.1.parse::<u32>().map(u64::from).map_err(|_| {
            fault(
                at,
                format!("the maximum of jobs (column 4) must be a whole number, not '{}'", at.1),
                "write how many builds the machine may run at the same time, or '-' for 1",
            )
        })?;
    }
    if let Some(at) = column(4) {
        let speed = at.1.parse::<f32>().ok().filter(|s| s.is_finite() && *s >= 0.0).ok_or_else(|| {
            fault(
                at,
                format!("the speed factor (column 5) must be a number of 0 or more, not '{}'", at.1),
                "write the machine's speed in relation to the others, for instance 1 or 1.5, or '-' for 1",
            )
        })?;
        machine.speed_factor = if speed == 0.0 { 1.0 } else { speed };
    }
    machine.supported_features = set(5).unwrap_or_default();
    machine.mandatory_features = set(6).unwrap_or_default();
    // As in Nix the column wins over the URI's parameter of the same meaning.
    let in_uri = machine.uri.param("base64-ssh-public-host-key").map(str::to_owned);
    if let Some((at, key)) = column(7).map(|at| (at, at.1.to_owned())).or(in_uri.map(|key| (uri, key))) {
        machine.host_key = Some(decode_host_key(&key).ok_or_else(|| {
            fault(
                at,
                "the public host key (column 8) is not base64 of a key line".into(),
                "take it from the machine: base64 -w0 /etc/ssh/ssh_host_ed25519_key.pub",
            )
        })?);
    }
    Ok(machine)
}

/// A machine's line, in the columns of Nix's format, for a list that another program is to read.
pub fn line(machine: &Machine) -> String {
    let set = |set: &BTreeSet<String>| match set.iter().map(String::as_str).collect::<Vec<_>>().join(",") {
        empty if empty.is_empty() => "-".to_owned(),
        full => full,
    };
    let key = machine.host_key.as_ref().map(|key| base64::engine::general_purpose::STANDARD.encode(key));
    [
        machine.name.clone(),
        set(&machine.systems),
        machine.identity.clone().unwrap_or_else(|| "-".into()),
        machine.max_jobs.to_string(),
        machine.speed_factor.to_string(),
        set(&machine.supported_features),
        set(&machine.mandatory_features),
        key.unwrap_or_else(|| "-".into()),
    ]
    .join(" ")
}

/// A host key is the base64 form of one or more lines `TYPE BASE64 [COMMENT]`.
fn decode_host_key(text: &str) -> Option<String> {
    let engine = base64::engine::GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        base64::engine::GeneralPurposeConfig::new()
            .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
    );
    let key = String::from_utf8(engine.decode(text).ok()?).ok()?;
    let looks_like_keys = key.lines().filter(|l| !l.trim().is_empty()).all(|line| {
        let mut words = line.split_whitespace();
        words.next().is_some_and(|kind| kind.contains('-'))
            && words.next().is_some_and(|body| body.len() > 16)
    });
    (looks_like_keys && !key.trim().is_empty()).then_some(key)
}

/// Nix's settings as it sends them to a hook: name and value, both as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings(pub BTreeMap<String, String>);

impl Settings {
    /// The text of a setting.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A setting read as a boolean; false when absent.
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.get(name), Some("true" | "yes" | "1"))
    }

    /// A setting read as a whole number; `default` when absent or unreadable.
    pub fn number(&self, name: &str, default: u64) -> u64 {
        self.get(name).and_then(|v| v.trim().parse().ok()).unwrap_or(default)
    }

    fn words(&self, name: &str) -> BTreeSet<String> {
        self.get(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
    }

    /// What the local machine could build itself.
    pub fn local(&self) -> Local {
        let mut systems = self.words("extra-platforms");
        systems.extend(self.words("system"));
        Local { max_jobs: self.number("max-jobs", 1), systems, features: self.words("system-features") }
    }

    /// Whether this Nix shows store URIs rendered anew (2.26 and newer) instead of as written: it has this setting.
    pub fn renders_uris(&self) -> bool {
        self.0.contains_key("fsync-store-paths")
    }

    /// The systems a machine builds for when its line does not say.
    pub fn default_systems(&self) -> BTreeSet<String> {
        self.words("system")
    }
}

#[cfg(test)]
mod tests;
