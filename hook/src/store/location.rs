//! Where the local store is: Nix's `store` setting and the environment, read as Nix reads them.

use nix_derivation::{StoreDir, StorePath, store_path};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The three directories that make up a local store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The directory that store paths name, `/nix/store`: part of their identity.
    pub store_dir: StoreDir,
    /// The directory in which their files are.
    pub real_store_dir: PathBuf,
    /// The directory of the database, `/nix/var/nix`.
    pub state_dir: PathBuf,
}

/// Why a `store` setting names no local store that can be written to directly.
#[derive(Debug, Error)]
pub enum LocationError {
    /// The store belongs to a daemon, another machine or a cache.
    #[error("the store '{setting}' is not a local one")]
    NotLocal {
        /// The setting as Nix sent it.
        setting: String,
    },
    /// A path that depends on the directory in which Nix was started; a hook runs in `/`.
    #[error("the store setting '{setting}' has the relative path '{path}'; write it from '/' on")]
    Relative {
        /// The setting as Nix sent it.
        setting: String,
        /// The path found in it.
        path: String,
    },
    /// An escape like `%2F` is cut short, is no hexadecimal number, or gives no UTF-8.
    #[error("the store setting '{setting}' has a bad '%' escape")]
    Escape {
        /// The setting as Nix sent it.
        setting: String,
    },
    /// An environment variable that holds a directory is not UTF-8.
    #[error("the environment variable {name} is not UTF-8")]
    Environment {
        /// Name of the variable.
        name: &'static str,
    },
    /// The logical store directory cannot hold store paths.
    #[error("the store setting '{setting}' gives an unusable store directory")]
    StoreDir {
        /// The setting as Nix sent it.
        setting: String,
        /// What is wrong with the directory.
        #[source]
        source: store_path::Error,
    },
}

impl Location {
    /// Reads a `store` setting, without looking at any file.
    ///
    /// `auto` counts as the local store: a Nix that runs hooks has the store open itself. Mirrors
    /// `StoreReference::parse` (Nix 2.34 `store-reference.cc`) and `LocalFSStoreConfig`
    /// (`local-fs-store.hh`).
    pub fn parse(setting: &str, env: impl Fn(&str) -> Option<OsString>) -> Result<Self, LocationError> {
        let Reference { root, params } = Reference::parse(setting)?;
        Self::build(setting, root, &params, env)
    }

    /// Like [`Location::parse`], but settles `auto` by looking at the disk, as Nix does.
    ///
    /// For commands that people start, and for hooks of a user without `/nix`, where Nix 2.10 and later
    /// take `~/.local/share/nix/root`. An unwritable state directory next to a daemon's socket means
    /// that the store is the daemon's. Mirrors `resolveStoreConfig` (Nix 2.34 `store-registration.cc`).
    pub fn find(setting: &str, env: impl Fn(&str) -> Option<OsString>) -> Result<Self, LocationError> {
        let location = Self::parse(setting, &env)?;
        let base = setting.split('?').next().unwrap_or_default();
        if !matches!(base, "" | "auto") || writable(&location.state_dir) {
            return Ok(location);
        }
        let socket = directory("NIX_DAEMON_SOCKET_PATH", setting, &env)?
            .unwrap_or_else(|| location.state_dir.join("daemon-socket/socket"));
        if socket.exists() {
            return Err(LocationError::NotLocal { setting: setting.to_owned() });
        }
        let defaults = base == setting
            && env("NIX_STORE_DIR").is_none()
            && env("NIX_STATE_DIR").is_none()
            && !location.state_dir.exists();
        match home_store(setting, &env)? {
            Some(root) if defaults && !nix::unistd::geteuid().is_root() && root.exists() => {
                Self::build(setting, Some(root), &BTreeMap::new(), env)
            }
            _ => Ok(location),
        }
    }

