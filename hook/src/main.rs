//! The door of nix-offload: the hook that Nix starts, and the commands for people.

use nix_offload::cli::{self, Action};
use nix_offload::reach::Reach;
use nix_offload::{check, explain, ping, sampler, serve, status, withhold};
use nix_offload_proxy::{
    exit,
    log::{self, Fallback},
    master,
};
use std::io::{self, Write};
use std::process::ExitCode;
use tracing::level_filters::LevelFilter;

fn main() -> ExitCode {
    let (code, text) = match cli::parse(std::env::args_os()) {
        Err(usage) => usage.exit(),
        Ok(Action::Hook { verbosity }) => match serve::serve(verbosity) {
            Ok(code) => (code, None),
            // It may end up in the journal of Nix's daemon, so it says whose it is.
            Err(error) => (exit::FAILURE, Some(format!("nix-offload: {}", exit::report(&error, None)))),
        },
        Ok(Action::Keep { control, door, lock }) => {
            stand_alone();
            match master::keep(&control, &door, &lock) {
                Ok(()) => (exit::OK, None),
                Err(error) => (exit::FAILURE, Some(exit::report(&error, None))),
            }
        }
        Ok(Action::Probe { name, line }) => {
            stand_alone();
            match Reach::new(|name| std::env::var_os(name)) {
                Ok(reach) => {
                    reach.probe(&name, &line);
                    (exit::OK, None)
                }
                Err(error) => (exit::CONFIG, Some(exit::report(&error, error.cure().as_deref()))),
            }
        }
        Ok(Action::Sample) => {
            stand_alone();
            match sampler::run() {
                Ok(()) => (exit::OK, None),
                Err(error) => (exit::FAILURE, Some(exit::report(&error, None))),
            }
        }
        Ok(Action::Ping { targets, bound, json }) => match ping::ping(&targets, bound, json) {
            Ok(code) => (code, None),
            Err(error) => (error.exit_code(), Some(exit::report(&error, error.cure().as_deref()))),
        },
        Ok(Action::Withhold { change, names, meant, json }) => {
            match withhold::withhold(&change, &names, &meant, json) {
                Ok(code) => (code, None),
                Err(error) => (error.exit_code(), Some(exit::report(&error, error.cure().as_deref()))),
            }
        }
        Ok(Action::Status { watch, meant, json }) => match status::status(&meant, json, watch) {
            Ok(code) => (code, None),
            Err(error) => (error.exit_code(), Some(exit::report(&error, error.cure().as_deref()))),
        },
        Ok(Action::Explain { wish, json }) => match explain::explain(&wish, json) {
            Ok(code) => (code, None),
            Err(error) => {
                let said = error.said().map(|said| format!("{said}\n")).unwrap_or_default();
                (error.exit_code(), Some(format!("{said}{}", exit::report(&error, error.cure().as_deref()))))
            }
        },
        Ok(Action::Check { subject, strict, json }) => match check::check(&subject, strict, json) {
            Ok(code) => (code, None),
            Err(error) => (exit::FAILURE, Some(exit::report(&error, None))),
        },
    };
    if let Some(text) = text {
        // Nowhere is left to report that this failed.
        let _ = writeln!(io::stderr(), "{text}");
    }
    ExitCode::from(code)
}

/// Leaves whoever started this process, which is to live on without him.
fn stand_alone() {
    master::detach();
    let level = std::env::var("NIX_OFFLOAD_LOG").ok().and_then(|text| log::parse_level(&text));
    log::init("nix-offload", level.unwrap_or(LevelFilter::INFO), Fallback::Nothing);
}
