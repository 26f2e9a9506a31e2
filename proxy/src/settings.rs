//! What ssh has no word for, from one TOML file that nobody needs: `/etc/nix/offload.toml`, or the user's own
//! in `$XDG_CONFIG_HOME`.
//!
//! A key that is not known is an error with its place, not a key that is ignored. A line here must not act on what
//! is set.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read},
    num::NonZeroU32,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::unistd::geteuid;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _, IgnoredAny},
};
use thiserror::Error;

/// Names another file; one that is not there is an error then.
const FILE_VARIABLE: &str = "NIX_OFFLOAD_CONFIG";
const SYSTEM_FILE: &str = "/etc/nix/offload.toml";
/// Below `$XDG_CONFIG_HOME`.
const USER_FILE: &str = "nix/offload.toml";
/// Larger files are refused, in bytes.
const MOST_BYTES: u64 = 1 << 20;
/// The longest time that can be set. ssh counts in seconds that fit in 32 bits.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);
/// Two words are alike enough for "did you mean" from here on, between 0 and 1.
const ALIKE: f64 = 0.75;

/// Everything that can be set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// For all hosts.
    #[serde(default)]
    pub ssh: SshSettings,
    /// For some hosts, in the order of the file.
    #[serde(default, rename = "host")]
    pub hosts: Vec<HostBlock>,
    /// Not for us: a program on top of this crate reads these of the same file, see [`read`].
    #[serde(default, rename = "choice")]
    _choice: Elsewhere,
    #[serde(default, rename = "machine")]
    _machine: Elsewhere,
}

/// A part of the file that somebody else reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Elsewhere;

impl<'de> Deserialize<'de> for Elsewhere {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Elsewhere)
    }
}

/// The table `[ssh]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct SshSettings {
    /// How long a master is kept that nobody uses. Ten minutes; at least a second.
    #[serde(deserialize_with = "duration")]
    pub idle: Duration,
    /// How long connecting to a builder may take before Nix is told where a build goes, for Nix waits meanwhile. Five
    /// seconds.
    #[serde(deserialize_with = "duration")]
    pub connect_timeout: Duration,
    /// New SSH connections to one host in a second, of all processes of a user together; after a pause half as
    /// many at once. 20. Besides, no more than eight log in at a time.
    pub connections_per_second: NonZeroU32,
    /// Streams to a builder's daemon that are opened in advance while one build follows another, at most; 0 for none,
    /// 16 are the limit. Four.
    #[serde(deserialize_with = "ready")]
    pub ready_streams: u8,
}

impl Default for SshSettings {
    fn default() -> Self {
        let connections_per_second = NonZeroU32::MIN.saturating_add(19);
        SshSettings {
            idle: Duration::from_secs(600),
            connect_timeout: Duration::from_secs(5),
            connections_per_second,
            ready_streams: 4,
        }
    }
}

/// A table `[[host]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct HostBlock {
    /// The hosts it is for, by the name they are asked for with; `*` and `?` as in ssh_config.
    #[serde(deserialize_with = "names")]
    name: Vec<String>,
    #[serde(default, deserialize_with = "some_path")]
    control_path: Option<PathBuf>,
    #[serde(default, deserialize_with = "some_text")]
    wake: Option<String>,
    #[serde(default, deserialize_with = "some_duration")]
    wake_timeout: Option<Duration>,
    #[serde(default)]
    connections_per_second: Option<NonZeroU32>,
}

/// What is set for one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSettings {
    /// The control socket of a master that somebody opens by hand and that is to be used when it is there.
    pub control_path: Option<PathBuf>,
    /// How it is woken, when it is down.
    pub wake: Option<Wake>,
    /// As in [`SshSettings`].
    pub connections_per_second: NonZeroU32,
}

/// How a host is woken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wake {
    /// A line for `/bin/sh`.
    pub command: String,
    /// How long after its start the host may take to answer. Two minutes unless it is set.
    pub timeout: Duration,
}

/// Why the file cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Whether the environment names it.
        is_named: bool,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Others could write commands into it.
    #[error("{} {}", path.display(), exposed(*owner, *mode))]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// Its owner's user id.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// It is not as it must be.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1, in characters.
        column: usize,
        /// What is wrong there.
        message: String,
        /// The known key that is most like it.
        suggestion: Option<String>,
    },
}

/// Whether a file of that user is as good as our own.
fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == geteuid().as_raw()
}

/// Whether others can write a file of that mode.
fn is_open(mode: u32) -> bool {
    mode & 0o022 != 0
}

/// What is wrong with a file of that owner and mode.
fn exposed(owner: u32, mode: u32) -> String {
    let whose = (!is_trusted(owner)).then(|| format!("belongs to user {owner}"));
    let open = is_open(mode).then(|| format!("can be written by others (mode {mode:04o})"));
    whose.into_iter().chain(open).collect::<Vec<_>>().join(" and ")
}

