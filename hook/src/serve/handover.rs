//! What is left to Nix's own hook: machines of kinds that we do not speak, derivations of experimental kinds, and
//! client stores that are no local ones.
//!
//! Must never ask it for what a machine of ours will do.

use super::{ServeError, env};
use crate::config::{self, Settings};
use crate::derivation;
use crate::nix_side::NixSide;
use crate::plan::machine::Machine;
use crate::plan::{self, Request};
use crate::state::{self, Withholdings};
use crate::stock::{Stock, StockError};
use crate::wire::hook::{self, Reply, Verbosity};
use nix_offload_proxy::exit;
use std::io::Read;
use std::path::PathBuf;
use std::time::SystemTime;

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
    state: Option<PathBuf>,
    /// With the list that each was started with.
    running: [Option<(String, Stock)>; 2],
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
        let state = state::directory(env);
        Self { nix, settings, verbosity, foreign, all, state, running: [None, None], told: false }
    }

    /// The machines that are in service, and the names of those that are not.
    fn machines(&self, among: Among, request: &Request) -> (Vec<&'a Machine>, Vec<&'a str>) {
        let all = match among {
            Among::Foreign => &self.foreign,
            Among::All => &self.all,
        };
        let now = SystemTime::now();
        let withheld = self.state.as_deref().map(Withholdings::read).unwrap_or_default();
        let is_withheld = |machine: &&Machine| withheld.of(&machine.name).is_some_and(|it| it.holds(now));
        let (out, serving): (Vec<&Machine>, Vec<&Machine>) = all.iter().copied().partition(is_withheld);
        let missed = out.into_iter().filter(|machine| plan::suits(machine, request).is_ok());
        (serving, missed.map(|machine| machine.name.as_str()).collect())
    }

    /// Asks Nix's own hook, if one of its machines could do it. What it accepted is to be carried on by it.
    pub(super) fn ask(&mut self, among: Among, request: &Request, why: &str) -> (Reply, Option<Stock>) {
        let (machines, missed) = self.machines(among, request);
        if !machines.iter().any(|machine| plan::suits(machine, request).is_ok()) {
            if among == Among::All && !missed.is_empty() {
                let missed = missed.join(", ");
                self.tell(
                    request,
                    why,
                    &format!("the machines that could do it are out of service: {missed}"),
                );
            }
            return (Reply::Decline, None);
        }
        match self.try_ask(among, &machines, request) {
            Ok((reply, stock)) => {
                tracing::info!(
                    event = "asked Nix's own hook",
                    derivation = request.drv_path,
                    reason = why,
                    reply = ?reply,
                    "asked Nix's own hook about '{}' ({why}): {reply:?}",
                    derivation::name_in(&request.drv_path)
                );
                (reply, stock)
            }
            Err(error) => {
                let text = exit::reason(&error);
                let name = derivation::name_in(&request.drv_path);
                tracing::warn!(
                    event = "Nix's own hook failed",
                    derivation = request.drv_path,
                    reason = why,
                    "'{name}' is left to Nix's own hook ({why}): {text}"
                );
                self.tell(request, why, &text);
                (Reply::Decline, None)
            }
        }
    }

    /// Says once why it does not get what is left to it.
    fn tell(&mut self, request: &Request, why: &str, text: &str) {
        if !self.told {
            self.told = true;
            let text = format!("'{}' is left to Nix's own hook ({why}): {text}", request.drv_path);
            self.nix.message(Verbosity::Warn, &format!("nix-offload: {text}"));
        }
    }

    fn try_ask(
        &mut self,
        among: Among,
        machines: &[&Machine],
        request: &Request,
    ) -> Result<(Reply, Option<Stock>), StockError> {
        let lines: Vec<String> = machines.iter().map(|machine| config::line(machine)).collect();
        let list = lines.join("\n");
        // Which machines are in service may have changed since.
        let running = self.running[among as usize].take().filter(|(of, _)| *of == list);
        let mut stock = match running {
            Some((_, stock)) => stock,
            None => Stock::start(self.verbosity, self.settings, list.clone())?,
        };
        match stock.ask(request, self.nix)? {
            accept @ Reply::Accept { .. } => Ok((accept, Some(stock))),
            // Said of its machines only; ours may still do the next one.
            Reply::DeclinePermanently => Ok((Reply::Decline, None)),
            other => {
                self.running[among as usize] = Some((list, stock));
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
