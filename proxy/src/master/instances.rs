//! Several masters to one far end: which of them is asked next, and what is held against one that had nothing to give.
//!
//! Must never start ssh by itself, nor know what the streams are for.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use super::{
    OpenError, clients,
    error::StartError,
    handle::{Avoid, Master, avoided},
    name::Endpoint,
    pool::{LEAST_TIME, Pool},
    start::LINK_SILENCE,
};

/// Masters to one far end: more are opened when sshd has no more sessions to give on one (its MaxSessions, 10 by
/// default).
const MOST_MASTERS: u32 = 8;
/// A far side that refuses on so many masters which were made for it has nothing to give at all.
const MOST_REFUSALS: u32 = 2;
/// How long sshd may go on counting the session of a new master's first command after that has ended: it frees it
/// behind what it has read at the same time (`session_close_by_channel` in session.c of OpenSSH 10.0).
const FIRST_COMMAND_ENDS: Duration = Duration::from_millis(100);

/// Whoever had less time than this to open a stream on a master knows nothing of its link.
const FAIR_BOUND: Duration = Duration::from_millis(500);
/// What a client leaves on a master at most that did not open a stream for it in time: the stream, and the question
/// whether the far side answers at all. Both stay until it does.
const LEFT_BEHIND: usize = 2;

/// All that may be asked, the one that is named first.
pub(super) fn of(endpoint: &Endpoint) -> impl Iterator<Item = Endpoint> {
    (0..MOST_MASTERS).map(|number| Endpoint { instance: endpoint.instance + number, ..endpoint.clone() })
}

impl Master {
    /// Has everybody ask it last for a while, because the far side of its link did not answer.
    pub(crate) fn leave_alone(&self) {
        self.avoid(Avoid::Silent);
    }

    /// Whether it may be ended though it answers: the far side of its link was silent for so long that its link is cut, or
    /// nobody has a stream on it but whoever asks this, who could open none.
    pub(crate) fn is_dispensable(&self, silence: Duration) -> bool {
        let clients = || clients::count(&fs::read_to_string("/proc/net/unix").ok()?, self.control_path());
        silence >= LINK_SILENCE || clients().is_some_and(|count| count <= LEFT_BEHIND)
    }
}

impl Pool {
    /// Does something on a master that has the means for it: a living one, another one if its sessions are used up
    /// or its far side does not answer in time, a new one if need be. A dead or hung one is replaced.
    ///
    /// `open` may be called several times, until it succeeds or fails in a way that another master would not change:
    /// `why` gives the reason within an error, unless it is of that kind.
    ///
    /// # Errors
    /// The last error of `open`, or why no master could be started.
    pub fn with_master<T, E: From<StartError>>(
        &self,
        endpoint: &Endpoint,
        deadline: Instant,
        first_command: &str,
        mut open: impl FnMut(&Master) -> Result<T, E>,
        why: impl Fn(&E) -> Option<&OpenError>,
    ) -> Result<T, E> {
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut last = None;
        let mut refusals = 0;
        let mut tried = Vec::new();
        while let Some(endpoint) = self.next_instance(endpoint, &tried) {
            tried.push(endpoint.instance);
            if last.is_some() && left() < LEAST_TIME {
                break;
            }
            let (mut master, mut is_new) = match self.live(&endpoint) {
                Some(master) => (master, false),
                None => match (self.start(&endpoint, left(), first_command), &last) {
                    (Ok(master), _) => (master, true),
                    // The ones before are well, and there will be room on them.
                    (Err(_), Some(full))
                        if matches!(why(full), Some(OpenError::Taken | OpenError::Refused { .. })) =>
                    {
                        break;
                    }
                    (Err(error), _) => return Err(error.into()),
                },
            };
            let mut is_second_try = false;
            loop {
                let error = match open(&master) {
                    Ok(done) => return Ok(done),
                    Err(error) => error,
                };
                match why(&error) {
                    Some(OpenError::Refused { .. }) => {
                        // One that another process started was made for that, which may have its only session.
                        let is_ours = master.start_time().is_some();
                        if is_ours && !is_second_try {
                            thread::sleep(FIRST_COMMAND_ENDS);
                            is_second_try = true;
                            continue;
                        }
                        master.avoid(Avoid::Full);
                        refusals += u32::from(is_ours);
                    }
                    Some(OpenError::Taken) => {}
                    // Its other streams may be well: it is left alone. Should its link be dead, ssh notices.
                    Some(OpenError::TimedOut { master_answers: true, bound }) => {
                        if *bound >= FAIR_BOUND {
                            master.avoid(Avoid::Silent);
                        }
                    }
                    // One that is only slow has others to serve.
                    Some(OpenError::TimedOut { .. }) if !master.hangs() => master.avoid(Avoid::Silent),
                    Some(reason) if reason.is_master_lost() && !is_new && left() >= LEAST_TIME => {
                        let to = endpoint.destination.as_str();
                        tracing::info!(destination = to, %reason, "replacing the SSH master to {to}: {reason}");
                        master.retire();
                        (master, is_new) = (self.start(&endpoint, left(), first_command)?, true);
                        continue;
                    }
                    _ => return Err(error),
                }
                let to = endpoint.destination.as_str();
                tracing::info!(destination = to, "trying another SSH master to {to}");
                last = Some(error);
                break;
            }
            if refusals >= MOST_REFUSALS {
                break;
            }
        }
        match last {
            Some(error) => Err(error),
            None => Err(StartError::Busy { destination: endpoint.destination.clone(), bound: left() }.into()),
        }
    }

    /// The next one to ask of several masters to the same far end: those that should have the means first, then those
    /// that may have them again, a new one, and those that are most likely dead.
    pub(crate) fn next_instance(&self, endpoint: &Endpoint, tried: &[u32]) -> Option<Endpoint> {
        let mut best: Option<(u8, Endpoint)> = None;
        for endpoint in of(endpoint) {
            if tried.contains(&endpoint.instance) {
                continue;
            }
            let rank = match (self.live(&endpoint), avoided(&self.files(&endpoint))) {
                (Some(_), None) => return Some(endpoint),
                (Some(_), Some(Avoid::Full)) => 1,
                (None, _) => 2,
                (Some(_), Some(Avoid::Silent)) => 3,
            };
            if best.as_ref().is_none_or(|(before, _)| rank < *before) {
                best = Some((rank, endpoint));
            }
        }
        best.map(|(_, endpoint)| endpoint)
    }
}
