use super::*;
use crate::wire::put_bytes;

fn version(minor: u8) -> Version {
    Version::new(minor).unwrap()
}

fn path(name: &str) -> StorePath {
    StorePath::from_parts([7; 20], name).unwrap()
}

fn greeting(banner: &[u8], version: u64) -> Vec<u8> {
    let mut bytes = banner.to_vec();
    put_u64(&mut bytes, SERVER_MAGIC);
    put_u64(&mut bytes, version);
    bytes
}

/// What a server of that version answers of one path.
fn answer(version: Version, path: &StorePath) -> Vec<u8> {
    let store_dir = StoreDir::default();
    let mut bytes = Vec::new();
    put_str(&mut bytes, &store_dir.render_path(path));
    put_str(&mut bytes, &store_dir.render_path(&self::path("x.drv")));
    put_strings(&mut bytes, [store_dir.render_path(&self::path("y"))].iter());
    put_u64(&mut bytes, 120);
    put_u64(&mut bytes, 120);
    if version.has_hashes() {
        // Of no bytes, in the alphabet of Nix.
        put_str(&mut bytes, "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73");
        put_str(&mut bytes, "");
        put_strings(&mut bytes, ["key:sig"].iter());
    }
    bytes
}

#[test]
fn versions_out_of_range_are_not_spoken() {
    assert_eq!(Version::new(OLDEST_MINOR - 1), None);
    assert_eq!(Version::new(NEWEST_MINOR + 1), None);
    assert!(!version(3).has_hashes() && version(4).has_hashes());
    assert!(!version(4).has_add_to_store() && version(5).has_add_to_store());
}

#[test]
fn the_greeting_is_magic_and_version() {
    let mut bytes = Vec::new();
    put_greeting(&mut bytes, version(7));
    assert_eq!(bytes, [[0xeb, 0x9d, 0x0c, 0x39, 0, 0, 0, 0], [7, 2, 0, 0, 0, 0, 0, 0]].concat());
}

#[test]
fn the_older_of_both_versions_is_taken_and_banners_are_skipped() {
    for (banner, theirs, expected) in
        [(&b""[..], 0x207, 7), (b"Welcome!\n", 0x208, 7), (b"\xcb\xee", 0x201, 1), (b"", 0x205, 5)]
    {
        let bytes = greeting(banner, theirs);
        assert_eq!(read_greeting(&mut bytes.as_slice(), Version::newest()).unwrap().minor(), expected);
    }
    assert_eq!(read_greeting(&mut greeting(b"", 0x207).as_slice(), version(4)).unwrap().minor(), 4);
}

#[test]
fn servers_that_are_too_old_and_what_is_no_server_are_refused() {
    for theirs in [0x200, 0x101, 0x301, u64::MAX] {
        let (error, _) = read_greeting(&mut greeting(b"", theirs).as_slice(), version(7)).unwrap_err();
        assert!(matches!(error, WireError::Unexpected { .. }), "{theirs:#x}");
    }
    let (error, seen) = read_greeting(&mut &b"not for you\n"[..], version(7)).unwrap_err();
    assert!(matches!(error, WireError::Truncated { .. }));
    assert_eq!(seen, b"not for you\n");
    let endless = vec![b'y'; worker::MAX_BANNER * 2];
    let (error, _) = read_greeting(&mut endless.as_slice(), version(7)).unwrap_err();
    assert!(matches!(error, WireError::TooLong { .. }));
    let whole = greeting(b"hello", 0x207);
    for end in 0..whole.len() {
        assert!(read_greeting(&mut &whole[..end], version(7)).is_err(), "{end}");
    }
}

#[test]
fn the_question_for_valid_paths_is_numbers_and_a_list() {
    let mut bytes = Vec::new();
    put_query_valid_paths(&mut bytes, &StoreDir::default(), [path("x")].iter(), true, false);
    let mut expected = Vec::new();
    for number in [1, 1, 0, 1] {
        put_u64(&mut expected, number);
    }
    put_str(&mut expected, &StoreDir::default().render_path(&path("x")));
    assert_eq!(bytes, expected);
}

#[test]
fn metadata_is_understood_in_every_version_and_cut_nowhere() {
    let store_dir = StoreDir::default();
    let asked = [path("a"), path("x"), path("z")];
    for minor in OLDEST_MINOR..=NEWEST_MINOR {
        let version = version(minor);
        let mut bytes = [answer(version, &path("x")), answer(version, &path("a"))].concat();
        put_str(&mut bytes, "");
        let infos = read_path_infos(&mut bytes.as_slice(), version, &store_dir, &asked).unwrap();
        let paths: Vec<&StorePath> = infos.iter().map(|info| &info.info.path).collect();
        assert_eq!(paths, [&path("x"), &path("a")]);
        let first = &infos[0];
        assert_eq!(first.has_hash, minor >= 4);
        assert_eq!((first.info.nar_size, first.info.nar_hash[0]), (120, if minor >= 4 { 0xe3 } else { 0 }));
        assert_eq!(first.info.references, [path("y")].into());
        assert_eq!(first.info.deriver, Some(path("x.drv")));
        assert_eq!(first.info.signatures.len(), usize::from(minor >= 4));
        for end in 0..bytes.len() {
            assert!(read_path_infos(&mut &bytes[..end], version, &store_dir, &asked).is_err(), "{end}");
        }
    }
}

