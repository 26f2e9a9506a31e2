//! What must be true of files: keys that ssh takes, lists that nobody else can write, a hook that can be run.
//!
//! Must never open more of them than the head.

use super::finding::{Finding, Spot};
use nix_offload_proxy::key_file;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::unistd::{AccessFlags, Uid, User, access, geteuid};

/// The user whom builds are run by: that of the daemon, or ours.
#[derive(Debug, Clone)]
pub(super) struct Runner {
    uid: u32,
    name: String,
    home: PathBuf,
}

impl Runner {
    /// The user of that number.
    pub(super) fn new(uid: u32) -> Self {
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let (name, home) = user.map_or_else(|| (uid.to_string(), "/".into()), |user| (user.name, user.dir));
        Self { uid, name, home }
    }

    /// His home directory.
    pub(super) fn home(&self) -> &Path {
        &self.home
    }

    /// Whether we see what he sees.
    pub(super) fn is_us(&self) -> bool {
        geteuid().as_raw() == self.uid
    }

    /// What is wrong with a file that is named as a private key. `Ok(None)` if nothing is, and an error if we may not
    /// look.
    ///
    /// # Errors
    /// If we may not look.
    pub(super) fn key(&self, spot: &Spot, file: &str) -> Result<Option<Finding>, NotSeen> {
        let error = |message: String, cure: String| Ok(Some(Finding::error(spot, message, cure)));
        // ssh puts words of its own in their places.
        if file.contains('%') {
            return Ok(None);
        }
        let path = match file.strip_prefix("~/") {
            Some(rest) => self.home.join(rest),
            None => PathBuf::from(file),
        };
        if !path.is_absolute() {
            let is_number = file.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
            let cure = if is_number {
                "the key file is column 3: write '-' in its place, and the number behind it"
            } else {
                "write the whole path; the hook runs in '/'"
            };
            return error(format!("the key file '{file}' is no absolute path"), cure.into());
        }
        let shown = path.display();
        // With it ssh picks one of an agent's keys (`pubkey_prepare` in OpenSSH's sshconnect2.c).
        let public = |private: String| {
            let message = format!(
                "this is the public half of a key, which is enough only if an agent has the other: {shown}"
            );
            let cure =
                format!("did you mean {private}? If not, see that an agent has the key for {}", self.name);
            Ok(Some(Finding::warning(spot, message, cure)))
        };
        let metadata = match fs::metadata(&path) {
            Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied && !self.is_us() => {
                return Err(NotSeen);
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                return error(
                    format!("there is no key file {shown}"),
                    format!("correct its name, or make a key: ssh-keygen -t ed25519 -N '' -f {shown}"),
                );
            }
            Err(cause) => {
                return error(
                    format!("{} cannot see the key file {shown}: {cause}", self.name),
                    self.allow(&path),
                );
            }
            Ok(metadata) if !metadata.is_file() => {
                return error(format!("{shown} is no file"), "name the file with the private key".into());
            }
            Ok(metadata) => metadata,
        };
        if path.extension() == Some(OsStr::new("pub")) {
            return public(format!("'{}'", path.with_extension("").display()));
        }
        let mode = metadata.mode() & 0o7777;
        // As `sshkey_perm_ok` in OpenSSH's authfile.c: of a file that belongs to somebody else it does not mind.
        if metadata.uid() == self.uid && mode & 0o077 != 0 {
            return error(
                format!("others can read the key file {shown} (mode {mode:04o}), so ssh refuses it"),
                format!("chmod 600 {shown}"),
            );
        }
        if !self.is_us() {
            return Ok(None);
        }
        let mut head = [0; 16];
        match File::open(&path).and_then(|mut file| file.read(&mut head)) {
            Err(cause) => {
                error(format!("{} cannot read the key file {shown}: {cause}", self.name), self.allow(&path))
            }
            Ok(_) if head.starts_with(b"ssh-") || head.starts_with(b"ecdsa-") => {
                public("the file with the private key".into())
            }
            Ok(_) if key_file::has_passphrase(&path).unwrap_or(false) => Ok(Some(Finding::warning(
                spot,
                format!("the key {shown} has a passphrase, and nobody is asked for it when builds run"),
                format!(
                    "take it off with ssh-keygen -p -f {shown}, name another key, or see that an agent that {} reaches \
                     holds it",
                    self.name
                ),
            ))),
            Ok(_) => Ok(None),
        }
    }

    fn allow(&self, path: &Path) -> String {
        format!("builds are run by {0}: chown {0} {1}, and chmod 600", self.name, path.display())
    }

    /// What is wrong with a file that says where builds go, if others can write it.
    pub(super) fn writable(&self, file: &Path) -> Option<Finding> {
        let metadata = fs::metadata(file).ok().filter(fs::Metadata::is_file)?;
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        let is_ours = owner == 0 || owner == self.uid;
        let by_group = mode & 0o020 != 0 && metadata.gid() != 0;
        (!is_ours || by_group || mode & 0o002 != 0).then(|| {
            let shown = file.display();
            Finding::warning(
                &Spot::file(&shown.to_string()),
                format!("others can write it (it belongs to user {owner}, mode {mode:04o}), and so send builds where they like"),
                format!("chown {} {shown} && chmod go-w {shown}", if is_ours { owner } else { self.uid }),
            )
        })
    }

    /// Whether the user can run a program, which is looked for on the PATH if its name has no slash.
    pub(super) fn program(&self, name: &str, path: &OsStr) -> Program {
        let file = if name.contains('/') {
            Some(PathBuf::from(name))
        } else {
            env::split_paths(path).map(|directory| directory.join(name)).find(|file| file.is_file())
        };
        let Some(file) = file else { return Program::Absent };
        match fs::metadata(&file) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !self.is_us() => {
                Program::NotSeen
            }
            Err(_) => Program::Absent,
            Ok(metadata) if !metadata.is_file() || metadata.mode() & 0o111 == 0 => Program::NotExecutable,
            Ok(_) if self.is_us() && access(&file, AccessFlags::X_OK).is_err() => Program::NotExecutable,
            Ok(_) => Program::Runs(fs::canonicalize(&file).unwrap_or(file)),
        }
    }
}

/// We may not look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotSeen;

/// Whether a program can be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Program {
    /// It can, and is this file.
    Runs(PathBuf),
    /// There is none.
    Absent,
    /// There is a file that cannot be run.
    NotExecutable,
    /// We may not look.
    NotSeen,
}

/// When a file was last written.
pub(super) fn written(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).and_then(|metadata| metadata.modified()).ok()
}
