//! Files that people write. Must never read what they say: that is `config`'s.

use std::fs;
use std::io;

/// Reads a file of machines for [`crate::config::parse_machines`].
///
/// # Errors
/// If it exists and cannot be read as text.
pub fn read_machines_file(path: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
