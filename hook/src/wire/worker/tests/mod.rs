use super::greeting::DAEMON_MAGIC;
use super::*;
use crate::wire::hook::{activity, result};

fn version(minor: u8) -> Version {
    Version::new(minor).unwrap()
}

fn path(name: &str) -> StorePath {
    StorePath::from_parts([7; 20], name).unwrap()
}

fn info() -> PathInfo {
    PathInfo {
        path: path("x"),
        deriver: Some(path("x.drv")),
        nar_hash: [0xab; 32],
        nar_size: 120,
        references: [path("x"), path("y")].into(),
        registration_time: 42,
        ultimate: false,
        signatures: vec!["key:sig".into()],
        content_address: Some("fixed:r:sha256:0000".into()),
    }
}

/// A daemon's answer to a question for metadata: what [`put_path_info`] writes, without the path itself.
fn info_answer(info: &PathInfo) -> Vec<u8> {
    let mut whole = Vec::new();
    put_path_info(&mut whole, &StoreDir::default(), info);
    let mut name = Vec::new();
    put_str(&mut name, &StoreDir::default().render_path(&info.path));
    let mut answer = 1u64.to_le_bytes().to_vec();
    answer.extend_from_slice(whole.strip_prefix(name.as_slice()).unwrap());
    answer
}

#[test]
fn versions_out_of_range_are_not_spoken() {
    assert_eq!(Version::new(OLDEST_MINOR - 1), None);
    assert_eq!(Version::new(NEWEST_MINOR + 1), None);
    assert!(!version(22).has_frames() && version(23).has_frames());
    assert!(!version(31).has_add_multiple() && version(32).has_add_multiple());
}

#[test]
fn the_greeting_is_magic_version_and_two_zeros() {
    let mut bytes = Vec::new();
    put_greeting(&mut bytes, version(37));
    let numbers: Vec<u64> =
        bytes.chunks(8).map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap())).collect();
    assert_eq!(numbers, [0x6e697863, 0x125, 0, 0]);
}

fn daemon_greeting(banner: &[u8], version: u64) -> Vec<u8> {
    let mut bytes = banner.to_vec();
    put_u64(&mut bytes, DAEMON_MAGIC);
    put_u64(&mut bytes, version);
    bytes
}

#[test]
fn the_older_of_both_versions_is_taken_and_banners_are_skipped() {
    for (banner, theirs, expected) in
        [(&b""[..], 0x126, 37), (b"Welcome to builder!\nstarted\n", 0x122, 34), (b"oixd", 0x115, 21)]
    {
        let bytes = daemon_greeting(banner, theirs);
        assert_eq!(read_greeting(&mut bytes.as_slice(), Version::newest()).unwrap().minor(), expected);
    }
    let bytes = daemon_greeting(b"", 0x126);
    assert_eq!(read_greeting(&mut bytes.as_slice(), version(30)).unwrap().minor(), 30);
}

#[test]
fn what_is_no_daemon_is_told_with_its_words() {
    let (error, seen) = read_greeting(&mut &b"bash: nix-daemon: not found"[..], version(37)).unwrap_err();
    assert!(matches!(error, WireError::Truncated { .. }));
    assert_eq!(seen, b"bash: nix-daemon: not found");
    let endless = vec![b'y'; MAX_BANNER * 2];
    let (error, _) = read_greeting(&mut endless.as_slice(), version(37)).unwrap_err();
    assert!(matches!(error, WireError::TooLong { .. }));
}

#[test]
fn daemons_that_are_too_old_or_of_another_major_version_are_refused() {
    for theirs in [0x114, 0x215] {
        let bytes = daemon_greeting(b"", theirs);
        let (error, _) = read_greeting(&mut bytes.as_slice(), version(37)).unwrap_err();
        assert!(matches!(error, WireError::Unexpected { .. }), "{theirs:#x}");
    }
}

#[test]
fn version_and_trust_come_with_the_protocols_that_have_them() {
    let mut bytes = Vec::new();
    put_str(&mut bytes, "2.26.3");
    put_u64(&mut bytes, 2);
    let peer = |minor| {
        let mut source = bytes.as_slice();
        let peer = read_peer(&mut source, version(minor)).unwrap();
        (peer.nix_version, peer.trusted, source.len())
    };
    assert_eq!(peer(37), (Some("2.26.3".into()), Some(false), 0));
    assert_eq!(peer(34), (Some("2.26.3".into()), None, 8));
    assert_eq!(peer(32), (None, None, bytes.len()));
}

