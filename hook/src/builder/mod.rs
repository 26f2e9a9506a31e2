//! A builder's store: the worker protocol spoken over a byte stream, with its clocks and its transfers.
//!
//! Owns what is said when. Must never know how the stream was made, nor what the answers are used for.

mod ahead;
mod build;
mod error;
mod input;
mod review;
mod send;
mod serve;
mod store;
mod trust;

use crate::path_info::PathInfo;
use crate::wire::WireError;
use crate::wire::hook::{Field, activity, result};
use crate::wire::worker::{self, Message, Options, Peer, Version};
pub use ahead::Ahead;
pub use error::BuilderError;
pub use review::Review;
pub use serve::{Aside, ServeStore};
pub use store::Store;

use ahead::{put_hold_and_query, put_nars, put_path_infos};
use input::{Counted, Input};
use nix_derivation::{StoreDir, StorePath};
use nix_offload_proxy::master::{CloseWrite, Stream};
use send::{send_asked, send_framed, send_many};
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

/// Operations sent together before their answers are read: their answers must fit the receive window.
const BATCH: usize = 1000;

/// A builder that keeps `max-silent-time` itself is not believed to do so after so many times that time without a line.
const LOOSER: u64 = 10;

/// Nor before so many seconds.
const LEAST_LOOSE: u64 = 3600;

/// Activities of a builder that are followed at a time.
pub(crate) const MAX_ACTIVITIES: usize = 10_000;

