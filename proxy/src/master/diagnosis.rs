//! Why a master did not start: from ssh's own words to the culprit and its cure.
//!
//! Pure. The texts are those of OpenSSH (`sshconnect.c`, `sshconnect2.c`, `misc.c`), the same since 7.x.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{fmt, path::PathBuf};

use super::name::Endpoint;

/// Stands before what a ProxyCommand of ours wrote to ssh's log.
pub(super) const SAID_BY_PROXY: &str = "nix-offload-proxy: ";
/// Stands before the cure it had for that, on a line of its own.
pub(super) const CURE_OF_PROXY: &str = "nix-offload-proxy hint: ";
/// How many of ssh's last lines are quoted when none of them is known.
const QUOTED_LINES: usize = 3;
/// The longest quotation, in characters.
const QUOTED_CHARS: usize = 400;

/// What ssh stumbled over.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The host's name means nothing here.
    NameNotResolved {
        /// ssh's line.
        said: String,
    },
    /// Nobody listens at the port.
    Refused {
        /// ssh's line.
        said: String,
    },
    /// Packets do not get there: no route, or no answer.
    Unreachable {
        /// ssh's line.
        said: String,
    },
    /// The host's key is not known yet.
    HostKeyUnknown {
        /// Its type and fingerprint.
        fingerprint: Option<String>,
    },
    /// The host's key is another one than before.
    HostKeyChanged {
        /// Where the old one is, as ssh names it (`FILE:LINE`).
        known_hosts: Option<String>,
        /// The host's name there, which may be another than that of the destination.
        name: Option<String>,
        /// Type and fingerprint of the key it has now.
        fingerprint: Option<String>,
    },
    /// The host's key is not the pinned one.
    PinnedKeyMismatch {
        /// Type and fingerprint of the key it has.
        fingerprint: Option<String>,
    },
    /// sshd closed the connection before it said a word: too many at a time (MaxStartups), or it keeps us out for
    /// a while (PerSourcePenalties).
    TurnedAway {
        /// ssh's line.
        said: String,
    },
    /// The host is the right one and does not let us in.
    PermissionDenied {
        /// What it would have accepted (`publickey,password`).
        methods: String,
    },
    /// The agent has the key and does not sign with it.
    AgentRefused {
        /// ssh's line.
        said: String,
    },
    /// The identity file is not there or cannot be read.
    IdentityUnreadable {
        /// ssh's line.
        said: String,
    },
    /// Others could read the identity file, so ssh does not use it.
    IdentityPermissions {
        /// ssh's line.
        said: String,
    },
    /// ssh does not understand its configuration or its command line.
    Configuration {
        /// ssh's line.
        said: String,
    },
    /// A ProxyCommand of ours found no way.
    Proxy {
        /// What it said, its name first.
        said: String,
        /// Its cure.
        cure: Option<String>,
    },
    /// Something else; ssh's last lines.
    Other {
        /// ssh's lines, or what happened if it said nothing.
        said: String,
    },
}

/// What cures depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    pub(super) user: String,
    pub(super) known_hosts: PathBuf,
    pub(super) host: String,
    pub(super) port: Option<u16>,
    pub(super) identity: Option<PathBuf>,
    pub(super) ssh_options: Vec<String>,
    pub(super) log: PathBuf,
    /// A key that has a passphrase.
    pub(super) locked: Option<PathBuf>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::NameNotResolved { said } => write!(f, "the host name cannot be resolved ({said})"),
            Fault::Refused { said } => write!(f, "connection refused ({said})"),
            Fault::Unreachable { said } => write!(f, "the host does not answer ({said})"),
            Fault::HostKeyUnknown { fingerprint } => {
                write!(f, "the host's key is not known ({}Host key verification failed)", shown(fingerprint))
            }
            Fault::HostKeyChanged { known_hosts, fingerprint, .. } => {
                write!(f, "the host's key has changed")?;
                known_hosts.iter().try_for_each(|place| write!(f, " since {place} was written"))?;
                fingerprint.iter().try_for_each(|key| write!(f, ", it is now {key}"))
            }
            Fault::PinnedKeyMismatch { fingerprint } => {
                write!(f, "the host's key is not the one that is pinned for it")?;
                fingerprint.iter().try_for_each(|key| write!(f, ", but {key}"))
            }
            Fault::TurnedAway { said } => write!(f, "sshd turned the connection away ({said})"),
            Fault::PermissionDenied { methods } => write!(f, "permission denied ({methods})"),
            Fault::AgentRefused { said } => write!(f, "the key was not used to log in ({said})"),
            Fault::IdentityUnreadable { said } => write!(f, "the identity file cannot be used ({said})"),
            Fault::IdentityPermissions { said } => {
                write!(f, "ssh does not use an identity file that others can read ({said})")
            }
            Fault::Configuration { said } => write!(f, "ssh is configured wrongly ({said})"),
            Fault::Proxy { said, .. } | Fault::Other { said } => write!(f, "{said}"),
        }
    }
}

