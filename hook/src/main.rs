//! The door of nix-offload.
fn main() {}
