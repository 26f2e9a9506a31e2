//! The command line: words to a typed action. Must never open a file or connect to anything.

use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// A build hook for Nix: runs builds on remote machines over shared SSH connections.
///
/// Nix itself starts it when nix.conf has the line 'build-hook = /path/to/nix-offload'. The commands below are
/// for people.
#[derive(Debug, Parser)]
#[command(name = "nix-offload", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connect to builders exactly as the hook would, and say what answers.
    ///
    /// Prints each store's URL, Nix version, whether it trusts us, the way of the connection and the time of a
    /// round trip, or what is wrong and what to do about it. The exit status is 0 only if all answer.
    ///
    /// The Nix daemon connects as root: run this as root to see what it sees.
    PingStore {
        /// The store to connect to, for instance ssh-ng://mac or ssh://nix@mac?ssh-key=/home/alice/my-key; may be
        /// repeated. Without it, every machine of Nix's setting 'builders' is tried.
        #[arg(long, value_name = "URI", conflicts_with = "builders")]
        store: Vec<String>,
        /// Machines to try instead, in the form of the setting 'builders', for instance '@/etc/nix/machines'.
        #[arg(long, value_name = "MACHINES")]
        builders: Option<String>,
        /// Give a machine up after so many seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..=600))]
        timeout: u64,
        /// Print a JSON array with an object for each machine.
        #[arg(long)]
        json: bool,
    },
    /// Say what is wrong with the list of machines and with Nix's settings, without connecting to a machine.
    ///
    /// Asks the Nix that is here for its settings, in the place of its daemon if there is one, and looks at what they
    /// name: machines, keys, hosts, the hook itself, offload.toml. Errors are what cannot work, warnings what is allowed
    /// and surely not meant; each has its place and what to do about it.
    ///
    /// The exit status is 1 if there are errors, and 0 with warnings alone, unless --strict is given.
    ///
    /// The Nix daemon connects as root: run this as root to see what it sees.
    Check {
        /// A list of machines to look at instead, '-' for standard input.
        #[arg(value_name = "FILE", conflicts_with = "builders")]
        file: Option<String>,
        /// Machines to look at instead, in the form of the setting 'builders', for instance '@/etc/nix/machines'.
        #[arg(long, value_name = "MACHINES")]
        builders: Option<String>,
        /// Let warnings count as errors do.
        #[arg(long)]
        strict: bool,
        /// Print a JSON object with all findings.
        #[arg(long)]
        json: bool,
    },
    /// Serve Nix as its build hook; Nix adds the verbosity. Not for people.
    #[command(hide = true)]
    Hook {
        /// Nix's verbosity, 0 to 7.
        verbosity: u64,
    },
    /// Try a machine again that failed, and note what came of it. Hooks start it. Not for people.
    #[command(hide = true)]
    Probe {
        /// What the hook calls it.
        name: String,
        /// Its line in the list of machines.
        line: String,
    },
    /// Keep streams ready on a master. Hooks start it. Not for people.
    #[command(hide = true)]
    Keep {
        /// The master's control socket.
        control: PathBuf,
        /// Where to listen.
        door: PathBuf,
        /// What to lock.
        lock: PathBuf,
    },
}

/// What the program is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Serve Nix.
    Hook {
        /// Nix's verbosity.
        verbosity: u64,
    },
    /// Try a machine again.
    Probe {
        /// What the hook calls it.
        name: String,
        /// Its line in the list of machines.
        line: String,
    },
    /// Keep streams ready.
    Keep {
        /// The master's control socket.
        control: PathBuf,
        /// Where to listen.
        door: PathBuf,
        /// What to lock.
        lock: PathBuf,
    },
    /// Tell what is wrong with the configuration.
    Check {
        /// With which part of it.
        subject: Subject,
        /// Let warnings count as errors do.
        strict: bool,
        /// Print JSON.
        json: bool,
    },
    /// Connect to machines and tell what answers.
    Ping {
        /// Which ones.
        targets: Targets,
        /// How long one may take.
        bound: Duration,
        /// Print JSON.
        json: bool,
    },
}

