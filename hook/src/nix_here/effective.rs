//! Nix's settings as Nix itself reads them, asked of the `nix` that is here, in our place or in that of its daemon.
//!
//! Must never judge what they say.

use super::command;
use super::daemon::Process;
use crate::config::Settings;
use serde_json::Value;
use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;
use thiserror::Error;

/// How long Nix may take to say what its settings are.
const BOUND: Duration = Duration::from_secs(10);
/// Where installers put Nix for those whose PATH does not have it.
const DEFAULT_PROFILE: &str = "/nix/var/nix/profiles/default/bin";
/// What of a daemon's environment counts for its settings.
const COUNTING: [&str; 4] = ["HOME", "USER", "PATH", "LOGNAME"];

/// A version of Nix: major, minor.
pub type Version = (u32, u32);

/// In whose place Nix is asked.
#[derive(Debug, Clone, Default)]
pub struct View {
    nix: Option<PathBuf>,
    environment: Option<Vec<(OsString, OsString)>>,
    options: Vec<String>,
}

impl View {
    /// That of whoever calls us.
    pub fn own() -> Self {
        Self {
            nix: on_path(&env::var_os("PATH").unwrap_or_default()),
            environment: None,
            options: Vec::new(),
        }
    }

    /// That of a daemon whose environment may not be looked at: what the files for everybody say.
    pub fn everybody() -> Self {
        let kept = env::vars_os().filter(|(name, _)| COUNTING.contains(&&*name.to_string_lossy()));
        let environment = kept.chain([("NIX_USER_CONF_FILES".into(), OsString::new())]).collect();
        Self { environment: Some(environment), ..Self::own() }
    }

    /// That of a daemon, if we may look at its environment.
    pub fn of(daemon: &Process) -> Option<Self> {
        let counts =
            |name: &str| name.starts_with("NIX_") || name.starts_with("XDG_") || COUNTING.contains(&name);
        let mut environment = daemon.environment.clone()?;
        environment.retain(|(name, _)| counts(&name.to_string_lossy()));
        let beside = daemon.program.as_deref().and_then(Path::parent).map(|directory| directory.join("nix"));
        let nix = beside.filter(|nix| nix.is_file()).or_else(|| Self::own().nix);
        let mut options = Vec::new();
        for words in daemon.words.windows(3).filter(|words| words[0] == "--option") {
            options.extend(words.iter().cloned());
        }
        Some(Self { nix, environment: Some(environment), options })
    }

    /// With the program of another view, if this one has none.
    #[must_use]
    pub fn or_program_of(self, other: &Self) -> Self {
        Self { nix: self.nix.or_else(|| other.nix.clone()), ..self }
    }

    /// A variable as Nix finds it.
    pub fn variable(&self, name: &str) -> Option<OsString> {
        match &self.environment {
            None => env::var_os(name),
            Some(pairs) => pairs.iter().find(|(found, _)| found == name).map(|(_, value)| value.clone()),
        }
    }

    /// One of Nix's programs, from beside the one that is asked.
    ///
    /// # Errors
    /// If there is no Nix.
    pub fn program(&self, name: &str) -> Result<PathBuf, AskError> {
        self.nix.as_ref().map(|nix| nix.with_file_name(name)).ok_or(AskError::NoNix)
    }

    /// Asks for all settings.
    ///
    /// # Errors
    /// With the command that failed.
    pub fn ask(&self) -> Result<Effective, AskError> {
        let nix = self.nix.as_deref().ok_or(AskError::NoNix)?;
        let version_text = self.run(nix, &["--version"])?.1;
        let version = version(&version_text);
        // It was called otherwise before 2.20.
        let words: &[&str] = match version {
            Some((2, ..20)) => &["show-config", "--json"],
            _ => &["config", "show", "--json"],
        };
        let (command, text) =
            self.run(nix, &[&["--extra-experimental-features", "nix-command"], words].concat())?;
        let Ok(Value::Object(settings)) = serde_json::from_str(&text) else {
            return Err(AskError::Unreadable { command });
        };
        let settings: BTreeMap<String, String> = settings
            .iter()
            .filter_map(|(name, setting)| Some((name.clone(), plain(setting.get("value")?)?)))
            .collect();
        Ok(Effective {
            version,
            version_text: version_text.trim().to_owned(),
            command,
            settings: Settings(settings),
        })
    }

