//! Order by references.

#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::path_info::PathInfo;
use nix_derivation::StorePath;
use std::collections::HashMap;
use thiserror::Error;

/// Paths that refer to each other in a circle; no store accepts such.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("cycle detected in the references: {}", names(.cycle))]
pub struct CycleError {
    /// The circle: each path refers to the next, the last to the first.
    pub cycle: Vec<StorePath>,
}

/// Sorts paths so that each comes after all that it refers to.
///
/// References to itself and to paths outside `infos` do not count; of two entries for the same path the
/// first is kept.
pub fn references_first(infos: Vec<PathInfo>) -> Result<Vec<PathInfo>, CycleError> {
    let order = order(&infos)?;
    let mut infos: Vec<Option<PathInfo>> = infos.into_iter().map(Some).collect();
    Ok(order.into_iter().filter_map(|index| infos[index].take()).collect())
}

/// Indexes into `infos`, references first. Does not recurse: chains may be as long as the closure.
pub(super) fn order(infos: &[PathInfo]) -> Result<Vec<usize>, CycleError> {
    let mut index_of = HashMap::with_capacity(infos.len());
    for (index, info) in infos.iter().enumerate() {
        index_of.entry(&info.path).or_insert(index);
    }
    let mut state = vec![State::New; infos.len()];
    let mut sorted = Vec::with_capacity(infos.len());
    for (start, info) in infos.iter().enumerate() {
        if state[start] != State::New || index_of.get(&info.path) != Some(&start) {
            continue;
        }
        state[start] = State::Open;
        let mut stack = vec![(start, info.references.iter())];
        while let Some((index, references)) = stack.last_mut() {
            let index = *index;
            let Some(reference) = references.next() else {
                state[index] = State::Done;
                sorted.push(index);
                stack.pop();
                continue;
            };
            let Some(&next) = index_of.get(reference) else { continue };
            match state[next] {
                State::New => {
                    state[next] = State::Open;
                    stack.push((next, infos[next].references.iter()));
                }
                State::Open if next != index => {
                    let from = stack.iter().position(|(open, _)| *open == next).unwrap_or_default();
                    let cycle = stack[from..].iter().map(|(open, _)| infos[*open].path.clone()).collect();
                    return Err(CycleError { cycle });
                }
                State::Open | State::Done => {}
            }
        }
    }
    Ok(sorted)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Open,
    Done,
}

fn names(cycle: &[StorePath]) -> String {
    let names: Vec<String> = cycle.iter().chain(cycle.first()).map(StorePath::to_basename).collect();
    names.join(" -> ")
}
