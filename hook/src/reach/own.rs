//! What settings a machine's daemon has of its own, which options would replace; the note of them.
//!
//! Must never be asked where no options are to be sent.

use super::notes::{Note, Notes};
use super::session::MORE_DIRECTORIES;
use super::{Reach, left};
use crate::config::Settings;
use crate::digest;
use crate::plan::here::Here;
use crate::plan::machine::Machine;
use crate::wire::worker::Own;
use nix_offload_proxy::exit;
use nix_offload_proxy::master::Stream;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// How long a machine may take to answer, and how long another hook that asks it is waited for.
const BOUND: Duration = Duration::from_secs(5);

/// Most bytes of an answer.
const MOST: usize = 1 << 20;

/// Said behind the answer. What came before is whole then.
const END: &str = "nix-offload-end";

/// Settings as Nix itself has them, whichever of its commands for that it knows (`config show` from 2.20,
/// `show-config` before, which is no experimental one before 2.4). Where the account is not root the daemon is another
/// user's, who does not read its files.
const SCRIPT: &str = r#"[ "$(id -u)" = 0 ] || { NIX_USER_CONF_FILES= NIX_CONFIG=; export NIX_USER_CONF_FILES NIX_CONFIG; }
x='nix --extra-experimental-features nix-command'
{ $x config show || $x show-config || nix show-config; } </dev/null 2>/dev/null
"#;

/// How long to wait before a machine is asked again whose shells are all taken.
const PAUSE: Duration = Duration::from_millis(50);

impl Reach {
    /// What the machine's own settings are, if that is known without asking it; none within if it does not tell. Where it has
    /// told them before, these are taken until it does again. For a store of this machine those of Nix here count, as for the
    /// stock hook.
    pub fn own_settings(&self, machine: &Machine, settings: &Settings) -> Option<Option<Own>> {
        if let Some(Here::Socket(_) | Here::Store(_)) = machine.uri.here() {
            return Some(Some(Own::read(|name| settings.get(name)).with_one_job()));
        }
        let notes = self.notes(machine);
        let own = notes.get(Note::Own).and_then(|text| Own::parse(&text));
        own.map(Some).or_else(|| notes.holds(Note::Untold).then(|| told_last(&notes)))
    }

    /// Asks a machine that is connected for them, and notes the answer for other hooks.
    pub fn ask_own_settings(&self, machine: &Machine, settings: &Settings) -> Option<Own> {
        // One asks, and the others find the note of that one.
        let name = format!("settings-{}", digest::short(&self.identity(machine)));
        let turn = self.opening.take_within(&name, 1, BOUND);
        if let Some(known) = self.own_settings(machine, settings) {
            return known;
        }
        let notes = self.notes(machine);
        let answer = if matches!(turn, Ok(None)) { Ok(None) } else { self.hear_settings(machine) };
        let silence = match answer {
            Ok(Some(answer)) if Own::parse(&answer).is_some() => {
                notes.put(Note::Own, &answer);
                None
            }
            Ok(Some(_)) => {
                notes.remove(Note::Own);
                Some("its answer has none".into())
            }
            Ok(None) => None,
            Err(reason) => Some(reason),
        };
        if let Some(reason) = silence {
            let (event, builder) = ("does not tell its settings", machine.name.as_str());
            tracing::info!(event, builder, reason, "{builder} {event}: {}", exit::first_line(&reason));
            notes.put(Note::Untold, &reason);
        }
        told_last(&notes)
    }

    /// Its answer; none if others have all the shells there that we may have.
    fn hear_settings(&self, machine: &Machine) -> Result<Option<String>, String> {
        let deadline = Instant::now() + BOUND;
        loop {
            match self.shell_beside(machine, left(deadline)) {
                Ok(beside) => return ask(beside.stream, deadline).map(Some),
                Err(error) if !error.is_crowded() => return Err(exit::reason(&error)),
                Err(_) if Instant::now() >= deadline => return Ok(None),
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
}

/// What it told last, however long ago.
fn told_last(notes: &Notes) -> Option<Own> {
    notes.read(Note::Own).ok().and_then(|text| Own::parse(&text))
}

/// Has Nix asked by a shell, and gives those lines of its answer that count.
fn ask(mut stream: Stream, deadline: Instant) -> Result<String, String> {
    let lost = |error: io::Error| error.to_string();
    let script = format!("PATH=\"$PATH:{MORE_DIRECTORIES}\"; export PATH\n{SCRIPT}echo {END}\nexit\n");
    stream.writer.write_all(script.as_bytes()).and_then(|()| stream.writer.flush()).map_err(lost)?;
    let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
    while !answer.ends_with(format!("{END}\n").as_bytes()) {
        if Instant::now() >= deadline || answer.len() > MOST {
            return Err("its answer has no end".into());
        }
        stream.reader.set_timeout(Some(left(deadline))).map_err(lost)?;
        match stream.reader.read(&mut piece) {
            Ok(0) => return Err("its shell ended".into()),
            Ok(length) => answer.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(lost(error)),
        }
    }
    let answer = String::from_utf8_lossy(&answer);
    let counts = |line: &&str| line.split_once(" = ").is_some_and(|(name, _)| Own::NAMES.contains(&name));
    Ok(answer.lines().filter(counts).flat_map(|line| [line, "\n"]).collect())
}
