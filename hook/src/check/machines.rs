//! A list of machines that can be read: what in it is allowed and surely wrong.
//!
//! Owns the rules that need no more than the text. Must never look at a file or ask a name service: what is to be looked at
//! is handed back.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::finding::{Finding, Spot};
use super::known::{self, Word};
use crate::config::{self, Entry, Fleet};
use crate::plan::here;
use crate::plan::machine::{Machine, Place, Scheme};
use base64::Engine as _;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv6Addr;

/// Columns of a machine's line.
const COLUMNS: usize = 8;
/// A machine a thousand times as fast as another, or as slow, is none.
const FAST: f32 = 1000.0;
const SLOW: f32 = 0.001;
/// Stands at the beginning of files that some editors write.
const BYTE_ORDER_MARK: char = '\u{feff}';
/// The store that Nix takes unless it is told otherwise.
const USUAL: &str = "auto";
const QUOTES: [char; 2] = ['"', '\''];

/// What this machine has by itself.
#[derive(Debug, Clone, Default)]
pub(super) struct Own {
    /// Its systems.
    pub(super) systems: BTreeSet<String>,
    /// Its features.
    pub(super) features: BTreeSet<String>,
    /// Where its daemon listens.
    pub(super) socket: String,
}

/// What was found, and what is left to be looked at by others.
#[derive(Debug, Default)]
pub(super) struct Judged {
    /// What is wrong.
    pub(super) findings: Vec<Finding>,
    /// Files with private keys.
    pub(super) keys: Vec<(Spot, String)>,
    /// Machines that ssh connects to.
    pub(super) hosts: Vec<Target>,
}

/// A machine that ssh connects to, and the words that say so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Where its host stands.
    pub(super) spot: Spot,
    /// What ssh is told.
    pub(super) host: Host,
    /// Whether builds would wait for themselves if it were this very machine: its store is the usual one.
    pub(super) must_be_elsewhere: bool,
}

/// What ssh is told of a machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Host {
    /// `[user@]host`.
    pub(super) destination: String,
    /// The port, if the URI has one.
    pub(super) port: Option<u16>,
}

impl Host {
    /// The host without the user.
    pub(super) fn name(&self) -> &str {
        self.destination.rsplit_once('@').map_or(&self.destination, |(_, host)| host)
    }
}

/// Judges a list: `texts` are all that were read for it, by their names.
pub(super) fn judge(texts: &BTreeMap<String, String>, fleet: &Fleet, own: &Own) -> Judged {
    let mut judged = Judged::default();
    judged.findings.extend(fleet.problems.iter().cloned().map(Finding::from));
    // By line and column, for a machine knows no more of where it comes from.
    let mut entries: HashMap<(&str, usize, usize), Entry<'_>> = HashMap::new();
    for (source, text) in texts {
        judged.text(source, text);
        for entry in config::entries(text) {
            judged.layout(source, &entry);
            entries.insert((source, entry.number, entry.words[0].0 + 1), entry);
        }
    }
    let mut seen: HashMap<String, Vec<&Machine>> = HashMap::new();
    for machine in &fleet.machines {
        let Place { source, line, column } = &machine.place;
        let Some(entry) = entries.get(&(source.as_str(), *line, *column)) else { continue };
        let line = Line { source, entry };
        judged.uri(&line, machine, own);
        judged.columns(&line, machine, own);
        judged.host_key(&line, machine);
        judged.twins(&line, machine, &mut seen);
    }
    judged.missing(&entries, fleet);
    judged
}

/// An entry and the text it stands in.
struct Line<'a> {
    source: &'a str,
    entry: &'a Entry<'a>,
}

impl Line<'_> {
    /// A whole column; the first one where there is no such column.
    fn column(&self, index: usize) -> Spot {
        let word = self.entry.words.get(index).unwrap_or(&self.entry.words[0]);
        spot(self.source, self.entry, word.0, word.1.chars().count())
    }

    /// A part of a column, which begins `at` bytes behind the column's begin.
    fn part(&self, index: usize, at: usize, part: &str) -> Spot {
        let mut spot = self.column(index);
        if let Some(before) = self.entry.words.get(index).and_then(|(_, word)| word.get(..at)) {
            spot.place.column += before.chars().count();
            spot.width = part.chars().count();
        }
        spot
    }

    /// The name of a parameter of the URI; the whole URI if it is written in another way.
    fn parameter(&self, name: &str) -> Spot {
        let word = self.entry.words[0].1;
        let at = ['?', '&'].iter().find_map(|mark| word.find(&format!("{mark}{name}=")));
        at.map_or_else(|| self.column(0), |at| self.part(0, at + 1, name))
    }

    /// A piece of the URI between scheme and parameters; the whole URI if it is written in another way.
    fn authority(&self, piece: &str) -> Spot {
        let word = self.entry.words[0].1;
        let begin = word.find("://").map_or(0, |at| at + 3);
        let end = word.find('?').filter(|end| *end >= begin).unwrap_or(word.len());
        // The host stands last.
        let at = word.get(begin..end).and_then(|authority| authority.rfind(piece));
        at.map_or_else(|| self.column(0), |at| self.part(0, begin + at, piece))
    }

    /// The items of a column that is a list, with their places.
    fn items(&self, index: usize) -> Vec<(Spot, String)> {
        let word = self.entry.words.get(index).map_or("", |(_, word)| *word);
        let mut at = 0;
        let mut items = Vec::new();
        for item in word.split(',') {
            if !matches!(item, "" | "-") {
                // Of quotes more is said elsewhere.
                items.push((self.part(index, at, item), item.trim_matches(QUOTES).to_owned()));
            }
            at += item.len() + 1;
        }
        items
    }
}

