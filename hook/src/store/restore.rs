//! A NAR stream as files of the store, with the metadata that Nix gives them.

use super::import::{Durability, Registrar};
use super::remove::{RemoveError, remove_tree};
use super::{DatabaseError, Location};
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, UtimensatFlags, fchmod, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{fsync, symlinkat};
use nix_archive::nar::{self, Event, FileContents, ReadEvent};
use nix_derivation::{CAHash, HashAlgorithm, NixHash, NixHasher, StorePath};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read, Take, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// What is known of an output before its NAR arrives. All that is given is checked.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Length of the NAR; no byte more is read from the stream.
    pub nar_size: u64,
    /// SHA-256 of the NAR, as the builder tells it.
    pub nar_hash: Option<[u8; 32]>,
    /// What the derivation of a fixed output demands.
    pub content_address: Option<&'a CAHash>,
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// SHA-256 of the NAR.
    pub nar_hash: [u8; 32],
    /// Length of the NAR.
    pub nar_size: u64,
}

/// Why an output could not be put into the store; nothing of it is left there, unless deleting failed too.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The store directory cannot be opened.
    #[error("cannot open the store directory '{}'", path.display())]
    Store {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The output is valid and its files are there: they are what others use.
    #[error("'{path}' is valid in the local store and is not replaced")]
    Valid {
        /// The output.
        path: String,
    },
    /// The output is valid, its files are gone, and the builder has others.
    #[error(
        "'{path}' is gone from the local store, and what the builder has in its place ({got}) is not what is registered \
         ({registered}), so it is not put there; the derivation may not be deterministic; with max-jobs above 0 \
         `--repair` builds it here and registers what comes of that"
    )]
    ValidOtherwise {
        /// The output.
        path: String,
        /// The hash in the local database.
        registered: String,
        /// The hash the builder told, in the same form.
        got: String,
    },
    /// Whether the output is valid cannot be told.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// Something is at the place of the output and cannot be deleted.
    #[error("cannot make room for '{path}'")]
    Remove {
        /// The output.
        path: String,
        /// Why.
        #[source]
        source: RemoveError,
    },
    /// The stream from the builder broke.
    #[error("cannot read the contents of '{path}' from the builder")]
    Read {
        /// The output.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written here: full disk, quota, permissions.
    #[error("cannot {action} '{}'", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// What was to be done with it.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The stream ended before its time.
    #[error("the builder sent {got} of the {nar_size} bytes of '{path}'")]
    Truncated {
        /// The output.
        path: String,
        /// Bytes that came.
        got: u64,
        /// Bytes that were announced.
        nar_size: u64,
    },
    /// The archive does not have the announced size.
    #[error("the contents of '{path}' are {} than the {nar_size} bytes the builder announced", if *longer { "longer" } else { "shorter" })]
    Size {
        /// The output.
        path: String,
        /// Bytes that were announced.
        nar_size: u64,
        /// Whether the archive goes on behind them.
        longer: bool,
    },
    /// The stream is no archive that may be restored.
    #[error("the builder sent a bad archive of '{path}'")]
    Archive {
        /// The output.
        path: String,
        /// What is wrong with it.
        #[source]
        source: nar::Error,
    },
    /// Directories in directories, too many. The archive reader has this limit for the sake of its stack, and so has Nix
    /// itself by now (`narMaxDepth` in `src/libutil/archive.cc`, from 2.34.7 on).
    #[error(
        "'{path}' has files inside of {limit} directories or more, which is more than nix-offload brings home, and more \
         than Nix takes from 2.34.7 on; nest them less deeply, or build it without other machines (`--builders ''`)"
    )]
    TooDeep {
        /// The output.
        path: String,
        /// How many enclosing directories are too many.
        limit: usize,
    },
    /// The archive is not the one the builder registered.
    #[error(
        "hash mismatch importing path '{path}':\n  specified: {specified}\n  got:       {got}\n\
         (the copy there is damaged: `nix-store --repair-path {path}` on that machine mends it)"
    )]
    NarHash {
        /// The output.
        path: String,
        /// The hash the builder told, in SRI form.
        specified: String,
        /// The hash of what it sent, in SRI form.
        got: String,
    },
    /// The output is not what the derivation demands. Worded as Nix does (`derivation-check.cc`).
    #[error(
        "hash mismatch in fixed-output derivation, output '{path}':\n  specified: {specified}\n     got:    {got}"
    )]
    FixedOutput {
        /// The output.
        path: String,
        /// The hash in the derivation, in SRI form.
        specified: String,
        /// The hash of the output, in SRI form.
        got: String,
    },
    /// A flat hash needs a plain file.
    #[error(
        "output path '{path}' should be a non-executable regular file since recursive hashing is not enabled"
    )]
    NotFlat {
        /// The output.
        path: String,
    },
    /// Git hashing is experimental in Nix; such outputs are not ours to build.
    #[error("cannot check the git hash of '{path}'")]
    Git {
        /// The output.
        path: String,
    },
}

