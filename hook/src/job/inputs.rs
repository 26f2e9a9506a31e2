//! What the machine lacks of the inputs, and how it gets there.
//!
//! Must never send what another process is sending there.

use super::copying::{Copy, Copying};
use super::{JobError, Prepared, Relay, Report, Task};
use crate::builder::{Ahead, BuilderError, OnArrival, Store as Builder};
use crate::path_info::PathInfo;
use crate::sending::Mark;
use crate::store::{self, Query};
use crate::wire::hook::{Job, Verbosity};
use nix_derivation::StorePath;
use std::io::{self, BufWriter, Write};
use std::time::{Duration, Instant};

/// How long others may take to send what this build needs too. As long as stock waits for its turn to send
/// (`build-remote.cc` in Nix 2.34).
const SENDING_BOUND: Duration = Duration::from_secs(15 * 60);

impl Task<'_> {
    /// Asks the machine which inputs it has and sends it the others. Behind them go the requests for the build and its
    /// outputs, if they can.
    pub(super) fn send_inputs(
        &self,
        builder: &mut Builder,
        job: &Job,
        prepared: &Prepared,
        relay: &mut Relay<'_>,
        report: &mut Report,
    ) -> Result<(), JobError> {
        let substitute = self.settings.flag("builders-use-substitutes");
        let mut valid = builder.hold_and_query(prepared.asked(), substitute, &mut |e| relay.pass(e))?;
        let closure = prepared.closure.as_deref();
        if let Some(closure) = closure {
            // No substituter has derivations, so it is not asked.
            valid.extend(builder.hold_and_query(closure, false, &mut |e| relay.pass(e))?);
        }
        let asked = prepared.asked().iter().chain(closure.unwrap_or_default());
        let missing: Vec<&StorePath> = asked.filter(|path| !valid.contains(*path)).collect();
        if prepared.guessed {
            return match missing.is_empty() {
                true => Ok(()),
                false => Err(BuilderError::Guess { doing: "asking which inputs are there" }.into()),
            };
        }
        let mut ahead = Ahead::default();
        if closure.is_none() && !self.is_leased {
            self.build_and_fetch(&mut ahead, prepared, job)?;
        }
        let ahead = ahead.if_small();
        if missing.is_empty() {
            return Ok(builder.send_ahead(ahead)?);
        }
        let infos = {
            let query = Query::open(self.location)?;
            let info = |path: &StorePath| {
                let missing = || JobError::InputMissing(self.location.render(path));
                query.path_info(path)?.ok_or_else(missing)
            };
            store::references_first(missing.into_iter().map(info).collect::<Result<_, _>>()?)?
        };
        self.send_once(builder, infos, prepared.mark, ahead, relay, report)
    }

    /// Sends what the machine lacks, references first, but what another process is sending there. For that it is waited
    /// without a lock, and then the machine is asked again.
    fn send_once(
        &self,
        builder: &mut Builder,
        mut missing: Vec<PathInfo>,
        mut mark: Mark,
        ahead: Ahead,
        relay: &mut Relay<'_>,
        report: &mut Report,
    ) -> Result<(), JobError> {
        let deadline = Instant::now() + SENDING_BOUND;
        let mut patient = true;
        let mut told = false;
        let all = Copying::new(self.nix, "sending inputs", missing.len());
        while !missing.is_empty() {
            let mut shares = match patient {
                true => self.sending.share(missing, mark),
                false => self.sending.all(missing),
            };
            let infos = std::mem::take(&mut shares.ours);
            let others = std::mem::take(&mut shares.others);
            report.sent_paths += infos.len();
            report.sent_bytes += infos.iter().map(|info| info.nar_size).sum::<u64>();
            let parts: Vec<&[PathInfo]> = infos.split_inclusive(|info| shares.is_locked(info)).collect();
            let arrived = &mut |infos: &[PathInfo]| shares.arrived(infos);
            let next = if others.is_empty() { ahead.clone() } else { Ahead::default() };
            if !parts.is_empty() {
                report.sending += self.send(builder, &parts, arrived, next, &all, relay)?;
            }
            drop(shares);
            if others.is_empty() {
                return Ok(());
            }
            if let Some(info) = self.sending.in_progress(&others)
                && !told
            {
                let path = self.location.render(&info.path);
                tracing::debug!(builder = self.machine, path, "another build sends it");
                let text = format!("waiting for another build to send '{path}' to '{}'", self.machine);
                self.nix.message(Verbosity::Talkative, &text);
                told = true;
            }
            patient = self.sending.wait(&others, deadline);
            mark = self.sending.mark();
            let paths: Vec<StorePath> = others.iter().map(|info| info.path.clone()).collect();
            // It was asked to fetch them elsewhere before.
            let valid = builder.hold_and_query(&paths, false, &mut |e| relay.pass(e))?;
            all.spare(valid.len());
            missing = others.into_iter().filter(|info| !valid.contains(&info.path)).collect();
        }
        Ok(builder.send_ahead(ahead)?)
    }

    /// Gives the time until all had arrived.
    fn send(
        &self,
        builder: &mut Builder,
        parts: &[&[PathInfo]],
        arrived: OnArrival<'_>,
        ahead: Ahead,
        all: &Copying<'_>,
        relay: &mut Relay<'_>,
    ) -> Result<Duration, JobError> {
        let progress = |info: Option<&PathInfo>| {
            let path = info.map(|info| self.location.render(&info.path));
            all.next(path.as_deref().map(|path| Copy { path, from: "local", to: self.machine }));
        };
        let dump = |path: &StorePath, to: &mut dyn Write| {
            let mut to = BufWriter::with_capacity(64 << 10, to);
            store::dump(self.location, path, &mut to).map_err(io::Error::other)?;
            to.flush()
        };
        let clock = Instant::now();
        builder.upload(parts, &dump, &progress, arrived, ahead, &mut |e| relay.pass(e))?;
        Ok(clock.elapsed())
    }
}
