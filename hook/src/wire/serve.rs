//! The serve protocol as a client speaks it: what `nix-store --serve --write` understands, in all its versions.
//!
//! It has no messages beside the answers. What goes wrong there ends the program, with words on its stderr, where
//! the log of a build goes too. Must never know who is at the other end or when to speak.
//!
//! Source: Nix 2.34 `src/libstore/serve-protocol.cc`, `serve-protocol-connection.cc`,
//! `src/nix/nix-store/nix-store.cc` (`opServe`); Nix 2.8 `src/libstore/legacy-ssh-store.cc` for the older forms.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::worker::{self, BuildResult};
use super::{
    MAX_NAME, MAX_STRING, WireError, put_str, put_strings, put_u64, read_bytes, read_list, read_string,
    read_u64,
};
use crate::path_info::PathInfo;
use nix_derivation::{Derivation, NixHash, StoreDir, StorePath};
use std::collections::BTreeSet;
use std::io::Read;

/// The newest minor version offered. 2.8 (Nix 2.35) differs in what it says of outputs whose paths nobody knows
/// before the build, and in nothing else.
pub const NEWEST_MINOR: u8 = 7;

/// The oldest minor version spoken (the Nix 1.8 to 1.10 of 2014).
pub const OLDEST_MINOR: u8 = 1;

const CLIENT_MAGIC: u64 = 0x390c_9deb;
const SERVER_MAGIC: u64 = 0x5452_eecb;
const EXPORT_MAGIC: u64 = 0x4558_494e;

const CMD_QUERY_VALID_PATHS: u64 = 1;
const CMD_QUERY_PATH_INFOS: u64 = 2;
const CMD_DUMP_STORE_PATH: u64 = 3;
const CMD_IMPORT_PATHS: u64 = 4;
const CMD_BUILD_DERIVATION: u64 = 8;
const CMD_ADD_TO_STORE_NAR: u64 = 9;

/// The minor version both sides speak; the major version is always 2.
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

    /// The minor number.
    pub const fn minor(self) -> u8 {
        self.0
    }

    /// Whether metadata has the NAR's hash, signatures and content address (2.4).
    pub const fn has_hashes(self) -> bool {
        self.0 >= 4
    }

    /// Whether a path is sent with its metadata (2.5) instead of as `nix-store --export` writes it.
    pub const fn has_add_to_store(self) -> bool {
        self.0 >= 5
    }
}

/// Appends the client's greeting.
pub fn put_greeting(buffer: &mut Vec<u8>, offer: Version) {
    put_u64(buffer, CLIENT_MAGIC);
    put_u64(buffer, 0x200 | u64::from(offer.0));
}

/// Finds the server's greeting, skipping what login scripts print before it, and reads the version.
///
/// On failure the second value holds what came instead.
///
/// # Errors
/// If the stream ends, no greeting is found within [`worker::MAX_BANNER`] bytes, or the server is too old.
pub fn read_greeting(source: &mut impl Read, offer: Version) -> Result<Version, (WireError, Vec<u8>)> {
    worker::find_magic(source, SERVER_MAGIC)?;
    let version = read_u64(source, "the server's version").map_err(|e| (e, Vec::new()))?;
    let minor = (version & 0xff) as u8;
    if version >> 8 != 2 || minor < OLDEST_MINOR {
        let error = WireError::Unexpected {
            what: "the server's protocol version",
            got: format!("{}.{}", version >> 8, minor),
            expected: "2.1 or newer (Nix 1.8 or newer)",
        };
        return Err((error, Vec::new()));
    }
    Ok(Version(minor.min(offer.0)))
}

/// Appends the question which of the paths are valid. Answer: [`worker::read_paths`].
///
/// With `lock` they are first kept from the garbage collector as long as the connection is open, whether they
/// exist or not. With `substitute` the server tries to fetch what it lacks.
pub fn put_query_valid_paths<'a>(
    buffer: &mut Vec<u8>,
    store_dir: &StoreDir,
    paths: impl ExactSizeIterator<Item = &'a StorePath>,
    lock: bool,
    substitute: bool,
) {
    put_u64(buffer, CMD_QUERY_VALID_PATHS);
    put_u64(buffer, lock.into());
    put_u64(buffer, substitute.into());
    put_strings(buffer, paths.map(|p| store_dir.render_path(p)));
}