impl SettingsError {
    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            SettingsError::Io { is_named: true, .. } => {
                Some(format!("{FILE_VARIABLE} names it: correct that variable, or unset it"))
            }
            SettingsError::Io { .. } => None,
            SettingsError::NotOurs { path, owner, mode } => {
                let path = path.display();
                let whose = (!is_trusted(*owner)).then(|| format!("`chown root {path}`"));
                let open = is_open(*mode).then(|| format!("`chmod go-w {path}`"));
                let cures: Vec<String> = whose.into_iter().chain(open).collect();
                Some(format!(
                    "it can name commands to run, so others must not write it: {}",
                    cures.join(" and ")
                ))
            }
            SettingsError::Content { suggestion: Some(known), .. } => {
                Some(format!("did you mean `{known}`?"))
            }
            SettingsError::Content { .. } => {
                Some("`man nix-offload` and `man nix-offload-proxy` have the keys that there are".into())
            }
        }
    }
}

impl Settings {
    /// Reads the file that the environment leads to. No file is as good as an empty one.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn from_env(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, SettingsError> {
        read(lookup)
    }

    /// What is set for a host, by the name it is asked for with. For each key the first block that has it counts,
    /// as in ssh_config.
    pub fn of_host(&self, host: &str) -> HostSettings {
        let blocks = || self.hosts.iter().filter(|block| block.name.iter().any(|name| matches(name, host)));
        let timeout = blocks().find_map(|block| block.wake_timeout);
        HostSettings {
            control_path: blocks().find_map(|block| block.control_path.clone()),
            wake: blocks()
                .find_map(|block| block.wake.clone())
                .map(|command| Wake { command, timeout: timeout.unwrap_or(Duration::from_secs(120)) }),
            connections_per_second: blocks()
                .find_map(|block| block.connections_per_second)
                .unwrap_or(self.ssh.connections_per_second),
        }
    }
}

/// Reads the file that the environment leads to as what the caller makes of it. No file is as good as an empty one.
///
/// Programs that read parts of their own must let [`Settings`] have its parts, and the other way round.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn read<T: DeserializeOwned + Default>(
    lookup: impl Fn(&str) -> Option<OsString>,
) -> Result<T, SettingsError> {
    let set = |name| lookup(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set(FILE_VARIABLE) {
        return read_file(&path).map_err(|error| match error {
            SettingsError::Io { path, source, .. } => SettingsError::Io { path, is_named: true, source },
            other => other,
        });
    }
    // Root's environment may be that of somebody else (sudo).
    if !geteuid().is_root() {
        let directory = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")));
        if let Some(path) = directory.map(|directory| directory.join(USER_FILE))
            && path.exists()
        {
            return read_file(&path);
        }
    }
    match read_file(Path::new(SYSTEM_FILE)) {
        Err(SettingsError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}

/// Reads one file.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn read_file<T: DeserializeOwned>(path: &Path) -> Result<T, SettingsError> {
    let io_error = |source| SettingsError::Io { path: path.to_owned(), is_named: false, source };
    let file = File::open(path).map_err(io_error)?;
    let metadata = file.metadata().map_err(io_error)?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if !is_trusted(owner) || is_open(mode) {
        return Err(SettingsError::NotOurs { path: path.to_owned(), owner, mode });
    }
    let mut text = String::new();
    file.take(MOST_BYTES + 1).read_to_string(&mut text).map_err(io_error)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(io_error(io::Error::new(io::ErrorKind::FileTooLarge, "it has more than a mebibyte")));
    }
    parse(&text, path)
}

/// Reads the text of a file; `path` is where faults are said to be.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn parse<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T, SettingsError> {
    toml::from_str(text).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        let before = text.get(..span.start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let word = text.get(span).unwrap_or_default();
        let message = error.message().lines().collect::<Vec<_>>().join(", ");
        SettingsError::Content {
            path: path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            suggestion: suggestion(&message, word),
            message,
        }
    })
}

/// Among the words in backquotes behind "expected", which are the known keys.
fn suggestion(message: &str, word: &str) -> Option<String> {
    let (_, expected) = message.split_once("expected ").filter(|_| message.starts_with("unknown field"))?;
    let known = expected.split('`').skip(1).step_by(2);
    let alike = |known: &str| strsim::jaro_winkler(known, word);
    let best = known.max_by(|a, b| alike(a).total_cmp(&alike(b)))?;
    (alike(best) >= ALIKE).then(|| best.to_owned())
}

