//! What the stock hook does and ours must do too. Every test here runs twice with the same body, as
//! `theirs` and as `ours`; a test that fails as `theirs` is a wrong test.

#![expect(clippy::unwrap_used, reason = "a surprise in the output of Nix is a failed test")]

mod choosing;
mod elsewhere;
mod logs;
mod results;
mod trust;

/// Makes the two tests of one body `fn(Hook)`.
macro_rules! theirs_and_ours {
    ($($body:ident),* $(,)?) => {
        mod theirs {
            $(#[test] fn $body() { super::$body(harness::Hook::Stock) })*
        }
        mod ours {
            $(#[test] fn $body() { super::$body(harness::Hook::Ours) })*
        }
    };
}
pub(crate) use theirs_and_ours;
