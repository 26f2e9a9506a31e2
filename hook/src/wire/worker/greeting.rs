//! The greeting: finding it behind banners, the version both sides speak, what the daemon says of itself.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::super::{MAX_NAME, WireError, put_u64, read_string, read_u64};
use std::io::Read;

/// The newest minor version offered. From 1.38 on both sides exchange feature lists, which costs a round trip
/// and brings nothing for builds of derivations with known output paths.
pub const NEWEST_MINOR: u8 = 37;

/// The oldest minor version spoken (Nix 2.0).
pub const OLDEST_MINOR: u8 = 21;

/// Most bytes skipped before a daemon's greeting: what login scripts and banners may print.
pub const MAX_BANNER: usize = 64 << 10;

const CLIENT_MAGIC: u64 = 0x6e69_7863;
pub(super) const DAEMON_MAGIC: u64 = 0x6478_696f;

/// The minor version both sides speak; the major version is always 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u8);

impl Version {
    /// The version of that minor number, if we speak it.
    pub fn new(minor: u8) -> Option<Self> {
        (OLDEST_MINOR..=NEWEST_MINOR).contains(&minor).then_some(Self(minor))
    }

    /// The newest one we offer.
    pub const fn newest() -> Self {
        Self(NEWEST_MINOR)
    }

    /// Whether the daemon takes several paths in one operation (1.32).
    pub const fn has_add_multiple(self) -> bool {
        self.0 >= 32
    }

    /// Whether a NAR is sent in frames (1.23) instead of being asked for piece by piece.
    pub const fn has_frames(self) -> bool {
        self.0 >= 23
    }

    /// Whether the daemon tells how the build of a derivation in its store ended (1.34) instead of failing.
    pub const fn has_results_of_paths(self) -> bool {
        self.0 >= 34
    }

    /// The minor number.
    pub const fn minor(self) -> u8 {
        self.0
    }
}

/// What a daemon says of itself in the greeting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The version both sides speak.
    pub version: Version,
    /// The version of Nix (from 1.33).
    pub nix_version: Option<String>,
    /// Whether it trusts us (from 1.35, and only if it knows).
    pub trusted: Option<bool>,
}

/// Appends the client's greeting.
pub fn put_greeting(buffer: &mut Vec<u8>, offer: Version) {
    put_u64(buffer, CLIENT_MAGIC);
    put_u64(buffer, 0x100 | u64::from(offer.0));
    // Two settings of old: CPU affinity (none) and reserved space.
    put_u64(buffer, 0);
    put_u64(buffer, 0);
}

/// Finds the daemon's greeting, skipping what login scripts print before it, and reads the version.
///
/// On failure the second value holds what came instead, up to [`MAX_BANNER`] bytes.
///
/// # Errors
/// If the stream ends, no greeting is found within [`MAX_BANNER`] bytes, or the daemon is too old.
pub fn read_greeting(source: &mut impl Read, offer: Version) -> Result<Version, (WireError, Vec<u8>)> {
    find_magic(source, DAEMON_MAGIC)?;
    let version = read_u64(source, "the daemon's version").map_err(|e| (e, Vec::new()))?;
    let minor = (version & 0xff) as u8;
    if version >> 8 != 1 || minor < OLDEST_MINOR {
        let error = WireError::Unexpected {
            what: "the daemon's protocol version",
            got: format!("{}.{}", version >> 8, minor),
            expected: "1.21 or newer (Nix 2.0 or newer)",
        };
        return Err((error, Vec::new()));
    }
    Ok(Version(minor.min(offer.0)))
}

/// Reads up to and with a magic number, skipping what login scripts print before it.
pub(in crate::wire) fn find_magic(source: &mut impl Read, magic: u64) -> Result<(), (WireError, Vec<u8>)> {
    let magic = magic.to_le_bytes();
    let mut seen = Vec::new();
    while !seen.ends_with(&magic) {
        if seen.len() >= MAX_BANNER {
            let limit = MAX_BANNER as u64;
            return Err((
                WireError::TooLong { what: "text before the greeting", length: limit, limit },
                seen,
            ));
        }
        let mut byte = [0];
        if let Err(error) = source.read_exact(&mut byte) {
            return Err((WireError::io("the daemon's greeting", error), seen));
        }
        seen.push(byte[0]);
    }
    Ok(())
}

/// A version of Nix as a builder says it, for people to read: short, and without control characters.
pub fn plain_version(said: &str) -> String {
    const LONGEST: usize = 100;
    said.chars().filter(|c| !c.is_control()).take(LONGEST).collect()
}

/// Reads what follows the version in the greeting. The message loop after it is the caller's.
///
/// # Errors
/// If the stream ends or holds something else.
pub fn read_peer(source: &mut impl Read, version: Version) -> Result<Peer, WireError> {
    let nix_version = match version.0 {
        33.. => Some(plain_version(&read_string(source, "the daemon's Nix version", MAX_NAME)?)),
        _ => None,
    };
    let trusted = match version.0 {
        35.. => match read_u64(source, "whether the daemon trusts us")? {
            0 => None,
            1 => Some(true),
            2 => Some(false),
            other => {
                return Err(WireError::Unexpected {
                    what: "whether the daemon trusts us",
                    got: other.to_string(),
                    expected: "0, 1 or 2",
                });
            }
        },
        _ => None,
    };
    Ok(Peer { version, nix_version, trusted })
}
