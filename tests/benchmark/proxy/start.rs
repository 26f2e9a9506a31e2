//! What it costs the client's processors to be a ProxyCommand.

use super::{
    scene::{Contender, PROXY, Scene},
    server,
};
use crate::report::{Bound, Figure, Section};

const GOAL_MS: f64 = 3.0;

/// One run each time, to a port where somebody says a line and closes the connection.
pub(crate) fn start(scene: &Scene, times: u32) -> Section {
    let port = server::greeter().to_string();
    let line = |contender: Contender| contender.proxy_command("127.0.0.1", &port);
    let contenders = [
        ("ssh -W over a master", line(Contender::Shared)),
        ("--via", line(Contender::Ours)),
        ("--fdpass --via", line(Contender::Passing)),
        ("TCP", format!("{PROXY} 127.0.0.1 {port}")),
    ];
    let words = ["starts".to_owned(), times.to_string()];
    let lines = contenders.iter().map(|(_, line)| line);
    let mut figures: Vec<[Figure; 2]> = contenders
        .iter()
        .map(|(name, _)| {
            [
                Figure::new(&format!("{name}: processor time"), "ms"),
                Figure::new(&format!("{name}: until the host speaks"), "ms"),
            ]
        })
        .collect();
    for numbers in scene.inside(words.iter().chain(lines)) {
        let [cpu, spoken] = &mut figures[numbers[0] as usize];
        cpu.push(numbers[1]);
        spoken.push(numbers[2]);
    }
    let ours = contenders.iter().zip(&figures).skip(1);
    let goals: Vec<(String, f64)> = ours
        .map(|((name, _), [cpu, _])| (format!("proxy-start, {name}: processor time, ms"), cpu.median()))
        .collect();
    let title = format!("One ProxyCommand at the client, live master, {times} runs: its own process");
    let section = Section::new(title, figures.into_iter().flatten().collect());
    goals
        .into_iter()
        .fold(section, |section, (text, median)| section.goal(&text, median, Bound::AtMost(GOAL_MS)))
}
