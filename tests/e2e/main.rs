//! What nix-offload promises beyond what the stock hook does; with ours only.
#![expect(clippy::unwrap_used, reason = "a surprise in a test world is a failed test")]

mod cancel;
mod checking;
mod choosing;
mod elsewhere;
mod fallbacks;
mod faults;
mod flights;
mod health;
mod installing;
mod journal;
mod keeper;
mod killing;
mod leases;
mod logs;
mod many;
mod masters;
mod moving;
mod outputs;
mod packaging;
mod penalties;
mod ping;
mod protocol;
mod proxycommand;
mod queue;
mod running;
mod sampling;
mod sending;
mod serve;
mod slots;
mod support;
mod telling;
mod trust;
mod waking;
mod watching;
mod withholding;
