//! The masters as people read them, and as scripts do.
//!
//! A line here must not ask anybody, the clock included.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::master::MasterInfo;

/// What stands above the columns.
const HEADS: [&str; 8] = ["HOST", "STATE", "PID", "AGE", "CHANNELS", "SENT", "RECEIVED", "LOG"];
/// What stands for a value that is not known.
const UNKNOWN: &str = "?";

/// A table with a line for each master, its columns aligned, below a line that names them. Nothing without masters.
pub(crate) fn text(masters: &[MasterInfo], now: SystemTime) -> String {
    if masters.is_empty() {
        return String::new();
    }
    let heads = HEADS.map(str::to_owned);
    table(&[heads].into_iter().chain(masters.iter().map(|master| row(master, now))).collect::<Vec<_>>())
}

/// An array with an object for each master; times are in seconds, traffic is in bytes, null is what is not known.
pub(crate) fn json(masters: &[MasterInfo], now: SystemTime) -> String {
    let object = |master: &MasterInfo| {
        json!({
            "destination": master.destination,
            "pid": master.pid,
            "control-path": master.control_path,
            "log-path": master.log_path,
            "started-at": master.started_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            "age": age(master, now).as_secs(),
            "alive": master.alive,
            "channels": master.channels,
            "sent": master.traffic.map(|traffic| traffic.sent),
            "received": master.traffic.map(|traffic| traffic.received),
        })
    };
    Value::from_iter(masters.iter().map(object)).to_string()
}

fn row(master: &MasterInfo, now: SystemTime) -> [String; HEADS.len()] {
    let known = |text: Option<String>| text.unwrap_or_else(|| UNKNOWN.to_owned());
    [
        master.destination.clone(),
        if master.alive { "alive" } else { "dead" }.to_owned(),
        master.pid.to_string(),
        roughly(age(master, now)),
        known(master.channels.map(|number| number.to_string())),
        known(master.traffic.map(|traffic| size(traffic.sent))),
        known(master.traffic.map(|traffic| size(traffic.received))),
        master.log_path.display().to_string(),
    ]
}

/// None at all if the clock was set back since it was started.
fn age(master: &MasterInfo, now: SystemTime) -> Duration {
    now.duration_since(master.started_at).unwrap_or_default()
}

/// Lines with columns of equal width, two blanks apart; the last one is as wide as it likes.
fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let widths: [usize; COLUMNS] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let line = |row: &[String; COLUMNS]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A time in its largest whole unit: `42s`, `7m`, `3h`, `2d`.
fn roughly(time: Duration) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    match time.as_secs() {
        seconds @ ..MINUTE => format!("{seconds}s"),
        seconds @ ..HOUR => format!("{}m", seconds / MINUTE),
        seconds @ ..DAY => format!("{}h", seconds / HOUR),
        seconds => format!("{}d", seconds / DAY),
    }
}

/// Bytes in the unit that leaves less than 1024 before it: `512 B`, `12.3 MiB`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    /// From here on it would be rounded to 1024.0.
    const TOO_LARGE: f64 = 1023.95;
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut number = bytes as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while number >= TOO_LARGE
        && let Some(larger) = units.next()
    {
        number /= 1024.0;
        unit = Some(larger);
    }
    format!("{number:.1} {}", unit.unwrap_or(&""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_letters_and_the_last_one_ends_the_line() {
        let rows = [["HOST", "AGE", "LOG"], ["bücher", "7m", "/run/long path"], ["b", "12345s", ""]];
        let table = table(&rows.map(|row| row.map(str::to_owned)));
        let expected = "HOST    AGE     LOG\n\
                        bücher  7m      /run/long path\n\
                        b       12345s";
        assert_eq!(table, expected);
    }

    #[test]
    fn times_are_in_whole_units() {
        for (seconds, expected) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (3599, "59m"),
            (3600, "1h"),
            (86_399, "23h"),
            (86_400, "1d"),
            (400 * 86_400, "400d"),
        ] {
            assert_eq!(roughly(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn sizes_have_binary_units() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1_048_524, "1023.9 KiB"),
            (1_048_525, "1.0 MiB"),
            (12_900_000, "12.3 MiB"),
            (1 << 40, "1.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn without_masters_there_is_no_table_and_an_empty_array() {
        assert_eq!((text(&[], UNIX_EPOCH), json(&[], UNIX_EPOCH)), (String::new(), "[]".to_owned()));
    }
}
