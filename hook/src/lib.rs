//! The Nix build hook.

pub mod config;
pub mod path_info;
pub mod plan;
pub mod store;
pub mod wire;
