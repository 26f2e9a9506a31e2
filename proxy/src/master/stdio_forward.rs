//! The messages of the mux protocol's stdio forward (`ssh -W` over a master).
//!
//! Pure: bytes in, messages out and the other way round. The layout is that of mux.c
//! (`mux_client_request_stdio_fwd`), the same from OpenSSH 6.x to 10.x. PROTOCOL.mux errs: it has the port
//! as a string.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::proxy_mode::{
    Fields, MUX_MSG_HELLO, MUX_S_FAILURE, MUX_S_PERMISSION_DENIED, MUX_VERSION, ProtocolError, REQUEST_ID,
    framed, put_string, put_u32,
};

const MUX_C_NEW_STDIO_FWD: u32 = 0x1000_0008;
const MUX_S_SESSION_OPENED: u32 = 0x8000_0006;

/// The longest host name in a request, in bytes. DNS has 253.
pub(super) const MAX_HOST: usize = 1024;

/// A message of the master.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Hello of the right version.
    Hello,
    /// The far side has connected to the host.
    Opened,
    /// It has not.
    Refused { reason: String },
}

/// Hello and the request, to be written at once. The two descriptors follow, each with a byte of its own.
pub(super) fn request(host: &str, port: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64 + host.len());
    framed(&mut bytes, |body| {
        put_u32(body, MUX_MSG_HELLO);
        put_u32(body, MUX_VERSION);
    });
    framed(&mut bytes, |body| {
        put_u32(body, MUX_C_NEW_STDIO_FWD);
        put_u32(body, REQUEST_ID);
        put_string(body, b""); // reserved
        put_string(body, host.as_bytes());
        put_u32(body, port.into());
    });
    bytes
}

/// Decodes one message (without its length).
pub(super) fn reply(body: &[u8]) -> Result<Reply, ProtocolError> {
    let mut fields = Fields(body);
    match fields.u32("mux message number")? {
        MUX_MSG_HELLO => match fields.u32("mux version")? {
            MUX_VERSION => Ok(Reply::Hello), // what follows are extensions, which are optional
            version => Err(ProtocolError::Version { version }),
        },
        MUX_S_SESSION_OPENED => {
            our_request(&mut fields)?;
            fields.u32("session number")?;
            Ok(Reply::Opened)
        }
        MUX_S_PERMISSION_DENIED | MUX_S_FAILURE => {
            our_request(&mut fields)?;
            Ok(Reply::Refused { reason: fields.text("reason")? })
        }
        number => Err(ProtocolError::Unexpected { number, expected: "the answer to a forward request" }),
    }
}

fn our_request(fields: &mut Fields<'_>) -> Result<(), ProtocolError> {
    match fields.u32("request number")? {
        REQUEST_ID => Ok(()),
        number => Err(ProtocolError::Unexpected { number, expected: "an answer to our own request" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_hello_then_the_forward_with_a_number_as_port() {
        let bytes = request("h.x", 22);
        assert_eq!(bytes[..12], [0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 4]);
        assert_eq!(bytes[12..24], [0, 0, 0, 23, 0x10, 0, 0, 0x08, 0, 0, 0, 1]);
        assert_eq!(&bytes[24..], b"\0\0\0\0\0\0\0\x03h.x\0\0\0\x16");
    }

    #[test]
    fn answers_are_told_apart() {
        assert_eq!(reply(&[0, 0, 0, 1, 0, 0, 0, 4]), Ok(Reply::Hello));
        assert_eq!(reply(&[0, 0, 0, 1, 0, 0, 0, 3]), Err(ProtocolError::Version { version: 3 }));
        assert_eq!(reply(&[0x80, 0, 0, 6, 0, 0, 0, 1, 0, 0, 0, 9]), Ok(Reply::Opened));
        let refusal = b"\x80\0\0\x03\0\0\0\x01\0\0\0\x04n\x1bo.";
        assert_eq!(reply(refusal), Ok(Reply::Refused { reason: "no.".into() }));
        let other = reply(&[0x80, 0, 0, 6, 0, 0, 0, 2, 0, 0, 0, 9]);
        assert!(matches!(other, Err(ProtocolError::Unexpected { number: 2, .. })), "{other:?}");
        assert!(matches!(reply(&[9; 12]), Err(ProtocolError::Unexpected { number: 0x0909_0909, .. })));
    }

    #[test]
    fn every_truncation_of_an_answer_is_an_error() {
        let whole: [&[u8]; 3] = [
            &[0, 0, 0, 1, 0, 0, 0, 4],
            &[0x80, 0, 0, 6, 0, 0, 0, 1, 0, 0, 0, 9],
            b"\x80\0\0\x02\0\0\0\x01\0\0\0\x02no",
        ];
        for message in whole {
            reply(message).unwrap();
            for end in 0..message.len() {
                assert!(matches!(reply(&message[..end]), Err(ProtocolError::Truncated { .. })), "{end}");
            }
        }
        let absurd = [&b"\x80\0\0\x02\0\0\0\x01"[..], &u32::MAX.to_be_bytes()].concat();
        assert_eq!(reply(&absurd), Err(ProtocolError::Truncated { field: "reason" }));
    }
}
