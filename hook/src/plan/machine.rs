//! A machine: what its line in the list says, and the parts of its store URI.
//!
//! Owns the nouns and the reading of store URIs. Must never know how a connection is made.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::here::{self, Here};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// One machine of the list.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// Its store URI as written, with `ssh://` in front where that was implied; the name Nix shows.
    pub name: String,
    /// The URI's parts.
    pub uri: StoreUri,
    /// Systems it builds for.
    pub systems: BTreeSet<String>,
    /// SSH identity file (column 3).
    pub identity: Option<String>,
    /// Slots: builds it runs at the same time.
    pub max_jobs: u64,
    /// Speed in relation to the other machines; never 0 or negative.
    pub speed_factor: f32,
    /// Features it has.
    pub supported_features: BTreeSet<String>,
    /// Features it has and which a derivation must require to be built there.
    pub mandatory_features: BTreeSet<String>,
    /// Public host key lines (column 8, decoded), for instance `ssh-ed25519 AAAA...`.
    pub host_key: Option<String>,
    /// Where the line stands; empty for a machine that comes from no list.
    pub place: Place,
}

/// Where a machine's line stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Place {
    /// A file, or the name of what the text came from (`builders`).
    pub source: String,
    /// Line, from 1.
    pub line: usize,
    /// Column of the machine's first character, from 1.
    pub column: usize,
}

impl Machine {
    /// A machine with every column but the URI left to its default.
    ///
    /// # Errors
    /// If the URI cannot be read.
    pub fn for_uri(uri: &str, default_systems: BTreeSet<String>) -> Result<Self, UriError> {
        let name = StoreUri::with_implied_scheme(uri);
        Ok(Self {
            uri: StoreUri::parse(&name)?,
            name,
            systems: default_systems,
            identity: None,
            max_jobs: 1,
            speed_factor: 1.0,
            supported_features: BTreeSet::new(),
            mandatory_features: BTreeSet::new(),
            host_key: None,
            place: Place::default(),
        })
    }

    /// The host of its store URI, without a user; empty if it has none.
    pub fn host(&self) -> &str {
        self.uri.destination.rsplit_once('@').map_or(self.uri.destination.as_str(), |(_, host)| host)
    }

    /// The SSH identity file to use: the column wins over the URI's `ssh-key`, as in Nix.
    pub fn identity_file(&self) -> Option<&str> {
        self.identity.as_deref().or_else(|| self.uri.param("ssh-key"))
    }
}

/// How a store is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scheme {
    /// `ssh://`: the older of Nix's two ways over SSH.
    Ssh,
    /// `ssh-ng://`: the worker protocol over SSH.
    SshNg,
    /// Anything else, by the text before `?` (`auto`, `/path`, `unix:///socket`, `https://host`). See
    /// [`StoreUri::here`].
    Other(String),
}

/// A store URI in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreUri {
    /// How it is reached.
    pub scheme: Scheme,
    /// `[user@]host` as ssh takes it: percent escapes read, as Nix does from 2.31 on (`ParsedURL::Authority::parse` in
    /// `src/libutil/url.cc` of 2.34), brackets of an IPv6 address removed; empty for other schemes.
    pub destination: String,
    /// The port, if the URI names one.
    pub port: Option<u16>,
    /// Parameters behind `?`, percent-decoded once. As in Nix, what has no value is no parameter, and the first of two equal
    /// names counts (`decodeQuery` in `src/libutil/url.cc` of Nix 2.8 to 2.34).
    pub params: BTreeMap<String, String>,
}

/// Why a store URI cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UriError {
    /// There is no host in it.
    #[error("the store URI '{0}' names no host")]
    NoHost(String),
    /// The host begins with a dash, so ssh would take it for an option.
    #[error("the host '{0}' would be taken for an option of ssh")]
    DashHost(String),
    /// A character that cannot be part of a host name.
    #[error("the host '{0}' contains a blank or control character")]
    BadHost(String),
    /// The port is no number from 1 to 65535.
    #[error("the port '{0}' is not a number from 1 to 65535")]
    BadPort(String),
    /// A percent sign without two hexadecimal digits behind it, or one that makes no text.
    #[error("the parameter '{0}' has a bad percent escape")]
    BadEscape(String),
}

