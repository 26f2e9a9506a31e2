//! Whether a machine has the client's own store, where a build would wait for ever for the locks that Nix holds.
//!
//! Must never ask a file system that might not answer.

use crate::plan::here::{self, Opened};
use crate::plan::machine::Machine;
use crate::store::Location;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Whether a machine's store is the client's own. Nix holds the locks of the outputs while its hook runs, so a build there
/// would wait for ever (with the stock hook of Nix 2.8 to 2.34 it does).
pub fn is_own_store(machine: &Machine, own: &Location, env: impl Fn(&str) -> Option<OsString>) -> bool {
    let usual = env("NIX_REMOTE").and_then(|named| named.into_string().ok()).unwrap_or_default();
    let state = |theirs: Result<Location, _>| Some((theirs.ok()?.state_dir, own.state_dir.clone()));
    let places = match here::opened(machine, &usual) {
        None => None,
        // A look at the disk settles `auto`. Where only a daemon may write to the store, it is that daemon's.
        Some(Opened::Store(setting)) if setting == "auto" => {
            state(Location::find(&setting, &env).or_else(|_| Location::parse(&setting, &env)))
        }
        Some(Opened::Store(setting)) => state(Location::parse(&setting, &env)),
        Some(Opened::Socket(path)) => {
            let named = || env("NIX_DAEMON_SOCKET_PATH").map(PathBuf::from);
            match path.map(PathBuf::from).or_else(named) {
                Some(path) => Some((path, own.state_dir.join("daemon-socket/socket"))),
                None => state(Location::parse("auto", &env)),
            }
        }
    };
    places.is_some_and(|(theirs, ours)| theirs == ours || is_same(&theirs, &ours))
}

/// Whether two paths lead to the same place, as far as that can be told without asking a file system that might never
/// answer. That of our own does.
fn is_same(theirs: &Path, ours: &Path) -> bool {
    let ours = settled(ours, |_| true);
    let mounts = Mounts::parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default());
    settled(theirs, |path| mounts.answers(path) || mounts.of(path) == mounts.of(&ours)) == ours
}

/// A path without symbolic links, up to the first part that may not be looked at.
fn settled(path: &Path, may_look: impl Fn(&Path) -> bool) -> PathBuf {
    /// As many as the kernel follows.
    const MOST_LINKS: usize = 40;
    let mut links = 0;
    let mut done = PathBuf::from("/");
    let mut left: VecDeque<OsString> = path.iter().map(OsString::from).collect();
    while let Some(part) = left.pop_front() {
        match part.as_bytes() {
            b"/" => done = "/".into(),
            b"." => {}
            b".." => drop(done.pop()),
            _ => done.push(part),
        }
        if links == MOST_LINKS || !may_look(&done) {
            done.extend(left);
            return done;
        }
        if let Ok(target) = fs::read_link(&done) {
            links += 1;
            done.pop();
            target.iter().rev().for_each(|part| left.push_front(part.to_owned()));
        }
    }
    done
}

/// What is mounted where, and of what kind it is.
struct Mounts(Vec<(PathBuf, bool)>);

impl Mounts {
    /// Kinds without a device of their own that do not depend on a server or on another process.
    const LOCAL: [&str; 6] = ["bcachefs", "btrfs", "overlay", "ramfs", "tmpfs", "zfs"];

    /// Reads `/proc/self/mountinfo` (proc(5)): `36 35 98:0 /root /mount/point options - kind device options`.
    fn parse(text: &str) -> Self {
        let mount = |line: &str| {
            let (front, back) = line.split_once(" - ")?;
            let mut words = front.split(' ').skip(2);
            let (device, point) = (words.next()?, words.nth(1)?);
            let has_device = !device.starts_with("0:");
            let is_local = has_device || Self::LOCAL.contains(&back.split(' ').next()?);
            Some((PathBuf::from(unescaped(point)), is_local))
        };
        Self(text.lines().filter_map(mount).collect())
    }

    /// The number of the one that a path is on.
    fn of(&self, path: &Path) -> Option<usize> {
        let on = self.0.iter().enumerate().filter(|(_, (point, _))| path.starts_with(point));
        // The last one of those at the same place hides the others.
        on.max_by_key(|(_, (point, _))| point.as_os_str().len()).map(|(number, _)| number)
    }

    /// Whether that answers as long as this machine is well.
    fn answers(&self, path: &Path) -> bool {
        self.of(path).is_none_or(|number| self.0[number].1)
    }
}

