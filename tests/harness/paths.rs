//! Where things are: the workspace, the programs under test, the roots of other Debian releases.

use std::{env, path::PathBuf};

/// The Debian release whose Nix and OpenSSH a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Debian 12: Nix 2.8.0, OpenSSH 9.2.
    Bookworm,
    /// Debian 13: Nix 2.26.3, OpenSSH 10.0. Its Nix ignores `build-hook` in nix.conf.
    Trixie,
    /// Debian unstable: Nix 2.34 or newer, OpenSSH 10.6 or newer.
    Sid,
}

impl Release {
    /// All releases, for tests that run once for each.
    pub const ALL: [Self; 3] = [Self::Bookworm, Self::Trixie, Self::Sid];

    /// Debian's name of the release.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }

    /// The directory this release's programs come from; made by `tests/make-roots`.
    pub fn root(self) -> PathBuf {
        let roots = env::var_os("NIX_OFFLOAD_TEST_ROOTS")
            .map_or_else(|| target().join("test-roots"), |dir| workspace().join(PathBuf::from(dir)));
        let own = roots.join(self.name());
        if own.is_dir() {
            return own;
        }
        assert!(
            self == Self::Bookworm,
            "{} is missing; ./tests/run makes it (or ./tests/make-roots {})",
            own.display(),
            self.name(),
        );
        // On Debian 12 itself the host is the root.
        PathBuf::from("/")
    }

    /// What `nix --version` says on this release begins with this.
    pub fn nix_version_prefix(self) -> &'static str {
        match self {
            Self::Bookworm => "2.8.",
            Self::Trixie => "2.26.",
            Self::Sid => "2.",
        }
    }
}

/// The directory with the programs under test, shown in every machine as `/opt/nix-offload/bin`.
pub fn binaries() -> PathBuf {
    env::var_os("NIX_OFFLOAD_BIN_DIR")
        .map_or_else(|| target().join("debug"), |dir| workspace().join(PathBuf::from(dir)))
}

fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |dir| workspace().join(PathBuf::from(dir)))
}

/// The directory of the whole project.
pub fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

pub(crate) fn machine_script() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("harness/machine.sh")
}
