//! A decision as text for people: the short table of what is missing where, and the ranking with its arithmetic.
//!
//! Owns the wording and the columns. Must never decide.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::estimate::{Estimate, Figure};
use super::machine::Machine;
use super::verdict::{Because, Decision, Order, Refusal, Verdict, bytes, span};
use super::{Local, Request};
use std::fmt::Write as _;
use std::time::SystemTime;

/// How many machines the table shows; the others are counted.
const MOST_ROWS: usize = 20;

/// What keeps each machine from the build, one line for each; machines with the same reason share one. The last line is
/// about the client's own machine, if there is something to say of it.
pub fn table(decision: &Decision, machines: &[Machine], here: Option<&str>) -> String {
    table_below(decision, machines, here, &|_, _| false)
}

/// The same below lines that have said in full how some machines failed (`is_said`, by index and how).
pub fn table_below(
    decision: &Decision,
    machines: &[Machine],
    here: Option<&str>,
    is_said: &dyn Fn(usize, &str) -> bool,
) -> String {
    rows(decision.refusals(), decision, machines, "  ", here, is_said)
}

/// The same for a line of a log, behind a semicolon: the first three reasons.
pub fn in_one_line(decision: &Decision, machines: &[Machine]) -> String {
    const MOST: usize = 3;
    let rows = grouped(decision.refusals(), decision, machines, &|_, _| false);
    let mut text = String::new();
    for row in rows.iter().take(MOST) {
        let why = row.why.lines().next().unwrap_or_default();
        let _ = write!(text, "; {}: {why}", short_list(&row.names));
    }
    let left: usize = rows.iter().skip(MOST).map(|row| row.names.len()).sum();
    if left > 0 {
        let _ = write!(text, "; and {left} more");
    }
    text
}

/// What was decided without the figures that change from one build to the next. Builds for which it is the same are kept
/// from the machines by the same things.
pub fn gist(decision: &Decision, request: &Request) -> String {
    let mut gist = format!("{} {:?} {:?}", request.system, request.required_features, decision.because);
    for (index, refusal) in decision.refusals() {
        let refusal = match refusal {
            Refusal::Recalled { what, .. } => what,
            other => other,
        };
        let _ = match refusal {
            Refusal::System => write!(gist, " {index}"),
            Refusal::MissingFeatures(features) => write!(gist, " {index} lacks {features:?}"),
            Refusal::MandatoryFeatures(features) => write!(gist, " {index} wants {features:?}"),
            Refusal::Unreachable(why) => write!(gist, " {index} cannot be used {why}"),
            Refusal::CutOff => write!(gist, " {index} cut off"),
            Refusal::Withheld(withheld) => write!(gist, " {index} {:?} {}", withheld.how, withheld.why),
            Refusal::Inhibited(why) => write!(gist, " {index} inhibited {why}"),
            Refusal::Short { of, .. } => write!(gist, " {index} {of}"),
            Refusal::Full { slots: 0, .. } => write!(gist, " {index} no slots"),
            // How it failed may be told in ever new words.
            Refusal::Failed(_) | Refusal::CoolDown { .. } | Refusal::Waking | Refusal::Unasked => {
                write!(gist, " {index} down")
            }
            Refusal::Full { .. }
            | Refusal::Outranked { .. }
            | Refusal::HeldBack
            | Refusal::Local
            | Refusal::Recalled { .. } => Ok(()),
        };
    }
    gist
}

/// Why the client's own machine does not build it; none if it could.
pub fn here(local: &Local, request: &Request) -> Option<String> {
    if local.could_build(request) {
        return None;
    }
    if local.max_jobs == 0 {
        return Some("builds nothing (max-jobs is 0)".into());
    }
    if !request.is_builtin() && !local.systems.contains(&request.system) {
        return Some(Refusal::System.describe(SystemTime::UNIX_EPOCH));
    }
    let missing = request.required_features.difference(&local.features).cloned().collect();
    Some(Refusal::MissingFeatures(missing).describe(SystemTime::UNIX_EPOCH))
}

/// What a build needs, in a few words: `x86_64-linux, features [kvm]`.
pub fn needs(request: &Request) -> String {
    let features: Vec<&str> = request.required_features.iter().map(String::as_str).collect();
    match features.as_slice() {
        [] => request.system.clone(),
        features => format!("{}, features [{}]", request.system, features.join(", ")),
    }
}

