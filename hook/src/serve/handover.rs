//! What is left to Nix's own hook: machines of kinds that we do not speak, derivations of experimental kinds, and
//! client stores that are no local ones.
//!
//! Must never ask it for what a machine of ours will do.

use super::ServeError;
use crate::config::{self, Settings};
use crate::nix_side::NixSide;
use crate::plan::machine::Machine;
use crate::plan::{self, Request};
use crate::stock::{Stock, StockError};
use crate::wire::hook::{self, Reply, Verbosity};
use nix_offload_proxy::exit;
use std::io::Read;

/// Which machines Nix's own hook may choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Among {
    /// Those that we do not speak to.
    Foreign,
    /// All, because it is the derivation or the client's store that we cannot do.
    All,
}

/// Nix's own hooks, started when they are first needed. Each keeps to its list of machines.
pub(super) struct Handover<'a> {
    nix: &'a NixSide,
    settings: &'a Settings,
    verbosity: u64,
    foreign: Vec<&'a Machine>,
    all: Vec<&'a Machine>,
    running: [Option<Stock>; 2],
    told: bool,
}

impl<'a> Handover<'a> {
    pub(super) fn new(
        nix: &'a NixSide,
        settings: &'a Settings,
        verbosity: u64,
        machines: impl Iterator<Item = &'a Machine>,
    ) -> Self {
        let all: Vec<&Machine> = machines.collect();
        let foreign = all.iter().copied().filter(|machine| !machine.uri.is_ours()).collect();
        Self { nix, settings, verbosity, foreign, all, running: [None, None], told: false }
    }

    fn machines(&self, among: Among) -> &[&'a Machine] {
        match among {
            Among::Foreign => &self.foreign,
            Among::All => &self.all,
        }
    }

    /// Asks Nix's own hook, if one of its machines could do it. What it accepted is to be carried on by it.
    pub(super) fn ask(&mut self, among: Among, request: &Request, why: &str) -> (Reply, Option<Stock>) {
        if !self.machines(among).iter().any(|machine| plan::suits(machine, request).is_ok()) {
            return (Reply::Decline, None);
        }
        match self.try_ask(among, request) {
            Ok((reply, stock)) => {
                tracing::info!(
                    derivation = request.drv_path,
                    reason = why,
                    reply = ?reply,
                    "asked Nix's own hook"
                );
                (reply, stock)
            }
            Err(error) => {
                let text = exit::report(&error, None);
                let text = text.strip_prefix("error: ").unwrap_or(&text);
                tracing::warn!(derivation = request.drv_path, reason = why, "{text}");
                if !self.told {
                    self.told = true;
                    let text = format!("'{}' is left to Nix's own hook ({why}): {text}", request.drv_path);
                    self.nix.message(Verbosity::Warn, &format!("nix-offload: {text}"));
                }
                (Reply::Decline, None)
            }
        }
    }

    fn try_ask(&mut self, among: Among, request: &Request) -> Result<(Reply, Option<Stock>), StockError> {
        let mut stock = match self.running[among as usize].take() {
            Some(stock) => stock,
            None => {
                let lines: Vec<String> =
                    self.machines(among).iter().map(|machine| config::line(machine)).collect();
                Stock::start(self.verbosity, self.settings, lines.join("\n"))?
            }
        };
        match stock.ask(request, self.nix)? {
            accept @ Reply::Accept { .. } => Ok((accept, Some(stock))),
            // Said of its machines only; ours may still do the next one.
            Reply::DeclinePermanently => Ok((Reply::Decline, None)),
            other => {
                self.running[among as usize] = Some(stock);
                Ok((other, None))
            }
        }
    }
}

/// Serves Nix for a client store that we cannot write to. Gives the exit status.
pub(super) fn serve_all(
    mut handover: Handover<'_>,
    source: &mut impl Read,
    why: &str,
) -> Result<u8, ServeError> {
    while let Some(request) = hook::read_request(source).map_err(ServeError::Protocol)? {
        let (reply, stock) = handover.ask(Among::All, &request, why);
        handover.nix.reply(&reply).map_err(ServeError::NixGone)?;
        if let Some(stock) = stock {
            return Ok(stock.carry_on(source, handover.nix));
        }
    }
    Ok(exit::OK)
}
