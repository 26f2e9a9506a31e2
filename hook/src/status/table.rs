//! The state of machines as people read it, and as scripts do.
//!
//! Must never ask anybody, the clock included.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{Mood, Row};
use crate::plan::known::Sample;
use crate::slots::Holder;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What stands above the columns.
const HEADS: [&str; 8] = ["MACHINE", "STATE", "SLOTS", "LOAD", "DISK", "MEMORY", "SEEN", "SSH"];
/// What stands for a value that is not known, or that there is not.
const NONE: &str = "-";
/// A longer name pushes its own line alone to the right.
const WIDEST_NAME: usize = 32;

/// A line for each machine below one that names the columns, and below each what there is to say.
pub(super) fn text(rows: &[Row], now: SystemTime, in_colour: bool) -> String {
    let cells: Vec<[String; HEADS.len()]> = rows.iter().map(|row| cells(row, now)).collect();
    let heads = HEADS.map(str::to_owned);
    let width = |column: usize| {
        let of = |cells: &[String; HEADS.len()]| cells[column].chars().count();
        let all = [&heads].into_iter().chain(&cells).map(of);
        if column == 0 { all.filter(|width| *width <= WIDEST_NAME).max() } else { all.max() }
            .unwrap_or_default()
    };
    let widths: [usize; HEADS.len()] = std::array::from_fn(width);
    let line = |cells: &[String; HEADS.len()], mood: Option<Mood>| {
        let mut line = String::new();
        for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
            // Writing to a String cannot fail.
            let _ = match mood.filter(|_| in_colour && column == 1).and_then(Mood::colour) {
                Some(colour) => write!(line, "\u{1b}[{colour}m{cell:width$}\u{1b}[0m  "),
                None => write!(line, "{cell:width$}  "),
            };
        }
        format!("{}\n", line.trim_end())
    };
    let mut text = line(&heads, None);
    for (row, cells) in rows.iter().zip(&cells) {
        text.push_str(&line(cells, Some(row.mood)));
        for line in row.reason.iter().flat_map(|reason| reason.lines()) {
            let _ = writeln!(text, "  {}", line.trim());
        }
        for build in &row.builds {
            let _ = writeln!(text, "  {}", described(build.as_ref(), now));
        }
        match row.waiting {
            Some(number @ 2..) => drop(writeln!(text, "  {number} builds wait for a slot here")),
            Some(1) => text.push_str("  1 build waits for a slot here\n"),
            Some(0) | None => {}
        }
    }
    text
}

/// An array with an object for each machine; null is what is not known.
pub(super) fn json(rows: &[Row], now: SystemTime) -> Value {
    rows.iter().map(|row| object(row, now)).collect()
}

fn cells(row: &Row, now: SystemTime) -> [String; HEADS.len()] {
    let sample = row.sample.as_ref();
    let known = |text: Option<String>| text.unwrap_or_else(|| NONE.to_owned());
    let load = |sample: &Sample| {
        let load = sample.load_average?;
        Some(match sample.cores {
            Some(cores) => format!("{load:.1}/{cores}"),
            None => format!("{load:.1}"),
        })
    };
    let left = row.until.and_then(|until| until.duration_since(now).ok());
    [
        row.name.clone(),
        left.map_or_else(|| row.state.to_owned(), |left| format!("{} {}", row.state, until(left))),
        row.taken.map_or_else(|| NONE.to_owned(), |taken| format!("{taken}/{}", row.slots)),
        known(sample.and_then(load)),
        known(sample.and_then(|sample| sample.disk_free).map(size)),
        known(sample.and_then(|sample| sample.memory_free).map(size)),
        known(sample.map(|sample| short(age(sample.at, now)))),
        match row.master {
            None => NONE.to_owned(),
            Some(None) => "yes".to_owned(),
            Some(Some(since)) => short(age(since, now)),
        },
    ]
}

