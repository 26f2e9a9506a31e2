//! A second holder of a channel's connection to the master, for when we cannot close it ourselves.
//!
//! A build hook may be killed at any moment, and OpenSSH's proxy mode is not made for clients that just go away
//! (read in 9.2 to 10.x, `channel_free` in channels.c and `chan_send_close2` in nchan.c):
//! - While the channel is not confirmed, or after it was refused, the master ends with all its other streams,
//!   because it has no number of the far side to close.
//! - Afterwards the master closes the channel only when it next looks at it, which can be many seconds later if
//!   its place in the master's table is below that of the connection. A cancelled build would run on.
//!
//! - If the connection ends while the master has something to write to it, the master forgets to part it from its
//!   channels, uses what it has freed, and dies: a build that talks when it is cancelled would end all others.
//!
//! So a small process holds the connection too, closes the channel in our place, and throws away what still comes.

use std::{
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};

/// Stdout is the connection. Without a word from us, because we died or gave up, it is held until the confirmation must
/// have come, or the master must have given its silent link up (`LINK_INTERVAL` in `start`). Once the channel is open its
/// closing packet is known, and sent if we go without another word; the master has little left to say then. If we have
/// ended our side it cannot be sent, which the shell has to bear: we gave up waiting for a master that is busy, and what it
/// says has to be read until it parts. After a refusal the connection is held until the master ends. The descriptors that
/// we may have inherited are closed, because others wait for their last holder.
const SCRIPT: &str = r#"exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-
read -r word packet
case $word in
open)
    read -r word
    case $word in
    release) ;;
    *)
        trap '' PIPE
        if printf "$packet"; then limit=5; else limit=60; fi
        exec timeout $limit cat <&1 >/dev/null ;;
    esac ;;
keep) while read -r word <&1; do :; done ;;
*) exec sleep 60 ;;
esac"#;

/// The process that holds the connection.
#[derive(Debug)]
pub(super) struct Holder(Option<Child>);

impl Holder {
    /// Starts it: about 0.1 ms, because nobody waits for the shell to come up.
    pub(super) fn spawn(socket: &UnixStream) -> io::Result<Self> {
        reap(None);
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

    /// The channel is open: should we die, this packet is to close it.
    pub(super) fn opened(&mut self, closing: &[u8]) {
        let escaped: String = closing.iter().map(|byte| format!("\\{byte:03o}")).collect();
        self.say(&format!("open {escaped}\n"));
    }

    /// The channel is closed by ourselves, or the master gone.
    pub(super) fn release(mut self) {
        self.say("release\n");
    }

    /// The channel was refused: the master needs the connection for the rest of its life.
    pub(super) fn keep(mut self) {
        self.say("keep\n");
    }

    fn say(&mut self, word: &str) {
        if let Some(pipe) = self.0.as_mut().and_then(|child| child.stdin.as_mut()) {
            let _ = pipe.write_all(word.as_bytes());
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            drop(child.stdin.take());
            reap(Some(child));
        }
    }
}

/// Processes that have been let go and are about to end. Waiting for them would cost their time, so the next one
/// to come takes care of those before it.
static LEAVING: Mutex<Vec<Child>> = Mutex::new(Vec::new());

fn reap(child: Option<Child>) {
    let mut leaving = LEAVING.lock().unwrap_or_else(PoisonError::into_inner);
    leaving.extend(child);
    leaving.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
}
