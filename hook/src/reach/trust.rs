//! Whether a machine's daemon trusts us: what it says or shows, what was noted of that, and by what name it knows us.

use super::notes::Note;
use super::{Reach, ReachError, Reached, endpoint};
use crate::builder::Store;
use crate::plan::machine::Machine;
use crate::plan::trust::{self, Account};
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// How long ssh may take to say what its configuration makes of a name.
const CONFIG_BOUND: Duration = Duration::from_secs(2);

impl Reach {
    /// Whether there is a note that the machine does not trust us, be it out of date: it must not be promised a build
    /// unseen.
    pub fn is_doubtful(&self, machine: &Machine) -> bool {
        self.notes(machine).is_there(Note::Untrusted)
    }

    /// Whether the machine is taken to trust us before it has said anything; `None` if nothing is known.
    pub fn expected_trust(&self, machine: &Machine) -> Option<bool> {
        self.notes(machine).holds(Note::Untrusted).then_some(false)
    }

    /// Whether the machine trusts us, from its greeting or else from what was noted; `None` if nothing is known.
    ///
    /// Of `nix-store --serve` nothing can be known, so no note counts for it.
    pub fn trust(&self, machine: &Machine, builder: &mut Store) -> Option<bool> {
        let said = builder.trusted();
        let is_daemon = builder.daemon().is_some();
        said.or_else(|| if is_daemon { self.expected_trust(machine) } else { None })
    }

    /// Whether the machine trusts us, as its daemon says or, if it does not say, shows when it is asked; `None` if that tells
    /// nothing. Gives the connection back if it is still of use.
    ///
    /// # Errors
    /// If the connection fails or `bound` passes without an answer.
    pub fn find_trust(
        &self,
        machine: &Machine,
        mut reached: Reached,
        bound: Duration,
    ) -> Result<(Option<bool>, Option<Reached>), ReachError> {
        if let Some(trusted) = reached.builder.trusted() {
            return Ok((Some(trusted), Some(reached)));
        }
        let Some(daemon) = reached.builder.daemon() else { return Ok((None, Some(reached))) };
        match daemon.ask_trust(bound).map_err(ReachError::Daemon)? {
            None => {
                self.note_trust(machine, true);
                Ok((Some(true), Some(reached)))
            }
            Some(words) if trust::is_refusal_to_repair(&words) => {
                self.note_trust(machine, false);
                Ok((Some(false), None))
            }
            // It does not repair for another reason, which says nothing of us.
            Some(_) => Ok((None, None)),
        }
    }

    /// Notes for other hooks whether the machine trusts us.
    pub fn note_trust(&self, machine: &Machine, trusted: bool) {
        let notes = self.notes(machine);
        if trusted {
            notes.remove(Note::Untrusted);
        } else if !notes.is_young(Note::Untrusted) {
            notes.put(Note::Untrusted, "does not trust us");
        }
    }

    /// The account by which the machine's daemon knows us, as far as that is known here.
    pub fn account(&self, machine: &Machine) -> Account {
        if machine.uri.here().is_some() {
            let own = nix::unistd::geteuid();
            let user = nix::unistd::User::from_uid(own).ok().flatten();
            let user = user.map_or_else(|| own.to_string(), |user| user.name);
            return Account { user: Some(user), host: "this machine".into() };
        }
        match machine.uri.destination.rsplit_once('@') {
            Some((user, host)) => Account { user: Some(user.to_owned()), host: host.to_owned() },
            None => Account { user: self.login(machine), host: machine.uri.destination.clone() },
        }
    }

    /// The user that ssh logs in as where the machine's line names none.
    fn login(&self, machine: &Machine) -> Option<String> {
        let endpoint = endpoint(machine, &self.ssh_options).ok()?;
        let mut ssh = Command::new("ssh")
            .arg("-G")
            .args(&endpoint.ssh_options)
            .args(["--", endpoint.destination.as_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()
            .ok()?;
        let mut stdout = ssh.stdout.take()?;
        let (done, said) = mpsc::channel();
        // If there is no thread to be had, the other end is gone and nothing is waited for.
        let _ = thread::Builder::new().spawn(move || {
            let mut text = String::new();
            let read = stdout.read_to_string(&mut text);
            let _ = done.send(read.map(|_| text));
        });
        let text = said.recv_timeout(CONFIG_BOUND);
        let _ = ssh.kill();
        let _ = ssh.wait();
        let text = text.ok()?.ok()?;
        text.lines().find_map(|line| line.strip_prefix("user ")).map(|user| user.trim().to_owned())
    }
}