/// Whether a name is meant by a pattern of ssh_config, as `match_pattern` in OpenSSH's match.c, without regard to case,
/// as for host names there.
pub fn matches(pattern: &str, host: &str) -> bool {
    fn rest(pattern: &[u8], host: &[u8]) -> bool {
        match (pattern.split_first(), host.split_first()) {
            (None, None) => true,
            (Some((b'*', after)), _) => (0..=host.len()).any(|skipped| rest(after, &host[skipped..])),
            (Some((b'?', after)), Some((_, host))) => rest(after, host),
            (Some((wanted, after)), Some((found, host))) if wanted.eq_ignore_ascii_case(found) => {
                rest(after, host)
            }
            _ => false,
        }
    }
    // Stars in a row mean no more than one, and cost much more.
    let mut pattern = pattern.as_bytes().to_vec();
    pattern.dedup_by(|a, b| *a == b'*' && *b == b'*');
    rest(&pattern, host.as_bytes())
}

/// Reads a time: seconds, or a text such as `90s` or `2m`.
///
/// # Errors
/// If it is none, or longer than thirty days.
pub fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected seconds, or a text such as \"90s\" or \"2m\"")]
    enum Given {
        Seconds(u64),
        Text(String),
    }
    let time = match Given::deserialize(deserializer)? {
        Given::Seconds(seconds) => Duration::from_secs(seconds),
        Given::Text(text) => humantime::parse_duration(&text).map_err(D::Error::custom)?,
    };
    if time > LONGEST {
        return Err(D::Error::custom("it must be at most thirty days"));
    }
    Ok(time)
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    match time(deserializer) {
        Ok(time) if time < Duration::from_secs(1) => {
            Err(D::Error::custom("it must be between a second and thirty days"))
        }
        other => other,
    }
}

fn some_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

fn ready<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    match u8::deserialize(deserializer)? {
        number @ 0..=16 => Ok(number),
        _ => Err(D::Error::custom("it must be between 0 and 16")),
    }
}

fn some_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.trim().is_empty() || text.contains('\0') {
        return Err(D::Error::custom("it is empty or has a zero byte"));
    }
    Ok(Some(text))
}

fn some_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::from(String::deserialize(deserializer)?);
    let plain = path.to_str().is_some_and(|text| !text.contains(['%', '\0']));
    if !path.is_absolute() || !plain {
        return Err(D::Error::custom(
            "it must be an absolute path without ssh's % words; `ssh -G HOST | grep controlpath` shows how ssh spells it out",
        ));
    }
    Ok(Some(path))
}

