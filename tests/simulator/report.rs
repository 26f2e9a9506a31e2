//! What came out, as a table and as sentences about the goals.

use crate::fleet::Fleet;
use crate::scene::{Gain, Result};
use std::fmt::Write as _;

/// How much slower than stock ours may be, anywhere.
pub(crate) const NEVER_WORSE: f64 = 0.02;
/// How much faster it is to be where speeds, load or links differ.
pub(crate) const BETTER: f64 = 0.20;
/// How near to the list schedule it is to be on equal machines.
pub(crate) const NEAR: f64 = 0.15;

const BEGIN: &str = "<!-- figures: begin -->\n";
const END: &str = "<!-- figures: end -->";

pub(crate) fn table(results: &[Result]) -> String {
    let mut text = String::from(
        "| Fleet | Graph | Stock | Ours | to stock (worst) | rule alone (worst) | with history (worst) | Bound | to list schedule (worst) |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for result in results {
        let list = match result.above_list() {
            Some((above, worst)) => format!("{} ({})", percent(above), percent(worst)),
            None => "-".into(),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} ({}) | {list} |",
            result.scene.fleet.label(),
            result.scene.shape.label(),
            seconds(result.median(|p| &p.stock)),
            seconds(result.median(|p| &p.ours)),
            both(result.gain_of_ours()),
            both(result.gain_of_rule()),
            both(result.gain_of_experience()),
            seconds(result.median(|p| &p.lower)),
            percent(-result.possible()),
        );
    }
    text
}

/// For each goal, where it is missed.
pub(crate) fn goals(results: &[Result]) -> String {
    let mut text = String::new();
    let all: Vec<&Result> = results.iter().collect();
    for (who, gain) in [
        ("nix-offload", Result::gain_of_ours as fn(&Result) -> Gain),
        ("nix-offload with a history of durations", Result::gain_of_experience),
        ("Its rule alone, against stock's rule in nix-offload", Result::gain_of_rule),
    ] {
        goals_of(&mut text, who, &all, gain, Result::possible);
    }
    let far = results.iter().filter_map(|result| Some((result, result.above_list()?.0)));
    let far = far.filter(|(_, above)| *above > NEAR);
    let far = far.map(|(result, above)| format!("{} ({})", result.scene.name(), percent(above)));
    goal(
        &mut text,
        "nix-offload",
        "within 15 % of the list schedule on equal machines (medians)",
        far.collect(),
    );
    text
}

/// The same against the hook of Nix up to 2.19, for fleets on which it chooses otherwise; nothing without such a fleet.
pub(crate) fn older(results: &[Result]) -> String {
    let results: Vec<&Result> = results.iter().filter(|result| result.scene.fleet.has_speeds()).collect();
    if results.is_empty() {
        return String::new();
    }
    let mut text = String::from(
        "| Fleet | Graph | Stock since 2.20 | Stock up to 2.19 | to stock since 2.20 (worst) | Ours | to stock up to 2.19 (worst) | with history (worst) | Bound |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for result in &results {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} ({}) |",
            result.scene.fleet.label(),
            result.scene.shape.label(),
            seconds(result.median(|p| &p.stock)),
            seconds(result.median(|p| &p.older)),
            both(result.gain(|p| &p.older, |p| &p.stock)),
            seconds(result.median(|p| &p.ours)),
            both(gain_over_older(result)),
            both(gain_of_experience_over_older(result)),
            seconds(result.median(|p| &p.lower)),
            percent(-possible_over_older(result)),
        );
    }
    text.push('\n');
    for (who, gain) in [
        ("Against stock up to 2.19, nix-offload", gain_over_older as fn(&Result) -> Gain),
        ("Against stock up to 2.19, nix-offload with a history of durations", gain_of_experience_over_older),
    ] {
        goals_of(&mut text, who, &results, gain, possible_over_older);
    }
    text.push('\n');
    text
}

fn gain_over_older(result: &Result) -> Gain {
    result.gain(|p| &p.ours, |p| &p.older)
}

