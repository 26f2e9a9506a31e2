//! Whether a master lives, hangs, or is only slow. On a machine with too much to do an answer can take seconds, and a
//! slow master carries the streams of others, so silence alone is not enough to give it up.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use super::{
    mux::{self, Health},
    process::{self, Activity},
    record::Record,
};

/// How long a master may take to answer on its own socket before its process is looked at.
pub(super) const ALIVE_BOUND: Duration = Duration::from_secs(1);

/// Most answer in a fraction of this, so until then nobody looks.
const QUICK: Duration = Duration::from_millis(100);

/// What is known of a master.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Liveness {
    /// It answers, or its process was seen at work although it did not answer in time.
    Alive { pid: u32 },
    /// Nobody listens: no socket, or one that was left behind.
    Absent,
    /// It does not answer within a second, and its process does nothing meanwhile or is stopped.
    Hung,
}

/// Asks the master at a control socket. One that is at work is asked again for as long as `patience`, and taken to be
/// alive in the end. Says nothing of its link to the host.
pub(super) fn ask(control: &Path, patience: Duration) -> Liveness {
    let deadline = Instant::now() + patience;
    match mux::health(control, QUICK) {
        Health::Alive { pid } => return Liveness::Alive { pid },
        Health::Absent => return Liveness::Absent,
        Health::Silent => {}
    }
    loop {
        let recorded = Record::read_at(&control.with_extension("json")).and_then(|record| record.process);
        let activity = || recorded.as_ref().and_then(|(pid, born)| process::activity(*pid, born.as_deref()?));
        let before = activity();
        match mux::health(control, ALIVE_BOUND) {
            Health::Alive { pid } => return Liveness::Alive { pid },
            Health::Absent => return Liveness::Absent,
            Health::Silent => {}
        }
        let Some((pid, _)) = &recorded else {
            // Somebody else's: nothing is known of its process, so time is all there is.
            if Instant::now() < deadline {
                continue;
            }
            return Liveness::Hung;
        };
        let (Some(before), Some(after)) = (before, activity()) else { return Liveness::Hung };
        if !is_at_work(before, after) {
            return Liveness::Hung;
        }
        if Instant::now() >= deadline {
            return Liveness::Alive { pid: *pid };
        }
    }
}

fn is_at_work(before: Activity, after: Activity) -> bool {
    !after.stopped && (after.runnable || after.ran != before.ran)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_wants_to_run_or_has_run_is_at_work() {
        let idle = Activity { stopped: false, runnable: false, ran: 5 };
        assert!(!is_at_work(idle, idle));
        assert!(is_at_work(idle, Activity { ran: 6, ..idle }));
        assert!(is_at_work(idle, Activity { runnable: true, ..idle }));
        assert!(!is_at_work(idle, Activity { stopped: true, ran: 6, ..idle }));
    }
}
