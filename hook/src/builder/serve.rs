//! A builder's store behind `nix-store --serve --write`: the serve protocol spoken over a session.
//!
//! Owns what is said when, with clocks, and what the session's stderr means: the log while something is built, the
//! cause when the far side ends. Must never know how the stream was made or what the answers are for.

use super::input::{Counted, Input};
use super::review::{Due, Reviews};
use super::send::{send_export, send_nar};
use super::{BuilderError, Clocks, Dump, Event, OnArrival, OnEvent, OnUpload, Output, beside, both, send};
use crate::path_info::PathInfo;
use crate::wire::WireError;
use crate::wire::serve::{self, BuildOptions, Version};
use crate::wire::worker::{self, BuildResult, Options, Outcome};
use nix_derivation::{Derivation, HashAlgorithm, NixHash, NixHasher, StoreDir, StorePath};
use nix_offload_proxy::master::{SessionEnd, SessionStatus, Stream};
use std::collections::BTreeSet;
use std::io::{self, Read};
use std::time::{Duration, Instant};

/// How long the far side may take to end after it was told to, or to say why it did.
const END_BOUND: Duration = Duration::from_secs(2);

/// How long the rest of a log may take to arrive after the result.
const LOG_BOUND: Duration = Duration::from_secs(20);

/// The far side has this much longer than the clocks say: it knows better what it kept of a build it ends.
const GRACE: Duration = Duration::from_secs(1);

/// Longest line of a log; a longer one is cut.
const MAX_LINE: usize = 1 << 20;

/// Most bytes of the far side's words quoted in an error.
const QUOTED: usize = 2000;

/// What the far side's program says beside its answers, and how it ends.
pub trait Aside: Send {
    /// Passes on what it says, as it comes, until an answer begins or no more can come. False if `timeout` was over
    /// before.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    fn listen(&mut self, timeout: Option<Duration>, hear: &mut dyn FnMut(&[u8])) -> io::Result<bool>;

    /// Waits for its end, at most for `bound`.
    fn end(&mut self, bound: Duration) -> SessionEnd;
}

impl Aside for SessionStatus {
    fn listen(&mut self, timeout: Option<Duration>, hear: &mut dyn FnMut(&[u8])) -> io::Result<bool> {
        Self::listen(self, timeout, hear)
    }

    fn end(&mut self, bound: Duration) -> SessionEnd {
        Self::end(self, bound)
    }
}

/// A connection to a builder's `nix-store --serve --write`. After an error it is not to be used again.
pub struct ServeStore {
    input: Input,
    output: Output,
    aside: Box<dyn Aside>,
    store_dir: StoreDir,
    version: Version,
    keep_failed: bool,
    /// A build was begun, so what is said aside is its log.
    building: bool,
    line: Vec<u8>,
}