#[test]
fn metadata_of_strangers_or_twice_and_endless_lists_are_refused() {
    let store_dir = StoreDir::default();
    let read = |bytes: &[u8]| read_path_infos(&mut &bytes[..], version(7), &store_dir, &[path("x")]);
    let stranger = answer(version(7), &path("stranger"));
    assert!(read(&stranger).unwrap_err().to_string().contains("a path that was asked for"));
    let twice = [answer(version(7), &path("x")), answer(version(7), &path("x"))].concat();
    assert!(read(&twice).unwrap_err().to_string().contains("a path that was asked for"));
    let mut endless = Vec::new();
    put_str(&mut endless, &store_dir.render_path(&path("x")));
    put_str(&mut endless, "");
    put_u64(&mut endless, u64::MAX);
    assert!(matches!(read(&endless), Err(WireError::TooMany { .. })));
    let long = (u64::from(u32::MAX)).to_le_bytes();
    assert!(matches!(read(&long), Err(WireError::TooLong { .. })));
}

fn hostile_hash() -> Vec<u8> {
    let mut bytes = Vec::new();
    put_str(&mut bytes, &StoreDir::default().render_path(&path("x")));
    put_str(&mut bytes, "");
    put_u64(&mut bytes, 0);
    put_u64(&mut bytes, 1);
    put_u64(&mut bytes, 1);
    put_bytes(&mut bytes, b"md5:\x1b[2J");
    bytes
}

#[test]
fn a_hash_that_is_none_is_refused_and_cannot_paint_the_terminal() {
    let error =
        read_path_infos(&mut hostile_hash().as_slice(), version(7), &StoreDir::default(), &[path("x")])
            .unwrap_err();
    assert_eq!(error.to_string(), "a path's NAR hash is 'md5:\\u{1b}[2J', expected a SHA-256 digest");
}

/// The answer to a build, as a server of that version gives it.
fn result(minor: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_u64(&mut bytes, 3);
    put_str(&mut bytes, "it failed");
    if minor >= 3 {
        for number in [1, 0, 100, 200] {
            put_u64(&mut bytes, number);
        }
    }
    if minor >= 6 {
        put_u64(&mut bytes, 1);
        put_str(&mut bytes, "sha256:00!out");
        put_str(&mut bytes, "{}");
    }
    bytes
}

#[test]
fn results_are_understood_in_every_version_and_cut_nowhere() {
    for minor in OLDEST_MINOR..=NEWEST_MINOR {
        let bytes = result(minor);
        let mut source = bytes.as_slice();
        let read = read_build_result(&mut source, version(minor)).unwrap();
        assert_eq!((read.status, read.message.as_str(), source.len()), (3, "it failed", 0), "2.{minor}");
        for end in 0..bytes.len() {
            assert!(read_build_result(&mut &bytes[..end], version(minor)).is_err(), "2.{minor} {end}");
        }
    }
}

#[test]
fn an_import_is_answered_with_one() {
    assert!(read_success(&mut &1u64.to_le_bytes()[..]).is_ok());
    assert!(matches!(read_success(&mut &0u64.to_le_bytes()[..]), Err(WireError::Unexpected { .. })));
    assert!(read_success(&mut &[1, 0][..]).is_err());
}

#[test]
fn options_of_a_build_grow_with_the_version() {
    let drv_path = path("x.drv");
    let text = br#"Derive([("out","/nix/store/70w3gcs7g1w3gcs7g1w3gcs7g1w3gcs7-x","","")],[],[],"x86_64-linux","/bin/sh",[],[("out","/nix/store/70w3gcs7g1w3gcs7g1w3gcs7g1w3gcs7-x")])"#;
    let drv = Derivation::from_aterm_bytes_in(text, "x", StoreDir::default()).unwrap();
    let options = BuildOptions { max_silent_time: 5, timeout: 6, keep_failed: true };
    let lengths: Vec<usize> = (OLDEST_MINOR..=NEWEST_MINOR)
        .map(|minor| {
            let mut bytes = Vec::new();
            let inputs = [].iter();
            let (dir, version) = (StoreDir::default(), version(minor));
            put_build_derivation(&mut bytes, version, &dir, &drv_path, &drv, inputs, options);
            bytes.len()
        })
        .collect();
    let grown: Vec<usize> = lengths.iter().map(|length| (length - lengths[0]) / 8).collect();
    assert_eq!(grown, [0, 1, 3, 3, 3, 3, 4]);
}
