//! The masters of one user: find a living one, start one once, check it, end it.
//!
//! A line here must not parse the mux protocol, nor know what the streams are for.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use thiserror::Error;

use super::{
    connect,
    diagnosis::{CURE_OF_PROXY, Fault, SAID_BY_PROXY},
    directory::{self, DirectoryError},
    effective,
    error::StartError,
    forward,
    handle::{Avoid, Master, avoided, kill_recorded, remove},
    instances,
    liveness::{self, ALIVE_BOUND, Liveness},
    lock::lock,
    mux,
    name::{self, Endpoint},
    pace::Pace,
    record::{self, Record},
    start::{self, Attempt, Files, Setback},
};
use crate::{
    down::{Down, Memory, dice},
    exit, network,
    settings::{Settings, SettingsError},
    wake::{WakeError, Waker, Waking},
};

/// How much longer than its own bound a start waits for that of another, so that two which began together
/// end with the same error.
const SHARE_GRACE: Duration = Duration::from_secs(1);
/// With less time left than this no further connection is begun.
pub(super) const LEAST_TIME: Duration = Duration::from_secs(1);
/// How long ssh may take to say what its configuration says. It connects nowhere for that.
const ASK_BOUND: Duration = Duration::from_secs(2);
/// How long nobody connects after sshd turned a connection away; doubled each time.
const REBUFF: Duration = Duration::from_millis(300);

/// How often a host that is being woken is tried.
const WAKE_INTERVAL: Duration = Duration::from_secs(1);

/// How many masters may be started for each other's sake.
const LONGEST_CHAIN: usize = 8;

/// The masters of this user, in one runtime directory.
#[derive(Debug, Clone)]
pub struct Pool {
    directory: PathBuf,
    settings: Arc<Settings>,
}

/// Why there is no pool.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SetupError {
    /// Its directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// What is set cannot be read.
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

impl SetupError {
    /// What to do about it, if that can be said.
    pub fn cure(&self) -> Option<String> {
        match self {
            SetupError::Directory(error) => error.cure(),
            SetupError::Settings(error) => error.cure(),
        }
    }
}

