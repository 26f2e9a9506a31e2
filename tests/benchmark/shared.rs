//! Several builds at once that need the same large input.

use harness::drv;

use crate::{
    big,
    report::{Bound, Figure, Section},
    scene::{Contender, Scene},
};

const CONTENDERS: [Contender; 3] = Contender::REMOTE;
/// Compared with stock, which sends it once too, one hook after the other.
const GOAL: f64 = 1.0;

/// `count` trivial builds with one input of this size.
pub(crate) fn input(scene: &Scene, count: u32, mebibytes: u32, rounds: u32) -> Section {
    let input = big::add(scene, mebibytes);
    let mut figures = CONTENDERS.map(|contender| Figure::new(contender.label(), "ms"));
    for _ in 0..rounds {
        for (contender, figure) in CONTENDERS.into_iter().zip(&mut figures) {
            let name = scene.fresh("user-of-shared-input");
            let users = drv::expression(&format!(
                r#"builtins.genList
                     (i: d "{name}-${{toString i}}" "head -c 20 ${{builtins.storePath {input}}} > $out" {{ }}) {count}"#
            ));
            figure.push(scene.build(contender, &users).took().as_secs_f64() * 1000.0);
            big::delete(&scene.builder, &input);
        }
    }
    let [stock, master, ours] = &figures;
    let (ratio, spread) = ours.times_less_than(stock);
    let (_, than_master) = ours.times_less_than(master);
    let title = format!(
        "{count} builds at once that share an input of {mebibytes} MiB, {rounds} rounds: the whole nix-build"
    );
    Section::new(title, figures.into())
        .note(format!("against stock {spread}; against stock with a master {than_master}"))
        .goal("shared input: times faster than stock", ratio, Bound::AtLeast(GOAL))
}
