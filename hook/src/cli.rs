//! The command line: words to a typed action. Must never open a file or connect to anything.

use crate::plan::known::Withholding;
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

const STATUS_HELP: &str = "\
States:
  ready            nothing speaks against it
  full             all its slots are taken
  down             it failed lately and is left alone, for so long if that is known
  waking           it sleeps, and was told to wake up
  drained          out of service, for so long or until it is enabled
  disabled         the same, and no build waits for it
  inhibited        it has a file that says it wants no builds
  short of disk    it has less than it should have; or of inodes, or of memory
  no slots         its line allows no builds
  not used         it is left to Nix's own hook, or its store is this machine's own
  unknown          its slots cannot be counted

Columns:
  SLOTS   taken, of those that it has; builds of Nix's own hook count too
  LOAD    its load average, and its processors
  DISK    free on the file system of its store
  MEMORY  that can be had without swapping
  SEEN    how long ago it said these
  SSH     how old the shared connection to it is

A - stands for what is not known, or not there.";

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
        /// How many seconds a machine may take before it is given up.
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
    /// Say where a build would go now and why, with the arithmetic, or what was decided about it last.
    ///
    /// Decides as the hook would, with everything that it knows at this moment, but takes no slot and connects to
    /// nothing. For every machine there is its estimate, or what keeps the build from it.
    ///
    /// With --last it says what was decided when Nix last asked. The exit status is 1 if nothing is kept of that.
    ///
    /// The Nix daemon's hook runs as root: where there is a daemon, run this as root.
    Explain {
        /// What is to be explained: a derivation or another path of the store, an installable such as nixpkgs#hello, a
        /// file such as ./default.nix, or with --file an attribute.
        #[arg(value_name = "INSTALLABLE", required_unless_present = "file")]
        words: Vec<String>,
        /// Take the words for attributes of this file in the Nix language.
        #[arg(short, long, value_name = "FILE")]
        file: Option<String>,
        /// Say what was decided last.
        #[arg(long)]
        last: bool,
        /// Builds that Nix may run here at a time, as with its own option; its setting otherwise.
        #[arg(short = 'j', long, value_name = "NUMBER", conflicts_with = "last")]
        max_jobs: Option<u64>,
        #[command(flatten)]
        nix: NixWords,
        /// Print a JSON array with an object for each derivation.
        #[arg(long)]
        json: bool,
    },
    /// Take machines out of service for a while: what runs there is left to finish, nothing new begins.
    ///
    /// Builds that only such a machine can do wait for it to come back, for ten minutes at most. It holds for all Nix
    /// commands, survives a restart, and ends with --for or by 'enable'.
    ///
    /// The Nix daemon's hook runs as root: where there is a daemon, run this as root.
    Drain(WithholdWords),
    /// Take machines out of service until they are enabled: as drain, but no build waits for them.
    ///
    /// The Nix daemon's hook runs as root: where there is a daemon, run this as root.
    Disable(WithholdWords),
    /// Put machines back into service that were drained or disabled.
    ///
    /// The Nix daemon's hook runs as root: where there is a daemon, run this as root.
    Enable {
        /// A machine: its host, with user or port if need be, its store's URI, or its name in the list.
        #[arg(value_name = "MACHINE", required = true)]
        names: Vec<String>,
        #[command(flatten)]
        nix: NixWords,
        /// Print a JSON array with an object for each machine.
        #[arg(long)]
        json: bool,
    },
    /// Show every machine of the list: its state, what runs there, and what it said of itself last.
    ///
    /// Looks at what hooks know, and connects to nothing. A machine is 'ready' if nothing speaks against it; whether it
    /// answers is seen when it gets its next build.
    ///
    /// The Nix daemon's hook runs as root: where there is a daemon, run this as root.
    #[command(after_help = STATUS_HELP)]
    Status {
        /// Look again every two seconds, until interrupted.
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        nix: NixWords,
        /// Print a JSON array with an object for each machine; with --watch one line for each look.
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
    /// Look at the load of machines. Hooks start it. Not for people.
    #[command(hide = true)]
    Sample,
}

#[derive(Debug, Args)]
struct WithholdWords {
    /// A machine: its host, with user or port if need be, its store's URI, or its name in the list.
    #[arg(value_name = "MACHINE", required = true)]
    names: Vec<String>,
    /// How long, for instance 2h, 90m or '1h 30m'; otherwise until it is enabled.
    #[arg(long = "for", value_name = "TIME", value_parser = span)]
    span: Option<Duration>,
    /// What people are told who ask why.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    nix: NixWords,
    /// Print a JSON array with an object for each machine.
    #[arg(long)]
    json: bool,
}

impl WithholdWords {
    fn action(self, how: Withholding) -> Action {
        let change = Change::Withhold { how, span: self.span, reason: self.reason };
        Action::Withhold { change, names: self.names, meant: self.nix.meant(), json: self.json }
    }
}

