//! Machines that somebody took out of service.

use super::{MOST_BYTES, make, tidy};
use crate::plan::known::{Withheld, Withholding};
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix_offload_proxy::small_file;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Once;
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
    /// Where they are in a state directory.
    pub fn path(directory: &Path) -> PathBuf {
        directory.join(FILE)
    }

    /// Reads them from a state directory, for builds: what cannot be read keeps none from a machine.
    pub fn read(directory: &Path) -> Self {
        static TOLD: Once = Once::new();
        let (all, fault) = Self::look(directory);
        if let Some(fault) = fault {
            let file = Self::path(directory).display().to_string();
            let event = "cannot read which machines are out of service";
            TOLD.call_once(|| tracing::warn!(event, file, reason = %fault, "{event}: {file}: {fault}"));
        }
        all
    }

    /// The same for people, who are to know that something is lost.
    ///
    /// # Errors
    /// If not all that is there can be read.
    pub fn read_all(directory: &Path) -> io::Result<Self> {
        let (all, fault) = Self::look(directory);
        fault.map_or(Ok(all), Err)
    }

    /// What can be read, and why not all of it can.
    fn look(directory: &Path) -> (Self, Option<io::Error>) {
        let text = match small_file::read_own(&Self::path(directory), MOST_BYTES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Default::default(),
            text => text,
        };
        let values = text.and_then(|text| Ok(serde_json::from_str::<BTreeMap<String, Value>>(&text)?));
        let (mut all, mut fault) = (BTreeMap::new(), None);
        match values {
            Err(error) => fault = Some(error),
            Ok(values) => {
                for (machine, value) in values {
                    match serde_json::from_value(value) {
                        Ok(entry) => drop(all.insert(machine, entry)),
                        Err(error) => fault = Some(io::Error::other(format!("'{machine}': {error}"))),
                    }
                }
            }
        }
        (Self(all), fault)
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
    /// If it cannot be kept, or not all that was kept before can be read.
    pub fn change(directory: &Path, machines: &[String], to: Option<&Withheld>) -> io::Result<Vec<String>> {
        let now = SystemTime::now();
        let path = Self::path(directory);
        let _turn = turn(directory)?;
        let mut all = Self::read_all(directory)?;
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
        // A person has said it, and will not say it again.
        small_file::write_to_last(&path, &serde_json::to_string_pretty(&all.0)?)?;
        tidy(&path);
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
    fn what_cannot_be_read_is_not_written_over() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path();
        let file = Withholdings::path(state);
        let withheld = Withheld { how: Withholding::Disabled, until: None, why: String::new() };
        let good = r#""a": { "how": "disabled" }"#;
        for (text, fault) in [
            ("{ \"a\": 7".to_owned(), "line 1"),
            (format!("{{ {good}, \"b\": 7 }}"), "'b': "),
            (String::new(), "EOF"),
        ] {
            small_file::write_whole(&file, &text).unwrap();
            let error = Withholdings::change(state, &["c".to_owned()], Some(&withheld)).unwrap_err();
            assert!(error.to_string().contains(fault), "{error}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
            let is_readable = text.contains(good);
            assert_eq!(Withholdings::read(state).of("a"), is_readable.then(|| withheld.clone()), "{text}");
        }
        std::fs::remove_file(&file).unwrap();
        Withholdings::change(state, &["c".to_owned()], Some(&withheld)).unwrap();
        assert_eq!(Withholdings::read_all(state).unwrap().of("c"), Some(withheld));
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
