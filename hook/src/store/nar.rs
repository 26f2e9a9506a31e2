//! A store path as a NAR stream.

use super::Location;
use nix_archive::nar::{self, CaseHack};
use nix_derivation::StorePath;
use std::io::Write;
use std::path::PathBuf;
use thiserror::Error;

/// A store path that could not be read, or whose NAR could not be written.
#[derive(Debug, Error)]
#[error("cannot send the contents of '{}'", path.display())]
pub struct DumpError {
    /// Where the files are.
    pub path: PathBuf,
    /// What went wrong, with the file or the writer.
    #[source]
    pub source: nar::Error,
}

/// Writes `path` as a NAR, in constant memory.
///
/// `to` gets many small pieces: give it a buffer. After an error the receiver has an unfinished NAR.
pub fn dump(location: &Location, path: &StorePath, to: &mut dyn Write) -> Result<(), DumpError> {
    let path = location.real_path(path);
    nar::encode_path(to, &path, CaseHack::native()).map_err(|source| DumpError { path, source })
}
