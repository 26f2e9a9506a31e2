//! Nix's settings as they are: what keeps builds from being sent to the machines.
//!
//! Must never ask anybody: what is known of this machine is handed in.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::files::Program;
use super::finding::{Finding, Spot};
use super::known::{self, Word};
use super::nix_conf::{self, Assignment};
use crate::config::Settings;
use crate::nix_here::Version;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// These put their default over a `build-hook` in nix.conf (Nix commits 58b03ef1cd and 0e3a620374).
const IGNORING: std::ops::Range<Version> = (2, 25)..(2, 34);
/// From here on the setting is a list of words, before it was one path.
const HOOK_IS_LIST: Version = (2, 17);
/// Lix from here on has another hook protocol.
const OTHER_PROTOCOL: Version = (2, 94);
/// Settings about where builds go that a daemon takes from trusted users only (`ClientSettings::apply` in Nix 2.34
/// `src/libstore/daemon.cc`).
const RESTRICTED: [&str; 4] = ["builders", "builders-use-substitutes", "extra-platforms", "system-features"];
/// A file that was written so shortly after the daemon's start may have been read by it.
const MARGIN: Duration = Duration::from_secs(2);

/// Who reads the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// Whoever calls Nix: there is no daemon.
    Caller,
    /// The daemon, in whose place Nix was asked.
    Daemon,
    /// The daemon, of whose environment nothing is known.
    UnseenDaemon,
}

/// What is known of this machine.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    /// What Nix says of its version.
    pub(super) version_text: &'a str,
    /// The same as numbers.
    pub(super) version: Option<Version>,
    /// The settings that count.
    pub(super) settings: &'a Settings,
    /// Who reads them.
    pub(super) reader: Reader,
    /// What is written in his files, in the order in which it is read.
    pub(super) written: &'a [Assignment],
    /// The program of the setting `build-hook`.
    pub(super) hook: &'a Program,
    /// This very program.
    pub(super) ourselves: Option<&'a Path>,
    /// How many machines there are.
    pub(super) machines: usize,
    /// How many machines are in the file that Nix reads unless it is told otherwise.
    pub(super) usual_machines: usize,
    /// `NIX_REMOTE` of whoever calls us.
    pub(super) remote: Option<&'a str>,
    /// Whether a daemon listens here.
    pub(super) has_daemon: bool,
}

/// The word of the setting `build-hook` that is the program.
pub(super) fn hook_program(settings: &Settings, version: Option<Version>) -> String {
    let value = settings.get("build-hook").unwrap_or_default();
    if version.is_some_and(|version| version < HOOK_IS_LIST) {
        return value.trim().to_owned();
    }
    value.split_whitespace().next().unwrap_or_default().to_owned()
}

/// What is wrong, and what could not be told.
pub(super) fn judge(facts: &Facts<'_>) -> (Vec<Finding>, Vec<String>) {
    let mut judge = Judge { facts, findings: Vec::new(), notes: Vec::new() };
    judge.hook();
    judge.machines();
    judge.store();
    judge.words();
    (judge.findings, judge.notes)
}

struct Judge<'a> {
    facts: &'a Facts<'a>,
    findings: Vec<Finding>,
    notes: Vec<String>,
}