/// Which machines a command is about.
#[derive(Debug, PartialEq, Eq)]
pub enum Targets {
    /// These store URIs.
    Stores(Vec<String>),
    /// The machines in this text, which has the form of the setting `builders`.
    Builders(String),
    /// The machines of Nix's configuration.
    Configured,
}

/// What is to be checked.
#[derive(Debug, PartialEq, Eq)]
pub enum Subject {
    /// Everything that is configured.
    Configured,
    /// The list of machines in this file.
    File(String),
    /// The list of machines on standard input.
    Input,
    /// The machines in this text, which has the form of the setting `builders`.
    Builders(String),
}

/// Reads the command line.
///
/// Nix before 2.17 starts a hook with its verbosity as the only argument, newer Nix appends it to the words of
/// the setting; both are understood.
///
/// # Errors
/// With clap's own error, which also stands for `--help` and `--version`.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Action, clap::Error> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let [_, only] = arguments.as_slice()
        && let Some(verbosity) = only.to_str().and_then(|text| text.parse().ok())
    {
        return Ok(Action::Hook { verbosity });
    }
    Ok(match Arguments::try_parse_from(arguments)?.command {
        Command::Hook { verbosity } => Action::Hook { verbosity },
        Command::Probe { name, line } => Action::Probe { name, line },
        Command::Keep { control, door, lock } => Action::Keep { control, door, lock },
        Command::PingStore { store, builders, timeout, json } => {
            let targets = match builders {
                Some(text) => Targets::Builders(text),
                None if store.is_empty() => Targets::Configured,
                None => Targets::Stores(store),
            };
            Action::Ping { targets, bound: Duration::from_secs(timeout), json }
        }
        Command::Check { file, builders, strict, json } => {
            let subject = match (file, builders) {
                (_, Some(text)) => Subject::Builders(text),
                (None, None) => Subject::Configured,
                (Some(file), None) if file == "-" => Subject::Input,
                (Some(file), None) => Subject::File(file),
            };
            Action::Check { subject, strict, json }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parsed(words: &[&str]) -> Result<Action, clap::Error> {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn clap_finds_no_fault_with_the_definition() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn nix_starts_the_hook_with_the_verbosity_alone_or_behind_words() {
        assert_eq!(parsed(&["nix-offload", "3"]).unwrap(), Action::Hook { verbosity: 3 });
        assert_eq!(parsed(&["nix-offload", "hook", "3"]).unwrap(), Action::Hook { verbosity: 3 });
        assert!(parsed(&["nix-offload", "frobnicate"]).is_err());
    }

    #[test]
    fn ping_takes_stores_or_a_list_or_the_configuration() {
        let ping = |words: &[&str]| match parsed(words).unwrap() {
            Action::Ping { targets, .. } => targets,
            other => panic!("{other:?}"),
        };
        assert_eq!(ping(&["x", "ping-store"]), Targets::Configured);
        assert_eq!(
            ping(&["x", "ping-store", "--store", "ssh://a", "--store", "b"]),
            Targets::Stores(vec!["ssh://a".into(), "b".into()])
        );
        assert_eq!(ping(&["x", "ping-store", "--builders", "@/m"]), Targets::Builders("@/m".into()));
        assert!(parsed(&["x", "ping-store", "--store", "a", "--builders", "b"]).is_err());
        assert!(parsed(&["x", "ping-store", "--timeout", "0"]).is_err());
    }

    #[test]
    fn check_takes_a_file_or_a_list_or_the_configuration() {
        let check = |words: &[&str]| match parsed(words).unwrap() {
            Action::Check { subject, strict, json } => (subject, strict, json),
            other => panic!("{other:?}"),
        };
        assert_eq!(check(&["x", "check"]), (Subject::Configured, false, false));
        assert_eq!(check(&["x", "check", "--strict", "m"]), (Subject::File("m".into()), true, false));
        assert_eq!(check(&["x", "check", "-", "--json"]), (Subject::Input, false, true));
        assert_eq!(check(&["x", "check", "--builders", "a"]), (Subject::Builders("a".into()), false, false));
        assert!(parsed(&["x", "check", "m", "--builders", "a"]).is_err());
    }
}
