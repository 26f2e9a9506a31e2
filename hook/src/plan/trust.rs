//! What a builder's daemon does for an account that it does not trust, and how a build is asked for accordingly.
//!
//! Owns the rules and the words. Must never ask a daemon.
//!
//! Source: `BuildDerivation` in Nix 2.34 `src/libstore/daemon.cc`, `LocalStore::addToStore` in `local-store.cc`,
//! `src/nix/build-remote/build-remote.cc`.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::outputs::is_fixed;
use crate::path_info::PathInfo;
use nix_derivation::{Derivation, StoreDir, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use thiserror::Error;

/// How a build is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The derivation alone, which need not be in the builder's store.
    Derivation,
    /// Outputs of a derivation that has been sent with its closure: the daemon sees for itself that they are what it
    /// says, so it need not trust us.
    Closure,
}

/// How a build is asked for, of a daemon that trusts us or does not. Without trust a derivation alone is only built if it is
/// fixed by its content. A daemon that does not say is taken to trust us, as in Nix.
pub fn way(drv: &Derivation, trusted: Option<bool>) -> Way {
    if trusted != Some(false) || is_fixed(drv) { Way::Derivation } else { Way::Closure }
}

/// Whether a daemon's refusal to build means that it does not trust us. Before 2.4 it was said of all derivations.
pub fn is_refusal_to_build(words: &str) -> bool {
    words.contains("not privileged to build")
}

/// Whether a daemon's refusal to repair means that it does not trust us.
pub fn is_refusal_to_repair(words: &str) -> bool {
    words.contains("not in 'trusted-users'")
}

/// Whether a daemon's refusal to take a path is for want of a signature; the words are those from 2.0 on.
pub fn is_want_of_signature(words: &str) -> bool {
    words.contains("cannot add path") && words.contains("lacks a") && words.contains("signature")
}

/// Whether a path may be refused by a daemon that does not trust us. One that is known by its content is what it
/// says, and needs nobody's word.
pub fn is_in_doubt(info: &PathInfo) -> bool {
    info.content_address.is_none()
}

/// The names of the keys by which a path is signed.
pub fn signers(info: &PathInfo) -> BTreeSet<String> {
    let names = info.signatures.iter().filter_map(|signature| signature.split_once(':'));
    names.map(|(name, _)| name.to_owned()).collect()
}

/// One path of each kind of which a daemon takes all or none: those that are signed by the same keys.
pub fn samples<'a>(infos: impl Iterator<Item = &'a PathInfo>) -> Vec<&'a PathInfo> {
    let mut samples = BTreeMap::new();
    for info in infos {
        samples.entry(signers(info)).or_insert(info);
    }
    samples.into_values().collect()
}

/// The store path that a daemon's words name, between quotes and perhaps colours.
pub fn path_in(words: &str, store_dir: &StoreDir) -> Option<StorePath> {
    let root = format!("{}/", store_dir.as_str());
    let rest = words.get(words.find(&root)? + root.len()..)?;
    let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "+-._?=".contains(c)));
    StorePath::from_basename(rest.get(..end.unwrap_or(rest.len()))?.as_bytes()).ok()
}

/// An account on a builder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The user's name there, if it is known here.
    pub user: Option<String>,
    /// The builder's name here.
    pub host: String,
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.user {
            Some(user) => write!(f, "{user}@{}", self.host),
            None => f.write_str(&self.host),
        }
    }
}

impl Account {
    /// How it comes to be trusted.
    pub fn cure(&self) -> String {
        let host = &self.host;
        let user = match &self.user {
            Some(user) => format!("'{user}'"),
            None => format!("the user that you are on {host}"),
        };
        format!("add {user} to trusted-users in nix.conf on {host} and restart its nix-daemon")
    }
}

/// What a daemon does not do for us because it does not trust us.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the Nix daemon does not trust the account '{account}'{}; it says: {words}", unsigned(.path))]
pub struct Distrust {
    /// The account it knows us by.
    pub account: Account,
    /// The input that it does not take from us, and the keys by which it is signed.
    pub path: Option<(String, BTreeSet<String>)>,
    /// The daemon's words.
    pub words: String,
}

fn unsigned(path: &Option<(String, BTreeSet<String>)>) -> String {
    let Some((path, signers)) = path else { return " to have derivations built".into() };
    let signers: Vec<&str> = signers.iter().map(String::as_str).collect();
    match signers.as_slice() {
        [] => format!(", so it does not take {path}, which nobody has signed"),
        names => format!(
            ", so it does not take {path}, which is signed by no key that it trusts, only by {}",
            names.join(", ")
        ),
    }
}