    fn build(
        setting: &str,
        root: Option<PathBuf>,
        params: &BTreeMap<String, String>,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, LocationError> {
        let given = |name: &str| {
            let value = params.get(name).filter(|value| !value.is_empty());
            value.map(|value| canonical(setting, value)).transpose()
        };
        // A `root` parameter wins over the path of `local:///path`.
        let root = given("root")?.or(root);
        let store_dir = match given("store")? {
            Some(dir) => dir,
            None => match directory("NIX_STORE_DIR", setting, &env)? {
                Some(dir) => dir,
                None => directory("NIX_STORE", setting, &env)?.unwrap_or_else(|| "/nix/store".into()),
            },
        };
        let state_dir = match (given("state")?, &root) {
            (Some(dir), _) => dir,
            (None, Some(root)) => root.join("nix/var/nix"),
            (None, None) => {
                directory("NIX_STATE_DIR", setting, &env)?.unwrap_or_else(|| "/nix/var/nix".into())
            }
        };
        let real_store_dir = match (given("real")?, &root) {
            (Some(dir), _) => dir,
            (None, Some(root)) => root.join("nix/store"),
            (None, None) => store_dir.clone(),
        };
        let store_dir = StoreDir::new(store_dir.to_string_lossy())
            .map_err(|source| LocationError::StoreDir { setting: setting.to_owned(), source })?;
        Ok(Self { store_dir, real_store_dir, state_dir })
    }

    /// Where the files of `path` are.
    pub fn real_path(&self, path: &StorePath) -> PathBuf {
        self.real_store_dir.join(path.to_basename())
    }

    /// The path as Nix writes it in its database and its messages.
    pub fn render(&self, path: &StorePath) -> String {
        self.store_dir.render_path(path)
    }
}

/// A `store` setting taken apart: the path of `/p` or `local:///p`, and what follows `?`.
struct Reference {
    root: Option<PathBuf>,
    params: BTreeMap<String, String>,
}

impl Reference {
    fn parse(setting: &str) -> Result<Self, LocationError> {
        let (base, query) = setting.split_once('?').unwrap_or((setting, ""));
        let root = match base {
            "" | "auto" | "local" => None,
            // A bare path is taken as it stands, `%` included; that of a URL is not.
            path if path.starts_with('/') => Some(canonical(setting, path)?),
            path if is_relative_path(path) => {
                return Err(LocationError::Relative { setting: setting.to_owned(), path: path.to_owned() });
            }
            url => {
                let path = url
                    .strip_prefix("local:")
                    .ok_or_else(|| LocationError::NotLocal { setting: setting.to_owned() })?;
                let path = unescape(setting, path.strip_prefix("//").unwrap_or(path))?;
                if path.is_empty() { None } else { Some(canonical(setting, &path)?) }
            }
        };
        let mut params = BTreeMap::new();
        for (name, value) in query.split('&').filter_map(|param| param.split_once('=')) {
            // As in Nix's map, the first of two equal names counts.
            params.entry(unescape(setting, name)?).or_insert(unescape(setting, value)?);
        }
        Ok(Self { root, params })
    }
}

/// Whether Nix would take `base` for a path although it does not start at `/`.
fn is_relative_path(base: &str) -> bool {
    let scheme = base.split_once(':').map(|(scheme, _)| scheme);
    let is_url = scheme.is_some_and(|scheme| {
        scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+.-".contains(c))
    });
    base.contains('/') && !is_url
}

/// A directory from the environment; as in Nix, an empty variable is as good as none.
fn directory(
    name: &'static str,
    setting: &str,
    env: impl Fn(&str) -> Option<OsString>,
) -> Result<Option<PathBuf>, LocationError> {
    match env(name).filter(|value| !value.is_empty()) {
        None => Ok(None),
        Some(value) => {
            let value = value.to_str().ok_or(LocationError::Environment { name })?;
            canonical(setting, value).map(Some)
        }
    }
}

/// Nix's own place for a store of a user who has no `/nix` (`getDataDir` in `users.cc`).
fn home_store(
    setting: &str,
    env: impl Fn(&str) -> Option<OsString>,
) -> Result<Option<PathBuf>, LocationError> {
    if let Some(data) = directory("NIX_DATA_HOME", setting, &env)? {
        return Ok(Some(data.join("root")));
    }
    if let Some(data) = directory("XDG_DATA_HOME", setting, &env)? {
        return Ok(Some(data.join("nix/root")));
    }
    Ok(directory("HOME", setting, &env)?.map(|home| home.join(".local/share/nix/root")))
}

fn writable(dir: &Path) -> bool {
    use nix::unistd::AccessFlags;
    nix::unistd::access(dir, AccessFlags::R_OK | AccessFlags::W_OK).is_ok()
}

/// An absolute path without `.`, `..` and doubled slashes; symlinks are not looked at (Nix's `canonPath`).
fn canonical(setting: &str, path: &str) -> Result<PathBuf, LocationError> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(LocationError::Relative { setting: setting.to_owned(), path: path.to_owned() });
    }
    let mut canonical = PathBuf::from("/");
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." => drop(canonical.pop()),
            name => canonical.push(name),
        }
    }
    Ok(canonical)
}

fn unescape(setting: &str, text: &str) -> Result<String, LocationError> {
    let bad = || LocationError::Escape { setting: setting.to_owned() };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'%' {
            let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or_else(bad)?;
            if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
            rest = &tail[2..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}
