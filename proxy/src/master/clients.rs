//! How many clients a master has, as the kernel tells.
//!
//! Pure: the text of `/proc/net/unix` in, a number out.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::path::Path;

use super::forward;

/// How many connections the listener at `socket` has accepted, and those at the sockets where it listened for a
/// moment, from `/proc/net/unix`. ssh bound its socket under a longer name (`muxserver_listen` in mux.c).
pub(super) fn count(table: &str, socket: &Path) -> Option<usize> {
    /// Where the flags stand, and the state `SS_CONNECTED`; see net/unix/af_unix.c.
    const FLAGS: usize = 3;
    const STATE: usize = 5;
    const LISTENS: &str = "00010000";
    const CONNECTED: &str = "03";
    let bound_as = format!("{}.", socket.display());
    let mut listens = false;
    let mut count = 0;
    for line in table.lines().skip(1) {
        let mut rest = line.split_whitespace();
        let (Some(flags), Some(state)) = (rest.nth(FLAGS), rest.nth(STATE - FLAGS - 1)) else { continue };
        // The path may have blanks.
        let Some(at) = line.find('/') else { continue };
        let path = &line[at..];
        if path.starts_with(&bound_as) && flags == LISTENS {
            listens = true;
        } else if state == CONNECTED
            && (path.starts_with(&bound_as) || forward::belongs(Path::new(path), socket))
        {
            count += 1;
        }
    }
    listens.then_some(count)
}
