//! Lock files that are removed by whoever holds them.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// How often a lock that somebody else holds is tried again, at first and at last: hundreds who wait for one login must
/// not keep the machine from it.
const INTERVAL: Duration = Duration::from_millis(5);
const LONGEST_INTERVAL: Duration = Duration::from_millis(100);

/// Takes a lock file, or gives up at the deadline. The file may be removed by whoever holds the lock, so
/// one that has no name any more does not count.
pub(crate) fn lock(path: &Path, deadline: Instant) -> io::Result<Option<Flock<File>>> {
    let begin = Instant::now();
    loop {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) if lock.metadata()?.nlink() > 0 => return Ok(Some(lock)),
            Ok(_) => continue,
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < deadline => {
                std::thread::sleep((begin.elapsed() / 8).clamp(INTERVAL, LONGEST_INTERVAL));
            }
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => return Ok(None),
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}
