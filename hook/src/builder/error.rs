//! What can go wrong with a builder's store, and whether the transport is to blame.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::wire::WireError;
use nix_offload_proxy::exit;
use std::io;
use std::time::Duration;
use thiserror::Error;

/// What can go wrong with a builder's store.
#[derive(Debug, Error)]
pub enum BuilderError {
    /// The connection ended or broke. Another try may succeed.
    #[error("the connection was lost while {doing}")]
    Lost {
        /// What was being done.
        doing: &'static str,
        /// How it broke.
        #[source]
        source: WireError,
    },
    /// Something that is no Nix daemon answered.
    #[error("no Nix daemon answered{}", quoted(.seen))]
    NoDaemon {
        /// What was sent instead of a greeting.
        seen: String,
        /// How reading ended.
        #[source]
        source: WireError,
    },
    /// The daemon did not answer in time.
    #[error("no answer within {} s while {doing}", exit::seconds(*.bound))]
    NoAnswer {
        /// What was being done.
        doing: &'static str,
        /// The time given.
        bound: Duration,
    },
    /// The far side sent something that the protocol does not allow there.
    #[error("the builder's Nix broke its protocol while {doing}")]
    Protocol {
        /// What was being done.
        doing: &'static str,
        /// What was wrong.
        #[source]
        source: WireError,
    },
    /// The far side refused what it was asked for.
    #[error("{message}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// Its words.
        message: String,
    },
    /// What was sent ahead is not what is needed now.
    #[error("what was sent to the builder in advance was a wrong guess, seen while {doing}")]
    Guess {
        /// What was to be done.
        doing: &'static str,
    },
    /// The build wrote nothing for too long (`max-silent-time`).
    #[error("timed out after {0} seconds of silence")]
    Silent(u64),
    /// The build took too long (`timeout`).
    #[error("timed out after {0} seconds")]
    TimedOut(u64),
    /// Whoever looked in on the build called it off before it had ended. It ends there when the connection does.
    #[error("the build was called off")]
    CalledOff,
    /// A path of the local store could not be read for sending.
    #[error("cannot send {path}")]
    Dump {
        /// The path.
        path: String,
        /// Why it could not be read.
        #[source]
        source: io::Error,
    },
    /// The receiver of an output failed.
    #[error("{0}")]
    Receive(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl BuilderError {
    /// Whether the transport is to blame, so that another connection may do better.
    pub fn is_transport(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::NoAnswer { .. } | Self::NoDaemon { .. })
    }

    /// What came instead of a greeting is quoted, shortened.
    pub(super) fn no_daemon(seen: &[u8], source: WireError) -> Self {
        const SHOWN: usize = 200;
        let seen = String::from_utf8_lossy(&seen[..seen.len().min(SHOWN)]).trim().to_owned();
        Self::NoDaemon { seen, source }
    }

    pub(super) fn wire(doing: &'static str, source: WireError) -> Self {
        if source.is_disconnect() { Self::Lost { doing, source } } else { Self::Protocol { doing, source } }
    }
}

fn quoted(seen: &str) -> String {
    if seen.is_empty() { String::new() } else { format!("; instead came '{}'", seen.escape_debug()) }
}
