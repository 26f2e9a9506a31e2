//! The rule of Nix's own hook, written down once more, without a line of ours.
//!
//! Source: `src/build-remote/build-remote.cc` in Nix 2.26.3. All machines suit all builds here.

use nix_offload::plan::machine::Machine;

/// The machine that stock takes, if one has a slot free: it goes through the list and keeps the best so far.
pub(crate) fn choose(machines: &[Machine], taken: &[u64], disabled: &[bool]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (index, machine) in machines.iter().enumerate() {
        if disabled[index] || taken[index] >= machine.max_jobs {
            continue;
        }
        let Some(leader) = best else {
            best = Some(index);
            continue;
        };
        let relative = |index: usize| taken[index] as f32 / machines[index].speed_factor;
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
