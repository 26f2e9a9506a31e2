//! Both protocols against a real `nix-daemon --stdio` and a real `nix-store --serve`, in every version we speak, and
//! against peers that break off or lie.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on is to panic")]

mod nar;
mod real;
mod reviewing;
mod scripted;
mod serving;
mod untrusted;
