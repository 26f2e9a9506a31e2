//! From what people type to derivations of the local store: paths, links to them, files and installables of Nix.
//!
//! Must never evaluate anything itself: that is Nix's.

use crate::nix_here::{self, AskError, View};
use crate::store::{DatabaseError, Location, Query};
use nix_derivation::StorePath;
use nix_offload_proxy::exit;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use thiserror::Error;

/// How long Nix may take to evaluate something.
const BOUND: Duration = Duration::from_secs(300);

/// Why a word leads to no derivation.
#[derive(Debug, Error)]
pub enum InstallableError {
    /// There is no Nix to ask.
    #[error(transparent)]
    Nix(#[from] AskError),
    /// The store's database cannot be read.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// There is no such path in the store.
    #[error("'{0}' is not in the store")]
    NotThere(String),
    /// Nobody noted what made it.
    #[error("it is not known which derivation made '{0}'")]
    NoDeriver(String),
    /// What made it is gone, or was never here.
    #[error("'{path}' was made by '{deriver}', which is not in the store")]
    DeriverGone {
        /// The path that was asked about.
        path: String,
        /// The derivation that made it.
        deriver: String,
    },
    /// Nix cannot be run.
    #[error("cannot run '{command}'")]
    Start {
        /// What was run.
        command: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Nix took too long.
    #[error("'{command}' did not end within {} seconds", BOUND.as_secs())]
    TimedOut {
        /// What was run.
        command: String,
    },
    /// Nix makes nothing of it. Its own words stand above.
    #[error("Nix cannot evaluate '{word}' ('{command}' failed)")]
    Failed {
        /// The word.
        word: String,
        /// What was run.
        command: String,
        /// What Nix said.
        said: String,
    },
    /// It leads to nothing that can be built.
    #[error("'{0}' leads to no derivation")]
    Nothing(String),
}

impl InstallableError {
    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            Self::Nix(error) => Some(error.cure().to_owned()),
            Self::NoDeriver(_) | Self::DeriverGone { .. } => {
                Some("name what it was built from instead: an installable such as nixpkgs#hello, or a file".into())
            }
            Self::NotThere(_) | Self::Nothing(_) => Some(
                "give a path of the store, an installable such as nixpkgs#hello or .#x, or a file such as ./default.nix"
                    .into(),
            ),
            Self::TimedOut { .. } => {
                Some("run it by hand, and give the derivation that it prints".into())
            }
            Self::Database(_) | Self::Start { .. } | Self::Failed { .. } => None,
        }
    }

    /// What Nix said, if it is to blame.
    pub fn said(&self) -> Option<&str> {
        match self {
            Self::Failed { said, .. } => Some(said),
            _ => None,
        }
    }

    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Nix(_) | Self::Database(_) | Self::Start { .. } => exit::CONFIG,
            Self::TimedOut { .. } => exit::TEMPORARY,
            _ => exit::USAGE,
        }
    }
}

/// Where words are looked up.
#[derive(Debug)]
pub(super) struct Place<'a> {
    /// The local store.
    pub(super) location: &'a Location,
    /// What stands behind Nix's `--store`, if anything does.
    pub(super) store: Option<&'a str>,
    /// The file whose attributes the words are.
    pub(super) file: Option<&'a str>,
}

