//! From Nix's question to the hook's answer: all other builds of that Nix wait for it.

use std::time::Duration;

use harness::drv;

use crate::{
    BENCH,
    report::{Figure, Section},
    scene::{Contender, Scene},
};

const SETTINGS: &str = "/tmp/settings";
const LIMIT: Duration = Duration::from_secs(300);
/// Stock connects before it answers; so many answers of it are enough.
const STOCK_SHARE: u32 = 10;

/// Asks each hook for one derivation, in a new process each time.
pub(crate) fn reply(scene: &Scene, times: u32) -> Section {
    let expression = drv::trivial(&scene.fresh("asked-for"));
    let instantiated = scene.client.nix("nix-instantiate").args(["-E", &expression]).run();
    let drv = instantiated.assert_success().out_path();
    let mut figures = Vec::new();
    for contender in Contender::REMOTE {
        let times = if contender == Contender::Ours { times } else { times.div_ceil(STOCK_SHARE) };
        // The words `nix` sends are those it shows.
        let shown = scene.client.run("nix --extra-experimental-features nix-command show-config 2>/dev/null");
        let others =
            shown.lines().filter(|line| !line.starts_with("builders =")).collect::<Vec<_>>().join("\n");
        scene.client.write(SETTINGS, &format!("{others}\nbuilders = {}\n", Scene::builders(contender)));
        let (_, hook) = scene.hook_words(contender);
        let output = scene
            .client
            .command(BENCH)
            .args(["ask", SETTINGS, &drv, &times.to_string()])
            .args(hook)
            .limit(LIMIT)
            .run();
        output.assert_success();
        let figure = |what| Figure::new(&format!("{}: {what}", contender.label()), "ms");
        let mut warm = figure("from `try`");
        let mut cold = figure("from the start of the process");
        for line in output.stdout().lines() {
            let (kind, milliseconds) = line.split_once(' ').expect("two words");
            let sample = milliseconds.parse().expect("a number");
            if kind == "warm" { warm.push(sample) } else { cold.push(sample) }
        }
        figures.extend([warm, cold]);
    }
    let title = format!("Nix's question to the hook's reply, live master, {times} questions (stock: fewer)");
    Section::new(title, figures)
}