fn described(build: Option<&Holder>, now: SystemTime) -> String {
    let Some(build) = build else { return "a build that another hook sent, or that has only begun".into() };
    let runs = short(age(build.began(), now));
    match build.expected.and_then(|expected| Duration::try_from_secs_f64(expected).ok()) {
        Some(expected) => format!("{}, for {runs} ({} expected)", build.name(), short(expected)),
        None => format!("{}, for {runs}", build.name()),
    }
}

fn object(row: &Row, now: SystemTime) -> Value {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let builds = row.builds.iter().map(|build| {
        json!({
            "derivation": build.as_ref().map(|build| build.derivation.as_str()),
            "pid": build.as_ref().map(|build| build.pid),
            "since": build.as_ref().map(|build| seconds(build.began())),
            "expectedSeconds": build.as_ref().and_then(|build| build.expected),
        })
    });
    let mut reason = row.reason.iter().flat_map(|reason| reason.splitn(2, '\n'));
    json!({
        "machine": row.name,
        "state": row.state,
        "reason": reason.next(),
        "hint": reason.next().map(|hint| hint.trim().trim_start_matches("hint: ")),
        "until": row.until.map(seconds),
        "slots": row.slots,
        "taken": row.taken,
        "builds": builds.collect::<Vec<_>>(),
        "waiting": row.waiting,
        "master": row.master.map(|since| json!({ "since": since.map(seconds) })),
        "sample": row.sample.as_ref().map(|sample| json!({
            "at": seconds(sample.at),
            "ageSeconds": age(sample.at, now).as_secs(),
            "cores": sample.cores,
            "loadAverage": sample.load_average,
            "cpuPressure": sample.cpu_pressure,
            "memoryFree": sample.memory_free,
            "diskFree": sample.disk_free,
            "inodesFree": sample.inodes_free,
            "inhibited": sample.inhibited,
        })),
    })
}

/// None at all if the clock was set back since.
fn age(since: SystemTime, now: SystemTime) -> Duration {
    now.duration_since(since).unwrap_or_default()
}

/// A span in its largest whole unit: `42s`, `7m`, `3h`, `2d`.
fn short(span: Duration) -> String {
    let seconds = span.as_secs();
    let units = [(86_400, "d"), (3600, "h"), (60, "m")];
    match units.into_iter().find(|(unit, _)| seconds >= *unit) {
        Some((unit, name)) => format!("{}{name}", seconds / unit),
        None => format!("{seconds}s"),
    }
}

/// A span to come, rounded up to minutes where it has any: `42s`, `7m`, `1h30m`, `2d`.
fn until(span: Duration) -> String {
    let minutes = span.as_secs().div_ceil(60);
    match (minutes / 60, minutes % 60) {
        (0, 0..=1) => short(span),
        (hours @ 1..24, minutes @ 1..) => format!("{hours}h{minutes}m"),
        _ => short(Duration::from_secs(minutes * 60)),
    }
}

