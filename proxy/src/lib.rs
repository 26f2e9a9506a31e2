//! Shared OpenSSH masters for many short-lived processes.
//!
//! A line belongs here if a ProxyCommand that has never heard of Nix would need it.

pub mod cli;
pub mod dial;
pub mod down;
pub mod exit;
pub mod key_file;
mod listing;
pub mod log;
pub mod master;
pub mod network;
mod passing;
pub mod removal;
pub mod settings;
pub mod small_file;
pub mod tunnel;
pub mod wake;
