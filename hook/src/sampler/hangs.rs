//! When a file system that did not answer is asked again.
//!
//! Pure. Whoever asks one that hangs leaves a process behind that waits for it, and that has a session, so it is not asked
//! often; but without an answer it is not known what is left on it, so it is asked.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, Instant};

/// After the first time.
const PAUSE: Duration = Duration::from_secs(300);
/// The longest pause; it doubles each time.
const LONGEST: Duration = Duration::from_secs(86_400);

/// What is known of one file system.
#[derive(Debug, Default)]
pub(super) struct Hangs {
    /// When it was last asked in vain, and how many times in a row.
    vain: Option<(Instant, u32)>,
}

impl Hangs {
    /// Whether it is time to ask it.
    pub(super) fn may_be_asked(&self, now: Instant) -> bool {
        self.vain.is_none_or(|(last, times)| {
            let pause = PAUSE.saturating_mul(1 << (times - 1).min(16)).min(LONGEST);
            now.saturating_duration_since(last) >= pause
        })
    }

    /// It did not answer.
    pub(super) fn hung(&mut self, now: Instant) {
        let times = self.vain.map_or(0, |(_, times)| times);
        self.vain = Some((now, times.saturating_add(1)));
    }

    /// It answered.
    pub(super) fn answered(&mut self) {
        self.vain = None;
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "there is no other way to an Instant")]
mod tests {
    use super::*;

    #[test]
    fn it_is_asked_again_after_five_minutes_and_more_seldom_each_time() {
        let begin = Instant::now();
        let at = |minutes: u64| begin + Duration::from_secs(60 * minutes);
        let mut hangs = Hangs::default();
        assert!(hangs.may_be_asked(begin));
        hangs.hung(begin);
        assert!(!hangs.may_be_asked(at(4)) && hangs.may_be_asked(at(5)));
        hangs.hung(at(5));
        assert!(!hangs.may_be_asked(at(14)) && hangs.may_be_asked(at(15)));
        for _ in 0..40 {
            hangs.hung(at(15));
        }
        assert!(!hangs.may_be_asked(at(15 + 1439)) && hangs.may_be_asked(at(15 + 1440)));
        hangs.answered();
        assert!(hangs.may_be_asked(at(15)));
        hangs.hung(at(15));
        assert!(hangs.may_be_asked(at(20)));
    }
}
