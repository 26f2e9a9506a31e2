//! A store path as a NAR stream.

use super::Location;
use nix_archive::nar::{self, CaseHack};
use nix_derivation::StorePath;
use std::io::Write;
use std::path::PathBuf;
use thiserror::Error;

/// A store path that could not be read, or whose NAR could not be written.
#[derive(Debug, Error)]
pub enum DumpError {
    /// A file, or the writer, failed.
    #[error("cannot send the contents of '{}'", path.display())]
    Failed {
        /// Where the files are.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: nar::Error,
    },
    /// Directories in directories, too many; see [`super::RestoreError::TooDeep`].
    #[error(
        "'{}' has files inside of {limit} directories or more, which is more than nix-offload sends, and more than Nix \
         sends from 2.34.7 on; nest them less deeply, or build what needs it without other machines (`--builders ''`)",
        path.display()
    )]
    TooDeep {
        /// Where the files are.
        path: PathBuf,
        /// How many enclosing directories are too many.
        limit: usize,
    },
}

/// Writes `path` as a NAR, in constant memory.
///
/// `to` gets many small pieces: give it a buffer. After an error the receiver has an unfinished NAR.
pub fn dump(location: &Location, path: &StorePath, to: &mut dyn Write) -> Result<(), DumpError> {
    let path = location.real_path(path);
    nar::encode_path(to, &path, CaseHack::native()).map_err(|error| match error {
        nar::Error::MaxDepth(limit) => DumpError::TooDeep { path, limit },
        source => DumpError::Failed { path, source },
    })
}
