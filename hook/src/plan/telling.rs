//! A decision as text for people: the short table of what is missing where, and the ranking with its arithmetic.
//!
//! Owns the wording and the columns. Must never decide.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::estimate::{Estimate, Figure};
use super::machine::Machine;
use super::verdict::{Because, Decision, Order, Verdict, bytes, span};
use std::fmt::Write as _;

/// The table shows so many machines; the others are counted.
const MOST_ROWS: usize = 20;

/// What keeps each machine from the build, one line for each; machines with the same reason share one.
pub fn table(decision: &Decision, machines: &[Machine]) -> String {
    let mut rows: Vec<(String, Vec<&str>)> = Vec::new();
    for (index, refusal) in decision.refusals() {
        let name = machines.get(index).map_or("?", |machine| machine.name.as_str());
        let why = refusal.describe(decision.at);
        match rows.iter_mut().find(|(known, _)| *known == why) {
            Some((_, names)) => names.push(name),
            None => rows.push((why, vec![name])),
        }
    }
    let shown: Vec<(String, &str)> =
        rows.iter().take(MOST_ROWS).map(|(why, names)| (short_list(names), why.as_str())).collect();
    let width = shown.iter().map(|(names, _)| names.chars().count()).max().unwrap_or_default();
    let mut text = String::new();
    for (names, why) in shown {
        let _ = writeln!(text, "  {names:width$}  {why}");
    }
    let left: usize = rows.iter().skip(MOST_ROWS).map(|(_, names)| names.len()).sum();
    if left > 0 {
        let _ = writeln!(text, "  and {left} more");
    }
    text
}

/// At most three names.
fn short_list(names: &[&str]) -> String {
    match names {
        [one] => (*one).to_owned(),
        [one, two] => format!("{one}, {two}"),
        [one, two, three] => format!("{one}, {two}, {three}"),
        [one, two, rest @ ..] => format!("{one}, {two} and {} more", rest.len()),
        [] => String::new(),
    }
}

/// The answer in one sentence.
pub fn answer(decision: &Decision, machines: &[Machine]) -> String {
    let name = |index: &usize| machines.get(*index).map_or("?", |machine| machine.name.as_str());
    let names = |indexes: &[usize]| short_list(&indexes.iter().map(name).collect::<Vec<_>>());
    let why = match decision.because {
        Because::Best => match decision.order {
            Order::Estimate => "it would be done soonest",
            Order::Stock => "nothing is measured, and it is the least loaded for its speed",
        },
        Because::HeldBack => "full, but still done sooner than any machine with a free slot",
        Because::Full => "all suitable machines are full or about to wake up",
        Because::Obstacles => "no suitable machine can take it at present",
        Because::ObstaclesTooLong => "no suitable machine could take it for too long",
        Because::Builtin => "it is done by Nix itself",
        Because::LocalFirst => "the policy is local-first",
        Because::LocalSooner => "it would be done sooner here",
        Because::LocalFree => "all suitable machines are full, and this one is free",
        Because::NothingFits => "no machine can take it",
    };
    match &decision.verdict {
        Verdict::Accept(index) if decision.slots > 1 => {
            format!("to be built on {} with {} slots: {why}", name(index), decision.slots)
        }
        Verdict::Accept(index) => format!("to be built on {}: {why}", name(index)),
        Verdict::Wait(indexes) => format!("to wait for a slot of {}: {why}", names(indexes)),
        Verdict::Postpone(indexes) => format!("to be asked again, for {}: {why}", names(indexes)),
        Verdict::Decline => format!("left to Nix: {why}"),
    }
}

/// The answer, the ranking with the arithmetic of each estimate, and what keeps the other machines from it.
///
/// What is assumed rather than measured stands in parentheses.
pub fn ranking(decision: &Decision, machines: &[Machine]) -> String {
    let mut text = answer(decision, machines);
    text.push('\n');
    let mut ranked: Vec<(usize, usize, &Estimate)> = decision
        .standings
        .iter()
        .enumerate()
        .filter_map(|(index, standing)| Some((standing.place?, index, standing.estimate.as_ref()?)))
        .collect();
    ranked.sort_unstable_by_key(|(place, ..)| *place);
    if decision.order == Order::Stock && !ranked.is_empty() {
        text.push_str("nothing is measured: places follow Nix's own rule, and the estimates are guesses\n");
    }
    for (place, index, estimate) in ranked {
        let name = machines.get(index).map_or("?", |machine| machine.name.as_str());
        let _ = writeln!(text, "{place:>3}. {name}  {}", span(estimate.total));
        arithmetic(&mut text, estimate);
        if let Some(refusal) = &decision.standings[index].refusal {
            let _ = writeln!(text, "     {}", refusal.describe(decision.at));
        }
    }
    if let Some(here) = &decision.here {
        let _ = writeln!(text, "     here  {}", span(here.total));
        arithmetic(&mut text, here);
    }
    for (index, standing) in decision.standings.iter().enumerate() {
        if let (None, Some(refusal)) = (standing.place, &standing.refusal) {
            let name = machines.get(index).map_or("?", |machine| machine.name.as_str());
            let _ = writeln!(text, "  -  {name}  {}", refusal.describe(decision.at));
        }
    }
    text
}

fn arithmetic(text: &mut String, estimate: &Estimate) {
    let terms = &estimate.terms;
    let show = |figure: Figure, shown: String| if figure.is_known { shown } else { format!("({shown})") };
    let seconds = |figure: Figure| show(figure, span(figure.value));
    let size = |figure: Figure| show(figure, bytes(figure.value));
    let count = |figure: Figure| show(figure, format!("{:.1}", figure.value));
    if estimate.wait > 0.0 {
        let _ = writeln!(text, "     wait for a slot {}", span(estimate.wait));
    }
    if estimate.transfer > 0.0 {
        let backlog = if terms.backlog.value > 0.0 {
            format!(" behind {}", size(terms.backlog))
        } else {
            String::new()
        };
        let rate = show(terms.bandwidth, format!("{}/s", bytes(terms.bandwidth.value)));
        let missing = size(terms.missing);
        let _ = writeln!(text, "     send inputs {}: {missing}{backlog} at {rate}", span(estimate.transfer));
    }
    let share = format!("{:.0} % of a core", terms.share * 100.0);
    let slots = if terms.own == 1 { "slot" } else { "slots" };
    let _ = writeln!(
        text,
        "     build {}: {} at speed {} x {share} ({} cores; {} other tasks, {} {slots} of ours, {} for this)",
        span(estimate.build),
        seconds(terms.duration),
        terms.speed,
        show(terms.cores, format!("{:.0}", terms.cores.value)),
        count(terms.foreign),
        terms.own,
        terms.weight,
    );
    if estimate.fetch > 0.0 {
        let rate = show(terms.bandwidth, format!("{}/s", bytes(terms.bandwidth.value)));
        let _ =
            writeln!(text, "     fetch outputs {}: {} at {rate}", span(estimate.fetch), size(terms.output));
    }
}
