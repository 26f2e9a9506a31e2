//! From Nix's question to the hook's answer: all other builds of that Nix wait for it.

use std::{fs, time::Duration};

use harness::{Command, drv, wait_until};

use crate::{
    BENCH, big,
    report::{Bound, Figure, Section},
    scene::{Contender, Link, Scene},
    waiting,
};

const SETTINGS: &str = "/tmp/settings";
const POSTPONED: &str = "/tmp/postponed";
const LIMIT: Duration = Duration::from_secs(300);
/// How many times fewer answers of stock are enough, which connects before it answers.
const STOCK_SHARE: u32 = 10;
/// How many questions are asked while one input is sent; fewer where that takes less time.
const WHILE_SENDING: u32 = 25;
/// Inputs of the derivation that is asked for in a fleet that was used.
const INPUTS: usize = 40;
/// Paths in each of the two files in which it is remembered what a machine has: 100 KiB.
const REMEMBERED: usize = 2328;
const MEDIAN_GOAL_MS: f64 = 1.0;
const SLOWEST_GOAL_MS: f64 = 3.0;
/// The memories of the machines are 2 MiB, which are read before the lock is taken.
const USED_FLEET_GOAL_MS: f64 = 3.0;

/// Asks each hook for one derivation, in a new process each time.
pub(crate) fn reply(scene: &Scene, times: u32) -> Section {
    let drv = derivation(scene);
    let mut figures = Vec::new();
    for contender in Contender::REMOTE {
        let times = if contender == Contender::Ours { times } else { times.div_ceil(STOCK_SHARE) };
        let mut both = figures_of(contender.label());
        questions(scene, contender, &drv, times, &mut both);
        figures.push(both);
    }
    let title = format!("Nix's question to the hook's reply, live master, {times} questions (stock: fewer)");
    section(title, "reply", figures)
}

/// The same of our hook with that many machines in the list that would all do.
pub(crate) fn reply_in_a_fleet(scene: &Scene, times: u32, machines: usize) -> Section {
    let drv = derivation(scene);
    let mut both = figures_of(Contender::Ours.label());
    questions_among(scene, Contender::Ours, &others(machines), &drv, times, &mut both);
    section(format!("The same with {machines} suitable machines in the list"), "reply in a fleet", vec![both])
}

