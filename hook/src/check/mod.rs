//! `check`: what is wrong with the list of machines and with Nix's settings, before a build shows it.
//!
//! Owns the order of looking and the report's form. Must never connect to a machine or to a daemon: that is `ping`'s.

mod files;
mod finding;
mod hosts;
mod known;
mod machines;
mod nix_conf;
mod settings;

use crate::cli::Subject;
use crate::config::rules::Offload;
use crate::config::{self, Fleet};
use crate::files::read_machines_file;
use crate::nix_here::{self, Daemon, Effective, View};
use crate::plan::machine::Place;
use crate::reach::DAEMON_SOCKET;

use files::Runner;
use finding::{Finding, Severity, Spot};
use hosts::{Found, LookedUp};
use machines::{Judged, Own, Target};
use nix::unistd::{Group, User, getegid, geteuid};
use nix_conf::Assignment;
use nix_offload_proxy::exit::{self, Failure};
use nix_offload_proxy::settings::{self as offload, Settings as SshSettings, SettingsError};
use serde_json::{Value, json};
use settings::{Facts, Reader, plural};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use thiserror::Error;

/// The list of machines that Nix uses unless it is told otherwise.
const USUAL_LIST: &str = "/etc/nix/machines";
/// How long all names together may take to be looked up.
const LOOKUP_BOUND: Duration = Duration::from_secs(2);
/// More than this is not taken from standard input, in bytes.
const MOST_INPUT: u64 = 16 << 20;
/// More names than this are not listed in one line.
const MOST_NAMES: usize = 5;
/// The settings that are shown.
const SHOWN: [&str; 9] = [
    "build-hook",
    "builders",
    "builders-use-substitutes",
    "max-jobs",
    "system",
    "extra-platforms",
    "system-features",
    "store",
    "trusted-users",
];

/// Why there is no report.
#[derive(Debug, Error)]
pub enum CheckError {
    /// It cannot be written.
    #[error("cannot write the report")]
    Output(#[source] io::Error),
}

impl From<CheckError> for Failure {
    fn from(error: CheckError) -> Self {
        Failure::new(&error, None, exit::FAILURE)
    }
}

/// Looks at everything and prints the report; gives the exit code. With `strict` warnings count as errors do.
///
/// # Errors
/// If the report cannot be written.
pub fn check(subject: &Subject, strict: bool, as_json: bool) -> Result<u8, CheckError> {
    let mut report = look(subject);
    finding::sort(&mut report.findings);
    let errors = finding::count(&report.findings, Severity::Error);
    let warnings = finding::count(&report.findings, Severity::Warning);
    let text = if as_json { report.json(errors, warnings) } else { report.text(errors, warnings) };
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(CheckError::Output(error)),
        _ => {}
    }
    if !as_json {
        for note in &report.notes {
            // What cannot be shown cannot be helped.
            let _ = writeln!(io::stderr(), "note: {note}");
        }
    }
    Ok(if errors > 0 || (strict && warnings > 0) { exit::FAILURE } else { exit::OK })
}

/// What was found.
#[derive(Default)]
struct Report {
    findings: Vec<Finding>,
    notes: Vec<String>,
    machines: usize,
    effective: Option<(Effective, String)>,
}

impl Report {
    fn text(&self, errors: usize, warnings: usize) -> String {
        let mut text = String::new();
        if let Some((effective, reader)) = &self.effective {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{}, as {reader} has it ({}):", effective.version_text, effective.command);
            for name in SHOWN {
                if let Some(value) = effective.settings.get(name) {
                    let value = value.lines().map(str::trim).collect::<Vec<_>>().join(" ; ");
                    let _ = writeln!(text, "  {}", format!("{name} = {value}").trim_end());
                }
            }
            text.push('\n');
        }
        for finding in &self.findings {
            let _ = writeln!(text, "{finding}\n");
        }
        let count = |number: usize, noun: &str| {
            if number == 0 { format!("no {noun}s") } else { plural(number, noun) }
        };
        let _ = writeln!(
            text,
            "{}: {}, {}",
            count(self.machines, "machine"),
            count(errors, "error"),
            count(warnings, "warning")
        );
        text
    }

