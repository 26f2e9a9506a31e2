//! All masters of a user: who they are, which one leads to a host, and ending them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use thiserror::Error;

use super::{
    clients, connect, forward,
    handle::{Avoid, Master, avoided, kill_recorded, remove},
    liveness::ALIVE_BOUND,
    lock::lock,
    mux::{self, Health},
    name::is_name,
    pool::Pool,
    process,
    record::Record,
    start::Files,
    traffic::{self, Traffic},
};

/// How long stopping waits for the lock, and for ssh to go before it is killed.
const STOP_BOUND: Duration = Duration::from_secs(5);
/// How long the log of a master that has ended is kept.
const LOG_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
/// The port of ssh where none is given.
const SSH_PORT: u16 = 22;

/// Why the masters could not be listed, or one not be stopped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PoolError {
    /// A file of the runtime directory cannot be used.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another process is starting or stopping it.
    #[error("another process is starting or stopping the master to {destination}")]
    Busy {
        /// Its destination.
        destination: String,
    },
    /// It does not go.
    #[error("the master to {destination} does not end")]
    Stubborn {
        /// Its destination.
        destination: String,
    },
}

/// What is known of a master.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MasterInfo {
    /// The destination as it was given.
    pub destination: String,
    /// Its process.
    pub pid: u32,
    /// Its control socket.
    pub control_path: PathBuf,
    /// Its log.
    pub log_path: PathBuf,
    /// When it was started.
    pub started_at: SystemTime,
    /// It answers.
    pub alive: bool,
    /// How many clients have connections to it: streams, sessions, forwards. None where the kernel does not tell.
    pub channels: Option<usize>,
    /// What went over its link to the host. None where the kernel does not tell, as for a link that is a pipe.
    pub traffic: Option<Traffic>,
    name: String,
    port: Option<u16>,
}