impl RestoreError {
    /// Whether what the builder sent is to blame, so that another one may do better.
    pub fn is_builders(&self) -> bool {
        match self {
            Self::Truncated { .. }
            | Self::Size { .. }
            | Self::Archive { .. }
            | Self::NarHash { .. }
            | Self::FixedOutput { .. }
            | Self::NotFlat { .. } => true,
            Self::Store { .. }
            | Self::Valid { .. }
            | Self::ValidOtherwise { .. }
            | Self::Database(_)
            | Self::Remove { .. }
            | Self::Read { .. }
            | Self::Write { .. }
            | Self::TooDeep { .. }
            | Self::Git { .. } => false,
        }
    }
}

/// Puts the NAR of `path` in its place, with canonical metadata, and checks all that `expected` tells.
///
/// What is there is deleted first, but a path that is valid is not touched: it is put back only where its files are gone, and
/// with the registered contents. The caller holds the path's lock (in a
/// hook: through the Nix that waits). Nothing is registered. Reads `expected.nar_size` bytes of `nar` at
/// most, and on success exactly that many. Memory use does not depend on sizes.
///
/// Mirrors `LocalStore::addToStore` and `canonicalisePathMetaData` of Nix 2.34, except that extended
/// attributes are not removed: new files have none, unless the store directory has default ACLs.
pub fn restore(
    location: &Location,
    registrar: &Registrar,
    path: &StorePath,
    nar: &mut dyn Read,
    expected: &Expected<'_>,
    durability: &Durability,
) -> Result<Restored, RestoreError> {
    let rendered = location.render(path);
    if matches!(expected.content_address, Some(CAHash::Git(_))) {
        return Err(RestoreError::Git { path: rendered });
    }
    let store = &location.real_store_dir;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent = open(store, flags, Mode::empty())
        .map_err(|errno| RestoreError::Store { path: store.clone(), source: errno.into() })?;
    let name = path.to_basename();
    let place = location.real_path(path);
    if let Some(registered) = registrar.registered_hash(path)? {
        if place.symlink_metadata().is_ok() {
            return Err(RestoreError::Valid { path: rendered });
        }
        let got = expected.nar_hash.map(|hash| NixHash::Sha256(hash).to_nix_base16_string());
        if got.as_ref() != Some(&registered) {
            let got = got.unwrap_or_else(|| "unknown".to_owned());
            return Err(RestoreError::ValidOtherwise { path: rendered, registered, got });
        }
    }
    remove_tree(&parent, Path::new(&name), &place)
        .map_err(|source| RestoreError::Remove { path: rendered.clone(), source })?;

    let result = Job { rendered, name: &name, parent: parent.as_fd(), expected, durability }.run(nar, &place);
    if result.is_err() {
        // The first error says more than a second one about the rest of the tree.
        let _ = remove_tree(&parent, Path::new(&name), &place);
    }
    result
}

struct Job<'a> {
    rendered: String,
    name: &'a str,
    parent: BorrowedFd<'a>,
    expected: &'a Expected<'a>,
    durability: &'a Durability,
}