    fn json(&self, errors: usize, warnings: usize) -> String {
        let nix = self.effective.as_ref().map(|(effective, reader)| {
            let settings: BTreeMap<&str, &str> =
                SHOWN.into_iter().filter_map(|name| Some((name, effective.settings.get(name)?))).collect();
            json!({
                "version": effective.version_text,
                "command": effective.command,
                "reader": reader,
                "settings": settings,
            })
        });
        let report = json!({
            "errors": errors,
            "warnings": warnings,
            "machines": self.machines,
            "nix": nix,
            "findings": self.findings.iter().map(Finding::json).collect::<Vec<Value>>(),
            "notes": self.notes,
        });
        format!("{report:#}\n")
    }
}

fn look(subject: &Subject) -> Report {
    let daemon = nix_here::find_daemon(Path::new(DAEMON_SOCKET));
    let runner = Runner::new(daemon.as_ref().map_or_else(|| geteuid().as_raw(), |daemon| daemon.uid));
    let mut look = Look { report: Report::default(), runner, view: View::own(), unseen: BTreeSet::new() };
    match subject {
        Subject::Configured => look.configured(daemon.as_ref()),
        Subject::Builders(text) => look.list("--builders", text, &Own::default(), &[]),
        Subject::Input => {
            let mut text = Vec::new();
            match io::stdin().take(MOST_INPUT).read_to_end(&mut text) {
                Ok(_) => {
                    look.list("(standard input)", &String::from_utf8_lossy(&text), &Own::default(), &[]);
                }
                Err(error) => look.unreadable("(standard input)", &error),
            }
        }
        Subject::File(file) => match fs::read(file) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                look.report.findings.extend(look.runner.writable(Path::new(file)));
                look.list(file, &text, &Own::default(), &[]);
            }
            Err(error) => look.unreadable(file, &error),
        },
    }
    look.tell_unseen();
    look.report
}

struct Look {
    report: Report,
    runner: Runner,
    /// Whose environment counts.
    view: View,
    /// What only the user whom builds are run by can see.
    unseen: BTreeSet<String>,
}

impl Look {
    fn find(&mut self, finding: Finding) {
        self.report.findings.push(finding);
    }

    fn unreadable(&mut self, source: &str, error: &io::Error) {
        self.find(Finding::error(
            &Spot::file(source),
            format!("it cannot be read: {error}"),
            "name a readable file",
        ));
    }

    /// A list of machines and all that it names. `written` are the lines of nix.conf that it may stand in.
    fn list(&mut self, source: &str, text: &str, own: &Own, written: &[Assignment]) {
        let (texts, fleet) = self.read_list(source, text);
        let Judged { mut findings, keys, hosts } =
            machines::judge(&texts, &fleet, &Own { socket: DAEMON_SOCKET.into(), ..own.clone() });
        self.report.machines += fleet.machines.len();
        for (spot, file) in keys {
            match self.runner.key(&spot, &file) {
                Ok(finding) => findings.extend(finding),
                Err(files::NotSeen) => drop(self.unseen.insert(file)),
            }
        }
        self.hosts(hosts, &mut findings);
        if let Some(line) = nix_conf::last(written, "builders").filter(|line| line.value == text.trim()) {
            for finding in &mut findings {
                let place = &mut finding.spot.place;
                if place.source == source && place.line == 1 {
                    let begin = line.spot.place.clone();
                    *place = Place { column: line.value_column - 1 + place.column, ..begin };
                    finding.spot.line.clone_from(&line.spot.line);
                }
            }
        }
        for file in texts.keys().filter(|file| file.as_str() != source) {
            findings.extend(self.runner.writable(Path::new(file)));
        }
        self.report.findings.extend(findings);
    }

