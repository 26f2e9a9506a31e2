//! How long the chain of builds is that waits for a build: what makes it urgent.
//!
//! Owns the arithmetic of chains. Must never know where the graph or the durations come from.
//!
//! The graph is there before anything is built: derivations refer to those that they need. Even if no duration is known,
//! the number of steps tells what is urgent.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

/// One derivation of the graph above a build that waits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step {
    /// Seconds that it takes on an idle machine of speed factor 1, if that is known.
    pub seconds: Option<f64>,
    /// Derivations that need its outputs and are still to be built, by their numbers. Numbers that do not exist are
    /// left out.
    pub dependents: Vec<usize>,
}

/// For each step the seconds from its begin to the end of the longest chain that waits for it, its own included, on
/// idle machines of speed factor 1.
///
/// A step of which nothing is known counts as the mean of those that are known, or as `typical` seconds. What closes a
/// circle, which derivations cannot have, is left out.
pub fn tails(steps: &[Step], typical: f64) -> Vec<f64> {
    let is_number = |seconds: &f64| seconds.is_finite() && *seconds >= 0.0;
    let known: Vec<f64> = steps.iter().filter_map(|step| step.seconds.filter(is_number)).collect();
    let usual = if known.is_empty() { typical } else { known.iter().sum::<f64>() / known.len() as f64 };
    let seconds = |index: usize| steps[index].seconds.filter(is_number).unwrap_or(usual);
    let mut tails: Vec<Option<f64>> = vec![None; steps.len()];
    let mut is_open = vec![false; steps.len()];
    for root in 0..steps.len() {
        // Depth first without recursion: a step, and how many of its dependents were looked at.
        let mut path = vec![(root, 0)];
        while let Some((index, looked)) = path.last_mut() {
            let index = *index;
            if tails[index].is_some() {
                path.pop();
                continue;
            }
            is_open[index] = true;
            if let Some(next) = steps[index].dependents.get(*looked) {
                *looked += 1;
                if *next < steps.len() && !is_open[*next] {
                    path.push((*next, 0));
                }
                continue;
            }
            let behind =
                steps[index].dependents.iter().filter_map(|next| tails.get(*next).copied().flatten());
            tails[index] = Some(seconds(index) + behind.fold(0.0, f64::max));
            path.pop();
        }
    }
    tails.into_iter().map(Option::unwrap_or_default).collect()
}
