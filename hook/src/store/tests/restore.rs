use super::*;
use nix_derivation::{ContentAddressMethod, HashAlgorithm, hash_bytes};
use std::io::{self, Read};

fn source_path(name: &str, address: &CAHash) -> StorePath {
    nix_derivation::store_path::build_ca_path(name, address, [], false).unwrap()
}

#[test]
fn a_nasty_tree_is_as_nix_makes_it() {
    let (theirs, ours) = (World::new(), World::new());
    let tree = theirs.dir.path().join("tree");
    nasty_tree(&tree);
    let added = theirs.nix_line(&["--add", tree.to_str().unwrap()]);
    let path: StorePath = added.parse().unwrap();
    let expected = theirs.query().path_info(&path).unwrap().unwrap();
    let mut nar = Vec::new();
    dump(&theirs.location, &path, &mut nar).unwrap();
    assert_eq!(nar, dump_by_nix(&tree));
    assert_eq!(nar, dump_by_nix(&theirs.location.real_path(&path)));

    let address = CAHash::parse(expected.content_address.as_deref().unwrap()).unwrap();
    for fsync_store_paths in [false, true] {
        let restored = restore(
            &ours.location,
            &ours.registrar(),
            &path,
            &mut nar.as_slice(),
            &Expected {
                nar_size: expected.nar_size,
                nar_hash: Some(expected.nar_hash),
                content_address: Some(&address),
            },
            &Durability { fsync_store_paths, ..Durability::default() },
        )
        .unwrap();
        assert_eq!(restored, Restored { nar_hash: expected.nar_hash, nar_size: expected.nar_size });
        assert_eq!(metadata(&ours.location.real_path(&path)), metadata(&theirs.location.real_path(&path)));
    }

    ours.register(std::slice::from_ref(&expected)).unwrap();
    ours.verify();
    assert_eq!(ours.row(&path), theirs.row(&path));
    assert_eq!(ours.nix_line(&["-q", "--hash", &added]), theirs.nix_line(&["-q", "--hash", &added]));
    assert_eq!(ours.nix_line(&["-q", "--size", &added]), nar.len().to_string());
    assert_eq!(ours.nix(&["--dump", ours.location.real_path(&path).to_str().unwrap()]), nar);
}

#[test]
fn roots_may_be_files_and_symlinks() {
    let world = World::new();
    let source = world.dir.path().join("source");
    fs::write(&source, b"run me").unwrap();
    fs::set_permissions(&source, fs::Permissions::from_mode(0o755)).unwrap();
    let file = store_path("file");
    world.import(&file, &dump_by_nix(&source), &[]);
    fs::remove_file(&source).unwrap();
    symlink("nowhere", &source).unwrap();
    let link = store_path("link");
    world.import(&link, &dump_by_nix(&source), &[]);
    world.verify();
    let mode = |path: &StorePath| fs::symlink_metadata(world.location.real_path(path)).unwrap().mode();
    assert_eq!(mode(&file), 0o100_555);
    assert_eq!(mode(&link), 0o120_777);
    assert_eq!(fs::symlink_metadata(world.location.real_path(&link)).unwrap().mtime(), 1);
}

#[test]
fn a_leftover_is_replaced_whatever_it_is() {
    let world = World::new();
    let path = store_path("out");
    let place = world.location.real_path(&path);
    let outside = world.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("keep"), b"").unwrap();
    let nar = file_nar(b"new", false);

    fs::create_dir_all(place.join("a/b")).unwrap();
    fs::write(place.join("a/b/file"), b"old").unwrap();
    symlink(&outside, place.join("a/link")).unwrap();
    for (dir, mode) in [("a/b", 0), ("a", 0o555), ("", 0o555)] {
        fs::set_permissions(place.join(dir), fs::Permissions::from_mode(mode)).unwrap();
    }
    world.restore(&path, &nar, None).unwrap();
    assert_eq!(fs::read(&place).unwrap(), b"new");

    world.restore(&path, &nar, None).unwrap();
    fs::remove_file(&place).unwrap();
    symlink(&outside, &place).unwrap();
    world.restore(&path, &nar, None).unwrap();
    assert!(fs::symlink_metadata(&place).unwrap().is_file());
    assert!(outside.join("keep").exists());
}

