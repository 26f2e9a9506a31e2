//! A master that does not keep to the protocol: errors of the right kind, and never a panic or a hang.

use std::{
    io::{self, Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix_offload_proxy::master::{
    Channel, ChannelReader, ChannelWriter, CloseWrite, Master, OpenError, ProtocolError, TimedRead,
};

use crate::world::{BOUND, World};

const HELLO: [u8; 12] = [0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 4];
const PROXY: [u8; 12] = [0, 0, 0, 8, 0x80, 0, 0, 0x0f, 0, 0, 0, 1];
/// What the client says until then: hello, proxy, and the open of `/s`.
const OPENING: usize = 12 + 12 + 4 + 62;

/// A packet with its length and padding.
fn packet(number: u8, fields: &[u32]) -> Vec<u8> {
    let mut body = vec![0, number];
    fields.iter().for_each(|field| body.extend_from_slice(&field.to_be_bytes()));
    [&(body.len() as u32).to_be_bytes()[..], &body].concat()
}

fn confirmation(window: u32, max_packet: u32) -> Vec<u8> {
    [&HELLO[..], &PROXY, &packet(91, &[0, 7, window, max_packet])].concat()
}

/// A control socket where a real master was.
struct Fake {
    _world: World,
    master: Master,
    listener: UnixListener,
}

impl Fake {
    fn new() -> Fake {
        let world = World::new();
        let master = world.start();
        world.pool.stop(&world.only_master()).unwrap();
        let listener = UnixListener::bind(master.control_path()).unwrap();
        Fake { _world: world, master, listener }
    }

    /// Says `bytes` to the next client after its opening, then goes on with `rest`.
    fn say(&self, bytes: &[u8], rest: impl FnOnce(UnixStream) + Send + 'static) -> JoinHandle<()> {
        let (listener, bytes) = (self.listener.try_clone().unwrap(), bytes.to_vec());
        thread::spawn(move || {
            let mut client = loop {
                let mut client = listener.accept().unwrap().0;
                client.set_read_timeout(Some(BOUND)).unwrap();
                match client.read_exact(&mut [0; OPENING]) {
                    // The end of the channel before this one wakes the master.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                    other => break other.map(|()| client).unwrap(),
                }
            };
            // The client may have given up in the middle.
            let _ = client.write_all(&bytes);
            rest(client);
        })
    }

    fn open(&self) -> Result<Channel, OpenError> {
        self.master.open_unix_socket("/s", Duration::from_secs(5))
    }

    fn open_error(&self, bytes: &[u8]) -> OpenError {
        let server = self.say(bytes, drop);
        let error = self.open().unwrap_err();
        server.join().unwrap();
        error
    }

    /// An open channel on which `bytes` come.
    fn channel(&self, bytes: &[u8]) -> (ChannelReader, ChannelWriter) {
        let server = self.say(&[&confirmation(1000, 1000), bytes].concat(), drop);
        let (mut reader, writer) = self.open().unwrap().split();
        server.join().unwrap();
        reader.set_timeout(Some(BOUND)).unwrap();
        (reader, writer)
    }
}

#[test]
fn a_bad_opening_is_an_error_of_its_kind() {
    let fake = Fake::new();
    let protocol = |bytes: &[u8]| match fake.open_error(bytes) {
        OpenError::Protocol(error) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(protocol(&[0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 5]), ProtocolError::Version { version: 5 });
    assert!(matches!(protocol(&[0xff; 8]), ProtocolError::TooLong { .. }));
    assert!(matches!(protocol(&[0, 0, 0, 2, 0, 0]), ProtocolError::Truncated { .. }));
    assert!(matches!(protocol(&[0, 0, 0, 0]), ProtocolError::Truncated { .. }));
    assert!(matches!(protocol(&[0, 0, 0, 4, 9, 9, 9, 9]), ProtocolError::Unexpected { .. }));
    let after_proxy = |bytes: &[u8]| [&HELLO[..], &PROXY, bytes].concat();
    assert!(matches!(protocol(&after_proxy(&[0xff; 4])), ProtocolError::TooLong { .. }));
    assert!(matches!(protocol(&after_proxy(&packet(96, &[0]))), ProtocolError::Unexpected { .. }));
    assert!(matches!(protocol(&after_proxy(&packet(91, &[0, 1]))), ProtocolError::Truncated { .. }));
    let wrong = protocol(&after_proxy(&packet(91, &[5, 1, 1, 1])));
    assert_eq!(wrong, ProtocolError::WrongChannel { channel: 5 });

    for lost in [&[][..], &HELLO[..5], &after_proxy(&[0, 0])] {
        let error = fake.open_error(lost);
        assert!(matches!(error, OpenError::Gone { .. }), "{error:?}");
        assert!(error.is_master_lost());
    }
    let refusal = [&HELLO[..], b"\0\0\0\x0e\x80\0\0\x03\0\0\0\x01\0\0\0\x02no"].concat();
    assert!(matches!(fake.open_error(&refusal), OpenError::Refused { reason } if reason == "no"));
}

#[test]
fn bad_packets_end_the_reading_for_good() {
    let fake = Fake::new();
    let long_data =
        [&(40_000_u32 + 10).to_be_bytes()[..], &[0, 94], &[0; 4], &40_000_u32.to_be_bytes()].concat();
    let hostile = [
        vec![0xff; 100],
        long_data,
        packet(94, &[3, 0]),       // data for another channel
        packet(94, &[0, 77]),      // data longer than its packet
        packet(99, &[0]),          // an answer to nothing
        packet(91, &[0, 0, 0, 0]), // confirmed twice
        packet(93, &[0, u32::MAX]),
        packet(97, &[]),
        packet(95, &[0, 1, 9]),
    ];
    for bytes in hostile {
        // What came before is given out first.
        let first =
            [&packet(94, &[0, 0])[..], &[0, 0, 0, 11, 0, 94, 0, 0, 0, 0, 0, 0, 0, 1, b'x'], &bytes].concat();
        let (mut reader, mut writer) = fake.channel(&first);
        let mut out = [0; 10];
        assert_eq!(reader.read(&mut out).unwrap(), 1, "{bytes:?}");
        for _ in 0..2 {
            let error = reader.read(&mut out).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bytes:?}: {error}");
        }
        assert_eq!(writer.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
    let (mut reader, _writer) = fake.channel(&packet(94, &[0])[..7]);
    assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn more_than_the_window_may_come_as_it_is_consumed() {
    let fake = Fake::new();
    let mut data = packet(94, &[0, 32 * 1024]);
    data[..4].copy_from_slice(&(32 * 1024_u32 + 10).to_be_bytes());
    data.resize(14 + 32 * 1024, b'x');
    // 300 packets are more than the 8 MiB of the first window.
    let server = fake.say(&confirmation(1000, 1000), move |mut client| {
        let mut adjusted = 0;
        for _ in 0..300 {
            client.write_all(&data).unwrap();
        }
        let mut adjust = [0; 14];
        while adjusted < 9 * 1024 * 1024 {
            client.read_exact(&mut adjust).unwrap();
            assert_eq!(adjust[..10], packet(93, &[7, 0])[..10], "a window adjustment");
            adjusted += u32::from_be_bytes(*adjust.last_chunk().unwrap());
        }
    });
    let (mut reader, _writer) = fake.open().unwrap().split();
    let mut out = vec![0; 300 * 32 * 1024];
    reader.read_exact(&mut out).unwrap();
    assert!(out.iter().all(|byte| *byte == b'x'));
    server.join().unwrap();
}

#[test]
fn requests_are_answered_and_the_windows_are_kept() {
    let fake = Fake::new();
    let server = fake.say(&confirmation(3, 2), |mut client| {
        let mut expect = |bytes: &[u8]| {
            let mut got = vec![0; bytes.len()];
            client.read_exact(&mut got).unwrap();
            assert_eq!(got, bytes);
        };
        // Two bytes by the maximum packet, one by the window.
        expect(&[0, 0, 0, 12, 0, 94, 0, 0, 0, 7, 0, 0, 0, 2, b'h', b'e']);
        expect(&[0, 0, 0, 11, 0, 94, 0, 0, 0, 7, 0, 0, 0, 1, b'l']);
        client.write_all(b"\0\0\0\x0c\0\x62\0\0\0\0\0\0\0\x01x\x01").unwrap();
        client.write_all(b"\0\0\0\x08\0\x50\0\0\0\x01x\x01").unwrap();
        client.write_all(b"\0\0\0\x0c\0\x62\0\0\0\0\0\0\0\x01x\0").unwrap();
        client.write_all(&packet(93, &[0, 2])).unwrap();
        let mut got = [0; 42];
        client.read_exact(&mut got).unwrap();
        // The answers and the data come from two threads; each packet is whole.
        let has = |bytes: &[u8]| got.windows(bytes.len()).any(|window| window == bytes);
        assert!(has(&packet(100, &[7])), "{got:?}");
        assert!(has(&[0, 0, 0, 2, 0, 82]), "{got:?}");
        assert!(has(&[0, 0, 0, 12, 0, 94, 0, 0, 0, 7, 0, 0, 0, 2, b'l', b'o']), "{got:?}");
        assert!(has(&packet(96, &[7])), "{got:?}");
        client.write_all(&packet(97, &[0])).unwrap();
        assert_eq!(client.read(&mut [0; 10]).unwrap(), 0, "the master closes the channel, not its client");
    });
    let (mut reader, mut writer) = fake.open().unwrap().split();
    let sender = thread::spawn(move || {
        writer.write_all(b"hello").unwrap();
        writer.shutdown().unwrap();
        writer
    });
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    let mut writer = sender.join().unwrap();
    assert_eq!(writer.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    writer.shutdown().unwrap();
    drop((reader, writer));
    server.join().unwrap();
}

#[test]
fn a_bad_answer_to_a_forward_is_an_error_of_its_kind() {
    // Hello, the request for host `h`, and a byte with each descriptor.
    const REQUEST: usize = 12 + 4 + 8 + 4 + 5 + 4 + 2;
    const OPENED: [u8; 16] = [0, 0, 0, 12, 0x80, 0, 0, 6, 0, 0, 0, 1, 0, 0, 0, 9];
    let fake = Fake::new();
    let bound = Duration::from_millis(500);
    let carry = |bytes: &[u8], stays: bool| {
        let (listener, bytes) = (fake.listener.try_clone().unwrap(), bytes.to_vec());
        let server = thread::spawn(move || {
            let mut client = listener.accept().unwrap().0;
            client.read_exact(&mut [0; REQUEST]).unwrap();
            client.write_all(&bytes).unwrap();
            if stays {
                // Until the client gives up.
                let _ = client.read(&mut [0]);
            }
        });
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let result = fake.master.carry("h", 22, theirs.as_fd(), theirs.as_fd(), bound);
        (result, server)
    };
    let failed = |bytes: &[u8], stays: bool| {
        let (result, server) = carry(bytes, stays);
        let error = result.unwrap_err();
        server.join().unwrap();
        error
    };
    let refusal = [&HELLO[..], b"\0\0\0\x0e\x80\0\0\x03\0\0\0\x01\0\0\0\x02no"].concat();
    assert!(matches!(failed(&refusal, false), OpenError::Refused { reason } if reason == "no"));
    for (bytes, answers) in [(&[][..], false), (&HELLO[..7], false), (&HELLO, true)] {
        let error = failed(bytes, true);
        let OpenError::TimedOut { master_answers, .. } = error else { panic!("{error:?}") };
        assert_eq!(master_answers, answers);
        assert!(matches!(failed(bytes, false), OpenError::Gone { .. }));
    }
    assert!(matches!(failed(&[0xff; 8], true), OpenError::Gone { .. }));
    assert!(matches!(failed(&[0, 0, 0, 0], true), OpenError::Protocol(ProtocolError::Truncated { .. })));
    assert!(matches!(failed(&PROXY, true), OpenError::Protocol(ProtocolError::Unexpected { .. })));

    // Opened, and then something that does not belong there.
    let (forward, server) = carry(&[&HELLO[..], &OPENED, b"x"].concat(), false);
    let error = forward.unwrap().wait().unwrap_err();
    assert!(matches!(error, OpenError::Protocol(ProtocolError::Unexpected { .. })), "{error:?}");
    server.join().unwrap();
    // The end of the stream is one only if the master lives on: it is asked.
    for lives in [true, false] {
        let (forward, server) = carry(&[&HELLO[..], &OPENED].concat(), false);
        let listener = fake.listener.try_clone().unwrap();
        let answer = thread::spawn(move || {
            let mut client = listener.accept().unwrap().0;
            if lives {
                let mut question = [0; 24];
                client.write_all(&HELLO).unwrap();
                client.read_exact(&mut question).unwrap();
                let id = &question[20..];
                client.write_all(&[&[0, 0, 0, 12, 0x80, 0, 0, 5], id, &[0, 0, 0, 9]].concat()).unwrap();
            }
        });
        server.join().unwrap();
        assert_eq!(forward.unwrap().wait().is_ok(), lives);
        answer.join().unwrap();
    }
}
