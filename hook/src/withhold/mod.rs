//! `drain`, `disable` and `enable`: taking machines out of service, and back into it.
//!
//! Owns what is said about that. Must never connect to a machine or end a build.

mod names;

use crate::cli::{Change, Meant};
use crate::config::Fleet;
use crate::local_time;
use crate::plan::known::{Withheld, Withholding};
use crate::plan::machine::Machine;
use crate::slots::Holder;
use crate::state::Withholdings;
use crate::vantage::{Vantage, VantageError};
use nix_offload_proxy::exit::{self, Failure};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// More names than this are not listed in one line.
const MOST_NAMES: usize = 20;

/// Why it failed. Nothing was changed then, unless only the report cannot be printed.
#[derive(Debug, Error)]
pub enum WithholdError {
    /// There is no ground to stand on.
    #[error(transparent)]
    Vantage(#[from] VantageError),
    /// Nobody is called that.
    #[error("no machine is called '{name}'; the machines are {known}")]
    Unknown {
        /// The word.
        name: String,
        /// The machines that there are.
        known: String,
        /// The one that was probably meant.
        likeliest: Option<String>,
    },
    /// What was said before cannot be read, and is not to be lost.
    #[error("cannot read which machines are out of service from {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// It cannot be written down.
    #[error("cannot write to {}", directory.display())]
    Write {
        /// The state directory.
        directory: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The report cannot be printed.
    #[error("cannot write the report")]
    Output(#[source] io::Error),
}

impl WithholdError {
    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            Self::Vantage(error) => error.cure(),
            Self::Unknown { likeliest: Some(name), .. } => Some(format!("did you mean '{name}'?")),
            Self::Unknown { .. } => {
                Some("give its host, its store's URI, or its name in the list of machines".into())
            }
            Self::Read { path, .. } => {
                Some(format!("correct {}, or delete it; then all machines are in service", path.display()))
            }
            Self::Write { .. } | Self::Output(_) => None,
        }
    }

    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Vantage(error) => error.exit_code(),
            Self::Unknown { .. } => exit::USAGE,
            Self::Read { .. } | Self::Write { .. } => exit::CONFIG,
            Self::Output(_) => exit::FAILURE,
        }
    }
}

impl From<WithholdError> for Failure {
    fn from(error: WithholdError) -> Self {
        Failure::new(&error, error.cure().as_deref(), error.exit_code())
    }
}

/// What was done with one machine.
struct Done {
    name: String,
    is_changed: bool,
    /// One entry for each build running on the machine; `None` where its hook wrote nothing (a stock hook).
    running: Vec<Option<Holder>>,
}

/// Changes what is kept of machines and prints what that means; gives the exit code.
///
/// # Errors
/// If a name means no machine, or nothing could be changed; then nothing was. Or if the report cannot be printed.
pub fn withhold(
    change: &Change,
    words: &[String],
    meant: &Meant,
    as_json: bool,
) -> Result<u8, WithholdError> {
    let vantage = Vantage::find(meant)?;
    vantage.ours()?;
    let directory = vantage.state()?;
    let now = SystemTime::now();
    let Fleet { machines, problems, .. } = vantage.fleet();
    for problem in &problems {
        // What cannot be shown cannot be helped.
        let _ = writeln!(io::stderr(), "warning: {problem}");
    }
    let before = Withholdings::read_all(&directory)
        .map_err(|source| WithholdError::Read { path: Withholdings::path(&directory), source })?;
    let withheld: Vec<&str> = before.in_force(now).map(|(name, _)| name).collect();
    let chosen = choose(words, &machines, &withheld)?;
    let to = match change {
        Change::Enable => None,
        Change::Withhold { how, span, reason } => Some(Withheld {
            how: *how,
            // A time that there will never be is as good as none.
            until: span.and_then(|span| now.checked_add(span)),
            why: reason
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect::<String>()
                .trim()
                .to_owned(),
        }),
    };
    let changed = Withholdings::change(&directory, &chosen, to.as_ref())
        .map_err(|source| WithholdError::Write { directory, source })?;
    let slots = vantage.slots();
    let done: Vec<Done> = chosen
        .into_iter()
        .map(|name| {
            let machine = machines.iter().find(|machine| machine.name == name);
            Done {
                is_changed: changed.contains(&name),
                running: machine
                    .map(|machine| slots.running(&machine.name, machine.max_jobs))
                    .unwrap_or_default(),
                name,
            }
        })
        .collect();
    let report = if as_json {
        let list = done.iter().map(|done| to_json(done, to.as_ref())).collect();
        format!("{:#}\n", Value::Array(list))
    } else {
        let mut report = String::new();
        done.iter().for_each(|done| to_text(&mut report, done, to.as_ref(), now));
        report
    };
    match io::stdout().write_all(report.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(WithholdError::Output(error)),
        _ => Ok(exit::OK),
    }
}

