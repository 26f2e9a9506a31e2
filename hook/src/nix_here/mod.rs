//! The Nix of this machine: its daemon, its settings, its programs' answers, each within a bound of time.
//!
//! Must never judge what it finds, nor connect to the daemon.

mod command;
mod daemon;
mod effective;

pub use command::{Answer, run};
pub use daemon::{Daemon, Process, find as find_daemon};
pub use effective::{AskError, Effective, Version, View};
