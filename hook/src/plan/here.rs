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

/// The store that a machine on this very machine has in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// That of the daemon that listens there; without a path at the usual place.
    Socket(Option<String>),
    /// The one that such a setting means.
    Store(String),
}

impl Opened {
    /// Whether that is the store that Nix uses here unless it is told otherwise, as far as the words say. `socket` is
    /// where its daemon listens.
    pub fn is_usual(&self, socket: &str) -> bool {
        let setting = match self {
            Self::Socket(path) => return path.as_deref().is_none_or(|path| path == socket),
            Self::Store(setting) => setting,
        };
        let Ok(uri) = StoreUri::parse(setting) else { return false };
        let is_elsewhere = ["root", "store", "state", "real"].iter().any(|name| uri.param(name).is_some());
        let is_plain = matches!(&uri.scheme, Scheme::Other(base) if matches!(base.as_str(), "" | "auto" | "local" | "/"));
        is_plain && !is_elsewhere
    }
}

/// A store URI that names a path or nothing, where a machine was surely meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slip {
    /// What it is taken for.
    pub message: String,
    /// What to write in its place.
    pub cure: String,
}

impl StoreUri {
    /// Whether it looks like a slip of the pen: `ssh-ng//big` and `ssh:/big`, and any other relative path. Nix too takes
    /// these for paths, older ones those with a colon as well (`isNonUriPath` in `src/libstore/store-reference.cc`).
    pub fn slip(&self) -> Option<Slip> {
        let Scheme::Other(base) = &self.scheme else { return None };
        if base.contains("://") {
            return None;
        }
        let (written, rest) = base.split_at(base.find([':', '/'])?);
        let letters: String = written.chars().filter(char::is_ascii_alphabetic).collect();
        let scheme = match letters.to_ascii_lowercase().as_str() {
            "ssh" => Some("ssh"),
            "sshng" => Some("ssh-ng"),
            _ => None,
        };
        let host = rest.trim_matches([':', '/']);
        let meant = scheme
            .filter(|_| !host.is_empty() && !host.contains('/'))
            .map(|scheme| format!("did you mean '{scheme}://{host}'?"));
        let is_relative = !base.contains(':') && !base.starts_with('/');
        let message = match (is_relative, &meant) {
            (true, _) => {
                format!(
                    "this is a relative path, so builds for it run on this machine, in a store at /{base}"
                )
            }
            (false, Some(_)) => format!("'{written}' is not followed by '://', so this names no machine"),
            (false, None) => return None,
        };
        let absolute =
            || format!("write /{base} for a store on this machine, or ssh-ng://HOST for another one");
        Some(Slip { message, cure: meant.unwrap_or_else(absolute) })
    }

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

/// What a machine opens that is this very machine. `usual` is what Nix here opens unless it is told otherwise
/// (`NIX_REMOTE`).
pub fn opened(machine: &Machine, usual: &str) -> Option<Opened> {
    match machine.uri.here()? {
        Here::Program => by_program(&machine.uri, usual),
        Here::Socket(path) => Some(Opened::Socket(path)),
        Here::Store(base) => Some(Opened::Store(store_uri(machine, &base))),
    }
}

/// What the remote program of an ssh machine opens where it runs, if that is a store of the same machine: its
/// `remote-store` is for it what `--store` is for a user there (`forwardStdioConnection` in Nix 2.34
/// `src/nix/unix/daemon.cc`).
pub fn by_program(uri: &StoreUri, usual: &str) -> Option<Opened> {
    let setting = uri.param("remote-store").unwrap_or(usual);
    let store = StoreUri::parse(setting).ok()?;
    match store.here()? {
        // It starts another one, which is told something else or nothing.
        Here::Program => by_program(&store, if setting == usual { "auto" } else { usual }),
        Here::Socket(path) => Some(Opened::Socket(path)),
        Here::Store(base) => Some(Opened::Store(match setting.split_once('?') {
            Some((_, query)) => format!("{base}?{query}"),
            None => base,
        })),
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
    fn a_program_here_opens_what_it_is_told_to_or_what_nix_uses_here() {
        let opened = |uri: &str, usual: &str| {
            let machine = Machine::for_uri(uri, BTreeSet::new()).unwrap();
            opened(&machine, usual).map(|opened| (opened.is_usual("/run/s"), opened))
        };
        let store = |is_usual, setting: &str| Some((is_usual, Opened::Store(setting.to_owned())));
        let socket = |is_usual, path: Option<&str>| Some((is_usual, Opened::Socket(path.map(str::to_owned))));
        for (uri, usual, expected) in [
            ("localhost", "", store(true, "auto")),
            ("ssh-ng://localhost", "auto", store(true, "auto")),
            ("localhost", "daemon", socket(true, None)),
            ("localhost", "unix:///run/s", socket(true, Some("/run/s"))),
            ("localhost", "/srv/x", store(false, "/srv/x")),
            ("localhost", "ssh-ng://localhost", store(true, "auto")),
            ("localhost?remote-store=auto", "/srv/x", store(true, "auto")),
            ("localhost?remote-store=daemon", "/srv/x", socket(true, None)),
            ("ssh://localhost?remote-store=unix:///run/t", "", socket(false, Some("/run/t"))),
            (
                "localhost?remote-store=srv/x?system-features%3Da",
                "",
                store(false, "/srv/x?system-features=a"),
            ),
            ("localhost?remote-store=local%3Froot%3D/srv/x", "", store(false, "local?root=/srv/x")),
            ("ssh://localhost?remote-store=ssh://localhost%3Fremote-store%3Ddaemon", "", socket(true, None)),
            ("ssh://localhost?remote-store=ssh://mac", "", None),
            ("local", "/srv/x", store(true, "local?system-features=")),
            ("daemon", "/srv/x", socket(true, None)),
            ("ssh://mac", "", None),
        ] {
            assert_eq!(opened(uri, usual), expected, "{uri} {usual}");
        }
    }

    #[test]
    fn a_slip_of_the_pen_is_told_from_a_path() {
        let slip = |text: &str| StoreUri::parse(&StoreUri::with_implied_scheme(text)).unwrap().slip();
        for (text, meant) in [
            ("ssh-ng//big", "ssh-ng://big"),
            ("ssh-ng/big?compress=true", "ssh-ng://big"),
            ("SSH_NG://", ""),
            ("ssh-ng:/root@big:22", "ssh-ng://root@big:22"),
            ("ssh:/big/", "ssh://big"),
            ("ssh//big", "ssh://big"),
        ] {
            let cure = slip(text).map(|slip| slip.cure).unwrap_or_default();
            let expected = if meant.is_empty() { String::new() } else { format!("did you mean '{meant}'?") };
            assert_eq!(cure, expected, "{text}");
        }
        let relative = slip("srv/store").unwrap();
        assert!(relative.message.contains("a store at /srv/store"), "{relative:?}");
        assert!(relative.cure.starts_with("write /srv/store "), "{relative:?}");
        let near = slip("ssh-ng:/big").unwrap();
        assert_eq!(near.message, "'ssh-ng' is not followed by '://', so this names no machine");
        for text in
            ["/ssh/big", "auto", "daemon", "mac", "ssh-ng://big", "unix:/run/x", "local:/x", "plugin://x"]
        {
            assert_eq!(slip(text), None, "{text}");
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