impl Judge<'_> {
    fn find(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    /// The line of a setting, or its name where no line is known.
    fn spot(&self, name: &str) -> Spot {
        nix_conf::last(self.facts.written, name).map_or_else(|| Spot::file(name), |line| line.spot.clone())
    }

    fn hook(&mut self) {
        let facts = self.facts;
        let value = facts.settings.get("build-hook").unwrap_or_default().trim();
        let program = hook_program(facts.settings, facts.version);
        let line = nix_conf::last(facts.written, "build-hook");
        let spot = self.spot("build-hook");
        let ignores = facts.version.is_some_and(|version| IGNORING.contains(&version));
        if facts.version_text.contains("Lix") && facts.version >= Some(OTHER_PROTOCOL) {
            self.find(Finding::error(
                &spot,
                format!("{} speaks another protocol with hooks than Nix", facts.version_text),
                "use Nix, or Lix before 2.94",
            ));
        }
        if facts.reader == Reader::UnseenDaemon && (ignores || is_stock(value)) {
            self.notes.push(
                "the daemon may have 'build-hook' from its environment; run this as root, with the daemon running, to \
                 see it"
                    .into(),
            );
            return;
        }
        if line.is_some_and(|line| !is_same(&line.value, value)) {
            let (message, cure) = if ignores {
                (
                    format!(
                        "{} ignores this line, as do all versions from 2.25 to 2.33; the hook is '{value}'",
                        facts.version_text
                    ),
                    match facts.reader {
                        Reader::Caller => {
                            "write the line into ~/.config/nix/nix.conf instead, or set NIX_CONFIG='build-hook = ...'"
                        }
                        Reader::Daemon | Reader::UnseenDaemon => {
                            "give it to the daemon in the variable NIX_CONFIG: nix-offload has a drop-in for systemd, \
                             nix-daemon.service.d/nix-offload.conf"
                        }
                    },
                )
            } else {
                (
                    format!("this line does not count: the hook is '{value}'"),
                    "see what overrides it: the daemon's command line, NIX_CONFIG, or the file of a user",
                )
            };
            self.find(Finding::error(&spot, message, cure));
            return;
        }
        if value.is_empty() {
            self.find(Finding::error(
                &spot,
                "Nix has no build hook at all",
                "take the empty line out, or write the path of nix-offload",
            ));
        } else if is_stock(value) {
            let ours =
                facts.ourselves.map_or_else(|| "nix-offload".to_owned(), |path| path.display().to_string());
            let place = if ignores {
                "the daemon's NIX_CONFIG (see nix-daemon.service.d/nix-offload.conf)"
            } else {
                "nix.conf"
            };
            self.find(Finding::warning(
                &spot,
                format!("Nix uses a hook of its own, '{value}', and not nix-offload"),
                format!("put 'build-hook = {ours}' into {place}, and restart the daemon if there is one"),
            ));
        } else {
            self.program(&spot, value, &program);
        }
    }

    fn program(&mut self, spot: &Spot, value: &str, program: &str) {
        let failing = "so no build works, those at home neither";
        match self.facts.hook {
            Program::Absent if program.contains(' ') => self.find(Finding::error(
                spot,
                format!("the hook '{program}' is not there; before Nix 2.17 all of the line is one path"),
                "name the program alone",
            )),
            Program::Absent => self.find(Finding::error(
                spot,
                format!("the hook '{program}' is not there, {failing}"),
                "correct the path, or take the line out, and restart the daemon if there is one",
            )),
            Program::NotExecutable => self.find(Finding::error(
                spot,
                format!("the hook '{program}' cannot be run, {failing}"),
                format!("chmod 755 {program}, and see that its directories can be entered"),
            )),
            Program::Runs(file) => {
                let is_ours = file.file_name().is_some_and(|name| name == "nix-offload")
                    || self.facts.ourselves.is_some_and(|ours| ours == file);
                if !is_ours {
                    self.find(Finding::warning(
                        spot,
                        format!("the hook is '{value}', and not nix-offload"),
                        "name nix-offload there, unless this is meant",
                    ));
                }
            }
            Program::NotSeen => self.notes.push(format!("whether {program} can be run is for root to see")),
        }
    }

    fn machines(&mut self) {
        let facts = self.facts;
        if facts.settings.get("builders").is_some_and(|builders| builders.trim().is_empty())
            && facts.usual_machines > 0
        {
            self.find(Finding::warning(
                &self.spot("builders"),
                format!(
                    "the setting is empty, so the {} of /etc/nix/machines get no builds",
                    plural(facts.usual_machines, "machine")
                ),
                "take the line out, or write 'builders = @/etc/nix/machines'",
            ));
        }
        if facts.machines == 0 && facts.settings.get("max-jobs").is_some_and(|jobs| jobs.trim() == "0") {
            self.find(Finding::warning(
                &self.spot("max-jobs"),
                "it is 0 and there are no machines, so nothing can be built",
                "set 'max-jobs = auto', or name machines in the setting 'builders'",
            ));
        }
    }

    fn store(&mut self) {
        let facts = self.facts;
        let is_daemon = |store: &str| store == "daemon" || store.starts_with("unix://");
        // It is the default of the setting `store`.
        if let Some(remote) = facts.remote.filter(|remote| !remote.is_empty()) {
            if is_daemon(remote) && !facts.has_daemon {
                self.find(Finding::warning(
                    &Spot::file("NIX_REMOTE"),
                    format!("it is '{remote}', and no daemon of Nix runs here"),
                    "start nix-daemon, or unset NIX_REMOTE",
                ));
            } else if is_elsewhere(remote) {
                self.elsewhere("NIX_REMOTE", remote, "unset NIX_REMOTE");
            }
        }
        let store = facts.settings.get("store").unwrap_or_default().trim().to_owned();
        if is_elsewhere(&store) && facts.remote != Some(&store) {
            self.elsewhere("store", &store, "take the line out, or use a store of this machine");
        }
    }

    fn elsewhere(&mut self, name: &str, store: &str, cure: &str) {
        let spot = self.spot(name);
        let message = format!(
            "the store is '{store}': what is built for it is left to Nix's own hook or to that machine"
        );
        self.find(Finding::warning(&spot, message, cure));
    }

    /// Systems and features of this machine that are in no book.
    fn words(&mut self) {
        let mut found = Vec::new();
        for line in self.facts.written {
            let name = line.name.strip_prefix("extra-").unwrap_or(&line.name);
            for word in line.value.split(' ').filter(|word| !word.is_empty()) {
                let (kind, judged) = match (line.name.as_str(), name) {
                    (_, "system-features") => ("feature", known::feature(word, [])),
                    ("extra-platforms" | "extra-extra-platforms" | "system", _) => {
                        ("system", known::system(word, []))
                    }
                    _ => break,
                };
                if let Word::Meant(meant) = judged {
                    let message = format!("nothing asks for the {kind} '{word}'");
                    found.push(Finding::warning(
                        &line.word(word),
                        message,
                        format!("did you mean '{meant}'?"),
                    ));
                }
            }
        }
        self.findings.extend(found);
    }
}

