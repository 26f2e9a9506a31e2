//! What processes note of machines for each other, in files of the runtime directory: which notes there are, what each
//! means, and for how long it is believed.
//!
//! The time of a note is that of its file. That one cannot be left only costs others time.

use nix_offload_proxy::small_file;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A machine that answered so recently is taken to be well without asking again.
pub const WARM: Duration = Duration::from_secs(60);

/// What can be noted of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Note {
    /// It answered, and by which [way](super::Way). Removed when it fails.
    Answered,
    /// No daemon of it could be reached or started, and why. `nix-store --serve` comes first meanwhile, and the other ways
    /// only if that fails.
    Serve,
    /// It refused a channel to its daemon's socket, and how, or the daemon there did not answer and one of our own did. It is
    /// not asked for one meanwhile. The first refusal leaves a small process behind until the master ends, so later it is
    /// asked in another way.
    Refused,
    /// Its daemon does not trust us. What the daemon says, or shows when it is asked, counts for more; and even when this
    /// is not believed any more, the machine is not promised a build unseen.
    Untrusted,
    /// A build would have gone there but for what was seen there.
    Wanted,
    /// There was a lease on it, so it has the means for them.
    Leased,
    /// It has not the means for leases, and why. It is asked for none meanwhile.
    Unleased,
    /// Its Nix is too old for requests that are sent before it has said its version.
    Old,
    /// What settings it has of its own.
    Own,
    /// It does not tell them, and why. It is not asked for them meanwhile.
    Untold,
    /// Which paths were seen there ([`Seen`](super::Seen)), each with a time of its own.
    Seen,
    /// The older ones of these.
    SeenBefore,
    /// How fast bytes travel ([`Speed`](super::Speed)).
    Speed,
}

impl Note {
    /// How long it is believed; for ever if nothing else is said by who reads it.
    fn believed(self) -> Duration {
        const MINUTE: Duration = Duration::from_secs(60);
        match self {
            Self::Answered => WARM,
            Self::Serve | Self::Refused | Self::Untrusted | Self::Unleased | Self::Old | Self::Untold => {
                MINUTE * 10
            }
            Self::Own => MINUTE * 60 * 4,
            Self::Leased => MINUTE * 60 * 24,
            Self::Wanted | Self::Seen | Self::SeenBefore | Self::Speed => Duration::MAX,
        }
    }

    /// What its file's name ends with. Hooks of other versions look for the same.
    fn extension(self) -> &'static str {
        match self {
            Self::Answered => "",
            Self::Serve => "serve",
            Self::Refused => "refused",
            Self::Untrusted => "untrusted",
            Self::Wanted => "wanted",
            Self::Leased => "leased",
            Self::Unleased => "unleased",
            Self::Old => "old",
            Self::Own => "settings",
            Self::Untold => "untold",
            Self::Seen => "seen",
            Self::SeenBefore => "seen-before",
            Self::Speed => "speed",
        }
    }
}

/// What is noted of one machine.
#[derive(Debug, Clone)]
pub(super) struct Notes(PathBuf);

impl Notes {
    /// In files of that name, with an extension for each.
    pub(super) fn at(name: PathBuf) -> Self {
        Self(name)
    }

    /// The file of a note, which need not be there.
    pub(super) fn path(&self, note: Note) -> PathBuf {
        self.0.with_extension(note.extension())
    }

    /// Leaves a note in the place of the one that was there.
    pub(super) fn put(&self, note: Note, text: &str) {
        put(&self.path(note), text);
    }

    /// Takes it away.
    pub(super) fn remove(&self, note: Note) {
        let _ = fs::remove_file(self.path(note));
    }

    /// What it says, as long as it is believed.
    pub(super) fn get(&self, note: Note) -> Option<String> {
        get(&self.path(note), note.believed())
    }

    /// Whether it was left in the first quarter of the time for which it is believed. Then nobody need leave it again.
    pub(super) fn is_young(&self, note: Note) -> bool {
        self.time(note).is_ok_and(|time| is_younger(time, note.believed() / 4))
    }

    /// Whether it is believed.
    pub(super) fn holds(&self, note: Note) -> bool {
        self.time(note).is_ok_and(|time| is_younger(time, note.believed()))
    }

    /// Whether there is one, believed or not.
    pub(super) fn is_there(&self, note: Note) -> bool {
        self.path(note).exists()
    }

    /// What it says, believed or not.
    pub(super) fn read(&self, note: Note) -> io::Result<String> {
        fs::read_to_string(self.path(note))
    }

    /// When it was left.
    pub(super) fn time(&self, note: Note) -> io::Result<SystemTime> {
        fs::metadata(self.path(note)).and_then(|file| file.modified())
    }
}

/// Leaves a note in a file, whole.
pub(super) fn put(path: &Path, text: &str) {
    let _ = small_file::in_directory(path, || small_file::write_whole(path, text));
}

/// What a file says, if it was written within `bound`.
pub(super) fn get(path: &Path, bound: Duration) -> Option<String> {
    let time = fs::metadata(path).and_then(|file| file.modified()).ok()?;
    if is_younger(time, bound) { fs::read_to_string(path).ok() } else { None }
}

fn is_younger(time: SystemTime, bound: Duration) -> bool {
    SystemTime::now().duration_since(time).is_ok_and(|age| age < bound)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn notes_have_the_names_of_other_versions_and_are_believed_for_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let notes = Notes::at(directory.path().join("answered/0123"));
        assert!(!notes.holds(Note::Answered) && !notes.is_there(Note::Answered));
        let all = [
            (Note::Answered, "0123", 60),
            (Note::Serve, "0123.serve", 600),
            (Note::Refused, "0123.refused", 600),
            (Note::Untrusted, "0123.untrusted", 600),
            (Note::Leased, "0123.leased", 86_400),
            (Note::Unleased, "0123.unleased", 600),
            (Note::Old, "0123.old", 600),
            (Note::Own, "0123.settings", 14_400),
            (Note::Untold, "0123.untold", 600),
            (Note::Wanted, "0123.wanted", u64::MAX),
            (Note::Seen, "0123.seen", u64::MAX),
            (Note::SeenBefore, "0123.seen-before", u64::MAX),
            (Note::Speed, "0123.speed", u64::MAX),
        ];
        for (note, name, seconds) in all {
            notes.put(note, name);
            let path = directory.path().join("answered").join(name);
            assert_eq!(fs::read_to_string(&path).unwrap(), name);
            assert!(notes.holds(note) && notes.is_young(note), "{note:?}");
            let Some(old) = SystemTime::now().checked_sub(Duration::from_secs(seconds)) else { continue };
            let set = |time| File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
            set(old + Duration::from_secs(20));
            assert_eq!(notes.get(note).as_deref(), Some(name));
            assert!(!notes.is_young(note), "{note:?}");
            set(old);
            assert_eq!((notes.get(note), notes.holds(note)), (None, false));
            assert_eq!(notes.read(note).unwrap(), name);
        }
        let before = File::open(notes.path(Note::Own)).unwrap();
        notes.put(Note::Own, "another");
        assert_eq!(io::read_to_string(before).unwrap(), "0123.settings", "it is replaced, not emptied");
        notes.remove(Note::Answered);
        assert!(!notes.is_there(Note::Answered) && notes.is_there(Note::Serve));
    }
}
