//! The worker protocol as a client speaks it: greeting, versions, the operations we use, and the messages a
//! daemon sends while it works.
//!
//! Encoders append to a buffer, decoders read from a stream; neither knows who is at the other end or when to
//! speak.
//!
//! Source: Nix 2.34 `src/libstore/worker-protocol.cc`, `worker-protocol-connection.cc`, `daemon.cc`,
//! `remote-store.cc`; Nix 2.8 `daemon.cc` for the older forms.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod greeting;
mod options;
mod result;

pub(super) use greeting::find_magic;
pub use greeting::{
    MAX_BANNER, NEWEST_MINOR, OLDEST_MINOR, Peer, Version, plain_version, put_greeting, read_greeting,
    read_peer,
};
pub use options::{Options, Own, put_set_options};
pub use result::{BuildResult, Outcome, read_build_result, read_keyed_build_result};
pub(super) use result::{read_build_times, read_built_outputs};

use super::hook::Field;
use super::{
    MAX_NAME, MAX_STRING, WireError, put_bytes, put_str, put_strings, put_u64, read_bytes, read_list,
    read_string, read_u64,
};
use crate::path_info::PathInfo;
use nix_derivation::{CAHash, Derivation, NixHash, Output, StoreDir, StorePath};
use std::collections::BTreeSet;
use std::io::Read;

/// Most bytes taken for one message, with all that is in it.
const MAX_MESSAGE: u64 = MAX_STRING + (1 << 20);
const MAX_FIELDS: u64 = 64;
const MAX_TRACES: u64 = 1000;
pub(super) const MAX_SIGNATURES: u64 = 1000;
pub(super) const MAX_REFERENCES: u64 = 1 << 20;

const OP_BUILD_PATHS: u64 = 9;
const OP_ADD_TEMP_ROOT: u64 = 11;
const OP_QUERY_PATH_INFO: u64 = 26;
const OP_QUERY_VALID_PATHS: u64 = 31;
const OP_BUILD_DERIVATION: u64 = 36;
const OP_NAR_FROM_PATH: u64 = 38;
const OP_ADD_TO_STORE_NAR: u64 = 39;
const OP_QUERY_MISSING: u64 = 40;
const OP_ADD_MULTIPLE_TO_STORE: u64 = 44;
const OP_BUILD_PATHS_WITH_RESULTS: u64 = 46;

const MESSAGE_LAST: u64 = 0x616c_7473;
const MESSAGE_NEXT: u64 = 0x6f6c_6d67;
const MESSAGE_ERROR: u64 = 0x6378_7470;
const MESSAGE_START: u64 = 0x5354_5254;
const MESSAGE_STOP: u64 = 0x5354_4f50;
const MESSAGE_RESULT: u64 = 0x5253_4c54;
const MESSAGE_READ: u64 = 0x6461_7461;

/// An error a daemon reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonError {
    /// Its message and, each on a line of its own, its traces.
    pub message: String,
}

/// What a daemon sends while it works on an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The work is done; the answer follows.
    Last,
    /// The work failed; no answer follows.
    Error(DaemonError),
    /// A text for the user.
    Text(Vec<u8>),
    /// An activity begins.
    Start {
        /// The daemon's number for it.
        id: u64,
        /// Its importance.
        level: u64,
        /// Its kind.
        kind: u64,
        /// What to show.
        text: Vec<u8>,
        /// Fields by the kind.
        fields: Vec<Field>,
    },
    /// An activity is over.
    Stop {
        /// The daemon's number for it.
        id: u64,
    },
    /// An activity has a result.
    Result {
        /// The daemon's number for the activity.
        id: u64,
        /// The result's kind.
        kind: u64,
        /// Fields by the kind.
        fields: Vec<Field>,
    },
    /// The daemon wants up to that many bytes of the NAR that is being sent (before 1.23 only).
    Read {
        /// How many it can take.
        length: u64,
    },
}

/// Reads one message.
///
/// # Errors
/// If the stream ends or holds something else.
pub fn read_message(source: &mut impl Read, version: Version) -> Result<Message, WireError> {
    let source = &mut source.take(MAX_MESSAGE);
    let text = |source: &mut _, what| read_bytes(source, what, MAX_STRING);
    match read_u64(source, "a message of the daemon")? {
        MESSAGE_LAST => Ok(Message::Last),
        MESSAGE_ERROR => Ok(Message::Error(read_error(source, version)?)),
        MESSAGE_NEXT => Ok(Message::Text(text(source, "a message's text")?)),
        MESSAGE_START => {
            let id = read_u64(source, "an activity's number")?;
            let level = read_u64(source, "an activity's level")?;
            let kind = read_u64(source, "an activity's kind")?;
            let text = text(source, "an activity's text")?;
            let fields = read_fields(source)?;
            read_u64(source, "an activity's parent")?;
            Ok(Message::Start { id, level, kind, text, fields })
        }
        MESSAGE_STOP => Ok(Message::Stop { id: read_u64(source, "an activity's number")? }),
        MESSAGE_RESULT => Ok(Message::Result {
            id: read_u64(source, "an activity's number")?,
            kind: read_u64(source, "a result's kind")?,
            fields: read_fields(source)?,
        }),
        MESSAGE_READ => Ok(Message::Read { length: read_u64(source, "a wanted length")? }),
        other => Err(WireError::Unexpected {
            what: "a message of the daemon",
            got: format!("{other:#x}"),
            expected: "one of the worker protocol's messages",
        }),
    }
}

