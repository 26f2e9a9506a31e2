//! Handing a descriptor to another process.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
};
// The receiving side of the crate nix gives a bare number, which only unsafe code can take over.
use rustix::{
    io::retry_on_intr,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg},
};

/// Sends a descriptor over a unix socket, to whoever reads there as OpenSSH does (`mm_send_fd` in
/// monitor_fdpass.c): with one zero byte.
pub(crate) fn send_descriptor(socket: impl AsFd, fd: BorrowedFd<'_>) -> io::Result<()> {
    send_with_descriptor(socket, &[0], fd)
}

/// Sends bytes, of which there must be one at least, and a descriptor with them.
pub(crate) fn send_with_descriptor(socket: impl AsFd, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    loop {
        let raw = socket.as_fd().as_raw_fd();
        match sendmsg::<()>(raw, &[IoSlice::new(bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives what [`send_with_descriptor`] sent in one packet: how many bytes of `buffer` it fills, and the
/// descriptor, if there was one.
pub(crate) fn receive_with_descriptor(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received =
        retry_on_intr(|| recvmsg(socket.as_fd(), &mut [IoSliceMut::new(buffer)], &mut ancillary, flags))?;
    let mut descriptor = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            descriptor = descriptors.next();
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet that is too long"));
    }
    Ok((received.bytes, descriptor))
}