impl StoreUri {
    /// Puts `ssh://` in front of a bare host, by the rule of Nix 2.34 `src/libstore/machines.cc`.
    pub fn with_implied_scheme(text: &str) -> String {
        let special = ["auto", "daemon", "local"]
            .iter()
            .any(|word| text == *word || text.strip_prefix(word).is_some_and(|rest| rest.starts_with('?')));
        if text.contains("://") || special || text.starts_with('?') {
            return text.to_owned();
        }
        // A slash makes it a path, but not one inside a parameter: `mac?ssh-key=/home/alice/key` names a host.
        let authority = text.split('?').next().unwrap_or_default();
        if authority.contains('/') { text.to_owned() } else { format!("ssh://{text}") }
    }

    /// Reads a store URI that has its scheme.
    ///
    /// # Errors
    /// For `ssh` and `ssh-ng`: no usable host or port. For these and for stores of this machine: parameters with a bad
    /// percent escape. What is left to Nix is kept as it is and never fails.
    pub fn parse(text: &str) -> Result<Self, UriError> {
        let (scheme, rest) = match text.split_once("://") {
            Some(("ssh", rest)) => (Scheme::Ssh, rest),
            Some(("ssh-ng", rest)) => (Scheme::SshNg, rest),
            _ => return Self::other(text),
        };
        // Only the first question mark separates: `remote-store=PATH?system-features=x` keeps its own.
        let (authority, query) = rest.split_once('?').unwrap_or((rest, ""));
        let authority = authority.trim_end_matches('/');
        let (user, host_port) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let (host, port) = split_port(host_port)?;
        if host.is_empty() || user == Some("") {
            return Err(UriError::NoHost(text.to_owned()));
        }
        // Looked at afterwards, for `%2d` is a dash.
        let host = if host.contains(':') { host.replace("%25", "%") } else { unescaped(host) };
        let destination = match user {
            Some(user) => format!("{}@{host}", unescaped(user)),
            None => host.clone(),
        };
        if destination.starts_with('-') || host.starts_with('-') {
            return Err(UriError::DashHost(destination));
        }
        if destination.chars().any(|c| c.is_whitespace() || c.is_control() || c == '/') {
            return Err(UriError::BadHost(destination));
        }
        Ok(Self { scheme, destination, port, params: parse_query(query)? })
    }

    fn other(text: &str) -> Result<Self, UriError> {
        let (base, query) = text.split_once('?').unwrap_or((text, ""));
        let params = if here::of_base(base).is_some() { parse_query(query)? } else { BTreeMap::new() };
        Ok(Self { scheme: Scheme::Other(base.to_owned()), destination: String::new(), port: None, params })
    }

    /// The URI as Nix from 2.26 on renders it; older ones show it as written. Only for what the hook itself reaches.
    ///
    /// Source: `StoreReference::render` and `encodeQuery` in Nix 2.34 (`src/libstore/store-reference.cc`,
    /// `src/libutil/url.cc`).
    pub fn render(&self) -> Option<String> {
        let query: Vec<String> =
            self.params.iter().map(|(k, v)| format!("{}={}", percent_encode(k), percent_encode(v))).collect();
        let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
        let scheme = match &self.scheme {
            Scheme::Ssh => "ssh",
            Scheme::SshNg => "ssh-ng",
            Scheme::Other(base) => {
                let base = match (self.here()?, base.as_str()) {
                    (Here::Store(path), _) if path.starts_with('/') => format!("local://{path}"),
                    (Here::Store(_), "") => "auto".to_owned(),
                    // These two words are kept when nothing is added to them.
                    (_, "daemon") if !query.is_empty() => "unix://".to_owned(),
                    (_, "local") if !query.is_empty() => "local://".to_owned(),
                    _ => base.clone(),
                };
                return Some(base + &query);
            }
        };
        let (user, host) = match self.destination.rsplit_once('@') {
            Some((user, host)) => (format!("{}@", escaped(user, b"")), host),
            None => (String::new(), self.destination.as_str()),
        };
        let host = if host.contains(':') { format!("[{}]", escaped(host, b":")) } else { escaped(host, b"") };
        let port = self.port.map(|port| format!(":{port}")).unwrap_or_default();
        Some(format!("{scheme}://{user}{host}{port}{query}"))
    }

