//! What machines said of themselves lately, in one file for all of them.
//!
//! Owns its form. Whoever reads it gets what there is: a file that is missing, broken or not ours is an empty one.

use super::hangs::{self, Hangs};
use crate::plan::Sample;
use nix_offload_proxy::small_file;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// In the runtime directory.
const FILE: &str = "load.json";

/// A file with more bytes is not read: some 30,000 machines.
const MOST_BYTES: u64 = 8 << 20;

/// What is known of one machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// What it said, and when.
    pub sample: Sample,
    /// Seconds of an exchange without content on its connection; the shortest of the last ones.
    pub round_trip: Option<f64>,
}

/// What is known of all machines, by [`crate::reach::Reach::key`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Samples {
    machines: HashMap<String, Entry>,
    mute: HashMap<String, SystemTime>,
    hangs: HashMap<String, Hangs>,
}

/// A file as it is written.
#[derive(Serialize, Deserialize)]
struct Kept {
    machines: HashMap<String, KeptEntry>,
    /// Machines whose account has no shell for us, and since when that is known, in seconds since 1970.
    #[serde(default)]
    mute: HashMap<String, f64>,
    /// Machines whose file system was asked in vain: when it was the last time, and how many times in a row.
    #[serde(default)]
    hangs: HashMap<String, (f64, u32)>,
}

/// An [`Entry`] as it is written. Times are seconds since 1970.
#[derive(Serialize, Deserialize)]
struct KeptEntry {
    at: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cores: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    load_average: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    own_load: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cpu_pressure: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory_free: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    disk_free: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inodes_free: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inhibited: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    round_trip: Option<f64>,
}

impl Samples {
    /// Where it is in a runtime directory.
    pub fn path(directory: &Path) -> PathBuf {
        directory.join(FILE)
    }

    /// Reads the file.
    pub fn read(path: &Path) -> Self {
        let text = small_file::read_own(path, MOST_BYTES).ok();
        let kept: Option<Kept> = text.and_then(|text| serde_json::from_str(&text).ok());
        let Some(kept) = kept else { return Self::default() };
        let machines =
            kept.machines.into_iter().filter_map(|(key, entry)| Some((key, entry.into_entry()?))).collect();
        let mute = kept.mute.into_iter().filter_map(|(key, since)| Some((key, time(since)?))).collect();
        let hangs = kept
            .hangs
            .into_iter()
            .filter_map(|(key, (last, times))| Some((key, Hangs::since(time(last)?, times))))
            .collect();
        Self { machines, mute, hangs }
    }

    /// What is known of a machine, however old.
    pub fn of(&self, key: &str) -> Option<&Entry> {
        self.machines.get(key)
    }

    /// Whether nothing is known of any machine.
    pub fn is_empty(&self) -> bool {
        self.machines.is_empty()
    }

    /// Since when it is known that the machine's account has no shell for us.
    pub(super) fn mute_since(&self, key: &str) -> Option<SystemTime> {
        self.mute.get(key).copied()
    }

    pub(super) fn put(&mut self, key: &str, entry: Entry) {
        self.mute.remove(key);
        self.machines.insert(key.to_owned(), entry);
    }

    pub(super) fn put_mute(&mut self, key: &str, since: SystemTime) {
        self.mute.insert(key.to_owned(), since);
    }

    /// Whether the file system of a machine answers.
    pub(super) fn hangs(&self, key: &str) -> Hangs {
        self.hangs.get(key).copied().unwrap_or_default()
    }

    pub(super) fn put_hangs(&mut self, key: &str, hangs: Hangs) {
        match hangs.vain() {
            Some(_) => drop(self.hangs.insert(key.to_owned(), hangs)),
            None => drop(self.hangs.remove(key)),
        }
    }

    /// Forgets what a machine said.
    pub(super) fn remove(&mut self, key: &str) {
        self.machines.remove(key);
    }

    /// Forgets what is older, but for how a file system answers until it may have been asked again.
    pub(super) fn forget(&mut self, before: SystemTime) {
        let longer = before.checked_sub(hangs::LONGEST).unwrap_or(UNIX_EPOCH);
        self.hangs.retain(|_, hangs| hangs.vain().is_some_and(|(last, _)| last >= longer));
        self.machines.retain(|_, entry| entry.sample.at >= before);
        self.mute.retain(|_, since| *since >= before);
    }

    /// Writes the file whole.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let machines = self.machines.iter().map(|(key, entry)| (key.clone(), KeptEntry::of(entry))).collect();
        let mute = self.mute.iter().map(|(key, since)| (key.clone(), seconds(*since))).collect();
        let vain = |hangs: &Hangs| hangs.vain().map(|(last, times)| (seconds(last), times));
        let hangs = self.hangs.iter().filter_map(|(key, hangs)| Some((key.clone(), vain(hangs)?))).collect();
        let text = serde_json::to_vec(&Kept { machines, mute, hangs })?;
        let new = path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&text)?;
        fs::rename(&new, path)
    }
}

