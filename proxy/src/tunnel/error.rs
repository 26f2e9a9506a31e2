//! Why a ProxyCommand has no stream: the sentence, the cure, the exit code.

use std::{
    io,
    time::{Duration, SystemTime},
};

use thiserror::Error;

use crate::{
    dial::DialError,
    down::{Down, clock},
    exit,
    master::{OpenError, StartError},
    wake::{WakeError, Waking},
};

/// Why there is no stream, or why it broke.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TunnelError {
    /// No TCP connection.
    #[error("cannot connect to {host} port {port}")]
    Direct {
        /// The host.
        host: String,
        /// Its port.
        port: u16,
        /// Why.
        #[source]
        source: DialError,
    },
    /// The jump host cannot connect.
    #[error("cannot connect to {host} port {port} through {via}")]
    Via {
        /// The host.
        host: String,
        /// Its port.
        port: u16,
        /// The jump host.
        via: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// The connection to the jump host does not answer.
    #[error("cannot connect to {host} port {port}: the connection to {via} is silent")]
    Silent {
        /// The host.
        host: String,
        /// Its port.
        port: u16,
        /// The jump host.
        via: String,
        /// What was seen of it.
        #[source]
        source: OpenError,
    },
    /// The jump host cannot be reached.
    #[error(transparent)]
    Start(#[from] StartError),
    /// It failed a short while ago.
    #[error("{way} is {}, because it failed: {}", left_alone(down), down.reason)]
    KnownDown {
        /// The way that failed.
        way: String,
        /// What is known of it.
        down: Down,
    },
    /// ssh did not ask for a descriptor.
    #[error("stdout is not a unix socket, so no descriptor can be handed over")]
    NoSocket,
    /// The descriptor did not get there.
    #[error("cannot hand over the connection")]
    HandOver(#[source] io::Error),
    /// It is down and being woken.
    #[error("{host} is being woken ({} s more)", waking.left.as_secs())]
    Waking {
        /// The host.
        host: String,
        /// Since when and how much longer.
        waking: Waking,
        /// How it is seen to be down.
        #[source]
        source: Box<TunnelError>,
    },
    /// It is down and cannot be woken.
    #[error("cannot wake {host}")]
    Wake {
        /// The host.
        host: String,
        /// Why.
        #[source]
        source: WakeError,
    },
    /// Too many connections are being made to it already, and no turn came in time.
    #[error("cannot connect to {host} port {port}: too many new connections to it, no turn within {} s", crate::exit::seconds(*bound))]
    Crowded {
        /// The host.
        host: String,
        /// Its port.
        port: u16,
        /// The bound that was given.
        bound: Duration,
    },
    /// The host has a master and runs no command.
    #[error("{destination} does not run a command")]
    Unanswered {
        /// The destination as it was given.
        destination: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// The host took a command and does not end it.
    #[error("{destination} took the command `true` and has not ended it within {} s", crate::exit::seconds(*bound))]
    Endless {
        /// The destination as it was given.
        destination: String,
        /// How long it was waited for.
        bound: Duration,
    },
    /// It worked and then broke.
    #[error("the connection to {host} broke")]
    Broken {
        /// The host.
        host: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The master went away in the middle.
    #[error("the connection to {host} broke, because the SSH master to {via} ended")]
    MasterLost {
        /// The host.
        host: String,
        /// The jump host.
        via: String,
        /// What was seen of it.
        #[source]
        source: OpenError,
    },
}

impl TunnelError {
    /// What to do about it, if that can be said.
    pub fn cure(&self) -> Option<String> {
        match self {
            TunnelError::Direct { host, port, source } => Some(match source {
                DialError::Resolve(_) => {
                    format!("check the spelling of {host}, DNS, and HostName in ssh_config")
                }
                DialError::TimedOut { .. } => {
                    format!("check that {host} is up and that the network lets port {port} through")
                }
                DialError::Failed(_) => {
                    format!("check that {host} is up and that sshd listens on port {port}")
                }
            }),
            TunnelError::Via { host, port, via, source: OpenError::Refused { .. } } => Some(format!(
                "check on {via} that {host} can be reached at port {port}, and that its sshd allows TCP forwarding"
            )),
            TunnelError::Via { host, via, source: OpenError::TimedOut { .. }, .. } => {
                Some(format!("check that {host} is up and that {via} can reach it"))
            }
            TunnelError::Silent { via, .. } => {
                Some(format!("try again, which takes another connection to {via}; check that {via} is up"))
            }
            TunnelError::Endless { destination, .. } => Some(format!(
                "see what sshd runs instead on {destination} (ForceCommand, command= in authorized_keys)"
            )),
            TunnelError::Start(error) => error.cure(),
            TunnelError::KnownDown { .. } => Some("nix-offload-proxy --wait waits for it instead".into()),
            TunnelError::Waking { .. } => Some("nix-offload-proxy --wait waits longer".into()),
            TunnelError::Wake { source, .. } => Some(source.cure()),
            TunnelError::Crowded { .. } => {
                Some("try again; `connections-per-second` in offload.toml says how many are allowed".into())
            }
            TunnelError::NoSocket => {
                Some("leave --fdpass out, or say `ProxyUseFdpass yes` in ssh_config".into())
            }
            _ => None,
        }
    }

    /// The exit code a command ends with, from [`crate::exit`].
    pub fn exit_code(&self) -> u8 {
        match self {
            TunnelError::Direct { .. } | TunnelError::MasterLost { .. } => exit::UNAVAILABLE,
            TunnelError::Via { source: OpenError::Argument { .. }, .. } | TunnelError::NoSocket => {
                exit::USAGE
            }
            TunnelError::Via { .. }
            | TunnelError::Silent { .. }
            | TunnelError::Unanswered { .. }
            | TunnelError::Endless { .. } => exit::UNAVAILABLE,
            TunnelError::Start(error) => error.exit_code(),
            TunnelError::KnownDown { .. } | TunnelError::Waking { .. } | TunnelError::Crowded { .. } => {
                exit::TEMPORARY
            }
            TunnelError::Wake { .. } => exit::CONFIG,
            TunnelError::HandOver(_) | TunnelError::Broken { .. } => exit::FAILURE,
        }
    }

    /// It may work later without anybody doing anything.
    pub(super) fn is_worth_waiting(&self) -> bool {
        match self {
            TunnelError::Direct { .. }
            | TunnelError::Silent { .. }
            | TunnelError::KnownDown { .. }
            | TunnelError::Waking { .. }
            | TunnelError::Crowded { .. } => true,
            TunnelError::Via { source, .. } => !matches!(source, OpenError::Argument { .. }),
            TunnelError::Start(error) => error.is_temporary(),
            _ => false,
        }
    }
}

fn left_alone(down: &Down) -> String {
    match seconds_until(down.next) {
        0 => "left alone while another process tries it again".into(),
        seconds => format!("not tried again before {} (in {seconds} s)", clock(down.next)),
    }
}

fn seconds_until(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::now()).unwrap_or_default().as_millis().div_ceil(1000) as u64
}
