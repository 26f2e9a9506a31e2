//! Which outputs are to come here, and how they get into the local store.
//!
//! Must never replace what is valid here.

use super::copying::{Copy, Copying};
use super::{JobError, Prepared, Relay, Report, Task};
use crate::builder::{Ahead, Store as Builder};
use crate::path_info::PathInfo;
use crate::plan::outputs::{self, OutputError, Wanted};
use crate::store::{self, DatabaseError, Durability, Expected, Query, Registrar};
use crate::wire::hook::{Job, Verbosity};
use nix_derivation::{NixHash, StorePath};
use std::collections::BTreeSet;
use std::time::Instant;

impl Task<'_> {
    /// The requests behind those for the inputs.
    pub(super) fn build_and_fetch(
        &self,
        ahead: &mut Ahead,
        prepared: &Prepared,
        job: &Job,
    ) -> Result<(), JobError> {
        let store_dir = &self.location.store_dir;
        if let Some(options) = self.options() {
            ahead.set_options(options);
        }
        ahead.build(store_dir, self.drv_path, self.drv, &prepared.direct);
        let paths: Vec<StorePath> = self.wanted(job)?.iter().map(|output| output.path.clone()).collect();
        let fetched: Vec<StorePath> =
            paths.iter().filter(|path| !prepared.kept.contains(path)).cloned().collect();
        ahead.fetch(store_dir, &paths, &fetched);
        Ok(())
    }

    fn wanted(&self, job: &Job) -> Result<Vec<&Wanted>, JobError> {
        let find =
            |name: &String| self.outputs.get(name).ok_or_else(|| OutputError::NoSuchOutput(name.clone()));
        Ok(job.wanted_outputs.iter().map(find).collect::<Result<_, _>>()?)
    }

    /// Those of the wanted outputs that are valid here and have their files. Nix names them to its hook when it
    /// checks a build; stock fetches nothing that is valid either (`build-remote.cc` in Nix 2.8 and 2.26).
    pub(super) fn kept(&self, job: &Job) -> Result<BTreeSet<StorePath>, JobError> {
        let mut there = self.wanted(job)?;
        there.retain(|output| self.location.real_path(&output.path).symlink_metadata().is_ok());
        // Almost always nothing is there: Nix has deleted what is not valid. Then the database need not be opened.
        if there.is_empty() {
            return Ok(BTreeSet::new());
        }
        let query = Query::open(self.location)?;
        let mut kept = BTreeSet::new();
        for Wanted { path, .. } in there {
            if query.is_valid(path)? {
                kept.insert(path.clone());
            }
        }
        Ok(kept)
    }

    pub(super) fn fetch_outputs(
        &self,
        builder: &mut Builder,
        job: &Job,
        prepared: &Prepared,
        registrar: Option<Registrar>,
        relay: &mut Relay<'_>,
        report: &mut Report,
    ) -> Result<(), JobError> {
        let wanted = self.wanted(job)?;
        let paths: Vec<StorePath> = wanted.iter().map(|output| output.path.clone()).collect();
        let claims = builder.path_infos(&paths, &mut |e| relay.pass(e))?;
        let inputs = self.referable(&prepared.inputs, &claims)?;
        let mut infos = Vec::new();
        let mut others = Vec::new();
        for (output, claim) in wanted.iter().zip(claims) {
            if prepared.kept.contains(&output.path) {
                others.extend(claim);
                continue;
            }
            let missing = || OutputError::Missing(self.location.render(&output.path));
            let claim = claim.ok_or_else(missing)?;
            infos.push(outputs::accept(output, claim, &inputs, self.outputs, &self.location.store_dir)?);
        }
        let registrar = self.fresh(registrar)?;
        if !prepared.kept.is_empty() {
            self.compare(&others, &registrar, report.was_built)?;
        }
        if infos.is_empty() {
            return Ok(());
        }
        report.fetched_paths = infos.len();
        report.fetched_bytes = infos.iter().map(|info| info.nar_size).sum();
        let durability = Durability::from_settings(|name| self.settings.get(name));
        let all = Copying::new(self.nix, "fetching outputs", infos.len());
        let clock = Instant::now();
        builder.nars(
            &infos,
            |info, nar| {
                let path = self.location.render(&info.path);
                all.next(Some(Copy { path: &path, from: self.machine, to: "local" }));
                let content_address =
                    wanted.iter().find(|o| o.path == info.path).and_then(|o| o.content_address.as_ref());
                let expected =
                    Expected { nar_size: info.nar_size, nar_hash: Some(info.nar_hash), content_address };
                let restored =
                    store::restore(self.location, &registrar, &info.path, nar, &expected, &durability);
                all.next(None);
                restored.map(drop)
            },
            &mut |e| relay.pass(e),
        )?;
        report.fetching = clock.elapsed();
        if self.settings.flag("auto-optimise-store") {
            for info in &infos {
                // It saves space only, so that it fails is no reason to fail the build.
                if let Err(error) = store::optimise(self.location, &info.path) {
                    let path = self.location.render(&info.path);
                    tracing::warn!(event = "cannot optimise", path, %error, "cannot optimise {path}: {error}");
                }
            }
        }
        self.fresh(Some(registrar))?.register(&infos)?;
        Ok(())
    }

    /// Says what the builder's outputs tell of those that are valid here. It does not fail the build: Nix has an exit status
    /// of its own for a check that failed (104), which no hook can bring about, and stock compares nothing.
    fn compare(&self, theirs: &[PathInfo], registrar: &Registrar, was_built: bool) -> Result<(), JobError> {
        let (machine, derivation) = (self.machine, self.location.render(self.drv_path));
        for info in theirs {
            let hash = NixHash::Sha256(info.nar_hash).to_nix_base16_string();
            if registrar.registered_hash(&info.path)?.is_some_and(|registered| registered != hash) {
                let path = self.location.render(&info.path);
                let text = format!(
                    "warning: derivation '{derivation}' may not be deterministic: output '{path}' differs on '{machine}'"
                );
                self.nix.message(Verbosity::Warn, &text);
            }
        }
        if !was_built {
            let text = format!(
                "warning: '{machine}' has the outputs of '{derivation}' from before and did not build them again; \
                 to have it built again, delete them there, or allow local builds (max-jobs)"
            );
            self.nix.message(Verbosity::Warn, &text);
        }
        Ok(())
    }

    /// As it is, unless it has been open for too long or not at all.
    fn fresh(&self, registrar: Option<Registrar>) -> Result<Registrar, DatabaseError> {
        registrar.filter(Registrar::is_fresh).map_or_else(|| self.registrar(), Ok)
    }

    pub(super) fn registrar(&self) -> Result<Registrar, DatabaseError> {
        Registrar::open(self.location, &Durability::from_settings(|name| self.settings.get(name)))
    }
}
