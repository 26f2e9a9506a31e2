//! Stores that are reached without ssh: what their URIs mean.
//!
//! Must never look at the disk or know how a connection is made.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::machine::{Machine, Scheme, StoreUri, percent_encode};
use std::collections::BTreeSet;

/// How a store on this very machine is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Here {
    /// The remote program of an ssh machine, started here: Nix takes the authority `localhost`, without user and port,
    /// for that (`fakeSSH` in `src/libstore/ssh.cc`, 2.8 to 2.34).
    Program,
    /// A daemon's socket; without a path the usual one.
    Socket(Option<String>),
    /// A store that a daemon of our own opens: `auto`, `local` or an absolute path, each without parameters.
    Store(String),
}

impl StoreUri {
    /// How the store is reached if it is on this machine and we can do it; see `StoreReference::parse` in Nix 2.34
    /// `src/libstore/store-reference.cc`.
    pub fn here(&self) -> Option<Here> {
        match &self.scheme {
            Scheme::Ssh | Scheme::SshNg => {
                (self.destination == "localhost" && self.port.is_none()).then_some(Here::Program)
            }
            Scheme::Other(base) => of_base(base),
        }
    }

    /// Whether the hook itself speaks to stores of this kind.
    pub fn is_ours(&self) -> bool {
        !matches!(self.scheme, Scheme::Other(_)) || self.here().is_some()
    }
}

/// What the text before the parameters means, if it is a store on this machine.
pub(super) fn of_base(base: &str) -> Option<Here> {
    if let Some(path) = base.strip_prefix("unix:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return match path {
            "" => Some(Here::Socket(None)),
            path if path.starts_with('/') => Some(Here::Socket(Some(path.to_owned()))),
            _ => None,
        };
    }
    if let Some(path) = base.strip_prefix("local:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return match path {
            "" => Some(Here::Store("local".into())),
            path if path.starts_with('/') => Some(Here::Store(base.to_owned())),
            _ => None,
        };
    }
    match base {
        "" | "auto" => Some(Here::Store("auto".into())),
        "local" => Some(Here::Store("local".into())),
        "daemon" => Some(Here::Socket(None)),
        path if path.starts_with('/') => Some(Here::Store(path.to_owned())),
        // A hook runs in `/`, from where stock takes a relative path.
        path if path.contains('/') && !path.contains(':') => Some(Here::Store(format!("/{path}"))),
        _ => None,
    }
}

/// The URI by which a daemon is told to open the machine's store, with the features of its line for the store's own.
///
/// Source: `Machine::completeStoreReference` in Nix 2.34 `src/libstore/machines.cc`: the features are set even if there
/// are none, and are added to those in the URI.
pub fn store_uri(machine: &Machine, base: &str) -> String {
    let params = &machine.uri.params;
    let in_uri = params.get("system-features").map(String::as_str).unwrap_or_default();
    let features: BTreeSet<&str> = in_uri
        .split_whitespace()
        .chain(machine.supported_features.iter().map(String::as_str))
        .chain(machine.mandatory_features.iter().map(String::as_str))
        .collect();
    let features = features.into_iter().collect::<Vec<_>>().join(" ");
    let mut uri = format!("{base}?system-features={}", percent_encode(&features));
    for (name, value) in params.iter().filter(|(name, _)| *name != "system-features") {
        uri.push_str(&format!("&{}={}", percent_encode(name), percent_encode(value)));
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here(text: &str) -> Option<Here> {
        StoreUri::parse(&StoreUri::with_implied_scheme(text)).unwrap().here()
    }

    #[test]
    fn localhost_alone_means_here_and_any_other_address_means_ssh() {
        for text in ["localhost", "ssh://localhost", "ssh-ng://localhost?remote-store=/x"] {
            assert_eq!(here(text), Some(Here::Program), "{text}");
        }
        for text in ["root@localhost", "ssh-ng://localhost:22", "ssh://127.0.0.1", "ssh://localhost.lan"] {
            assert_eq!(here(text), None, "{text}");
        }
    }

    #[test]
    fn words_paths_and_sockets_are_stores_of_this_machine() {
        let store = |base: &str| Some(Here::Store(base.to_owned()));
        for (text, expected) in [
            ("auto", store("auto")),
            ("auto?priority=3", store("auto")),
            ("local", store("local")),
            ("local?root=/x", store("local")),
            ("local:///x", store("local:///x")),
            ("/srv/store", store("/srv/store")),
            ("srv/store", store("/srv/store")),
            ("daemon", Some(Here::Socket(None))),
            ("unix://", Some(Here::Socket(None))),
            ("unix:///run/x", Some(Here::Socket(Some("/run/x".into())))),
        ] {
            assert_eq!(here(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_left_to_nix() {
        for text in ["https://cache", "file:///c", "s3://b?region=x", "mounted-ssh-ng://h", "plugin://x"] {
            let uri = StoreUri::parse(text).unwrap();
            assert!(!uri.is_ours(), "{text}");
        }
    }

    #[test]
    fn a_stores_features_are_those_of_the_line_and_of_the_uri() {
        let mut machine = Machine::for_uri("/x?system-features=a%20b&root=/y", BTreeSet::new()).unwrap();
        machine.supported_features = ["c".to_owned()].into();
        machine.mandatory_features = ["b".to_owned()].into();
        assert_eq!(store_uri(&machine, "/x"), "/x?system-features=a%20b%20c&root=/y");
        let plain = Machine::for_uri("auto", BTreeSet::new()).unwrap();
        assert_eq!(store_uri(&plain, "auto"), "auto?system-features=");
    }
}
