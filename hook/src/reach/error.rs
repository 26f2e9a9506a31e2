//! Why a machine cannot be reached: the sentence, the cure, the exit code.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::local::LocalError;
use crate::builder::BuilderError;
use crate::plan::trust::Distrust;
use crate::slots::SlotError;
use nix_offload_proxy::exit::{self, Failure};
use nix_offload_proxy::master::{EndpointError, OpenError, SetupError, StartError};
use thiserror::Error;

/// Why a machine cannot be reached.
#[derive(Debug, Error)]
pub enum ReachError {
    /// Its store is reached in a way we do not speak.
    #[error("stores of the kind '{0}' are not reached over SSH")]
    NotSsh(String),
    /// A program that is to run here and is none we can use here.
    #[error("the machine's remote-program '{0}' is not a nix-store program, which ssh://localhost needs")]
    RemoteProgram(String),
    /// Its line makes no endpoint for ssh.
    #[error("the machine's address cannot be used")]
    Endpoint(#[from] EndpointError),
    /// No SSH connection.
    #[error(transparent)]
    Start(#[from] StartError),
    /// An SSH connection, but no stream on it.
    #[error("no stream could be opened on the SSH connection")]
    Open(#[from] OpenError),
    /// Nix's programs are not found there.
    #[error("the builder has no Nix that a login without terminal finds{}", words(.stderr))]
    NoNix {
        /// What the builder's shell said.
        stderr: String,
        /// What a `remote-program` of that machine would name.
        program: String,
    },
    /// The program that its URI names is not there, or cannot be run.
    #[error("there is no {program} on {host}{}", words(.stderr))]
    NoProgram {
        /// The program.
        program: String,
        /// The machine's host.
        host: String,
        /// What its shell said.
        stderr: String,
    },
    /// The program ended instead of answering.
    #[error("'{command}' {}{}", ended(*.exit), words(.stderr))]
    Ended {
        /// The command.
        command: String,
        /// Its exit status.
        exit: Option<u32>,
        /// What it said.
        stderr: String,
        /// What came instead of a greeting.
        #[source]
        source: Box<BuilderError>,
    },
    /// No connection to a store of this machine.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// A daemon that does not talk as expected.
    #[error(transparent)]
    Daemon(BuilderError),
    /// A daemon that will not build for us.
    #[error(transparent)]
    Distrust(#[from] Distrust),
}

fn words(stderr: &str) -> String {
    let text = last_words(stderr);
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// The end of what a program said, where the reason stands, as people may read it: in one line, without control characters,
/// which a terminal would follow.
pub(super) fn last_words(said: &str) -> String {
    /// In characters.
    const QUOTED: usize = 400;
    let blank = said.chars().map(|c| if c.is_whitespace() { ' ' } else { c });
    let line: String = blank.filter(|c| !c.is_control()).collect();
    let surplus = line.trim().chars().count().saturating_sub(QUOTED);
    line.trim().chars().skip(surplus).collect()
}

fn ended(exit: Option<u32>) -> String {
    exit.map_or_else(|| "ended".into(), |code| format!("ended with exit status {code}"))
}

impl ReachError {
    /// Whether the machine is well and lets us have no session.
    pub fn is_no_session(&self) -> bool {
        matches!(self, Self::Open(OpenError::Refused { .. }))
    }

    /// Whether the machine is well and we have all the shells there that we may have.
    pub fn is_crowded(&self) -> bool {
        matches!(self, Self::Open(OpenError::Taken))
    }

    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            Self::NotSsh(_) => Some(
                "builds for it are left to Nix's own hook; else write the machine as ssh-ng://[user@]host or \
                 ssh://[user@]host"
                    .into(),
            ),
            Self::RemoteProgram(_) => Some(
                "name the path of nix-store, or write the machine as ssh-ng:// and name nix-daemon".into(),
            ),
            Self::Endpoint(_) => Some("correct the machine's line in the list of machines".into()),
            Self::Start(error) => error.cure(),
            Self::Local(error) => Some(error.cure()),
            Self::Open(OpenError::Refused { .. }) => Some(
                "see the builder's sshd log; it must allow forwarding of unix sockets \
                 (AllowStreamLocalForwarding) or commands (MaxSessions, ForceCommand)"
                    .into(),
            ),
            Self::Open(OpenError::TimedOut { .. }) => Some(
                "check that the machine is up and not overloaded, and that the network lets us reach it".into(),
            ),
            Self::Open(_) => Some("try again, which makes another SSH connection if need be".into()),
            Self::NoNix { program, .. } => Some(format!(
                "install Nix there; if it is installed, make '{program}' known to shells that are not \
                 interactive, or append ?remote-program=/path/to/{program} to the machine's URI"
            )),
            Self::NoProgram { .. } => Some("correct remote-program in the machine's URI, or leave it out".into()),
            Self::Ended { command, .. } if command.contains("nix-daemon --serve") => {
                Some("the remote-program of an ssh:// machine is its nix-store: name that, not nix-daemon".into())
            }
            Self::Ended { command, .. } if command.contains("--serve") => {
                Some("log in to the builder with ssh and see what 'nix-store --serve --write' says".into())
            }
            Self::Ended { .. } | Self::Daemon(BuilderError::NoDaemon { .. }) => {
                Some("log in to the builder with ssh and see what 'nix-daemon --stdio' says".into())
            }
            Self::Daemon(BuilderError::Protocol { .. }) => {
                Some("upgrade Nix on the builder; versions from 2.0 on are spoken".into())
            }
            Self::Daemon(_) => Some("see on the builder whether nix-daemon runs and is well".into()),
            Self::Distrust(distrust) => Some(distrust.cure()),
        }
    }

    /// The exit code for a command whose only trouble is this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Start(error) => error.exit_code(),
            Self::NotSsh(_) | Self::Endpoint(_) => exit::CONFIG,
            Self::Distrust(_) => exit::NO_PERMISSION,
            _ => exit::UNAVAILABLE,
        }
    }

    /// Whether that Nix's programs are not found is all that is known.
    pub(super) fn is_no_nix(&self) -> bool {
        matches!(self, Self::NoNix { .. } | Self::NoProgram { .. })
    }

    /// Whether there may be a `nix-store --serve` where no daemon could be started: the program is missing, or
    /// something else answered, as where sshd runs one command whatever is asked for.
    pub(super) fn may_serve(&self) -> bool {
        self.is_no_nix() || matches!(self, Self::Ended { .. })
    }

    /// Whether something of Nix answered that speaks another protocol (`opServe` in `nix-store.cc` and `processConnection`
    /// in `daemon.cc` say so).
    pub(super) fn is_other_protocol(&self) -> bool {
        matches!(self, Self::Ended { stderr, .. } if stderr.contains("protocol mismatch"))
    }

    /// Whether the machine is down and has been told to wake up.
    pub fn is_waking(&self) -> bool {
        matches!(self, Self::Start(StartError::Waking { .. }))
    }

    /// Whether that was this very moment, so that it is worth telling.
    pub fn has_just_begun_to_wake(&self) -> bool {
        matches!(self, Self::Start(StartError::Waking { waking, .. }) if waking.since.is_zero())
    }

    /// Whether this machine has no network.
    pub fn is_no_network(&self) -> bool {
        matches!(self, Self::Start(StartError::NoNetwork { .. }))
    }

    /// Cause and cure as one text for Nix's user.
    pub fn describe(&self) -> String {
        exit::reason_and_cure(self, self.cure().as_deref()).replace("\nhint: ", "\n  hint: ")
    }
}

/// Why no machine can be reached from here.
#[derive(Debug, Error)]
pub enum ReachSetupError {
    /// The directory of the masters, or what is set for them.
    #[error(transparent)]
    Masters(#[from] SetupError),
    /// The locks in it.
    #[error(transparent)]
    Locks(#[from] SlotError),
    /// `NIX_SSHOPTS` is split into words like a shell does, as by Nix since 2.25.
    #[error("NIX_SSHOPTS has a quote that is not closed: {0}")]
    SshOptions(String),
}

impl ReachSetupError {
    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            Self::Masters(error) => error.cure(),
            Self::Locks(_) => None,
            Self::SshOptions(_) => Some("close the quote, or put a backslash before it".into()),
        }
    }
}

impl From<ReachSetupError> for Failure {
    fn from(error: ReachSetupError) -> Self {
        Failure::new(&error, error.cure().as_deref(), exit::CONFIG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_is_not_opened_has_the_cure_of_its_cause() {
        let cure = |error: OpenError| ReachError::from(error).cure().unwrap();
        let bound = std::time::Duration::from_secs(3);
        let gone =
            OpenError::Gone { control: "/run/x".into(), source: std::io::ErrorKind::BrokenPipe.into() };
        for (error, word) in [
            (OpenError::Refused { reason: "no".into() }, "AllowStreamLocalForwarding"),
            (OpenError::TimedOut { bound, master_answers: true }, "the machine is up"),
            (gone, "try again"),
        ] {
            let cure = cure(error);
            assert!(cure.contains(word), "{cure}");
        }
    }

    #[test]
    fn of_a_programs_words_the_end_is_quoted_without_what_a_terminal_would_follow() {
        let told = |stderr: &str| {
            ReachError::NoNix { stderr: stderr.into(), program: "nix-daemon".into() }.to_string()
        };
        let found = "the builder has no Nix that a login without terminal finds";
        assert_eq!(told(" \n"), found);
        assert_eq!(
            told("Hello\u{1b}[2J\u{7}\r\nsh: 1:\tnot found\n"),
            format!("{found}: Hello[2J  sh: 1: not found")
        );
        let long = told(&format!("{}not found", "ä".repeat(16 << 10)));
        assert!(long.ends_with("änot found"), "{long}");
        assert_eq!(long.chars().count(), found.chars().count() + ": ".len() + 400);
    }
}
