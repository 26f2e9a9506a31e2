//! How a build ended.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::super::{MAX_STRING, WireError, read_bytes, read_list, read_u64};
use super::Version;
use std::io::Read;

const MAX_OUTPUTS: u64 = 1000;
/// Longest identity or realisation of an output; both are read and dropped.
const MAX_REALISATION: u64 = 1 << 20;
/// Longest repetition of what was asked for: a path and names of outputs.
const MAX_KEY: u64 = 1 << 20;

/// How a build ended (`BuildResult` in Nix 2.34 `src/libstore/include/nix/store/build-result.hh`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildResult {
    /// The number on the wire.
    pub status: u64,
    /// The builder's own message when it failed.
    pub message: String,
}

/// What a build's status means for the one who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The outputs are there.
    Built,
    /// It will fail again.
    Failed,
    /// It took too long, or was silent for too long.
    TimedOut,
    /// The builder could not do it now; another try or another machine may.
    NotThere,
}

impl BuildResult {
    /// That the outputs were built.
    pub fn built() -> Self {
        Self { status: 0, message: String::new() }
    }

    /// That the build failed, of which nothing but the message is known. A build that took too long tells by its words
    /// (`DerivationGoal` in Nix 2.3 `src/libstore/build.cc`).
    pub fn failed(message: String) -> Self {
        let timed_out = message.contains("timed out after");
        Self { status: if timed_out { 8 } else { 9 }, message }
    }

    /// Whether it was built now, rather than substituted or there already.
    pub fn is_new(&self) -> bool {
        self.status == 0
    }

    /// Reads the status. To Nix every failure of a fixed-output derivation is transient, since it may come from the
    /// network (`derivation-building-goal.cc`); another machine is no cure for those.
    pub fn outcome(&self, fixed: bool) -> Outcome {
        match self.status {
            0 | 1 | 2 | 13 => Outcome::Built,
            8 => Outcome::TimedOut,
            6 if fixed => Outcome::Failed,
            6 | 10 | 14 => Outcome::NotThere,
            _ => Outcome::Failed,
        }
    }
}

/// Reads the answer to a build.
///
/// # Errors
/// If the stream ends or holds something else.
pub fn read_build_result(source: &mut impl Read, version: Version) -> Result<BuildResult, WireError> {
    let status = read_u64(source, "a build's status")?;
    let message = String::from_utf8_lossy(&read_bytes(source, "a build's message", MAX_STRING)?).into_owned();
    if version.minor() >= 29 {
        read_build_times(source)?;
    }
    if version.minor() >= 37 {
        for what in ["a build's user time", "a build's system time"] {
            match read_u64(source, what)? {
                0 => {}
                1 => drop(read_u64(source, what)?),
                other => {
                    return Err(WireError::Unexpected {
                        what,
                        got: other.to_string(),
                        expected: "0 (absent) or 1 (present)",
                    });
                }
            }
        }
    }
    if version.minor() >= 28 {
        read_built_outputs(source)?;
    }
    Ok(BuildResult { status, message })
}

/// Reads the answer to a build of outputs of one derivation: a list of one result, behind what was asked for.
///
/// # Errors
/// If the stream ends or holds something else.
pub fn read_keyed_build_result(source: &mut impl Read, version: Version) -> Result<BuildResult, WireError> {
    const WHAT: &str = "the results of a build";
    match read_u64(source, WHAT)? {
        1 => {}
        other => {
            return Err(WireError::Unexpected {
                what: WHAT,
                got: format!("{other} of them"),
                expected: "one, for one derivation",
            });
        }
    }
    read_bytes(source, "what was built", MAX_KEY)?;
    read_build_result(source, version)
}

/// Reads how often and when it was built, and drops it.
pub(in super::super) fn read_build_times(source: &mut impl Read) -> Result<(), WireError> {
    for what in ["how often it was built", "whether it is deterministic", "a build's begin", "a build's end"]
    {
        read_u64(source, what)?;
    }
    Ok(())
}

/// Reads what was made of each output, and drops it: the paths are known.
pub(in super::super) fn read_built_outputs(source: &mut impl Read) -> Result<(), WireError> {
    read_list(source, "a build's outputs", MAX_OUTPUTS, |source| {
        read_bytes(source, "an output's identity", MAX_REALISATION)?;
        read_bytes(source, "an output's realisation", MAX_REALISATION).map(drop)
    })
    .map(drop)
}