/// Settings of a user that his daemon does not take from him: `files` are his own, `user` is his name.
pub(super) fn untrusted(written: &[Assignment], trusted: bool, user: &str) -> Vec<Finding> {
    let findings = written.iter().filter_map(|line| match line.name.trim_start_matches("extra-") {
        "build-hook" => Some(Finding::warning(
            &line.spot,
            "the daemon takes its hook from nobody but its own configuration",
            "put the line into /etc/nix/nix.conf, and restart the daemon",
        )),
        name if !trusted && (RESTRICTED.contains(&name) || RESTRICTED.contains(&line.name.as_str())) => {
            Some(Finding::warning(
                &line.spot,
                format!("the daemon does not take '{}' from {user}, who is not in 'trusted-users'", line.name),
                "put the line into /etc/nix/nix.conf, or the user into 'trusted-users' there, and restart the daemon",
            ))
        }
        _ => None,
    });
    findings.collect()
}

/// Whether a user is one of those: names, `@group` and `*` (`matchUser` in Nix 2.34 `src/nix/unix/daemon.cc`).
pub(super) fn is_trusted(trusted: &str, user: &str, groups: &[String]) -> bool {
    trusted.split_whitespace().any(|word| match word.strip_prefix('@') {
        Some(group) => groups.iter().any(|of| of == group),
        None => word == "*" || word == user,
    })
}

/// Files that were written since the daemon has read them.
pub(super) fn stale(pid: u32, started: SystemTime, files: &[(String, SystemTime)]) -> Vec<Finding> {
    let newer = files.iter().filter(|(_, written)| *written > started + MARGIN);
    let finding = |(file, _): &(String, SystemTime)| {
        Finding::warning(
            &Spot::file(file),
            format!("it was written after the daemon (process {pid}) had started, which reads it only then"),
            "systemctl restart nix-daemon",
        )
    };
    newer.map(finding).collect()
}

/// Before 2.17 Nix writes a path in its shortest form.
fn is_same(written: &str, effective: &str) -> bool {
    let short = |path: &str| {
        let mut parts = Vec::new();
        for part in path.split('/').filter(|part| !matches!(*part, "" | ".")) {
            if part == ".." {
                parts.pop();
            } else {
                parts.push(part.to_owned());
            }
        }
        parts
    };
    written == effective || (written.starts_with('/') && short(written) == short(effective))
}

fn is_stock(value: &str) -> bool {
    value.contains("__build-remote") || value.ends_with("/build-remote")
}

fn is_elsewhere(store: &str) -> bool {
    store.split_once("://").is_some_and(|(scheme, _)| !matches!(scheme, "unix" | "local" | "local-overlay"))
}

/// `1 machine`, `2 machines`.
pub(super) fn plural(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
