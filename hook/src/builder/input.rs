//! Reading what a builder sends: with a deadline, and no further than a NAR reaches.

use crate::wire::nar::NarEnd;
use nix_offload_proxy::master::TimedRead;
use std::io::{self, BufRead, BufReader, Read};
use std::time::{Duration, Instant};

/// How long to look for what should be there already. No stream can be told to wait for no time at all.
const LOOK: Duration = Duration::from_millis(1);

/// The reading side, with a point in time after which a read fails with `TimedOut`.
pub(super) struct Input {
    pub(super) inner: BufReader<Box<dyn TimedRead + Send>>,
    pub(super) deadline: Option<Instant>,
    /// Whether the stream has a timeout set now.
    timed: bool,
    /// The deadline that had passed when somebody looked whether something was there already.
    late: Option<Instant>,
}

impl Input {
    pub(super) fn new(reader: Box<dyn TimedRead + Send>) -> Self {
        Self { inner: BufReader::with_capacity(32 << 10, reader), deadline: None, timed: false, late: None }
    }

    /// Waits until something comes, which is left there.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.keep_time()?;
        self.inner.fill_buf().map(drop)
    }

    fn keep_time(&mut self) -> io::Result<()> {
        if self.inner.buffer().is_empty() && (self.deadline.is_some() || self.timed) {
            let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // We may have been kept from reading for so long ourselves. What has come meanwhile counts, but not what goes on
            // coming.
            if left.is_some_and(|left| left.is_zero()) {
                if self.late == self.deadline {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                self.late = self.deadline;
            }
            self.inner.get_mut().set_timeout(left.map(|left| left.max(LOOK)))?;
            self.timed = left.is_some();
        }
        Ok(())
    }

    /// Ends the stream for its sender, for nobody will read any more.
    pub(super) fn abandon(&mut self) {
        self.inner.get_mut().abandon();
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.keep_time()?;
        self.inner.read(buffer)
    }
}

/// A NAR of known length inside the stream, so that whoever reads it cannot read too far: neither behind that length nor
/// behind the archive's own end. If the archive is shorter nothing follows it that would be for its reader, and perhaps
/// nothing at all, which would be waited for.
pub(super) struct Counted<'a> {
    inner: &'a mut Input,
    end: NarEnd,
    pub(super) left: u64,
    pub(super) broken: Option<io::Error>,
}

impl<'a> Counted<'a> {
    pub(super) fn new(inner: &'a mut Input, nar_size: u64) -> Self {
        Self { inner, end: NarEnd::default(), left: nar_size, broken: None }
    }
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 || self.end.is_over() {
            return Ok(0);
        }
        let got = match self.inner.read(&mut buffer[..wanted]) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            other => other,
        };
        match got {
            Ok(n) => {
                // What was read behind its end is lost. Nobody misses it: `left` shows that the talk is over.
                let n = self.end.pass(&buffer[..n]);
                self.left -= n as u64;
                Ok(n)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let copy = io::Error::new(error.kind(), error.to_string());
                self.broken = Some(error);
                Err(copy)
            }
        }
    }
}
