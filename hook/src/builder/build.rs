//! Building: one derivation by itself, or outputs of one that is in the builder's store; and the clocks over it.

use super::input::Input;
use super::review::{Due, Reviews};
use super::{Builder, BuilderError, Clocks, OnEvent, both, handle};
use crate::wire::WireError;
use crate::wire::hook::result;
use crate::wire::worker::{self, BuildResult, Message};
use nix_derivation::{Derivation, StorePath};
use std::collections::BTreeSet;
use std::io::{self, Read};
use std::time::{Duration, Instant};

const DOING: &str = "building";

impl Builder {
    /// Builds a derivation and passes on what the builder tells meanwhile.
    ///
    /// # Errors
    /// If the connection fails, the daemon refuses, a clock runs out, or it is called off. A build that failed is no
    /// error: its result says so.
    pub fn build(
        &mut self,
        drv_path: &StorePath,
        drv: &Derivation,
        inputs: &[StorePath],
        clocks: Clocks<'_>,
        on: OnEvent<'_>,
    ) -> Result<BuildResult, BuilderError> {
        let mut request = Vec::new();
        worker::put_build_derivation(&mut request, &self.store_dir, drv_path, drv, inputs.iter());
        let version = self.peer.version;
        self.ask_for_build(&request, clocks, on, |mut input| worker::read_build_result(&mut input, version))
    }

    /// Builds outputs of a derivation that is in the builder's store with its closure, which is open to everybody.
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub fn build_outputs(
        &mut self,
        drv_path: &StorePath,
        outputs: &BTreeSet<String>,
        clocks: Clocks<'_>,
        on: OnEvent<'_>,
    ) -> Result<BuildResult, BuilderError> {
        let version = self.peer.version;
        let mut request = Vec::new();
        let names = outputs.iter().map(String::as_str);
        worker::put_build_paths(&mut request, version, &self.store_dir, drv_path, names);
        let built = self.ask_for_build(&request, clocks, on, |mut input| {
            if version.has_results_of_paths() {
                return worker::read_keyed_build_result(&mut input, version);
            }
            worker::read_number(&mut input).map(|_| BuildResult::built())
        });
        let rendered = self.store_dir.render_path(drv_path);
        match built {
            // An older daemon has no other way to say how the build failed.
            Err(BuilderError::Refused { message, .. })
                if !version.has_results_of_paths() && message.contains(&rendered) =>
            {
                Ok(BuildResult::failed(message))
            }
            other => other,
        }
    }

    fn ask_for_build(
        &mut self,
        request: &[u8],
        clocks: Clocks<'_>,
        on: OnEvent<'_>,
        read: impl FnOnce(&mut dyn Read) -> Result<BuildResult, WireError>,
    ) -> Result<BuildResult, BuilderError> {
        let known = self.ahead.take(DOING, request)?;
        let request = if known { &[][..] } else { request };
        let version = self.peer.version;
        let (input, output, builds) = (&mut self.input, &mut self.output, &mut self.builds);
        let mut answer = None;
        both(input, output, request, DOING, |input| {
            let started = Instant::now();
            let seconds = |n: u64| (n > 0).then(|| Duration::from_secs(n));
            let mut end = seconds(clocks.timeout).and_then(|d| started.checked_add(d));
            let mut heard = started;
            let mut reviews = Reviews::begin(clocks.review);
            loop {
                let silent = seconds(clocks.silence()).and_then(|d| heard.checked_add(d));
                let limit = [end, silent].into_iter().flatten().min();
                if reviews.is_any() {
                    let looked = look_in(input, &mut reviews, limit)?;
                    if let Some(looked) = looked {
                        heard += looked;
                        end = end.and_then(|end| end.checked_add(looked));
                        continue;
                    }
                }
                input.deadline = limit;
                let message = match worker::read_message(input, version) {
                    Err(e) if e.is_timeout() => {
                        return Err(match (silent, end) {
                            (Some(silent), Some(end)) if end < silent => {
                                BuilderError::TimedOut(clocks.timeout)
                            }
                            (None, _) => BuilderError::TimedOut(clocks.timeout),
                            _ => BuilderError::Silent(clocks.silence()),
                        });
                    }
                    other => other.map_err(|e| BuilderError::wire(DOING, e))?,
                };
                if matches!(&message, Message::Result { kind: result::BUILD_LOG_LINE, .. } | Message::Text(_))
                {
                    heard = Instant::now();
                }
                if handle(message, builds, DOING, on)? {
                    break;
                }
            }
            input.deadline = None;
            answer = Some(read(input).map_err(|e| BuilderError::wire(DOING, e))?);
            Ok(())
        })?;
        answer.ok_or(BuilderError::Lost { doing: DOING, source: WireError::Truncated { what: "a result" } })
    }
}

/// Waits until something comes or the time of `limit` is over, and looks in on the build meanwhile. Gives how long that took
/// if it did look, for then the clocks must be read anew.
///
/// Only the wait for the beginning of a message is cut short: one that was read in part could not be gone on with.
fn look_in(
    input: &mut Input,
    reviews: &mut Reviews<'_>,
    limit: Option<Instant>,
) -> Result<Option<Duration>, BuilderError> {
    let next = match reviews.due() {
        Due::Over => return Err(BuilderError::CalledOff),
        Due::Looked(looked) => return Ok(Some(looked)),
        Due::Wait(next) => next,
    };
    let until = [limit, next].into_iter().flatten().min();
    input.deadline = until;
    match input.wait() {
        Ok(()) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(Duration::ZERO)),
        // One of Nix's own clocks, which the reader will find to be over.
        Err(error) if error.kind() == io::ErrorKind::TimedOut && until == limit => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            if reviews.is_over() {
                Err(BuilderError::CalledOff)
            } else {
                Ok(Some(Duration::ZERO))
            }
        }
        Err(error) => Err(BuilderError::wire(DOING, WireError::io("a message", error))),
    }
}
