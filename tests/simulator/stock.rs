//! The rules of Nix's own hooks, written down once more, without a line of ours.
//!
//! Source: `src/build-remote/build-remote.cc` in Nix 2.8.0 and 2.26.3, whose choice reads the same. What
//! `load / speedFactor` is depends on `src/libstore/machines.hh`: speed factors are `unsigned int` up to 2.19.7, `float`
//! since 2.20.0. All machines suit all builds here.

use nix_offload::plan::machine::Machine;

/// Whose hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Edition {
    /// Of Nix up to 2.19. It divides a load by a speed factor as integers, so a machine of factor 8 is as good as idle while
    /// less than eight of its slots are taken. Factors with fractions are errors for it.
    UpTo2_19,
    /// Of Nix since 2.20.
    Since2_20,
}

/// The machine that stock takes, if one has a slot free: it goes through the list and keeps the best so far.
pub(crate) fn choose(
    edition: Edition,
    machines: &[Machine],
    taken: &[u64],
    disabled: &[bool],
) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (index, machine) in machines.iter().enumerate() {
        if disabled[index] || taken[index] >= machine.max_jobs {
            continue;
        }
        let Some(leader) = best else {
            best = Some(index);
            continue;
        };
        let relative = |index: usize| match edition {
            Edition::UpTo2_19 => (taken[index] / (machines[index].speed_factor as u64).max(1)) as f32,
            Edition::Since2_20 => taken[index] as f32 / machines[index].speed_factor,
        };
        let (own, other) = (machine.speed_factor, machines[leader].speed_factor);
        let is_better = if relative(index) < relative(leader) {
            true
        } else if relative(index) == relative(leader) {
            own > other || (own == other && taken[index] < taken[leader])
        } else {
            false
        };
        if is_better {
            best = Some(index);
        }
    }
    best
}
