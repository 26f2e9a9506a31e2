//! The part of OpenSSH's mux protocol that opens a channel in proxy mode: bytes in, messages out.
//!
//! Pure. Mirrors `mux.c` (hello, `MUX_C_PROXY`) and `channels.c` (`channel_proxy_downstream`,
//! `channel_proxy_upstream`) of OpenSSH 9.2 to 10.x; after the answer to `MUX_C_PROXY` the socket carries
//! the packets of RFC 4254 in clear, each with its length, one byte of padding length (0) and its number.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use thiserror::Error;

pub(super) const MUX_MSG_HELLO: u32 = 0x0000_0001;
const MUX_C_PROXY: u32 = 0x1000_000f;
pub(super) const MUX_S_PERMISSION_DENIED: u32 = 0x8000_0002;
pub(super) const MUX_S_FAILURE: u32 = 0x8000_0003;
const MUX_S_PROXY: u32 = 0x8000_000f;
/// The only version of the mux protocol there has been since OpenSSH 5.
pub(super) const MUX_VERSION: u32 = 4;
/// One request per connection, so its number is of no interest.
pub(super) const REQUEST_ID: u32 = 1;

const GLOBAL_REQUEST: u8 = 80;
const REQUEST_FAILURE: u8 = 82;
const CHANNEL_OPEN: u8 = 90;
const CHANNEL_OPEN_CONFIRMATION: u8 = 91;
const CHANNEL_OPEN_FAILURE: u8 = 92;
const CHANNEL_WINDOW_ADJUST: u8 = 93;
const CHANNEL_DATA: u8 = 94;
const CHANNEL_EXTENDED_DATA: u8 = 95;
const CHANNEL_EOF: u8 = 96;
const CHANNEL_CLOSE: u8 = 97;
const CHANNEL_REQUEST: u8 = 98;
const CHANNEL_FAILURE: u8 = 100;

/// Our number of the channel: there is one per connection, and the master translates it.
const OUR_CHANNEL: u32 = 0;

/// Longest mux message accepted, in bytes: hello, answer, or a refusal with its reason.
pub(crate) const MAX_MUX_MESSAGE: usize = 16 * 1024;
/// Most data in one packet, in bytes, in both directions (`CHAN_TCP_PACKET_DEFAULT` of OpenSSH).
pub(crate) const MAX_DATA: usize = 32 * 1024;
/// Longest packet accepted, in bytes: a full data packet of the extended kind.
pub(crate) const MAX_PACKET: usize = MAX_DATA + 2 + 12;
/// Most of the peer's own words that are kept of a refusal, in bytes.
const MAX_REASON: usize = 512;
/// Bytes of a data packet before its data: length, padding, number, recipient, length of the data.
pub(crate) const DATA_HEADER: usize = 14;

/// What the master or the peer said is not the protocol.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A length is beyond what this message can have.
    #[error("{what} of {len} bytes, where {limit} are the limit")]
    TooLong {
        /// What has the length.
        what: &'static str,
        /// The length, in bytes.
        len: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// A message ends before its last field.
    #[error("message ends within its {field}")]
    Truncated {
        /// The field that is not complete.
        field: &'static str,
    },
    /// The master speaks another version of the mux protocol than 4.
    #[error("mux protocol version {version}, not {MUX_VERSION}")]
    Version {
        /// The version it announced.
        version: u32,
    },
    /// A message that has no place here.
    #[error("message {number:#x} while waiting for {expected}")]
    Unexpected {
        /// Its number.
        number: u32,
        /// What could have come.
        expected: &'static str,
    },
    /// A packet for a channel that is not ours.
    #[error("packet for channel {channel}, which is not ours")]
    WrongChannel {
        /// The channel it names.
        channel: u32,
    },
    /// More data than the window allows, or a window beyond 32 bits.
    #[error("flow control window exceeded")]
    Window,
}