/// What a builder's daemon tells while it works, sorted by what it is for.
#[derive(Debug)]
pub enum Event<'a> {
    /// A line of the build's log, without its end.
    LogLine(&'a [u8]),
    /// The build entered a phase.
    Phase(&'a [u8]),
    /// A text for the user.
    Text(&'a [u8]),
    /// Something else began, for instance a substitution; numbers are the daemon's.
    Start {
        /// Its number.
        id: u64,
        /// Its importance.
        level: u64,
        /// Its kind.
        kind: u64,
        /// What to show.
        text: &'a [u8],
        /// Fields by the kind.
        fields: &'a [Field],
    },
    /// It has a result.
    Result {
        /// Its number.
        id: u64,
        /// The result's kind.
        kind: u64,
        /// Fields by the kind.
        fields: &'a [Field],
    },
    /// It is over.
    Stop {
        /// Its number.
        id: u64,
    },
}

/// Receives events.
pub type OnEvent<'a> = &'a mut dyn FnMut(Event<'_>);

/// Writes a store path's NAR, for sending.
pub type Dump<'a> = &'a (dyn Fn(&StorePath, &mut dyn Write) -> io::Result<()> + Sync);

/// Told how an upload proceeds: the path begun, `None` at the end.
pub type OnUpload<'a> = &'a (dyn Fn(Option<&PathInfo>) + Sync);

/// Told of the paths that are valid over there now, in the order of an upload.
pub type OnArrival<'a> = &'a mut dyn FnMut(&[PathInfo]);

/// How long a build may be silent and how long it may take, in seconds; 0 is for ever. And who looks in on it meanwhile.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clocks<'a> {
    /// Nix's setting `max-silent-time`.
    pub max_silent_time: u64,
    /// The builder was told to keep that, and hears what is no whole line yet. What comes here then is only lines.
    pub is_silence_ended_there: bool,
    /// Nix's setting `timeout`.
    pub timeout: u64,
    /// None if nobody does.
    pub review: Option<Review<'a>>,
}

impl Clocks<'_> {
    /// Seconds without a line after which a build is ended; 0 for never.
    fn silence(&self) -> u64 {
        match self.max_silent_time {
            0 => 0,
            // The builder is relied upon, unless nothing at all comes for far longer than that.
            time if self.is_silence_ended_there => time.saturating_mul(LOOSER).max(LEAST_LOOSE),
            time => time,
        }
    }
}

/// A connection to a builder's store. After an error it is not to be used again.
pub struct Builder {
    input: Input,
    output: Box<dyn CloseWrite + Send>,
    store_dir: StoreDir,
    peer: Peer,
    /// Numbers of the daemon's own activities for builds, whose logs are ours to pass on.
    builds: BTreeSet<u64>,
    /// Requests that have been sent and whose answers have not been read.
    ahead: Ahead,
}

impl Builder {
    /// Greets the daemon at the other end of the stream, and sends `ahead` without waiting for its answer.
    ///
    /// # Errors
    /// If no daemon answers within `bound`, or one that is too old.
    pub fn connect(
        stream: Stream,
        store_dir: StoreDir,
        offer: Version,
        bound: Duration,
        ahead: Ahead,
    ) -> Result<Self, BuilderError> {
        let mut greeting = Vec::new();
        worker::put_greeting(&mut greeting, offer);
        Self::begin(stream, store_dir, offer, greeting, bound, ahead)
    }

    /// The same for a stream on which [`Builder::first_words`] were said, and answered, some time ago. That tells nothing
    /// of the link now, so an answer to something else is waited for.
    ///
    /// # Errors
    /// As [`Builder::connect`].
    pub fn resume(
        stream: Stream,
        store_dir: StoreDir,
        bound: Duration,
        ahead: Ahead,
    ) -> Result<Self, BuilderError> {
        const DOING: &str = "greeting the daemon again";
        let deadline = Instant::now() + bound;
        let is_asked = !ahead.bytes().is_empty();
        let mut builder = Self::begin(stream, store_dir, Version::newest(), Vec::new(), bound, ahead)?;
        if is_asked {
            builder.input.deadline = Some(deadline);
            builder.input.wait().map_err(|error| match error.kind() {
                io::ErrorKind::TimedOut => BuilderError::NoAnswer { doing: DOING, bound },
                _ => BuilderError::wire(DOING, WireError::io("an answer", error)),
            })?;
            builder.input.deadline = None;
        } else {
            builder.round_trip(deadline.saturating_duration_since(Instant::now()))?;
        }
        Ok(builder)
    }

    /// The greeting by which the newest version is offered.
    pub fn first_words() -> Vec<u8> {
        let mut greeting = Vec::new();
        worker::put_greeting(&mut greeting, Version::newest());
        greeting
    }

    fn begin(
        stream: Stream,
        store_dir: StoreDir,
        offer: Version,
        mut greeting: Vec<u8>,
        bound: Duration,
        ahead: Ahead,
    ) -> Result<Self, BuilderError> {
        const DOING: &str = "greeting the daemon";
        let Stream { reader, writer } = stream;
        let mut input = Input::new(reader);
        let mut output = writer;
        input.deadline = Some(Instant::now() + bound);
        let no_answer = |source: WireError| {
            if source.is_timeout() {
                BuilderError::NoAnswer { doing: DOING, bound }
            } else {
                BuilderError::wire(DOING, source)
            }
        };
        // A peer that is already gone may still have said why; the reading below finds that.
        greeting.extend_from_slice(ahead.bytes());
        let sent = output.write_all(&greeting).and_then(|()| output.flush());
        let version = worker::read_greeting(&mut input, offer).map_err(|(source, seen)| {
            if source.is_timeout() {
                return BuilderError::NoAnswer { doing: DOING, bound };
            }
            if matches!(source, WireError::Unexpected { .. }) {
                return BuilderError::Protocol { doing: DOING, source };
            }
            BuilderError::no_daemon(&seen, source)
        })?;
        sent.map_err(|e| BuilderError::wire(DOING, WireError::Io { what: "the greeting", source: e }))?;
        let peer = worker::read_peer(&mut input, version).map_err(no_answer)?;
        let mut builder = Self { input, output, store_dir, peer, builds: BTreeSet::new(), ahead };
        match builder.work(DOING, &mut |_| {}) {
            Err(BuilderError::Lost { source, .. }) if source.is_timeout() => {
                return Err(BuilderError::NoAnswer { doing: DOING, bound });
            }
            other => other?,
        }
        builder.input.deadline = None;
        Ok(builder)
    }

    /// What the daemon said of itself.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Sets options for this connection's builds.
    ///
    /// # Errors
    /// If the connection fails or the daemon refuses.
    pub fn set_options(&mut self, options: Options, on: OnEvent<'_>) -> Result<(), BuilderError> {
        const DOING: &str = "setting options";
        let mut request = Vec::new();
        worker::put_set_options(&mut request, options);
        self.ask(DOING, &request)?;
        self.work(DOING, on)
    }

    /// Keeps the paths from the builder's garbage collector as long as the connection is open, whether they
    /// exist or not, and tells which of them are valid there.
    ///
    /// The roots come first: a path found valid before it is rooted may be gone when it is used. With
    /// `substitute` the builder first tries to fetch what it lacks.
    ///
    /// # Errors
    /// If the connection fails or the daemon refuses.
    pub fn hold_and_query(
        &mut self,
        paths: &[StorePath],
        substitute: bool,
        on: OnEvent<'_>,
    ) -> Result<BTreeSet<StorePath>, BuilderError> {
        const DOING: &str = "asking which inputs are there";
        let all = paths.len() as u64;
        // With no path at all there is one batch, of nothing.
        let batches = paths.len().div_ceil(BATCH).max(1);
        let mut request = Vec::new();
        let mut valid = None;
        for number in 0..batches {
            request.clear();
            let batch = paths.chunks(BATCH).nth(number).unwrap_or_default();
            let last = number + 1 == batches;
            let version = self.peer.version;
            put_hold_and_query(
                &mut request,
                version,
                &self.store_dir,
                batch,
                last.then_some((paths, substitute)),
            );
            let known = self.ahead.take(DOING, &request)?;
            let request = if known { &[][..] } else { &request };
            let (input, output) = (&mut self.input, &mut self.output);
            let (store_dir, builds) = (&self.store_dir, &mut self.builds);
            both(input, output, request, DOING, |input| {
                for _ in batch {
                    work(input, version, builds, DOING, on)?;
                    worker::read_number(input).map_err(|e| BuilderError::wire(DOING, e))?;
                }
                if last {
                    work(input, version, builds, DOING, on)?;
                    let paths = worker::read_paths(input, store_dir, all);
                    valid = Some(paths.map_err(|e| BuilderError::wire(DOING, e))?);
                }
                Ok(())
            })?;
        }
        Ok(valid.unwrap_or_default())
    }

    /// Sends paths, which must be ordered references first, and waits until they are valid there.
    ///
    /// Needs the memory of one frame, whatever the paths' size. Behind them goes `ahead`, if the daemon is new enough. The
    /// arrival of each part is told at once; nothing waits for it.
    ///
    /// # Errors
    /// If a path cannot be read, the connection fails, or the daemon refuses one.
    pub fn upload(
        &mut self,
        parts: &[&[PathInfo]],
        dump: Dump<'_>,
        progress: OnUpload<'_>,
        arrived: OnArrival<'_>,
        ahead: Ahead,
        on: OnEvent<'_>,
    ) -> Result<(), BuilderError> {
        const DOING: &str = "sending inputs";
        self.ahead.take(DOING, &[])?;
        let version = self.peer.version;
        let (input, output, builds) = (&mut self.input, &mut self.output, &mut self.builds);
        let store_dir = &self.store_dir;
        if version.has_add_multiple() {
            beside(
                input,
                output,
                DOING,
                |output| {
                    for part in parts {
                        send_many(output, store_dir, part, dump, progress)?;
                    }
                    send(output, DOING, ahead.bytes())
                },
                |input| {
                    for part in parts {
                        work(input, version, builds, DOING, on)?;
                        arrived(part);
                    }
                    Ok(())
                },
            )?;
            self.ahead = ahead;
        } else {
            for info in parts.iter().copied().flatten() {
                progress(Some(info));
                if version.has_frames() {
                    beside(
                        input,
                        output,
                        DOING,
                        |output| send_framed(output, store_dir, info, dump),
                        |input| work(input, version, builds, DOING, on),
                    )?;
                } else {
                    send_asked(input, output, version, builds, store_dir, info, dump, on)?;
                }
                arrived(std::slice::from_ref(info));
            }
            progress(None);
        }
        Ok(())
    }

    /// Metadata of paths, in their order; `None` for one that is not valid there.
    ///
    /// # Errors
    /// If the connection fails or the daemon refuses.
    pub fn path_infos(
        &mut self,
        paths: &[StorePath],
        on: OnEvent<'_>,
    ) -> Result<Vec<Option<PathInfo>>, BuilderError> {
        const DOING: &str = "asking for the outputs' metadata";
        let mut request = Vec::new();
        put_path_infos(&mut request, &self.store_dir, paths.iter());
        self.ask(DOING, &request)?;
        let mut infos = Vec::with_capacity(paths.len());
        for path in paths {
            self.work(DOING, on)?;
            let info = worker::read_path_info(&mut self.input, &self.store_dir, path);
            infos.push(info.map_err(|e| BuilderError::wire(DOING, e))?);
        }
        Ok(infos)
    }

    /// Fetches the NARs of paths, one after another in their order, and gives each as a stream to `receive`.
    ///
    /// # Errors
    /// If the connection fails, the daemon refuses, or `receive` fails.
    pub fn nars<E: std::error::Error + Send + Sync + 'static>(
        &mut self,
        infos: &[PathInfo],
        mut receive: impl FnMut(&PathInfo, &mut dyn Read) -> Result<(), E>,
        on: OnEvent<'_>,
    ) -> Result<(), BuilderError> {
        const DOING: &str = "fetching outputs";
        let mut request = Vec::new();
        put_nars(&mut request, &self.store_dir, infos.iter().map(|info| &info.path));
        self.ask(DOING, &request)?;
        for info in infos {
            self.work(DOING, on)?;
            let mut nar = Counted::new(&mut self.input, info.nar_size);
            let received = receive(info, &mut nar);
            if let Some(error) = nar.broken.take() {
                // The receiver's error only repeats this one.
                return Err(BuilderError::wire(DOING, WireError::io("a NAR", error)));
            }
            received.map_err(|e| BuilderError::Receive(Box::new(e)))?;
            if nar.left > 0 {
                let what = "a NAR that is shorter than its metadata says";
                return Err(BuilderError::Protocol { doing: DOING, source: WireError::Truncated { what } });
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
        worker::put_query_valid_paths(
            &mut request,
            self.peer.version,
            &self.store_dir,
            [].into_iter(),
            false,
        );
        let begin = Instant::now();
        self.input.deadline = Some(begin + bound);
        self.ask(DOING, &request)?;
        self.work(DOING, &mut |_| {})?;
        worker::read_paths(&mut self.input, &self.store_dir, 0).map_err(|e| BuilderError::wire(DOING, e))?;
        self.input.deadline = None;
        Ok(begin.elapsed())
    }

    /// Whether the daemon reads requests in the form in which they are sent ahead, that of the newest version. Before 1.27
    /// (Nix 2.4) the question which paths are valid was shorter: it would take the rest for another request and close.
    pub fn takes_ahead(&self) -> bool {
        self.peer.version.minor() >= 27
    }

    /// Sends requests whose answers will be asked for by later verbs.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn send_ahead(&mut self, ahead: Ahead) -> Result<(), BuilderError> {
        const DOING: &str = "sending requests";
        self.ahead.take(DOING, &[])?;
        send(&mut self.output, DOING, ahead.bytes())?;
        self.ahead = ahead;
        Ok(())
    }

    /// Writes a request unless it was sent ahead. It must be small enough that the write cannot block while the peer is not
    /// reading.
    fn ask(&mut self, doing: &'static str, request: &[u8]) -> Result<(), BuilderError> {
        if self.ahead.take(doing, request)? { Ok(()) } else { send(&mut self.output, doing, request) }
    }

    fn work(&mut self, doing: &'static str, on: OnEvent<'_>) -> Result<(), BuilderError> {
        work(&mut self.input, self.peer.version, &mut self.builds, doing, on)
    }
}

type Output = Box<dyn CloseWrite + Send>;

fn send(output: &mut Output, doing: &'static str, request: &[u8]) -> Result<(), BuilderError> {
    output
        .write_all(request)
        .and_then(|()| output.flush())
        .map_err(|source| BuilderError::Lost { doing, source: WireError::Io { what: "a request", source } })
}

/// Sends a request and reads its answers, the one never waiting for the other when the request is large.
fn both(
    input: &mut Input,
    output: &mut Output,
    request: &[u8],
    doing: &'static str,
    receive: impl FnOnce(&mut Input) -> Result<(), BuilderError>,
) -> Result<(), BuilderError> {
    // Below this size it fits the channel's window and needs no second thread. A pipe holds less, but all that is answered
    // before the request was read whole fits one, so the other side reads on.
    const AT_ONCE: usize = 256 << 10;
    if request.len() <= AT_ONCE {
        send(output, doing, request)?;
        return receive(input);
    }
    beside(input, output, doing, |output| send(output, doing, request), receive)
}

/// Runs the sending in a thread of its own while answers are read here.
fn beside(
    input: &mut Input,
    output: &mut Output,
    doing: &'static str,
    sending: impl FnOnce(&mut Output) -> Result<(), BuilderError> + Send,
    receive: impl FnOnce(&mut Input) -> Result<(), BuilderError>,
) -> Result<(), BuilderError> {
    thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let sent = sending(output);
            if sent.is_err() {
                // The daemon waits for the rest and we for its answer: end the talk. It is lost anyway.
                let _ = output.shutdown();
            }
            sent
        });
        let received = receive(input);
        if received.is_err() {
            // Nobody reads any more, so a sender that waits for the other side would wait for ever.
            input.abandon();
        }
        let sent = sender.join().unwrap_or_else(|_| {
            Err(BuilderError::Lost { doing, source: WireError::Truncated { what: "our own sender" } })
        });
        match (received, sent) {
            // The daemon's words explain why it stopped reading; a local fault explains why it got no more.
            (Err(received), Err(sent)) if received.is_transport() && !sent.is_transport() => Err(sent),
            (Err(received), _) => Err(received),
            (Ok(()), sent) => sent,
        }
    })
}

