//! A builder's store, whichever of Nix's protocols it is reached by: the one set of verbs for both.
//!
//! Must never do more than choose between them.

use super::serve::ServeStore;
use super::{Ahead, Builder, BuilderError, Clocks, Dump, OnArrival, OnEvent, OnUpload};
use crate::path_info::PathInfo;
use crate::wire::worker::{BuildResult, Options};
use nix_derivation::{Derivation, StorePath};
use std::collections::BTreeSet;
use std::io::Read;
use std::time::Duration;

/// A connection to a builder's store. After an error it is not to be used again.
pub enum Store {
    /// With a Nix daemon (`ssh-ng://`).
    Daemon(Box<Builder>),
    /// With `nix-store --serve` (`ssh://` in Nix).
    Serve(Box<ServeStore>),
}

impl Store {
    /// Whether the far side trusts us, if it says so.
    pub fn trusted(&self) -> Option<bool> {
        match self {
            Self::Daemon(builder) => builder.peer().trusted,
            Self::Serve(_) => None,
        }
    }

    /// The far side's version of Nix, if it says so.
    pub fn nix_version(&self) -> Option<String> {
        match self {
            Self::Daemon(builder) => builder.peer().nix_version.clone(),
            Self::Serve(_) => None,
        }
    }

    /// See [`Builder::set_options`].
    ///
    /// # Errors
    /// As there.
    pub fn set_options(&mut self, options: Options, on: OnEvent<'_>) -> Result<(), BuilderError> {
        match self {
            Self::Daemon(builder) => builder.set_options(options, on),
            Self::Serve(store) => {
                store.set_options(options);
                Ok(())
            }
        }
    }

    /// See [`Builder::takes_ahead`]. With the serve protocol nothing is sent ahead, so nothing goes wrong.
    pub fn takes_ahead(&self) -> bool {
        match self {
            Self::Daemon(builder) => builder.takes_ahead(),
            Self::Serve(_) => true,
        }
    }

    /// See [`Builder::send_ahead`]. The serve protocol is asked step by step.
    ///
    /// # Errors
    /// As there.
    pub fn send_ahead(&mut self, ahead: Ahead) -> Result<(), BuilderError> {
        match self {
            Self::Daemon(builder) => builder.send_ahead(ahead),
            Self::Serve(_) => Ok(()),
        }
    }

    /// See [`Builder::hold_and_query`].
    ///
    /// # Errors
    /// As there.
    pub fn hold_and_query(
        &mut self,
        paths: &[StorePath],
        substitute: bool,
        on: OnEvent<'_>,
    ) -> Result<BTreeSet<StorePath>, BuilderError> {
        match self {
            Self::Daemon(builder) => builder.hold_and_query(paths, substitute, on),
            Self::Serve(store) => store.hold_and_query(paths, substitute, on),
        }
    }

    /// See [`Builder::upload`].
    ///
    /// # Errors
    /// As there.
    pub fn upload(
        &mut self,
        parts: &[&[PathInfo]],
        dump: Dump<'_>,
        progress: OnUpload<'_>,
        arrived: OnArrival<'_>,
        ahead: Ahead,
        on: OnEvent<'_>,
    ) -> Result<(), BuilderError> {
        match self {
            Self::Daemon(builder) => builder.upload(parts, dump, progress, arrived, ahead, on),
            Self::Serve(store) => store.upload(&parts.concat(), dump, progress, arrived, on),
        }
    }

    /// See [`Builder::build`].
    ///
    /// # Errors
    /// As there.
    pub fn build(
        &mut self,
        drv_path: &StorePath,
        drv: &Derivation,
        inputs: &[StorePath],
        clocks: Clocks<'_>,
        on: OnEvent<'_>,
    ) -> Result<BuildResult, BuilderError> {
        match self {
            Self::Daemon(builder) => builder.build(drv_path, drv, inputs, clocks, on),
            Self::Serve(store) => store.build(drv_path, drv, inputs, clocks, on),
        }
    }

    /// See [`Builder::build_outputs`]. The serve protocol is not asked for such builds.
    ///
    /// # Errors
    /// As there.
    pub fn build_outputs(
        &mut self,
        drv_path: &StorePath,
        outputs: &BTreeSet<String>,
        clocks: Clocks<'_>,
        on: OnEvent<'_>,
    ) -> Result<BuildResult, BuilderError> {
        match self {
            Self::Daemon(builder) => builder.build_outputs(drv_path, outputs, clocks, on),
            Self::Serve(_) => Err(BuilderError::Refused {
                doing: "building",
                message: "outputs of a derivation in the store are built by a daemon only".into(),
            }),
        }
    }

    /// The daemon, if it is one.
    pub fn daemon(&mut self) -> Option<&mut Builder> {
        match self {
            Self::Daemon(builder) => Some(builder),
            Self::Serve(_) => None,
        }
    }

    /// See [`Builder::path_infos`].
    ///
    /// # Errors
    /// As there.
    pub fn path_infos(
        &mut self,
        paths: &[StorePath],
        on: OnEvent<'_>,
    ) -> Result<Vec<Option<PathInfo>>, BuilderError> {
        match self {
            Self::Daemon(builder) => builder.path_infos(paths, on),
            Self::Serve(store) => store.path_infos(paths, on),
        }
    }

    /// See [`Builder::nars`].
    ///
    /// # Errors
    /// As there.
    pub fn nars<E: std::error::Error + Send + Sync + 'static>(
        &mut self,
        infos: &[PathInfo],
        receive: impl FnMut(&PathInfo, &mut dyn Read) -> Result<(), E>,
        on: OnEvent<'_>,
    ) -> Result<(), BuilderError> {
        match self {
            Self::Daemon(builder) => builder.nars(infos, receive, on),
            Self::Serve(store) => store.nars(infos, receive, on),
        }
    }

    /// See [`Builder::round_trip`].
    ///
    /// # Errors
    /// As there.
    pub fn round_trip(&mut self, bound: Duration) -> Result<Duration, BuilderError> {
        match self {
            Self::Daemon(builder) => builder.round_trip(bound),
            Self::Serve(store) => store.round_trip(bound),
        }
    }

    /// Has the rest of a build's log passed on, if it may still be under way. Nothing can be asked afterwards.
    pub fn finish(&mut self, on: OnEvent<'_>) {
        if let Self::Serve(store) = self {
            store.finish(on);
        }
    }
}