    /// A parameter's value, if it is given and not empty.
    pub fn param(&self, name: &str) -> Option<&str> {
        self.params.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// A parameter read as Nix reads booleans (`true`, `yes`, `1`).
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.param(name), Some("true" | "yes" | "1"))
    }
}

/// Splits `host[:port]`; an IPv6 address may stand in brackets, or bare without a port.
fn split_port(text: &str) -> Result<(&str, Option<u16>), UriError> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((host, after)) = rest.split_once(']') else {
            return Err(UriError::BadHost(text.to_owned()));
        };
        (host, after.strip_prefix(':').or(if after.is_empty() { None } else { Some(after) }))
    } else {
        match text.split_once(':') {
            Some((_, after)) if after.contains(':') => (text, None),
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    match port {
        None => Ok((host, None)),
        Some(digits) => match digits.parse::<u16>() {
            Ok(port) if port > 0 && digits.bytes().all(|b| b.is_ascii_digit()) => Ok((host, Some(port))),
            _ => Err(UriError::BadPort(digits.to_owned())),
        },
    }
}

fn parse_query(query: &str) -> Result<BTreeMap<String, String>, UriError> {
    let mut params = BTreeMap::new();
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        if let Some((name, value)) = pair.split_once('=') {
            params.entry(percent_decode(name)?).or_insert(percent_decode(value)?);
        }
    }
    Ok(params)
}

pub(super) fn percent_encode(text: &str) -> String {
    escaped(text, b":@/?")
}

/// With escapes for all but letters, digits, `-._~` and these.
fn escaped(text: &str, others: &[u8]) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b) || others.contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A user or a host without its escapes, or as it is: until 2.31 Nix knew none there.
fn unescaped(text: &str) -> String {
    percent_decode(text).unwrap_or_else(|_| text.to_owned())
}

