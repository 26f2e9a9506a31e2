//! A peer that says what a real daemon never would, or goes away in the middle.

use crate::real::stream;
use nix_derivation::{StoreDir, StorePath};
use nix_offload::builder::{Ahead, Builder, BuilderError};
use nix_offload::path_info::PathInfo;
use nix_offload::wire::worker::Version;
use nix_offload::wire::{put_str, put_u64};
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

const LAST: u64 = 0x616c_7473;
const BOUND: Duration = Duration::from_secs(20);

fn path(name: &str) -> StorePath {
    StorePath::from_parts([1; 20], name).unwrap()
}

fn greeting() -> Vec<u8> {
    let mut bytes = Vec::new();
    put_u64(&mut bytes, 0x6478_696f);
    put_u64(&mut bytes, 0x125);
    put_str(&mut bytes, "2.99");
    put_u64(&mut bytes, 1);
    put_u64(&mut bytes, LAST);
    bytes
}

/// A peer that hears our greeting, says `bytes` and, if it is to stay, goes on listening until we leave.
fn peer(bytes: Vec<u8>, stay: bool) -> UnixStream {
    const GREETING: usize = 32;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let _ = theirs.read_exact(&mut [0; GREETING]);
        let _ = theirs.write_all(&bytes);
        if stay {
            let _ = io::copy(&mut theirs, &mut io::sink());
        }
    });
    ours
}

fn connect(bytes: Vec<u8>, stay: bool, bound: Duration) -> Result<Builder, BuilderError> {
    Builder::connect(
        stream(peer(bytes, stay)),
        StoreDir::default(),
        Version::newest(),
        bound,
        Ahead::default(),
    )
}

fn after_greeting(bytes: &[u8], stay: bool) -> Builder {
    connect([greeting(), bytes.to_vec()].concat(), stay, BOUND).unwrap()
}

fn info(nar_size: u64) -> PathInfo {
    PathInfo {
        path: path("x"),
        deriver: None,
        nar_hash: [0; 32],
        nar_size,
        references: BTreeSet::new(),
        registration_time: 0,
        ultimate: false,
        signatures: Vec::new(),
        content_address: None,
    }
}