/// A message of the master before the channel's own packets begin.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum MuxMessage {
    /// Hello of the right version.
    Hello,
    /// Proxy mode begins.
    Proxy,
    /// The master does not want to.
    Refused { reason: String },
}

/// A packet of the channel. Data comes without its bytes: they are taken from the stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Packet {
    Confirmation { channel: u32, window: u32, max_packet: u32 },
    OpenFailure { code: u32, reason: String },
    WindowAdjust { bytes: u32 },
    ExtendedData { bytes: u32 },
    Eof,
    Close,
    ChannelRequest { want_reply: bool },
    GlobalRequest { want_reply: bool },
}

/// Everything the client has to say until the channel is confirmed, to be written at once: a channel to a socket on
/// the far side, or without one a session.
pub(crate) fn opening(socket_path: Option<&str>, window: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128 + socket_path.map_or(0, str::len));
    let kind: &[u8] = if socket_path.is_some() { b"direct-streamlocal@openssh.com" } else { b"session" };
    framed(&mut bytes, |body| {
        put_u32(body, MUX_MSG_HELLO);
        put_u32(body, MUX_VERSION);
    });
    framed(&mut bytes, |body| {
        put_u32(body, MUX_C_PROXY);
        put_u32(body, REQUEST_ID);
    });
    framed(&mut bytes, |body| {
        body.extend_from_slice(&[0, CHANNEL_OPEN]);
        put_string(body, kind);
        put_u32(body, OUR_CHANNEL);
        put_u32(body, window);
        put_u32(body, MAX_DATA as u32);
        if let Some(socket_path) = socket_path {
            put_string(body, socket_path.as_bytes());
            put_string(body, b""); // reserved
            put_u32(body, 0); // reserved
        }
    });
    bytes
}

/// Reads the length in front of a message; `None` while its four bytes are not complete.
pub(crate) fn length(bytes: &[u8], what: &'static str, limit: usize) -> Result<Option<usize>, ProtocolError> {
    let Some(prefix) = bytes.first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_be_bytes(*prefix) as usize;
    if len > limit {
        return Err(ProtocolError::TooLong { what, len, limit });
    }
    Ok(Some(len))
}

/// Decodes one mux message (without its length).
pub(crate) fn mux_message(body: &[u8]) -> Result<MuxMessage, ProtocolError> {
    let mut fields = Fields(body);
    match fields.u32("mux message number")? {
        MUX_MSG_HELLO => match fields.u32("mux version")? {
            MUX_VERSION => Ok(MuxMessage::Hello), // what follows are extensions, which are optional
            version => Err(ProtocolError::Version { version }),
        },
        MUX_S_PROXY => fields.u32("request number").map(|_| MuxMessage::Proxy),
        MUX_S_PERMISSION_DENIED | MUX_S_FAILURE => {
            fields.u32("request number")?;
            Ok(MuxMessage::Refused { reason: fields.text("reason")? })
        }
        number => Err(ProtocolError::Unexpected { number, expected: "the answer to a proxy request" }),
    }
}

/// The length of the data when `bytes` (from a packet's length on) begin with a data packet for us.
pub(crate) fn data_length(bytes: &[u8; DATA_HEADER]) -> Result<Option<usize>, ProtocolError> {
    if bytes[5] != CHANNEL_DATA {
        return Ok(None);
    }
    let mut fields = Fields(&bytes[6..]);
    fields.our_channel()?;
    let data = fields.u32("data length")? as usize;
    let packet = length(bytes, "packet", MAX_PACKET)?.unwrap_or_default();
    if data + DATA_HEADER - 4 != packet {
        return Err(ProtocolError::Truncated { field: "data" });
    }
    if data > MAX_DATA {
        return Err(ProtocolError::TooLong { what: "data", len: data, limit: MAX_DATA });
    }
    Ok(Some(data))
}

