//! Many trivial builds: at once, one after the other, and what they cost the client's processors.

use harness::drv;

use crate::{
    report::{Bound, Figure, Section},
    scene::{Contender, Scene},
};

const INDEPENDENT_GOAL: f64 = 12.0;
const CHAIN_GOAL: f64 = 8.0;

/// `count` derivations that have nothing to do with each other.
pub(crate) fn independent(scene: &Scene, count: u32, rounds: u32) -> Section {
    let expression = |name: &str| {
        drv::expression(&format!(
            r#"builtins.genList (i: d "{name}-${{toString i}}" "echo ${{toString i}} > $out" {{ }}) {count}"#
        ))
    };
    let title =
        format!("{count} independent trivial builds, 8 at once, {rounds} rounds: the whole nix-build");
    race(scene, title, "independent", &expression, count, rounds, INDEPENDENT_GOAL)
}

/// `count` derivations, each of which reads the output of the one before.
pub(crate) fn chain(scene: &Scene, count: u32, rounds: u32) -> Section {
    let title = format!("A chain of {count} trivial builds, {rounds} rounds: the whole nix-build");
    race(scene, title, "chain", &|name| chain_expression(name, count), count, rounds, CHAIN_GOAL)
}

fn chain_expression(name: &str, count: u32) -> String {
    drv::expression(&format!(
        r#"builtins.foldl'
             (before: i: d "{name}-${{toString i}}" "{{ cat ${{before}}; echo ${{toString i}}; }} > $out" {{ }})
             (d "{name}-0" "echo 0 > $out" {{ }})
             (builtins.genList (i: i + 1) ({count} - 1))"#
    ))
}

fn race(
    scene: &Scene,
    title: String,
    name: &str,
    expression: &dyn Fn(&str) -> String,
    count: u32,
    rounds: u32,
    goal: f64,
) -> Section {
    let mut figures = Contender::ALL.map(|contender| Figure::new(contender.label(), "ms"));
    for _ in 0..rounds {
        for (contender, figure) in Contender::ALL.into_iter().zip(&mut figures) {
            let output = scene.build(contender, &expression(&scene.fresh(name)));
            figure.push(output.took().as_secs_f64() * 1000.0);
        }
    }
    let [stock, master, ours, local] = &figures;
    let (ratio, spread) = ours.times_less_than(stock);
    let each: Vec<String> = [stock, master, ours, local]
        .iter()
        .map(|f| format!("{:.1}", f.median() / f64::from(count)))
        .collect();
    let notes = [
        format!("each build: {} ms", each.join(", ")),
        format!("{spread}; {:.1} times faster than stock with a master", ours.times_less_than(master).0),
        format!("{:.1} times the time of local builds", local.times_less_than(ours).0),
    ];
    let section = notes.into_iter().fold(Section::new(title, figures.into()), Section::note);
    section.goal(&format!("{name}: times faster than stock"), ratio, Bound::AtLeast(goal))
}

/// Processor time of one trivial build at the client, without Nix itself: hook and master.
pub(crate) fn cpu(scene: &Scene, count: u32, rounds: u32) -> Section {
    let mut figures = Vec::new();
    for contender in Contender::REMOTE {
        figures.push(Figure::new(&format!("{}: hook process", contender.label()), "ms"));
        figures.push(Figure::new(&format!("{}: master's share", contender.label()), "ms"));
    }
    for _ in 0..rounds {
        for (number, contender) in Contender::REMOTE.into_iter().enumerate() {
            let before = scene.masters_cpu_ms();
            let expression = chain_expression(&scene.fresh("cpu"), count);
            let (_, usages) = scene.build_measured(contender, &expression);
            let masters = scene.masters_cpu_ms() - before;
            for usage in &usages {
                figures[2 * number].push(usage.cpu_ms);
            }
            figures[2 * number + 1].push(masters / f64::from(count));
        }
    }
    let title = format!("Processor time of one trivial build at the client, from {rounds} chains of {count}");
    Section::new(title, figures)
        .note("user and system time; the hook with the children it waited for, without Nix itself".into())
}
