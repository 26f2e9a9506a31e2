//! The benchmark: nix-offload, Nix's own hook and local builds in turns, in one world.
//!
//! `tests/bench` builds and starts it. The same program is also started inside the client's machine, as a
//! wrapper around a hook and as a Nix that only asks; see [`inside`].
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a broken test world is a failed benchmark")]
#![expect(clippy::print_stdout, reason = "its results are for people")]

mod ask;
mod big;
mod inside;
mod many;
mod report;
mod scene;

use std::{fs, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};
use harness::Release;

use report::Report;
use scene::Scene;

#[derive(Parser)]
#[command(
    about = "Measures nix-offload against Nix's own hook and against local builds, in turns in one run"
)]
struct Arguments {
    /// How often each figure is taken
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Two rounds, few questions and small files: does it work?
    #[arg(long)]
    quick: bool,
    /// Only this measurement; may be repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<Part>,
    /// Whose Nix and OpenSSH client and builder run: bookworm, trixie or sid
    #[arg(long, default_value = "bookworm", value_parser = parse_release)]
    release: Release,
    /// Also writes everything measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    inside: Option<Inside>,
}

/// What can be measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// 100 independent builds at once
    Independent,
    /// 20 builds, each with the one before as its input
    Chain,
    /// From Nix's question to the hook's answer
    Reply,
    /// A large output and a large input: time, and memory of the hook
    Big,
    /// Processor time of one trivial build at the client
    Cpu,
}

/// What this program does inside the client's machine.
#[derive(Subcommand)]
#[command(hide = true)]
enum Inside {
    /// Runs a hook and appends what it used to a file.
    #[command(hide = true)]
    Measure {
        file: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        hook: Vec<String>,
    },
    /// Asks a hook one question again and again, each time a new process; prints the times.
    #[command(hide = true)]
    Ask {
        settings: PathBuf,
        drv: String,
        times: u32,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        hook: Vec<String>,
    },
}

fn parse_release(name: &str) -> Result<Release, String> {
    let found = Release::ALL.into_iter().find(|release| release.name() == name);
    found.ok_or_else(|| "must be bookworm, trixie or sid".into())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.inside {
        Some(Inside::Measure { file, hook }) => return inside::measure(&file, &hook),
        Some(Inside::Ask { settings, drv, times, hook }) => {
            inside::ask(&settings, &drv, times, &hook);
            return ExitCode::SUCCESS;
        }
        None => {}
    }
    let wants = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let rounds = if arguments.quick { 2 } else { arguments.rounds };
    let scene = Scene::new(arguments.release);
    let mut report = Report::new(&scene.describe());
    if wants(Part::Independent) {
        report.add(many::independent(&scene, if arguments.quick { 20 } else { 100 }, rounds));
    }
    if wants(Part::Chain) {
        report.add(many::chain(&scene, 20, rounds));
    }
    if wants(Part::Reply) {
        report.add(ask::reply(&scene, if arguments.quick { 20 } else { 200 }));
    }
    if wants(Part::Cpu) {
        report.add(many::cpu(&scene, 20, rounds));
    }
    if wants(Part::Big) {
        let mebibytes = if arguments.quick { 128 } else { 1024 };
        // Two copies of it are in memory, and each transfer takes seconds.
        report.add(big::output(&scene, mebibytes, rounds.min(3)));
        report.add(big::input(&scene, mebibytes, rounds.min(3)));
    }
    println!("\n{}", report.summary());
    if let Some(file) = arguments.json {
        fs::write(&file, report.to_json()).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
    ExitCode::SUCCESS
}
