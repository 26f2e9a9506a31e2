//! What nix-offload promises beyond what the stock hook does; with ours only.
#![expect(clippy::unwrap_used, reason = "a surprise in a test world is a failed test")]

mod faults;
mod many;
