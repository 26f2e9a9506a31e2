//! When a file system that did not answer is asked again.
//!
//! Pure. Whoever asks one that hangs leaves a process behind that waits for it, and that has a session, so it is not asked
//! often; but without an answer it is not known what is left on it, so it is asked.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, SystemTime};

/// After the first time.
const PAUSE: Duration = Duration::from_secs(300);
/// The longest pause; it doubles each time.
pub(super) const LONGEST: Duration = Duration::from_secs(86_400);

/// What is known of one file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Hangs {
    /// When it was last asked in vain, and how many times in a row.
    vain: Option<(SystemTime, u32)>,
}

impl Hangs {
    /// One that was asked in vain so many times in a row, at that time the last time.
    pub(super) fn since(last: SystemTime, times: u32) -> Self {
        Self { vain: (times > 0).then_some((last, times)) }
    }

    /// When it was last asked in vain, and how many times in a row; none if it answers.
    pub(super) fn vain(self) -> Option<(SystemTime, u32)> {
        self.vain
    }

    /// Whether it is time to ask it.
    pub(super) fn may_be_asked(self, now: SystemTime) -> bool {
        self.vain.is_none_or(|(last, times)| {
            let pause = PAUSE.saturating_mul(1 << (times - 1).min(16)).min(LONGEST);
            // After the clock was set back it is not known how long ago that was.
            now.duration_since(last).map_or(true, |age| age >= pause)
        })
    }

    /// It did not answer.
    pub(super) fn hung(&mut self, now: SystemTime) {
        let times = self.vain.map_or(0, |(_, times)| times);
        self.vain = Some((now, times.saturating_add(1)));
    }

    /// It answered.
    pub(super) fn answered(&mut self) {
        self.vain = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    #[test]
    fn it_is_asked_again_after_five_minutes_and_more_seldom_each_time() {
        let at = |minutes: u64| UNIX_EPOCH + Duration::from_secs(1_700_000_000 + 60 * minutes);
        let mut hangs = Hangs::default();
        assert!(hangs.may_be_asked(at(0)));
        hangs.hung(at(0));
        assert!(!hangs.may_be_asked(at(4)) && hangs.may_be_asked(at(5)));
        hangs.hung(at(5));
        assert!(!hangs.may_be_asked(at(14)) && hangs.may_be_asked(at(15)));
        assert!(hangs.may_be_asked(at(1)), "the clock was set back");
        for _ in 0..40 {
            hangs.hung(at(15));
        }
        assert!(!hangs.may_be_asked(at(15 + 1439)) && hangs.may_be_asked(at(15 + 1440)));
        hangs.answered();
        assert!(hangs.may_be_asked(at(15)));
        hangs.hung(at(15));
        assert!(hangs.may_be_asked(at(20)));
        let (last, times) = hangs.vain().unwrap();
        assert_eq!((Hangs::since(last, times), Hangs::since(last, 0)), (hangs, Hangs::default()));
    }
}
