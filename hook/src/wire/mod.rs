//! The two primitives of Nix's wire formats, a 64-bit number and a padded byte string, and their limits.
//!
//! Must never open a descriptor, nor reserve memory for a length the peer has only claimed.
//!
//! Source: Nix 2.34 `src/libutil/serialise.cc`.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod hook;
pub mod nar;
pub mod serve;
pub mod worker;

use std::io::{self, Read};
use thiserror::Error;

/// Longest string taken where Nix sets no bound of its own: a setting, a log line, an error message.
pub const MAX_STRING: u64 = 64 << 20;

/// Longest store path, system or feature name taken.
pub const MAX_NAME: u64 = 4096;

/// Most items taken in one list from Nix (input paths, features).
pub const MAX_ITEMS: u64 = 4 << 20;

/// What a peer sent that cannot be read.
#[derive(Debug, Error)]
pub enum WireError {
    /// The stream ended inside a message.
    #[error("the stream ended while {what} was expected")]
    Truncated {
        /// What was being read.
        what: &'static str,
    },
    /// A length above its limit.
    #[error("{what} claims {length} bytes, the limit is {limit}")]
    TooLong {
        /// What was being read.
        what: &'static str,
        /// The length claimed.
        length: u64,
        /// The limit.
        limit: u64,
    },
    /// A count above its limit.
    #[error("{what} claims {count} items, the limit is {limit}")]
    TooMany {
        /// What was being read.
        what: &'static str,
        /// The count claimed.
        count: u64,
        /// The limit.
        limit: u64,
    },
    /// Padding that is not zero.
    #[error("{what} is followed by padding that is not zero")]
    Padding {
        /// What was being read.
        what: &'static str,
    },
    /// A value that is not allowed at this place.
    #[error("{what} is {got}, expected {expected}")]
    Unexpected {
        /// What was being read.
        what: &'static str,
        /// The value, shortened.
        got: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// Text that is not UTF-8.
    #[error("{what} is not UTF-8")]
    NotText {
        /// What was being read.
        what: &'static str,
    },
    /// The stream could not be read.
    #[error("{what} could not be read")]
    Io {
        /// What was being read.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

impl WireError {
    pub(crate) fn io(what: &'static str, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            Self::Truncated { what }
        } else {
            Self::Io { what, source }
        }
    }

    /// Whether reading stopped because the time set for it was over.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }

    /// Whether the peer went away or the transport broke, as opposed to bytes that make no sense.
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::Truncated { .. } | Self::Io { .. })
    }
}