/// Decodes one packet (without its length), any but data.
pub(crate) fn packet(body: &[u8]) -> Result<Packet, ProtocolError> {
    let [_padding, number, rest @ ..] = body else {
        return Err(ProtocolError::Truncated { field: "packet number" });
    };
    let mut fields = Fields(rest);
    if *number == GLOBAL_REQUEST {
        fields.string("request name")?;
        return Ok(Packet::GlobalRequest { want_reply: fields.byte("want reply")? != 0 });
    }
    let known = matches!(*number, CHANNEL_OPEN_CONFIRMATION..=CHANNEL_REQUEST);
    if !known {
        return Err(ProtocolError::Unexpected {
            number: (*number).into(),
            expected: "a packet of the channel",
        });
    }
    fields.our_channel()?;
    match *number {
        CHANNEL_OPEN_CONFIRMATION => Ok(Packet::Confirmation {
            channel: fields.u32("channel")?,
            window: fields.u32("window")?,
            max_packet: fields.u32("maximum packet")?,
        }),
        CHANNEL_OPEN_FAILURE => {
            Ok(Packet::OpenFailure { code: fields.u32("reason code")?, reason: fields.text("reason")? })
        }
        CHANNEL_WINDOW_ADJUST => Ok(Packet::WindowAdjust { bytes: fields.u32("window")? }),
        CHANNEL_EXTENDED_DATA => {
            fields.u32("data type")?;
            let data = fields.string("data")?;
            Ok(Packet::ExtendedData { bytes: data.len() as u32 })
        }
        CHANNEL_EOF => Ok(Packet::Eof),
        CHANNEL_CLOSE => Ok(Packet::Close),
        CHANNEL_REQUEST => {
            fields.string("request name")?;
            Ok(Packet::ChannelRequest { want_reply: fields.byte("want reply")? != 0 })
        }
        number => Err(ProtocolError::Unexpected { number: number.into(), expected: "a packet without data" }),
    }
}

/// Runs a command in a session. No answer is asked for.
pub(crate) fn exec(channel: u32, command: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32 + command.len());
    framed(&mut bytes, |body| {
        body.extend_from_slice(&[0, CHANNEL_REQUEST]);
        put_u32(body, channel);
        put_string(body, b"exec");
        body.push(0); // no answer
        put_string(body, command.as_bytes());
    });
    bytes
}

/// What goes in front of `len` bytes of data.
pub(crate) fn data_header(channel: u32, len: u32) -> [u8; DATA_HEADER] {
    with_two(CHANNEL_DATA, channel, len, len)
}

/// Allows the peer `bytes` more.
pub(crate) fn window_adjust(channel: u32, bytes: u32) -> [u8; DATA_HEADER] {
    with_two(CHANNEL_WINDOW_ADJUST, channel, bytes, 0)
}

/// Nothing more will come from us.
pub(crate) fn eof(channel: u32) -> [u8; 10] {
    with_one(CHANNEL_EOF, channel)
}

/// The channel is over. Nothing may be sent for it afterwards: sshd ends the whole connection when it gets a
/// packet for a channel it has forgotten.
pub(crate) fn close(channel: u32) -> [u8; 10] {
    with_one(CHANNEL_CLOSE, channel)
}

/// We do not do what a channel request asked.
pub(crate) fn channel_failure(channel: u32) -> [u8; 10] {
    with_one(CHANNEL_FAILURE, channel)
}

/// We do not do what a global request asked.
pub(crate) fn request_failure() -> [u8; 6] {
    [0, 0, 0, 2, 0, REQUEST_FAILURE]
}

fn with_one(number: u8, channel: u32) -> [u8; 10] {
    let mut packet = [0; 10];
    packet[..4].copy_from_slice(&6_u32.to_be_bytes());
    packet[5] = number;
    packet[6..].copy_from_slice(&channel.to_be_bytes());
    packet
}

fn with_two(number: u8, channel: u32, value: u32, following: u32) -> [u8; DATA_HEADER] {
    let mut packet = [0; DATA_HEADER];
    packet[..4].copy_from_slice(&(10 + following).to_be_bytes());
    packet[5] = number;
    packet[6..10].copy_from_slice(&channel.to_be_bytes());
    packet[10..].copy_from_slice(&value.to_be_bytes());
    packet
}