#[test]
fn a_broken_stream_leaves_nothing_behind() {
    let world = World::new();
    let tree = world.dir.path().join("tree");
    nasty_tree(&tree);
    let nar = dump_by_nix(&tree);
    let path = store_path("out");
    let nar_size = nar.len() as u64;
    let expected = Expected { nar_size, nar_hash: None, content_address: None };
    for length in [0, 3, 20, 24, 100, 5000, nar.len() / 2, nar.len() - 9, nar.len() - 1] {
        let error = world.restore_from(&path, &mut &nar[..length], &expected).unwrap_err();
        assert!(
            matches!(error, RestoreError::Truncated { got, .. } if got == length as u64),
            "{length}: {error:?}"
        );
        assert!(fs::symlink_metadata(world.location.real_path(&path)).is_err());
    }
    let mut breaks = (&nar[..70_000]).chain(Broken);
    let error = world.restore_from(&path, &mut breaks, &expected).unwrap_err();
    assert!(
        matches!(&error, RestoreError::Read { source, .. } if source.to_string() == "the link died"),
        "{error:?}"
    );
    assert_eq!(fs::read_dir(&world.location.real_store_dir).unwrap().count(), 1, "only .links");
}

struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::other("the link died"))
    }
}

#[test]
fn the_announced_size_must_be_right_and_no_byte_more_is_read() {
    let world = World::new();
    let path = store_path("out");
    let mut stream = file_nar(b"contents", false);
    let size = stream.len() as u64;
    stream.extend_from_slice(b"the next message");
    let go = |nar_size| {
        let mut rest = stream.as_slice();
        let expected = Expected { nar_size, nar_hash: None, content_address: None };
        let result = world.restore_from(&path, &mut rest, &expected);
        (result, rest.len())
    };
    let (restored, rest) = go(size);
    assert_eq!(restored.unwrap().nar_size, size);
    assert_eq!(rest, b"the next message".len());
    let longer = go(size - 8).0.unwrap_err();
    assert!(matches!(longer, RestoreError::Size { longer: true, .. }), "{longer:?}");
    let shorter = go(size + 8).0.unwrap_err();
    assert!(matches!(shorter, RestoreError::Size { longer: false, .. }), "{shorter:?}");
    assert!(!world.location.real_path(&path).exists());
}

#[test]
fn a_wrong_nar_hash_is_refused() {
    let world = World::new();
    let path = store_path("out");
    let nar = file_nar(b"contents", false);
    let expected = Expected { nar_size: nar.len() as u64, nar_hash: Some([1; 32]), content_address: None };
    let error = world.restore_from(&path, &mut nar.as_slice(), &expected).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(&format!("hash mismatch importing path '{path}'")), "{text}");
    assert!(text.contains(&sha256(&nar).to_sri_string()), "{text}");
    assert!(!world.location.real_path(&path).exists());
}

/// A directory with these raw names, each an empty file.
fn directory_nar(names: &[&[u8]]) -> Vec<u8> {
    let mut nar = Vec::new();
    let mut put = |token: &[u8]| {
        nar.extend_from_slice(&(token.len() as u64).to_le_bytes());
        nar.extend_from_slice(token);
        nar.resize(nar.len().next_multiple_of(8), 0);
    };
    for token in ["nix-archive-1", "(", "type", "directory"] {
        put(token.as_bytes());
    }
    for name in names {
        for token in [b"entry".as_slice(), b"(", b"name", name, b"node", b"(", b"type", b"regular"] {
            put(token);
        }
        for token in ["contents", "", ")", ")"] {
            put(token.as_bytes());
        }
    }
    put(b")");
    nar
}

#[test]
fn hostile_names_are_refused() {
    let world = World::new();
    let path = store_path("out");
    world.restore(&path, &directory_nar(&[b"a", b"b"]), None).unwrap();
    let hostile: [&[&[u8]]; 9] = [
        &[b""],
        &[b"."],
        &[b".."],
        &[b"../../escape"],
        &[b"/etc/passwd"],
        &[b"a/b"],
        &[b"a\0b"],
        &[b"b", b"a"],
        &[b"a", b"a"],
    ];
    for names in hostile {
        let error = world.restore(&path, &directory_nar(names), None).unwrap_err();
        assert!(matches!(error, RestoreError::Archive { .. }), "{names:?}: {error:?}");
        assert!(!world.location.real_path(&path).exists());
    }
    let long = "n".repeat(256);
    let error = world.restore(&path, &directory_nar(&[long.as_bytes()]), None).unwrap_err();
    assert!(matches!(&error, RestoreError::Write { action: "create", .. }), "{error:?}");
}

