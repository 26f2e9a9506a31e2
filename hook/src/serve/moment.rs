//! Time that this process lived through.
//!
//! How long something has lasted is remembered as the time at which it began, since other processes are to know it too. That
//! goes wrong when this machine sleeps, or when its clock is set: nobody was patient for the hour in which the lid was closed.

use std::time::{Duration, Instant, SystemTime};

/// A moment on both clocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) wall: SystemTime,
    /// It stands still while the machine sleeps (`CLOCK_MONOTONIC`).
    pub(super) lived: Instant,
}

/// By how much the clock went on more than the time that was lived through, or less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missed {
    Asleep(Duration),
    SetBack(Duration),
}

impl Moment {
    pub(super) fn now() -> Self {
        Self { wall: SystemTime::now(), lived: Instant::now() }
    }

    /// What was missed between then and now.
    pub(super) fn missed(self) -> Missed {
        self.missed_until(Self::now())
    }

    /// What was missed between then and `now`.
    pub(super) fn missed_until(self, now: Self) -> Missed {
        let lived = now.lived.saturating_duration_since(self.lived);
        match now.wall.duration_since(self.wall + lived) {
            Ok(asleep) => Missed::Asleep(asleep),
            Err(behind) => Missed::SetBack(behind.duration()),
        }
    }
}

impl Missed {
    /// When something that began `since` would have begun for it to have lasted as long as was lived through.
    pub(super) fn after(self, since: SystemTime) -> SystemTime {
        match self {
            Self::Asleep(asleep) => since.checked_add(asleep),
            Self::SetBack(behind) => since.checked_sub(behind),
        }
        .unwrap_or(since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_was_slept_through_is_no_time_of_waiting() {
        let then = Moment::now();
        // Ten seconds went by; the clock says otherwise.
        let later = |clock: SystemTime| Moment { wall: clock, lived: then.lived + 10 * SECOND };
        let since = then.wall - 60 * SECOND;
        for (clock, waited) in
            [(then.wall + 10 * SECOND, 70), (then.wall + 3610 * SECOND, 70), (then.wall - 90 * SECOND, 70)]
        {
            let since = then.missed_until(later(clock)).after(since);
            assert_eq!(clock.duration_since(since).unwrap(), waited * SECOND);
        }
    }
}
