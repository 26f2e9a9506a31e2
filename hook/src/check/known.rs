//! The words that a machine's line may have: systems, features, parameters of store URIs, kinds of stores. And the word
//! that was probably meant.
//!
//! Must never know where a word stands.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

/// Features that Nix and Nixpkgs ask for (`getDefaultSystemFeatures` in Nix 2.34 `src/libstore/globals.cc`, the
/// experimental features of `src/libutil/experimental-features.cc`, and Nixpkgs).
pub(super) const FEATURES: [&str; 8] = [
    "apple-virt",
    "benchmark",
    "big-parallel",
    "ca-derivations",
    "kvm",
    "nixos-test",
    "recursive-nix",
    "uid-range",
];

/// Parameters of stores, of `ssh` and `ssh-ng` first, from the `StoreConfig` classes of Nix 2.8 to 2.34.
const PARAMETERS: [&str; 23] = [
    "ssh-key",
    "base64-ssh-public-host-key",
    "compress",
    "remote-program",
    "remote-store",
    "max-connections",
    "max-connection-age",
    "log-fd",
    "store",
    "path-info-cache-size",
    "trusted",
    "priority",
    "want-mass-query",
    "system-features",
    "root",
    "state",
    "log",
    "real",
    "require-sigs",
    "read-only",
    "lower-store",
    "upper-layer",
    "check-mount",
];

/// Kinds of stores that can build.
const BUILDERS: [&str; 7] = ["ssh", "ssh-ng", "mounted-ssh-ng", "unix", "local", "local-overlay", "daemon"];
/// Kinds of stores that cannot.
const CACHES: [&str; 5] = ["http", "https", "s3", "file", "dummy"];

const ARCHITECTURES: [&str; 30] = [
    "x86_64",
    "aarch64",
    "i686",
    "armv7l",
    "armv7a",
    "armv6l",
    "armv5tel",
    "riscv64",
    "riscv32",
    "powerpc64le",
    "powerpc64",
    "powerpc",
    "loongarch64",
    "s390x",
    "s390",
    "mips64el",
    "mips64",
    "mipsel",
    "mips",
    "aarch64_be",
    "m68k",
    "microblaze",
    "microblazeel",
    "i386",
    "i486",
    "i586",
    "arm",
    "avr",
    "wasm32",
    "js",
];
const OPERATING_SYSTEMS: [&str; 13] = [
    "linux", "darwin", "freebsd", "openbsd", "netbsd", "solaris", "cygwin", "windows", "wasi", "genode",
    "redox", "none", "ghcjs",
];
/// Other names that people have for these.
const OTHER_NAMES: [(&str, &str); 9] = [
    ("x86-64", "x86_64"),
    ("x86 64", "x86_64"),
    ("amd64", "x86_64"),
    ("x64", "x86_64"),
    ("arm64", "aarch64"),
    ("macosx", "darwin"),
    ("macos", "darwin"),
    ("osx", "darwin"),
    ("apple", "darwin"),
];

/// Two words are alike enough for "did you mean" from here on, between 0 and 1.
const ALIKE: f64 = 0.8;

/// What can be said of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Word {
    /// It is known.
    Known,
    /// It is not, and this one is much like it.
    Meant(String),
    /// Nothing is like it.
    Unknown,
}

/// Judges the name of a system; `own` are those of this machine.
pub(super) fn system<'a>(name: &str, own: impl IntoIterator<Item = &'a str>) -> Word {
    // Every machine can do `builtin` (`Machine::systemSupported`), and a list may say so.
    if name == "builtin" || own.into_iter().any(|own| own == name) {
        return Word::Known;
    }
    // Nix has names such as x86_64-v3-linux for what newer processors can do.
    let plain =
        ["-v1", "-v2", "-v3", "-v4"].iter().fold(name.to_owned(), |name, level| name.replacen(level, "", 1));
    if let Some((architecture, system)) = plain.split_once('-')
        && ARCHITECTURES.contains(&architecture)
        && OPERATING_SYSTEMS.contains(&system)
    {
        return Word::Known;
    }
    meant_system(name).map_or(Word::Unknown, Word::Meant)
}

fn meant_system(name: &str) -> Option<String> {
    let lower =
        OTHER_NAMES.iter().fold(name.to_lowercase(), |name, (other, known)| name.replace(other, known));
    let parts: Vec<&str> = lower.split(['-', '.', '/', ':']).filter(|part| !part.is_empty()).collect();
    let of = |known: &[&'static str]| {
        let exact = parts.iter().find_map(|part| known.iter().find(|known| *known == part));
        exact.copied().or_else(|| parts.iter().find_map(|part| nearest(part, known.iter().copied())))
    };
    match (of(&ARCHITECTURES), of(&OPERATING_SYSTEMS)) {
        (Some(architecture), system) => Some(format!("{architecture}-{}", system.unwrap_or("linux"))),
        (None, Some("darwin")) => Some("aarch64-darwin".into()),
        (None, Some("linux")) => Some("x86_64-linux".into()),
        _ => None,
    }
}

/// Judges a feature; `own` are those of this machine. Anybody may invent some, so only what is all but a known one is
/// said to be meant.
pub(super) fn feature<'a>(name: &str, own: impl IntoIterator<Item = &'a str>) -> Word {
    let bare = |name: &str| name.to_lowercase().replace(['-', '_', '.'], "");
    let mut best: Option<(usize, &str)> = None;
    for known in own.into_iter().chain(FEATURES) {
        if known == name {
            return Word::Known;
        }
        let distance = if bare(known) == bare(name) {
            0
        } else {
            strsim::osa_distance(&known.to_lowercase(), &name.to_lowercase())
        };
        // In a short word one other letter makes another word.
        let most = match known.len() {
            ..=3 => 0,
            4..=8 => 1,
            _ => 2,
        };
        if distance <= most && best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, known));
        }
    }
    best.map_or(Word::Unknown, |(_, known)| Word::Meant(known.to_owned()))
}

/// Judges a parameter of a store URI.
pub(super) fn parameter(name: &str) -> Word {
    if PARAMETERS.contains(&name) {
        return Word::Known;
    }
    nearest(name, PARAMETERS).map_or(Word::Unknown, |known| Word::Meant(known.to_owned()))
}

/// Judges a store's kind, the word before `://`.
pub(super) fn scheme(name: &str) -> Word {
    if BUILDERS.contains(&name) || CACHES.contains(&name) {
        return Word::Known;
    }
    let alike = |known: &&str| strsim::osa_distance(known, &name.to_lowercase()) == 1;
    BUILDERS.into_iter().find(alike).map_or(Word::Unknown, |known| Word::Meant(known.to_owned()))
}

/// Whether stores of that kind cannot build.
pub(super) fn is_cache(scheme: &str) -> bool {
    CACHES.contains(&scheme)
}

fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let alike = |known: &str| strsim::jaro_winkler(known, &word.to_lowercase());
    let best = known.into_iter().max_by(|a, b| alike(a).total_cmp(&alike(b)))?;
    (alike(best) >= ALIKE).then_some(best)
}