#[test]
fn endless_nesting_and_lengths_are_refused() {
    let world = World::new();
    let path = store_path("out");
    let mut nar = directory_nar(&[]);
    nar.truncate(nar.len() - 16);
    let (head, body) = nar.split_at(24);
    let mut entry = Vec::new();
    let named = directory_nar(&[b"d"]);
    // From "entry" up to the node, which is a directory again.
    entry.extend_from_slice(&named[nar.len()..nar.len() + 80]);
    let mut deep = head.to_vec();
    for _ in 0..10_000 {
        deep.extend_from_slice(body);
        deep.extend_from_slice(&entry);
    }
    let error = world.restore(&path, &deep, None).unwrap_err();
    assert!(matches!(&error, RestoreError::TooDeep { limit: 64, .. }), "{error:?}");
    let mut huge = file_nar(b"x", false);
    let at = huge.len() - 32;
    huge[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(world.restore(&path, &huge, None).is_err());
    assert!(!world.location.real_path(&path).exists());
}

#[test]
fn fixed_outputs_are_checked_by_every_method() {
    let world = World::new();
    let contents = b"fixed contents";
    let nar = file_nar(contents, false);
    let algorithms = [HashAlgorithm::Md5, HashAlgorithm::Sha1, HashAlgorithm::Sha256, HashAlgorithm::Sha512];
    let mut infos = Vec::new();
    for algorithm in algorithms {
        for (method, bytes) in
            [(ContentAddressMethod::Flat, contents.as_slice()), (ContentAddressMethod::Nar, &nar)]
        {
            let right = hash_bytes(algorithm, bytes);
            let right = CAHash::from_parts(method, algorithm, right.digest_as_bytes()).unwrap();
            let path = source_path(&format!("{algorithm}-{method}"), &right);
            let restored = world.restore(&path, &nar, Some(&right)).unwrap();
            infos.push(PathInfo {
                content_address: Some(right.to_nix_string()),
                ..info(&path, &restored, &[])
            });

            let wrong = hash_bytes(algorithm, b"other");
            let wrong = CAHash::from_parts(method, algorithm, wrong.digest_as_bytes()).unwrap();
            let path = source_path("wrong", &wrong);
            let text = world.restore(&path, &nar, Some(&wrong)).unwrap_err().to_string();
            let (specified, got) = (wrong.hash().to_sri_string(), right.hash().to_sri_string());
            assert!(
                text.contains(&format!("'{path}':\n  specified: {specified}\n     got:    {got}")),
                "{text}"
            );
            assert!(!world.location.real_path(&path).exists());
        }
    }
    world.register(&infos).unwrap();
    world.verify();
    let NixHash::Sha256(digest) = sha256(contents) else { panic!() };
    let text = CAHash::Text(digest);
    world.restore(&source_path("text", &text), &nar, Some(&text)).unwrap();
}

#[test]
fn flat_outputs_must_be_plain_files() {
    let world = World::new();
    let flat = CAHash::Flat(sha256(b"x"));
    let path = source_path("flat", &flat);
    let link = world.dir.path().join("link");
    symlink("x", &link).unwrap();
    for nar in [file_nar(b"x", true), directory_nar(&[b"x"]), dump_by_nix(&link)] {
        let error = world.restore(&path, &nar, Some(&flat)).unwrap_err();
        assert!(matches!(error, RestoreError::NotFlat { .. }), "{error:?}");
        assert!(!world.location.real_path(&path).exists());
    }
}

#[test]
fn a_missing_store_directory_is_named() {
    let world = World::new();
    let store = &world.location.real_store_dir;
    fs::rename(store, store.with_extension("gone")).unwrap();
    let error = world.restore(&store_path("out"), &file_nar(b"", false), None).unwrap_err();
    assert!(error.to_string().contains(store.to_str().unwrap()), "{error}");
}

#[test]
fn what_is_valid_is_never_replaced() {
    let world = World::new();
    let path = store_path("out");
    let nar = file_nar(b"ours", false);
    let info = world.import(&path, &nar, &[]);
    let before = metadata(&world.location.real_path(&path));
    let inode = fs::symlink_metadata(world.location.real_path(&path)).unwrap().ino();
    let take = |nar: &[u8]| {
        let nar_hash = hash_bytes(HashAlgorithm::Sha256, nar).digest_as_bytes().try_into().unwrap();
        let expected =
            Expected { nar_size: nar.len() as u64, nar_hash: Some(nar_hash), content_address: None };
        world.restore_from(&path, &mut &nar[..], &expected)
    };
    for nar in [&nar, &file_nar(b"other", false)] {
        let error = take(nar).unwrap_err();
        assert!(matches!(error, RestoreError::Valid { .. }), "{error:?}");
    }
    assert_eq!(metadata(&world.location.real_path(&path)), before);
    assert_eq!(fs::symlink_metadata(world.location.real_path(&path)).unwrap().ino(), inode);

    fs::remove_file(world.location.real_path(&path)).unwrap();
    let error = take(&file_nar(b"other", false)).unwrap_err();
    assert!(matches!(error, RestoreError::ValidOtherwise { .. }), "{error:?}");
    let unknown = world.restore(&path, &nar, None).unwrap_err();
    assert!(matches!(unknown, RestoreError::ValidOtherwise { .. }), "{unknown:?}");
    assert!(!world.location.real_path(&path).exists());
    assert_eq!(take(&nar).unwrap().nar_hash, info.nar_hash);
    world.verify();
}
