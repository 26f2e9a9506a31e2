//! Programs of Nix in a session: their command lines, where they may be, why they ended.
//!
//! Must never decide which one to use.

use super::{OPEN_BOUND, ReachError, left};
use crate::builder::{Ahead, Builder, BuilderError, ServeStore, Store};
use crate::plan::machine::{Machine, Scheme};
use crate::wire::{serve, worker};
use nix_derivation::StoreDir;
use nix_offload_proxy::master::{Master, SessionEnd, SessionStatus};
use std::time::{Duration, Instant};

/// Where Nix's programs may be when a shell that is not interactive does not find them.
pub(super) const MORE_DIRECTORIES: &str = "/nix/var/nix/profiles/default/bin:/run/current-system/sw/bin:\
                                $HOME/.nix-profile/bin:$HOME/.local/state/nix/profile/bin:\
                                /etc/profiles/per-user/$USER/bin:/usr/local/bin";

/// Where and for what programs are run.
pub(super) struct Session<'a> {
    pub(super) master: &'a Master,
    pub(super) machine: &'a Machine,
    pub(super) store_dir: &'a StoreDir,
    pub(super) deadline: Instant,
    /// What a daemon is sent with the greeting.
    pub(super) ahead: &'a Ahead,
}

impl Session<'_> {
    /// A daemon of our own.
    pub(super) fn daemon(&self) -> Result<Store, ReachError> {
        self.run("nix-daemon", "--stdio", |command| {
            let session = self.master.open_session(command, self.bound())?;
            let (stream, mut status) = session.into_stream();
            let offer = worker::Version::newest();
            match Builder::connect(
                stream,
                self.store_dir.clone(),
                offer,
                left(self.deadline),
                self.ahead.clone(),
            ) {
                Ok(builder) => Ok(Store::Daemon(builder.into())),
                Err(error) => Err(explain(command, &mut status, error)),
            }
        })
    }

    /// `nix-store --serve`. Its log comes on stderr.
    pub(super) fn serve(&self) -> Result<Store, ReachError> {
        self.run("nix-store", "--serve --write", |command| {
            let session = self.master.open_session(command, self.bound())?;
            let (stream, mut status) = session.into_stream();
            status.keep_stderr();
            let offer = serve::Version::newest();
            match ServeStore::connect(stream, status, self.store_dir.clone(), offer, left(self.deadline)) {
                Ok(store) => Ok(Store::Serve(store.into())),
                Err((error, mut status)) => Err(explain(command, &mut status, error)),
            }
        })
    }

    fn bound(&self) -> Duration {
        left(self.deadline).min(OPEN_BOUND)
    }

    fn run(
        &self,
        program: &str,
        options: &str,
        run: impl Fn(&str) -> Result<Store, ReachError>,
    ) -> Result<Store, ReachError> {
        let named = remote_program(self.machine);
        let own = named.clone().unwrap_or_else(|| program.to_owned());
        let mut command = format!("{own} {options}");
        if let Some(store) = self.machine.uri.param("remote-store") {
            command.push_str(&format!(" --store {}", shell_word(store)));
        }
        match run(&command) {
            Err(ReachError::NoNix { .. }) if named.is_none() => {
                let wider = format!("PATH=\"$PATH:{MORE_DIRECTORIES}\"; export PATH; exec {command}");
                run(&format!("/bin/sh -c {}", shell_word(&wider))).map_err(|error| match error {
                    ReachError::NoNix { stderr, .. } => {
                        ReachError::NoNix { stderr, program: usual_program(self.machine).to_owned() }
                    }
                    other => other,
                })
            }
            // The shell has looked for the first of its words.
            Err(ReachError::NoNix { stderr, .. }) => Err(ReachError::NoProgram {
                program: own.split(' ').next().unwrap_or_default().to_owned(),
                host: self.machine.host().to_owned(),
                stderr,
            }),
            other => other,
        }
    }
}

/// The program that a `remote-program` of such a machine stands for, whichever was tried last.
fn usual_program(machine: &Machine) -> &'static str {
    if machine.uri.scheme == Scheme::Ssh { "nix-store" } else { "nix-daemon" }
}

/// Asks the session how it ended.
fn explain(command: &str, status: &mut SessionStatus, source: BuilderError) -> ReachError {
    const STATUS_BOUND: Duration = Duration::from_secs(1);
    // What POSIX shells answer for a command that is not there, or cannot be run.
    const NOT_FOUND: [u32; 2] = [127, 126];
    if !matches!(source, BuilderError::NoDaemon { .. } | BuilderError::Lost { .. }) {
        return ReachError::Daemon(source);
    }
    let SessionEnd { exit, stderr } = status.end(STATUS_BOUND);
    if exit.is_some_and(|code| NOT_FOUND.contains(&code)) {
        return ReachError::NoNix { stderr, program: command.to_owned() };
    }
    ReachError::Ended { command: command.to_owned(), exit, stderr, source: Box::new(source) }
}

/// The machine's `remote-program`, its words quoted where they need that.
fn remote_program(machine: &Machine) -> Option<String> {
    let words: Vec<String> =
        machine.uri.param("remote-program")?.split_whitespace().map(shell_word).collect();
    (!words.is_empty()).then(|| words.join(" "))
}

/// Quotes a word for the builder's shell, where it needs that. A leading `~` keeps its meaning, as it has in
/// stock's unquoted command.
pub(super) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./~+=:@%,-".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn words_are_quoted_for_the_far_shell_where_needed() {
        assert_eq!(shell_word("/nix/bin/nix-daemon"), "/nix/bin/nix-daemon");
        assert_eq!(shell_word("~/bin/nix"), "~/bin/nix");
        assert_eq!(shell_word("/a?b=c&d"), "'/a?b=c&d'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }

    #[test]
    fn the_remote_program_is_followed() {
        let words = |uri: &str| remote_program(&Machine::for_uri(uri, BTreeSet::new()).unwrap());
        assert_eq!(words("ssh-ng://m"), None);
        assert_eq!(words("ssh-ng://m?remote-program="), None);
        assert_eq!(words("ssh-ng://m?remote-program=nix%20daemon").unwrap(), "nix daemon");
        assert_eq!(words("ssh://m?remote-program=/o/bin/nix-store").unwrap(), "/o/bin/nix-store");
        assert_eq!(words("ssh://m?remote-program=/o/a%26b%20c").unwrap(), "'/o/a&b' c");
    }
}
