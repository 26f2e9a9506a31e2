//! Questions that show what a daemon does for us. Each is one that changes nothing, whatever the answer.

use super::{Builder, BuilderError};
use crate::path_info::PathInfo;
use crate::wire::{put_u64, worker};
use nix_derivation::StorePath;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

impl Builder {
    /// The daemon's words if it refuses what it does for those only whom it trusts. Daemons up to 2.14, which do not
    /// say whether they do, can be asked so. Afterwards the connection is of no more use if it refused.
    ///
    /// # Errors
    /// If the connection fails or `bound` passes without an answer.
    pub fn ask_trust(&mut self, bound: Duration) -> Result<Option<String>, BuilderError> {
        const DOING: &str = "asking whether it trusts us";
        let mut request = Vec::new();
        worker::put_repair_nothing(&mut request);
        self.asking(bound, |this| {
            this.ask(DOING, &request)?;
            match this.work(DOING, &mut |_| {}) {
                Ok(()) => {
                    worker::read_number(&mut this.input).map_err(|e| BuilderError::wire(DOING, e))?;
                    Ok(None)
                }
                Err(BuilderError::Refused { message, .. }) => Ok(Some(message)),
                Err(other) => Err(other),
            }
        })
    }

    /// The daemon's words if it refuses to take the path, which it lacks: the import is begun with no NAR behind it.
    /// If it gets as far as the missing NAR, its complaint means nothing; so the caller must check what the refusal says.
    /// Nothing is imported, and the connection goes on. Of a daemon before 1.23, which would wait for the NAR, it is not asked.
    ///
    /// # Errors
    /// If the connection fails or `bound` passes without an answer.
    pub fn ask_import(&mut self, info: &PathInfo, bound: Duration) -> Result<Option<String>, BuilderError> {
        const DOING: &str = "asking whether an input may be sent";
        if !self.peer.version.has_frames() {
            return Ok(None);
        }
        let mut request = Vec::new();
        worker::put_add_to_store_nar(&mut request, &self.store_dir, info);
        put_u64(&mut request, 0); // the end of the frames
        self.asking(bound, |this| {
            this.ask(DOING, &request)?;
            match this.work(DOING, &mut |_| {}) {
                Ok(()) => Ok(None),
                Err(BuilderError::Refused { message, .. }) => Ok(Some(message)),
                Err(other) => Err(other),
            }
        })
    }

    /// Which of the paths are valid there, or else known to the daemon's substituters if `substitute` asks for that.
    ///
    /// # Errors
    /// If the connection fails, the daemon refuses, or `bound` passes without an answer.
    pub fn find(
        &mut self,
        paths: &[StorePath],
        substitute: bool,
        bound: Duration,
    ) -> Result<BTreeSet<StorePath>, BuilderError> {
        const DOING: &str = "asking which inputs are there";
        self.asking(bound, |this| {
            let mut found = this.hold_and_query(paths, false, &mut |_| {})?;
            let missing: Vec<&StorePath> = paths.iter().filter(|path| !found.contains(path)).collect();
            if substitute && !missing.is_empty() {
                let mut request = Vec::new();
                worker::put_query_missing(&mut request, &this.store_dir, missing.into_iter());
                this.ask(DOING, &request)?;
                this.work(DOING, &mut |_| {})?;
                let known = worker::read_missing(&mut this.input, &this.store_dir);
                found.extend(known.map_err(|e| BuilderError::wire(DOING, e))?);
            }
            Ok(found)
        })
    }

    fn asking<T>(
        &mut self,
        bound: Duration,
        question: impl FnOnce(&mut Self) -> Result<T, BuilderError>,
    ) -> Result<T, BuilderError> {
        self.input.deadline = Some(Instant::now() + bound);
        let answer = question(self);
        self.input.deadline = None;
        answer
    }
}