/// Reads a pattern of [`matches`] or a list of them.
///
/// # Errors
/// If one of them cannot be a name, or there is none.
pub fn names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a host name or a list of them")]
    enum Given {
        One(String),
        Several(Vec<String>),
    }
    let names = match Given::deserialize(deserializer)? {
        Given::One(name) => vec![name],
        Given::Several(names) => names,
    };
    match names.iter().find(|name| name.is_empty() || name.contains(char::is_whitespace)) {
        Some(name) => Err(D::Error::custom(format!("{name:?} is no host name"))),
        None if names.is_empty() => Err(D::Error::custom("no host is named")),
        None => Ok(names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    fn parse(text: &str) -> Result<Settings, SettingsError> {
        super::parse(text, Path::new("/f"))
    }

    fn complaint(text: &str) -> (String, Option<String>) {
        let error = parse(text).unwrap_err();
        (error.to_string(), error.cure())
    }

    #[test]
    fn the_first_block_that_has_a_key_counts() {
        let settings = parse(
            "[ssh]\nidle = \"5m\"\nconnections-per-second = 3\n\
             [[host]]\nname = 'mac'\nwake = 'wol 1'\n\
             [[host]]\nname = ['*.farm', 'mac']\nwake = 'wol 2'\nwake-timeout = 30\ncontrol-path = '/c'\n",
        )
        .unwrap();
        assert_eq!(settings.ssh.idle, Duration::from_secs(300));
        let mac = settings.of_host("MAC");
        let wake = |command: &str| Wake { command: command.into(), timeout: Duration::from_secs(30) };
        assert_eq!((mac.wake, mac.control_path), (Some(wake("wol 1")), Some("/c".into())));
        assert_eq!(settings.of_host("a.farm").wake, Some(wake("wol 2")));
        let other = settings.of_host("farm");
        assert_eq!((other.wake, other.control_path, other.connections_per_second.get()), (None, None, 3));
        assert_eq!(parse("").unwrap(), Settings::default());
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place_and_the_word_that_was_meant() {
        let (error, cure) = complaint("[ssh]\nidle = 5\n\n[[host]]\nname = 'a'\n wkae = 'x'\n");
        assert!(error.starts_with("/f:6:2: unknown field `wkae`, expected one of "), "{error}");
        assert_eq!(cure.as_deref(), Some("did you mean `wake`?"));
        let (error, cure) = complaint("[sshd]\n");
        assert!(error.starts_with("/f:1:2: unknown field `sshd`"), "{error}");
        assert_eq!(cure.as_deref(), Some("did you mean `ssh`?"));
        for (text, place, part) in [
            ("a", "/f:1:", "expected"),
            ("[ssh]\nidle = 'soon'", "/f:2:8: ", "expected number"),
            ("[ssh]\nidle = 0", "/f:2:8: ", "between a second"),
            ("[ssh]\nidle = true", "/f:2:8: ", "such as \"90s\""),
            ("[ssh]\nconnections-per-second = 0", "/f:2:26: ", "nonzero"),
            ("[[host]]\nwake = 'x'", "/f:1:1: ", "missing field `name`"),
            ("[[host]]\nname = []", "/f:2:8: ", "no host is named"),
            ("[[host]]\nname = 'a b'", "/f:2:8: ", "no host name"),
            ("[[host]]\nname = 'a'\nwake = ' '", "/f:3:8: ", "empty"),
            ("[[host]]\nname = 'a'\ncontrol-path = '~/.ssh/%C'", "/f:3:16: ", "absolute path without"),
        ] {
            let (error, _) = complaint(text);
            assert!(error.starts_with(place) && error.contains(part), "{text:?}: {error}");
        }
    }

    #[test]
    fn the_sample_and_the_manual_have_every_key() {
        let packaging = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging");
        let sample = fs::read_to_string(format!("{packaging}/nix/offload.toml")).unwrap();
        assert_eq!(parse(&sample).unwrap(), Settings::default());
        let is_setting = |line: &&str| line.starts_with("# [") || line.contains(" = ");
        let lines = sample.lines().filter(|line| line.starts_with('[') || is_setting(line));
        let used: String = lines.map(|line| format!("{}\n", line.trim_start_matches("# "))).collect();
        parse(&used).unwrap();
        let manual =
            fs::read_to_string(format!("{packaging}/man/nix-offload-proxy.1")).unwrap().replace('\\', "");
        let mut keys = 0;
        for table in ["[ssh]\nx = 1", "[[host]]\nx = 1"] {
            let (error, _) = complaint(table);
            let (_, known) = error.split_once("expected ").unwrap();
            for key in known.split('`').skip(1).step_by(2) {
                keys += 1;
                assert!(manual.contains(&format!("\n.B {key}\n")), "the manual lacks {key}");
                assert!(used.contains(&format!("{key} = ")), "the sample lacks {key}");
            }
        }
        assert!(keys >= 7, "{keys} keys found");
    }

    #[test]
    fn patterns_match_as_in_ssh_config() {
        for (pattern, host) in [("*", ""), ("a?c", "aBc"), ("*.x", "a.b.x"), ("a*b*c", "a1b2b3c")] {
            assert!(matches(pattern, host), "{pattern} {host}");
        }
        for (pattern, host) in [("a", "ab"), ("?", ""), ("*.x", "x"), ("a*b", "a1c")] {
            assert!(!matches(pattern, host), "{pattern} {host}");
        }
        // In no time.
        assert!(matches(&"*".repeat(1000), &"a".repeat(1000)));
    }

    #[test]
    fn a_file_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("offload.toml");
        let lookup = |name: &str| (name == FILE_VARIABLE).then(|| path.clone().into_os_string());
        let absent = Settings::from_env(lookup).unwrap_err().cure().unwrap();
        assert!(absent.starts_with("NIX_OFFLOAD_CONFIG names it"), "{absent}");
        fs::write(&path, "[ssh]\nidle = 7\n").unwrap();
        assert_eq!(Settings::from_env(lookup).unwrap().ssh.idle, Duration::from_secs(7));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let error = Settings::from_env(lookup).unwrap_err();
        assert!(error.to_string().ends_with("/offload.toml can be written by others (mode 0666)"), "{error}");
        let cure = error.cure().unwrap();
        assert!(cure.contains("chmod go-w /") && !cure.contains("chown"), "{cure}");
        let theirs = SettingsError::NotOurs { path: "/f".into(), owner: 4711, mode: 0o644 };
        assert_eq!(theirs.to_string(), "/f belongs to user 4711");
        let cure = theirs.cure().unwrap();
        assert!(cure.ends_with(": `chown root /f`"), "{cure}");
        let both = SettingsError::NotOurs { path: "/f".into(), owner: 4711, mode: 0o666 };
        assert_eq!(both.to_string(), "/f belongs to user 4711 and can be written by others (mode 0666)");
        assert!(both.cure().unwrap().ends_with(": `chown root /f` and `chmod go-w /f`"), "{both:?}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, vec![b'#'; MOST_BYTES as usize + 1]).unwrap();
        assert!(matches!(Settings::from_env(lookup), Err(SettingsError::Io { .. })));
        assert!(read_file::<Settings>(&path).unwrap_err().cure().is_none(), "nobody named it");
    }
}
