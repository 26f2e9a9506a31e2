//! Closing a channel so that the master bears it.
//!
//! OpenSSH's proxy mode is made for clients that have a master to themselves. Read in 9.2 to 10.x:
//! - A `CHANNEL_CLOSE` of ours is noted at the first channel with that remote number (`channel_by_remote_id` in
//!   channels.c). The connection of a client that has a session or a forward carries the *local* number of its session
//!   there (`mux_master_process_new_session` and `mux_master_process_stdio_fwd` in mux.c). If the two are equal, the
//!   master closes our channel once more when we go, and sshd ends the whole connection.
//! - If our connection ends while the master has something to write to it, it becomes a zombie
//!   (`channel_post_mux_client_write`). `channel_free` does not part a zombie from its channels: what comes for them is
//!   written to freed memory, and the master dies.
//! - A channel whose number is below that of our connection is closed only when the master next has something to do.
//!
//! So nothing is said. The connection is ended on our side only, what still comes is thrown away until the master
//! has ended it too, and then the master is woken once.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Instant,
};

use nix::{
    errno::Errno,
    sys::socket::{self, MsgFlags},
};

use super::{connect, dialogue::is_timeout};

/// A connection that is ended on our side. Its channel must have been confirmed.
#[derive(Debug)]
pub(super) struct Parting(UnixStream);

impl Parting {
    /// Ends it on our side, for whoever else has it too.
    pub(super) fn begin(socket: UnixStream) -> Self {
        let _ = socket.shutdown(Shutdown::Write);
        Parting(socket)
    }

    /// Throws away what has come, and tells whether the master has parted from the channel. If so, it is to be woken
    /// soon, by whatever connection.
    pub(super) fn is_over(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        loop {
            // Not by a flag of the socket, for another process may have it too.
            match socket::recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(1..) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return false,
                Ok(0) | Err(_) => return true,
            }
        }
    }

    /// The same, waiting for it until the deadline, and waking the master. False if it has not parted by then.
    pub(super) fn finish(self, control: &Path, deadline: Instant) -> bool {
        let mut buffer = [0; 16 * 1024];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.0.set_read_timeout(Some(left)).is_err() {
                return false;
            }
            match io::Read::read(&mut &self.0, &mut buffer) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) => {
                    wake(control);
                    return true;
                }
                Err(error) if is_timeout(&error) => return false,
                Err(_) => return true,
            }
        }
    }
}

impl AsFd for Parting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Has the master look at all its channels.
pub(super) fn wake(control: &Path) {
    drop(connect(control, Instant::now()));
}
