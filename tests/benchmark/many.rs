//! Many trivial builds: at once, one after the other, and what they cost the client's processors.

use std::time::Duration;

use harness::drv;

use crate::{
    ask,
    report::{Bound, Figure, Section},
    scene::{Contender, Scene},
};

/// How much faster than stock and than stock with a master, and how many times the time of local builds.
struct Goals {
    stock: f64,
    master: f64,
    local: f64,
}

const INDEPENDENT_GOALS: Goals = Goals { stock: 25.0, master: 6.0, local: 2.0 };
const CHAIN_GOALS: Goals = Goals { stock: 15.0, master: 4.0, local: 1.5 };
/// For builds that sleep a second, with a slot for each.
const WIDE_GOAL_MS: f64 = 1500.0;
/// Hook and master together, for one trivial build.
const CPU_GOAL_MS: f64 = 8.0;
/// A hook until its first request.
const START_GOAL_MS: f64 = 2.0;
/// A hook for a trivial build.
const MEMORY_GOAL_MIB: f64 = 12.0;

/// `count` derivations that have nothing to do with each other.
pub(crate) fn independent(scene: &Scene, count: u32, rounds: u32) -> Section {
    let expression = |name: &str| {
        drv::expression(&format!(
            r#"builtins.genList (i: d "{name}-${{toString i}}" "echo ${{toString i}} > $out" {{ }}) {count}"#
        ))
    };
    let title =
        format!("{count} independent trivial builds, 8 at once, {rounds} rounds: the whole nix-build");
    race(scene, title, "independent", &expression, count, rounds, &INDEPENDENT_GOALS)
}

/// `count` derivations, each of which reads the output of the one before.
pub(crate) fn chain(scene: &Scene, count: u32, rounds: u32) -> Section {
    let title = format!("A chain of {count} trivial builds, {rounds} rounds: the whole nix-build");
    race(scene, title, "chain", &|name| chain_expression(name, count), count, rounds, &CHAIN_GOALS)
}

/// The last of `count` derivations, each of which reads the output of the one before.
pub(crate) fn chain_expression(name: &str, count: u32) -> String {
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
    goals: &Goals,
) -> Section {
    let mut figures = Contender::ALL.map(|contender| Figure::new(contender.label(), "ms"));
    for _ in 0..rounds {
        for (contender, figure) in Contender::ALL.into_iter().zip(&mut figures) {
            let output = scene.build(contender, &expression(&scene.fresh(name)));
            figure.push(milliseconds(output.took()));
        }
    }
    let [stock, master, ours, local] = &figures;
    let (ratio, spread) = ours.times_less_than(stock);
    let (than_master, spread_of_master) = ours.times_less_than(master);
    let times_local = local.times_less_than(ours).0;
    let each: Vec<String> = [stock, master, ours, local]
        .iter()
        .map(|f| format!("{:.1}", f.median() / f64::from(count)))
        .collect();
    let notes = [
        format!("each build: {} ms", each.join(", ")),
        format!("against stock {spread}; against stock with a master {spread_of_master}"),
    ];
    let section = notes.into_iter().fold(Section::new(title, figures.into()), Section::note);
    section
        .goal(&format!("{name}: times faster than stock"), ratio, Bound::AtLeast(goals.stock))
        .goal(
            &format!("{name}: times faster than stock with a master"),
            than_master,
            Bound::AtLeast(goals.master),
        )
        .goal(&format!("{name}: times the time of local builds"), times_local, Bound::AtMost(goals.local))
}

/// `count` builds that sleep a second, on a machine with a slot for each.
pub(crate) fn wide(scene: &Scene, count: u32, rounds: u32) -> Section {
    const CONTENDERS: [Contender; 3] = [Contender::Stock, Contender::Ours, Contender::Local];
    let mut figures = CONTENDERS.map(|contender| Figure::new(contender.label(), "ms"));
    let mut start = Figure::new("nix-build alone, nothing left to build", "ms");
    for _ in 0..rounds {
        for (contender, figure) in CONTENDERS.into_iter().zip(&mut figures) {
            let name = scene.fresh("wide");
            let expression = drv::expression(&format!(
                r#"builtins.genList (i: d "{name}-${{toString i}}" "sleep 1; echo ${{toString i}} > $out" {{ }}) {count}"#
            ));
            figure.push(milliseconds(scene.build(contender, &expression).took()));
            if contender == Contender::Ours {
                start.push(milliseconds(scene.build(contender, &expression).took()));
            }
        }
    }
    let whole = figures[1].median();
    let title =
        format!("{count} builds that sleep a second, {count} slots, {rounds} rounds: the whole nix-build");
    Section::new(title, figures.into_iter().chain([start]).collect()).goal(
        "wide: the whole nix-build, ms",
        whole,
        Bound::AtMost(WIDE_GOAL_MS),
    )
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Processor time of one trivial build at the client, without Nix itself: hook and master; and what a hook needs
/// to start and in memory.
pub(crate) fn cpu(scene: &Scene, count: u32, rounds: u32, starts: u32) -> Section {
    let mut figures = Vec::new();
    for contender in Contender::REMOTE {
        let figure = |what, unit| Figure::new(&format!("{}: {what}", contender.label()), unit);
        figures.push([
            figure("hook process", "ms"),
            figure("master's share", "ms"),
            figure("hook with settings and no request", "ms"),
            figure("peak memory of the hook", "MiB"),
        ]);
    }
    for _ in 0..rounds {
        for (contender, [hook, master, start, memory]) in Contender::REMOTE.into_iter().zip(&mut figures) {
            let before = scene.masters_cpu_ms();
            let expression = chain_expression(&scene.fresh("cpu"), count);
            let (_, usages) = scene.build_measured(contender, &expression);
            master.push((scene.masters_cpu_ms() - before) / f64::from(count));
            for usage in &usages {
                hook.push(usage.cpu_ms);
                memory.push(usage.peak_mib);
            }
            for cpu_ms in ask::starts(scene, contender, starts) {
                start.push(cpu_ms);
            }
        }
    }
    let title = format!("Processor time of one trivial build at the client, from {rounds} chains of {count}");
    let [hook, master, start, memory] = &figures[2];
    let (both, start, memory) = (hook.median() + master.median(), start.median(), memory.max());
    Section::new(title, figures.into_iter().flatten().collect())
        .note("user and system time; the hook with the children it waited for, without Nix itself".into())
        .goal("cpu: hook and master for a trivial build, ms", both, Bound::Below(CPU_GOAL_MS))
        .goal("cpu: hook until its first request, ms", start, Bound::Below(START_GOAL_MS))
        .goal("cpu: peak memory of the hook, trivial builds, MiB", memory, Bound::Below(MEMORY_GOAL_MIB))
}