impl ServeStore {
    /// Greets the program at the other end of the stream. What it said aside until then is dropped.
    ///
    /// On failure what the far side says aside is given back, to learn how it ended.
    ///
    /// # Errors
    /// If no `nix-store --serve` answers within `bound`, or one that is too old.
    pub fn connect<A: Aside + 'static>(
        stream: Stream,
        mut aside: A,
        store_dir: StoreDir,
        offer: Version,
        bound: Duration,
    ) -> Result<Self, (BuilderError, A)> {
        const DOING: &str = "greeting nix-store";
        let Stream { reader, writer } = stream;
        let mut input = Input::new(reader);
        input.deadline = Some(Instant::now() + bound);
        let mut output = writer;
        let mut greeting = Vec::new();
        serve::put_greeting(&mut greeting, offer);
        // A peer that is already gone may still have said why; the reading below finds that.
        let sent = send(&mut output, DOING, &greeting);
        let version = match serve::read_greeting(&mut input, offer) {
            Ok(version) => version,
            Err((source, seen)) => {
                let error = if source.is_timeout() {
                    BuilderError::NoAnswer { doing: DOING, bound }
                } else if matches!(source, WireError::Unexpected { .. }) {
                    BuilderError::Protocol { doing: DOING, source }
                } else {
                    BuilderError::no_daemon(&seen, source)
                };
                return Err((error, aside));
            }
        };
        let heard = sent.and_then(|()| {
            let nothing = Some(Duration::ZERO);
            aside
                .listen(nothing, &mut |_| {})
                .map_err(|e| BuilderError::wire(DOING, WireError::io("stderr", e)))
        });
        if let Err(error) = heard {
            return Err((error, aside));
        }
        input.deadline = None;
        Ok(Self {
            input,
            output,
            aside: Box::new(aside),
            store_dir,
            version,
            keep_failed: false,
            building: false,
            line: Vec::new(),
        })
    }

    /// The version of the protocol that is spoken.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Sets options for this connection's builds. The clocks come with the build itself.
    pub fn set_options(&mut self, options: Options) {
        self.keep_failed = options.keep_failed;
    }

    /// Keeps the paths from the builder's garbage collector as long as the connection is open, whether they exist
    /// or not, and tells which of them are valid there. With `substitute` the builder first tries to fetch what it
    /// lacks.
    ///
    /// # Errors
    /// If the connection fails or the builder refuses.
    pub fn hold_and_query(
        &mut self,
        paths: &[StorePath],
        substitute: bool,
        on: OnEvent<'_>,
    ) -> Result<BTreeSet<StorePath>, BuilderError> {
        const DOING: &str = "asking which inputs are there";
        let mut request = Vec::new();
        serve::put_query_valid_paths(&mut request, &self.store_dir, paths.iter(), true, substitute);
        let store_dir = &self.store_dir;
        let mut valid = BTreeSet::new();
        let asked = both(&mut self.input, &mut self.output, &request, DOING, |input| {
            valid = worker::read_paths(input, store_dir, paths.len() as u64)
                .map_err(|e| BuilderError::wire(DOING, e))?;
            Ok(())
        });
        self.checked(DOING, asked, on)?;
        Ok(valid)
    }

    /// Sends paths, which must be ordered references first, and waits until they are valid there.
    ///
    /// Nothing is waited for in between, and no path is held in memory.
    ///
    /// # Errors
    /// If a path cannot be read, the connection fails, or the builder refuses one.
    pub fn upload(
        &mut self,
        infos: &[PathInfo],
        dump: Dump<'_>,
        progress: OnUpload<'_>,
        arrived: OnArrival<'_>,
        on: OnEvent<'_>,
    ) -> Result<(), BuilderError> {
        const DOING: &str = "sending inputs";
        let store_dir = &self.store_dir;
        let one_by_one = self.version.has_add_to_store();
        let answered = if one_by_one { 1 } else { infos.len().max(1) };
        let sent = beside(
            &mut self.input,
            &mut self.output,
            DOING,
            |output| {
                if one_by_one {
                    for info in infos {
                        progress(Some(info));
                        send_nar(output, store_dir, info, dump)?;
                    }
                } else {
                    send_export(output, store_dir, infos, dump, progress)?;
                }
                progress(None);
                Ok(())
            },
            |input| {
                for part in infos.chunks(answered) {
                    serve::read_success(input).map_err(|e| BuilderError::wire(DOING, e))?;
                    arrived(part);
                }
                Ok(())
            },
        );
        self.checked(DOING, sent, on)
    }

    /// Builds a derivation and passes on its log meanwhile.
    ///
    /// # Errors
    /// If the connection fails, the builder refuses, a clock runs out, or it is called off. A build that failed is no error: its
    /// result says so. The far side keeps the clocks too, and then its result says so.
    pub fn build(
        &mut self,
        drv_path: &StorePath,
        drv: &Derivation,
        inputs: &[StorePath],
        clocks: Clocks<'_>,
        on: OnEvent<'_>,
    ) -> Result<BuildResult, BuilderError> {
        const DOING: &str = "building";
        let options = BuildOptions {
            max_silent_time: clocks.max_silent_time,
            timeout: clocks.timeout,
            keep_failed: self.keep_failed,
        };
        let mut request = Vec::new();
        let version = self.version;
        serve::put_build_derivation(
            &mut request,
            version,
            &self.store_dir,
            drv_path,
            drv,
            inputs.iter(),
            options,
        );
        let clocks = Clocks { is_silence_ended_there: true, ..clocks };
        self.pass_aside(on)?;
        self.building = true;
        // The far side answers nothing before it has read all.
        let sent = send(&mut self.output, DOING, &request);
        let waited = sent.and_then(|()| self.wait_for_build(clocks, on));
        let result = waited.and_then(|()| {
            serve::read_build_result(&mut self.input, version).map_err(|e| BuilderError::wire(DOING, e))
        });
        if let Err(BuilderError::TimedOut(_) | BuilderError::Silent(_) | BuilderError::CalledOff) = &result {
            // It may go on for as long as the connection lives, so its end is not waited for.
            self.pass_aside(on)?;
            self.building = false;
        }
        let result = result.map_err(|error| self.explained(DOING, error, on))?;
        if result.outcome(false) != Outcome::Built {
            // Nothing more is wanted of it, and its last words are.
            self.finish(on);
        }
        Ok(result)
    }

    fn wait_for_build(&mut self, clocks: Clocks<'_>, on: OnEvent<'_>) -> Result<(), BuilderError> {
        let started = Instant::now();
        let after = |from: Instant, seconds: u64| {
            let limit = (seconds > 0).then(|| Duration::from_secs(seconds))?;
            from.checked_add(limit)?.checked_add(GRACE)
        };
        let mut end = after(started, clocks.timeout);
        let mut heard = started;
        let mut late = None;
        let mut reviews = Reviews::begin(clocks.review);
        while self.input.inner.buffer().is_empty() {
            let silent = after(heard, clocks.silence());
            let limit = [end, silent].into_iter().flatten().min();
            let next = match reviews.due() {
                Due::Over => return Err(BuilderError::CalledOff),
                Due::Looked(looked) => {
                    heard += looked;
                    end = end.and_then(|end| end.checked_add(looked));
                    continue;
                }
                Due::Wait(next) => next,
            };
            let left = |until: Instant| until.saturating_duration_since(Instant::now());
            let is_over = limit.is_some_and(|limit| left(limit).is_zero());
            // We may have been kept from listening for so long ourselves: what was said meanwhile counts.
            if is_over && late == limit {
                let too_long = end.is_some_and(|end| silent.is_none_or(|silent| end < silent));
                return Err(if too_long {
                    BuilderError::TimedOut(clocks.timeout)
                } else {
                    BuilderError::Silent(clocks.silence())
                });
            }
            late = limit.filter(|_| is_over);
            let line = &mut self.line;
            let timeout = [limit, next].into_iter().flatten().min().map(left);
            let answers = self.aside.listen(timeout, &mut |bytes| {
                heard = Instant::now();
                split(line, bytes, &mut |line| on(Event::LogLine(line)));
            });
            if answers.map_err(|e| BuilderError::wire("building", WireError::io("stderr", e)))? {
                break;
            }
            if reviews.is_over() && next.is_some_and(|next| left(next).is_zero()) {
                return Err(BuilderError::CalledOff);
            }
        }
        Ok(())
    }

    /// Metadata of paths, in their order; `None` for one that is not valid there.
    ///
    /// Servers before 2.4 do not tell hashes. For those the NARs are fetched and hashed here, once more than the
    /// caller does.
    ///
    /// # Errors
    /// If the connection fails or the builder refuses.
    pub fn path_infos(
        &mut self,
        paths: &[StorePath],
        on: OnEvent<'_>,
    ) -> Result<Vec<Option<PathInfo>>, BuilderError> {
        const DOING: &str = "asking for the outputs' metadata";
        let mut request = Vec::new();
        serve::put_query_path_infos(&mut request, &self.store_dir, paths.iter());
        let asked = send(&mut self.output, DOING, &request).and_then(|()| {
            serve::read_path_infos(&mut self.input, self.version, &self.store_dir, paths)
                .map_err(|e| BuilderError::wire(DOING, e))
        });
        let mut infos = self.checked(DOING, asked, on)?;
        for info in infos.iter_mut().filter(|info| !info.has_hash) {
            let hashed = self.hash_of(&info.info);
            info.info.nar_hash = self.checked(DOING, hashed, on)?;
        }
        let found = |path: &StorePath| infos.iter().map(|info| &info.info).find(|info| info.path == *path);
        Ok(paths.iter().map(|path| found(path).cloned()).collect())
    }

    fn hash_of(&mut self, info: &PathInfo) -> Result<[u8; 32], BuilderError> {
        const DOING: &str = "hashing an output";
        let mut hash = None;
        self.fetch(DOING, std::slice::from_ref(info), &mut |_, nar| {
            let mut hasher = NixHasher::new(HashAlgorithm::Sha256);
            let mut piece = vec![0; 64 << 10];
            loop {
                match nar.read(&mut piece)? {
                    0 => break,
                    size => hasher.update(&piece[..size]),
                }
            }
            hash = Some(hasher.finalize());
            io::Result::Ok(())
        })?;
        match hash {
            Some(NixHash::Sha256(digest)) => Ok(digest),
            _ => Err(BuilderError::wire(DOING, WireError::Truncated { what: "a NAR" })),
        }
    }

    /// Fetches the NARs of paths, one after another in their order, and gives each as a stream to `receive`.
    ///
    /// # Errors
    /// If the connection fails, the builder refuses, or `receive` fails.
    pub fn nars<E: std::error::Error + Send + Sync + 'static>(
        &mut self,
        infos: &[PathInfo],
        mut receive: impl FnMut(&PathInfo, &mut dyn Read) -> Result<(), E>,
        on: OnEvent<'_>,
    ) -> Result<(), BuilderError> {
        const DOING: &str = "fetching outputs";
        let fetched = self.fetch(DOING, infos, &mut receive);
        self.checked(DOING, fetched, on)
    }

    fn fetch<E: std::error::Error + Send + Sync + 'static>(
        &mut self,
        doing: &'static str,
        infos: &[PathInfo],
        receive: &mut dyn FnMut(&PathInfo, &mut dyn Read) -> Result<(), E>,
    ) -> Result<(), BuilderError> {
        let mut request = Vec::new();
        for info in infos {
            serve::put_dump_store_path(&mut request, &self.store_dir, &info.path);
        }
        send(&mut self.output, doing, &request)?;
        for info in infos {
            let mut nar = Counted::new(&mut self.input, info.nar_size);
            let received = receive(info, &mut nar);
            if let Some(error) = nar.broken.take() {
                // The receiver's error only repeats this one.
                return Err(BuilderError::wire(doing, WireError::io("a NAR", error)));
            }
            received.map_err(|e| BuilderError::Receive(Box::new(e)))?;
            if nar.left > 0 {
                let what = "a NAR that is shorter than its metadata says";
                return Err(BuilderError::Protocol { doing, source: WireError::Truncated { what } });
            }
        }
        Ok(())
    }

    /// The time one question and its answer take.
    ///
    /// # Errors
    /// If the connection fails or `bound` passes without an answer.
    pub fn round_trip(&mut self, bound: Duration) -> Result<Duration, BuilderError> {
        const DOING: &str = "measuring the round trip";
        let mut request = Vec::new();
        serve::put_query_valid_paths(&mut request, &self.store_dir, [].iter(), false, false);
        let begin = Instant::now();
        self.input.deadline = Some(begin + bound);
        let answered = send(&mut self.output, DOING, &request).and_then(|()| {
            worker::read_paths(&mut self.input, &self.store_dir, 0).map_err(|e| BuilderError::wire(DOING, e))
        });
        self.checked(DOING, answered, &mut |_| {})?;
        self.input.deadline = None;
        Ok(begin.elapsed())
    }

    /// Ends the talk and passes on the rest of the log, which may arrive after the result: the two come by different
    /// pipes, and only the end says that all was there.
    pub fn finish(&mut self, on: OnEvent<'_>) {
        if !self.building {
            return;
        }
        let _ = self.output.shutdown();
        self.aside.end(LOG_BOUND);
        // What is lost here was not to be had.
        let _ = self.pass_aside(on);
        if !self.line.is_empty() {
            on(Event::LogLine(&std::mem::take(&mut self.line)));
        }
    }

    /// Passes on what was said aside until now.
    fn pass_aside(&mut self, on: OnEvent<'_>) -> Result<(), BuilderError> {
        let building = self.building;
        let line = &mut self.line;
        let heard = self.aside.listen(Some(Duration::ZERO), &mut |bytes| {
            split(line, bytes, &mut |line| {
                on(if building { Event::LogLine(line) } else { Event::Text(line) })
            });
        });
        heard.map(drop).map_err(|e| BuilderError::wire("listening", WireError::io("stderr", e)))
    }

    /// What was said aside during a step goes to the user, or into its error.
    fn checked<T>(
        &mut self,
        doing: &'static str,
        result: Result<T, BuilderError>,
        on: OnEvent<'_>,
    ) -> Result<T, BuilderError> {
        match result {
            Ok(value) => self.pass_aside(on).map(|()| value),
            Err(error) => Err(self.explained(doing, error, on)),
        }
    }

    /// A program that ended by itself refused something; its last words say what.
    fn explained(&mut self, doing: &'static str, error: BuilderError, on: OnEvent<'_>) -> BuilderError {
        if !matches!(&error, BuilderError::Lost { source, .. } if !source.is_timeout()) {
            return error;
        }
        let end = self.aside.end(END_BOUND);
        if self.building {
            // It is the log too.
            let _ = self.pass_aside(on);
        }
        match end.exit {
            Some(status) => BuilderError::Refused { doing, message: last_words(&end.stderr, status) },
            None => error,
        }
    }
}

