//! What makes two connections the same, and the name that follows from it.
//!
//! Pure: an endpoint in, a name out; the disk is not touched.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{
    fmt::Write,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use thiserror::Error;

/// Bytes of the hash that make the name; 80 bits are beyond any accident.
const NAME_BYTES: usize = 10;
/// Changes when the meaning of the hashed fields does.
const NAME_VERSION: &[u8] = b"nix-offload master 2";
/// `sizeof(sun_path)`, with the zero at the end: 108 on Linux, 104 on BSD and macOS.
const SUN_PATH: usize = if cfg!(target_os = "linux") { 108 } else { 104 };
/// ssh binds the control socket under its path, a dot and 16 letters first (`muxserver_listen` in mux.c).
const SSH_SUFFIX: usize = 17;

/// The far end of a connection: everything that makes it another one when it differs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// `[user@]host` as given to ssh: a name of the user's ssh_config or of the network.
    pub destination: String,
    /// The port, when it is not left to ssh_config.
    pub port: Option<u16>,
    /// The private key file, when it is not left to ssh_config.
    pub identity: Option<PathBuf>,
    /// The host's public keys (`ssh-ed25519 AAAA...`), one per line. If given, only these are accepted.
    pub host_keys: Option<String>,
    /// Compress the connection.
    pub compress: bool,
    /// More words for ssh's command line (the words of `NIX_SSHOPTS`).
    pub ssh_options: Vec<String>,
    /// Tells apart several masters of the same far end, for when one has no session left; 0 is the first.
    pub instance: u32,
}

/// Why something cannot be an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// There is no destination.
    #[error("the SSH destination is empty")]
    Empty,
    /// ssh would take it for an option.
    #[error("the SSH destination {destination:?} begins with '-'")]
    Option {
        /// The destination.
        destination: String,
    },
    /// White space or control characters, which no host or user name has.
    #[error("the SSH destination {destination:?} has blanks or control characters")]
    Characters {
        /// The destination.
        destination: String,
    },
    /// The identity file's path cannot be given to ssh.
    #[error("the identity file {path:?} cannot be named to ssh")]
    Identity {
        /// The path.
        path: PathBuf,
    },
    /// The pinned host keys are not lines of `TYPE BASE64`.
    #[error("{line:?} is no public host key")]
    HostKey {
        /// The line, in part.
        line: String,
    },
    /// One of ssh's options has a NUL or a line break.
    #[error("the ssh option {option:?} has a control character")]
    SshOption {
        /// The word.
        option: String,
    },
}

impl Endpoint {
    /// An endpoint with nothing but its destination; the other fields may be set before use.
    ///
    /// # Errors
    /// When ssh could take the destination for something else.
    pub fn new(destination: impl Into<String>) -> Result<Self, EndpointError> {
        let endpoint = Endpoint {
            destination: destination.into(),
            port: None,
            identity: None,
            host_keys: None,
            compress: false,
            ssh_options: Vec::new(),
            instance: 0,
        };
        endpoint.check()?;
        Ok(endpoint)
    }

    /// Checks all fields; [`super::Pool::start`] does so too.
    ///
    /// # Errors
    /// The first field that cannot be given to ssh.
    pub fn check(&self) -> Result<(), EndpointError> {
        let destination = &self.destination;
        if destination.is_empty() {
            return Err(EndpointError::Empty);
        }
        if destination.starts_with('-') || self.host().starts_with('-') {
            return Err(EndpointError::Option { destination: destination.clone() });
        }
        if destination.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(EndpointError::Characters { destination: destination.clone() });
        }
        if let Some(path) = &self.identity
            && (path.as_os_str().is_empty() || path.as_os_str().as_bytes().iter().any(u8::is_ascii_control))
        {
            return Err(EndpointError::Identity { path: path.clone() });
        }
        for line in self.host_keys.iter().flat_map(|keys| keys.lines()) {
            check_host_key(line)?;
        }
        match self.ssh_options.iter().find(|word| word.chars().any(|c| c == '\0' || c == '\n')) {
            Some(word) => Err(EndpointError::SshOption { option: word.clone() }),
            None => Ok(()),
        }
    }

    /// The host part of the destination.
    pub fn host(&self) -> &str {
        self.destination.rsplit_once('@').map_or(self.destination.as_str(), |(_, host)| host)
    }

    /// The pinned keys, one `TYPE BASE64` per item, without empty lines.
    pub(crate) fn pinned_keys(&self) -> impl Iterator<Item = &str> {
        self.host_keys.iter().flat_map(|keys| keys.lines()).map(str::trim).filter(|line| !line.is_empty())
    }

    /// The name of its master: short, the same for equal endpoints, fit for a file name.
    pub(crate) fn name(&self) -> String {
        let mut hash = Sha256::new();
        // Every field with its length (or a mark that it is absent), so that no two lists look the same.
        let mut field = |bytes: Option<&[u8]>| {
            hash.update(bytes.map_or(u64::MAX, |bytes| bytes.len() as u64).to_le_bytes());
            hash.update(bytes.unwrap_or_default());
        };
        field(Some(NAME_VERSION));
        field(Some(self.destination.as_bytes()));
        field(self.port.map(u16::to_le_bytes).as_ref().map(<[u8; 2]>::as_slice));
        field(self.identity.as_ref().map(|path| path.as_os_str().as_bytes()));
        field(
            self.host_keys
                .as_ref()
                .map(|_| self.pinned_keys().collect::<Vec<_>>().join("\n"))
                .as_deref()
                .map(str::as_bytes),
        );
        field(Some(&[u8::from(self.compress)]));
        field(Some(&self.instance.to_le_bytes()));
        for word in &self.ssh_options {
            field(Some(word.as_bytes()));
        }
        hash.finalize().iter().take(NAME_BYTES).fold(
            String::with_capacity(2 * NAME_BYTES),
            |mut name, byte| {
                // A string takes everything.
                let _ = write!(name, "{byte:02x}");
                name
            },
        )
    }
}