fn shown(fingerprint: &Option<String>) -> String {
    fingerprint.as_ref().map_or_else(String::new, |key| format!("{key}; "))
}

/// Whether the host's key is what ssh stumbled over, so that its fingerprint is wanted.
pub(super) fn is_about_host_key(stderr: &str) -> bool {
    let fault = diagnose(stderr, false, None);
    matches!(fault, Fault::HostKeyUnknown { .. } | Fault::HostKeyChanged { fingerprint: None, .. })
}

/// Finds the culprit in what ssh wrote to stderr. `pinned`: host keys were given. `fingerprint`: what is known of the
/// host's key from elsewhere.
pub(super) fn diagnose(stderr: &str, pinned: bool, fingerprint: Option<String>) -> Fault {
    let find = |needles: &[&str]| {
        lines(stderr).find(|line| needles.iter().any(|needle| line.contains(needle))).map(|line| quote(&line))
    };
    // It may quote what was said to us on the way, by another host.
    if let Some(said) = find(&[SAID_BY_PROXY]) {
        let cure = lines(stderr).find_map(|line| line.strip_prefix(CURE_OF_PROXY).map(quote));
        return Fault::Proxy { said, cure };
    }
    if let Some(said) = find(&["Bad configuration option", "bad configuration options"]) {
        return Fault::Configuration { said };
    }
    // In the order of the connection, the later step first where ssh goes on after a warning.
    if let Some(said) = find(&["Could not resolve hostname"]) {
        return Fault::NameNotResolved { said };
    }
    if find(&["REMOTE HOST IDENTIFICATION HAS CHANGED"]).is_some() {
        let fingerprint = sent_key(stderr).or(fingerprint);
        return if pinned {
            Fault::PinnedKeyMismatch { fingerprint }
        } else {
            Fault::HostKeyChanged { known_hosts: offending(stderr), name: changed(stderr), fingerprint }
        };
    }
    if find(&["Host key verification failed", "host key is known for"]).is_some() {
        return if pinned {
            Fault::PinnedKeyMismatch { fingerprint }
        } else {
            Fault::HostKeyUnknown { fingerprint }
        };
    }
    if let Some(denied) = find(&["Permission denied ("]) {
        if let Some(said) = find(&["signing failed for "]) {
            return Fault::AgentRefused { said };
        }
        if let Some(said) = find(&["are too open", "bad permissions"]) {
            return Fault::IdentityPermissions { said };
        }
        if let Some(said) = find(&["not accessible", "Load key "]) {
            return Fault::IdentityUnreadable { said };
        }
        let methods = denied.split_once("Permission denied (").and_then(|(_, rest)| rest.split_once(')'));
        return Fault::PermissionDenied {
            methods: methods.map_or(denied.clone(), |(methods, _)| methods.into()),
        };
    }
    if let Some(said) = find(&["Connection refused"]) {
        return Fault::Refused { said };
    }
    // Without a word from the host; behind it there are other errors. A proxy that ends looks the same, but has said
    // why.
    let silent = [
        "kex_exchange_identification: Connection closed by remote host",
        "kex_exchange_identification: read: Connection reset by peer",
        "ssh_exchange_identification: Connection closed by remote host",
        "ssh_exchange_identification: read: Connection reset by peer",
    ];
    if let Some(said) = find(&silent).filter(|_| !stderr.contains("UNKNOWN port 65535")) {
        return Fault::TurnedAway { said };
    }
    let unreachable =
        ["timed out", "No route to host", "Network is unreachable", "Host is down", "Host is unreachable"];
    if let Some(said) = find(&unreachable) {
        return Fault::Unreachable { said };
    }
    let last: Vec<_> = lines(stderr).collect();
    let last = last[last.len().saturating_sub(QUOTED_LINES)..].join("; ");
    Fault::Other { said: if last.is_empty() { "ssh gave no reason".into() } else { quote(&last) } }
}

/// `Offending ED25519 key in FILE:LINE`.
fn offending(stderr: &str) -> Option<String> {
    lines(stderr)
        .filter(|line| line.contains("Offending"))
        .find_map(|line| line.split_once(" key in ").map(|(_, place)| quote(place)))
}