fn spot(source: &str, entry: &Entry<'_>, column: usize, width: usize) -> Spot {
    Spot {
        place: Place { source: source.to_owned(), line: entry.number, column: column + 1 },
        line: entry.line.trim_end().to_owned(),
        width,
    }
}

impl Judged {
    fn warn(&mut self, spot: &Spot, message: impl Into<String>, cure: impl Into<String>) {
        self.findings.push(Finding::warning(spot, message, cure));
    }

    /// What is wrong with a text as a whole.
    fn text(&mut self, source: &str, text: &str) {
        let first = |line: usize, text: &str, column: usize| Spot {
            place: Place { source: source.to_owned(), line, column },
            line: text.trim_end().to_owned(),
            width: 1,
        };
        if text.starts_with(BYTE_ORDER_MARK) {
            self.findings.push(Finding::error(
                &first(1, text.lines().next().unwrap_or_default(), 1),
                "the text begins with a byte order mark (BOM), which Nix takes for part of the first word",
                "save it as UTF-8 without BOM",
            ));
        }
        if let Some((at, line)) = text.split('\n').enumerate().find(|(_, line)| line.ends_with('\r')) {
            self.warn(
                &first(at + 1, line, line.chars().count()),
                "lines end in carriage returns (CRLF), as on Windows",
                format!("save it with Unix line ends: sed -i 's/\\r$//' {source}"),
            );
        }
    }

    /// What is wrong with an entry's columns as they are divided.
    fn layout(&mut self, source: &str, entry: &Entry<'_>) {
        if entry.words[0].1.starts_with('@') {
            return;
        }
        let line = Line { source, entry };
        if let Some(at) = entry.words.iter().position(|(_, word)| word.contains(QUOTES)) {
            self.warn(
                &line.column(at),
                "there is a quote in it, which Nix takes for a letter",
                "leave the quotes out; a blank within a column is written as %20 in a URI, and nowhere else",
            );
        }
        let comma =
            entry.words.windows(2).position(|pair| pair[0].1.ends_with(',') || pair[1].1.starts_with(','));
        if let Some(at) = comma {
            self.warn(
                &line.column(at + 1),
                "there is a blank beside a comma, and a blank begins the next column",
                "write the list without blanks, for instance x86_64-linux,aarch64-linux",
            );
        } else if entry.words.len() > COLUMNS {
            self.warn(
                &line.column(COLUMNS),
                format!("there are {} columns; what is behind the {COLUMNS}th is ignored", entry.words.len()),
                "machines are separated by line ends or ';', comments begin with '#'",
            );
        }
    }

