//! The simulator of `plan::decide`: builds graphs on fleets that exist only in numbers, with the very function that the
//! hook asks, and with the rule of Nix's own hook.
//!
//! `tests/simulate` builds and starts it. Its tests, which assert the goals for small scenes, run with all others.
#![expect(clippy::expect_used, reason = "a broken world is a failed simulation")]
#![expect(clippy::print_stdout, reason = "its results are for people")]

mod bounds;
mod fleet;
mod graph;
mod plot;
mod random;
mod report;
mod scene;
mod sharing;
mod site;
mod speed;
mod stock;
#[cfg(test)]
mod tests;
mod world;

use clap::Parser;
use scene::Rounds;
use std::path::PathBuf;
use std::process::ExitCode;
use std::{fs, thread};
use world::Conditions;

#[derive(Parser)]
#[command(about = "Simulates which machine gets a build, with our rule and with that of Nix's own hook")]
struct Arguments {
    /// How often each scene is made anew
    #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// How often each of those is played, with other names, foreign load and outages every time; four or five times as often
    /// where graphs are small or luck decides most
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    plays: u64,
    /// Small graphs: a few seconds
    #[arg(long)]
    quick: bool,
    /// Only scenes with this in their names
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Nix asks for what was postponed also when one of its builds ends, which is kinder to stock than the real one
    #[arg(long)]
    kind: bool,
    /// Hooks of ours send a path though another one is sending it to the same machine
    #[arg(long)]
    twice: bool,
    /// Builds of ours wait in the order in which they come
    #[arg(long)]
    first_come: bool,
    /// Builds of ours stay where they began
    #[arg(long)]
    stay: bool,
    /// Also writes choosing.svg, and the table into choosing.md, in this directory
    #[arg(long, value_name = "DIRECTORY")]
    docs: Option<PathBuf>,
    /// Only the time that a decision and the reading of the list take
    #[arg(long)]
    speed: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let speed = speed::measure();
    if arguments.speed {
        print!("{speed}");
        return ExitCode::SUCCESS;
    }
    let scale = if arguments.quick { 0.1 } else { 1.0 };
    let scenes: Vec<scene::Scene> =
        scene::all().into_iter().filter(|scene| scene.name().contains(&arguments.only)).collect();
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let conditions = Conditions {
        is_kind: arguments.kind,
        sends_twice: arguments.twice,
        is_first_come: arguments.first_come,
        stays: arguments.stay,
    };
    let rounds = Rounds { seeds: arguments.seeds, plays: arguments.plays };
    let results = scene::run_all(&scenes, rounds, scale, conditions, workers);
    let figures = format!(
        "{}\n{}\n{}{speed}",
        report::table(&results),
        report::goals(&results),
        report::older(&results)
    );
    print!("{figures}");
    if let Some(directory) = &arguments.docs {
        let page = directory.join("choosing.md");
        let page_text = fs::read_to_string(&page).expect("docs/choosing.md");
        fs::write(&page, report::put_into(&page_text, &figures)).expect("docs/choosing.md to be written");
        fs::write(directory.join("choosing.svg"), plot::svg(&results)).expect("the plot to be written");
    }
    ExitCode::SUCCESS
}
