//! The directory that holds control sockets, locks and logs: where it is, and that it is ours alone.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, Metadata},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;
use thiserror::Error;

/// The variable that overrides the directory.
pub const DIRECTORY_VARIABLE: &str = "NIX_OFFLOAD_RUNTIME_DIR";

/// Why the runtime directory cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// It cannot be made or looked at.
    #[error("cannot use the runtime directory {}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something else is in its place, a symbolic link for instance.
    #[error("the runtime directory {} is no directory", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// Others could put sockets of their own there.
    #[error("the runtime directory {} (owner {owner}, mode {mode:04o}) is not ours alone", path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// Its owner's user id.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// ssh would not take a path with these characters literally.
    #[error("the runtime directory {} is not absolute or has characters that ssh expands", path.display())]
    Characters {
        /// The path.
        path: PathBuf,
    },
}

impl DirectoryError {
    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            DirectoryError::NotPrivate { path, .. } => Some(format!(
                "if it is meant for nothing else, chown {} to user {} and chmod it 0700; \
                 else set {DIRECTORY_VARIABLE} to a directory that only you can use",
                path.display(),
                geteuid()
            )),
            _ => Some(format!("set {DIRECTORY_VARIABLE} to a directory that only you can use")),
        }
    }
}

/// Root's directory.
const OF_ROOT: &str = "/run/nix-offload";
/// What the directory is called where its place is the user's.
const NAME: &str = "nix-offload";
/// Where users have their places, each called by the user's number.
const PLACES_OF_USERS: &str = "/run/user";
/// Where the others are, called `nix-offload-UID`.
const SHARED_PLACE: &str = "/tmp";

/// The directory by the environment: the override, `/run/nix-offload` for root, `$XDG_RUNTIME_DIR/nix-offload`,
/// else one in `/tmp`.
pub(super) fn by_environment(lookup: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let set = |name| lookup(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set(DIRECTORY_VARIABLE) {
        return path;
    }
    let user = geteuid();
    if user.is_root() {
        return OF_ROOT.into();
    }
    match set("XDG_RUNTIME_DIR") {
        Some(path) => path.join(NAME),
        None => format!("{SHARED_PLACE}/{NAME}-{user}").into(),
    }
}

/// Where the directories of all users should be that are there, with the user each should belong to: what
/// [`by_environment`] gives, except for overrides, of which only our own is known. Nothing is checked.
pub(super) fn of_all_users(lookup: impl Fn(&str) -> Option<OsString>) -> Vec<(PathBuf, u32)> {
    let mut found = vec![(OF_ROOT.into(), 0), (by_environment(lookup), geteuid().as_raw())];
    found.extend(numbers_in(PLACES_OF_USERS, "").map(|(path, user)| (path.join(NAME), user)));
    found.extend(numbers_in(SHARED_PLACE, &format!("{NAME}-")));
    found.dedup();
    found
}

/// What is in a directory and called by a user's number behind a prefix.
fn numbers_in(directory: &str, prefix: &str) -> impl Iterator<Item = (PathBuf, u32)> {
    fs::read_dir(directory).into_iter().flatten().flatten().filter_map(move |entry| {
        let number = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
        Some((entry.path(), number))
    })
}

/// Whether it is a directory (no link to one) that belongs to this user alone.
pub(super) fn is_private(path: &Path, user: u32) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir() && belongs_to(&metadata, user))
}

fn belongs_to(metadata: &Metadata, user: u32) -> bool {
    metadata.uid() == user && metadata.mode() & 0o077 == 0
}

/// Makes the directory if need be, and refuses one that others could meddle with.
pub(super) fn ensure(path: &Path) -> Result<(), DirectoryError> {
    let bytes = path.as_os_str().as_bytes();
    let literal = path.is_absolute()
        && !bytes.windows(2).any(|pair| pair == b"${")
        && !bytes.iter().any(|byte| byte.is_ascii_control() || matches!(byte, b'"' | b'\\'));
    if !literal {
        return Err(DirectoryError::Characters { path: path.to_owned() });
    }
    let io_error = |source| DirectoryError::Io { path: path.to_owned(), source };
    // Made with its final mode: there is no moment in which others could enter.
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io_error(error)),
        _ => {}
    }
    let metadata = fs::symlink_metadata(path).map_err(io_error)?;
    if !metadata.is_dir() {
        return Err(DirectoryError::NotADirectory { path: path.to_owned() });
    }
    if !belongs_to(&metadata, geteuid().as_raw()) {
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        return Err(DirectoryError::NotPrivate { path: path.to_owned(), owner, mode });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_directory_of_others_or_a_link_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("run");
        ensure(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        ensure(&path).unwrap();
        let link = temp.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(matches!(ensure(&link), Err(DirectoryError::NotADirectory { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(ensure(&path), Err(DirectoryError::NotPrivate { mode: 0o750, .. })));
        assert!(matches!(ensure(Path::new("relative")), Err(DirectoryError::Characters { .. })));
        assert!(matches!(ensure(Path::new("/tmp/${HOME}")), Err(DirectoryError::Characters { .. })));
        assert!(matches!(ensure(&temp.path().join("a/b")), Err(DirectoryError::Io { .. })));
    }

    #[test]
    fn what_others_can_enter_or_own_is_not_taken_for_a_users_own() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("run");
        ensure(&path).unwrap();
        let user = geteuid().as_raw();
        assert!(is_private(&path, user));
        assert!(!is_private(&path, user + 1));
        let link = temp.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(!is_private(&link, user));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o710)).unwrap();
        assert!(!is_private(&path, user));
        assert!(!is_private(&temp.path().join("absent"), user));
    }

    #[test]
    fn only_what_is_called_by_a_number_is_a_users_place() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["x-1000", "x-", "x-y", "1000", "x--1", "y-2"] {
            fs::create_dir(temp.path().join(name)).unwrap();
        }
        let found: Vec<_> = numbers_in(temp.path().to_str().unwrap(), "x-").collect();
        assert_eq!(found, [(temp.path().join("x-1000"), 1000)]);
    }

    #[test]
    fn the_override_wins_and_an_empty_one_is_none() {
        assert_eq!(by_environment(|_| Some("/x".into())), Path::new("/x"));
        let path = by_environment(|name| (name == "XDG_RUNTIME_DIR").then(|| "/run/user/1".into()));
        if geteuid().is_root() {
            assert_eq!(path, Path::new("/run/nix-offload"));
        } else {
            assert_eq!(path, Path::new("/run/user/1/nix-offload"));
        }
    }
}