/// Appends the question for paths' metadata. Answer: [`read_path_infos`].
pub fn put_query_path_infos<'a>(
    buffer: &mut Vec<u8>,
    store_dir: &StoreDir,
    paths: impl ExactSizeIterator<Item = &'a StorePath>,
) {
    put_u64(buffer, CMD_QUERY_PATH_INFOS);
    put_strings(buffer, paths.map(|p| store_dir.render_path(p)));
}

/// Appends the request for a path's NAR. Answer: the bare NAR, of the size its metadata names.
pub fn put_dump_store_path(buffer: &mut Vec<u8>, store_dir: &StoreDir, path: &StorePath) {
    put_u64(buffer, CMD_DUMP_STORE_PATH);
    put_str(buffer, &store_dir.render_path(path));
}

/// Appends the head of the command that imports one path (from 2.5); the bare NAR follows, of the size the metadata
/// names. Answer: [`read_success`].
pub fn put_add_to_store_nar(buffer: &mut Vec<u8>, store_dir: &StoreDir, info: &PathInfo) {
    put_u64(buffer, CMD_ADD_TO_STORE_NAR);
    worker::put_path_info(buffer, store_dir, info);
}

/// Appends the head of the command that imports paths (before 2.5); for each follow a one, its NAR and
/// [`put_export_tail`], and after the last a zero. Answer: [`read_success`].
pub fn put_import_paths(buffer: &mut Vec<u8>) {
    put_u64(buffer, CMD_IMPORT_PATHS);
}

/// Appends what stands behind the NAR of an exported path (`exportPath` in Nix 2.8
/// `src/libstore/export-import.cc`).
pub fn put_export_tail(buffer: &mut Vec<u8>, store_dir: &StoreDir, info: &PathInfo) {
    put_u64(buffer, EXPORT_MAGIC);
    put_str(buffer, &store_dir.render_path(&info.path));
    put_strings(buffer, info.references.iter().map(|p| store_dir.render_path(p)));
    put_str(buffer, &info.deriver.as_ref().map(|p| store_dir.render_path(p)).unwrap_or_default());
    put_u64(buffer, 0); // no signature
}

/// What a server is told of how to build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BuildOptions {
    /// Seconds without output after which the build is ended; 0 for never.
    pub max_silent_time: u64,
    /// Seconds after which the build is ended; 0 for never.
    pub timeout: u64,
    /// Keep the directory of a failed build (from 2.7).
    pub keep_failed: bool,
}

/// Appends a build of one derivation that need not be in the builder's store. Answer: [`read_build_result`].
///
/// `inputs` replaces the derivation's own input sources, as in [`worker::put_build_derivation`].
pub fn put_build_derivation<'a>(
    buffer: &mut Vec<u8>,
    version: Version,
    store_dir: &StoreDir,
    drv_path: &StorePath,
    drv: &Derivation,
    inputs: impl ExactSizeIterator<Item = &'a StorePath>,
    options: BuildOptions,
) {
    put_u64(buffer, CMD_BUILD_DERIVATION);
    worker::put_derivation(buffer, store_dir, drv_path, drv, inputs);
    put_u64(buffer, options.max_silent_time);
    put_u64(buffer, options.timeout);
    if version.minor() >= 2 {
        put_u64(buffer, 0); // max-log-size: none, since the client's Nix counts the bytes it gets
    }
    if version.minor() >= 3 {
        put_u64(buffer, 0); // repetitions; newer servers refuse any other number
        put_u64(buffer, 0); // and that they must be equal
    }
    if version.minor() >= 7 {
        put_u64(buffer, options.keep_failed.into());
    }
}