impl Distrust {
    /// What to do about it.
    pub fn cure(&self) -> String {
        let trusted = self.account.cure();
        if self.path.is_none() {
            return format!("{trusted}, or log in to the builder as a user that is there already");
        }
        format!(
            "{trusted}; or have such paths signed here (secret-key-files in nix.conf for what is built from now on, \
             'nix store sign' for what is there) by a key that stands in trusted-public-keys in nix.conf on {}",
            self.account.host
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix_derivation::StoreDir;

    fn derivation(outputs: &str) -> Derivation {
        let aterm = format!(r#"Derive([{outputs}],[],[],"x86_64-linux","/bin/sh",[],[])"#);
        Derivation::from_aterm_bytes_in(aterm.as_bytes(), "x", StoreDir::default()).unwrap()
    }

    #[test]
    fn the_closure_is_sent_for_what_is_not_fixed_to_who_does_not_trust_us() {
        let path = format!("/nix/store/{}-x", "0".repeat(32));
        let plain = derivation(&format!(r#"("out","{path}","","")"#));
        let digest = "0".repeat(64);
        let fixed = derivation(&format!(r#"("out","{path}","r:sha256","{digest}")"#));
        for trusted in [None, Some(true)] {
            assert_eq!((way(&plain, trusted), way(&fixed, trusted)), (Way::Derivation, Way::Derivation));
        }
        assert_eq!((way(&plain, Some(false)), way(&fixed, Some(false))), (Way::Closure, Way::Derivation));
    }

    #[test]
    fn refusals_are_told_apart_in_the_words_of_all_versions() {
        for words in [
            "you are not privileged to build derivations",
            "you are not privileged to build input-addressed derivations",
        ] {
            assert!(
                is_refusal_to_build(words) && !is_refusal_to_repair(words) && !is_want_of_signature(words)
            );
        }
        assert!(is_refusal_to_repair("repairing is not allowed because you are not in 'trusted-users'"));
        for words in [
            "cannot add path '/nix/store/x' because it lacks a valid signature",
            "cannot add path '/nix/store/x' because it lacks a signature by a trusted key",
        ] {
            assert!(is_want_of_signature(words) && !is_refusal_to_build(words));
        }
        assert!(!is_want_of_signature("NAR is truncated") && !is_refusal_to_build("cannot build"));
    }

    fn info(name: &str, signatures: &[&str]) -> PathInfo {
        PathInfo {
            path: StorePath::from_parts([1; 20], name).unwrap(),
            deriver: None,
            nar_hash: [0; 32],
            nar_size: 1,
            references: BTreeSet::new(),
            registration_time: 0,
            ultimate: false,
            signatures: signatures.iter().map(|signature| (*signature).to_owned()).collect(),
            content_address: None,
        }
    }

    #[test]
    fn paths_that_are_signed_alike_need_one_question() {
        let infos = [
            info("a", &["k1:x", "k2:y"]),
            info("b", &["k1:z"]),
            info("c", &[]),
            info("d", &["k2:v", "k1:w"]),
            info("e", &[]),
        ];
        let names: BTreeSet<&str> = samples(infos.iter()).iter().map(|info| info.path.name()).collect();
        assert_eq!(names, ["a", "b", "c"].into());
        assert!(is_in_doubt(&infos[0]));
        assert!(!is_in_doubt(&PathInfo { content_address: Some("text:x".into()), ..infos[0].clone() }));
    }

    #[test]
    fn the_path_is_found_between_quotes_and_colours() {
        let store_dir = StoreDir::default();
        let path = info("some_name-1.2+x?=", &[]).path;
        let rendered = store_dir.render_path(&path);
        for words in [
            format!("cannot add path '{rendered}' because"),
            format!("cannot add path '\u{1b}[35;1m{rendered}\u{1b}[0m' because"),
            rendered.clone(),
        ] {
            assert_eq!(path_in(&words, &store_dir).as_ref(), Some(&path), "{words}");
        }
        assert_eq!(path_in("cannot add path '/nix/store/' because", &store_dir), None);
        assert_eq!(path_in("no path", &store_dir), None);
    }

    #[test]
    fn the_error_names_the_account_the_path_its_keys_and_all_cures() {
        let error = |path| Distrust {
            account: Account { user: Some("ann".into()), host: "mac".into() },
            path,
            words: "no".into(),
        };
        let path = || "/nix/store/x".to_owned();
        let plain = error(None);
        assert!(plain.to_string().contains("'ann@mac' to have derivations built; it says: no"), "{plain}");
        assert!(plain.cure().contains("add 'ann' to trusted-users in nix.conf on mac and restart"));
        let unsigned = error(Some((path(), BTreeSet::new())));
        assert!(unsigned.to_string().contains("/nix/store/x, which nobody has signed; it says: no"));
        let signed = error(Some((path(), ["k1".to_owned(), "k2".to_owned()].into())));
        assert!(signed.to_string().contains("only by k1, k2; it says: no"), "{signed}");
        for word in ["'ann' to trusted-users", "secret-key-files", "trusted-public-keys in nix.conf on mac"] {
            assert!(signed.cure().contains(word), "{}", signed.cure());
        }
    }
}
