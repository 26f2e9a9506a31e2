//! Machines that somebody took out of service.

use super::{make, read, write};
use crate::plan::known::{Withheld, Withholding};
use nix::fcntl::{Flock, FlockArg, OFlag};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const FILE: &str = "withheld.json";

/// What is kept of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// `drained` or `disabled`.
    how: String,
    /// Seconds since 1970.
    #[serde(default)]
    until: Option<u64>,
    #[serde(default)]
    why: String,
}

/// All machines that are out of service, by the names of the list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Withholdings(BTreeMap<String, Entry>);

impl Withholdings {
    /// Reads them from a state directory.
    pub fn read(directory: &Path) -> Self {
        let text = read(&directory.join(FILE));
        Self(text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default())
    }

    /// What is said of a machine, be it over or not.
    pub fn of(&self, machine: &str) -> Option<Withheld> {
        self.0.get(machine).map(Entry::to_withheld)
    }

    /// All that is in force.
    pub fn in_force(&self, now: SystemTime) -> impl Iterator<Item = (&str, Withheld)> {
        let all = self.0.iter().map(|(name, entry)| (name.as_str(), entry.to_withheld()));
        all.filter(move |(_, withheld)| withheld.holds(now))
    }

    /// Takes machines out of service, or back into it (`None`). Gives the names of which something else was said before.
    /// What is over is forgotten.
    ///
    /// # Errors
    /// If it cannot be kept.
    pub fn change(directory: &Path, machines: &[String], to: Option<&Withheld>) -> io::Result<Vec<String>> {
        let now = SystemTime::now();
        let path = directory.join(FILE);
        let _turn = turn(directory)?;
        let mut all = Self::read(directory);
        all.0.retain(|_, entry| entry.to_withheld().holds(now));
        let to = to.map(Entry::of);
        let mut changed = Vec::new();
        for machine in machines {
            let before = match &to {
                Some(entry) => all.0.insert(machine.clone(), entry.clone()),
                None => all.0.remove(machine),
            };
            if before != to {
                changed.push(machine.clone());
            }
        }
        write(&path, &serde_json::to_string_pretty(&all.0).map_err(io::Error::other)?)?;
        Ok(changed)
    }
}

impl Entry {
    fn of(withheld: &Withheld) -> Self {
        let how = match withheld.how {
            Withholding::Drained => "drained",
            Withholding::Disabled => "disabled",
        };
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self { how: how.to_owned(), until: withheld.until.map(seconds), why: withheld.why.clone() }
    }

    fn to_withheld(&self) -> Withheld {
        // What another version may write withholds in the way that takes less.
        let how = if self.how == "disabled" { Withholding::Disabled } else { Withholding::Drained };
        let until = self.until.and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
        Withheld { how, until, why: self.why.clone() }
    }
}

fn turn(directory: &Path) -> io::Result<Flock<std::fs::File>> {
    make(directory)?;
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(flags);
    let file = options.open(directory.join("withheld.lock"))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_taken_out_of_service_for_a_time_and_put_back() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        assert_eq!(Withholdings::read(&state), Withholdings::default());
        let now =
            UNIX_EPOCH + Duration::from_secs(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs());
        let until = Some(now + Duration::from_secs(7200));
        let drained = Withheld { how: Withholding::Drained, until, why: "new disk".into() };
        let over = Withheld { how: Withholding::Disabled, until: Some(now), why: String::new() };
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let change = |machines: &[&str], to| Withholdings::change(&state, &names(machines), to).unwrap();
        assert_eq!(change(&["a", "b"], Some(&drained)), ["a", "b"]);
        assert_eq!(change(&["a", "c"], Some(&drained)), ["c"]);
        assert_eq!(change(&["b"], Some(&over)), ["b"]);
        let all = Withholdings::read(&state);
        assert_eq!(
            (all.of("a"), all.of("b"), all.of("d")),
            (Some(drained.clone()), Some(over.clone()), None)
        );
        assert_eq!(all.in_force(now).map(|(name, _)| name).collect::<Vec<_>>(), ["a", "c"]);
        assert_eq!(change(&["a", "d"], None), ["a"]);
        assert_eq!(Withholdings::read(&state).0.into_keys().collect::<Vec<_>>(), ["c"]);
        std::fs::write(state.join(FILE), "{ \"a\": 7").unwrap();
        assert_eq!(Withholdings::read(&state), Withholdings::default());
    }

    #[test]
    fn changes_at_the_same_time_are_all_kept() {
        let directory = tempfile::tempdir().unwrap();
        let withheld = Withheld { how: Withholding::Disabled, until: None, why: String::new() };
        // The first ones make the directory.
        for round in 0..200 {
            let state = directory.path().join(format!("{round}"));
            let gate = std::sync::Barrier::new(16);
            std::thread::scope(|scope| {
                for number in 0..16 {
                    let (state, withheld, gate) = (&state, &withheld, &gate);
                    scope.spawn(move || {
                        gate.wait();
                        Withholdings::change(state, &[format!("m{number}")], Some(withheld)).unwrap()
                    });
                }
            });
            assert_eq!(Withholdings::read(&state).0.len(), 16);
        }
    }
}
