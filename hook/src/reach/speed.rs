//! How fast bytes travel between here and a machine, as seen in earlier builds, for estimates.
//!
//! Must never be taken for more than that: builds that share a link each see a part of it.

use nix_offload_proxy::small_file;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Less than this, in bytes, fits into what is under way anyway and says nothing.
const LEAST_BYTES: u64 = 1 << 20;
/// What is faster or slower, in bytes per second, is no measurement.
const SLOWEST: f64 = 1e3;
const FASTEST: f64 = 1e11;
/// How much a new transfer counts in the average. One that shared the link with others is slower than the link, so a
/// faster one counts more.
const FASTER: f64 = 0.5;
const SLOWER: f64 = 0.2;

/// The memory of one machine, shared by all hooks of a user.
#[derive(Debug, Clone)]
pub struct Speed {
    path: PathBuf,
}

/// Bytes of NARs per second in each direction, if they are known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Averages {
    sending: Option<f64>,
    fetching: Option<f64>,
}

impl Speed {
    /// A file that need not be there.
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Bytes per second towards the machine; if nothing was sent yet, from there.
    pub fn bandwidth(&self) -> Option<f64> {
        let averages = self.read();
        averages.sending.or(averages.fetching)
    }

    /// Notes what a build sent and fetched, in bytes of NARs, and how long each took. That it cannot be noted only
    /// makes estimates worse.
    pub fn note(&self, sent: (u64, Duration), fetched: (u64, Duration)) {
        let before = self.read();
        let averages =
            Averages { sending: mean(before.sending, sent), fetching: mean(before.fetching, fetched) };
        if averages == before {
            return;
        }
        let said =
            |average: Option<f64>| average.map_or_else(|| "-".into(), |average| format!("{average:.0}"));
        let text = format!("{} {}\n", said(averages.sending), said(averages.fetching));
        let _ = small_file::write_whole(&self.path, &text);
    }

    fn read(&self) -> Averages {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let mut words = text.split_ascii_whitespace();
        let mut average = || words.next().and_then(|word| word.parse().ok()).filter(is_sound);
        Averages { sending: average(), fetching: average() }
    }
}

fn is_sound(speed: &f64) -> bool {
    (SLOWEST..=FASTEST).contains(speed)
}

/// The average with another transfer, if that says anything.
fn mean(before: Option<f64>, (bytes, took): (u64, Duration)) -> Option<f64> {
    let speed = bytes as f64 / took.as_secs_f64();
    if bytes < LEAST_BYTES || !is_sound(&speed) {
        return before;
    }
    Some(before.map_or(speed, |old| old + (speed - old) * if speed > old { FASTER } else { SLOWER }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: (u64, Duration) = (0, Duration::ZERO);
    const MIB: u64 = 1 << 20;

    fn second(mib: u64) -> (u64, Duration) {
        (mib * MIB, Duration::from_secs(1))
    }

    #[test]
    fn each_direction_has_its_average_and_faster_transfers_count_more() {
        let directory = tempfile::tempdir().unwrap();
        let speed = Speed::at(directory.path().join("m.speed"));
        assert_eq!(speed.bandwidth(), None);
        speed.note(NONE, second(100));
        assert_eq!(speed.bandwidth(), Some((100 * MIB) as f64), "the other direction is better than nothing");
        speed.note(second(10), NONE);
        assert_eq!(speed.bandwidth(), Some((10 * MIB) as f64));
        speed.note(second(20), second(50));
        assert_eq!(speed.bandwidth(), Some((15 * MIB) as f64));
        speed.note(second(5), NONE);
        assert_eq!(speed.bandwidth(), Some((13 * MIB) as f64));
        assert_eq!(speed.read().fetching, Some((90 * MIB) as f64));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn little_and_nonsense_say_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let speed = Speed::at(directory.path().join("m.speed"));
        let day = Duration::from_secs(86_400);
        for transfer in
            [(MIB - 1, Duration::from_secs(1)), (MIB, Duration::ZERO), (2 * MIB, day), (u64::MAX, day / 1000)]
        {
            speed.note(transfer, transfer);
            assert!(speed.bandwidth().is_none(), "{transfer:?}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        for text in ["nan nan", "-5 -5", "0 0", "inf", "x", "1e300 1e300", ""] {
            fs::write(&speed.path, text).unwrap();
            assert_eq!(speed.bandwidth(), None, "{text}");
        }
    }
}