fn read_error(source: &mut impl Read, version: Version) -> Result<DaemonError, WireError> {
    let lossy = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    if version.minor() < 26 {
        let message = lossy(read_bytes(source, "an error's message", MAX_STRING)?);
        read_u64(source, "an error's exit status")?;
        return Ok(DaemonError { message });
    }
    read_bytes(source, "an error's type", MAX_NAME)?;
    read_u64(source, "an error's level")?;
    read_bytes(source, "an error's name", MAX_STRING)?;
    let mut message = lossy(read_bytes(source, "an error's message", MAX_STRING)?);
    read_u64(source, "an error's position")?;
    let traces = read_list(source, "an error's traces", MAX_TRACES, |source| {
        read_u64(source, "a trace's position")?;
        read_bytes(source, "a trace's text", MAX_STRING)
    })?;
    for trace in traces {
        message.push('\n');
        message.push_str(&lossy(trace));
    }
    Ok(DaemonError { message })
}

fn read_fields(source: &mut impl Read) -> Result<Vec<Field>, WireError> {
    read_list(source, "an activity's fields", MAX_FIELDS, |source| {
        match read_u64(source, "a field's type")? {
            0 => Ok(Field::Int(read_u64(source, "a field")?)),
            1 => Ok(Field::Text(read_bytes(source, "a field", MAX_STRING)?)),
            other => Err(WireError::Unexpected {
                what: "a field's type",
                got: other.to_string(),
                expected: "0 (number) or 1 (text)",
            }),
        }
    })
}

/// Appends the operation that keeps a path from the garbage collector while the connection is open. Answer: a
/// number.
pub fn put_add_temp_root(buffer: &mut Vec<u8>, store_dir: &StoreDir, path: &StorePath) {
    put_u64(buffer, OP_ADD_TEMP_ROOT);
    put_str(buffer, &store_dir.render_path(path));
}

/// Appends the question which of the paths are valid. Answer: [`read_paths`].
///
/// With `substitute` the daemon first tries to fetch missing ones from its substituters (from 1.27; older ones
/// do not).
pub fn put_query_valid_paths<'a>(
    buffer: &mut Vec<u8>,
    version: Version,
    store_dir: &StoreDir,
    paths: impl ExactSizeIterator<Item = &'a StorePath>,
    substitute: bool,
) {
    put_u64(buffer, OP_QUERY_VALID_PATHS);
    put_strings(buffer, paths.map(|p| store_dir.render_path(p)));
    if version.minor() >= 27 {
        put_u64(buffer, substitute.into());
    }
}

/// Appends the question for a path's metadata. Answer: [`read_path_info`].
pub fn put_query_path_info(buffer: &mut Vec<u8>, store_dir: &StoreDir, path: &StorePath) {
    put_u64(buffer, OP_QUERY_PATH_INFO);
    put_str(buffer, &store_dir.render_path(path));
}

/// Appends the request for a path's NAR. Answer: the bare NAR, of the size its metadata names.
pub fn put_nar_from_path(buffer: &mut Vec<u8>, store_dir: &StoreDir, path: &StorePath) {
    put_u64(buffer, OP_NAR_FROM_PATH);
    put_str(buffer, &store_dir.render_path(path));
}

/// Appends a build of one derivation that need not be in the builder's store. Answer: [`read_build_result`].
///
/// `inputs` replaces the derivation's own input sources when it has input derivations, as the stock hook does.
/// Outputs must have known paths; others are left out.
pub fn put_build_derivation<'a>(
    buffer: &mut Vec<u8>,
    store_dir: &StoreDir,
    drv_path: &StorePath,
    drv: &Derivation,
    inputs: impl ExactSizeIterator<Item = &'a StorePath>,
) {
    put_u64(buffer, OP_BUILD_DERIVATION);
    put_derivation(buffer, store_dir, drv_path, drv, inputs);
    put_u64(buffer, 0); // build mode: normal
}

