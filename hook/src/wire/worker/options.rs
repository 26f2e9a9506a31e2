//! The options of a connection: what is meant by them, and what they would replace besides.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::super::{put_str, put_u64};

const OP_SET_OPTIONS: u64 = 19;

/// Longest time that is told, in seconds: 68 years, which no clock of a daemon overflows at.
const LONGEST: u64 = i32::MAX as u64;

/// Options of the builder's daemon that a client may set for its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Keep the directory of a failed build.
    pub keep_failed: bool,
    /// Seconds without output after which a build is ended; 0 for as the daemon has it.
    pub max_silent_time: u64,
    /// Seconds after which a build is ended; 0 for as the daemon has it.
    pub timeout: u64,
    /// What is to stay as the daemon has it.
    pub own: Own,
}

/// Settings that the daemon of a builder has, and that options replace whether they are meant or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    keep_going: bool,
    fallback: bool,
    max_jobs: u64,
    max_silent_time: u64,
    cores: u64,
    substitute: bool,
}

impl Default for Own {
    /// As Nix has them where nothing else is said, and one build, for no more are asked for at a time.
    fn default() -> Self {
        Self {
            keep_going: false,
            fallback: false,
            max_jobs: 1,
            max_silent_time: 0,
            cores: 0,
            substitute: true,
        }
    }
}

impl Own {
    /// Nix's names of them.
    pub const NAMES: [&str; 6] =
        ["keep-going", "fallback", "max-jobs", "max-silent-time", "cores", "substitute"];

    /// From lines of the form `name = value`, as Nix shows settings; other lines do not count. None if there is not all that
    /// must be known.
    pub fn parse(text: &str) -> Option<Self> {
        let find = |name: &str| {
            let mut settings = text.lines().filter_map(|line| line.split_once('='));
            settings.find(|(left, _)| left.trim() == name).map(|(_, value)| value.trim())
        };
        find("cores")?.parse::<u64>().ok()?;
        find("substitute")?;
        Some(Self::read(find))
    }

    /// From settings; what is not given is as by default.
    pub fn read<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Self {
        let flag =
            |name: &str, default| get(name).map_or(default, |value| matches!(value, "true" | "yes" | "1"));
        let number = |name: &str, default| get(name).and_then(|value| value.parse().ok()).unwrap_or(default);
        let default = Self::default();
        Self {
            keep_going: flag("keep-going", default.keep_going),
            fallback: flag("fallback", default.fallback),
            max_jobs: number("max-jobs", default.max_jobs),
            max_silent_time: number("max-silent-time", default.max_silent_time),
            cores: number("cores", default.cores),
            substitute: flag("substitute", default.substitute),
        }
    }

    /// The same with one build at a time, as for a store that a client opens itself, which may build nothing otherwise.
    #[must_use]
    pub fn with_one_job(self) -> Self {
        Self { max_jobs: 1, ..self }
    }
}

/// Appends the operation that sets options; it has no answer.
pub fn put_set_options(buffer: &mut Vec<u8>, options: Options) {
    let Options { keep_failed, max_silent_time, timeout, own } = options;
    let silent = if max_silent_time > 0 { max_silent_time } else { own.max_silent_time };
    put_u64(buffer, OP_SET_OPTIONS);
    put_u64(buffer, keep_failed.into());
    put_u64(buffer, own.keep_going.into());
    put_u64(buffer, own.fallback.into());
    put_u64(buffer, 3); // verbosity: info
    put_u64(buffer, own.max_jobs.min(LONGEST));
    put_u64(buffer, silent.min(LONGEST));
    put_u64(buffer, 1); // obsolete: use of a build hook
    put_u64(buffer, 7); // build output as results of the build's activity, not as texts
    put_u64(buffer, 0); // obsolete: log type
    put_u64(buffer, 0); // obsolete: print build trace
    put_u64(buffer, own.cores.min(LONGEST));
    put_u64(buffer, own.substitute.into());
    let overrides: &[(&str, u64)] = if timeout > 0 { &[("timeout", timeout.min(LONGEST))] } else { &[] };
    put_u64(buffer, overrides.len() as u64);
    for (name, value) in overrides {
        put_str(buffer, name);
        put_str(buffer, &value.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_daemon_has_is_read_from_what_nix_shows() {
        let text = "allowed-users = *\ncores = 4\nfallback = true\nkeep-going = false\nmax-jobs = 3\n\
                    max-silent-time = 7\nsubstitute = false\nsubstituters = https://x/?a=b\n";
        let own = Own::parse(text).unwrap();
        let expected = Own {
            keep_going: false,
            fallback: true,
            max_jobs: 3,
            max_silent_time: 7,
            cores: 4,
            substitute: false,
        };
        assert_eq!(own, expected);
        assert_eq!(own.with_one_job(), Own { max_jobs: 1, ..expected });
        assert_eq!(Own::parse("cores = 0\nsubstitute = true\n"), Some(Own::default()));
        for nothing in ["", "cores = many\nsubstitute = true\n", "substitute = true\n", "cores = 1\n"] {
            assert_eq!(Own::parse(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn what_is_not_meant_stays_as_it_is() {
        let own = Own::parse("cores = 4\nsubstitute = false\nmax-silent-time = 7\nmax-jobs = 3\n").unwrap();
        let numbers = |options| {
            let mut bytes = Vec::new();
            put_set_options(&mut bytes, options);
            bytes.chunks(8).map(|n| u64::from_le_bytes(n.try_into().unwrap())).collect::<Vec<_>>()
        };
        let kept = numbers(Options { keep_failed: true, max_silent_time: 0, timeout: 0, own });
        assert_eq!(kept, [19, 1, 0, 0, 3, 3, 7, 1, 7, 0, 0, 4, 0, 0]);
        let silent = numbers(Options { keep_failed: false, max_silent_time: u64::MAX, timeout: 0, own });
        assert_eq!(silent, [19, 0, 0, 0, 3, 3, LONGEST, 1, 7, 0, 0, 4, 0, 0]);
    }
}