#[test]
fn a_peer_that_says_nothing_is_given_up_in_time() {
    let begin = Instant::now();
    let error = connect(Vec::new(), true, Duration::from_millis(300)).err().unwrap();
    assert!(matches!(error, BuilderError::NoAnswer { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_peer_that_drips_is_given_up_in_time_too() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        while theirs.write_all(b"z").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let begin = Instant::now();
    let bound = Duration::from_millis(300);
    let error =
        Builder::connect(stream(ours), StoreDir::default(), Version::newest(), bound, Ahead::default())
            .err()
            .unwrap();
    assert!(matches!(error, BuilderError::NoAnswer { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn words_instead_of_a_greeting_are_quoted() {
    let error = connect(b"This account is not available.\n".to_vec(), false, BOUND).err().unwrap();
    assert_eq!(error.to_string(), "no Nix daemon answered; instead came 'This account is not available.'");
}

#[test]
fn every_truncation_of_the_greeting_is_a_lost_connection_or_no_daemon() {
    let whole = greeting();
    for end in 0..whole.len() {
        let error = connect(whole[..end].to_vec(), false, BOUND).err().unwrap();
        assert!(error.is_transport(), "{end}: {error}");
    }
}

#[test]
fn answers_that_break_off_are_a_lost_connection() {
    let mut builder = after_greeting(&LAST.to_le_bytes(), false);
    let error = builder.path_infos(&[path("x")], &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuilderError::Lost { .. }), "{error}");
}

#[test]
fn answers_out_of_the_protocol_are_no_reason_to_try_again() {
    let mut builder = after_greeting(&[0xee; 64], true);
    let error = builder.path_infos(&[path("x")], &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuilderError::Protocol { .. }) && !error.is_transport(), "{error}");
}

fn read_all(_: &PathInfo, nar: &mut dyn Read) -> io::Result<()> {
    io::copy(nar, &mut io::sink()).map(drop)
}

#[test]
fn a_nar_that_breaks_off_is_a_lost_connection_and_not_the_receivers_fault() {
    let mut bytes = LAST.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0; 1000]);
    let error = after_greeting(&bytes, false).nars(&[info(5000)], read_all, &mut |_| {}).unwrap_err();
    assert!(error.is_transport(), "{error}");
}

#[test]
fn a_receiver_sees_no_byte_beyond_the_nar() {
    let mut bytes = LAST.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[7; 100]);
    bytes.extend_from_slice(&LAST.to_le_bytes());
    bytes.extend_from_slice(&[8; 50]);
    let mut seen = Vec::new();
    let receive = |_: &PathInfo, nar: &mut dyn Read| {
        let mut bytes = Vec::new();
        nar.read_to_end(&mut bytes)?;
        seen.push(bytes);
        io::Result::Ok(())
    };
    after_greeting(&bytes, true).nars(&[info(100), info(50)], receive, &mut |_| {}).unwrap();
    assert_eq!(seen, [vec![7; 100], vec![8; 50]]);
}

#[test]
fn a_receiver_that_stops_early_ends_the_talk() {
    let mut bytes = LAST.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[7; 100]);
    let receive = |_: &PathInfo, _: &mut dyn Read| io::Result::Ok(());
    let error = after_greeting(&bytes, true).nars(&[info(100)], receive, &mut |_| {}).unwrap_err();
    assert!(matches!(error, BuilderError::Protocol { .. }), "{error}");
}

/// As after a crash that left a file of a valid path empty: the archive ends before its time, and the daemon waits for
/// the next request.
#[test]
fn an_archive_that_is_shorter_than_was_said_is_noticed_at_its_end() {
    let mut nar = Vec::new();
    nix_archive::nar::encode_regular(&mut nar, b"", false).unwrap();
    let size = nar.len() as u64;
    let answer = [&LAST.to_le_bytes()[..], &nar].concat();
    for (bytes, infos) in [
        (answer.clone(), vec![info(size + 1000)]),
        // The answer for the next one is there as well.
        ([answer.clone(), answer.clone()].concat(), vec![info(size + 8), info(size)]),
    ] {
        let mut seen = Vec::new();
        let receive = |_: &PathInfo, nar: &mut dyn Read| nar.read_to_end(&mut seen).map(drop);
        let error = after_greeting(&bytes, true).nars(&infos, receive, &mut |_| {}).unwrap_err();
        assert!(matches!(error, BuilderError::Protocol { .. }), "{error}");
        assert_eq!(seen, nar);
    }
}

#[test]
fn a_daemon_that_refuses_an_upload_and_reads_no_further_does_not_hang_us() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (done, wait) = std::sync::mpsc::channel::<()>();
    thread::spawn(move || {
        let _ = theirs.write_all(&greeting());
        let mut refusal = Vec::new();
        put_u64(&mut refusal, 0x6378_7470);
        for text in ["Error", "", "Error", "out of memory"] {
            if text.is_empty() { put_u64(&mut refusal, 0) } else { put_str(&mut refusal, text) }
        }
        put_u64(&mut refusal, 0);
        put_u64(&mut refusal, 0);
        let _ = theirs.write_all(&refusal);
        // It stays and reads nothing, until the test is over.
        let _ = wait.recv();
    });
    let mut builder =
        Builder::connect(stream(ours), StoreDir::default(), Version::newest(), BOUND, Ahead::default())
            .unwrap();
    let dump = |_: &StorePath, to: &mut dyn Write| (0..1000).try_for_each(|_| to.write_all(&[0; 65536]));
    let error = builder
        .upload(&[&[info(65_536_000)]], &dump, &|_| {}, &mut |_| {}, Ahead::default(), &mut |_| {})
        .unwrap_err();
    assert_eq!(error.to_string(), "out of memory");
    drop(done);
}

#[test]
fn a_peer_that_leaves_while_it_is_sent_a_path_is_a_lost_connection() {
    let mut builder = after_greeting(&[], false);
    let dump = |_: &StorePath, to: &mut dyn Write| (0..1000).try_for_each(|_| to.write_all(&[0; 65536]));
    let error = builder
        .upload(&[&[info(65_536_000)]], &dump, &|_| {}, &mut |_| {}, Ahead::default(), &mut |_| {})
        .unwrap_err();
    assert!(error.is_transport(), "{error}");
}
