//! Taking over the descriptors Nix gives to a hook.
//!
//! Descriptor 0 brings requests, 2 takes replies and structured lines, 4 takes the build's log. 5 is the reading
//! end of 4, there for a trick of the stock hook, and 3 is a leak of Nix's. The only room where `unsafe` is
//! allowed.
//!
//! Source: Nix 2.34 `src/libstore/unix/build/hook-instance.cc`.

#![expect(unsafe_code, reason = "a descriptor known by its number only can be adopted in no other way")]

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use std::fs::{self, File};
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, RawFd};

const LOG: RawFd = 4;

/// Takes the writing end of the build's log, and closes what else Nix left open.
///
/// To be called once, before anything else opens a descriptor.
///
/// # Errors
/// If descriptor 4 is not open for writing: the program was not started by Nix.
pub fn take_log() -> io::Result<File> {
    // SAFETY: only borrowed for the question whether it is open; the answer may be EBADF.
    let log = unsafe { BorrowedFd::borrow_raw(LOG) };
    let flags = OFlag::from_bits_truncate(fcntl(log, FcntlArg::F_GETFL)?);
    if flags & OFlag::O_ACCMODE == OFlag::O_RDONLY {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for number in [3, 5] {
        // Reading from 5 would steal from the log, and keeping it open would hide that Nix is gone.
        let _ = nix::unistd::close(number);
    }
    keep_from_children()?;
    // SAFETY: it is open, was opened by our parent for us, and nothing else in this process owns it.
    Ok(unsafe { File::from_raw_fd(LOG) })
}

/// Marks every descriptor above 2 as not to be inherited. No child may keep the log open, for Nix waits for its
/// end, and what else Nix's own parents left open is no business of a master that outlives us.
///
/// # Errors
/// If the list of descriptors cannot be read.
pub fn keep_from_children() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        if let Some(number) = number.filter(|number| *number > 2) {
            // SAFETY: only borrowed for one call, which answers EBADF should it be closed by now.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            let _ = fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
        }
    }
    Ok(())
}
