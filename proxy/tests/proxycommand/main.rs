//! nix-offload-proxy as a ProxyCommand of the real ssh, through a bastion behind which are three hosts that
//! cannot be reached in another way. Needs root, as sshd and network namespaces do.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "clippy.toml allows it in tests, but not in their helpers"
)]

mod bastion;
mod clients;
mod commands;
mod down;
mod own_master;
mod settings;
mod silence;
mod streams;
mod turned_away;
mod wake;
mod world;
