//! The test world: any number of machines, each with its own /nix, its own Nix and its own processes.
//!
//! ```no_run
//! use harness::{Hook, World, drv};
//!
//! let world = World::new();
//! let builder = world.builder("mac").max_sessions(3).start();
//! let client = world.client().hook(Hook::Ours).uses(&builder, "ssh-ng", 8).start();
//! let built = client.nix_build(&drv::trivial("hello"), &["-j0"]);
//! built.assert_success();
//! builder.verify_store();
//! client.verify_store();
//! ```
//!
//! A machine is a mount, PID and UTS namespace whose root is a tmpfs (`machine.sh`): real sshd, real
//! nix-daemon, real ssh, the loopback network of the host (but see [`Uplink`]) and nothing else of it but `/usr`, read-only.
//! When the first process of a machine ends, the kernel ends all others and drops the mounts; that
//! happens on drop, after a panic, and when the test itself is killed. After a failure the logs of
//! all machines are printed and kept.
//!
//! This library never judges the product and does not link its code: it only runs programs.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a broken test world is a failed test")]

mod builder;
mod client;
mod command;
pub mod drv;
mod machine;
mod paths;
mod relay;
mod uplink;
mod wait;
mod world;

pub use builder::{Builder, BuilderPlan};
pub use client::{Client, ClientPlan, Hook, Mode, OURS, event};
pub use command::{Command, Output, Running};
pub use machine::{Machine, Process};
pub use paths::{Release, binaries, workspace};
pub use relay::Relay;
pub use uplink::Uplink;
pub use wait::wait_until;
pub use world::World;
