//! How long a build has waited for a machine, and for how much of that obstacles were to blame.
//!
//! Must never count time in which the build ran, or which nobody lived through.

use super::moment::Moment;
use crate::state::Times;
use std::cell::Cell;
use std::time::SystemTime;

/// A build's wait for a machine.
pub(super) struct Wait {
    since: Cell<SystemTime>,
    /// It has had a connection since.
    has_ended: Cell<bool>,
    obstructed: Cell<Option<SystemTime>>,
    /// When it was last decided about.
    looked: Cell<Option<Moment>>,
}

impl Wait {
    /// Of a build for which Nix asks again or for the first time.
    pub(super) fn new(times: Times) -> Self {
        Self {
            since: Cell::new(times.first),
            has_ended: Cell::new(false),
            obstructed: Cell::new(times.obstructed),
            looked: Cell::new(None),
        }
    }

    /// Since when it waits: when Nix first asked for it, or when it lost the machine on which it ran.
    pub(super) fn since(&self) -> SystemTime {
        self.since.get()
    }

    /// Since when obstacles that may pass have kept it from every machine, as of the last decision.
    pub(super) fn obstructed(&self) -> Option<SystemTime> {
        self.obstructed.get()
    }

    /// A decision has found that, or another build that waits for the same.
    pub(super) fn note_obstructed(&self, since: Option<SystemTime>) {
        self.obstructed.set(since);
    }

    /// It is about to be decided about: what this machine slept through since the last time does not count.
    pub(super) fn look(&self, now: Moment) {
        if let Some(missed) = self.looked.replace(Some(now)).map(|last| last.missed_until(now)) {
            self.obstructed.set(self.obstructed.get().map(|since| missed.after(since)));
        }
    }

    /// It has a connection.
    pub(super) fn end(&self) {
        self.has_ended.set(true);
    }

    /// It waits again if it has ended. The time that the build ran is no time of waiting.
    pub(super) fn go_on(&self, now: SystemTime) {
        if self.has_ended.take() {
            self.since.set(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_time_that_a_build_ran_is_no_time_of_waiting() {
        let first = SystemTime::now();
        let wait = Wait::new(Times { first, obstructed: None });
        wait.go_on(first + SECOND);
        assert_eq!(wait.since(), first, "it has not run");
        wait.end();
        assert_eq!(wait.since(), first);
        wait.go_on(first + 60 * SECOND);
        wait.go_on(first + 90 * SECOND);
        assert_eq!(wait.since(), first + 60 * SECOND, "when it lost its machine");
    }

    #[test]
    fn nobody_is_patient_while_this_machine_sleeps() {
        let then = Moment::now();
        let at = |lived: u32, asleep: u32| Moment {
            wall: then.wall + (lived + asleep) * SECOND,
            lived: then.lived + lived * SECOND,
        };
        let wait = Wait::new(Times { first: then.wall, obstructed: Some(then.wall) });
        wait.look(then);
        wait.look(at(10, 0));
        assert_eq!(wait.obstructed(), Some(then.wall));
        // The decisions in between may have failed: what was missed stays so.
        wait.look(at(20, 3600));
        wait.look(at(30, 3600));
        assert_eq!(wait.obstructed(), Some(then.wall + 3600 * SECOND));
        wait.note_obstructed(None);
        wait.look(at(40, 7200));
        assert_eq!(wait.obstructed(), None);
    }
}
