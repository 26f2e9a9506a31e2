//! The side turned to Nix: replies and structured lines on descriptor 2, the build's log on descriptor 4.
//!
//! Every line goes out whole, in one write, alone or with others. Must never be given text that was not rendered by `wire::hook`, or comes
//! from Nix's own hook.

use crate::wire::hook::{Field, Line, Reply, Verbosity, log_line};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Where replies, lines and the log go.
#[derive(Debug)]
pub struct NixSide {
    log: Mutex<File>,
    verbosity: u64,
    next_activity: AtomicU64,
}

impl NixSide {
    /// Talks to the Nix that started this process, which is as talkative as `verbosity` says, a number of [`Verbosity`].
    pub fn new(log: File, verbosity: u64) -> Self {
        Self { log: Mutex::new(log), verbosity, next_activity: AtomicU64::new(1) }
    }

    /// Answers a request.
    ///
    /// # Errors
    /// If Nix is gone.
    pub fn reply(&self, reply: &Reply) -> io::Result<()> {
        io::stderr().lock().write_all(&reply.render())
    }

    /// Sends a structured line. That Nix is gone is noticed elsewhere.
    pub fn line(&self, line: &Line<'_>) {
        let _ = io::stderr().lock().write_all(&line.render());
    }

    /// Sends several lines that were rendered already in one write.
    pub fn lines(&self, lines: &[u8]) {
        if !lines.is_empty() {
            let _ = io::stderr().lock().write_all(lines);
        }
    }

    /// Passes on what Nix's own hook says. That Nix is gone is noticed elsewhere.
    pub fn pass(&self, bytes: &[u8]) {
        let _ = io::stderr().lock().write_all(bytes);
    }

    /// Passes on what it says for the build's log.
    pub fn pass_log(&self, bytes: &[u8]) {
        self.write_log(bytes);
    }

    /// Shows a message to the user.
    pub fn message(&self, level: Verbosity, text: &str) {
        self.line(&Line::Message { level, text });
    }

    /// Appends a line to the build's log.
    pub fn log_line(&self, line: &[u8]) {
        self.write_log(&log_line(line));
    }

    /// Notes in the build's log that it entered a phase.
    pub fn phase(&self, name: &[u8]) {
        self.write_log(&Line::Phase { name: &String::from_utf8_lossy(name) }.render());
    }

    /// A number for an activity.
    pub fn new_activity(&self) -> u64 {
        self.next_activity.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether somebody asked for what is that important.
    pub fn is_asked_for(&self, level: u64) -> bool {
        level <= self.verbosity
    }

    /// Begins an activity and gives its number.
    pub fn start(&self, level: u64, kind: u64, text: &str, fields: &[Field]) -> u64 {
        let id = self.new_activity();
        self.line(&Line::Start { id, level, kind, text, fields });
        id
    }

    /// Passes on a result of an activity.
    pub fn result(&self, id: u64, kind: u64, fields: &[Field]) {
        self.line(&Line::Result { id, kind, fields });
    }

    /// Ends an activity.
    pub fn stop(&self, id: u64) {
        self.line(&Line::Stop { id });
    }

    /// Waits until Nix has read the build's log, at most for `bound`. It stops reading at the end of descriptor 2, whatever
    /// is left in the log's pipe (`Worker::waitForInput` and `DerivationGoal::handleEOF` in Nix 2.8
    /// `src/libstore/build/`).
    pub fn wait_for_log(&self, bound: Duration) {
        const PAUSE: Duration = Duration::from_millis(1);
        let begin = Instant::now();
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if !log.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo()) {
            return;
        }
        // A reading end of our own, only to see whether there is something to read.
        let path = format!("/proc/self/fd/{}", log.as_raw_fd());
        let Ok(end) = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path) else {
            return;
        };
        while begin.elapsed() < bound {
            let mut fds = [PollFd::new(end.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::ZERO) {
                Ok(1..) if fds[0].any().unwrap_or_default() => thread::sleep(PAUSE),
                _ => return,
            }
        }
    }

    fn write_log(&self, bytes: &[u8]) {
        let _ = self.log.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    #[test]
    fn the_log_is_waited_for_until_it_is_read_and_no_longer() {
        const LONG: Duration = Duration::from_secs(60);
        let (mut reader, writer) = io::pipe().unwrap();
        let nix = NixSide::new(File::from(OwnedFd::from(writer)), Verbosity::Info as u64);
        nix.wait_for_log(LONG);
        nix.log_line(b"a line");
        let begin = Instant::now();
        nix.wait_for_log(Duration::from_millis(100));
        assert!(begin.elapsed() >= Duration::from_millis(100), "nobody has read it");
        let slow = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            let mut line = [0; 7];
            reader.read_exact(&mut line).unwrap();
            (reader, line)
        });
        nix.wait_for_log(LONG);
        let (_reader, line) = slow.join().unwrap();
        assert_eq!(&line, b"a line\n");
    }
}
