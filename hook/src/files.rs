//! Files that people write. Must never read what they say: that is `config`'s.

use std::fs;
use std::io;

/// Reads a file of machines for [`crate::config::parse_machines`]. What is no UTF-8 in it, in a comment for instance, is
/// replaced, for Nix reads bytes and a list with it works.
///
/// # Errors
/// If it exists and cannot be read.
pub fn read_machines_file(path: &str) -> io::Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