impl Job<'_> {
    fn run(self, nar: &mut dyn Read, place: &Path) -> Result<Restored, RestoreError> {
        let Expected { nar_size, content_address, .. } = *self.expected;
        let recursive = match content_address {
            Some(CAHash::Nar(hash)) => Some(hash.algorithm()).filter(|kind| *kind != HashAlgorithm::Sha256),
            _ => None,
        };
        let flat = match content_address {
            Some(CAHash::Flat(hash)) => Some(NixHasher::new(hash.algorithm())),
            Some(CAHash::Text(_)) => Some(NixHasher::new(HashAlgorithm::Sha256)),
            _ => None,
        };
        let mut reader = BufReader::with_capacity(
            BUFFER,
            Hashing {
                inner: nar.take(nar_size),
                sha256: NixHasher::new(HashAlgorithm::Sha256),
                other: recursive.map(NixHasher::new),
                failure: None,
            },
        );
        let mut tree = Tree {
            parent: self.parent,
            name: OsStr::new(self.name),
            path: place.to_owned(),
            directories: Vec::new(),
            fsync: self.durability.fsync_store_paths,
            buffer: vec![0; BUFFER],
            flat,
            is_flat: false,
            failure: None,
        };
        let decoded = nar::decode_events_reader(&mut reader, |event| tree.visit(event));
        let Tree { flat, is_flat, failure, .. } = tree;
        let hashing = reader.into_inner();
        if let Err(error) = decoded {
            return Err(self.explain(error, failure, hashing));
        }
        // The decoder has seen the end of the stream: `nar_size` bytes, or fewer because the source ended.
        if hashing.inner.limit() != 0 {
            return Err(RestoreError::Size { path: self.rendered, nar_size, longer: false });
        }
        let Hashing { sha256, other, .. } = hashing;
        let nar_hash = sha256.finalize();
        if let Some(specified) = self.expected.nar_hash.map(NixHash::Sha256)
            && specified != nar_hash
        {
            return Err(RestoreError::NarHash {
                path: self.rendered,
                specified: specified.to_sri_string(),
                got: nar_hash.to_sri_string(),
            });
        }
        if let Some(address) = content_address {
            let got = match (flat, other) {
                (Some(_), _) if !is_flat => return Err(RestoreError::NotFlat { path: self.rendered }),
                (Some(hasher), _) | (None, Some(hasher)) => hasher.finalize(),
                (None, None) => nar_hash.clone(),
            };
            if got != address.hash() {
                return Err(RestoreError::FixedOutput {
                    path: self.rendered,
                    specified: address.hash().to_sri_string(),
                    got: got.to_sri_string(),
                });
            }
        }
        if self.durability.fsync_store_paths {
            fsync(self.parent).map_err(|errno| write_error("flush the directory of", place, errno.into()))?;
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(nar_hash.digest_as_bytes());
        Ok(Restored { nar_hash: digest, nar_size })
    }

    /// Tells apart what the decoder mixes: our disk, the stream, and what is in it.
    fn explain(self, error: nar::Error, failure: Option<RestoreError>, hashing: Hashing<'_>) -> RestoreError {
        if let Some(failure) = failure {
            return failure;
        }
        if let Some(source) = hashing.failure {
            return RestoreError::Read { path: self.rendered, source };
        }
        let nar_size = self.expected.nar_size;
        let missing = hashing.inner.limit();
        match error {
            nar::Error::UnexpectedEof if missing == 0 => {
                RestoreError::Size { path: self.rendered, nar_size, longer: true }
            }
            nar::Error::UnexpectedEof => {
                RestoreError::Truncated { path: self.rendered, got: nar_size - missing, nar_size }
            }
            nar::Error::BadMagic if nar_size - missing < MAGIC_SIZE && missing != 0 => {
                RestoreError::Truncated { path: self.rendered, got: nar_size - missing, nar_size }
            }
            nar::Error::TrailingBytes => RestoreError::Size { path: self.rendered, nar_size, longer: false },
            nar::Error::MaxDepth(limit) => RestoreError::TooDeep { path: self.rendered, limit },
            source => RestoreError::Archive { path: self.rendered, source },
        }
    }
}

/// Hashes what passes, and keeps the error of the source apart from those of the decoder.
struct Hashing<'a> {
    inner: Take<&'a mut dyn Read>,
    sha256: NixHasher,
    other: Option<NixHasher>,
    failure: Option<io::Error>,
}

impl Read for Hashing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer) {
            Ok(read) => {
                self.sha256.update(&buffer[..read]);
                if let Some(other) = &mut self.other {
                    other.update(&buffer[..read]);
                }
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let kind = error.kind();
                self.failure = Some(error);
                Err(kind.into())
            }
        }
    }
}

type Source<'a> = BufReader<Hashing<'a>>;

/// The tree as it grows. Every file is made relative to the descriptor of its directory.
struct Tree<'a> {
    parent: BorrowedFd<'a>,
    name: &'a OsStr,
    /// The file at hand, for messages.
    path: PathBuf,
    directories: Vec<OwnedFd>,
    fsync: bool,
    buffer: Vec<u8>,
    flat: Option<NixHasher>,
    /// Whether the root is a regular file that is not executable.
    is_flat: bool,
    failure: Option<RestoreError>,
}