/// Appends a build of outputs, by name, of a derivation that is in the builder's store with its closure. Answer:
/// [`read_keyed_build_result`] if the daemon has results for it ([`Version::has_results_of_paths`]); else a number, and an
/// error when the build fails.
///
/// The stock hook asks for all outputs (`*`). Those that are there already are not built again for want of another.
pub fn put_build_paths<'a>(
    buffer: &mut Vec<u8>,
    version: Version,
    store_dir: &StoreDir,
    drv_path: &StorePath,
    outputs: impl Iterator<Item = &'a str>,
) {
    let operation = if version.has_results_of_paths() { OP_BUILD_PATHS_WITH_RESULTS } else { OP_BUILD_PATHS };
    put_u64(buffer, operation);
    let outputs: Vec<&str> = outputs.collect();
    put_strings(buffer, [format!("{}!{}", store_dir.render_path(drv_path), outputs.join(","))].iter());
    put_u64(buffer, 0); // build mode: normal
}

/// Appends the repair of no paths at all. Answer: a number; whom the daemon does not trust it refuses even this.
pub fn put_repair_nothing(buffer: &mut Vec<u8>) {
    put_u64(buffer, OP_BUILD_PATHS);
    put_u64(buffer, 0); // paths
    put_u64(buffer, 1); // build mode: repair
}

/// Appends the question what it would take to have the paths. Answer: [`read_missing`].
pub fn put_query_missing<'a>(
    buffer: &mut Vec<u8>,
    store_dir: &StoreDir,
    paths: impl ExactSizeIterator<Item = &'a StorePath>,
) {
    put_u64(buffer, OP_QUERY_MISSING);
    put_strings(buffer, paths.map(|p| store_dir.render_path(p)));
}

/// Appends a derivation as both protocols have it (`writeDerivation` in Nix 2.34 `src/libstore/derivations.cc`).
pub(super) fn put_derivation<'a>(
    buffer: &mut Vec<u8>,
    store_dir: &StoreDir,
    drv_path: &StorePath,
    drv: &Derivation,
    inputs: impl ExactSizeIterator<Item = &'a StorePath>,
) {
    put_str(buffer, &store_dir.render_path(drv_path));
    let outputs: Vec<_> = drv
        .outputs()
        .iter()
        .filter_map(|(name, output)| {
            let path = output.path_in(store_dir, drv.name(), name).ok()??;
            let (method, digest) = match output {
                Output::Fixed { ca } => fixed_output(ca),
                _ => (String::new(), String::new()),
            };
            Some((name, path, method, digest))
        })
        .collect();
    put_u64(buffer, outputs.len() as u64);
    for (name, path, method, digest) in outputs {
        put_str(buffer, name);
        put_str(buffer, &store_dir.render_path(&path));
        put_str(buffer, &method);
        put_str(buffer, &digest);
    }
    put_strings(buffer, inputs.map(|p| store_dir.render_path(p)));
    put_str(buffer, drv.system());
    put_str(buffer, drv.builder());
    put_strings(buffer, drv.arguments().iter());
    let structured = drv.structured_attrs().map(|attrs| ("__json", attrs.raw_json()));
    put_u64(buffer, (drv.environment().len() + usize::from(structured.is_some())) as u64);
    let environment = drv.environment().iter().map(|(name, value)| (name.as_str(), value.as_slice()));
    for (name, value) in environment.chain(structured) {
        put_str(buffer, name);
        put_bytes(buffer, value);
    }
}

/// Method with algorithm, and digest in base 16, as they stand in a derivation.
fn fixed_output(ca: &CAHash) -> (String, String) {
    let prefix = match ca {
        CAHash::Flat(_) => "",
        CAHash::Nar(_) => "r:",
        CAHash::Text(_) => "text:",
        CAHash::Git(_) => "git:",
    };
    (format!("{prefix}{}", ca.hash().algorithm()), base16(&ca.hash()))
}

fn base16(hash: &NixHash) -> String {
    let text = hash.to_nix_base16_string();
    text.split_once(':').map(|(_, digest)| digest.to_owned()).unwrap_or(text)
}

/// Appends the head of the operation that imports several paths; a stream in frames of
/// a length and as many bytes follows, ended by an empty one: the number of paths, and for each [`put_path_info`] and its
/// NAR. Answer: nothing.
pub fn put_add_multiple(buffer: &mut Vec<u8>) {
    put_u64(buffer, OP_ADD_MULTIPLE_TO_STORE);
    put_u64(buffer, 0); // repair
    put_u64(buffer, 1); // do not check signatures; only a trusted client is obeyed
}

/// Appends the head of the operation that imports one path (before 1.32); the NAR follows, framed from 1.23,
/// before that piece by piece as [`Message::Read`] asks. Answer: nothing.
pub fn put_add_to_store_nar(buffer: &mut Vec<u8>, store_dir: &StoreDir, info: &PathInfo) {
    put_u64(buffer, OP_ADD_TO_STORE_NAR);
    put_path_info(buffer, store_dir, info);
    put_u64(buffer, 0); // repair
    put_u64(buffer, 1); // do not check signatures
}

