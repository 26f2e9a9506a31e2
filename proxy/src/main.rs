//! The door of nix-offload-proxy.

use std::process::ExitCode;

fn main() -> ExitCode {
    nix_offload_proxy::cli::run(std::env::args_os())
}