/// Bytes with a unit of one letter, in powers of 1024: `1.5G`, `120G`.
fn size(bytes: u64) -> String {
    let units = [(1u64 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    match units.into_iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) if bytes / unit < 10 => format!("{:.1}{name}", bytes as f64 / unit as f64),
        Some((unit, name)) => format!("{}{name}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000;

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(NOW)
    }

    fn ago(seconds: u64) -> SystemTime {
        now() - Duration::from_secs(seconds)
    }

    fn row(name: &str, state: &'static str, mood: Mood) -> Row {
        Row {
            name: name.into(),
            state,
            mood,
            reason: None,
            until: None,
            slots: 8,
            taken: Some(0),
            builds: Vec::new(),
            waiting: None,
            master: None,
            sample: None,
        }
    }

    fn rows() -> [Row; 4] {
        let sample = Sample {
            cores: Some(16),
            load_average: Some(12.34),
            memory_free: Some(3 << 30),
            disk_free: Some(120 << 30),
            ..Sample::empty(ago(4))
        };
        let build = Holder {
            pid: 7,
            derivation: "/nix/store/0-hello-2.12.drv".into(),
            since: (NOW - 130) as f64,
            expected: Some(300.0),
        };
        [
            Row {
                taken: Some(2),
                builds: vec![Some(build), None],
                master: Some(Some(ago(3700))),
                sample: Some(sample),
                waiting: Some(3),
                ..row("ssh-ng://nix@mac", "ready", Mood::Well)
            },
            Row {
                reason: Some("new disk".into()),
                until: Some(now() + Duration::from_secs(5400)),
                ..row("ssh://pi", "drained", Mood::Withheld)
            },
            Row {
                reason: Some("connection refused\n  hint: start sshd".into()),
                taken: None,
                master: Some(None),
                ..row("ssh-ng://build@a-machine-with-a-long-name.example.org", "down", Mood::Ill)
            },
            row("auto", "ready", Mood::Well),
        ]
    }

    #[test]
    fn a_line_for_each_machine_is_readable_at_eighty_columns() {
        let text = text(&rows(), now(), false);
        assert_eq!(
            text,
            "MACHINE           STATE          SLOTS  LOAD     DISK  MEMORY  SEEN  SSH\n\
             ssh-ng://nix@mac  ready          2/8    12.3/16  120G  3.0G    4s    1h\n\
             \x20 hello-2.12, for 2m (5m expected)\n\
             \x20 a build that another hook sent, or that has only begun\n\
             \x20 3 builds wait for a slot here\n\
             ssh://pi          drained 1h30m  0/8    -        -     -       -     -\n\
             \x20 new disk\n\
             ssh-ng://build@a-machine-with-a-long-name.example.org  down           -      -        -     -       -     yes\n\
             \x20 connection refused\n\
             \x20 hint: start sshd\n\
             auto              ready          0/8    -        -     -       -     -\n"
        );
    }

    #[test]
    fn only_what_is_not_well_has_a_colour() {
        let text = text(&rows(), now(), true);
        assert_eq!(text.matches("\u{1b}[").count(), 4, "{text}");
        assert!(text.contains("\u{1b}[33mdrained 1h30m\u{1b}[0m  0/8"), "{text}");
        assert!(text.contains("\u{1b}[31mdown         \u{1b}[0m  -"), "{text}");
    }

    #[test]
    fn scripts_get_numbers_and_null() {
        let json = json(&rows(), now());
        let (first, second, third) = (&json[0], &json[1], &json[2]);
        assert_eq!((&first["taken"], &first["slots"], &first["waiting"]), (&json!(2), &json!(8), &json!(3)));
        assert_eq!(first["master"]["since"], NOW - 3700);
        let build = &first["builds"][0];
        assert_eq!(
            (&build["derivation"], &build["since"], &build["expectedSeconds"], &build["pid"]),
            (&json!("/nix/store/0-hello-2.12.drv"), &json!(NOW - 130), &json!(300.0), &json!(7))
        );
        assert_eq!(first["builds"][1]["derivation"], Value::Null);
        let sample = &first["sample"];
        assert_eq!((&sample["ageSeconds"], &sample["diskFree"]), (&json!(4), &json!(120u64 << 30)));
        assert_eq!((&second["state"], &second["until"]), (&json!("drained"), &json!(NOW + 5400)));
        assert_eq!((&second["master"], &second["sample"]), (&Value::Null, &Value::Null));
        assert_eq!((&third["taken"], &third["reason"]), (&Value::Null, &json!("connection refused")));
        assert_eq!((&third["hint"], &second["hint"]), (&json!("start sshd"), &Value::Null));
    }

    #[test]
    fn spans_and_sizes_are_short() {
        let spans = [0, 59, 60, 7199, 86_400].map(|seconds| short(Duration::from_secs(seconds)));
        let left = [0, 59, 61, 5400, 7199, 7201, 86_399, 90_000].map(|s| until(Duration::from_secs(s)));
        assert_eq!(left, ["0s", "59s", "2m", "1h30m", "2h", "2h1m", "1d", "1d"]);
        assert_eq!(spans, ["0s", "59s", "1m", "1h", "1d"]);
        assert_eq!([9, 1 << 10, 15 << 20, 3 << 39].map(size), ["9B", "1.0K", "15M", "1.5T"]);
    }
}
