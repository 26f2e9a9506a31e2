//! What a store knows of one valid path.

use nix_derivation::StorePath;
use std::collections::BTreeSet;

/// Metadata of a valid store path, as it stands in a store's database and as daemons exchange it.
///
/// Mirrors `ValidPathInfo` in Nix 2.34 `src/libstore/include/nix/store/path-info.hh`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// The path itself.
    pub path: StorePath,
    /// The derivation that made it, if known.
    pub deriver: Option<StorePath>,
    /// SHA-256 of its NAR serialisation.
    pub nar_hash: [u8; 32],
    /// Length of its NAR serialisation in bytes.
    pub nar_size: u64,
    /// Store paths it refers to, itself included when it does.
    pub references: BTreeSet<StorePath>,
    /// Seconds since the epoch at which it became valid.
    pub registration_time: u64,
    /// Whether the store that says so built it itself.
    pub ultimate: bool,
    /// Signatures in the form `name:base64`.
    pub signatures: Vec<String>,
    /// Content address in Nix's text form (`fixed:r:sha256:...`), empty for input-addressed paths.
    pub content_address: Option<String>,
}