    /// The list and the files that it includes, each of which is read once.
    fn read_list(&mut self, source: &str, text: &str) -> (BTreeMap<String, String>, Fleet) {
        let texts = RefCell::new(BTreeMap::from([(source.to_owned(), text.to_owned())]));
        let unseen = RefCell::new(BTreeSet::new());
        let read = |file: &str| match read_machines_file(file) {
            Ok(Some(text)) => {
                texts.borrow_mut().insert(file.to_owned(), text.clone());
                Ok(Some(text))
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !self.runner.is_us() => {
                unseen.borrow_mut().insert(file.to_owned());
                Ok(Some(String::new()))
            }
            other => other,
        };
        let fleet = config::parse_machines(source, text, &BTreeSet::new(), &read);
        self.unseen.append(&mut unseen.into_inner());
        (texts.into_inner(), fleet)
    }

    fn hosts(&mut self, targets: Vec<Target>, findings: &mut Vec<Finding>) {
        let options = self.view.variable("NIX_SSHOPTS").unwrap_or_default().to_string_lossy().into_owned();
        let Some(options) = shlex::split(&options) else {
            findings.push(Finding::error(
                &Spot::default(),
                format!("NIX_SSHOPTS cannot be split into words: {options}; nothing is built remotely"),
                "close the quote, or put a backslash before it",
            ));
            return;
        };
        let hosts = targets.iter().map(|target| target.host.clone()).collect();
        let LookedUp { found, trouble } = hosts::look_up(&hosts, &options, LOOKUP_BOUND);
        if let Some(trouble) = trouble {
            findings.push(Finding::error(
                &Spot::default(),
                trouble,
                "correct what ssh complains of, or install OpenSSH's client: no machine can be reached without it",
            ));
        }
        let (mut late, mut not_asked) = (BTreeSet::new(), BTreeSet::new());
        for Target { spot, host, must_be_elsewhere } in targets {
            let name = host.name();
            match found.get(&host) {
                None | Some(Found::Well) => {}
                Some(Found::NotAsked) => drop(not_asked.insert(name.to_owned())),
                Some(Found::NoAnswer) => drop(late.insert(name.to_owned())),
                // Its ssh_config may know the name.
                Some(Found::Unknown(_)) if !self.runner.is_us() => drop(self.unseen.insert(name.to_owned())),
                Some(Found::Unknown(error)) => findings.push(Finding::warning(
                    &spot,
                    format!("nobody knows the host '{name}': {error}"),
                    "correct its name, or write a 'Host' block with its 'HostName' into ssh_config",
                )),
                Some(Found::Here(address)) if must_be_elsewhere => findings.push(Finding::warning(
                    &spot,
                    format!("'{name}' is this very machine ({address}); a build that is sent there waits for itself"),
                    "take the line out; how much is built here is Nix's setting 'max-jobs'",
                )),
                Some(Found::Here(_)) => {}
            }
        }
        if !not_asked.is_empty() {
            self.report.notes.push(format!(
                "'ssh -G' did not say within {} seconds where it finds {}; that is not checked",
                LOOKUP_BOUND.as_secs(),
                listed(&not_asked)
            ));
        }
        if !late.is_empty() {
            let message = format!(
                "the name service had no answer within {} seconds for {}",
                LOOKUP_BOUND.as_secs(),
                listed(&late)
            );
            findings.push(Finding::warning(
                &Spot::default(),
                message,
                "see whether the name servers in /etc/resolv.conf can be reached",
            ));
        }
    }

    /// Everything that is configured.
    fn configured(&mut self, daemon: Option<&Daemon>) {
        let process = daemon.and_then(|daemon| daemon.process.as_ref());
        let (view, reader) = match (daemon, process.and_then(View::of)) {
            (None, _) => (View::own(), Reader::Caller),
            (Some(_), Some(view)) => (view, Reader::Daemon),
            (Some(_), None) => (View::everybody(), Reader::UnseenDaemon),
        };
        self.view = view.clone();
        let written = self.written(&view, true);
        let offload = self.offload_toml(&view, reader);
        let effective = match view.ask() {
            Ok(effective) => effective,
            Err(error) => {
                let text = exit::reason(&error);
                self.find(Finding::error(&Spot::default(), text, error.cure()));
                // What Nix would use.
                let builders = nix_conf::last(&written, "builders").map(|line| line.value.clone());
                self.list(
                    "builders",
                    &builders.unwrap_or_else(|| format!("@{USUAL_LIST}")),
                    &Own::default(),
                    &written,
                );
                return;
            }
        };
        let local = effective.settings.local();
        let own = Own { systems: local.systems, features: local.features, ..Own::default() };
        let builders = effective.settings.get("builders").unwrap_or_default().to_owned();
        self.list("builders", &builders, &own, &written);
        let machines =
            config::fleet(&effective.settings, "builders", &builders, &read_machines_file).machines;
        for name in offload.without_machine(&machines) {
            self.find(Finding::warning(
                &Spot::default(),
                format!(
                    "offload.toml has a table [[machine]] for '{name}', and no machine has that host or URI"
                ),
                "correct the name, or take it away; `*` and `?` stand for other letters",
            ));
        }
        self.judge(&effective, &view, reader, &written, daemon.is_some());
        if let Some(started) = process.and_then(|process| process.started) {
            let files: BTreeSet<&str> = written.iter().map(|line| line.spot.place.source.as_str()).collect();
            let times =
                files.iter().filter_map(|file| Some(((*file).to_owned(), files::written(Path::new(file))?)));
            let times: Vec<(String, SystemTime)> = times.collect();
            self.report.findings.extend(settings::stale(
                process.map_or(0, |process| process.pid),
                started,
                &times,
            ));
        }
        if daemon.is_some() && !geteuid().is_root() {
            self.untrusted(&effective);
        }
        let reader = match (reader, process) {
            (Reader::Daemon, Some(process)) => format!("the daemon (process {})", process.pid),
            (Reader::Daemon | Reader::UnseenDaemon, _) => "everybody".to_owned(),
            (Reader::Caller, _) => "this user".to_owned(),
        };
        self.report.effective = Some((effective, reader));
    }

    fn judge(
        &mut self,
        effective: &Effective,
        view: &View,
        reader: Reader,
        written: &[Assignment],
        has_daemon: bool,
    ) {
        let program = settings::hook_program(&effective.settings, effective.version);
        let hook = self.runner.program(&program, &view.variable("PATH").unwrap_or_default());
        let ourselves = env::current_exe().ok();
        let usual_machines = self.read_list("builders", &format!("@{USUAL_LIST}")).1.machines.len();
        let remote = env::var("NIX_REMOTE").ok();
        let (findings, notes) = settings::judge(&Facts {
            version_text: &effective.version_text,
            version: effective.version,
            settings: &effective.settings,
            reader,
            written,
            hook: &hook,
            ourselves: ourselves.as_deref(),
            machines: self.report.machines,
            usual_machines,
            remote: remote.as_deref(),
            has_daemon,
        });
        self.report.findings.extend(findings);
        self.report.notes.extend(notes);
    }

    /// The lines of nix.conf in the order in which they are read (`loadConfFile` and `getUserConfigFiles` in Nix 2.34
    /// `src/libstore/globals.cc`): for everybody, of the user, of the environment. Without `of_all` the first are left
    /// out.
    fn written(&mut self, view: &View, of_all: bool) -> Vec<Assignment> {
        let set = |name: &str| view.variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let system = set("NIX_CONF_DIR").unwrap_or_else(|| "/etc/nix".into()).join("nix.conf");
        let home = set("HOME").unwrap_or_else(|| self.runner.home().to_owned());
        let of_user = match view.variable("NIX_USER_CONF_FILES") {
            Some(files) => env::split_paths(&files).filter(|file| !file.as_os_str().is_empty()).collect(),
            None => {
                let first = set("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config"));
                let others = view.variable("XDG_CONFIG_DIRS").unwrap_or_else(|| OsString::from("/etc/xdg"));
                let others: Vec<PathBuf> = env::split_paths(&others).collect();
                [first]
                    .into_iter()
                    .chain(others)
                    .map(|directory| directory.join("nix/nix.conf"))
                    .collect::<Vec<_>>()
            }
        };
        let mut written = Vec::new();
        for file in of_all.then_some(system).into_iter().chain(of_user.into_iter().rev()) {
            let Ok(text) = fs::read_to_string(&file) else { continue };
            let mut files = BTreeSet::from([file.clone()]);
            let mut read = |path: &str| {
                files.insert(PathBuf::from(path));
                fs::read_to_string(path).ok()
            };
            written.extend(nix_conf::assignments(&file.to_string_lossy(), &text, &mut read));
            self.report.findings.extend(files.iter().filter_map(|file| self.runner.writable(file)));
        }
        if let Some(text) = view.variable("NIX_CONFIG") {
            let mut read = |path: &str| fs::read_to_string(path).ok();
            written.extend(nix_conf::assignments("NIX_CONFIG", &text.to_string_lossy(), &mut read));
        }
        written
    }