/// A blank, a tab, a line's end and a backslash are three octal digits behind a backslash.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_machine_that_is_the_clients_own_store_is_known() {
        let env = |_: &str| None;
        let is_own = |uri: &str, setting: &str| {
            let machine = Machine::for_uri(uri, BTreeSet::new()).unwrap();
            is_own_store(&machine, &Location::parse(setting, env).unwrap(), env)
        };
        for uri in ["auto", "local", "daemon", "localhost", "unix:///nix/var/nix/daemon-socket/socket"] {
            assert!(is_own(uri, "auto"), "{uri}");
            assert!(!is_own(uri, "/root/my-nix"), "{uri}");
        }
        for uri in ["/srv/x", "local?root=/srv/x", "ssh-ng://localhost?remote-store=/srv/x"] {
            assert!(!is_own(uri, "auto"), "{uri}");
            assert!(is_own(uri, "local:///srv/x"), "{uri}");
        }
        for uri in ["ssh-ng://mac", "https://x", "ssh-ng://root@localhost"] {
            assert!(!is_own(uri, "auto"), "{uri}");
        }
        for store in ["auto", "daemon", "unix:///nix/var/nix/daemon-socket/socket"] {
            let uri = format!("ssh-ng://localhost?remote-store={store}");
            assert!(is_own(&uri, "auto") && !is_own(&uri, "/root/my-nix"), "{uri}");
        }
    }

    #[test]
    fn what_nix_opens_here_counts_for_a_program_here() {
        let own = Location::parse("auto", |_| None).unwrap();
        let machine = Machine::for_uri("ssh-ng://localhost", BTreeSet::new()).unwrap();
        for (named, expected) in [
            ("", true),
            ("daemon", true),
            ("unix:///nix/var/nix/daemon-socket/socket", true),
            ("unix:///run/other", false),
            ("/srv/x", false),
        ] {
            let env = |name: &str| (name == "NIX_REMOTE").then(|| named.into());
            assert_eq!(is_own_store(&machine, &own, env), expected, "{named}");
        }
    }

    #[test]
    fn links_are_followed_up_to_what_must_not_be_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(directory.path()).unwrap();
        let path = |name: &str| root.join(name);
        fs::create_dir_all(path("real/nix")).unwrap();
        for (link, target) in [("a", "real"), ("b", "./a/../a"), ("loop", "loop"), ("out", "dead/x")] {
            symlink(target, path(link)).unwrap();
        }
        symlink(path("b"), path("c")).unwrap();
        let looked_at = RefCell::new(Vec::new());
        let settled = |name: &str| {
            settled(&path(name), |path| {
                looked_at.borrow_mut().push(path.to_owned());
                !path.starts_with(root.join("dead"))
            })
        };
        for (name, expected) in [
            ("real/nix", "real/nix"),
            ("c/nix", "real/nix"),
            ("a/none", "real/none"),
            ("dead/a/b", "dead/a/b"),
            ("out/../y", "dead/x/../y"),
        ] {
            assert_eq!(settled(name), path(expected), "{name}");
        }
        assert!(
            !looked_at
                .borrow()
                .iter()
                .any(|path| path.starts_with(root.join("dead/")) && *path != root.join("dead"))
        );
        settled("loop/x");
    }

    #[test]
    fn a_file_system_is_asked_that_depends_on_nobody_else() {
        let mounts = Mounts::parse(
            "1 0 254:1 / / rw - ext4 /dev/vda rw\n\
             2 1 0:30 / /home rw shared:1 - btrfs /dev/vdb rw\n\
             3 1 0:40 / /mnt/a\\040b rw - nfs4 server:/x rw\n\
             4 2 0:41 / /home/me/far rw - fuse.sshfs me@far: rw\n\
             5 1 0:42 / /auto rw - autofs systemd-1 rw\n\
             6 5 254:2 / /auto/disk rw - xfs /dev/vdc rw\n\
             7 1 0:43 / /srv rw - tmpfs tmpfs rw\n\
             8 1 0:44 / /srv rw - nfs server:/srv rw\n\
             nonsense\n",
        );
        for (path, expected) in [
            ("/", true),
            ("/mnt", true),
            ("/mnt/a b", false),
            ("/mnt/a b/c", false),
            ("/mnt/a bc", true),
            ("/home/me", true),
            ("/home/me/far/store", false),
            ("/auto/else", false),
            ("/auto/disk/store", true),
            ("/srv/store", false),
        ] {
            assert_eq!(mounts.answers(Path::new(path)), expected, "{path}");
        }
        assert!(Mounts::parse("").answers(Path::new("/x")));
    }
}