impl KeptEntry {
    fn of(Entry { sample, round_trip }: &Entry) -> Self {
        Self {
            at: seconds(sample.at),
            cores: sample.cores,
            load_average: sample.load_average,
            own_load: sample.own_load,
            cpu_pressure: sample.cpu_pressure,
            memory_free: sample.memory_free,
            disk_free: sample.disk_free,
            inodes_free: sample.inodes_free,
            inhibited: sample.inhibited.clone(),
            round_trip: *round_trip,
        }
    }

    fn into_entry(self) -> Option<Entry> {
        let sample = Sample {
            at: time(self.at)?,
            cores: self.cores,
            load_average: self.load_average,
            own_load: self.own_load,
            cpu_pressure: self.cpu_pressure,
            memory_free: self.memory_free,
            disk_free: self.disk_free,
            inodes_free: self.inodes_free,
            inhibited: self.inhibited,
        };
        Some(Entry { sample, round_trip: self.round_trip })
    }
}

fn seconds(time: SystemTime) -> f64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    // Milliseconds do, and make a shorter file.
    since.as_millis() as f64 / 1000.0
}

fn time(seconds: f64) -> Option<SystemTime> {
    let milliseconds = (seconds * 1000.0).round();
    let is_time = (0.0..1e15).contains(&milliseconds);
    UNIX_EPOCH.checked_add(Duration::from_millis(is_time.then_some(milliseconds as u64)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn entry(at: u64) -> Entry {
        let sample = Sample {
            cores: Some(8),
            load_average: Some(2.5),
            own_load: Some(0.25),
            cpu_pressure: Some(1.5),
            memory_free: Some(u64::MAX),
            disk_free: Some(1 << 40),
            inodes_free: Some(123_456_789),
            inhibited: Some("\"quoted\" ü".into()),
            ..Sample::empty(UNIX_EPOCH + Duration::from_millis(at))
        };
        Entry { sample, round_trip: Some(0.0125) }
    }

    #[test]
    fn what_was_written_is_read_and_the_rest_is_not_known() {
        let directory = tempfile::tempdir().unwrap();
        let path = Samples::path(directory.path());
        assert_eq!(Samples::read(&path), Samples::default());
        let mut samples = Samples::default();
        samples.put("a", entry(1_795_429_874_123));
        samples.put("b", Entry { sample: Sample::empty(UNIX_EPOCH), round_trip: None });
        samples.put_mute("c", UNIX_EPOCH + Duration::from_secs(5));
        let hangs = Hangs::since(UNIX_EPOCH + Duration::from_secs(5), 3);
        samples.put_hangs("a", hangs);
        samples.put_hangs("b", Hangs::default());
        samples.write(&path).unwrap();
        let read = Samples::read(&path);
        assert_eq!(read, samples);
        assert_eq!(read.of("a"), Some(&entry(1_795_429_874_123)));
        assert_eq!((read.of("c"), read.mute_since("c").is_some()), (None, true));
        assert_eq!((read.hangs("a"), read.hangs("b")), (hangs, Hangs::default()));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);

        samples.put("c", entry(7_000));
        samples.forget(UNIX_EPOCH + Duration::from_secs(6));
        assert!(samples.of("a").is_some() && samples.of("c").is_some() && samples.of("b").is_none());
        assert_eq!(samples.mute_since("c"), None, "it has spoken");
        assert_eq!(samples.hangs("a"), hangs, "it may not have been asked since");
        samples.forget(UNIX_EPOCH + hangs::LONGEST + Duration::from_secs(6));
        assert_eq!(samples.hangs("a"), Hangs::default());
    }

    #[test]
    fn what_is_broken_or_not_ours_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        let path = Samples::path(directory.path());
        let good = r#"{"machines":{"a":{"at":5.5}}}"#;
        for text in [
            "",
            "{}",
            "null",
            "[1]",
            "{\"machines\":{\"a\":{}}}",
            &good[..20],
            "\u{0}",
            "{\"machines\":{\"a\":{\"at\":\"x\"}}}",
            "{\"machines\":{\"a\":{\"at\":1e999}}}",
            "{\"machines\":{\"a\":{\"at\":-1}}}",
            "{\"machines\":{\"a\":{\"at\":5,\"cores\":-1}}}",
        ] {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            assert_eq!(Samples::read(&path), Samples::default(), "{text}");
        }
        fs::write(&path, good).unwrap();
        assert!(Samples::read(&path).of("a").is_some());
        symlink(&path, directory.path().join("link")).unwrap();
        assert_eq!(Samples::read(&directory.path().join("link")), Samples::default());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(Samples::read(&path), Samples::default());
        nix::unistd::mkfifo(&directory.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(Samples::read(&directory.path().join("fifo")), Samples::default());
        assert_eq!(Samples::read(directory.path()), Samples::default());
    }
}
