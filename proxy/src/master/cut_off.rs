//! Which hosts are out of reach while this machine has no network.
//!
//! Must never start a master. Only [`Pool::learn_needs`] starts anything: ssh, to ask for its configuration.

use std::time::{Duration, Instant};

use super::{Endpoint, Pool, effective};
use crate::network::{Needs, Outage};

/// How long ssh may take to say what its configuration says of one host.
const ASK_BOUND: Duration = Duration::from_millis(500);

impl Pool {
    /// What is known of the present time without a network.
    pub fn outage(&self) -> Outage {
        Outage::of(self.directory())
    }

    /// Finds out which of these cannot do without a network, as far as that is not known yet: hosts that ssh does not
    /// connect to itself, or that are this machine, are none the worse for that. ssh is asked for one after the other, and
    /// for none any more when `bound` is over.
    pub fn learn_needs<'a>(&self, endpoints: impl Iterator<Item = &'a Endpoint>, bound: Duration) {
        let (outage, begin) = (self.outage(), Instant::now());
        let known = outage.needs();
        for endpoint in endpoints {
            let name = endpoint.name();
            if known.contains_key(&name) {
                continue;
            }
            if begin.elapsed() >= bound {
                return;
            }
            let effective = effective::ask(endpoint, &self.files(endpoint), ASK_BOUND);
            outage.note_host(&name, effective.needs_network);
        }
    }

    /// Whether no master can be started while there is no network, after what is known of hosts then. That a host needs
    /// one is taken for granted if nobody has found out. Starts nothing and waits for nobody.
    pub fn is_cut_off(&self, endpoint: &Endpoint, needs: &Needs) -> bool {
        needs.get(&endpoint.name()).copied().unwrap_or(true) && self.live(endpoint).is_none()
    }
}
