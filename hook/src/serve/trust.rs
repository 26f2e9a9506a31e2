//! What a machine's trust in us means for a build: seen before Nix is promised anything, for what was promised cannot be
//! built here any more.

use super::{Candidate, Hook};
use crate::builder::Ahead;
use crate::derivation;
use crate::path_info::PathInfo;
use crate::plan::machine::Machine;
use crate::plan::trust::{self, Distrust, Way};
use crate::reach::{ReachError, Reached};
use crate::store::{DatabaseError, Query};
use nix_derivation::StorePath;
use nix_offload_proxy::exit;
use std::time::{Duration, Instant};

/// How long a question may take even if those before it took all the time there was.
const LEAST: Duration = Duration::from_millis(100);

impl Hook<'_> {
    /// Whether the machine can be promised the build without being asked.
    pub(super) fn may_be_promised(&self, machine: &Machine, candidate: &Candidate) -> bool {
        let would_matter = || trust::way(&candidate.drv, Some(false)) == Way::Closure;
        self.reach.is_warm(machine) && !(self.reach.is_doubtful(machine) && would_matter())
    }

    /// Connects to a machine, and logs by which way.
    pub(super) fn connect(
        &self,
        machine: &Machine,
        bound: Duration,
        ahead: &Ahead,
    ) -> Result<Reached, ReachError> {
        let reached = self.reach.connect(machine, &self.location.store_dir, bound, ahead)?;
        log_way(machine, &reached);
        Ok(reached)
    }

    /// Whether the machine's daemon will build this for us and take from us what it lacks for that. Gives the connection if
    /// it is still of use.
    ///
    /// # Errors
    /// If it does not trust us and so refuses an input, or the connection fails.
    pub(super) fn check(
        &self,
        machine: &Machine,
        reached: Reached,
        candidate: &Candidate,
    ) -> Result<Option<Reached>, ReachError> {
        self.check_within(machine, reached, candidate, self.reach.connect_timeout())
    }

    /// The same within `bound`.
    ///
    /// # Errors
    /// As for [`check`](Hook::check).
    pub(super) fn check_within(
        &self,
        machine: &Machine,
        mut reached: Reached,
        candidate: &Candidate,
        bound: Duration,
    ) -> Result<Option<Reached>, ReachError> {
        log_way(machine, &reached);
        let deadline = Instant::now() + bound;
        let left = || deadline.saturating_duration_since(Instant::now()).max(LEAST);
        let (trusted, reached) = match self.reach.trust(machine, &mut reached.builder) {
            None => self.reach.find_trust(machine, reached, left())?,
            known => (known, Some(reached)),
        };
        if trust::way(&candidate.drv, trusted) == Way::Derivation {
            return Ok(reached);
        }
        let in_doubt = self.inputs_in_doubt(candidate);
        if in_doubt.is_empty() {
            return Ok(reached);
        }
        let mut reached = match reached {
            Some(reached) => reached,
            None => self.connect(machine, left(), &Ahead::default())?,
        };
        if let Some(daemon) = reached.builder.daemon() {
            let paths: Vec<StorePath> = in_doubt.iter().map(|info| info.path.clone()).collect();
            let substitute = self.settings.flag("builders-use-substitutes");
            let found = daemon.find(&paths, substitute, left()).map_err(ReachError::Daemon)?;
            let missing = in_doubt.iter().filter(|info| !found.contains(&info.path));
            for info in trust::samples(missing) {
                let words = match daemon.ask_import(info, left()) {
                    // No refusal: it may be waiting for somebody who sends it the same path.
                    Err(error) if error.is_transport() => return Ok(None),
                    other => other.map_err(ReachError::Daemon)?,
                };
                if let Some(words) = words.filter(|words| trust::is_want_of_signature(words)) {
                    return Err(self.distrust(machine, Some(info), words).into());
                }
            }
        }
        Ok(Some(reached))
    }

    /// What a refusal of the machine means for us, if it is for want of trust.
    pub(super) fn distrust_in(&self, machine: &Machine, words: &str) -> Option<Distrust> {
        if trust::is_refusal_to_build(words) {
            return Some(self.distrust(machine, None, words.to_owned()));
        }
        if !trust::is_want_of_signature(words) {
            return None;
        }
        let path = trust::path_in(words, &self.location.store_dir)?;
        let info = Query::open(&self.location).and_then(|query| query.path_info(&path)).ok()??;
        Some(self.distrust(machine, Some(&info), words.to_owned()))
    }

    fn distrust(&self, machine: &Machine, refused: Option<&PathInfo>, words: String) -> Distrust {
        let path = refused.map(|info| (self.location.render(&info.path), trust::signers(info)));
        Distrust { account: self.reach.account(machine), path, words }
    }

    /// What a machine that does not trust us may refuse, of the inputs, the derivation, and all that they refer to.
    fn inputs_in_doubt<'a>(&self, candidate: &'a Candidate) -> &'a [PathInfo] {
        candidate.in_doubt.get_or_init(|| {
            let direct = self.direct_inputs(&candidate.drv).unwrap_or_default();
            let look_up = || -> Result<Vec<PathInfo>, DatabaseError> {
                let roots = direct.into_iter().chain([candidate.drv_path.clone()]);
                let closure = Query::open(&self.location)?.closure(roots)?;
                Ok(closure.into_values().filter(trust::is_in_doubt).collect())
            };
            look_up().unwrap_or_else(|error| {
                // The build meets with the same, and says so.
                let name = derivation::name_in(&candidate.request.drv_path);
                tracing::warn!("cannot look up the inputs of '{name}': {}", exit::reason(&error));
                Vec::new()
            })
        })
    }
}

fn log_way(machine: &Machine, reached: &Reached) {
    tracing::debug!(
        builder = machine.name,
        way = reached.way.as_str(),
        reason = reached.detour,
        version = reached.nix_version,
        "reached the daemon"
    );
}