#[derive(Debug, Args)]
struct NixWords {
    /// Machines instead of those of the configuration, in the form of the setting 'builders'.
    #[arg(long, value_name = "MACHINES")]
    builders: Option<String>,
    /// The store that builds are for, as with Nix's own option: one of your own needs no daemon and no root.
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
}

impl NixWords {
    fn meant(self) -> Meant {
        Meant { builders: self.builders, store: self.store }
    }
}

fn span(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(span) if span.is_zero() => Err("it must be more than nothing".into()),
        Ok(span) => Ok(span),
        Err(error) => Err(format!("{error}; write it as 2h, 90m or '1h 30m'")),
    }
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
    /// Explain where builds go.
    Explain {
        /// Which ones, and what of them.
        wish: Wish,
        /// Print JSON.
        json: bool,
    },
    /// Tell the state of machines.
    Status {
        /// Again and again.
        watch: bool,
        /// Which Nix.
        meant: Meant,
        /// Print JSON.
        json: bool,
    },
    /// Take machines out of service, or back into it.
    Withhold {
        /// What is to become of them.
        change: Change,
        /// What they are called.
        names: Vec<String>,
        /// Which Nix.
        meant: Meant,
        /// Print JSON.
        json: bool,
    },
    /// Look at the load of machines.
    Sample,
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

/// What is to be explained.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// What is to be explained: paths, installables, or attributes of the file.
    pub words: Vec<String>,
    /// A file whose attributes the words are.
    pub file: Option<String>,
    /// What was decided last, instead of what would be decided now.
    pub last: bool,
    /// As Nix's own `--max-jobs`.
    pub max_jobs: Option<u64>,
    /// Which Nix.
    pub meant: Meant,
}

/// What is to become of machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// They are to get nothing new.
    Withhold {
        /// In which way.
        how: Withholding,
        /// How long; until somebody says otherwise if it is not given.
        span: Option<Duration>,
        /// What people are told; may be empty.
        reason: String,
    },
    /// They are to get builds again.
    Enable,
}

/// Which Nix is meant, as it was said on the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meant {
    /// Machines instead of those of the configuration, in the form of the setting `builders`.
    pub builders: Option<String>,
    /// The store that builds are for, as with Nix's own `--store`.
    pub store: Option<String>,
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
        Command::Sample => Action::Sample,
        Command::PingStore { store, builders, timeout, json } => {
            let targets = match builders {
                Some(text) => Targets::Builders(text),
                None if store.is_empty() => Targets::Configured,
                None => Targets::Stores(store),
            };
            Action::Ping { targets, bound: Duration::from_secs(timeout), json }
        }
        Command::Explain { words, file, last, max_jobs, nix, json } => {
            Action::Explain { wish: Wish { words, file, last, max_jobs, meant: nix.meant() }, json }
        }
        Command::Status { watch, nix, json } => Action::Status { watch, meant: nix.meant(), json },
        Command::Drain(words) => words.action(Withholding::Drained),
        Command::Disable(words) => words.action(Withholding::Disabled),
        Command::Enable { names, nix, json } => {
            Action::Withhold { change: Change::Enable, names, meant: nix.meant(), json }
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
    fn machines_are_withheld_for_a_time_that_is_one() {
        let withhold = |words: &[&str]| match parsed(words).unwrap() {
            Action::Withhold { change, names, .. } => (change, names),
            other => panic!("{other:?}"),
        };
        let (change, names) = withhold(&["x", "drain", "a", "b", "--for", "1h 30m", "--reason", "why"]);
        let span = Some(Duration::from_secs(5400));
        assert_eq!(change, Change::Withhold { how: Withholding::Drained, span, reason: "why".into() });
        assert_eq!(names, ["a", "b"]);
        let (change, _) = withhold(&["x", "disable", "a"]);
        assert_eq!(
            change,
            Change::Withhold { how: Withholding::Disabled, span: None, reason: String::new() }
        );
        assert_eq!(withhold(&["x", "enable", "a"]).0, Change::Enable);
        for wrong in
            [&["drain"][..], &["drain", "a", "--for", "0s"], &["drain", "a", "--for", "2"], &["enable"]]
        {
            assert!(parsed(&[&["x"], wrong].concat()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn explain_takes_installables_or_a_file() {
        let explain = |words: &[&str]| match parsed(words).unwrap() {
            Action::Explain { wish, json } => (wish, json),
            other => panic!("{other:?}"),
        };
        let (wish, json) = explain(&["x", "explain", "nixpkgs#hello", "--last", "--store", "/s", "--json"]);
        let meant = Meant { store: Some("/s".into()), ..Meant::default() };
        let words = vec!["nixpkgs#hello".to_owned()];
        assert_eq!((wish, json), (Wish { words, last: true, meant, ..Wish::default() }, true));
        let (wish, _) = explain(&["x", "explain", "-f", "d.nix", "-j0"]);
        assert_eq!((wish.file.as_deref(), wish.max_jobs), (Some("d.nix"), Some(0)));
        assert!(parsed(&["x", "explain"]).is_err());
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