/// Machines that were refused for the same reason.
struct Row<'a> {
    names: Vec<&'a str>,
    why: String,
    cure: Option<&'a str>,
}

/// One row for each reason, in the order of the machines.
fn grouped<'a>(
    refusals: impl Iterator<Item = (usize, &'a Refusal)>,
    decision: &Decision,
    machines: &'a [Machine],
    is_said: &dyn Fn(usize, &str) -> bool,
) -> Vec<Row<'a>> {
    let mut rows: Vec<Row<'a>> = Vec::new();
    for (index, refusal) in refusals {
        let name = machines.get(index).map_or("?", |machine| machine.name.as_str());
        let (why, cure) = match refusal {
            Refusal::Failed(why) | Refusal::CoolDown { why, .. } if is_said(index, why) => {
                ("failed, see above".to_owned(), None)
            }
            _ => (refusal.describe(decision.at), refusal.cure()),
        };
        match rows.iter_mut().find(|row| row.why == why && row.cure == cure) {
            Some(row) => row.names.push(name),
            None => rows.push(Row { names: vec![name], why, cure }),
        }
    }
    rows
}

/// Refused machines with their reasons behind a mark, and what helps below.
fn rows<'a>(
    refusals: impl Iterator<Item = (usize, &'a Refusal)>,
    decision: &Decision,
    machines: &'a [Machine],
    mark: &str,
    here: Option<&str>,
    is_said: &dyn Fn(usize, &str) -> bool,
) -> String {
    const HERE: &str = "this machine";
    let rows = grouped(refusals, decision, machines, is_said);
    let shown: Vec<(String, &Row<'_>)> =
        rows.iter().take(MOST_ROWS).map(|row| (short_list(&row.names), row)).collect();
    let own = here.map(|_| HERE.len());
    let width = shown.iter().map(|(names, _)| names.chars().count()).chain(own).max().unwrap_or_default();
    let mut text = String::new();
    for (names, row) in shown {
        let _ = writeln!(text, "{mark}{names:width$}  {}", row.why);
        if let Some(cure) = row.cure {
            let _ = writeln!(text, "{:1$}  {cure}", "", mark.chars().count() + width);
        }
    }
    let left: usize = rows.iter().skip(MOST_ROWS).map(|row| row.names.len()).sum();
    if left > 0 {
        let _ = writeln!(text, "{mark}and {left} more");
    }
    if let Some(why) = here {
        let _ = writeln!(text, "{mark}{HERE:width$}  {why}");
    }
    text
}

/// Seconds as people read them.
pub fn seconds(seconds: f64) -> String {
    span(seconds)
}

/// Bytes as people read them.
pub fn size(number: u64) -> String {
    bytes(number as f64)
}

/// The names of machines by their indexes, at most three of them.
pub fn names(machines: &[Machine], indexes: &[usize]) -> String {
    let name = |index: &usize| machines.get(*index).map_or("?", |machine| machine.name.as_str());
    short_list(&indexes.iter().map(name).collect::<Vec<_>>())
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
    let names = |indexes: &[usize]| names(machines, indexes);
    let full = sooner_but_full(decision);
    let why = match decision.because {
        Because::Best => match (decision.order, full.as_slice()) {
            (Order::Estimate, []) => "it would be done soonest",
            (Order::Estimate, full) => {
                let are = if full.len() == 1 { "it is" } else { "they are" };
                &format!(
                    "it would be done soonest of those with a free slot; {} would be sooner, but {are} full",
                    names(full)
                )
            }
            (Order::Stock, []) => "nothing is measured, and it is the least loaded for its speed",
            (Order::Stock, _) => {
                "nothing is measured, and of those with a free slot it is the least loaded for its speed"
            }
        },
        Because::HeldBack => "full, but still done sooner than any machine with a free slot",
        Because::Full => "all suitable machines are full or about to wake up",
        Because::Silent => "no suitable machine is known to answer",
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
        Verdict::Postpone(indexes) => {
            format!("postponed until Nix asks again, for {}: {why}", names(indexes))
        }
        Verdict::Decline => format!("left to Nix: {why}"),
    }
}

/// Machines that have no free slot and would be better than the one that is chosen; without measurements, all that have none.
fn sooner_but_full(decision: &Decision) -> Vec<usize> {
    let Verdict::Accept(chosen) = decision.verdict else { return Vec::new() };
    let total =
        |index: usize| decision.standings.get(index)?.estimate.as_ref().map(|estimate| estimate.total);
    let is_better = |index: usize| decision.order == Order::Stock || total(index) < total(chosen);
    let is_full = |refusal: &Refusal| matches!(refusal, Refusal::Full { slots, .. } if *slots > 0);
    let full = decision.refusals().filter(|(index, refusal)| is_full(refusal) && is_better(*index));
    full.map(|(index, _)| index).collect()
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
        text.push_str(
            "the places follow the rule of Nix 2.20, since no machine is measured; the times are guesses\n",
        );
    }
    let mut has_assumed = false;
    for (place, index, estimate) in ranked.iter().take(MOST_ROWS) {
        let name = machines.get(*index).map_or("?", |machine| machine.name.as_str());
        let _ = write!(text, "{place:>3}. {name}  done in {}", span(estimate.total));
        let _ = match &decision.standings[*index].refusal {
            Some(Refusal::Outranked { later: Some(later), .. }) if *later >= 0.05 => {
                writeln!(text, ", {} later", span(*later))
            }
            None | Some(Refusal::Outranked { .. }) => writeln!(text),
            // How long that takes is not known.
            Some(refusal @ Refusal::Full { .. }) if estimate.wait == 0.0 => {
                writeln!(text, " once it has a slot; {}", refusal.describe(decision.at))
            }
            Some(refusal) => writeln!(text, "; {}", refusal.describe(decision.at)),
        };
        has_assumed |= arithmetic(&mut text, estimate);
    }
    if ranked.len() > MOST_ROWS {
        let _ = writeln!(text, "     and {} more", ranked.len() - MOST_ROWS);
    }
    if let Some(here) = &decision.here {
        let _ = writeln!(text, "     this machine  done in {}", span(here.total));
        has_assumed |= arithmetic(&mut text, here);
    }
    let unranked = decision.refusals().filter(|(index, _)| decision.standings[*index].place.is_none());
    text.push_str(&rows(unranked, decision, machines, "  -  ", None, &|_, _| false));
    if has_assumed {
        text.push_str("in parentheses: what is not known, and assumed\n");
    }
    text
}

