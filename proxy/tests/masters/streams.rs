//! Streams over a master to a real sshd: channels to unix sockets, and sessions.

use std::{
    io::{self, Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use nix_offload_proxy::master::{Channel, CloseWrite, Master, OpenError, SessionEnd, Stream, TimedRead};
use sha2::{Digest, Sha256};

use crate::world::{BOUND, Echo, World, signal, wait_until};

const MIB: usize = 1024 * 1024;

/// A unix socket whose first client is given to `serve`.
fn listen(path: &Path, serve: impl FnOnce(UnixStream) + Send + 'static) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || serve(listener.accept().unwrap().0))
}

fn open(master: &Master, path: &Path) -> Channel {
    master.open_unix_socket(path.to_str().unwrap(), BOUND).unwrap()
}

/// Bytes that repeat nowhere near, by position.
fn pattern(from: usize, out: &mut [u8]) {
    for (index, byte) in out.iter_mut().enumerate() {
        let position = (from + index) as u64;
        *byte = (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    }
}

fn send_pattern(writer: &mut dyn CloseWrite, len: usize) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 100_000];
    let mut sent = 0;
    while sent < len {
        let size = chunk.len().min(len - sent);
        pattern(sent, &mut chunk[..size]);
        writer.write_all(&chunk[..size]).unwrap();
        hash.update(&chunk[..size]);
        sent += size;
    }
    writer.shutdown().unwrap();
    hash.finalize().into()
}

fn receive(reader: &mut dyn Read) -> (usize, [u8; 32]) {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 300_000];
    let mut len = 0;
    loop {
        match reader.read(&mut chunk).unwrap() {
            0 => return (len, hash.finalize().into()),
            size => {
                hash.update(&chunk[..size]);
                len += size;
            }
        }
    }
}

/// Sends and receives 64 MiB at the same time through an echo.
fn echo_64_mib(stream: Stream) {
    let Stream { mut reader, mut writer } = stream;
    let begin = Instant::now();
    let sender = thread::spawn(move || send_pattern(&mut *writer, 64 * MIB));
    let (len, hash) = receive(&mut *reader);
    assert_eq!(len, 64 * MIB);
    assert_eq!(hash, sender.join().unwrap());
    println!("64 MiB there and back in {:?}", begin.elapsed());
}

#[test]
fn a_channel_carries_64_mib_both_ways_at_once() {
    let world = World::new();
    let master = world.start();
    let path = world.path("echo");
    let server = listen(&path, |socket| {
        io::copy(&mut &socket, &mut &socket).unwrap();
    });
    echo_64_mib(open(&master, &path).into());
    server.join().unwrap();
}

#[test]
fn a_session_carries_64_mib_both_ways_at_once() {
    let world = World::new();
    let (stream, mut status) = world.start().open_session("exec cat", BOUND).unwrap().into_stream();
    echo_64_mib(stream);
    assert_eq!(status.end(BOUND), SessionEnd { exit: Some(0), stderr: String::new() });
}

#[test]
fn one_way_at_full_speed() {
    let world = World::new();
    let master = world.start();
    let path = world.path("source");
    let server = listen(&path, |mut socket| {
        let chunk = vec![7; MIB];
        (0..200).for_each(|_| socket.write_all(&chunk).unwrap());
        drop(socket);
    });
    let (mut reader, _writer) = open(&master, &path).split();
    let begin = Instant::now();
    let mut chunk = vec![0; MIB];
    let mut len = 0;
    loop {
        match reader.read(&mut chunk).unwrap() {
            0 => break,
            size => len += size,
        }
    }
    assert_eq!(len, 200 * MIB);
    println!("200 MiB received at {:.0} MB/s", len as f64 / 1e6 / begin.elapsed().as_secs_f64());
    server.join().unwrap();

    let path = world.path("sink");
    let server = listen(&path, |mut socket| {
        io::copy(&mut socket, &mut io::sink()).unwrap();
        socket.write_all(b"!").unwrap();
    });
    let (mut reader, mut writer) = open(&master, &path).split();
    let begin = Instant::now();
    let sender = thread::spawn(move || {
        (0..200).for_each(|_| writer.write_all(&chunk).unwrap());
        writer.shutdown().unwrap();
        writer
    });
    reader.read_exact(&mut [0]).unwrap();
    println!("200 MiB sent at {:.0} MB/s", 200.0 * MIB as f64 / 1e6 / begin.elapsed().as_secs_f64());
    sender.join().unwrap();
    server.join().unwrap();
}

