//! What is written down of a master for other processes: who it is, what it was started from, and how its last
//! start failed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{
    effective::{Effective, Stamp},
    name::Endpoint,
    process,
    start::{Files, Setback},
};

/// A master as it was written down.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// The destination as it was given.
    pub(super) destination: String,
    /// The port as it was given.
    pub(super) port: Option<u16>,
    /// Its process and when that began. None while it is being started, and if whoever started it was killed then.
    pub(super) process: Option<(u32, Option<String>)>,
    /// When its start began.
    pub(super) started_at: SystemTime,
    /// What ssh's configuration said of it, as a hash.
    pub(super) configuration: String,
    /// The files that said it, as they were.
    pub(super) stamps: Vec<Stamp>,
}

impl Record {
    /// Of a master that is about to be started.
    pub(super) fn new(endpoint: &Endpoint, effective: &Effective) -> Self {
        Record {
            destination: endpoint.destination.clone(),
            port: endpoint.port,
            process: None,
            started_at: SystemTime::now(),
            configuration: effective.hash.clone(),
            stamps: effective.stamps.clone(),
        }
    }

    /// The same with the process, once it is known.
    pub(super) fn of_process(mut self, pid: u32) -> Self {
        self.process = Some((pid, process::birth(pid)));
        self
    }

    pub(super) fn to_text(&self) -> String {
        let stamps: Vec<Value> =
            self.stamps.iter().map(|stamp| json!([stamp.path.to_string_lossy(), stamp.state])).collect();
        json!({
            "destination": self.destination,
            "port": self.port,
            "pid": self.process.as_ref().map(|(pid, _)| pid),
            "born": self.process.as_ref().and_then(|(_, born)| born.as_ref()),
            "started-at": self.started_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            "configuration": self.configuration,
            "files": stamps,
        })
        .to_string()
    }

    /// Reads it back. None if there is none, or none that we understand.
    pub(super) fn read(files: &Files) -> Option<Self> {
        Record::read_at(&files.record)
    }

    /// The same by the file's path.
    pub(super) fn read_at(path: &Path) -> Option<Self> {
        let record: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let started_at = Duration::try_from_secs_f64(record["started-at"].as_f64()?).ok()?;
        let pid = record["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        let stamp = |value: &Value| {
            let path = PathBuf::from(value[0].as_str()?);
            Some(Stamp { path, state: value[1].as_str()?.to_owned() })
        };
        Some(Record {
            destination: record["destination"].as_str()?.to_owned(),
            port: record["port"].as_u64().and_then(|port| port.try_into().ok()),
            process: pid.map(|pid| (pid, record["born"].as_str().map(str::to_owned))),
            started_at: UNIX_EPOCH.checked_add(started_at)?,
            // An earlier version did not write these down.
            configuration: record["configuration"].as_str().unwrap_or_default().to_owned(),
            stamps: record["files"].as_array().into_iter().flatten().filter_map(stamp).collect(),
        })
    }

    /// Whether the files that made it what it is are as they were.
    pub(super) fn is_current(&self) -> bool {
        self.stamps.iter().all(Stamp::still_holds)
    }
}

/// A failed start as text, different each time.
pub(super) fn failure(setback: &Setback) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let stamp = format!("{}-{count}-{now}", std::process::id());
    json!({
        "stamp": stamp,
        "timed-out": setback.timed_out,
        "connected": setback.connected,
        "stderr": setback.stderr,
        "fingerprint": setback.fingerprint,
    })
    .to_string()
}

/// Reads it back.
pub(super) fn read_failure(text: &[u8]) -> Option<Setback> {
    let failure: Value = serde_json::from_slice(text).ok()?;
    Some(Setback {
        timed_out: failure["timed-out"].as_bool()?,
        connected: failure["connected"].as_bool().unwrap_or_default(),
        stderr: failure["stderr"].as_str()?.to_owned(),
        fingerprint: failure["fingerprint"].as_str().map(str::to_owned),
    })
}
