//! Equal files as hard links to one, for `auto-optimise-store`.

use super::Location;
use nix::errno::Errno;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix_archive::nar::{self, CaseHack};
use nix_derivation::{NixHash, StorePath};
use std::ffi::OsString;
use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

/// What optimising a path has saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Optimised {
    /// Files that are now links to older ones.
    pub files_linked: u64,
    /// Their sizes together.
    pub bytes_freed: u64,
}

/// A path that could not be optimised; it is whole all the same.
#[derive(Debug, Error)]
pub enum OptimiseError {
    /// A file could not be read.
    #[error("cannot hash '{}'", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: nar::Error,
    },
    /// The system said no.
    #[error("cannot {action} '{}'", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was to be done with it.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Replaces the files of `path` by hard links into `.links` of the store, as `auto-optimise-store` does.
///
/// To be called between [`restore`](super::restore()) and registering. Files that other processes are just
/// linking or collecting are left as they are. Mirrors `LocalStore::optimisePath_` (`optimise-store.cc`,
/// Nix 2.34), symlinks included.
pub fn optimise(location: &Location, path: &StorePath) -> Result<Optimised, OptimiseError> {
    let links = location.real_store_dir.join(".links");
    let mut work = Work { store: &location.real_store_dir, links, done: Optimised::default() };
    work.visit(&location.real_path(path))?;
    Ok(work.done)
}

struct Work<'a> {
    store: &'a Path,
    links: PathBuf,
    done: Optimised,
}

impl Work<'_> {
    /// Whether the parent directory was changed.
    fn visit(&mut self, path: &Path) -> Result<bool, OptimiseError> {
        let metadata = fs::symlink_metadata(path).map_err(failed("look at", path))?;
        if !metadata.is_dir() {
            return self.link(path, &metadata);
        }
        let mut changed = false;
        let result = self.visit_children(path, &mut changed);
        if changed || result.is_err() {
            fs::set_permissions(path, Permissions::from_mode(0o555))
                .and_then(|()| set_mtime(path))
                .map_err(failed("set the metadata of", path))?;
        }
        result.map(|()| false)
    }

    fn visit_children(&mut self, directory: &Path, changed: &mut bool) -> Result<(), OptimiseError> {
        // All names first: replacing one must not disturb the listing.
        let names: Vec<OsString> = fs::read_dir(directory)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
            .map_err(failed("list", directory))?;
        for name in names {
            *changed |= self.visit(&directory.join(name))?;
        }
        Ok(())
    }

    fn link(&mut self, path: &Path, metadata: &Metadata) -> Result<bool, OptimiseError> {
        // Only files as the store makes them; a writable one may change under its links.
        if metadata.is_file() && metadata.mode() & 0o200 != 0 {
            return Ok(false);
        }
        // The hash of the NAR, which tells executables and symlinks from plain files.
        let hash = nar::hash_path(path, CaseHack::Disabled)
            .map_err(|source| OptimiseError::Hash { path: path.to_owned(), source })?;
        let hash = NixHash::Sha256(hash.sha256).to_nix_nixbase32_string();
        let link = self.links.join(hash.trim_start_matches("sha256:"));

        if let Ok(found) = fs::symlink_metadata(&link)
            && found.len() != metadata.len()
        {
            // Somebody has damaged the file that the link shares.
            absent_is_fine(fs::remove_file(&link)).map_err(failed("delete", &link))?;
        }
        match fs::hard_link(path, &link) {
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            // On ext4 the directory of links can be full; then this file stays as it is.
            Err(error) if is(&error, &[Errno::ENOSPC, Errno::EMLINK]) => return Ok(false),
            Err(error) => return Err(failed("link to", path)(error)),
        }
        match fs::symlink_metadata(&link) {
            Ok(found) if found.ino() == metadata.ino() => return Ok(false),
            Ok(_) => {}
            // Collected this moment.
            Err(error) if is(&error, &[Errno::ENOENT]) => return Ok(false),
            Err(error) => return Err(failed("look at", &link)(error)),
        }
        let replaced = self.replace(path, &link)?;
        if replaced {
            self.done.files_linked += 1;
            self.done.bytes_freed += metadata.len();
        }
        Ok(replaced)
    }

    fn replace(&self, path: &Path, link: &Path) -> Result<bool, OptimiseError> {
        // In the store itself, as Nix has it: the collector sweeps there what a kill leaves behind.
        let number = LINKS.fetch_add(1, Ordering::Relaxed);
        let temporary = self.store.join(format!(".tmp-link-{}-{number}-offload", std::process::id()));
        // A file has 32,000 links at most on many file systems; empty files get there.
        const SHRUG: [Errno; 2] = [Errno::EMLINK, Errno::ENOENT];
        match fs::hard_link(link, &temporary) {
            Ok(()) => {}
            Err(error) if is(&error, &SHRUG) => return Ok(false),
            Err(error) => return Err(failed("link to", link)(error)),
        }
        let parent = path.parent().filter(|parent| *parent != self.store);
        let writable = match parent {
            Some(parent) => fs::set_permissions(parent, Permissions::from_mode(0o755)),
            None => Ok(()),
        };
        let renamed = writable.and_then(|()| fs::rename(&temporary, path));
        let result = match renamed {
            Ok(()) => return Ok(true),
            Err(error) if is(&error, &SHRUG) => Ok(true),
            Err(error) => Err(failed("replace", path)(error)),
        };
        let _ = fs::remove_file(&temporary);
        result
    }
}

fn set_mtime(path: &Path) -> io::Result<()> {
    let mtime = TimeSpec::new(1, 0);
    utimensat(nix::fcntl::AT_FDCWD, path, &TimeSpec::UTIME_OMIT, &mtime, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}

fn is(error: &io::Error, kinds: &[Errno]) -> bool {
    error.raw_os_error().is_some_and(|code| kinds.contains(&Errno::from_raw(code)))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is(&error, &[Errno::ENOENT]) => Ok(()),
        other => other,
    }
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> OptimiseError + use<> {
    let path = path.to_owned();
    move |source| OptimiseError::Io { path: path.clone(), action, source }
}

/// Numbers the temporary links of this process.
static LINKS: AtomicU64 = AtomicU64::new(0);