impl Pool {
    /// The masters of a runtime directory, which is made (0700) if need be; its parent must exist. Nothing is set
    /// beyond what everybody gets.
    ///
    /// # Errors
    /// When the directory cannot be made or others could meddle with it.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, DirectoryError> {
        let directory = directory.into();
        directory::ensure(&directory)?;
        Ok(Pool { directory, settings: Arc::default() })
    }

    /// The same with other settings.
    #[must_use]
    pub fn with_settings(self, settings: Settings) -> Self {
        Pool { settings: Arc::new(settings), ..self }
    }

    /// The masters of the usual directory (`NIX_OFFLOAD_RUNTIME_DIR`, else `/run/nix-offload` for root,
    /// `$XDG_RUNTIME_DIR/nix-offload` for others, else `/tmp/nix-offload-UID`), with what is set in the usual file.
    ///
    /// # Errors
    /// As [`Pool::open`], and when the file of settings has a fault.
    pub fn from_env() -> Result<Self, SetupError> {
        Pool::from_lookup(|name| std::env::var_os(name))
    }

    /// The same with the environment of another process of this user.
    ///
    /// # Errors
    /// As [`Pool::from_env`].
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, SetupError> {
        let settings = Settings::from_env(&lookup)?;
        Ok(Pool::open(directory::by_environment(lookup))?.with_settings(settings))
    }

    /// The same without settings, for what must work whatever is in the file: looking at masters and ending them.
    ///
    /// # Errors
    /// As [`Pool::open`].
    pub fn from_env_unset() -> Result<Self, SetupError> {
        Ok(Pool::open(directory::by_environment(|name| std::env::var_os(name)))?)
    }

    /// The runtime directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What is set.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The master if there is one that takes connections and was started from the configuration that there is now.
    /// Starts nothing and does not wait: microseconds.
    pub fn live(&self, endpoint: &Endpoint) -> Option<Master> {
        if let Some(files) = self.foreign(endpoint)
            && avoided(&files).is_none()
            && connect(&files.socket, Instant::now()).is_ok()
        {
            return Some(Master::foreign(files, endpoint.destination.clone()));
        }
        let files = self.files(endpoint);
        connect(&files.socket, Instant::now()).ok()?;
        if Record::read(&files).is_some_and(|record| !record.is_current()) {
            return None;
        }
        Some(Master::of(files, endpoint.destination.clone()))
    }

    /// The master, started if there is none that answers within a second. Concurrent calls, of whatever
    /// process, start one and share its success or its failure. `first_command` runs on a new master once;
    /// what it prints is [`Master::first_output`]. Returns after `bound`, or up to
    /// two seconds later if a hung master or another process's start is in the way.
    ///
    /// One that was started from another configuration than there is now takes no more streams, and ends with the
    /// last it has. A host that is down is told to wake up, if it is set how.
    ///
    /// # Errors
    /// What was in the way, with its cure: [`StartError::cure`].
    pub fn start(
        &self,
        endpoint: &Endpoint,
        bound: Duration,
        first_command: &str,
    ) -> Result<Master, StartError> {
        let settings = self.settings.of_host(endpoint.host());
        let waker = settings.wake.as_ref().map(|wake| Waker::of(&self.directory, endpoint.host(), wake));
        let started = self.start_now(endpoint, bound, first_command);
        match (started, waker) {
            (Ok(master), Some(waker)) => {
                waker.awake();
                Ok(master)
            }
            (Err(error), Some(waker)) if error.is_host_down() => {
                let destination = endpoint.destination.clone();
                let (waking, bound) = (waker.wake(SystemTime::now()), waker.timeout());
                if waking.is_ok() {
                    self.note_waking(endpoint, &error);
                }
                let source = Box::new(error);
                Err(match waking {
                    Ok(waking) if waking.left.is_zero() => StartError::NotWoken { bound, source },
                    Ok(waking) => StartError::Waking { destination, waking, source },
                    Err(source) => StartError::Wake { destination, source },
                })
            }
            (started, _) => started,
        }
    }

    /// A host that is being woken is tried often, so the pauses must not grow. What is seen at the end is known from then on.
    fn note_waking(&self, endpoint: &Endpoint, error: &StartError) {
        // Whoever starts its master now notes what comes of it, and one that lives was started since.
        let starting = lock(&self.files(endpoint).lock, Instant::now());
        if matches!(starting, Ok(Some(_))) && self.live(endpoint).is_none() {
            let memory = self.memory(endpoint);
            memory.clear();
            memory.failed(&exit::reason(error), SystemTime::now());
        }
    }

    /// The same, and waits for a host that is being woken.
    ///
    /// # Errors
    /// As [`Pool::start`].
    pub fn start_waking(
        &self,
        endpoint: &Endpoint,
        bound: Duration,
        first_command: &str,
    ) -> Result<Master, StartError> {
        loop {
            match self.start(endpoint, bound, first_command) {
                Err(StartError::Waking { waking, .. }) => thread::sleep(WAKE_INTERVAL.min(waking.left)),
                other => return other,
            }
        }
    }

    fn start_now(
        &self,
        endpoint: &Endpoint,
        bound: Duration,
        first_command: &str,
    ) -> Result<Master, StartError> {
        let began = Instant::now();
        let deadline = began + bound;
        endpoint.check()?;
        if let Some(files) = self.foreign(endpoint)
            && avoided(&files).is_none()
        {
            // Enough is left to make one of ours.
            let liveness = liveness::ask(&files.socket, bound / 2);
            let master = Master::foreign(files, endpoint.destination.clone());
            match liveness {
                Liveness::Alive { .. } => return Ok(master),
                // The others need not find out for themselves.
                Liveness::Hung => master.avoid(Avoid::Silent),
                Liveness::Absent => {}
            }
        }
        let files = self.files(endpoint);
        let to = endpoint.destination.as_str();
        let found = || Ok(Master::of(files.clone(), to.to_owned()));
        if let Some(excess) = name::excess_length(&files.socket) {
            return Err(StartError::PathTooLong { control: files.socket, excess });
        }
        let is_current = || Record::read(&files).is_none_or(|record| record.is_current());
        if matches!(liveness::ask(&files.socket, bound), Liveness::Alive { .. }) && is_current() {
            return found();
        }
        let failed_before = fs::read(&files.failure).ok();
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| StartError::Io { path, source }
        };
        let Some(_lock) = lock(&files.lock, deadline + SHARE_GRACE).map_err(at(&files.lock))? else {
            return Err(StartError::Busy { destination: endpoint.destination.clone(), bound });
        };
        // Whoever had the lock before us has tried for us too.
        let liveness = liveness::ask(&files.socket, deadline.saturating_duration_since(Instant::now()));
        if matches!(liveness, Liveness::Alive { .. }) && is_current() {
            return found();
        }
        start::write_hosts(endpoint, &files).map_err(at(&files.hosts))?;
        let left = || deadline.saturating_duration_since(Instant::now());
        let effective = effective::ask(endpoint, &files, (left() / 3).min(ASK_BOUND));
        match liveness {
            Liveness::Alive { .. } => {
                let record = Record::read(&files);
                if let Some(mut record) = record.filter(|record| effective.is_as(&record.configuration)) {
                    record.stamps = effective.stamps;
                    start::write_whole(&files.record, &record.to_text()).map_err(at(&files.record))?;
                    return found();
                }
                tracing::info!(
                    destination = to,
                    "SSH master to {to} has another configuration, replacing it"
                );
                if mux::stop_listening(&files.socket, ALIVE_BOUND).is_err() {
                    kill_recorded(&files);
                }
            }
            Liveness::Hung => {
                tracing::warn!(destination = to, "SSH master to {to} does not answer, replacing it");
                kill_recorded(&files);
            }
            Liveness::Absent => {}
        }
        let failed_now = fs::read(&files.failure).ok();
        if let Some(setback) = failed_now
            .filter(|now| Some(now) != failed_before.as_ref())
            .as_deref()
            .and_then(record::read_failure)
            // That somebody with less time ran out of it says little.
            .filter(|setback| !setback.timed_out || left() < LEAST_TIME)
        {
            return Err(self.seen(endpoint, setback.explain(endpoint, &files, bound, effective.known_hosts)));
        }
        if left().is_zero() {
            return Err(StartError::Busy { destination: endpoint.destination.clone(), bound });
        }
        for path in [&files.socket, &files.avoid] {
            remove(path).map_err(at(path))?;
        }
        forward::remove_all(&files.socket);

        let settings = self.settings.of_host(endpoint.host());
        let pace =
            Pace::of(&self.directory, &effective.host, effective.port, settings.connections_per_second);
        let record = Record::new(endpoint, &effective);
        // Before it starts: should we be killed then, it is known all the same.
        start::write_whole(&files.record, &record.to_text()).map_err(at(&files.record))?;
        let memory = self.memory(endpoint);
        let is_silent = effective::is_silent(endpoint, &files, (left() / 3).min(ASK_BOUND));
        let error = match self.attempt(endpoint, &files, &pace, deadline, first_command, is_silent)? {
            Attempt::Started { pid } => {
                if let Err(error) = start::write_whole(&files.record, &record.of_process(pid).to_text()) {
                    let path = files.record.display();
                    tracing::warn!(%path, %error, "cannot record the SSH master to {to} in {path}: {error}");
                }
                let _ = remove(&files.failure);
                memory.clear();
                return found().map(|master| master.started(began.elapsed()));
            }
            Attempt::Failed(setback) => {
                // If it cannot be shared, the others try for themselves.
                let _ = start::write_whole(&files.failure, &record::failure(&setback));
                let _ = remove(&files.record);
                self.seen(endpoint, setback.explain(endpoint, &files, bound, effective.known_hosts))
            }
        };
        let reason = exit::reason(&error);
        tracing::warn!(event = "SSH master not started", destination = to, error = reason, "{reason}");
        if error.is_host_down() {
            memory.failed(&reason, SystemTime::now());
        }
        Err(error)
    }

    /// A failure, which may be no fault of the host's.
    fn seen(&self, endpoint: &Endpoint, error: StartError) -> StartError {
        if !error.may_lack_network() || !network::is_absent() {
            return error;
        }
        self.outage().began(&endpoint.name());
        StartError::NoNetwork { destination: endpoint.destination.clone(), source: Box::new(error) }
    }

    /// Runs ssh, again and again while sshd turns it away and there is time.
    fn attempt(
        &self,
        endpoint: &Endpoint,
        files: &Files,
        pace: &Pace,
        deadline: Instant,
        first_command: &str,
        is_silent: bool,
    ) -> Result<Attempt, StartError> {
        let bound = deadline.saturating_duration_since(Instant::now());
        // Without time to connect in there is no use in a turn.
        let latest = deadline.checked_sub(LEAST_TIME).unwrap_or(deadline);
        let to = endpoint.destination.as_str();
        let mut rebuff: Option<(Duration, Setback)> = None;
        loop {
            if !pace.take_turn(latest) {
                return match rebuff {
                    Some((_, setback)) => Ok(Attempt::Failed(setback)),
                    None => Err(StartError::Crowded { destination: endpoint.destination.clone(), bound }),
                };
            }
            let Some(_login) = pace.log_in(latest) else {
                return Err(StartError::Crowded { destination: endpoint.destination.clone(), bound });
            };
            let began = Instant::now();
            let left = deadline.saturating_duration_since(began);
            match start::attempt(endpoint, files, left, first_command, self.settings.ssh.idle, is_silent)? {
                Attempt::Started { pid } => {
                    let milliseconds = began.elapsed().as_millis() as u64;
                    let took = exit::seconds(began.elapsed());
                    tracing::info!(
                        event = "SSH master started",
                        destination = to,
                        pid,
                        milliseconds,
                        "SSH master to {to} started in {took} s"
                    );
                    return Ok(Attempt::Started { pid });
                }
                Attempt::Failed(setback) if matches!(setback.fault(endpoint), Fault::TurnedAway { .. }) => {
                    let pause = rebuff.map_or(REBUFF, |(pause, _)| pause * 2);
                    tracing::info!(destination = to, "sshd of {to} turned a connection away, trying again");
                    pace.hold_off(pause.mul_f64(1.0 + dice() / 2.0));
                    rebuff = Some((pause, setback));
                }
                failed => return Ok(failed),
            }
        }
    }

    /// Whether and why no master could be started lately, if it is not yet time to try again.
    pub fn down(&self, endpoint: &Endpoint) -> Option<Down> {
        self.memory(endpoint).pause(SystemTime::now())
    }

    /// What is remembered of failed starts of a master.
    pub fn memory(&self, endpoint: &Endpoint) -> Memory {
        Memory::of(&self.directory, self.way(endpoint))
    }

    /// By what [`Downs`](crate::down::Downs) knows the way to a master.
    pub fn way(&self, endpoint: &Endpoint) -> String {
        format!("master {}", endpoint.name())
    }

    /// Whether its host is being woken.
    ///
    /// # Errors
    /// If its command failed.
    pub fn waking(&self, endpoint: &Endpoint) -> Result<Option<Waking>, WakeError> {
        match self.settings.of_host(endpoint.host()).wake {
            Some(wake) => Waker::of(&self.directory, endpoint.host(), &wake).look(SystemTime::now()),
            None => Ok(None),
        }
    }

    /// Whether this process works for the start of a master: it is the ProxyCommand of an ssh that a pool
    /// started. Then it must not wait for that master, nor use one to the same host.
    pub fn serves_a_start(&self) -> bool {
        !start::starting().is_empty()
    }

    /// Whether this process works for the start of that very master, or of another one to the same far end, so that waiting
    /// for it would be a circle.
    /// A chain of starts that is too long for any sensible configuration counts as one too.
    pub fn is_starting(&self, endpoint: &Endpoint) -> bool {
        let starting = start::starting();
        starting.len() >= LONGEST_CHAIN
            || instances::of(endpoint).any(|instance| starting.contains(&instance.name()))
    }

    /// How much time this process has, if it works for the start of a master: whoever waits for that gives up soon
    /// afterwards, and would not hear why there is no way.
    pub fn time_for_start(&self) -> Option<Duration> {
        start::time_left()
    }

    /// Leaves a line, and one with the cure, for whoever waits for the start that this process works for: such an
    /// ssh throws its ProxyCommand's stderr away (`ssh_proxy_connect` in sshconnect.c).
    pub fn tell_starter(&self, line: &str, cure: Option<&str>) {
        let Some(name) = start::starting().pop() else { return };
        // Its own log must be there; a new file would be nobody's.
        let log = OpenOptions::new().append(true).open(Files::new(&self.directory, &name).log);
        let cure = cure.map_or_else(String::new, |cure| format!("{CURE_OF_PROXY}{cure}\n"));
        let _ = log.and_then(|mut log| log.write_all(format!("{SAID_BY_PROXY}{line}\n{cure}").as_bytes()));
    }

    /// The files of the master that somebody opens by hand for an endpoint, if it is set that it may be used.
    pub(super) fn foreign(&self, endpoint: &Endpoint) -> Option<Files> {
        let socket = self.settings.of_host(endpoint.host()).control_path?;
        if endpoint.instance > 0 {
            return None;
        }
        if endpoint.host_keys.is_some() {
            // What key it was opened with nobody knows.
            tracing::debug!(
                destination = endpoint.destination,
                "not used for a pinned host key: control-path"
            );
            return None;
        }
        Some(Files { socket, ..Files::new(&self.directory, &format!("own{}", endpoint.name())) })
    }

    pub(super) fn files(&self, endpoint: &Endpoint) -> Files {
        Files::new(&self.directory, &endpoint.name())
    }
}
