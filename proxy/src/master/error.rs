//! Why there is no master: the sentence, the cure, and what scripts may do about it.
//!
//! Pure.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{io, path::PathBuf, time::Duration};

use thiserror::Error;

use super::{
    diagnosis::{Context, Fault, said, stuck},
    directory::DIRECTORY_VARIABLE,
    name::EndpointError,
};
use crate::{
    exit,
    wake::{WakeError, Waking},
};

/// Why no master could be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// ssh gave up.
    #[error("cannot connect to {destination}: {fault}")]
    Failed {
        /// The destination as it was given.
        destination: String,
        /// What went wrong.
        fault: Fault,
        /// What its cure depends on.
        context: Box<Context>,
    },
    /// It took too long.
    #[error("cannot connect to {destination}: {} within {} s{}", missed(*connected), exit::seconds(*bound), said(stderr))]
    TimedOut {
        /// The destination as it was given.
        destination: String,
        /// The bound that was given.
        bound: Duration,
        /// Whether the host had taken the connection, as far as the kernel knew. Unknown, and so false, behind a proxy.
        connected: bool,
        /// What ssh said until then.
        stderr: String,
    },
    /// Another process is starting the same master and has not finished.
    #[error("cannot connect to {destination}: another process has been connecting for {} s", exit::seconds(*bound))]
    Busy {
        /// The destination as it was given.
        destination: String,
        /// The bound that was given.
        bound: Duration,
    },
    /// Too many connections are being made to the host already, and no turn came in time.
    #[error("cannot connect to {destination}: too many new connections to it, no turn within {} s", exit::seconds(*bound))]
    Crowded {
        /// The destination as it was given.
        destination: String,
        /// The bound that was given.
        bound: Duration,
    },
    /// It is down and being woken.
    #[error("{destination} is being woken ({} s more)", waking.left.as_secs())]
    Waking {
        /// The destination as it was given.
        destination: String,
        /// Since when and how much longer.
        waking: Waking,
        /// How it is seen to be down.
        #[source]
        source: Box<StartError>,
    },
    /// It is down though it was woken.
    #[error("{source}; it was woken and did not answer within {} s (wake-timeout)", exit::seconds(*bound))]
    NotWoken {
        /// How long it was given.
        bound: Duration,
        /// How it is seen to be down.
        #[source]
        source: Box<StartError>,
    },
    /// It is down and cannot be woken.
    #[error("cannot wake {destination}")]
    Wake {
        /// The destination as it was given.
        destination: String,
        /// Why.
        #[source]
        source: WakeError,
    },
    /// This machine has no network.
    #[error("cannot connect to {destination}: this machine has no network")]
    NoNetwork {
        /// The destination as it was given.
        destination: String,
        /// How that was seen.
        #[source]
        source: Box<StartError>,
    },
    /// There is no `ssh`.
    #[error("cannot connect to {destination}: no program `ssh` in PATH")]
    NoSsh {
        /// The destination as it was given.
        destination: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The runtime directory's name is too long for sockets in it.
    #[error("the control socket's path {} is {excess} bytes too long for ssh", control.display())]
    PathTooLong {
        /// The path.
        control: PathBuf,
        /// By how much.
        excess: usize,
    },
    /// The endpoint cannot be given to ssh.
    #[error("bad SSH endpoint")]
    Endpoint(#[from] EndpointError),
    /// A file of the runtime directory cannot be used.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What did not come in time.
fn missed(connected: bool) -> &'static str {
    if connected { "it took the connection, but no login was complete" } else { "no connection" }
}

impl StartError {
    /// What to do about it, if that can be said.
    pub fn cure(&self) -> Option<String> {
        match self {
            StartError::Failed { destination, fault, context } => Some(context.cure(destination, fault)),
            StartError::TimedOut { destination, connected, stderr, .. } => {
                let cure = if *connected {
                    stuck(destination)
                } else {
                    format!("check that the host is up and that the network lets SSH through to {destination}")
                };
                // Over a network that works ssh says nothing either while it waits for a finger.
                let touch = if said(stderr).is_empty() {
                    "; a key that wants a touch or a confirmation may be waiting for it"
                } else {
                    ""
                };
                Some(format!("{cure}{touch}"))
            }
            StartError::Busy { .. } => Some("try again".into()),
            StartError::Crowded { .. } => {
                Some("try again; `connections-per-second` in offload.toml says how many are allowed".into())
            }
            StartError::Waking { .. } => Some("try again in a while".into()),
            StartError::NotWoken { source, .. } => source.cure(),
            StartError::NoNetwork { .. } => Some("connect this machine to a network".into()),
            StartError::Wake { source, .. } => Some(source.cure()),
            StartError::NoSsh { .. } => {
                Some("install OpenSSH's client, or put it on the PATH of this process (the Nix daemon's, for a build hook)".into())
            }
            StartError::PathTooLong { .. } => {
                Some(format!("set {} to a shorter directory", DIRECTORY_VARIABLE))
            }
            StartError::Endpoint(_) | StartError::Io { .. } => None,
        }
    }

    /// It may work when tried again without anybody doing anything: the far side or the network failed,
    /// not what is set up here.
    pub fn is_temporary(&self) -> bool {
        match self {
            StartError::TimedOut { .. }
            | StartError::Busy { .. }
            | StartError::Crowded { .. }
            | StartError::NoNetwork { .. }
            | StartError::Waking { .. } => true,
            StartError::NotWoken { source, .. } => source.is_temporary(),
            StartError::Failed { fault, .. } => matches!(
                fault,
                Fault::NameNotResolved { .. }
                    | Fault::Refused { .. }
                    | Fault::Unreachable { .. }
                    | Fault::TurnedAway { .. }
                    | Fault::Proxy { .. }
                    | Fault::Other { .. }
            ),
            _ => false,
        }
    }

    /// The host or the way to it is down: nothing but time will help, so others need not try at once. What
    /// somebody may be mending, such as a configuration, is not this.
    pub fn is_host_down(&self) -> bool {
        match self {
            StartError::TimedOut { .. } | StartError::Waking { .. } => true,
            StartError::NotWoken { source, .. } => source.is_host_down(),
            StartError::Failed { fault, .. } => matches!(
                fault,
                Fault::NameNotResolved { .. }
                    | Fault::Refused { .. }
                    | Fault::Unreachable { .. }
                    | Fault::TurnedAway { .. }
                    | Fault::Proxy { .. }
            ),
            _ => false,
        }
    }

    /// Where there is no network it fails like this.
    pub(super) fn may_lack_network(&self) -> bool {
        let StartError::Failed { fault, .. } = self else { return false };
        match fault {
            Fault::NameNotResolved { .. } | Fault::Unreachable { .. } => true,
            // What a ProxyCommand of ours has of the kernel and of the resolver.
            Fault::Proxy { said, .. } => {
                said.contains("Network is unreachable") || said.contains("cannot be resolved")
            }
            _ => false,
        }
    }

    /// The exit code a command ends with, from [`crate::exit`].
    pub fn exit_code(&self) -> u8 {
        match self {
            StartError::TimedOut { .. } | StartError::NoNetwork { .. } => exit::UNAVAILABLE,
            StartError::Busy { .. } | StartError::Crowded { .. } | StartError::Waking { .. } => {
                exit::TEMPORARY
            }
            StartError::NotWoken { source, .. } => source.exit_code(),
            StartError::Wake { .. } => exit::CONFIG,
            StartError::Failed {
                fault: Fault::PermissionDenied { .. } | Fault::AgentRefused { .. }, ..
            } => exit::NO_PERMISSION,
            StartError::Failed { .. } if self.is_temporary() => exit::UNAVAILABLE,
            StartError::Failed { .. } | StartError::NoSsh { .. } | StartError::PathTooLong { .. } => {
                exit::CONFIG
            }
            StartError::Endpoint(_) => exit::USAGE,
            StartError::Io { .. } => exit::FAILURE,
        }
    }
}
