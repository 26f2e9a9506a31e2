//! The way through a jump host: over one of its masters, and over another one if that is silent.
//!
//! Must never end a master that others have streams on, unless it is dead.

use std::time::{Duration, Instant};

use super::{
    Link, Request, TunnelError, failed, keeps_descriptors, not_down, open_on, patience, reached, run_true,
    take_turn,
};
use crate::{
    down::Memory,
    master::{Endpoint, Master, OpenError, Pool},
};

/// How many masters one attempt asks.
const MOST_ASKED: usize = 2;
/// How long a command on the jump host may go on that shows that its link works, before it is called off.
const GRACE: Duration = Duration::from_secs(1);

/// What is the matter with a master that did not open a stream.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing: it is the host behind it that cannot be reached.
    None,
    /// It or its link does not answer. Others may have streams on it, which may be well.
    Silent,
    /// It is dead, or nobody would miss it.
    Lost,
}

pub(super) fn through(
    pool: &Pool,
    via: &Endpoint,
    request: &Request,
    deadline: Option<Instant>,
) -> Result<Link, TunnelError> {
    let (host, port, jump) = (&request.host, request.port, &via.destination);
    let of_host = Memory::of(pool.directory(), format!("{host} {port} via {}", via.name()));
    let _probe = not_down(&of_host, pool, deadline, host, || format!("{host} port {port} through {jump}"))?;
    let (mut asked, mut silent) = (0, Vec::new());
    loop {
        let instance = pool.next_instance(via, &silent).unwrap_or_else(|| via.clone());
        let probe_of_jump = not_down(&pool.memory(&instance), pool, deadline, via.host(), || jump.clone())?;
        let master = pool.start(&instance, request.bound, "true")?;
        drop(probe_of_jump);
        if asked == 0 {
            take_turn(pool, request)?;
        }
        asked += 1;
        let source = match open_on(&master, request, patience(request, deadline, Instant::now())) {
            Ok(link) => {
                reached(&of_host, pool, host);
                return Ok(link);
            }
            Err(source) => source,
        };
        let is_free = match fault(&master, &source, request.bound) {
            Fault::None => {
                let error = TunnelError::Via { host: host.clone(), port, via: jump.clone(), source };
                return Err(failed(&of_host, pool, host, error));
            }
            Fault::Silent => {
                tracing::info!(
                    jump,
                    "an SSH master to {jump} is silent and carries others: it is left alone"
                );
                master.leave_alone();
                silent.push(instance.instance);
                !keeps_descriptors(request, &source)
            }
            Fault::Lost => master.retire() || !keeps_descriptors(request, &source),
        };
        if !is_free || asked == MOST_ASKED {
            // No word against the host behind it: the next attempt has another master.
            return Err(TunnelError::Silent { host: host.clone(), port, via: jump.clone(), source });
        }
    }
}

/// Silence may be that of the host behind a link that works: then the jump host answers another question in time.
fn fault(master: &Master, error: &OpenError, bound: Duration) -> Fault {
    match error {
        OpenError::TimedOut { master_answers: true, .. } => {
            let began = Instant::now();
            match run_true(master, bound, GRACE) {
                Err(error) if !error.is_master_lost() => Fault::None,
                Ok(_) => Fault::None,
                Err(OpenError::TimedOut { master_answers: true, .. }) => {
                    if master.is_dispensable(began.elapsed()) { Fault::Lost } else { Fault::Silent }
                }
                Err(OpenError::TimedOut { .. }) if !master.hangs() => Fault::Silent,
                Err(_) => Fault::Lost,
            }
        }
        OpenError::TimedOut { .. } if !master.hangs() => Fault::Silent,
        error if error.is_master_lost() => Fault::Lost,
        _ => Fault::None,
    }
}