/// The same for a derivation with inputs, where `used` of the machines have had builds, and as many inputs as are
/// remembered of a machine.
pub(crate) fn reply_in_a_used_fleet(scene: &Scene, times: u32, machines: usize, used: usize) -> Section {
    let sources = format!(r#"builtins.genList (i: builtins.toFile "input-${{toString i}}" "") {INPUTS}"#);
    let with_inputs = format!(r#"d "{}" "echo > $out" {{ inputs = {sources}; }}"#, scene.fresh("asked-for"));
    let drv = instantiated(scene, &drv::expression(&with_inputs));
    for number in 1..=used {
        let name = format!("fleet-{number}");
        scene.client.write(&format!("/nix/var/nix/current-load/ssh-ng:__{name}-0"), "");
        let stamp = scene.client.run(&format!("printf 'ssh-ng://{name}\\0' | sha256sum | head -c 20"));
        let seen: String =
            (0..REMEMBERED).map(|path| format!("1700000000 {number:0>4}{path:0>28}\n")).collect();
        for file in ["seen", "seen-before"] {
            scene.client.write(&format!("/run/nix-offload/answered/{stamp}.{file}"), &seen);
        }
    }
    let mut both = figures_of(Contender::Ours.label());
    questions_among(scene, Contender::Ours, &others(machines), &drv, times, &mut both);
    let title = format!("The same, {used} of which have had builds, for a derivation with {INPUTS} inputs");
    let median = both[0].median();
    Section::new(title, both.into()).goal(
        "reply in a used fleet: median, ms",
        median,
        Bound::Below(USED_FLEET_GOAL_MS),
    )
}

/// Machines for a list of that many. The one that answers is the best by far, whatever load it has: this is about the choice, not
/// about failed connections.
fn others(machines: usize) -> String {
    (1..machines).map(|n| format!("; ssh-ng://fleet-{n} x86_64-linux - 8 0.01")).collect()
}

/// The same of our hook when `count` other derivations have been postponed, because all slots were taken when it was asked
/// for them.
pub(crate) fn reply_with_postponed(scene: &Scene, times: u32, count: u32) -> Section {
    let drv = derivation(scene);
    let all = format!(
        r#"builtins.genList (i: d "{}-${{toString i}}" "echo > $out" {{ }}) {count}"#,
        scene.fresh("postponed")
    );
    let instantiated =
        scene.client.nix("nix-instantiate").args(["-E", &drv::expression(&all)]).limit(LIMIT).run();
    scene.client.write(POSTPONED, instantiated.assert_success().stdout());
    let (_, hook) = scene.hook_words(Contender::Ours);
    let taken: Vec<_> = (0..scene.slots()).map(|number| waiting::take(scene, number)).collect();
    inside(scene, Contender::Ours, "", &["postpone", SETTINGS, POSTPONED]).args(hook).run().assert_success();
    drop(taken);
    let mut both = figures_of(Contender::Ours.label());
    questions(scene, Contender::Ours, &drv, times, &mut both);
    section(format!("The same after {count} derivations were postponed"), "reply after many", vec![both])
}

/// The same of our hook while another one sends a large input to the same builder.
pub(crate) fn reply_while_sending(scene: &Scene, times: u32, mebibytes: u32) -> Section {
    let drv = derivation(scene);
    let input = big::add(scene, mebibytes);
    let size = u64::from(mebibytes) << 20;
    let mut both = figures_of(Contender::Ours.label());
    let (mut sendings, mut each) = (0, WHILE_SENDING);
    while both[0].count() < times as usize {
        let arrived = || fs::metadata(scene.builder.path(&input)).map_or(0, |file| file.len());
        let sending = scene.spawn(Contender::Ours, &big::user_of(scene, &input));
        wait_until("the input is on its way", LIMIT, || arrived() > 0);
        let mut taken = figures_of(Contender::Ours.label());
        questions(scene, Contender::Ours, &drv, each, &mut taken);
        if arrived() < size {
            sendings += 1;
            both[0].append(&taken[0]);
            both[1].append(&taken[1]);
        } else {
            assert!(each > 1, "{mebibytes} MiB are sent before one question is answered");
            each = each.div_ceil(2);
        }
        sending.wait().assert_success();
        big::delete(&scene.builder, &input);
    }
    let title = format!(
        "The same while {mebibytes} MiB are sent to that builder by another hook, {} questions in {sendings} sendings",
        both[0].count()
    );
    section(title, "reply while sending", vec![both])
}

fn derivation(scene: &Scene) -> String {
    instantiated(scene, &drv::trivial(&scene.fresh("asked-for")))
}

fn instantiated(scene: &Scene, expression: &str) -> String {
    let instantiated = scene.client.nix("nix-instantiate").args(["-E", expression]).run();
    instantiated.assert_success().out_path()
}

fn figures_of(label: &str) -> [Figure; 2] {
    ["from `try`", "from the start of the process"].map(|what| Figure::new(&format!("{label}: {what}"), "ms"))
}

/// The last ones are ours.
fn section(title: String, name: &str, figures: Vec<[Figure; 2]>) -> Section {
    let (mut median, mut slowest) = (f64::NAN, f64::NAN);
    if let Some([warm, _]) = figures.last() {
        (median, slowest) = (warm.median(), warm.quantile(0.99));
    }
    Section::new(title, figures.into_iter().flatten().collect())
        .goal(&format!("{name}: median, ms"), median, Bound::Below(MEDIAN_GOAL_MS))
        .goal(&format!("{name}: 99 % are below, ms"), slowest, Bound::Below(SLOWEST_GOAL_MS))
}

fn questions(scene: &Scene, contender: Contender, drv: &str, times: u32, both: &mut [Figure; 2]) {
    questions_among(scene, contender, "", drv, times, both);
}

/// `others` are more machines, in the form of Nix's setting.
fn questions_among(
    scene: &Scene,
    contender: Contender,
    others: &str,
    drv: &str,
    times: u32,
    both: &mut [Figure; 2],
) {
    let (_, hook) = scene.hook_words(contender);
    let output =
        inside(scene, contender, others, &["ask", SETTINGS, drv, &times.to_string()]).args(hook).run();
    output.assert_success();
    for line in output.stdout().lines() {
        let (kind, milliseconds) = line.split_once(' ').expect("two words");
        both[usize::from(kind == "cold")].push(milliseconds.parse().expect("a number"));
    }
}

/// Processor time, in milliseconds, of each of `times` hooks that get their settings and are asked nothing.
pub(crate) fn starts(scene: &Scene, contender: Contender, times: u32) -> Vec<f64> {
    let (_, hook) = scene.hook_words(contender);
    let output = inside(scene, contender, "", &["start", SETTINGS, &times.to_string()]).args(hook).run();
    output.assert_success();
    output.stdout().lines().map(|line| line.parse().expect("a number")).collect()
}

/// This program inside the client, which finds there what `nix` would send to the hook.
fn inside(scene: &Scene, contender: Contender, more: &str, words: &[&str]) -> Command {
    // The words `nix` sends are those it shows.
    let shown = scene.client.run("nix --extra-experimental-features nix-command show-config 2>/dev/null");
    let others = shown.lines().filter(|line| !line.starts_with("builders =")).collect::<Vec<_>>().join("\n");
    let builders = scene.builders(contender, Link::Direct);
    scene.client.write(SETTINGS, &format!("{others}\nbuilders = {builders}{more}\n"));
    scene.client.command(BENCH).args(words).limit(LIMIT)
}