    /// What is wrong with column 1.
    fn uri(&mut self, line: &Line<'_>, machine: &Machine, own: &Own) {
        let word = line.entry.words[0].1;
        let is_here = machine.uri.here().is_some();
        if let Some((written, _)) = word.split_once("://") {
            let scheme = written.trim_start_matches(BYTE_ORDER_MARK).trim_matches(QUOTES);
            self.scheme(&line.part(0, 0, written), scheme);
        }
        for name in machine.uri.params.keys() {
            self.parameter(line, name);
        }
        // Of other kinds of stores we do not know what they mean.
        let is_known = is_here || !matches!(machine.uri.scheme, Scheme::Other(_));
        let query = word.split_once('?').filter(|_| is_known).map_or("", |(_, query)| query);
        for pair in query.split('&').filter(|pair| !pair.is_empty() && !pair.contains('=')) {
            let at = ['?', '&'].iter().find_map(|mark| word.find(&format!("{mark}{pair}")));
            let spot = at.map_or_else(|| line.column(0), |at| line.part(0, at + 1, pair));
            let message = format!("the parameter '{pair}' has no value, so it is ignored");
            self.warn(&spot, message, format!("write '{pair}=' and a value behind it, or take it out"));
        }
        if let Some(slip) = machine.uri.slip() {
            let end = word.find('?').unwrap_or(word.len());
            self.warn(&line.part(0, 0, &word[..end]), slip.message, slip.cure);
        }
        if is_here {
            if here::opened(machine, USUAL).is_some_and(|opened| opened.is_usual(&own.socket)) {
                self.warn(
                    &line.column(0),
                    "this is the store of this very machine, so it gets no builds",
                    "take the line out; how much is built here is Nix's setting 'max-jobs'",
                );
            }
            return;
        }
        if matches!(machine.uri.scheme, Scheme::Other(_)) {
            return;
        }
        let host = Host { destination: machine.uri.destination.clone(), port: machine.uri.port };
        let user = host.destination.rsplit_once('@').map(|(user, _)| user);
        if let Some((_, port)) = user.and_then(|user| user.split_once(':')) {
            self.warn(
                &line.authority(&format!(":{port}@")),
                format!("'{port}' stands behind the user; ssh takes it for part of his name"),
                "a port stands behind the host: ssh-ng://user@host:22; a password cannot be given",
            );
        }
        if !word.contains('[')
            && let Some((address, port)) = host.name().rsplit_once(':')
            && matches!(port, "22" | "2222")
            && address.parse::<Ipv6Addr>().is_ok()
        {
            self.warn(
                &line.authority(host.name()),
                format!("'{port}' is taken for the last part of the IPv6 address, not for a port"),
                format!("put the address in brackets: [{address}]:{port}"),
            );
        }
        let opened = here::by_program(&machine.uri, USUAL);
        let must_be_elsewhere = opened.is_some_and(|opened| opened.is_usual(&own.socket));
        self.hosts.push(Target { spot: line.authority(host.name()), host, must_be_elsewhere });
    }

    fn scheme(&mut self, spot: &Spot, scheme: &str) {
        if known::is_cache(scheme) {
            self.warn(
                spot,
                format!("a store of the kind '{scheme}' keeps what was built, and cannot build"),
                "name it in Nix's setting 'substituters', and take the line out",
            );
        } else if let Word::Meant(known) = known::scheme(scheme) {
            self.warn(
                spot,
                format!("there is no store of the kind '{scheme}'"),
                format!("did you mean '{known}'?"),
            );
        }
    }

    fn parameter(&mut self, line: &Line<'_>, name: &str) {
        let spot = line.parameter(name);
        let message = format!("no store has the parameter '{name}', so it is ignored");
        match (name, known::parameter(name)) {
            (_, Word::Known) => {}
            ("port", _) => self.warn(&spot, message, "the port stands behind the host: ssh-ng://host:22"),
            ("user", _) => self.warn(&spot, message, "the user stands before the host: ssh-ng://user@host"),
            (_, Word::Meant(known)) => self.warn(&spot, message, format!("did you mean '{known}'?")),
            (_, Word::Unknown) => self.warn(
                &spot,
                message,
                "options of ssh belong in ssh_config, in a 'Host' block for this machine",
            ),
        }
    }

    /// What is wrong with columns 2 to 7.
    fn columns(&mut self, line: &Line<'_>, machine: &Machine, own: &Own) {
        let column =
            |index: usize| line.entry.words.get(index).map(|(_, word)| *word).filter(|word| *word != "-");
        for (spot, system) in line.items(1) {
            let cure = match known::system(&system, own.systems.iter().map(String::as_str)) {
                Word::Known => continue,
                Word::Meant(known) => format!("did you mean '{known}'?"),
                Word::Unknown => "write it as architecture and system, for instance x86_64-linux".into(),
            };
            self.warn(&spot, format!("'{system}' is no system that Nix knows (column 2)"), cure);
        }
        if let Some(file) = column(2) {
            self.keys.push((line.column(2), file.to_owned()));
        } else if let Some(file) = machine.identity_file() {
            self.keys.push((line.parameter("ssh-key"), file.to_owned()));
        }
        if machine.max_jobs == 0 {
            self.warn(
                &line.column(3),
                "the machine may run no builds at all (column 4)",
                "write how many it may run at the same time; to do without it, begin its line with '#'",
            );
        }
        if let Some(speed) = column(4) {
            let number = speed.parse::<f32>().unwrap_or(1.0);
            let what = "the speed factor (column 5)";
            let cure =
                "write its speed in relation to the other machines, for instance 1 or 1.5, or '-' for 1";
            if number == 0.0 {
                self.warn(&line.column(4), format!("{what} is 0, which counts as 1"), cure);
            } else if !(SLOW..=FAST).contains(&number) {
                self.warn(&line.column(4), format!("{what} is odd: {speed}"), cure);
            }
        }
        for index in [5, 6] {
            for (spot, feature) in line.items(index) {
                if let Word::Meant(known) = known::feature(&feature, own.features.iter().map(String::as_str))
                {
                    let message =
                        format!("no derivation asks for the feature '{feature}' (column {})", index + 1);
                    self.warn(&spot, message, format!("did you mean '{known}'?"));
                }
            }
        }
    }

