//! Requests that are sent before the answers to those before them are known.
//!
//! Pure.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::BuilderError;
use crate::wire::worker::{self, Options, Version};
use nix_derivation::{Derivation, StoreDir, StorePath};

/// Requests to be sent before the answers to those before them are known, so that many cost the time of one.
///
/// The verbs of [`super::Builder`] that come later find their requests in it and only read the answers. It is a guess at what
/// will be asked: a verb that wants something else fails with [`BuilderError::Guess`].
#[derive(Debug, Clone, Default)]
pub struct Ahead(Vec<u8>);

impl Ahead {
    /// What may be sent at most without reading anything: it must fit the channel's window, for a daemon that builds does
    /// not read. Pipes hold less, so to a daemon on this machine nothing is sent ahead.
    const MOST: usize = 256 << 10;

    /// [`super::Builder::hold_and_query`].
    pub fn hold_and_query(&mut self, store_dir: &StoreDir, paths: &[StorePath], substitute: bool) {
        put_hold_and_query(&mut self.0, Version::newest(), store_dir, paths, Some((paths, substitute)));
    }

    /// [`super::Builder::set_options`].
    pub fn set_options(&mut self, options: Options) {
        worker::put_set_options(&mut self.0, options);
    }

    /// [`super::Builder::build`].
    pub fn build(
        &mut self,
        store_dir: &StoreDir,
        drv_path: &StorePath,
        drv: &Derivation,
        inputs: &[StorePath],
    ) {
        worker::put_build_derivation(&mut self.0, store_dir, drv_path, drv, inputs.iter());
    }

    /// [`super::Builder::path_infos`] of the first ones and [`super::Builder::nars`] of the others.
    pub fn fetch(&mut self, store_dir: &StoreDir, infos: &[StorePath], nars: &[StorePath]) {
        put_path_infos(&mut self.0, store_dir, infos.iter());
        put_nars(&mut self.0, store_dir, nars.iter());
    }

    /// Nothing, if it is too much to be sent at once.
    pub fn if_small(self) -> Self {
        if self.0.len() <= Self::MOST { self } else { Self::default() }
    }

    /// Whether there is nothing to be sent.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As they go over the wire.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether the request has been sent already. If something else has, there is no way back.
    pub(super) fn take(&mut self, doing: &'static str, request: &[u8]) -> Result<bool, BuilderError> {
        if self.0.is_empty() {
            return Ok(false);
        }
        if request.is_empty() || !self.0.starts_with(request) {
            return Err(BuilderError::Guess { doing });
        }
        self.0.drain(..request.len());
        Ok(true)
    }
}

/// Temp roots for a batch of paths and, behind the last batch, the question which of all are valid.
pub(super) fn put_hold_and_query(
    request: &mut Vec<u8>,
    version: Version,
    store_dir: &StoreDir,
    batch: &[StorePath],
    query: Option<(&[StorePath], bool)>,
) {
    for path in batch {
        worker::put_add_temp_root(request, store_dir, path);
    }
    if let Some((paths, substitute)) = query {
        worker::put_query_valid_paths(request, version, store_dir, paths.iter(), substitute);
    }
}

pub(super) fn put_path_infos<'a>(
    request: &mut Vec<u8>,
    store_dir: &StoreDir,
    paths: impl Iterator<Item = &'a StorePath>,
) {
    paths.for_each(|path| worker::put_query_path_info(request, store_dir, path));
}

pub(super) fn put_nars<'a>(
    request: &mut Vec<u8>,
    store_dir: &StoreDir,
    paths: impl Iterator<Item = &'a StorePath>,
) {
    paths.for_each(|path| worker::put_nar_from_path(request, store_dir, path));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_was_sent_is_known_and_another_one_is_a_wrong_guess() {
        let path =
            |name: &str| StorePath::from_basename(format!("{}-{name}", "0".repeat(32)).as_bytes()).unwrap();
        let (store_dir, paths) = (StoreDir::default(), [path("a"), path("b")]);
        let mut ahead = Ahead::default();
        assert!(!ahead.take("asking", b"x").unwrap(), "nothing was sent");
        ahead.fetch(&store_dir, &paths, &paths);
        let mut infos = Vec::new();
        put_path_infos(&mut infos, &store_dir, paths.iter());
        let mut nars = Vec::new();
        put_nars(&mut nars, &store_dir, paths.iter());
        // In another order they are not what was asked for.
        assert!(matches!(ahead.take("fetching", &nars), Err(BuilderError::Guess { doing: "fetching" })));
        assert!(matches!(ahead.take("doing nothing", &[]), Err(BuilderError::Guess { .. })));
        assert!(ahead.take("asking", &infos).unwrap() && ahead.take("fetching", &nars).unwrap());
        assert!(!ahead.take("asking", &infos).unwrap(), "all of it is used up");
    }

    #[test]
    fn what_is_too_much_to_be_sent_unread_is_not_sent_ahead() {
        let path = StorePath::from_basename(format!("{}-x", "0".repeat(32)).as_bytes()).unwrap();
        let with = |count: usize| {
            let mut ahead = Ahead::default();
            let paths = vec![path.clone(); count];
            ahead.fetch(&StoreDir::default(), &paths, &paths);
            ahead.if_small().bytes().len()
        };
        assert!(with(10) > 0 && with(10_000) == 0);
    }
}