/// Metadata of a path, as a server of that version knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// The metadata; the hash is all zeros where there is none.
    pub info: PathInfo,
    /// Whether the hash is the server's.
    pub has_hash: bool,
}

/// Reads the metadata of those of the paths that are valid there, in the server's order.
///
/// # Errors
/// If the stream ends or holds something else, or a path that was not asked for.
pub fn read_path_infos(
    source: &mut impl Read,
    version: Version,
    store_dir: &StoreDir,
    asked: &[StorePath],
) -> Result<Vec<Info>, WireError> {
    let mut left: BTreeSet<&StorePath> = asked.iter().collect();
    let mut infos = Vec::new();
    loop {
        let name = read_bytes(source, "a path with metadata", MAX_NAME)?;
        if name.is_empty() {
            return Ok(infos);
        }
        let path = store_dir.parse_path(&name).ok().filter(|path| left.remove(path));
        let Some(path) = path else {
            let error = worker::not_a_path("a path with metadata", &name);
            return Err(match error {
                WireError::Unexpected { what, got, .. } => {
                    WireError::Unexpected { what, got, expected: "a path that was asked for, once" }
                }
                other => other,
            });
        };
        infos.push(read_info(source, version, store_dir, path)?);
    }
}

fn read_info(
    source: &mut impl Read,
    version: Version,
    store_dir: &StoreDir,
    path: StorePath,
) -> Result<Info, WireError> {
    let deriver = match read_bytes(source, "a path's deriver", MAX_NAME)? {
        empty if empty.is_empty() => None,
        name => {
            let parsed = store_dir.parse_path(&name);
            Some(parsed.map_err(|_| worker::not_a_path("a path's deriver", &name))?)
        }
    };
    let references = worker::read_paths(source, store_dir, worker::MAX_REFERENCES)?;
    read_u64(source, "a path's download size")?;
    let nar_size = read_u64(source, "a path's NAR size")?;
    let mut info = PathInfo {
        path,
        deriver,
        nar_hash: [0; 32],
        nar_size,
        references,
        registration_time: 0,
        ultimate: false,
        signatures: Vec::new(),
        content_address: None,
    };
    if !version.has_hashes() {
        return Ok(Info { info, has_hash: false });
    }
    let hash = read_string(source, "a path's NAR hash", MAX_NAME)?;
    info.nar_hash = match NixHash::parse(&hash) {
        Ok(NixHash::Sha256(hash)) => hash,
        _ => {
            return Err(WireError::Unexpected {
                what: "a path's NAR hash",
                got: format!("'{}'", hash.chars().take(80).collect::<String>().escape_debug()),
                expected: "a SHA-256 digest",
            });
        }
    };
    let address = read_string(source, "a path's content address", MAX_NAME)?;
    info.content_address = Some(address).filter(|address| !address.is_empty());
    info.signatures = read_list(source, "a path's signatures", worker::MAX_SIGNATURES, |source| {
        read_string(source, "a signature", MAX_NAME)
    })?;
    Ok(Info { info, has_hash: true })
}

/// Reads the answer to an import.
///
/// # Errors
/// If the stream ends or holds something else.
pub fn read_success(source: &mut impl Read) -> Result<(), WireError> {
    match read_u64(source, "the answer to an import")? {
        1 => Ok(()),
        other => Err(WireError::Unexpected {
            what: "the answer to an import",
            got: other.to_string(),
            expected: "1",
        }),
    }
}

/// Reads the answer to a build.
///
/// # Errors
/// If the stream ends or holds something else.
pub fn read_build_result(source: &mut impl Read, version: Version) -> Result<BuildResult, WireError> {
    let status = read_u64(source, "a build's status")?;
    let message = String::from_utf8_lossy(&read_bytes(source, "a build's message", MAX_STRING)?).into_owned();
    if version.minor() >= 3 {
        worker::read_build_times(source)?;
    }
    if version.minor() >= 6 {
        worker::read_built_outputs(source)?;
    }
    Ok(BuildResult { status, message })
}

#[cfg(test)]
mod tests;