/// The names of all machines that are meant. Those that are out of service need not be in the list any more.
fn choose(words: &[String], machines: &[Machine], withheld: &[&str]) -> Result<Vec<String>, WithholdError> {
    let all: BTreeSet<&str> =
        machines.iter().map(|machine| machine.name.as_str()).chain(withheld.iter().copied()).collect();
    let mut chosen: Vec<String> = Vec::new();
    for word in words {
        let meant = names::meant(word, all.iter().copied());
        if meant.is_empty() {
            return Err(WithholdError::Unknown {
                name: word.clone(),
                known: listed(&all),
                likeliest: names::likeliest(word, all.iter().copied()),
            });
        }
        for name in meant {
            if !chosen.iter().any(|chosen| chosen == name) {
                chosen.push(name.to_owned());
            }
        }
    }
    Ok(chosen)
}

fn listed(names: &BTreeSet<&str>) -> String {
    let mut text = names.iter().take(MOST_NAMES).copied().collect::<Vec<_>>().join(", ");
    match names.len() {
        0 => text.push_str("none"),
        1..=MOST_NAMES => {}
        // Writing to a String cannot fail.
        number => drop(write!(text, " and {} more", number - MOST_NAMES)),
    }
    text
}

fn word(how: Withholding) -> &'static str {
    match how {
        Withholding::Drained => "drained",
        Withholding::Disabled => "disabled",
    }
}

fn to_json(done: &Done, to: Option<&Withheld>) -> Value {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    json!({
        "machine": done.name,
        "state": to.map_or("enabled", |to| word(to.how)),
        "changed": done.is_changed,
        "until": to.and_then(|to| to.until).map(seconds),
        "reason": to.map(|to| to.why.as_str()).filter(|why| !why.is_empty()),
        "running": done.running.len(),
        "derivations": done.running.iter().flatten().map(|holder| holder.derivation.as_str()).collect::<Vec<_>>(),
    })
}

