//! The door of nix-offload: the hook that Nix starts, and the commands for people.

use nix_offload::cli::{self, Action};
use nix_offload::{check, explain, ping, reach, sampler, serve, status, withhold};
use nix_offload_proxy::exit::{self, Failure};
use nix_offload_proxy::log::{self, Fallback};
use nix_offload_proxy::master;
use std::process::ExitCode;
use tracing::level_filters::LevelFilter;

fn main() -> ExitCode {
    let action = cli::parse(std::env::args_os()).unwrap_or_else(|usage| usage.exit());
    run(action).unwrap_or_else(Failure::tell).into()
}

/// Does what is asked for. Gives the exit code.
fn run(action: Action) -> Result<u8, Failure> {
    if matches!(action, Action::Keep { .. } | Action::Probe { .. } | Action::Sample) {
        stand_alone();
    }
    Ok(match action {
        Action::Hook { verbosity } => serve::serve(verbosity).map_err(|error| of_hook(&error))?,
        Action::Keep { control, door, lock } => match master::keep(&control, &door, &lock) {
            Ok(()) => exit::OK,
            Err(error) => return Err(Failure::new(&error, None, exit::FAILURE)),
        },
        Action::Probe { name, line } => reach::probe(&name, &line).map(|()| exit::OK)?,
        Action::Sample => sampler::run().map(|()| exit::OK)?,
        Action::Ping { targets, bound, json } => ping::ping(&targets, bound, json)?,
        Action::Withhold { change, names, meant, json } => withhold::withhold(&change, &names, &meant, json)?,
        Action::Status { watch, meant, json } => status::status(&meant, json, watch)?,
        Action::Explain { wish, json } => explain::explain(&wish, json)?,
        Action::Check { subject, strict, json } => check::check(&subject, strict, json)?,
    })
}

/// It may end up in the journal of Nix's daemon, so it says whose it is.
fn of_hook(error: &serve::ServeError) -> Failure {
    let Failure { report, code } = Failure::new(error, None, exit::FAILURE);
    Failure { report: format!("nix-offload: {report}"), code }
}

/// Leaves whoever started this process, which is to live on when its starter has gone.
fn stand_alone() {
    master::detach();
    let level = std::env::var("NIX_OFFLOAD_LOG").ok().and_then(|text| log::parse_level(&text));
    log::init("nix-offload", level.unwrap_or(LevelFilter::INFO), Fallback::Nothing);
}