/// `The fingerprint for the ED25519 key sent by the remote host is`, and on the next line the fingerprint.
fn sent_key(stderr: &str) -> Option<String> {
    let mut lines = lines(stderr).skip_while(|line| !line.contains("key sent by the remote host is"));
    let kind = lines.next()?.split_once("fingerprint for the ")?.1.split(' ').next()?.to_owned();
    let fingerprint = lines.next()?;
    Some(quote(&format!("{kind} {}", fingerprint.trim_end_matches('.'))))
}

/// `Host key for NAME has changed and you have requested strict checking.` (`check_host_key` in sshconnect.c).
fn changed(stderr: &str) -> Option<String> {
    lines(stderr).find_map(|line| {
        line.split_once("ost key for ")?.1.split_once(" has changed").map(|(name, _)| quote(name))
    })
}

/// The number in `connect to host NAME port NUMBER: ...`.
fn port_in(said: &str) -> Option<u16> {
    said.split_once(" port ")?.1.split(':').next()?.trim().parse().ok()
}

/// ssh's lines without line ends, control characters and empty ones.
fn lines(stderr: &str) -> impl Iterator<Item = String> {
    stderr
        .split(['\n', '\r'])
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>().trim().to_owned())
        .filter(|line| !line.is_empty())
}

fn quote(text: &str) -> String {
    text.chars().take(QUOTED_CHARS).collect()
}

/// The cure for a host that takes connections and goes no further.
pub(super) fn stuck(host: &str) -> String {
    format!("see on {host} whether sshd is well and not overloaded; the network lets the connection through")
}

/// ssh's last line, in parentheses.
pub(super) fn said(stderr: &str) -> String {
    let last = lines(stderr).last();
    last.map_or_else(String::new, |line| format!(" (ssh said: {})", quote(&line)))
}

impl Context {
    pub(super) fn of(endpoint: &Endpoint, user: String, known_hosts: PathBuf, log: PathBuf) -> Self {
        Context {
            user,
            known_hosts,
            host: endpoint.host().to_owned(),
            port: endpoint.port,
            identity: endpoint.identity.clone(),
            ssh_options: endpoint.ssh_options.clone(),
            log,
            locked: None,
        }
    }

    /// The `ssh` command that does by hand what was tried.
    fn command(&self, destination: &str) -> String {
        let mut words = vec!["ssh".to_owned()];
        words.extend(self.ssh_options.iter().map(|word| shell_word(word)));
        words.extend(self.identity.iter().map(|path| format!("-i {}", shell_word(&path.to_string_lossy()))));
        words.extend(self.port.map(|port| format!("-p {port}")));
        words.push(shell_word(destination));
        words.join(" ")
    }

    /// The same as a test: ssh asks for nothing then, as it does for us.
    fn test(&self, destination: &str) -> String {
        format!("{} true", self.command(destination).replacen("ssh", "ssh -o BatchMode=yes", 1))
    }

    /// The host's name in known_hosts.
    fn known_name(&self) -> String {
        match self.port {
            None | Some(22) => self.host.clone(),
            Some(port) => format!("[{}]:{port}", self.host),
        }
    }