#[test]
fn a_version_is_short_and_does_nothing_to_a_terminal() {
    let mut bytes = Vec::new();
    put_str(&mut bytes, &format!("2.26\x1b[2J{}", "x".repeat(500)));
    let peer = read_peer(&mut bytes.as_slice(), version(34)).unwrap();
    assert_eq!(peer.nix_version.unwrap(), format!("2.26[2J{}", "x".repeat(93)));
}

#[test]
fn metadata_goes_there_and_back() {
    let store_dir = StoreDir::default();
    let answer = info_answer(&info());
    assert_eq!(read_path_info(&mut answer.as_slice(), &store_dir, &path("x")).unwrap(), Some(info()));
    assert_eq!(read_path_info(&mut &[0; 8][..], &store_dir, &path("x")).unwrap(), None);
    for end in 0..answer.len() {
        assert!(read_path_info(&mut &answer[..end], &store_dir, &path("x")).is_err(), "{end}");
    }
}

#[test]
fn hostile_metadata_is_refused() {
    let store_dir = StoreDir::default();
    let mut with_bad_deriver = Vec::new();
    put_u64(&mut with_bad_deriver, 1);
    put_str(&mut with_bad_deriver, "/etc/passwd\x1b[2J");
    let error = read_path_info(&mut with_bad_deriver.as_slice(), &store_dir, &path("x")).unwrap_err();
    assert_eq!(error.to_string(), "a path's deriver is '/etc/passwd\\u{1b}[2J', expected a store path");
    let mut with_bad_hash = Vec::new();
    put_u64(&mut with_bad_hash, 1);
    put_str(&mut with_bad_hash, "");
    put_str(&mut with_bad_hash, "zz");
    assert!(read_path_info(&mut with_bad_hash.as_slice(), &store_dir, &path("x")).is_err());
}

#[test]
fn every_message_is_understood() {
    let mut bytes = Vec::new();
    put_u64(&mut bytes, MESSAGE_NEXT);
    put_bytes(&mut bytes, b"hello\xff");
    put_u64(&mut bytes, MESSAGE_START);
    for number in [3, 4, activity::BUILD] {
        put_u64(&mut bytes, number);
    }
    put_str(&mut bytes, "building");
    put_u64(&mut bytes, 2);
    put_u64(&mut bytes, 1);
    put_str(&mut bytes, "drv");
    put_u64(&mut bytes, 0);
    put_u64(&mut bytes, 9);
    put_u64(&mut bytes, 0); // parent
    put_u64(&mut bytes, MESSAGE_RESULT);
    put_u64(&mut bytes, 3);
    put_u64(&mut bytes, result::BUILD_LOG_LINE);
    put_u64(&mut bytes, 1);
    put_u64(&mut bytes, 1);
    put_str(&mut bytes, "line");
    put_u64(&mut bytes, MESSAGE_STOP);
    put_u64(&mut bytes, 3);
    put_u64(&mut bytes, MESSAGE_READ);
    put_u64(&mut bytes, 512);
    put_u64(&mut bytes, MESSAGE_LAST);
    let mut source = bytes.as_slice();
    let mut next = || read_message(&mut source, version(34)).unwrap();
    assert_eq!(next(), Message::Text(b"hello\xff".to_vec()));
    let fields = vec![Field::Text(b"drv".to_vec()), Field::Int(9)];
    assert_eq!(
        next(),
        Message::Start { id: 3, level: 4, kind: activity::BUILD, text: b"building".to_vec(), fields }
    );
    let fields = vec![Field::Text(b"line".to_vec())];
    assert_eq!(next(), Message::Result { id: 3, kind: result::BUILD_LOG_LINE, fields });
    assert_eq!(next(), Message::Stop { id: 3 });
    assert_eq!(next(), Message::Read { length: 512 });
    assert_eq!(next(), Message::Last);
    assert!(read_message(&mut &[1; 8][..], version(34)).is_err());
}

