//! Where archives of the real Nix end, as their framing shows it.

use nix_offload::wire::nar::NarEnd;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

fn dump(path: &Path) -> Vec<u8> {
    let output = Command::new("nix-store").arg("--dump").arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Archives of a file, an empty one, a link and a tree whose names, links and files are the grammar's own words.
fn archives() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "contents").unwrap();
    fs::write(at("nothing"), "").unwrap();
    symlink(")", at("link")).unwrap();
    fs::create_dir(at("empty")).unwrap();
    fs::create_dir_all(at("tree/(")).unwrap();
    for name in [")", "name", "target", "contents", "(/entry", "(/)", "(/node"] {
        fs::write(at("tree").join(name), name.repeat(name.len())).unwrap();
    }
    fs::write(at("tree/big"), [b')'; 100_000]).unwrap();
    symlink("target", at("tree/type")).unwrap();
    ["file", "nothing", "link", "empty", "tree"].map(|name| dump(&at(name))).into()
}

#[test]
fn the_end_is_seen_with_the_last_byte_in_whatever_pieces_it_comes() {
    for nar in archives() {
        for size in [1, 3, 7, 8, 9, 24, 4096, nar.len() - 1, nar.len(), nar.len() + 5] {
            let bytes = [nar.clone(), b"more words".to_vec()].concat();
            let (mut end, mut passed) = (NarEnd::default(), 0);
            for piece in bytes.chunks(size) {
                assert_eq!(end.is_over(), passed == nar.len(), "{size}");
                passed += end.pass(piece);
            }
            assert_eq!((end.is_over(), passed), (true, nar.len()), "{size}");
        }
    }
}

#[test]
fn what_is_no_archive_has_no_end() {
    for bytes in [&[7; 200][..], &[0; 200], b"\x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0and more"] {
        let mut end = NarEnd::default();
        assert_eq!((end.pass(bytes), end.pass(bytes), end.is_over()), (bytes.len(), bytes.len(), false));
    }
    let mut endless = archives().swap_remove(0);
    let contents = endless.len() - 16 - 8 - 8;
    endless[contents..contents + 8].fill(0xff);
    let mut end = NarEnd::default();
    assert_eq!((end.pass(&endless), end.is_over()), (endless.len(), false));
}
