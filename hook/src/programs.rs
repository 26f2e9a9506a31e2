//! Where the programs of the running Nix are. Must never start one.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// Names the stock hook with its arguments, in place of what would be found.
pub const STOCK_HOOK_VARIABLE: &str = "NIX_OFFLOAD_STOCK_HOOK";

/// The directory of the Nix that started this process, if it is one.
pub fn running_nix() -> Option<PathBuf> {
    let parent = nix::unistd::getppid();
    // All its programs are names of one file, so this is `.../bin/nix` whatever it was started as.
    let program = fs::read_link(format!("/proc/{parent}/exe")).ok()?;
    let directory = program.parent()?;
    directory.join("nix").is_file().then(|| directory.to_owned())
}

/// Nix's own build hook: the program and its first arguments.
///
/// Up to 2.16 it is a program of its own beside the others (`build-hook` in `src/libstore/globals.hh`, Nix 2.8), since
/// then a word of `nix` (2.26).
pub fn stock_hook() -> Option<Vec<OsString>> {
    if let Some(named) = env::var_os(STOCK_HOOK_VARIABLE).filter(|named| !named.is_empty()) {
        let words = shlex::split(&named.to_string_lossy()).filter(|words| !words.is_empty())?;
        return Some(words.into_iter().map(OsString::from).collect());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = running_nix().into_iter().chain(env::split_paths(&path));
    directories.chain([PathBuf::from("/nix/var/nix/profiles/default/bin")]).find_map(|dir| in_directory(&dir))
}

fn in_directory(directory: &Path) -> Option<Vec<OsString>> {
    // A profile has links to programs only, and what is beside them is beside their targets.
    let nix = fs::canonicalize(directory.join("nix")).ok().filter(|nix| nix.is_file())?;
    let own = nix.parent()?.parent()?.join("libexec/nix/build-remote");
    if own.exists() { Some(vec![own.into()]) } else { Some(vec![nix.into(), "__build-remote".into()]) }
}