    /// What a daemon does not take from the user who calls us.
    fn untrusted(&mut self, effective: &Effective) {
        let uid = geteuid();
        let user = User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name);
        let takes = effective.settings.get("trusted-users").unwrap_or("root");
        // By the group's list of members, whatever we logged in with.
        let is_in = |name: &&str| {
            let group = Group::from_name(name).ok().flatten();
            group.is_some_and(|group| group.gid == getegid() || group.mem.contains(&user))
        };
        let named = takes.split_whitespace().filter_map(|word| word.strip_prefix('@'));
        let groups: Vec<String> = named.filter(is_in).map(str::to_owned).collect();
        let trusted = settings::is_trusted(takes, &user, &groups);
        let own = View::own();
        // With a store of his own no daemon is asked.
        let remote = own.variable("NIX_REMOTE").filter(|remote| !remote.is_empty());
        let written = self.written(&own, false);
        let is_daemon =
            remote.is_none_or(|remote| remote == "daemon" || remote.to_string_lossy().starts_with("unix:"));
        if is_daemon && nix_conf::last(&written, "store").is_none() {
            self.report.findings.extend(settings::untrusted(&written, trusted, &user));
        }
    }

    /// The file that ssh's masters and the choice are set with, as the hook will read it.
    fn offload_toml(&mut self, view: &View, reader: Reader) -> Offload {
        let path = Path::new("/etc/nix/offload.toml");
        let read = match reader {
            // It is not our own that counts.
            Reader::UnseenDaemon => offload::read_file::<SshSettings>(path),
            Reader::Caller | Reader::Daemon => offload::read(|name| view.variable(name)),
        };
        let read = read.and_then(|_| match reader {
            Reader::UnseenDaemon => offload::read_file(path),
            Reader::Caller | Reader::Daemon => offload::read(|name| view.variable(name)),
        });
        let error = match read {
            Ok(offload) => return offload,
            Err(error) => error,
        };
        let mut cure = error.cure().unwrap_or_else(|| "name a readable file, or take it away".into());
        let finding = match &error {
            SettingsError::Io { source, .. }
                if reader == Reader::UnseenDaemon
                    && matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) =>
            {
                return Offload::default();
            }
            SettingsError::Content { path, line, column, message, .. } => {
                let text = fs::read_to_string(path).unwrap_or_default();
                let line_text = text.lines().nth(line.saturating_sub(1)).unwrap_or_default().to_owned();
                let word = line_text.chars().skip(column.saturating_sub(1));
                let place = Place { source: path.display().to_string(), line: *line, column: *column };
                let width = word.take_while(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).count();
                Finding::error(
                    &Spot { place, line: line_text, width },
                    message.clone(),
                    std::mem::take(&mut cure),
                )
            }
            _ => Finding::error(&Spot::default(), exit::reason(&error), std::mem::take(&mut cure)),
        };
        self.find(finding);
        Offload::default()
    }

    fn tell_unseen(&mut self) {
        if !self.unseen.is_empty() {
            self.report.notes.push(format!(
                "builds are run by another user than you, who may see more: run this as root to have {} checked",
                listed(&self.unseen)
            ));
        }
    }
}

/// The first few of them.
fn listed(names: &BTreeSet<String>) -> String {
    let mut text = names.iter().take(MOST_NAMES).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > MOST_NAMES {
        // Writing to a String cannot fail.
        let _ = write!(text, " and {} more", names.len() - MOST_NAMES);
    }
    text
}

#[cfg(test)]
mod tests;
