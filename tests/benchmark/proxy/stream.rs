//! How fast a large stream is on a way that exists.

use super::{
    inside::Direction,
    scene::{Contender, Scene},
    server,
};
use crate::report::{Bound, Figure, Section};

const OURS_GOAL: f64 = 0.95;
const PASSING_GOAL: f64 = 1.0;
const MIB: u64 = 1 << 20;

/// Bytes in clear, at the client's end of a ProxyCommand: no second ssh between it and the host.
pub(crate) fn stream(scene: &Scene, direction: Direction, mebibytes: u32, rounds: u32) -> Section {
    let bytes = u64::from(mebibytes) * MIB;
    let (word, name, port) = match direction {
        Direction::Down => ("down", "from the host", server::source(bytes)),
        Direction::Up => ("up", "to the host", server::sink(bytes)),
    };
    let mut figures = throughputs();
    for _ in 0..rounds {
        for (contender, figure) in Contender::WARM.into_iter().zip(&mut figures) {
            let line = contender.proxy_command("127.0.0.1", &port.to_string());
            let numbers = scene.inside(["transfer", word, &bytes.to_string(), &line]);
            figure.push(f64::from(mebibytes) / numbers[0][0]);
        }
    }
    let [shared, ours, passing] = &figures;
    let [ours, passing] = [ours, passing].map(|own| shared.times_less_than(own).0);
    let title = format!("{mebibytes} MiB {name} through a ProxyCommand, live masters, {rounds} rounds");
    let text = |who| format!("stream {name}, {who}: times the throughput of ssh -W over a master");
    Section::new(title, figures.into())
        .goal(&text("nix-offload-proxy"), ours, Bound::AtLeast(OURS_GOAL))
        .goal(&text("--fdpass"), passing, Bound::AtLeast(PASSING_GOAL))
}

/// A whole `ssh` with its login, which encrypts everything a second time. For information.
pub(crate) fn sessions(scene: &Scene, mebibytes: u32, rounds: u32) -> Section {
    let bytes = u64::from(mebibytes) * MIB;
    let mut figures = throughputs();
    let lines = Contender::WARM.map(|way| format!("ssh {} head -c {bytes} /dev/zero", way.host(1)));
    let words = ["race".to_owned(), rounds.to_string()];
    for numbers in scene.inside(words.iter().chain(&lines)) {
        figures[numbers[0] as usize].push(f64::from(mebibytes) / (numbers[1] / 1000.0));
    }
    let title = format!("`ssh HOST` that prints {mebibytes} MiB, live masters, {rounds} rounds");
    Section::new(title, figures.into())
}

fn throughputs() -> [Figure; 3] {
    Contender::WARM.map(|contender| Figure::new(contender.label(), "MiB/s"))
}