    fn run(&self, nix: &Path, words: &[&str]) -> Result<(String, String), AskError> {
        let mut command = Command::new(nix);
        command.args(words).args(&self.options).current_dir("/");
        if let Some(environment) = &self.environment {
            command.env_clear().envs(environment.iter().cloned());
        }
        let words = words.iter().map(|word| (*word).to_owned()).chain(self.options.iter().cloned());
        let line = [nix.display().to_string()].into_iter().chain(words).collect::<Vec<_>>().join(" ");
        match command::run(&mut command, BOUND) {
            Ok(answer) if answer.status.success() => Ok((line, answer.stdout)),
            Ok(answer) => {
                Err(AskError::Failed { command: line, status: answer.status, stderr: answer.stderr })
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                Err(AskError::TimedOut { command: line })
            }
            Err(source) => Err(AskError::Start { command: line, source }),
        }
    }
}

/// What Nix says of its settings.
#[derive(Debug, Clone)]
pub struct Effective {
    /// Its version, if it can be told.
    pub version: Option<Version>,
    /// What it says of its version.
    pub version_text: String,
    /// The command that was run.
    pub command: String,
    /// All settings; the words of a list have one blank between them.
    pub settings: Settings,
}

/// Why Nix's settings are not known.
#[derive(Debug, Error)]
pub enum AskError {
    /// There is none.
    #[error("there is no program 'nix', neither on the PATH nor in {DEFAULT_PROFILE}")]
    NoNix,
    /// It cannot be started.
    #[error("cannot run '{command}'")]
    Start {
        /// What was run.
        command: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It did not end.
    #[error("'{command}' did not end within {} seconds", BOUND.as_secs())]
    TimedOut {
        /// What was run.
        command: String,
    },
    /// It failed.
    #[error("'{command}' ended with {status}: {}", stderr.trim())]
    Failed {
        /// What was run.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// It said something else.
    #[error("'{command}' did not print an object of settings")]
    Unreadable {
        /// What was run.
        command: String,
    },
}

impl AskError {
    /// What to do about it.
    pub fn cure(&self) -> &'static str {
        match self {
            Self::NoNix => "install Nix, or put the directory of 'nix' on the PATH",
            Self::Start { .. } => "see that this file is a program for this machine",
            Self::TimedOut { .. } => "run it by hand and see what it waits for",
            Self::Failed { .. } => "correct what Nix complains of: nothing can be built before",
            Self::Unreadable { .. } => "run it by hand and see what it prints; Nix 2.4 or newer is needed",
        }
    }
}

fn on_path(path: &OsString) -> Option<PathBuf> {
    let directories = env::split_paths(path).chain([PathBuf::from(DEFAULT_PROFILE)]);
    directories.map(|directory| directory.join("nix")).find(|nix| nix.is_file())
}

/// The first two numbers of the last word, as in `nix (Nix) 2.26.3`.
fn version(text: &str) -> Option<Version> {
    let mut numbers = text.split_whitespace().next_back()?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A value as it would be written in nix.conf. Those of other shapes are none that we ask for.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Array(words) => Some(words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")),
        Value::Null | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_asked_with_its_own_environment_and_options() {
        let environment = [("NIX_CONFIG", "a = b"), ("SECRET", "x"), ("HOME", "/h")];
        let daemon = Process {
            pid: 1,
            started: None,
            program: None,
            environment: Some(environment.map(|(name, value)| (name.into(), value.into())).into()),
            words: ["nix-daemon", "-v", "--option", "build-hook", "/b"].map(str::to_owned).into(),
        };
        let view = View::of(&daemon).unwrap();
        assert_eq!(view.options, ["--option", "build-hook", "/b"]);
        assert_eq!(view.variable("NIX_CONFIG"), Some("a = b".into()));
        assert_eq!((view.variable("SECRET"), view.variable("PATH")), (None, None));
        assert!(View::of(&Process { environment: None, ..daemon }).is_none());
        assert_eq!(View::everybody().variable("NIX_USER_CONF_FILES"), Some("".into()));
    }

    #[test]
    fn versions_of_nix_are_read() {
        for (text, expected) in [
            ("nix (Nix) 2.26.3\n", Some((2, 26))),
            ("nix (Nix) 2.8.0", Some((2, 8))),
            ("nix (Nix) 2.19pre20231010_abc", Some((2, 19))),
            ("nix (Lix, like Nix) 2.94.0-dev", Some((2, 94))),
            ("nix", None),
        ] {
            assert_eq!(version(text), expected, "{text}");
        }
    }
}