fn gain_of_experience_over_older(result: &Result) -> Gain {
    result.gain(|p| &p.experienced, |p| &p.older)
}

fn possible_over_older(result: &Result) -> f64 {
    result.gain(|p| &p.lower, |p| &p.older).median
}

/// The goals of one contender, who may save so much at most.
fn goals_of(
    text: &mut String,
    who: &str,
    results: &[&Result],
    gain: fn(&Result) -> Gain,
    possible: fn(&Result) -> f64,
) {
    let worse = results.iter().filter(|result| gain(result).median < -NEVER_WORSE);
    let worse = worse.map(|result| format!("{} ({})", result.scene.name(), percent(-gain(result).median)));
    goal(text, who, "never more than 2 % slower (medians)", worse.collect());
    let worst = |result: &&Result| {
        let Gain { worst, error, .. } = gain(result);
        format!("{} ({}, standard error {:.1})", result.scene.name(), percent(-worst), 100.0 * error)
    };
    let worse = results.iter().filter(|result| gain(result).worst < -NEVER_WORSE);
    let worse: Vec<String> = worse.map(worst).collect();
    let all = results.iter().min_by(|a, b| gain(a).worst.total_cmp(&gain(b).worst));
    let title = match all.filter(|_| worse.is_empty()) {
        Some(all) => format!("the same with the worst seed, which is in {}", worst(all)),
        None => "the same with the worst seed".to_owned(),
    };
    goal(text, who, &title, worse);
    let little = results.iter().filter(|result| result.scene.fleet.differs() && gain(result).median < BETTER);
    let little = little.map(|result| {
        let (reached, possible) = (percent(-gain(result).median), percent(-possible(result)));
        format!("{} ({reached} of {possible} possible)", result.scene.name())
    });
    let title = "at least 20 % faster where speeds, load or links differ (medians)";
    goal(text, who, title, little.collect());
    let fleets = Fleet::ALL.into_iter().filter(|fleet| fleet.differs());
    let fleets: Vec<(Fleet, f64)> =
        fleets.filter_map(|fleet| Some((fleet, gain_of_fleet(results, fleet, gain)?))).collect();
    let each = fleets.iter().map(|(fleet, gain)| format!("{} {}", fleet.label(), percent(-gain)));
    let title = format!("the same over the graphs of each fleet ({})", each.collect::<Vec<_>>().join(", "));
    let little = fleets.iter().filter(|(_, gain)| *gain < BETTER);
    goal(text, who, &title, little.map(|(fleet, _)| fleet.label().to_owned()).collect());
}

/// How much less time a fleet takes, as the geometric mean over its graphs. None if there are none.
fn gain_of_fleet(results: &[&Result], fleet: Fleet, gain: fn(&Result) -> Gain) -> Option<f64> {
    let logs: Vec<f64> = results
        .iter()
        .filter(|result| result.scene.fleet == fleet)
        .map(|result| (1.0 - gain(result).median).ln())
        .collect();
    (!logs.is_empty()).then(|| 1.0 - (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

fn goal(text: &mut String, who: &str, title: &str, missed: Vec<String>) {
    let _ = match missed.as_slice() {
        [] => writeln!(text, "- {who}, {title}: met."),
        missed => writeln!(text, "- {who}, {title}: missed in {}.", missed.join("; ")),
    };
}

fn both(Gain { median, worst, .. }: Gain) -> String {
    format!("{} ({})", percent(-median), percent(-worst))
}

/// The page with these figures in the place of the old ones.
pub(crate) fn put_into(page: &str, figures: &str) -> String {
    let (before, rest) = page.split_once(BEGIN).expect("the line where the figures begin");
    let (_, after) = rest.split_once(END).expect("the line where the figures end");
    format!("{before}{BEGIN}\n{figures}\n{END}{after}")
}

fn seconds(seconds: f64) -> String {
    format!("{seconds:.0} s")
}

fn percent(part: f64) -> String {
    let part = part * 100.0;
    // No "-0 %".
    if part.abs() < 0.05 { "0 %".into() } else { format!("{part:+.1} %") }
}