#[test]
fn errors_are_read_in_their_old_and_new_form_with_traces() {
    let mut old = Vec::new();
    put_u64(&mut old, MESSAGE_ERROR);
    put_str(&mut old, "no luck");
    put_u64(&mut old, 1);
    let mut new = Vec::new();
    put_u64(&mut new, MESSAGE_ERROR);
    put_str(&mut new, "Error");
    put_u64(&mut new, 0);
    put_str(&mut new, "Error");
    put_str(&mut new, "no luck");
    put_u64(&mut new, 0);
    put_u64(&mut new, 1);
    put_u64(&mut new, 0);
    put_str(&mut new, "while trying");
    let read = |bytes: &Vec<u8>, minor| match read_message(&mut bytes.as_slice(), version(minor)).unwrap() {
        Message::Error(error) => error.message,
        other => panic!("{other:?}"),
    };
    assert_eq!(read(&old, 25), "no luck");
    assert_eq!(read(&new, 26), "no luck\nwhile trying");
}

#[test]
fn build_results_are_read_by_version() {
    let answer = |minor: u8| {
        let mut bytes = Vec::new();
        put_u64(&mut bytes, 3);
        put_str(&mut bytes, "builder failed");
        if minor >= 29 {
            for number in [1, 0, 100, 107] {
                put_u64(&mut bytes, number);
            }
        }
        if minor >= 37 {
            for number in [1, 5000, 0] {
                put_u64(&mut bytes, number);
            }
        }
        if minor >= 28 {
            put_u64(&mut bytes, 1);
            put_str(&mut bytes, "sha256:x!out");
            put_str(&mut bytes, "{}");
        }
        bytes
    };
    for minor in OLDEST_MINOR..=NEWEST_MINOR {
        let bytes = answer(minor);
        let mut source = bytes.as_slice();
        let result = read_build_result(&mut source, version(minor)).unwrap();
        assert!(source.is_empty(), "{minor} left {} bytes", source.len());
        assert_eq!((result.status, result.message.as_str()), (3, "builder failed"));
        assert_eq!(result.outcome(false), Outcome::Failed);
    }
}

#[test]
fn outcomes_tell_success_timeouts_and_failures_apart() {
    let outcome = |status| BuildResult { status, message: String::new() }.outcome(false);
    for status in [0, 1, 2, 13] {
        assert_eq!(outcome(status), Outcome::Built, "{status}");
    }
    assert_eq!(outcome(8), Outcome::TimedOut);
    assert_eq!(outcome(10), Outcome::NotThere);
    assert_eq!(outcome(6), Outcome::NotThere);
    assert_eq!(BuildResult { status: 6, message: String::new() }.outcome(true), Outcome::Failed);
    for status in [3, 4, 5, 7, 11, 12, 99] {
        assert_eq!(outcome(status), Outcome::Failed, "{status}");
    }
}