fn percent_decode(text: &str) -> Result<String, UriError> {
    let bad = || UriError::BadEscape(text.to_owned());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => return Err(bad()),
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<StoreUri, UriError> {
        StoreUri::parse(&StoreUri::with_implied_scheme(text))
    }

    #[test]
    fn ssh_is_implied_for_hosts_but_not_for_paths_and_words_of_nix() {
        for (text, expected) in [
            ("mac", "ssh://mac"),
            ("nix@mac", "ssh://nix@mac"),
            ("h:22?compress=true", "ssh://h:22?compress=true"),
            ("mac?ssh-key=/home/alice/my-key", "ssh://mac?ssh-key=/home/alice/my-key"),
            ("ssh-ng://mac", "ssh-ng://mac"),
            ("auto", "auto"),
            ("local?root=/x", "local?root=/x"),
            ("daemon", "daemon"),
            ("/tmp/store", "/tmp/store"),
            ("unix:///run/x", "unix:///run/x"),
            ("localhost", "ssh://localhost"),
        ] {
            assert_eq!(StoreUri::with_implied_scheme(text), expected);
        }
    }

    #[test]
    fn user_host_port_and_parameters_are_taken_apart() {
        let uri = parse("ssh-ng://alice@mac:2222?ssh-key=/k%20ey&compress=true").unwrap();
        assert_eq!(uri.scheme, Scheme::SshNg);
        assert_eq!(uri.destination, "alice@mac");
        assert_eq!(uri.port, Some(2222));
        assert_eq!(uri.param("ssh-key"), Some("/k ey"));
        assert!(uri.flag("compress"));
    }

    #[test]
    fn ipv6_addresses_stand_in_brackets_or_bare() {
        assert_eq!(parse("ssh://root@[::1]").unwrap().destination, "root@::1");
        assert_eq!(parse("ssh://root@[::1]:22").unwrap().port, Some(22));
        let bare = parse("ssh://root@::1").unwrap();
        assert_eq!((bare.destination.as_str(), bare.port), ("root@::1", None));
    }

    #[test]
    fn users_and_hosts_may_have_escapes() {
        for (text, destination, rendered) in [
            ("ssh-ng://joe%40corp.example@mac", "joe@corp.example@mac", "ssh-ng://joe%40corp.example@mac"),
            ("ssh://CORP%5Cjoe@mac", "CORP\\joe@mac", "ssh://CORP%5Cjoe@mac"),
            ("ssh://[fe80::1%25ed0]:22", "fe80::1%ed0", "ssh://[fe80::1%25ed0]:22"),
            ("ssh://fe80::1%eth0", "fe80::1%eth0", "ssh://[fe80::1%25eth0]"),
            ("ssh://50%@mac", "50%@mac", "ssh://50%25@mac"),
        ] {
            let uri = parse(text).unwrap();
            assert_eq!(uri.destination, destination);
            assert_eq!(uri.render().as_deref(), Some(rendered));
            assert_eq!(parse(rendered).unwrap().destination, destination);
        }
        assert_eq!(parse("ssh://%2doProxyCommand=x"), Err(UriError::DashHost("-oProxyCommand=x".into())));
        assert_eq!(parse("ssh://a@%2db"), Err(UriError::DashHost("a@-b".into())));
        assert_eq!(parse("ssh://a%0a@b"), Err(UriError::BadHost("a\n@b".into())));
        assert_eq!(parse("ssh://a%2fb"), Err(UriError::BadHost("a/b".into())));
    }

    #[test]
    fn a_second_question_mark_belongs_to_the_value() {
        let uri = parse("ssh://h?remote-store=/p?system-features=foo%20bar").unwrap();
        assert_eq!(uri.param("remote-store"), Some("/p?system-features=foo bar"));
    }

    #[test]
    fn newer_nix_shows_a_uri_rendered_anew() {
        for (text, expected) in [
            ("mac", "ssh://mac"),
            ("ssh-ng://a@mac:22", "ssh-ng://a@mac:22"),
            ("ssh://root@::1", "ssh://root@[::1]"),
            ("ssh://m?ssh-key=/k%20y&compress=true", "ssh://m?compress=true&ssh-key=/k%20y"),
            ("ssh://h?remote-store=/p?system-features=foo", "ssh://h?remote-store=/p?system-features%3Dfoo"),
        ] {
            assert_eq!(parse(text).unwrap().render().as_deref(), Some(expected));
        }
        for (text, expected) in [
            ("auto", Some("auto")),
            ("/srv/x", Some("local:///srv/x")),
            ("daemon", Some("daemon")),
            ("local?root=/x", Some("local://?root=/x")),
            ("https://cache?x=y", None),
        ] {
            assert_eq!(parse(text).unwrap().render().as_deref(), expected);
        }
    }

    #[test]
    fn parameters_are_those_that_nix_sees() {
        let uri = parse("ssh-ng://mac?compress&a=1&&b=&a=2&=3").unwrap();
        let params: Vec<(&str, &str)> = uri.params.iter().map(|(name, value)| (&**name, &**value)).collect();
        assert_eq!(params, [("", "3"), ("a", "1"), ("b", "")]);
    }

    #[test]
    fn bad_uris_name_what_is_wrong_with_them() {
        assert_eq!(parse("ssh://"), Err(UriError::NoHost("ssh://".into())));
        assert_eq!(parse("ssh://@mac"), Err(UriError::NoHost("ssh://@mac".into())));
        assert_eq!(parse("ssh://-oProxyCommand=x"), Err(UriError::DashHost("-oProxyCommand=x".into())));
        assert_eq!(parse("ssh://a@-b"), Err(UriError::DashHost("a@-b".into())));
        assert_eq!(parse("ssh://mac:0"), Err(UriError::BadPort("0".into())));
        assert_eq!(parse("ssh://mac:+22"), Err(UriError::BadPort("+22".into())));
        assert_eq!(parse("ssh://mac:99999"), Err(UriError::BadPort("99999".into())));
        assert_eq!(parse("ssh://[::1"), Err(UriError::BadHost("[::1".into())));
        assert_eq!(parse("ssh://mac?compress&a=%z"), Err(UriError::BadEscape("%z".into())));
        assert_eq!(parse("ssh://mac?a=%zz"), Err(UriError::BadEscape("%zz".into())));
        assert_eq!(parse("ssh://mac?a=%ff"), Err(UriError::BadEscape("%ff".into())));
        assert_eq!(parse("ssh://a/b"), Err(UriError::BadHost("a/b".into())));
    }

    #[test]
    fn the_key_column_wins_over_the_parameter() {
        let mut machine = Machine::for_uri("ssh://mac?ssh-key=/a", BTreeSet::new()).unwrap();
        assert_eq!(machine.identity_file(), Some("/a"));
        machine.identity = Some("/b".into());
        assert_eq!(machine.identity_file(), Some("/b"));
    }
}