/// Cuts what comes into lines. The rest of the last one is kept for the next time.
fn split(kept: &mut Vec<u8>, bytes: &[u8], line: &mut dyn FnMut(&[u8])) {
    for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
        kept.extend_from_slice(piece.strip_suffix(b"\n").unwrap_or(piece));
        if piece.ends_with(b"\n") || kept.len() >= MAX_LINE {
            line(kept);
            kept.clear();
        }
    }
}

/// The error among the last words of a program of Nix: from the last line that says so to the end.
fn last_words(stderr: &str, status: u32) -> String {
    let stderr = stderr.trim();
    if stderr.is_empty() {
        return format!("the builder's nix-store ended with exit status {status} and without a word");
    }
    let at = stderr.rmatch_indices("error:").map(|(at, _)| at);
    let error = at.into_iter().find(|at| *at == 0 || stderr[..*at].ends_with('\n'));
    let words = error.map_or(stderr, |at| stderr[at + "error:".len()..].trim_start());
    // The end of other words, the beginning of an error's.
    let skipped = if error.is_some() { 0 } else { words.chars().count().saturating_sub(QUOTED) };
    words.chars().skip(skipped).take(QUOTED).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_whatever_the_pieces_they_come_in() {
        let text = b"one\n\ntwo\xff\nthree";
        for size in 1..text.len() {
            let (mut kept, mut lines) = (Vec::new(), Vec::new());
            for piece in text.chunks(size) {
                split(&mut kept, piece, &mut |line| lines.push(line.to_vec()));
            }
            assert_eq!(lines, [&b"one"[..], b"", b"two\xff"]);
            assert_eq!(kept, b"three");
        }
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let (mut kept, mut longest, mut all) = (Vec::new(), 0, 0);
        for _ in 0..100 {
            split(&mut kept, &[b'x'; 65536], &mut |line| {
                longest = longest.max(line.len());
                all += line.len();
            });
        }
        assert!(longest < MAX_LINE + 65536 && all + kept.len() == 6_553_600, "{longest} {all}");
    }

    #[test]
    fn the_error_is_found_among_the_last_words() {
        for (stderr, words) in [
            ("", "the builder's nix-store ended with exit status 1 and without a word"),
            ("warning: x\nerror: disk full\n", "disk full"),
            ("error: one\nerror: two:\n  more\n", "two:\n  more"),
            ("error:\n       … while y\n\n       error: no\n", "… while y\n\n       error: no"),
            ("an error: not at the begin", "an error: not at the begin"),
        ] {
            assert_eq!(last_words(stderr, 1), words);
        }
        assert_eq!(last_words(&"ä".repeat(5000), 1).chars().count(), QUOTED);
    }
}
