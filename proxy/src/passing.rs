//! Handing a descriptor to another process.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
};

/// Sends a descriptor over a unix socket, to whoever reads there as OpenSSH does (`mm_send_fd` in
/// monitor_fdpass.c): with one zero byte.
pub(crate) fn send_descriptor(socket: impl AsFd, fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    loop {
        let raw = socket.as_fd().as_raw_fd();
        match sendmsg::<()>(raw, &[IoSlice::new(&[0])], &rights, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
