//! Deleting what a killed build or import left in the store.

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmod, fchmodat, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A left-over tree that cannot be deleted.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// The system said no.
    #[error("cannot delete '{}'", path.display())]
    Io {
        /// The file that is in the way.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Deeper than any archive that can be restored; we did not make it.
    #[error("cannot delete '{}': directories are nested more than {MAX_DEPTH} deep; delete it by hand", path.display())]
    TooDeep {
        /// Where we stopped.
        path: PathBuf,
    },
}

/// Deletes the tree `name` in `parent`, if there is one; follows no symlink, and opens directories that
/// are read-only. `path` is for messages.
pub(super) fn remove_tree(parent: impl AsFd, name: &Path, path: &Path) -> Result<(), RemoveError> {
    remove_at(parent, name, &mut path.to_owned(), 0)
}

fn remove_at(parent: impl AsFd, name: &Path, path: &mut PathBuf, depth: usize) -> Result<(), RemoveError> {
    let parent = parent.as_fd();
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        // Linux says EISDIR, POSIX wants EPERM.
        Err(Errno::EISDIR | Errno::EPERM) if is_directory(parent, name) => {}
        Err(errno) => return Err(failed(path, errno)),
    }
    if depth >= MAX_DEPTH {
        return Err(RemoveError::TooDeep { path: path.clone() });
    }
    let mut directory = open_directory(parent, name).map_err(|errno| failed(path, errno))?;
    for child in children(&mut directory).map_err(|errno| failed(path, errno))? {
        let child = Path::new(std::ffi::OsStr::from_bytes(child.as_bytes()));
        path.push(child);
        remove_at(&directory, child, path, depth + 1)?;
        path.pop();
    }
    unlinkat(parent, name, UnlinkatFlags::RemoveDir).map_err(|errno| failed(path, errno))
}

fn is_directory(parent: impl AsFd, name: &Path) -> bool {
    fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits())
}

/// Opens a directory and gives its owner the right to delete from it.
fn open_directory(parent: impl AsFd, name: &Path) -> nix::Result<Dir> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let parent = parent.as_fd();
    let directory = match Dir::openat(parent, name, flags, Mode::empty()) {
        Err(Errno::EACCES) => {
            fchmodat(parent, name, Mode::S_IRWXU, FchmodatFlags::NoFollowSymlink)?;
            Dir::openat(parent, name, flags, Mode::empty())?
        }
        other => other?,
    };
    if fstat(&directory)?.st_mode & Mode::S_IRWXU.bits() != Mode::S_IRWXU.bits() {
        fchmod(&directory, Mode::S_IRWXU)?;
    }
    Ok(directory)
}

fn children(directory: &mut Dir) -> nix::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in directory.iter() {
        let name = entry?.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            names.push(name);
        }
    }
    Ok(names)
}

fn failed(path: &Path, errno: Errno) -> RemoveError {
    RemoveError::Io { path: path.to_owned(), source: errno.into() }
}

/// Each level holds a descriptor; NARs nest 64 deep at most.
const MAX_DEPTH: usize = 200;
