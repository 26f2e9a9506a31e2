//! The Nix build hook.

pub mod path_info;
pub mod store;