/// Appends a path and its metadata. `ultimate` is never claimed: the path was not built over there.
pub fn put_path_info(buffer: &mut Vec<u8>, store_dir: &StoreDir, info: &PathInfo) {
    put_str(buffer, &store_dir.render_path(&info.path));
    put_str(buffer, &info.deriver.as_ref().map(|p| store_dir.render_path(p)).unwrap_or_default());
    put_str(buffer, &base16(&NixHash::Sha256(info.nar_hash)));
    put_strings(buffer, info.references.iter().map(|p| store_dir.render_path(p)));
    put_u64(buffer, info.registration_time);
    put_u64(buffer, info.nar_size);
    put_u64(buffer, 0);
    put_strings(buffer, info.signatures.iter());
    put_str(buffer, info.content_address.as_deref().unwrap_or_default());
}

/// Reads a set of store paths, `limit` at most.
///
/// # Errors
/// If the stream ends or holds something else.
pub fn read_paths(
    source: &mut impl Read,
    store_dir: &StoreDir,
    limit: u64,
) -> Result<BTreeSet<StorePath>, WireError> {
    Ok(read_list(source, "a store path", limit, |source| read_path(source, store_dir, "a store path"))?
        .into_iter()
        .collect())
}

/// Reads what it would take to have paths, and keeps those of them and of what they refer to that the daemon's
/// substituters have.
///
/// # Errors
/// If the stream ends or holds something else.
pub fn read_missing(source: &mut impl Read, store_dir: &StoreDir) -> Result<BTreeSet<StorePath>, WireError> {
    read_paths(source, store_dir, MAX_REFERENCES)?; // to be built
    let substitutable = read_paths(source, store_dir, MAX_REFERENCES)?;
    read_paths(source, store_dir, MAX_REFERENCES)?; // unknown
    read_u64(source, "the size of a download")?;
    read_u64(source, "the size of what is missing")?;
    Ok(substitutable)
}

pub(super) fn read_path(
    source: &mut (impl Read + ?Sized),
    store_dir: &StoreDir,
    what: &'static str,
) -> Result<StorePath, WireError> {
    let bytes = read_bytes(source, what, MAX_NAME)?;
    store_dir.parse_path(&bytes).map_err(|_| not_a_path(what, &bytes))
}

pub(super) fn not_a_path(what: &'static str, bytes: &[u8]) -> WireError {
    const SHOWN: usize = 100;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]).escape_debug().to_string();
    WireError::Unexpected { what, got: format!("'{text}'"), expected: "a store path" }
}

/// Reads a path's metadata; `None` when the path is not valid there.
///
/// # Errors
/// If the stream ends or holds something else.
pub fn read_path_info(
    source: &mut impl Read,
    store_dir: &StoreDir,
    path: &StorePath,
) -> Result<Option<PathInfo>, WireError> {
    if read_u64(source, "whether a path is valid")? == 0 {
        return Ok(None);
    }
    let deriver = match read_bytes(source, "a path's deriver", MAX_NAME)? {
        empty if empty.is_empty() => None,
        bytes => Some(store_dir.parse_path(&bytes).map_err(|_| not_a_path("a path's deriver", &bytes))?),
    };
    let digest = read_string(source, "a path's NAR hash", MAX_NAME)?;
    let nar_hash = match NixHash::parse(&format!("sha256:{digest}")) {
        Ok(NixHash::Sha256(hash)) => hash,
        _ => {
            return Err(WireError::Unexpected {
                what: "a path's NAR hash",
                got: format!("'{}'", digest.chars().take(80).collect::<String>().escape_debug()),
                expected: "a SHA-256 digest",
            });
        }
    };
    let references = read_paths(source, store_dir, MAX_REFERENCES)?;
    let registration_time = read_u64(source, "a path's registration time")?;
    let nar_size = read_u64(source, "a path's NAR size")?;
    let ultimate = read_u64(source, "whether a path is ultimate")? != 0;
    let signatures = read_list(source, "a path's signatures", MAX_SIGNATURES, |source| {
        read_string(source, "a signature", MAX_NAME)
    })?;
    let content_address = Some(read_string(source, "a path's content address", MAX_NAME)?);
    Ok(Some(PathInfo {
        path: path.clone(),
        deriver,
        nar_hash,
        nar_size,
        references,
        registration_time,
        ultimate,
        signatures,
        content_address: content_address.filter(|ca| !ca.is_empty()),
    }))
}

/// Reads the number some operations answer with.
///
/// # Errors
/// If the stream ends.
pub fn read_number(source: &mut impl Read) -> Result<u64, WireError> {
    read_u64(source, "an answer")
}

#[cfg(test)]
mod tests;
