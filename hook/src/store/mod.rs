//! The local store.
//!
//! Owns: where the store is, reading its database, and putting outputs into it; nothing else of the house
//! writes to a store. Must never: speak to a builder, or take the locks that Nix holds while it waits for
//! its hook. Those locks are why neither the daemon nor `nix-store --import` can do this work: both would
//! wait for them for ever.
//!
//! Putting an output in place is two steps, [`restore()`] and [`Registrar::register`]. A kill between them
//! leaves a path that is not valid, which Nix deletes before the next build of it.

mod database;
mod import;
mod location;
mod nar;
mod optimise;
mod order;
mod query;
mod remove;
mod restore;
#[cfg(test)]
mod tests;

pub use database::DatabaseError;
pub use import::{Durability, Registrar};
pub use location::{Location, LocationError};
pub use nar::{DumpError, dump};
pub use optimise::{OptimiseError, Optimised, optimise};
pub use order::{CycleError, references_first};
pub use query::{DrvId, Query};
pub use remove::RemoveError;
pub use restore::{Expected, RestoreError, Restored, restore};
