//! `ssh HOST true` through a bastion.

use super::scene::{Contender, Scene};
use crate::report::{Bound, Figure, Section};

/// Runs of each contender in a round.
const RUNS: u32 = 15;
const JUMP_GOAL: f64 = 1.7;

/// A whole login at the host, with an empty shell start-up; every master is alive.
pub(crate) fn jump(scene: &Scene, rounds: u32) -> Section {
    let mut figures = Contender::ALL.map(|contender| Figure::new(contender.label(), "ms"));
    let lines = Contender::ALL.map(|contender| format!("ssh {} true", contender.host(1)));
    let times = rounds * RUNS;
    let words = ["race".to_owned(), times.to_string()];
    for numbers in scene.inside(words.iter().chain(&lines)) {
        figures[numbers[0] as usize].push(numbers[1]);
    }
    let [jump, shared, ours, passing] = &figures;
    let goals = [("nix-offload-proxy", ours), ("--fdpass", passing)]
        .map(|(name, own)| (name, shared.times_less_than(own).0, own.times_less_than(jump).0));
    let title = format!("`ssh HOST true` through a bastion, live masters, {times} runs");
    goals.into_iter().fold(Section::new(title, figures.into()), |section, (name, of_shared, faster)| {
        section
            .goal(
                &format!("jump, {name}: times the time of ssh -W over a master"),
                of_shared,
                Bound::AtMost(1.0),
            )
            .goal(&format!("jump, {name}: times faster than ProxyJump"), faster, Bound::AtLeast(JUMP_GOAL))
    })
}