#[test]
fn a_fixed_output_and_structured_attributes_are_sent_as_they_stand_in_the_derivation() {
    let store_dir = StoreDir::default();
    let hash = "a".repeat(64);
    let out = path("f");
    let text = format!(
        r#"Derive([("out","{}","r:sha256","{hash}")],[],[],"x86_64-linux","/bin/sh",["-c"],[("__json","{{\"b\":1,\"a\":2}}"),("out","x")])"#,
        store_dir.render_path(&out)
    );
    // The output's path is made from its hash, so the one in the text has to be put right first.
    let made = CAHash::from_parts(
        nix_derivation::ContentAddressMethod::Nar,
        nix_derivation::HashAlgorithm::Sha256,
        &[0xaa; 32],
    )
    .map(|ca| store_dir.build_ca_path("f", &ca, std::iter::empty::<&StorePath>(), false))
    .unwrap()
    .unwrap();
    let text = text.replace(&store_dir.render_path(&out), &store_dir.render_path(&made));
    let drv = Derivation::from_aterm_bytes(text.as_bytes(), "f").unwrap();
    let mut bytes = Vec::new();
    put_build_derivation(&mut bytes, &store_dir, &path("f.drv"), &drv, [path("in")].iter());
    let mut source = bytes.as_slice();
    let text = |s: &mut &[u8]| read_string(s, "x", MAX_STRING).unwrap();
    assert_eq!(read_u64(&mut source, "op").unwrap(), OP_BUILD_DERIVATION);
    assert_eq!(text(&mut source), store_dir.render_path(&path("f.drv")));
    assert_eq!(read_u64(&mut source, "outputs").unwrap(), 1);
    let output: Vec<String> = (0..4).map(|_| text(&mut source)).collect();
    assert_eq!(output, ["out", &store_dir.render_path(&made), "r:sha256", &hash]);
    assert_eq!(read_paths(&mut source, &store_dir, 9).unwrap(), [path("in")].into());
    assert_eq!([text(&mut source), text(&mut source)], ["x86_64-linux", "/bin/sh"]);
    assert_eq!(read_list(&mut source, "args", 9, |s| read_string(s, "x", 10)).unwrap(), ["-c"]);
    assert_eq!(read_u64(&mut source, "environment").unwrap(), 2);
    let environment: Vec<String> = (0..4).map(|_| text(&mut source)).collect();
    assert_eq!(environment, ["out", "x", "__json", r#"{"b":1,"a":2}"#]);
    assert_eq!(read_u64(&mut source, "mode").unwrap(), 0);
    assert!(source.is_empty());
}

#[test]
fn questions_have_the_form_of_their_version() {
    let store_dir = StoreDir::default();
    let question = |minor| {
        let mut bytes = Vec::new();
        put_query_valid_paths(&mut bytes, version(minor), &store_dir, [path("x")].iter(), true);
        bytes
    };
    assert_eq!(question(27).len(), question(26).len() + 8);
    assert_eq!(question(27).last_chunk::<8>(), Some(&1u64.to_le_bytes()));
}

#[test]
fn builds_of_outputs_are_asked_for_in_the_form_of_their_version() {
    let store_dir = StoreDir::default();
    for minor in OLDEST_MINOR..=NEWEST_MINOR {
        let mut bytes = Vec::new();
        put_build_paths(&mut bytes, version(minor), &store_dir, &path("x.drv"), ["dev", "out"].into_iter());
        let mut source = bytes.as_slice();
        let expected = if minor < 34 { OP_BUILD_PATHS } else { OP_BUILD_PATHS_WITH_RESULTS };
        assert_eq!(read_u64(&mut source, "op").unwrap(), expected, "{minor}");
        let paths = read_list(&mut source, "paths", 9, |s| read_string(s, "x", MAX_STRING)).unwrap();
        assert_eq!(paths, [format!("{}!dev,out", store_dir.render_path(&path("x.drv")))], "{minor}");
        assert_eq!((read_u64(&mut source, "mode").unwrap(), source.len()), (0, 0), "{minor}");
    }
}

#[test]
fn the_result_of_one_derivation_is_read_and_no_other_number_of_them() {
    let answer = |count: u64| {
        let mut bytes = Vec::new();
        put_u64(&mut bytes, count);
        for _ in 0..count {
            put_str(&mut bytes, "/nix/store/x.drv!out");
            put_u64(&mut bytes, 2);
            put_str(&mut bytes, "was there");
            for number in [0, 0, 0, 0, 0] {
                put_u64(&mut bytes, number);
            }
        }
        bytes
    };
    let mut bytes = answer(1);
    let mut source = bytes.as_slice();
    let result = read_keyed_build_result(&mut source, version(34)).unwrap();
    assert_eq!((result.outcome(false), result.message.as_str()), (Outcome::Built, "was there"));
    assert!(source.is_empty());
    for count in [0, 2] {
        let error = read_keyed_build_result(&mut answer(count).as_slice(), version(34)).unwrap_err();
        assert!(matches!(error, WireError::Unexpected { .. }), "{count}: {error}");
    }
    bytes.truncate(bytes.len() - 8);
    assert!(read_keyed_build_result(&mut bytes.as_slice(), version(34)).is_err());
}

#[test]
fn an_error_of_an_older_daemon_is_a_failure_or_a_timeout() {
    let outcome = |message: &str| BuildResult::failed(message.into()).outcome(false);
    assert_eq!(outcome("builder for 'x' failed with exit code 5"), Outcome::Failed);
    assert_eq!(outcome("building of 'x' timed out after 5 seconds of silence"), Outcome::TimedOut);
    assert_eq!(BuildResult::built().outcome(false), Outcome::Built);
}

#[test]
fn of_what_is_missing_the_substitutable_is_kept() {
    let store_dir = StoreDir::default();
    let mut bytes = Vec::new();
    for names in [&["a"][..], &["b", "c"], &["d"]] {
        put_strings(&mut bytes, names.iter().map(|name| store_dir.render_path(&path(name))));
    }
    put_u64(&mut bytes, 1);
    put_u64(&mut bytes, 2);
    let mut source = bytes.as_slice();
    assert_eq!(read_missing(&mut source, &store_dir).unwrap(), [path("b"), path("c")].into());
    assert!(source.is_empty());
    for end in 0..bytes.len() {
        assert!(read_missing(&mut &bytes[..end], &store_dir).is_err(), "{end}");
    }
}
