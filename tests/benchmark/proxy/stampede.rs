//! Very many at once, before there is a master.

use std::{cmp::Reverse, collections::BTreeMap};

use super::scene::{Contender, PROXY, Scene};
use crate::report::{Bound, Figure, Section};

/// How many different lines of those that failed are shown.
const COMPLAINTS: usize = 4;

/// One kind of stampede, and what became of it.
struct Herd {
    name: &'static str,
    lines: Vec<String>,
    is_ours: bool,
    time: Figure,
    logins: Figure,
    failed: Figure,
    /// What those that failed said.
    said: Vec<String>,
}

impl Herd {
    fn new(name: &'static str, lines: Vec<String>, is_ours: bool) -> Self {
        let figure = |what: &str, unit| Figure::new(&format!("{name}: {what}"), unit);
        let (time, logins, failed) =
            (figure("until all are done", "ms"), figure("logins at the bastion", ""), figure("failed", ""));
        Self { name, lines, is_ours, time, logins, failed, said: Vec::new() }
    }

    /// The lines that most of those that failed said, in any round.
    fn complaints(&self) -> Vec<String> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        self.said.iter().for_each(|line| *counts.entry(line.trim_end()).or_default() += 1);
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by_key(|(_, count)| Reverse(*count));
        let line = |(line, count): &(&str, usize)| format!("{}: {count} said: {line}", self.name);
        counts.iter().take(COMPLAINTS).map(line).collect()
    }

    fn ssh(name: &'static str, contender: Contender) -> Self {
        let lines = Scene::hosts(contender).iter().map(|host| format!("ssh {host} true")).collect();
        Self::new(name, lines, contender != Contender::Jump)
    }
}

/// `count` processes at once, in turns: the start of a master, and logins at three hosts.
pub(crate) fn stampede(scene: &Scene, count: u32, rounds: u32) -> Section {
    let mut herds = [
        Herd::new("nix-offload-proxy start", vec![format!("{PROXY} start bastion")], true),
        Herd::ssh("ssh, nix-offload-proxy", Contender::Ours),
        Herd::ssh("ssh, --fdpass", Contender::Passing),
        Herd::ssh("ssh, ProxyJump", Contender::Jump),
    ];
    for _ in 0..rounds {
        for herd in &mut herds {
            scene.forget();
            let before = scene.bastion.logins();
            let words = ["stampede".to_owned(), count.to_string()];
            let (numbers, said) = scene.inside_with_stderr(words.iter().chain(&herd.lines));
            herd.said.extend(said.lines().map(str::to_owned));
            herd.time.push(numbers[0][0]);
            herd.failed.push(numbers[0][1]);
            herd.logins.push((scene.bastion.logins() - before) as f64);
        }
    }
    let title = format!("{count} processes at once, no master yet, {rounds} rounds");
    let goals: Vec<_> = herds
        .iter()
        .filter(|herd| herd.is_ours)
        .map(|herd| (herd.name, herd.logins.furthest_from(1.0), herd.failed.max()))
        .collect();
    let complaints: Vec<_> = herds.iter().flat_map(Herd::complaints).collect();
    let figures = herds.into_iter().flat_map(|herd| [herd.time, herd.logins, herd.failed]).collect();
    let section = Section::new(title, figures).note(
        "the bastion's sshd has its default MaxStartups, 10:30:100; that of the hosts bears them all".into(),
    );
    let section = complaints.into_iter().fold(section, Section::note);
    goals.into_iter().fold(section, |section, (name, logins, failed)| {
        section.goal(&format!("stampede, {name}: logins at the bastion"), logins, Bound::Exactly(1.0)).goal(
            &format!("stampede, {name}: failed"),
            failed,
            Bound::Exactly(0.0),
        )
    })
}