fn to_text(report: &mut String, done: &Done, to: Option<&Withheld>, now: SystemTime) {
    // Writing to a String cannot fail.
    let name = &done.name;
    let Some(to) = to else {
        let _ = match done.is_changed {
            true => writeln!(report, "{name} is enabled: it gets builds again"),
            false => writeln!(report, "{name} was not out of service"),
        };
        return;
    };
    let _ = write!(report, "{name} is {}", word(to.how));
    let _ = match to.until {
        Some(until) => {
            let span = until.duration_since(now).unwrap_or_default();
            write!(report, " until {} ({})", local_time::text(until), local_time::span(span))
        }
        None => write!(report, " until it is enabled"),
    };
    let _ = match to.why.as_str() {
        "" => writeln!(report),
        why => writeln!(report, ": {why}"),
    };
    let _ = match done.running.len() {
        0 => writeln!(report, "  No build runs there. No new one begins."),
        1 => writeln!(report, "  1 build runs there and is left to finish. No new one begins."),
        number => writeln!(report, "  {number} builds run there and are left to finish. No new one begins."),
    };
    for holder in &done.running {
        let _ = match holder {
            Some(holder) => {
                writeln!(report, "    {}, for {}", holder.name(), local_time::ago(holder.began(), now))
            }
            None => writeln!(report, "    one that Nix's own hook sent, or that has only begun"),
        };
    }
    report.push_str(match to.how {
        Withholding::Drained => {
            "  A build that only it can do waits for it to come back, ten minutes at most.\n"
        }
        Withholding::Disabled => "  A build that only it can do does not wait for it.\n",
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn list(uris: &[&str]) -> Vec<Machine> {
        uris.iter().map(|uri| Machine::for_uri(uri, BTreeSet::new()).unwrap()).collect()
    }

    fn chosen(words: &[&str], withheld: &[&str]) -> Result<Vec<String>, String> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        choose(&words, &list(&["ssh-ng://mac", "ssh://nix@mac", "ssh://pi"]), withheld)
            .map_err(|error| exit::report(&error, error.cure().as_deref()))
    }

    #[test]
    fn names_mean_machines_of_the_list_and_those_that_are_out_of_service() {
        assert_eq!(chosen(&["mac", "nix@mac"], &[]).unwrap(), ["ssh-ng://mac", "ssh://nix@mac"]);
        assert_eq!(chosen(&["old"], &["ssh://old"]).unwrap(), ["ssh://old"]);
        let error = chosen(&["pi", "mca"], &["ssh://old"]).unwrap_err();
        assert_eq!(
            error,
            "error: no machine is called 'mca'; the machines are ssh-ng://mac, ssh://nix@mac, ssh://old, ssh://pi\n\
             hint: did you mean 'mac'?"
        );
    }

    #[test]
    fn what_is_done_is_said_with_its_consequences() {
        let now = SystemTime::now();
        let holder = |derivation: &str| Holder {
            pid: 1,
            derivation: derivation.into(),
            since: (now - Duration::from_secs(130)).duration_since(UNIX_EPOCH).unwrap().as_secs_f64(),
            expected: None,
        };
        let done = |is_changed, running| Done { name: "ssh-ng://mac".into(), is_changed, running };
        let text = |done: &Done, to: Option<&Withheld>| {
            let mut text = String::new();
            to_text(&mut text, done, to, now);
            text
        };
        let until = now + Duration::from_secs(7200);
        let drained = Withheld { how: Withholding::Drained, until: Some(until), why: "new disk".into() };
        let busy = done(true, vec![Some(holder("/nix/store/0-hello-2.12.drv")), None]);
        assert_eq!(
            text(&busy, Some(&drained)),
            format!(
                "ssh-ng://mac is drained until {} (2 h): new disk\n\
                 \x20 2 builds run there and are left to finish. No new one begins.\n\
                 \x20   hello-2.12, for 2 min\n\
                 \x20   one that Nix's own hook sent, or that has only begun\n\
                 \x20 A build that only it can do waits for it to come back, ten minutes at most.\n",
                local_time::text(until)
            )
        );
        let disabled = Withheld { how: Withholding::Disabled, until: None, why: String::new() };
        assert_eq!(
            text(&done(true, vec![]), Some(&disabled)),
            "ssh-ng://mac is disabled until it is enabled\n\
             \x20 No build runs there. No new one begins.\n\
             \x20 A build that only it can do does not wait for it.\n"
        );
        assert_eq!(text(&done(true, vec![]), None), "ssh-ng://mac is enabled: it gets builds again\n");
        assert_eq!(text(&done(false, vec![]), None), "ssh-ng://mac was not out of service\n");
        let json = to_json(&busy, Some(&drained));
        assert_eq!(
            (&json["state"], &json["reason"], &json["running"], &json["derivations"][0]),
            (&json!("drained"), &json!("new disk"), &json!(2), &json!("/nix/store/0-hello-2.12.drv"))
        );
        assert_eq!(to_json(&busy, None)["until"], Value::Null);
    }
}
