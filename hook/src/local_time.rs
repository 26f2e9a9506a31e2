//! Moments as people write them here. Must never ask what time it is.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::time::{Duration, SystemTime};

/// Date and time of day in this machine's time zone, as `2026-11-23 10:22:05`.
pub fn text(moment: SystemTime) -> String {
    in_zone(moment, TimeZone::system())
}

fn in_zone(moment: SystemTime, zone: TimeZone) -> String {
    let moment = Timestamp::try_from(moment).unwrap_or(Timestamp::MAX);
    moment.to_zoned(zone).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// A span in its two largest units, as `2 h`, `1 h 30 min`, `3 d 4 h`, `42 s`.
pub fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    let units = [(86_400, "d"), (3600, "h"), (60, "min"), (1, "s")];
    let first = units.iter().position(|(unit, _)| seconds >= *unit).unwrap_or(units.len() - 1);
    let mut text = format!("{} {}", seconds / units[first].0, units[first].1);
    if let Some((unit, name)) = units.get(first + 1) {
        let rest = seconds % units[first].0 / unit;
        // Nobody wants seconds beside minutes.
        if rest > 0 && *unit > 1 {
            text.push_str(&format!(" {rest} {name}"));
        }
    }
    text
}

/// How long ago a moment was; nothing for one to come.
pub fn ago(moment: SystemTime, now: SystemTime) -> String {
    span(now.duration_since(moment).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    #[test]
    fn moments_are_told_in_the_time_of_the_place() {
        let moment = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        assert_eq!(in_zone(moment, TimeZone::UTC), "2023-11-14 22:13:20");
        let east = TimeZone::fixed(jiff::tz::offset(2));
        assert_eq!(in_zone(moment, east), "2023-11-15 00:13:20");
    }

    #[test]
    fn spans_have_two_units_at_most() {
        for (seconds, expected) in [
            (0, "0 s"),
            (59, "59 s"),
            (119, "1 min"),
            (5400, "1 h 30 min"),
            (7200, "2 h"),
            (86_400 * 3 + 3600 * 4 + 60, "3 d 4 h"),
            (86_400 + 60, "1 d"),
        ] {
            assert_eq!(span(Duration::from_secs(seconds)), expected, "{seconds}");
        }
    }
}