/// Reads a number.
///
/// # Errors
/// If the stream ends or fails.
pub fn read_u64(source: &mut (impl Read + ?Sized), what: &'static str) -> Result<u64, WireError> {
    let mut bytes = [0; 8];
    source.read_exact(&mut bytes).map_err(|e| WireError::io(what, e))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Reads a padded byte string of at most `limit` bytes. Memory grows with what has arrived, not with the claim.
///
/// # Errors
/// If the stream ends or fails, the length is above the limit, or the padding is not zero.
pub fn read_bytes(
    source: &mut (impl Read + ?Sized),
    what: &'static str,
    limit: u64,
) -> Result<Vec<u8>, WireError> {
    let length = read_u64(source, what)?;
    if length > limit {
        return Err(WireError::TooLong { what, length, limit });
    }
    const FIRST_CHUNK: u64 = 64 << 10;
    let mut bytes = Vec::with_capacity(length.min(FIRST_CHUNK) as usize);
    let got = source.take(length).read_to_end(&mut bytes).map_err(|e| WireError::io(what, e))?;
    if (got as u64) < length {
        return Err(WireError::Truncated { what });
    }
    let mut padding = [0; 8];
    let padding = &mut padding[..padding_of(length)];
    source.read_exact(padding).map_err(|e| WireError::io(what, e))?;
    if padding.iter().any(|b| *b != 0) {
        return Err(WireError::Padding { what });
    }
    Ok(bytes)
}

/// Reads a padded string of at most `limit` bytes that must be UTF-8.
///
/// # Errors
/// As [`read_bytes`], and if it is not UTF-8.
pub fn read_string(
    source: &mut (impl Read + ?Sized),
    what: &'static str,
    limit: u64,
) -> Result<String, WireError> {
    String::from_utf8(read_bytes(source, what, limit)?).map_err(|_| WireError::NotText { what })
}

/// Reads a count and then as many items, `limit` at most.
///
/// # Errors
/// If the count is above the limit, or an item cannot be read.
pub fn read_list<R: Read + ?Sized, T>(
    source: &mut R,
    what: &'static str,
    limit: u64,
    mut item: impl FnMut(&mut R) -> Result<T, WireError>,
) -> Result<Vec<T>, WireError> {
    let count = read_u64(source, what)?;
    if count > limit {
        return Err(WireError::TooMany { what, count, limit });
    }
    let mut items = Vec::new();
    for _ in 0..count {
        items.push(item(source)?);
    }
    Ok(items)
}

/// Appends a number.
pub fn put_u64(buffer: &mut Vec<u8>, value: u64) {
    buffer.extend_from_slice(&value.to_le_bytes());
}

/// Appends a padded byte string.
pub fn put_bytes(buffer: &mut Vec<u8>, bytes: &[u8]) {
    put_u64(buffer, bytes.len() as u64);
    buffer.extend_from_slice(bytes);
    buffer.extend_from_slice(&[0; 8][..padding_of(bytes.len() as u64)]);
}

/// Appends a padded string.
pub fn put_str(buffer: &mut Vec<u8>, text: &str) {
    put_bytes(buffer, text.as_bytes());
}

/// Appends a count and the items, each as a padded string.
pub fn put_strings<S: AsRef<str>>(buffer: &mut Vec<u8>, items: impl ExactSizeIterator<Item = S>) {
    put_u64(buffer, items.len() as u64);
    for item in items {
        put_str(buffer, item.as_ref());
    }
}

fn padding_of(length: u64) -> usize {
    ((8 - length % 8) % 8) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_padded_to_eight_bytes() {
        for (text, length) in [("", 8), ("a", 16), ("12345678", 16), ("123456789", 24)] {
            let mut buffer = Vec::new();
            put_str(&mut buffer, text);
            assert_eq!(buffer.len(), length);
            assert_eq!(read_string(&mut buffer.as_slice(), "x", 100).unwrap(), text);
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let mut buffer = Vec::new();
        put_strings(&mut buffer, ["one", "three four"].iter());
        let read = |mut bytes: &[u8]| read_list(&mut bytes, "words", 9, |s| read_string(s, "word", 100));
        assert_eq!(read(&buffer).unwrap(), ["one", "three four"]);
        for end in 0..buffer.len() {
            assert!(matches!(read(&buffer[..end]), Err(WireError::Truncated { .. })), "{end}");
        }
    }

    #[test]
    fn a_claimed_length_reserves_no_memory_and_ends_at_the_limit() {
        let huge = u64::MAX.to_le_bytes();
        assert!(matches!(read_bytes(&mut &huge[..], "x", MAX_STRING), Err(WireError::TooLong { .. })));
        assert!(matches!(
            read_list(&mut &huge[..], "x", MAX_ITEMS, |s| read_u64(s, "n")),
            Err(WireError::TooMany { .. })
        ));
        let mut claim = MAX_STRING.to_le_bytes().to_vec();
        claim.extend_from_slice(b"short");
        assert!(matches!(
            read_bytes(&mut claim.as_slice(), "x", MAX_STRING),
            Err(WireError::Truncated { .. })
        ));
    }

    #[test]
    fn padding_must_be_zero() {
        let mut buffer = Vec::new();
        put_str(&mut buffer, "a");
        buffer[15] = 1;
        assert!(matches!(read_bytes(&mut buffer.as_slice(), "x", 10), Err(WireError::Padding { .. })));
    }
}