/// Reads messages until the work is done.
fn work(
    input: &mut Input,
    version: Version,
    builds: &mut BTreeSet<u64>,
    doing: &'static str,
    on: OnEvent<'_>,
) -> Result<(), BuilderError> {
    loop {
        let message = worker::read_message(input, version).map_err(|e| BuilderError::wire(doing, e))?;
        if handle(message, builds, doing, on)? {
            return Ok(());
        }
    }
}

/// Passes a message on; true when it was the last.
fn handle(
    message: Message,
    builds: &mut BTreeSet<u64>,
    doing: &'static str,
    on: OnEvent<'_>,
) -> Result<bool, BuilderError> {
    match message {
        Message::Last => return Ok(true),
        Message::Error(error) => return Err(BuilderError::Refused { doing, message: error.message }),
        Message::Read { .. } => {
            let source = WireError::Unexpected {
                what: "a message of the daemon",
                got: "a wish to read".into(),
                expected: "none, for nothing is being sent",
            };
            return Err(BuilderError::Protocol { doing, source });
        }
        Message::Text(text) => on(Event::Text(&text)),
        Message::Start { id, kind: activity::BUILD, .. } => {
            if builds.len() < MAX_ACTIVITIES {
                builds.insert(id);
            }
        }
        Message::Start { id, level, kind, text, fields } => {
            on(Event::Start { id, level, kind, text: &text, fields: &fields });
        }
        Message::Stop { id } => {
            if !builds.remove(&id) {
                on(Event::Stop { id });
            }
        }
        Message::Result { id, kind, fields } => match (kind, builds.contains(&id), fields.first()) {
            (result::BUILD_LOG_LINE, _, Some(Field::Text(line))) => on(Event::LogLine(line)),
            // A build can say such things of a download that it claims to make.
            _ if !result::is_readable(kind, &fields) => {}
            (result::SET_PHASE, true, Some(Field::Text(phase))) => on(Event::Phase(phase)),
            (_, true, _) => {}
            _ => on(Event::Result { id, kind, fields: &fields }),
        },
    }
    Ok(false)
}