#[test]
fn a_socket_that_is_not_there_is_refused_at_once() {
    let world = World::new();
    let master = world.start();
    let begin = Instant::now();
    for path in ["/nowhere/socket", "/etc/passwd"] {
        let error = master.open_unix_socket(path, BOUND).unwrap_err();
        assert!(matches!(error, OpenError::Refused { .. }), "{error:?}");
        assert!(!error.is_master_lost());
    }
    assert!(begin.elapsed() < Duration::from_secs(10));
    // A refused channel must not end the master when its client goes away: see holder.rs.
    thread::sleep(Duration::from_millis(200));
    master.open_session("true", BOUND).unwrap();
    assert_eq!(world.logins(), 1);
    for path in ["", "a\0b", &"x".repeat(20_000)] {
        let error = master.open_unix_socket(path, BOUND).unwrap_err();
        assert!(matches!(error, OpenError::Argument { .. }), "{error:?}");
    }
}

#[test]
fn giving_up_while_a_channel_opens_does_not_end_the_master() {
    let world = World::new();
    let master = world.start();
    let path = world.path("late");
    let listener = UnixListener::bind(&path).unwrap();
    let sessions = world.sshd_sessions();
    sessions.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
    let error = master.open_unix_socket(path.to_str().unwrap(), Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, OpenError::TimedOut { master_answers: true, .. }), "{error:?}");
    // The link is silent for almost as long as the master bears.
    thread::sleep(Duration::from_secs(25));
    sessions.iter().for_each(|pid| kill(*pid, Signal::SIGCONT).unwrap());
    drop(listener.accept().unwrap());
    thread::sleep(Duration::from_millis(200));
    master.open_session("true", BOUND).unwrap();
    assert_eq!(world.logins(), 1);
}

#[test]
fn a_stream_that_is_dropped_while_the_master_hangs_and_the_far_side_talks_does_not_end_the_master() {
    let world = World::new();
    let master = world.start();
    let path = world.path("talks");
    // It ends when nobody takes its words any more.
    let server = listen(&path, |mut socket| while socket.write_all(&[7; 4096]).is_ok() {});
    let (mut reader, writer) = open(&master, &path).split();
    reader.read_exact(&mut [0; 4096]).unwrap();
    let pid = world.only_master().pid;
    signal(pid, Signal::SIGSTOP);
    // This waits for half a second, and then leaves the rest to the holder.
    drop((reader, writer));
    signal(pid, Signal::SIGCONT);
    server.join().unwrap();
    master.open_session("true", BOUND).unwrap();
    assert_eq!((world.only_master().pid, world.logins()), (pid, 1));
}