impl Place<'_> {
    /// The derivations that words lead to, in their order, each once. Without words the whole file is meant.
    pub(super) fn derivations(&self, words: &[String]) -> Result<Vec<String>, InstallableError> {
        let mut found: Vec<String> = Vec::new();
        let mut keep = |paths: Vec<String>| {
            for path in paths {
                if !found.contains(&path) {
                    found.push(path);
                }
            }
        };
        if let (Some(file), []) = (self.file, words) {
            keep(self.instantiated(file, None)?);
        }
        for word in words {
            keep(match (self.file, self.in_store(word)) {
                (Some(file), _) => self.instantiated(file, Some(word))?,
                (None, Some(path)) => vec![self.derivation_of(&path)?],
                (None, None) if is_expression(Path::new(word)) => self.instantiated(word, None)?,
                (None, None) => self.installable(word)?,
            });
        }
        Ok(found)
    }

    /// The store path that a word is, lies in, or is a link to.
    fn in_store(&self, word: &str) -> Option<StorePath> {
        let parse = |path: &Path| {
            let rest =
                path.as_os_str().as_bytes().strip_prefix(self.location.store_dir.as_str().as_bytes())?;
            let base = rest.strip_prefix(b"/")?.split(|byte| *byte == b'/').next()?;
            // Outputs may be named behind a derivation: `x.drv^out`, and `x.drv!out` before Nix 2.14.
            let base = base.split(|byte| matches!(byte, b'^' | b'!')).next()?;
            StorePath::from_basename(base).ok()
        };
        let path = Path::new(word);
        parse(path)
            .or_else(|| parse(&fs::read_link(path).ok()?))
            .or_else(|| parse(&fs::canonicalize(path).ok()?))
    }

    fn derivation_of(&self, path: &StorePath) -> Result<String, InstallableError> {
        let rendered = self.location.render(path);
        if path.is_derivation() {
            let is_there = self.location.real_path(path).exists();
            return if is_there { Ok(rendered) } else { Err(InstallableError::NotThere(rendered)) };
        }
        let info = Query::open(self.location)?.path_info(path)?;
        let Some(info) = info else { return Err(InstallableError::NotThere(rendered)) };
        match info.deriver {
            None => Err(InstallableError::NoDeriver(rendered)),
            Some(deriver) if self.location.real_path(&deriver).exists() => Ok(self.location.render(&deriver)),
            Some(deriver) => {
                Err(InstallableError::DeriverGone { path: rendered, deriver: self.location.render(&deriver) })
            }
        }
    }

    /// An attribute of a file, or all of the file.
    fn instantiated(&self, file: &str, attribute: Option<&String>) -> Result<Vec<String>, InstallableError> {
        let mut words = vec!["--quiet".to_owned()];
        if let Some(attribute) = attribute {
            words.extend(["-A".to_owned(), attribute.clone()]);
        }
        // A dash at its beginning would make it an option.
        words.push(if file.starts_with('-') { format!("./{file}") } else { file.to_owned() });
        self.ask("nix-instantiate", words, attribute.map_or(file, |attribute| attribute))
    }

    fn installable(&self, word: &str) -> Result<Vec<String>, InstallableError> {
        let words =
            ["--extra-experimental-features", "nix-command flakes", "path-info", "--derivation", "--", word];
        self.ask("nix", words.map(str::to_owned).into(), word)
    }

    /// Runs one of Nix's programs as whoever calls us, and takes the derivations that it prints.
    fn ask(
        &self,
        program: &str,
        mut words: Vec<String>,
        word: &str,
    ) -> Result<Vec<String>, InstallableError> {
        if let Some(store) = self.store {
            let place = usize::from(program == "nix") * 3;
            words.splice(place..place, ["--store".to_owned(), store.to_owned()]);
        }
        let path: PathBuf = View::own().program(program)?;
        let command = [program.to_owned()].into_iter().chain(words.iter().cloned());
        let command = shlex::try_join(command.collect::<Vec<_>>().iter().map(String::as_str))
            .unwrap_or_else(|_| program.to_owned());
        let answer = match nix_here::run(Command::new(path).args(&words), BOUND) {
            Ok(answer) => answer,
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return Err(InstallableError::TimedOut { command });
            }
            Err(source) => return Err(InstallableError::Start { command, source }),
        };
        if !answer.status.success() {
            let said = answer.stderr.trim_end().to_owned();
            return Err(InstallableError::Failed { word: word.to_owned(), command, said });
        }
        let path = |line: &str| {
            let line = line.split(['!', '^']).next().unwrap_or_default().trim();
            line.ends_with(".drv").then(|| line.to_owned())
        };
        let paths: Vec<String> = answer.stdout.lines().filter_map(path).collect();
        if paths.is_empty() { Err(InstallableError::Nothing(word.to_owned())) } else { Ok(paths) }
    }
}

/// Whether this is a file in the Nix language, or a directory with one and without a flake.
fn is_expression(path: &Path) -> bool {
    if path.is_dir() {
        return path.join("default.nix").exists() && !path.join("flake.nix").exists();
    }
    path.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_store_are_known_in_every_form() {
        let directory = tempfile::tempdir().unwrap();
        let location = Location::parse("/srv/x", |_| None).unwrap();
        let place = Place { location: &location, store: None, file: None };
        let base = format!("{}-hello.drv", "0".repeat(32));
        let path = format!("/nix/store/{base}");
        let link = directory.path().join("result");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for word in [&path, &format!("{path}^out,dev"), &format!("{path}!out"), &link.display().to_string()] {
            assert_eq!(
                place.in_store(word).map(|path| path.to_basename()).as_deref(),
                Some(&*base),
                "{word}"
            );
        }
        let inner = format!("/nix/store/{}-hello/bin/hello", "0".repeat(32));
        assert_eq!(place.in_store(&inner).unwrap().name(), "hello");
        for word in ["nixpkgs#hello", ".", "/nix/store", "/nix/store/", "/nix/store/x", "/nix/storefront/x"] {
            assert_eq!(place.in_store(word), None, "{word}");
        }
    }

    #[test]
    fn a_directory_is_a_flake_if_it_can_be_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert!(!is_expression(path) && !is_expression(&path.join("absent.nix")));
        fs::write(path.join("default.nix"), "1").unwrap();
        assert!(is_expression(path) && is_expression(&path.join("default.nix")));
        fs::write(path.join("flake.nix"), "{ }").unwrap();
        assert!(!is_expression(path));
    }
}
