//! What a builder may claim of the outputs it made.
//!
//! Owns the rules by which claims are accepted before anything is registered. Must never touch a store.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::path_info::PathInfo;
use nix_derivation::{CAHash, Derivation, Output, StoreDir, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// Why an output, or a derivation's outputs as a whole, cannot be taken over.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OutputError {
    /// The path of an output is only known after the build.
    #[error("the path of output '{0}' is not known before the build (an experimental kind of derivation)")]
    UnknownPath(String),
    /// The build is not to be repeatable. Nix's own hook brings such an output here and does not register what it is the
    /// output of, upon which Nix gives up the whole command (2.26 and 2.34).
    #[error("the output '{0}' is impure, which no hook can bring home")]
    Impure(String),
    /// The output is fixed in a way of which Nix's own hook knows more than we do.
    #[error("the output '{0}' is {1} (an experimental kind of derivation)")]
    Experimental(String, &'static str),
    /// The derivation's output cannot be made into a path.
    #[error("the derivation's output '{0}' has no valid path")]
    BadPath(String),
    /// Nix wants an output that the derivation has not.
    #[error("the derivation has no output '{0}'")]
    NoSuchOutput(String),
    /// The builder says it built the outputs, but this one is not there.
    #[error("the builder reported success, but the output '{0}' is not in its store")]
    Missing(String),
    /// A reference that cannot be registered here.
    #[error(
        "the output '{path}' claims to refer to '{reference}', which is neither an input nor an output, nor valid here"
    )]
    Reference {
        /// The output.
        path: String,
        /// The reference.
        reference: String,
    },
    /// Fixed outputs stand for their content alone.
    #[error("the fixed output '{path}' claims to refer to '{reference}', but may refer to nothing")]
    FixedReference {
        /// The output.
        path: String,
        /// The reference.
        reference: String,
    },
}

/// An output of a derivation whose path is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its path.
    pub path: StorePath,
    /// The content a fixed output must have.
    pub content_address: Option<CAHash>,
}

/// The paths of all outputs of a derivation, by name.
///
/// # Errors
/// If one of them is not known before the build, or makes no path.
pub fn output_paths(drv: &Derivation, store_dir: &StoreDir) -> Result<BTreeMap<String, Wanted>, OutputError> {
    let mut paths = BTreeMap::new();
    for (name, output) in drv.outputs() {
        if matches!(output, Output::Impure { .. }) {
            return Err(OutputError::Impure(name.clone()));
        }
        let path = output
            .path_in(store_dir, drv.name(), name)
            .map_err(|_| OutputError::BadPath(name.clone()))?
            .ok_or_else(|| OutputError::UnknownPath(name.clone()))?;
        let content_address = match output {
            Output::Fixed { ca } => Some(ca.clone()),
            _ => None,
        };
        paths.insert(name.clone(), Wanted { path, content_address });
    }
    Ok(paths)
}

/// Refuses outputs that could be built, and then not be taken over: those whose hash is that of a Git tree, which nothing here
/// computes, and derivations, whose own outputs Nix writes down when it registers them.
///
/// # Errors
/// If one of them is of that kind.
pub fn check_kinds(outputs: &BTreeMap<String, Wanted>) -> Result<(), OutputError> {
    for (name, Wanted { path, content_address }) in outputs {
        let refused = |kind| Err(OutputError::Experimental(name.clone(), kind));
        if matches!(content_address, Some(CAHash::Git(_))) {
            return refused("fixed by a Git hash");
        }
        if path.name().ends_with(".drv") {
            return refused("itself a derivation");
        }
    }
    Ok(())
}

/// Whether all outputs are fixed by their content.
pub fn is_fixed(drv: &Derivation) -> bool {
    drv.outputs().values().all(|output| matches!(output, Output::Fixed { .. }))
}

