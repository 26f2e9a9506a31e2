//! Servers behind the bastion. All machines share the loopback network, so threads of this program will do.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    thread,
};

/// What each server says first, as sshd does.
pub(crate) const BANNER: &[u8] = b"SSH-2.0-benchmark\r\n";
/// What a [`sink`] says when it has everything.
pub(crate) const ANSWER: &[u8] = b"all\r\n";
/// What is moved at once, in bytes.
pub(crate) const CHUNK: usize = 128 * 1024;

/// Says its banner and closes the connection; returns its port.
pub(crate) fn greeter() -> u16 {
    listen(|_| Ok(()))
}

/// Says its banner, waits for a byte and sends that many.
pub(crate) fn source(bytes: u64) -> u16 {
    listen(move |mut client| {
        client.read_exact(&mut [0])?;
        send(&mut client, bytes)
    })
}

/// Says its banner, takes that many bytes and answers.
pub(crate) fn sink(bytes: u64) -> u16 {
    listen(move |mut client| {
        take(&mut client, bytes)?;
        client.write_all(ANSWER)
    })
}

/// Writes that many bytes.
pub(crate) fn send(to: &mut impl Write, bytes: u64) -> io::Result<()> {
    let chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let len = left.min(CHUNK as u64);
        to.write_all(&chunk[..len as usize])?;
        left -= len;
    }
    Ok(())
}

/// Reads that many bytes.
pub(crate) fn take(from: &mut impl Read, bytes: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let most = left.min(CHUNK as u64) as usize;
        match from.read(&mut chunk[..most])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => left -= len as u64,
        }
    }
    Ok(())
}

/// Serves each client in a thread of its own until this program ends.
fn listen(serve: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming() {
            let serve = serve.clone();
            thread::spawn(move || {
                let mut client = client?;
                client.write_all(BANNER)?;
                // A failure shows at the other end, where it counts.
                serve(client)
            });
        }
    });
    port
}