#[test]
fn a_read_times_out_and_loses_nothing() {
    let world = World::new();
    let master = world.start();
    let path = world.path("slow");
    let (go, wait) = mpsc::channel();
    let server = listen(&path, move |mut socket| {
        socket.write_all(b"ab").unwrap();
        wait.recv().unwrap();
        socket.write_all(b"cd").unwrap();
    });
    let (mut reader, _writer) = open(&master, &path).split();
    reader.set_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut two = [0; 2];
    reader.read_exact(&mut two).unwrap();
    let begin = Instant::now();
    assert_eq!(reader.read(&mut two).unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert!((90..5000).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    go.send(()).unwrap();
    reader.set_timeout(Some(BOUND)).unwrap();
    reader.read_exact(&mut two).unwrap();
    assert_eq!(&two, b"cd");
    assert_eq!(reader.read(&mut two).unwrap(), 0);
    server.join().unwrap();
}

#[test]
fn a_closed_channel_ends_reads_and_breaks_writes_and_nothing_else() {
    let world = World::new();
    let master = world.start();
    let path = world.path("closing");
    let server = listen(&path, |mut socket| {
        socket.write_all(b"bye").unwrap();
    });
    let (mut reader, mut writer) = open(&master, &path).split();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert_eq!(writer.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    server.join().unwrap();
    // sshd ends the whole connection if anything comes for a channel that is closed.
    assert!(master.open_session("true", BOUND).is_ok());
    assert_eq!(world.logins(), 1);
}

#[test]
fn a_writer_that_waits_for_the_window_learns_that_the_far_side_is_gone() {
    let world = World::new();
    let master = world.start();
    let path = world.path("stuck");
    let (go, wait) = mpsc::channel();
    let server = listen(&path, move |socket| {
        wait.recv().unwrap();
        drop(socket);
    });
    let (mut reader, mut writer) = open(&master, &path).split();
    let sender = thread::spawn(move || {
        let chunk = vec![0; MIB];
        loop {
            if let Err(error) = writer.write_all(&chunk) {
                return error.kind();
            }
        }
    });
    thread::sleep(Duration::from_millis(300));
    assert!(!sender.is_finished(), "the window is finite");
    go.send(()).unwrap();
    // What the far side did not read makes its kernel say reset, which sshd passes on as an end.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert_eq!(sender.join().unwrap(), io::ErrorKind::BrokenPipe);
    server.join().unwrap();
    assert!(master.open_session("true", BOUND).is_ok());
}

#[test]
fn dropping_both_halves_closes_the_far_side() {
    let world = World::new();
    let master = world.start();
    let path = world.path("watching");
    let (ended, end) = mpsc::channel();
    let server = listen(&path, move |mut socket| {
        ended.send(socket.read(&mut [0]).unwrap()).unwrap();
    });
    let (reader, mut writer) = open(&master, &path).split();
    drop(reader);
    assert_eq!(writer.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    drop(writer);
    assert_eq!(end.recv_timeout(BOUND).unwrap(), 0);
    server.join().unwrap();
}

#[test]
fn a_lost_master_is_an_error_and_no_end() {
    let world = World::new();
    let master = world.start();
    let path = world.path("kept");
    let (go, wait) = mpsc::channel::<()>();
    let server = listen(&path, move |socket| {
        let _ = wait.recv();
        drop(socket);
    });
    let (mut reader, mut writer) = open(&master, &path).split();
    let reading = thread::spawn(move || reader.read(&mut [0]).unwrap_err().kind());
    master.retire();
    assert_eq!(reading.join().unwrap(), io::ErrorKind::ConnectionReset);
    assert_eq!(writer.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    drop(go);
    server.join().unwrap();
}

#[test]
fn a_session_tells_exit_status_and_stderr() {
    let world = World::new();
    let master = world.start();
    let run = |command: &str| {
        let (mut reader, _writer, mut status) = master.open_session(command, BOUND).unwrap().split();
        let mut out = String::new();
        reader.read_to_string(&mut out).unwrap();
        (out, status.end(BOUND))
    };
    let (out, end) = run("echo out; echo err >&2; exit 3");
    assert_eq!(out, "out\n");
    assert_eq!(end, SessionEnd { exit: Some(3), stderr: "err\n".into() });
    assert_eq!(run("no-such-program-here").1.exit, Some(127));
    assert_eq!(run("kill -9 $$").1.exit, None);
    // More stderr than any buffer holds: only its end is kept, and the command is not held up.
    let (out, end) = run("seq 1000000 >&2; echo done");
    assert_eq!(out, "done\n");
    assert_eq!(end.stderr.len(), 16 * 1024);
    assert!(end.stderr.ends_with("\n1000000\n"));
    for command in ["", "a\0b"] {
        assert!(matches!(master.open_session(command, BOUND), Err(OpenError::Argument { .. })));
    }
}

#[test]
fn stderr_is_heard_as_it_is_written_and_all_of_it() {
    let world = World::new();
    let master = world.start();
    let command = "echo begin; read go; echo first >&2; read go; seq 1000000 >&2; echo done; read end; seq 300000 >&2; echo last >&2";
    let (mut reader, mut writer, mut status) = master.open_session(command, BOUND).unwrap().split();
    status.keep_stderr();
    let mut line = [0; 6];
    reader.read_exact(&mut line).unwrap();
    let mut heard = Vec::new();
    assert!(!status.listen(Some(Duration::ZERO), &mut |bytes| heard.extend_from_slice(bytes)).unwrap());
    assert_eq!(heard, b"");
    writer.write_all(b"go\n").unwrap();
    let mut live = false;
    while !live {
        let answers = status.listen(Some(Duration::from_millis(50)), &mut |bytes| live = bytes == b"first\n");
        assert!(!answers.unwrap());
    }
    writer.write_all(b"go\n").unwrap();
    // A slow listener loses nothing of what is far more than any buffer holds.
    let mut pauses = 20;
    let mut hear = |bytes: &[u8]| {
        heard.extend_from_slice(bytes);
        if pauses > 0 {
            pauses -= 1;
            thread::sleep(Duration::from_millis(5));
        }
    };
    assert!(status.listen(Some(BOUND), &mut hear).unwrap());
    let mut line = [0; 5];
    reader.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"done\n");
    writer.write_all(b"end\n").unwrap();
    writer.shutdown().unwrap();
    let end = status.end(BOUND);
    assert_eq!(end.exit, Some(0));
    assert!(end.stderr.ends_with("300000\nlast\n"));
    assert!(status.listen(Some(Duration::ZERO), &mut hear).unwrap(), "the end is something to read");
    let expected: String = (1..=1_000_000).chain(1..=300_000).map(|number| format!("{number}\n")).collect();
    assert!(heard == (expected + "last\n").into_bytes(), "lines are missing or twice");
}

#[test]
fn a_session_reads_with_a_timeout_and_ends_when_dropped() {
    let world = World::new();
    let master = world.start();
    let mark = world.path("mark");
    let command = format!("cat; echo over > {}", mark.display());
    let (mut reader, mut writer, status) = master.open_session(&command, BOUND).unwrap().split();
    reader.set_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
    writer.write_all(b"x").unwrap();
    reader.set_timeout(Some(BOUND)).unwrap();
    let mut one = [0];
    reader.read_exact(&mut one).unwrap();
    assert_eq!(&one, b"x");
    drop((reader, writer, status));
    wait_until("the command ends", || mark.exists());
}

#[test]
fn more_sessions_than_sshd_allows_are_refused_while_channels_go_on() {
    let world = World::new();
    let master = world.start();
    // MaxSessions is 10.
    let sessions: Vec<_> = (0..10).map(|_| master.open_session("exec cat", BOUND).unwrap()).collect();
    let error = master.open_session("exec cat", BOUND).unwrap_err();
    assert!(matches!(error, OpenError::Refused { .. }), "{error:?}");
    let path = world.path("more");
    let server = listen(&path, |mut socket| socket.write_all(b"y").unwrap());
    let mut one = [0];
    open(&master, &path).split().0.read_exact(&mut one).unwrap();
    server.join().unwrap();
    drop(sessions);
}

#[test]
fn giving_up_while_a_forward_opens_does_not_end_the_master() {
    let world = World::new();
    let master = world.start();
    let sessions = world.sshd_sessions();
    let bound = Duration::from_millis(100);
    let (ours, theirs) = UnixStream::pair().unwrap();
    for stopped in [true, false] {
        let number = if stopped { Signal::SIGSTOP } else { Signal::SIGCONT };
        sessions.iter().for_each(|pid| kill(*pid, number).unwrap());
        if !stopped {
            break;
        }
        let error = master.carry("127.0.0.1", world.port, theirs.as_fd(), theirs.as_fd(), bound).unwrap_err();
        assert!(matches!(error, OpenError::TimedOut { master_answers: true, .. }), "{error:?}");
        let error = master.connect_to("127.0.0.1", world.port, bound).unwrap_err();
        assert!(matches!(error, OpenError::TimedOut { master_answers: true, .. }), "{error:?}");
    }
    // The late confirmations come before these sessions.
    for _ in 0..2 {
        let (mut reader, _writer, _status) = master.open_session("echo on", BOUND).unwrap().split();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "on\n");
    }
    assert_eq!(world.logins(), 1);
    drop(ours);
}

#[test]
fn a_forward_to_where_nobody_listens_is_refused_and_costs_nothing() {
    let world = World::new();
    let master = world.start();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let closed = crate::world::free_port();
    let carried = master.carry("127.0.0.1", closed, theirs.as_fd(), theirs.as_fd(), BOUND).unwrap_err();
    assert!(matches!(carried, OpenError::Refused { .. }), "{carried:?}");
    let connected = master.connect_to("127.0.0.1", closed, BOUND).unwrap_err();
    assert!(matches!(connected, OpenError::Refused { .. }), "{connected:?}");
    for host in ["", "a\0b", &"x".repeat(2000)] {
        let error = master.carry(host, 22, theirs.as_fd(), theirs.as_fd(), BOUND).unwrap_err();
        assert!(matches!(error, OpenError::Argument { .. }), "{error:?}");
    }
    assert!(master.connect_to("127.0.0.1", world.port, BOUND).is_ok());
    assert_eq!(world.logins(), 1);
    assert!(!crate::world::extensions(world.pool.directory()).contains(&"fwd".to_owned()));
}

/// The master mistakes the numbers of sessions here for those of channels there (see `parting`), so both must be few and
/// the same.
#[test]
fn channels_that_close_beside_sessions_end_neither_these_nor_the_master() {
    let world = World::new();
    let path = world.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            // What comes tells that the channel was used, and its end that it was closed.
            thread::spawn(move || io::copy(&mut client.try_clone().unwrap(), &mut client));
        }
    });
    let master = world.start();
    let mut sessions: Vec<Echo> =
        (0..5).map(|_| Echo::of(master.open_session("cat", BOUND).unwrap())).collect();
    for round in 0..3 {
        let channels: Vec<Channel> = (0..8).map(|_| open(&master, &path)).collect();
        for channel in channels {
            let (mut reader, mut writer) = channel.split();
            writer.write_all(b"x").unwrap();
            reader.read_exact(&mut [0]).unwrap();
        }
        sessions.iter_mut().for_each(|session| session.says(&format!("round {round}")));
    }
    sessions.into_iter().for_each(Echo::ends);
    assert_eq!(world.logins(), 1);
    assert!(!world.sshd_log().contains("nonexistent channel"), "{}", world.sshd_log());
}