impl Pool {
    /// All masters that were started and have not been stopped, by destination. Each is asked whether it lives. What is left
    /// of those that ended by themselves is removed, of their logs what is older than a week.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<MasterInfo>, PoolError> {
        let io_error = |source| PoolError::Io { path: self.directory().to_owned(), source };
        let mut masters = Vec::new();
        // Before we ask, for that makes a connection too.
        let sockets = fs::read_to_string("/proc/net/unix").ok();
        for entry in fs::read_dir(self.directory()).map_err(io_error)? {
            let name = entry.map_err(io_error)?.file_name();
            let Some((name, extension)) = name.to_str().and_then(|name| name.rsplit_once('.')) else {
                continue;
            };
            let files = Files::new(self.directory(), name);
            if extension == "log" && is_name(name) && !files.record.exists() && is_old(&files.log) {
                forget(&files);
            }
            let Some(record) = Record::read(&files).filter(|_| extension == "json") else { continue };
            if has_ended(&files, &record) {
                forget(&files);
                continue;
            }
            let answers = match mux::health(&files.socket, ALIVE_BOUND) {
                Health::Alive { pid } => Some(pid),
                Health::Absent | Health::Silent => None,
            };
            // Without a process it is being started just now, or whoever started it was killed meanwhile.
            let Some(pid) = record.process.as_ref().map(|(pid, _)| *pid).or(answers) else { continue };
            masters.push(MasterInfo {
                destination: record.destination,
                pid,
                control_path: files.socket.clone(),
                log_path: files.log.clone(),
                started_at: record.started_at,
                alive: answers.is_some(),
                channels: sockets.as_deref().and_then(|text| clients::count(text, &files.socket)),
                traffic: None,
                name: files.name.clone(),
                port: record.port,
            });
        }
        let living = masters.iter().filter(|master| master.alive).map(|master| master.pid);
        let mut traffic = traffic::of(living, sockets.as_deref().unwrap_or_default());
        masters.iter_mut().for_each(|master| master.traffic = traffic.remove(&master.pid));
        masters.sort_by(|a, b| (&a.destination, &a.name).cmp(&(&b.destination, &b.name)));
        Ok(masters)
    }

    /// The master to a host, if a living one was started with that very name (and port, 22 if it had none).
    /// Aliases of ssh_config are not looked through. Starts nothing and does not wait.
    pub fn live_to(&self, host: &str, port: u16) -> Option<Master> {
        for entry in fs::read_dir(self.directory()).ok()?.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".json")) else { continue };
            let files = Files::new(self.directory(), name);
            let Some(record) = Record::read(&files) else { continue };
            let its_host = record.destination.rsplit_once('@').map_or(&*record.destination, |(_, host)| host);
            if its_host == host
                && record.port.unwrap_or(SSH_PORT) == port
                && avoided(&files) != Some(Avoid::Silent)
                && connect(&files.socket, Instant::now()).is_ok()
                && record.is_current()
            {
                return Some(Master::of(files, record.destination));
            }
        }
        None
    }

    /// Ends a master at once, with all its streams, and removes its files except the log.
    ///
    /// # Errors
    /// When another process is busy with it, or when it does not go.
    pub fn stop(&self, master: &MasterInfo) -> Result<(), PoolError> {
        let files = Files::new(self.directory(), &master.name);
        let io_error = |path: &Path| {
            let path = path.to_owned();
            move |source| PoolError::Io { path, source }
        };
        let Some(_lock) = lock(&files.lock, Instant::now() + STOP_BOUND).map_err(io_error(&files.lock))?
        else {
            return Err(PoolError::Busy { destination: master.destination.clone() });
        };
        match mux::health(&files.socket, ALIVE_BOUND) {
            // The socket is ours alone, so what answers there is the master.
            Health::Alive { pid } => {
                if let Some(born) = process::birth(pid) {
                    process::end(pid, &born, STOP_BOUND);
                }
            }
            Health::Silent => {
                kill_recorded(&files);
            }
            Health::Absent => {}
        }
        if !matches!(mux::health(&files.socket, ALIVE_BOUND), Health::Absent) {
            return Err(PoolError::Stubborn { destination: master.destination.clone() });
        }
        tracing::info!(
            event = "SSH master stopped",
            destination = master.destination,
            pid = master.pid,
            "SSH master to {} stopped",
            master.destination
        );
        remove_files(&files).map_err(|(path, source)| PoolError::Io { path, source })
    }
}

/// Whether a master has ended by itself: because nobody used it, or its link was cut. Then its ssh has removed its socket,
/// which one that was killed leaves behind (`cleanup_exit` in clientloop.c).
fn has_ended(files: &Files, record: &Record) -> bool {
    let Some((pid, Some(born))) = &record.process else { return false };
    let is_absent =
        |path: &Path| matches!(path.symlink_metadata(), Err(e) if e.kind() == io::ErrorKind::NotFound);
    is_absent(&files.socket) && process::birth(*pid).as_ref() != Some(born)
}

/// Removes what is left of a master that has ended, unless another one is just being started in its place. If that cannot
/// be done it is tried next time.
fn forget(files: &Files) {
    let Ok(Some(_lock)) = lock(&files.lock, Instant::now()) else { return };
    if Record::read(files).is_some_and(|record| !has_ended(files, &record)) {
        return;
    }
    if is_old(&files.log) {
        let _ = remove(&files.log);
    }
    let _ = remove_files(files);
}

fn is_old(log: &Path) -> bool {
    let written = fs::metadata(log).and_then(|metadata| metadata.modified());
    written.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|age| age > LOG_KEPT))
}

/// Removes the files of a master except its log, for whoever holds its lock.
fn remove_files(files: &Files) -> Result<(), (PathBuf, io::Error)> {
    forward::remove_all(&files.socket);
    // The lock last, and while it is held: see `lock`.
    let Files { socket, record, output, hosts, failure, avoid, keeper, keeping, .. } = files;
    for path in [socket, record, output, hosts, failure, avoid, keeper, keeping, &files.lock] {
        remove(path).map_err(|error| (path.clone(), error))?;
    }
    Ok(())
}