pub(super) fn framed(bytes: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    put_u32(bytes, 0);
    body(bytes);
    let len = (bytes.len() - start - 4) as u32;
    bytes[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

pub(super) fn put_u32(bytes: &mut Vec<u8>, value: u32) {
    bytes.extend_from_slice(&value.to_be_bytes());
}

pub(super) fn put_string(bytes: &mut Vec<u8>, string: &[u8]) {
    put_u32(bytes, string.len() as u32);
    bytes.extend_from_slice(string);
}

/// The fields of one complete message, taken from its front.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn byte(&mut self, field: &'static str) -> Result<u8, ProtocolError> {
        let (first, rest) = self.0.split_first().ok_or(ProtocolError::Truncated { field })?;
        self.0 = rest;
        Ok(*first)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, ProtocolError> {
        let (first, rest) = self.0.split_first_chunk::<4>().ok_or(ProtocolError::Truncated { field })?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*first))
    }

    fn string(&mut self, field: &'static str) -> Result<&'a [u8], ProtocolError> {
        let len = self.u32(field)? as usize;
        let (string, rest) = self.0.split_at_checked(len).ok_or(ProtocolError::Truncated { field })?;
        self.0 = rest;
        Ok(string)
    }

    /// The peer's words, without what could upset a terminal or a log.
    pub(super) fn text(&mut self, field: &'static str) -> Result<String, ProtocolError> {
        let bytes = self.string(field)?;
        let kept = &bytes[..bytes.len().min(MAX_REASON)];
        Ok(String::from_utf8_lossy(kept).chars().filter(|c| !c.is_control()).collect())
    }

    fn our_channel(&mut self) -> Result<(), ProtocolError> {
        match self.u32("channel")? {
            OUR_CHANNEL => Ok(()),
            channel => Err(ProtocolError::WrongChannel { channel }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(number: u8, rest: &[u8]) -> Vec<u8> {
        [&[0, number], &[0; 4][..], rest].concat()
    }

    #[test]
    fn opening_is_hello_then_proxy_then_open() {
        let bytes = opening(Some("/s"), 8);
        assert_eq!(bytes[..12], [0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 4]);
        assert_eq!(bytes[12..24], [0, 0, 0, 8, 0x10, 0, 0, 0x0f, 0, 0, 0, 1]);
        let open = &bytes[24..];
        assert_eq!(length(open, "packet", 1000), Ok(Some(open.len() - 4)));
        assert_eq!(open[4..10], [0, 90, 0, 0, 0, 30]);
        assert_eq!(&open[10..40], b"direct-streamlocal@openssh.com");
        assert_eq!(open[40..52], [0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0x80, 0]);
        assert_eq!(&open[52..], b"\0\0\0\x02/s\0\0\0\0\0\0\0\0");
        let open = &opening(None, 8)[24..];
        assert_eq!(open, b"\0\0\0\x19\0\x5a\0\0\0\x07session\0\0\0\0\0\0\0\x08\0\0\x80\0");
        assert_eq!(exec(7, "sh"), b"\0\0\0\x15\0\x62\0\0\0\x07\0\0\0\x04exec\0\0\0\0\x02sh");
    }

    #[test]
    fn mux_messages_are_told_apart() {
        assert_eq!(mux_message(&[0, 0, 0, 1, 0, 0, 0, 4, 9, 9]), Ok(MuxMessage::Hello));
        assert_eq!(mux_message(&[0, 0, 0, 1, 0, 0, 0, 5]), Err(ProtocolError::Version { version: 5 }));
        assert_eq!(mux_message(&[0x80, 0, 0, 0x0f, 0, 0, 0, 1]), Ok(MuxMessage::Proxy));
        let refusal = b"\x80\0\0\x03\0\0\0\x01\0\0\0\x04n\x1bo.";
        assert_eq!(mux_message(refusal), Ok(MuxMessage::Refused { reason: "no.".into() }));
        assert!(matches!(mux_message(&[0; 8]), Err(ProtocolError::Unexpected { number: 0, .. })));
    }

    #[test]
    fn every_truncation_of_a_message_is_an_error() {
        let whole = [
            body(CHANNEL_OPEN_CONFIRMATION, &[0, 0, 0, 7, 0, 0, 1, 0, 0, 0, 2, 0]),
            body(CHANNEL_OPEN_FAILURE, b"\0\0\0\x02\0\0\0\x04nope\0\0\0\0"),
            body(CHANNEL_WINDOW_ADJUST, &[0, 0, 0, 1]),
            body(CHANNEL_EXTENDED_DATA, b"\0\0\0\x01\0\0\0\x01x"),
            body(CHANNEL_CLOSE, &[]),
            body(CHANNEL_EOF, &[]),
            body(CHANNEL_REQUEST, b"\0\0\0\x01x\x01"),
        ];
        for message in &whole {
            packet(message).unwrap();
            // The language tag of an open failure is never looked at.
            let needed = message.len() - if message[1] == CHANNEL_OPEN_FAILURE { 4 } else { 0 };
            for end in 0..needed {
                assert!(
                    matches!(packet(&message[..end]), Err(ProtocolError::Truncated { .. })),
                    "{message:?} cut at {end}"
                );
            }
        }
    }

    #[test]
    fn absurd_lengths_are_errors_without_allocation() {
        let absurd = u32::MAX.to_be_bytes();
        assert!(matches!(length(&absurd, "packet", MAX_PACKET), Err(ProtocolError::TooLong { .. })));
        assert_eq!(length(&absurd[..3], "packet", MAX_PACKET), Ok(None));
        let request = body(CHANNEL_REQUEST, &absurd);
        assert_eq!(packet(&request), Err(ProtocolError::Truncated { field: "request name" }));
        let mut data = data_header(0, 5);
        data[10..].copy_from_slice(&absurd);
        assert!(data_length(&data).is_err());
        assert!(data_length(&data_header(0, MAX_DATA as u32 + 1)).is_err());
    }

    #[test]
    fn packets_written_here_are_read_here() {
        assert_eq!(data_length(&data_header(0, 5)), Ok(Some(5)));
        assert_eq!(data_length(&data_header(0, 0)), Ok(Some(0)));
        assert_eq!(data_length(&window_adjust(0, 77)), Ok(None));
        assert_eq!(packet(&window_adjust(0, 77)[4..]), Ok(Packet::WindowAdjust { bytes: 77 }));
        assert_eq!(packet(&eof(0)[4..]), Ok(Packet::Eof));
        assert_eq!(packet(&close(0)[4..]), Ok(Packet::Close));
        assert_eq!(length(&close(9), "packet", MAX_PACKET), Ok(Some(6)));
        assert_eq!(packet(&close(9)[4..]), Err(ProtocolError::WrongChannel { channel: 9 }));
        assert!(matches!(
            packet(&channel_failure(0)[4..]),
            Err(ProtocolError::Unexpected { number: 100, .. })
        ));
        assert_eq!(length(&request_failure(), "packet", MAX_PACKET), Ok(Some(2)));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic() {
        // A small linear congruential generator: the same bytes each time.
        let mut seed = 1_u64;
        let mut bytes = vec![0_u8; 64];
        for round in 0..20_000_usize {
            for byte in &mut bytes {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = (seed >> 56) as u8;
            }
            bytes[1] = 80 + (round % 24) as u8;
            if round % 2 == 0 {
                bytes[2..6].fill(0);
            }
            let _ = packet(&bytes[..round % 64]);
            let _ = mux_message(&bytes[..round % 64]);
            let _ = length(&bytes[..round % 6], "packet", MAX_PACKET);
            if let Some(header) = bytes.first_chunk() {
                let _ = data_length(header);
            }
        }
    }
}
