//! A second holder of a mux connection while OpenSSH cannot bear to lose it.
//!
//! When a client in proxy mode goes away while its channel is not confirmed, or after it was refused, the
//! master ends with all its other streams: `channel_free` turns the channel into one to be closed, and
//! `chan_send_close2` (nchan.c) calls `fatal` because it has no number of the far side. So it is in OpenSSH
//! 9.2 to 10.x. A build hook may be killed at any moment, so another process holds the connection too.

use std::{
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
};

/// Stdout is the connection. Without a word from us, because we died or gave up, it is held until the
/// confirmation must have come; after a refusal until the master ends. The descriptors that we may have
/// inherited are closed, because others wait for their last holder.
const SCRIPT: &str = "exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-
read -r word
case $word in
release) ;;
keep) while read -r word <&1; do :; done ;;
*) exec sleep 20 ;;
esac";

/// The process that holds the connection.
#[derive(Debug)]
pub(super) struct Holder(Option<Child>);

impl Holder {
    /// Starts it: about 0.1 ms, because nobody waits for the shell to come up.
    pub(super) fn spawn(socket: &UnixStream) -> io::Result<Self> {
        let child = Command::new("/bin/sh")
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(OwnedFd::from(socket.try_clone()?))
            .stderr(Stdio::null())
            .current_dir("/")
            // What kills our process group must not kill it.
            .process_group(0)
            .spawn()?;
        Ok(Holder(Some(child)))
    }

    /// The channel is confirmed, or the master gone: the connection is ours alone again. The process is to
    /// be waited for, which takes no time once the connection is of no interest any more.
    pub(super) fn release(mut self) -> Option<Child> {
        self.say("release\n");
        self.0.take()
    }

    /// The channel was refused: the master needs the connection for the rest of its life.
    pub(super) fn keep(mut self) {
        self.say("keep\n");
    }

    fn say(&mut self, word: &str) {
        if let Some(mut pipe) = self.0.as_mut().and_then(|child| child.stdin.take()) {
            let _ = pipe.write_all(word.as_bytes());
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            drop(child.stdin.take());
            // Without a thread it stays a zombie until we end, which is no harm.
            let _ = std::thread::Builder::new().spawn(move || child.wait());
        }
    }
}
