//! The Nix build hook. The rooms of the house and the arrows between them are drawn in ARCHITECTURE.md.

pub mod builder;
pub mod check;
pub mod cli;
pub mod config;
pub mod fds;
pub mod files;
pub mod job;
pub mod nix_side;
pub mod path_info;
pub mod ping;
pub mod plan;
pub mod programs;
pub mod reach;
pub mod sending;
pub mod serve;
pub mod slots;
pub mod state;
pub mod stock;
pub mod store;
pub mod survey;
pub mod wire;