/// Whether this can be what [`Endpoint::name`] returns.
pub(super) fn is_name(text: &str) -> bool {
    text.len() == 2 * NAME_BYTES && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A key is its type and base64; anything else could be a marker or a pattern of known_hosts.
fn check_host_key(line: &str) -> Result<(), EndpointError> {
    let mut words = line.split_whitespace();
    let word_of = |extra: &'static str| {
        move |word: &str| word.bytes().all(|b| b.is_ascii_alphanumeric() || extra.as_bytes().contains(&b))
    };
    let good = match (words.next(), words.next()) {
        (None, _) => true, // an empty line
        (Some(kind), Some(key)) => {
            word_of("-@.")(kind)
                && !kind.starts_with('@')
                && word_of("+/=")(key)
                && line.bytes().all(|b| b >= b' ' || b == b'\t')
        }
        (Some(_), None) => false,
    };
    if good { Ok(()) } else { Err(EndpointError::HostKey { line: line.chars().take(40).collect() }) }
}

/// The bytes by which a control path is too long for ssh, if it is.
pub(crate) fn excess_length(control: &Path) -> Option<usize> {
    let longest = SUN_PATH - 1 - SSH_SUFFIX;
    control.as_os_str().len().checked_sub(longest).filter(|excess| *excess > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> Endpoint {
        Endpoint::new("user@host").unwrap()
    }

    #[test]
    fn destinations_that_ssh_could_misread_are_refused() {
        assert_eq!(Endpoint::new(""), Err(EndpointError::Empty));
        for bad in ["-oProxyCommand=x", "user@-oProxyCommand=x"] {
            assert!(matches!(Endpoint::new(bad), Err(EndpointError::Option { .. })), "{bad}");
        }
        for bad in ["a b", "a\n", "a\0", "a\u{7f}"] {
            assert!(matches!(Endpoint::new(bad), Err(EndpointError::Characters { .. })), "{bad:?}");
        }
        for good in ["h", "u@h", "fe80::1%eth0", "u@dom@h"] {
            Endpoint::new(good).unwrap();
        }
        assert_eq!(Endpoint::new("u@dom@h").unwrap().host(), "h");
    }

    #[test]
    fn pinned_keys_are_type_and_base64() {
        let with = |keys: &str| Endpoint { host_keys: Some(keys.into()), ..endpoint() }.check();
        with("ssh-ed25519 AAAAC3+/=\n\nsk-ssh-ed25519@openssh.com AAAA comment here\n").unwrap();
        for bad in ["AAAA", "@revoked * ssh-ed25519 AAAA", "*.org ssh-ed25519", "ssh-rsa A\0"] {
            assert!(matches!(with(bad), Err(EndpointError::HostKey { .. })), "{bad}");
        }
    }

    #[test]
    fn every_field_changes_the_name() {
        let variants = [
            endpoint(),
            Endpoint { destination: "host".into(), ..endpoint() },
            Endpoint { port: Some(22), ..endpoint() },
            Endpoint { port: Some(23), ..endpoint() },
            Endpoint { identity: Some("/k".into()), ..endpoint() },
            Endpoint { host_keys: Some("ssh-rsa AAAA".into()), ..endpoint() },
            Endpoint { compress: true, ..endpoint() },
            Endpoint { ssh_options: vec!["-4".into()], ..endpoint() },
            Endpoint { ssh_options: vec!["-".into(), "4".into()], ..endpoint() },
        ];
        let mut names: Vec<_> = variants.iter().map(Endpoint::name).collect();
        assert_eq!(names[0], endpoint().name());
        assert_eq!(names[0].len(), 20);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), variants.len());
    }

    #[test]
    fn however_long_the_destination_its_path_is_no_longer() {
        let long = Endpoint::new(format!("{}@{}", "u".repeat(100), "h".repeat(99))).unwrap();
        assert_eq!(long.name().len(), endpoint().name().len());
        assert!(is_name(&long.name()));
    }

    #[test]
    fn a_path_is_too_long_when_sshs_own_suffix_does_not_fit() {
        let path = |len| PathBuf::from("x".repeat(len));
        assert_eq!(excess_length(&path(SUN_PATH - 18)), None);
        assert_eq!(excess_length(&path(SUN_PATH - 17)), Some(1));
    }
}