    /// What to do about it.
    pub(super) fn cure(&self, destination: &str, fault: &Fault) -> String {
        let Context { user, known_hosts, log, .. } = self;
        let command = self.command(destination);
        match fault {
            Fault::NameNotResolved { .. } => {
                format!("check the spelling of {}, DNS, and user {user}'s ssh_config", self.host)
            }
            Fault::Refused { said } => {
                // ssh_config may have another port than we know of.
                let port = port_in(said).or(self.port).unwrap_or(22);
                format!("check that sshd runs on {} and that {port} is its port", self.host)
            }
            // What ssh waited for when TCP was through (sshconnect.c, packet.c).
            Fault::Unreachable { said }
                if said.contains("during banner exchange") || said.starts_with("Connection to ") =>
            {
                stuck(&self.host)
            }
            Fault::Unreachable { .. } => {
                format!("check that {} is up and that the network lets SSH through to it", self.host)
            }
            Fault::TurnedAway { .. } => format!(
                "see sshd's log on {}: it lets in only so many at a time who are not yet logged in (MaxStartups), and \
                 keeps out for a while who failed to (PerSourcePenalties)",
                self.host
            ),
            Fault::HostKeyUnknown { .. } => format!(
                "as user {user} run `{command} true` once and compare the fingerprint before saying yes; \
                 that adds the key to {}",
                known_hosts.display()
            ),
            Fault::HostKeyChanged { known_hosts: place, name, .. } => {
                let file = place
                    .as_deref()
                    .and_then(|place| place.rsplit_once(':'))
                    .map(|(file, _)| file.to_owned());
                let file = file.unwrap_or_else(|| known_hosts.display().to_string());
                format!(
                    "if the host really has a new key, as user {user} run `ssh-keygen -f {} -R {}`, then `{command} true` once; \
                     if not, somebody may be in between",
                    shell_word(&file),
                    shell_word(&name.clone().unwrap_or_else(|| self.known_name()))
                )
            }
            Fault::PinnedKeyMismatch { .. } => format!(
                "compare the pinned public host key with `ssh-keyscan{} {}`; if the host really has a new key, pin that one",
                self.port.map_or_else(String::new, |port| format!(" -p {port}")),
                shell_word(&self.host)
            ),
            Fault::PermissionDenied { .. } => {
                let key = self.identity.as_ref().map(|path| path.display().to_string());
                let locked = self.locked.as_ref().map_or_else(String::new, |key| {
                    format!(
                        "the key {0} has a passphrase, which nobody is asked for: take it off (ssh-keygen -p -f {0}), \
                         name another key, or have an agent hold it; and ",
                        key.display()
                    )
                });
                format!(
                    "{locked}add the public half of {} to ~/.ssh/authorized_keys of {} on {}; the key must have no passphrase \
                     unless an agent that user {user} reaches holds it; `{}` shows whether it works",
                    key.map_or_else(|| format!("a key of user {user}"), |key| format!("the key {key}")),
                    destination.rsplit_once('@').map_or("the user", |(name, _)| name),
                    self.host,
                    self.test(destination)
                )
            }
            Fault::AgentRefused { .. } => format!(
                "see that the agent of user {user}, or the device with the key, is there and unlocked; a key that waits for a \
                 touch or for a confirmation cannot be used where nobody is asked, other than by a master that is opened by \
                 hand (control-path in offload.toml); `{command} true` shows whether it works"
            ),
            Fault::IdentityUnreadable { .. } => format!(
                "check that {} exists, is a private key, and that user {user} can read it",
                self.identity
                    .as_ref()
                    .map_or_else(|| "the identity file".into(), |path| path.display().to_string())
            ),
            Fault::IdentityPermissions { .. } => format!(
                "run `chmod 600 {}`",
                self.identity
                    .as_ref()
                    .map_or_else(|| "FILE".into(), |path| shell_word(&path.to_string_lossy()))
            ),
            Fault::Configuration { .. } => {
                format!("correct user {user}'s ssh_config, or the words in NIX_SSHOPTS")
            }
            Fault::Proxy { cure: Some(cure), .. } => cure.clone(),
            Fault::Proxy { cure: None, .. } | Fault::Other { .. } => {
                let test = self.test(destination);
                format!("as user {user} try `{test}`; all that ssh said is in {}", log.display())
            }
        }
    }
}

