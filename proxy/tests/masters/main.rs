//! Masters to a real sshd, run by the ssh and sshd of this machine. Needs root, as sshd does.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "clippy.toml allows it in tests, but not in their helpers"
)]

mod by_hand;
mod changes;
mod crowds;
mod faults;
mod hostile;
mod own_masters;
mod quiet;
mod sessions;
mod slow;
mod ssh_config;
mod starts;
mod streams;
mod world;
