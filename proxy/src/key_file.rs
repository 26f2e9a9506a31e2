//! Whether a file with a private key asks for a passphrase, which nobody can give who runs without a terminal.
//!
//! Must never read more of it than the head, nor keep any of that.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

/// How much of a file is looked at, in bytes. What tells stands in the first two lines.
const HEAD: u64 = 512;

/// Whether the key in this file has a passphrase. What is no private key that we know has none.
///
/// # Errors
/// If the file cannot be read.
pub fn has_passphrase(file: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    File::open(file)?.take(HEAD).read_to_end(&mut head)?;
    Ok(is_encrypted(&String::from_utf8_lossy(&head)))
}

/// The forms that OpenSSH reads (`sshkey_parse_private_fileblob_type` in sshkey.c): its own, whose magic word is followed
/// by the name of the cipher (PROTOCOL.key), and those of OpenSSL, which say it in their head.
fn is_encrypted(head: &str) -> bool {
    // `openssh-key-v1` and a zero byte in base64; then the cipher `none` with its length, and the next length's first byte.
    const MAGIC: &str = "b3BlbnNzaC1rZXktdjEA";
    const NONE: &str = "AAAABG5vbmUA";
    let mut lines = head.lines().map(str::trim_end).skip_while(|line| !line.starts_with("-----BEGIN "));
    let (begin, next) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let cipher = next.strip_prefix(MAGIC).filter(|_| begin.contains("OPENSSH"));
    cipher.is_some_and(|cipher| !cipher.starts_with(NONE))
        || begin.contains(" ENCRYPTED ")
        || (next.starts_with("Proc-Type:") && next.contains("ENCRYPTED"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn what_ssh_keygen_encrypts_is_told_from_what_it_leaves_open() {
        let directory = tempfile::tempdir().unwrap();
        let kinds =
            [("ed25519", "RFC4716"), ("rsa", "RFC4716"), ("rsa", "PEM"), ("rsa", "PKCS8"), ("ecdsa", "PEM")];
        for (kind, form) in kinds {
            for passphrase in ["", "open sesame"] {
                let file = directory.path().join(format!("{kind}-{form}-{}", passphrase.len()));
                let made = Command::new("ssh-keygen")
                    .args(["-q", "-t", kind, "-m", form, "-N", passphrase, "-f"])
                    .arg(&file)
                    .status();
                assert!(made.unwrap().success(), "{kind} {form}");
                assert_eq!(has_passphrase(&file).unwrap(), !passphrase.is_empty(), "{kind} {form}");
            }
        }
        let public = directory.path().join("ed25519-RFC4716-0.pub");
        assert!(!has_passphrase(&public).unwrap());
        assert!(has_passphrase(&directory.path().join("absent")).is_err());
    }
}