/// A word as a shell takes it.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./@%+=:,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnose(stderr: &str, pinned: bool) -> Fault {
        super::diagnose(stderr, pinned, None)
    }

    #[test]
    fn sshs_words_lead_to_the_culprit() {
        let said = |text: &str| text.to_owned();
        let line = "ssh: connect to host h port 22: No route to host";
        assert_eq!(diagnose(&format!("{line}\r\n"), false), Fault::Unreachable { said: said(line) });
        for text in ["Connection timed out during banner exchange", "Connection to 1.2.3.4 port 22 timed out"]
        {
            assert_eq!(diagnose(text, false), Fault::Unreachable { said: said(text) });
        }
        let changed = "@@@@\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n@@@@\n\
                       Offending ED25519 key in /root/.ssh/known_hosts:3\n\
                       Host key for [10.0.0.1]:2222 has changed and you have requested strict checking.\n\
                       Host key verification failed.\n";
        let known_hosts = Some(said("/root/.ssh/known_hosts:3"));
        let name = Some(said("[10.0.0.1]:2222"));
        assert_eq!(diagnose(changed, false), Fault::HostKeyChanged { known_hosts, name, fingerprint: None });
        assert_eq!(port_in("ssh: connect to host h port 2222: Connection refused"), Some(2222));
        assert_eq!(diagnose(changed, true), Fault::PinnedKeyMismatch { fingerprint: None });
        let bad = "command-line: line 0: Bad configuration option: badopt";
        assert_eq!(diagnose(bad, false), Fault::Configuration { said: said(bad) });
        let unknown = "No RSA host key is known for h and you have requested strict checking.\r\n";
        assert_eq!(diagnose(unknown, false), Fault::HostKeyUnknown { fingerprint: None });
        assert_eq!(diagnose(unknown, true), Fault::PinnedKeyMismatch { fingerprint: None });
    }

    #[test]
    fn a_host_that_takes_the_connection_and_goes_no_further_is_no_matter_of_the_network() {
        let endpoint = Endpoint::new("u@h").unwrap();
        let context = Context::of(&endpoint, "u".into(), "/k".into(), "/l".into());
        for (text, cure) in [
            ("Connection timed out during banner exchange", "see on h whether sshd is well"),
            ("Connection to 10.0.0.1 port 22 timed out", "see on h whether sshd is well"),
            ("ssh: connect to host h port 22: Connection timed out", "check that h is up"),
        ] {
            let cured = context.cure("u@h", &diagnose(text, false));
            assert!(cured.starts_with(cure), "{text}: {cured}");
        }
    }

    #[test]
    fn the_key_that_a_host_shows_is_found_in_the_warning() {
        let warning = "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n\
                       The fingerprint for the ED25519 key sent by the remote host is\nSHA256:abc+/.\n\
                       Please contact your system administrator.\n";
        let Fault::HostKeyChanged { fingerprint, .. } = diagnose(warning, false) else { panic!() };
        assert_eq!(fingerprint.as_deref(), Some("ED25519 SHA256:abc+/"));
        assert!(!is_about_host_key(warning) && is_about_host_key("Host key verification failed."));
    }

    #[test]
    fn a_host_that_says_nothing_has_turned_us_away() {
        let line = "kex_exchange_identification: Connection closed by remote host";
        let text = format!("{line}\r\nConnection closed by 127.0.0.1 port 22\r\n");
        assert_eq!(diagnose(&text, false), Fault::TurnedAway { said: line.into() });
        // So it looks when a ProxyCommand ends.
        let text = format!("{line}\r\nConnection closed by UNKNOWN port 65535\r\n");
        assert!(matches!(diagnose(&text, false), Fault::Other { .. }));
    }

    #[test]
    fn the_last_step_reached_is_the_one_that_counts() {
        // The first address of two refused, the second one answered.
        let text = "ssh: connect to host h port 22: Connection refused\nu@h: Permission denied (publickey,password).";
        assert_eq!(diagnose(text, false), Fault::PermissionDenied { methods: "publickey,password".into() });
        let line =
            "sign_and_send_pubkey: signing failed for ED25519 \"/k\" from agent: agent refused operation";
        let text = format!("{line}\r\nu@h: Permission denied (publickey).\r\n");
        assert_eq!(diagnose(&text, false), Fault::AgentRefused { said: line.into() });
        let text = "Load key \"/k\": invalid format\nu@h: Permission denied (publickey).";
        assert!(matches!(diagnose(text, false), Fault::IdentityUnreadable { said } if said.contains("/k")));
    }

    #[test]
    fn what_a_proxy_says_of_another_host_is_not_taken_for_this_one() {
        let said = format!("{SAID_BY_PROXY}cannot connect to bastion: Host key verification failed");
        let closed = "Connection closed by UNKNOWN port 65535\r\n";
        let fault = |cure: Option<&str>| Fault::Proxy { said: said.clone(), cure: cure.map(str::to_owned) };
        assert_eq!(diagnose(&format!("{said}\n{closed}"), false), fault(None));
        let text = format!("{said}\n{CURE_OF_PROXY}look there\n{closed}");
        assert_eq!(diagnose(&text, false), fault(Some("look there")));
    }

    #[test]
    fn unknown_words_are_quoted_without_what_upsets_terminals() {
        assert_eq!(diagnose("", false), Fault::Other { said: "ssh gave no reason".into() });
        let text = "a\nb\n\n\u{1b}[31mc\r\nd\n";
        assert_eq!(diagnose(text, false), Fault::Other { said: "b; [31mc; d".into() });
        let Fault::Other { said } = diagnose(&"x".repeat(10_000), false) else { panic!() };
        assert_eq!(said.len(), QUOTED_CHARS);
    }

    #[test]
    fn words_for_a_shell_are_quoted() {
        assert_eq!(shell_word("/a/b-c"), "/a/b-c");
        assert_eq!(shell_word("a b'c"), "'a b'\\''c'");
        assert_eq!(shell_word(""), "''");
    }
}
