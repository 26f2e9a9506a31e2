//! A large output and a large input: how fast they come and go, and how much memory the hook needs.

use std::time::Duration;

use harness::{Machine, drv, wait_until};

use crate::{
    report::{Bound, Figure, Section},
    scene::{Contender, Scene},
};

const CONTENDERS: [Contender; 2] = [Contender::Stock, Contender::Ours];
const MEMORY_GOAL_MIB: f64 = 12.0;
const DELETE_LIMIT: Duration = Duration::from_secs(20);
const COPY_LIMIT: Duration = Duration::from_secs(120);

/// Fetches an output of this size that the builder already has.
pub(crate) fn output(scene: &Scene, mebibytes: u32, rounds: u32) -> Section {
    let name = scene.fresh("big-output");
    let expression = drv::script(&name, &format!("yes {name} | head -c {mebibytes}M > $out"));
    let path = scene.build(Contender::Ours, &expression).out_path();
    let measured = measure(mebibytes, rounds, |contender| {
        delete(&scene.client, &path);
        let (output, usages) = scene.build_measured(contender, &expression);
        (output.took(), usages.iter().map(|usage| usage.peak_mib).fold(0.0, f64::max))
    });
    delete(&scene.client, &path);
    delete(&scene.builder, &path);
    section(
        format!("Fetching an output of {mebibytes} MiB, {rounds} rounds: the whole nix-build"),
        "output",
        measured,
    )
}

/// Sends an input of this size for a trivial build.
pub(crate) fn input(scene: &Scene, mebibytes: u32, rounds: u32) -> Section {
    let input = add(scene, mebibytes);
    let measured = measure(mebibytes, rounds, |contender| {
        let user = user_of(scene, &input);
        let (output, usages) = scene.build_measured(contender, &user);
        delete(&scene.builder, &input);
        (output.took(), usages.iter().map(|usage| usage.peak_mib).fold(0.0, f64::max))
    });
    section(
        format!("Sending an input of {mebibytes} MiB, {rounds} rounds: the whole nix-build"),
        "input",
        measured,
    )
}

/// Adds a file of this size to the client's store.
pub(crate) fn add(scene: &Scene, mebibytes: u32) -> String {
    let name = scene.fresh("big-input");
    let file = format!("/tmp/{name}");
    let line = format!("yes {name} | head -c {mebibytes}M > {file}; nix-store --add {file}; rm {file}");
    let added = scene.client.command("bash").args(["-c", &line]).limit(COPY_LIMIT).run();
    added.assert_success().out_path()
}

/// A trivial build that has this path as its input.
pub(crate) fn user_of(scene: &Scene, input: &str) -> String {
    drv::expression(&format!(
        r#"d "{}" "head -c 20 ${{builtins.storePath {input}}} > $out" {{ }}"#,
        scene.fresh("user-of-big-input")
    ))
}

fn measure(mebibytes: u32, rounds: u32, run: impl Fn(Contender) -> (Duration, f64)) -> [[Figure; 3]; 2] {
    let mut figures = CONTENDERS.map(|contender| {
        let figure = |what, unit| Figure::new(&format!("{}: {what}", contender.label()), unit);
        [figure("time", "ms"), figure("throughput", "MiB/s"), figure("peak memory of the hook", "MiB")]
    });
    for _ in 0..rounds {
        for (contender, [time, throughput, memory]) in CONTENDERS.into_iter().zip(&mut figures) {
            let (took, peak) = run(contender);
            time.push(took.as_secs_f64() * 1000.0);
            throughput.push(f64::from(mebibytes) / took.as_secs_f64());
            memory.push(peak);
        }
    }
    figures
}

fn section(title: String, what: &str, [stock, ours]: [[Figure; 3]; 2]) -> Section {
    let (ratio, _) = ours[0].times_less_than(&stock[0]);
    let peak = ours[2].max();
    Section::new(title, stock.into_iter().chain(ours).collect())
        .note(format!("{ratio:.2} times the speed of stock"))
        .goal(&format!("large {what}: peak memory of the hook, MiB"), peak, Bound::Below(MEMORY_GOAL_MIB))
}

/// Deletes a path. What used it may take a moment to end.
pub(crate) fn delete(machine: &Machine, path: &str) {
    wait_until(&format!("{path} can be deleted"), DELETE_LIMIT, || {
        machine.command("nix-store").args(["--delete", path]).run().code() == 0
    });
}
