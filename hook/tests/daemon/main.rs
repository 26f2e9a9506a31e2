//! The worker protocol against a real `nix-daemon --stdio`, in every version we speak, and against a peer that
//! breaks off or lies.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on is to panic")]

mod real;
mod scripted;