impl Tree<'_> {
    fn visit(&mut self, event: ReadEvent<'_, Source<'_>>) -> Result<(), nar::Error> {
        match event {
            Event::DirectoryStart { name } => {
                self.enter(name);
                let made = self.start_directory();
                self.settle("create", made)
            }
            Event::DirectoryEnd { .. } => {
                let Some(directory) = self.directories.pop() else { return Ok(()) };
                let sealed = seal(&directory, EXECUTABLE, self.fsync);
                self.settle("set the metadata of", sealed)?;
                self.leave();
                Ok(())
            }
            Event::Regular { name, executable, contents } => {
                self.is_flat = name.is_none() && !executable;
                self.enter(name);
                let made = self.create();
                let mut file = self.settle("create", made)?;
                self.copy(contents, &mut file)?;
                let mode = if executable { EXECUTABLE } else { PLAIN };
                let sealed = seal(&file, mode, self.fsync);
                self.settle("set the metadata of", sealed)?;
                self.leave();
                Ok(())
            }
            Event::Symlink { name, target } => {
                self.enter(name);
                let made = self.symlink(target);
                self.settle("create the symlink", made)?;
                self.leave();
                Ok(())
            }
        }
    }

    /// Makes `path` that of the next file. The root has no name in the archive; its path is set already.
    fn enter(&mut self, name: Option<&[u8]>) {
        if let Some(name) = name {
            self.path.push(OsStr::from_bytes(name));
        }
    }

    fn leave(&mut self) {
        if !self.directories.is_empty() {
            self.path.pop();
        }
    }

    /// The directory to work in, and the name there.
    fn here(&self) -> (BorrowedFd<'_>, &OsStr) {
        match self.directories.last() {
            Some(directory) => (directory.as_fd(), self.path.file_name().unwrap_or_default()),
            None => (self.parent, self.name),
        }
    }

    fn start_directory(&mut self) -> nix::Result<()> {
        let (parent, name) = self.here();
        // Ours alone until it is finished.
        mkdirat(parent, name, Mode::S_IRWXU)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = openat(parent, name, flags, Mode::empty())?;
        self.directories.push(directory);
        Ok(())
    }

    fn create(&self) -> nix::Result<File> {
        let (parent, name) = self.here();
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(parent, name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from)
    }

    fn symlink(&self, target: &[u8]) -> nix::Result<()> {
        let (parent, name) = self.here();
        symlinkat(OsStr::from_bytes(target), parent, name)?;
        utimensat(parent, name, &TimeSpec::UTIME_OMIT, &MTIME, UtimensatFlags::NoFollowSymlink)
    }

    fn copy(
        &mut self,
        mut contents: FileContents<'_, Source<'_>>,
        file: &mut File,
    ) -> Result<(), nar::Error> {
        loop {
            let read = match contents.read(&mut self.buffer) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            // Also where the stream is cut short; the decoder notices that next.
            if read == 0 {
                return Ok(());
            }
            let bytes = &self.buffer[..read];
            if self.is_flat
                && let Some(hasher) = &mut self.flat
            {
                hasher.update(bytes);
            }
            if let Err(source) = file.write_all(bytes) {
                self.failure = Some(write_error("write", &self.path, source));
                return Err(io::Error::other(STOP).into());
            }
        }
    }

    /// Keeps a failure of our own disk for [`Job::explain`] and stops the decoder.
    fn settle<T>(&mut self, action: &'static str, result: nix::Result<T>) -> Result<T, nar::Error> {
        result.map_err(|errno| {
            self.failure = Some(write_error(action, &self.path, errno.into()));
            io::Error::other(STOP).into()
        })
    }
}

/// Gives a finished file or directory the metadata of store objects.
fn seal(file: impl AsFd, mode: Mode, durable: bool) -> nix::Result<()> {
    let file = file.as_fd();
    fchmod(file, mode)?;
    futimens(file, &TimeSpec::UTIME_OMIT, &MTIME)?;
    if durable { fsync(file) } else { Ok(()) }
}

fn write_error(action: &'static str, file: &Path, source: io::Error) -> RestoreError {
    RestoreError::Write { file: file.to_owned(), action, source }
}

/// Text of the error that only stops the decoder; nobody sees it.
const STOP: &str = "stopped";

const BUFFER: usize = 128 * 1024;

/// `nix-archive-1` with its length and padding.
const MAGIC_SIZE: u64 = 24;

/// Modes of store objects, 0444 and 0555 (`canonicaliseTimestampAndPermissions`).
const PLAIN: Mode = Mode::S_IRUSR.union(Mode::S_IRGRP).union(Mode::S_IROTH);
const EXECUTABLE: Mode = PLAIN.union(Mode::S_IXUSR).union(Mode::S_IXGRP).union(Mode::S_IXOTH);

/// `mtimeStore`: one second into the epoch.
const MTIME: TimeSpec = TimeSpec::new(1, 0);