    /// A key that can be decoded and is no key.
    fn host_key(&mut self, line: &Line<'_>, machine: &Machine) {
        let Some(text) = &machine.host_key else { return };
        let spot = match line.entry.words.get(7).filter(|(_, word)| *word != "-") {
            Some(_) => line.column(7),
            None => line.parameter("base64-ssh-public-host-key"),
        };
        for key in text.lines().filter(|line| !line.trim().is_empty()) {
            if let Err(wrong) = is_public_key(key) {
                self.findings.push(Finding::error(
                    &spot,
                    format!("the public host key (column 8) is none: {wrong}"),
                    "take it from the machine: base64 -w0 /etc/ssh/ssh_host_ed25519_key.pub",
                ));
                return;
            }
        }
    }

    /// Two lines for one machine whose builds both can take.
    fn twins<'a>(
        &mut self,
        line: &Line<'_>,
        machine: &'a Machine,
        seen: &mut HashMap<String, Vec<&'a Machine>>,
    ) {
        let earlier = seen.entry(normal(machine)).or_default();
        let overlaps = |other: &&&Machine| {
            let shares = other.systems.is_empty()
                || machine.systems.is_empty()
                || !other.systems.is_disjoint(&machine.systems);
            shares && other.mandatory_features == machine.mandatory_features
        };
        if let Some(first) = earlier.iter().find(overlaps) {
            let Place { source, line: number, column } = &first.place;
            // Slots are counted by the name.
            let slots = if first.name == machine.name || first.uri == machine.uri {
                "the two share their slots"
            } else {
                "each has slots of its own, so it gets the builds of both"
            };
            self.warn(
                &line.column(0),
                format!("this machine is there already: {source}:{number}:{column}; {slots}"),
                "make one line of the two, or take one out",
            );
        }
        earlier.push(machine);
    }

    /// Lists that are named and are not there.
    fn missing(&mut self, entries: &HashMap<(&str, usize, usize), Entry<'_>>, fleet: &Fleet) {
        for (&(source, ..), entry) in entries {
            let Some(file) = entry.text.trim().strip_prefix('@').map(str::trim) else { continue };
            if fleet.missing_files.iter().any(|missing| missing == file) {
                let spot = spot(source, entry, entry.words[0].0, entry.text.trim().chars().count());
                self.warn(
                    &spot,
                    format!("there is no file '{file}', so no machines come from it"),
                    "correct the name behind '@', or write the file",
                );
            }
        }
    }
}

/// The URI in the one form that all its spellings have.
fn normal(machine: &Machine) -> String {
    let mut uri = machine.uri.clone();
    let name = match uri.destination.rsplit_once('@') {
        Some((user, host)) => format!("{user}@{}", host.to_lowercase()),
        None => uri.destination.to_lowercase(),
    };
    uri.destination = name;
    // What is not about who is connected to.
    uri.params.retain(|name, value| {
        matches!(name.as_str(), "remote-store" | "root" | "store") && !value.is_empty()
    });
    uri.render().unwrap_or_else(|| machine.name.clone())
}

/// Whether a line is `TYPE BASE64 [COMMENT]`, where the key says the same type of itself.
fn is_public_key(line: &str) -> Result<(), String> {
    let mut words = line.split_whitespace();
    let (kind, body) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let looks_like =
        |kind: &str| ["ssh-", "ecdsa-", "sk-", "rsa-sha2-"].iter().any(|head| kind.starts_with(head));
    if !looks_like(kind) {
        return Err(if looks_like(body) {
            format!(
                "it begins with the host '{kind}', as in known_hosts; only the type and the key belong there"
            )
        } else {
            format!("it does not begin with a type such as ssh-ed25519, but with '{kind}'")
        });
    }
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(body)
        .map_err(|_| "it is cut or changed".to_owned())?;
    let named = bytes.first_chunk::<4>().and_then(|length| {
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        bytes.get(4..length.checked_add(4)?)
    });
    match named {
        Some(name) if name == kind.as_bytes() => Ok(()),
        Some(name) => Err(format!("it says '{kind}', and the key '{}'", String::from_utf8_lossy(name))),
        None => Err("it is cut or changed".into()),
    }
}