/// The lines of an estimate. Tells whether any figure of it is assumed.
fn arithmetic(text: &mut String, estimate: &Estimate) -> bool {
    let terms = &estimate.terms;
    let mut has_assumed = false;
    let mut show = |figure: Figure, shown: String| {
        has_assumed |= !figure.is_known;
        if figure.is_known { shown } else { format!("({shown})") }
    };
    let size = |figure: Figure| bytes(figure.value);
    let mut line = |name: &str, seconds: f64, of: &str| {
        let _ = writeln!(text, "       {name:7} {:>7}  {of}", span(seconds));
    };
    if estimate.wait > 0.0 {
        line("wait", estimate.wait, "until a slot is free");
    }
    if estimate.transfer > 0.0 {
        let missing = show(terms.missing, size(terms.missing));
        let backlog = if terms.backlog.value > 0.0 {
            format!(", behind {} of other builds,", show(terms.backlog, size(terms.backlog)))
        } else {
            String::new()
        };
        let rate = show(terms.bandwidth, format!("{}/s", size(terms.bandwidth)));
        let trip = match terms.round_trip {
            Figure { value, is_known: true } if value >= 0.05 => {
                format!(", and {} there and back", span(value))
            }
            _ => String::new(),
        };
        line("inputs", estimate.transfer, &format!("{missing}{backlog} at {rate}{trip}"));
    }
    let duration = show(terms.duration, span(terms.duration.value));
    let share = format!("{:.0} % of a core", terms.share * 100.0);
    // It was written down with the precision of the list of machines.
    let speed = terms.speed as f32;
    line("build", estimate.build, &format!("{duration} / (speed {speed} x {share})"));
    let cores = show(terms.cores, format!("{:.0}", terms.cores.value));
    let foreign = show(terms.foreign, format!("{:.1}", terms.foreign.value));
    let _ = writeln!(
        text,
        "{:25}{cores} cores for {foreign} tasks of others, {} of our builds, {} for this one",
        "", terms.own, terms.weight
    );
    if estimate.fetch > 0.0 {
        let rate = show(terms.bandwidth, format!("{}/s", size(terms.bandwidth)));
        let output = show(terms.output, size(terms.output));
        let _ = writeln!(text, "       {:7} {:>7}  {output} at {rate}", "outputs", span(estimate.fetch));
    }
    has_assumed
}
