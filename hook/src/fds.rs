//! Taking over the descriptors Nix gives to a hook.
//!
//! Descriptor 0 brings requests, 2 takes replies and structured lines, 4 takes the build's log. 5 is the reading
//! end of 4, there for a trick of the stock hook, and 3 is a leak of Nix's. The only room where `unsafe` is
//! allowed.
//!
//! Source: Nix 2.34 `src/libstore/unix/build/hook-instance.cc`.

#![expect(unsafe_code, reason = "a descriptor known by its number only can be adopted in no other way")]

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{dup2_raw, getpid, getppid};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

const LOG: RawFd = 4;
/// The reading end of the log, see the stock hook's `drainFD(5)`.
const LOG_AGAIN: RawFd = 5;

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
    for number in [3, LOG_AGAIN] {
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

/// Starts a program with a pipe for the log, as Nix starts its hook, and gives the pipe's reading end.
///
/// It is killed when this process dies, as Nix has its hooks killed; for that to be so, this must be called in the
/// main thread. It stays in our process group, which Nix kills.
///
/// # Errors
/// If it cannot be started.
pub fn start_hook(command: &mut Command) -> io::Result<(Child, io::PipeReader)> {
    let (reader, writer) = io::pipe()?;
    // In the child these two numbers are taken over, so nothing that is needed there may have them.
    let mut occupied = Vec::new();
    loop {
        let file = File::open("/dev/null")?;
        if file.as_raw_fd() > LOG_AGAIN {
            break;
        }
        occupied.push(file);
    }
    let (log, again) = (above(&writer)?, above(&reader)?);
    let parent = getpid();
    let prepare = move || {
        // SAFETY: both numbers are owned by nobody in the child, which is about to become another program.
        let taken = unsafe { [dup2_raw(&log, LOG)?, dup2_raw(&again, LOG_AGAIN)?] };
        let _ = taken.map(IntoRawFd::into_raw_fd);
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec it makes four system calls and allocates nothing.
    let child = unsafe { command.pre_exec(prepare) }.spawn()?;
    Ok((child, reader))
}

/// The same under a number above those that a hook is given.
fn above(descriptor: &impl std::os::fd::AsFd) -> io::Result<File> {
    let number = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(LOG_AGAIN + 1))?;
    // SAFETY: it was made by this call, and nothing else owns it.
    Ok(unsafe { File::from_raw_fd(number) })
}