/// Turns a builder's claim of an output into what is registered here.
///
/// References must be outputs of the same derivation or `referable`: its inputs, and what else is valid here. More is not asked
/// for, as Nix does not (`registerValidPaths`): the builder has seen what the build could refer to, and to refuse what it
/// built would be to build it again, on each machine. The content address is the derivation's, never
/// the builder's. Signatures that could not be stored as words are dropped.
///
/// # Errors
/// If a reference is not allowed.
pub fn accept(
    wanted: &Wanted,
    claim: PathInfo,
    referable: &BTreeSet<StorePath>,
    outputs: &BTreeMap<String, Wanted>,
    store_dir: &StoreDir,
) -> Result<PathInfo, OutputError> {
    let render = |path: &StorePath| store_dir.render_path(path);
    for reference in &claim.references {
        if wanted.content_address.is_some() {
            return Err(OutputError::FixedReference {
                path: render(&wanted.path),
                reference: render(reference),
            });
        }
        if !referable.contains(reference) && !outputs.values().any(|o| o.path == *reference) {
            return Err(OutputError::Reference { path: render(&wanted.path), reference: render(reference) });
        }
    }
    let signatures = claim
        .signatures
        .into_iter()
        .filter(|s| s.contains(':') && !s.chars().any(|c| c.is_whitespace() || c.is_control()))
        .collect();
    Ok(PathInfo {
        path: wanted.path.clone(),
        content_address: wanted.content_address.as_ref().map(CAHash::to_nix_string),
        ultimate: false,
        signatures,
        ..claim
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> StorePath {
        StorePath::from_parts([name.len() as u8; 20], name).unwrap()
    }

    fn claim(references: &[&str]) -> PathInfo {
        PathInfo {
            path: path("out"),
            deriver: None,
            nar_hash: [0; 32],
            nar_size: 1,
            references: references.iter().map(|r| path(r)).collect(),
            registration_time: 0,
            ultimate: true,
            signatures: vec!["key:abc".into(), "two words:x".into(), "none".into()],
            content_address: Some("fixed:sha256:lie".into()),
        }
    }

    fn take(references: &[&str], content_address: Option<CAHash>) -> Result<PathInfo, OutputError> {
        let wanted = Wanted { path: path("out"), content_address };
        let outputs = [
            ("out".to_owned(), wanted.clone()),
            ("dev".to_owned(), Wanted { path: path("out-dev"), content_address: None }),
        ];
        let inputs = [path("an-input")].into();
        accept(&wanted, claim(references), &inputs, &outputs.into(), &StoreDir::default())
    }

    #[test]
    fn inputs_outputs_and_itself_may_be_referred_to_and_nothing_else() {
        assert!(take(&["an-input", "out", "out-dev"], None).is_ok());
        assert!(matches!(take(&["a-stranger"], None), Err(OutputError::Reference { .. })));
    }

    #[test]
    fn the_content_address_is_the_derivations_and_odd_signatures_are_dropped() {
        let plain = take(&[], None).unwrap();
        assert_eq!(plain.content_address, None);
        assert!(!plain.ultimate);
        assert_eq!(plain.signatures, ["key:abc"]);
        let ca = CAHash::Text([7; 32]);
        assert_eq!(take(&[], Some(ca.clone())).unwrap().content_address, Some(ca.to_nix_string()));
    }

    #[test]
    fn a_fixed_output_refers_to_nothing() {
        let ca = CAHash::Text([7; 32]);
        assert!(matches!(take(&["out"], Some(ca)), Err(OutputError::FixedReference { .. })));
    }

    #[test]
    fn git_hashes_and_derivations_as_outputs_are_experimental() {
        let kinds = |name: &str, content_address| {
            check_kinds(&[("out".to_owned(), Wanted { path: path(name), content_address })].into())
        };
        let git = CAHash::Git(nix_derivation::NixHash::Sha256([7; 32]));
        assert!(matches!(kinds("x", Some(git)), Err(OutputError::Experimental(..))));
        assert!(matches!(kinds("x.drv", Some(CAHash::Text([7; 32]))), Err(OutputError::Experimental(..))));
        assert!(kinds("x", Some(CAHash::Text([7; 32]))).is_ok() && kinds("x", None).is_ok());
    }
}
