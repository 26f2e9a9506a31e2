//! Names of files for what cannot be a name itself. Other versions look for the same names.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use nix_derivation::{HashAlgorithm, hash_bytes};

/// Hexadecimal digits of a name: 80 bits.
const DIGITS: usize = 20;

/// The first digits of the SHA-256 of a text.
pub fn short(text: &str) -> String {
    let digest = hash_bytes(HashAlgorithm::Sha256, text.as_bytes()).to_nix_base16_string();
    digest.chars().skip("sha256:".len()).take(DIGITS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_other_versions() {
        assert_eq!(short("ssh-ng://mac\0"), "bd46dde2550233189a00");
        assert_eq!(short(""), "e3b0c44298fc1c149afb");
    }
}
