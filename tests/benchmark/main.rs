//! The benchmark: nix-offload, Nix's own hook and local builds in turns, in one world; nix-offload-proxy and what ssh
//! itself offers, in another.
//!
//! `tests/bench` builds and starts it. The same program is also started inside the client's machine, as a
//! wrapper around a hook, as a Nix that only asks, and as an ssh that only uses its ProxyCommand; see [`inside`] and
//! [`proxy::Inside`].
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a broken test world is a failed benchmark")]
#![expect(clippy::print_stdout, reason = "its results are for people")]

mod ask;
mod big;
mod cancel;
mod inside;
mod link;
mod many;
mod proxy;
mod report;
mod scene;
mod shared;
mod waiting;

use std::{fs, path::PathBuf, process::ExitCode, thread};

use clap::{Parser, Subcommand, ValueEnum};
use harness::{Machine, Release};

use report::Report;
use scene::Scene;

/// Where this program is in every machine.
const BENCH: &str = "/opt/nix-offload/bin/nix-offload-bench";

#[derive(Parser)]
#[command(
    about = "Measures nix-offload against Nix's own hook and local builds, and nix-offload-proxy against ssh itself, \
             in turns in one run"
)]
struct Arguments {
    /// How often each figure is taken
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Few rounds, few questions and small files: does it work?
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
    /// From Nix's question to the hook's answer, also with a thousand machines, and while a large input is sent
    Reply,
    /// A large output and a large input: time, and memory of the hook
    Big,
    /// 8 builds at once that share an input of 100 MiB
    SharedInput,
    /// Processor time of one trivial build at the client, and of starting a hook
    Cpu,
    /// A chain of builds over a link with a round trip of 50 ms
    Link,
    /// 20 builds that sleep a second, with a slot for each
    Wide,
    /// From a slot's release to the build that waited for it, while one waits and while 50 do
    Waiting,
    /// From the end of nix-build to the end of its build, by every way to a builder
    Cancel,
    /// `ssh HOST true` through a bastion
    Jump,
    /// Processor time of one ProxyCommand
    ProxyStart,
    /// A large stream through a bastion, both ways
    Stream,
    /// 200 processes at once when there is no connection to the bastion yet
    Stampede,
}

impl Part {
    const BUILDS: [Self; 6] =
        [Self::Independent, Self::Chain, Self::Reply, Self::Big, Self::SharedInput, Self::Cpu];
    const WARM_PROXY: [Self; 3] = [Self::Jump, Self::ProxyStart, Self::Stream];
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
    /// Asks one hook for all derivations that a file names and that it has to postpone.
    #[command(hide = true)]
    Postpone {
        settings: PathBuf,
        drvs: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        hook: Vec<String>,
    },
    /// Starts a hook again and again, with settings and no request; prints the processor times.
    #[command(hide = true)]
    Start {
        settings: PathBuf,
        times: u32,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        hook: Vec<String>,
    },
    /// Uses ProxyCommands as ssh does, and ssh as people do.
    #[command(hide = true)]
    Proxy {
        #[command(subcommand)]
        inside: proxy::Inside,
    },
}

impl Arguments {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    fn wants_any(&self, parts: &[Part]) -> bool {
        parts.iter().any(|part| self.wants(*part))
    }

    fn rounds(&self) -> u32 {
        if self.quick { 2 } else { self.rounds }
    }

    fn mebibytes(&self) -> u32 {
        if self.quick { 128 } else { 1024 }
    }
}

fn parse_release(name: &str) -> Result<Release, String> {
    let found = Release::ALL.into_iter().find(|release| release.name() == name);
    found.ok_or_else(|| "must be bookworm, trixie or sid".into())
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    match arguments.inside.take() {
        Some(Inside::Measure { file, hook }) => return inside::measure(&file, &hook),
        Some(Inside::Ask { settings, drv, times, hook }) => {
            inside::ask(&settings, &drv, times, &hook);
            return ExitCode::SUCCESS;
        }
        Some(Inside::Postpone { settings, drvs, hook }) => {
            inside::postpone(&settings, &drvs, &hook);
            return ExitCode::SUCCESS;
        }
        Some(Inside::Start { settings, times, hook }) => {
            inside::starts(&settings, times, &hook);
            return ExitCode::SUCCESS;
        }
        Some(Inside::Proxy { inside }) => {
            inside.run();
            return ExitCode::SUCCESS;
        }
        None => {}
    }
    let mut report = Report::default();
    if arguments.wants_any(&Part::BUILDS) {
        builds(&arguments, &mut report);
    }
    if arguments.wants(Part::Wide) {
        let scene = Scene::wide(arguments.release);
        report.describe(|| describe(&scene.client));
        report.add(many::wide(&scene, 20, arguments.rounds()));
    }
    if arguments.wants(Part::Waiting) {
        let scene = Scene::wide(arguments.release);
        report.describe(|| describe(&scene.client));
        report.add(waiting::waiting(&scene, 20, 50));
    }
    if arguments.wants(Part::Link) {
        let scene = Scene::linked(arguments.release, link::ROUND_TRIP);
        report.describe(|| describe(&scene.client));
        let stock_count = if arguments.quick { 4 } else { 20 };
        report.add(link::link(&scene, 20, stock_count, arguments.rounds().min(3)));
    }
    if arguments.wants(Part::Cancel) {
        let times = if arguments.quick { 2 } else { 10 };
        let section = cancel::cancel(arguments.release, times, |client| report.describe(|| describe(client)));
        report.add(section);
    }
    if arguments.wants_any(&Part::WARM_PROXY) {
        warm_proxy(&arguments, &mut report);
    }
    if arguments.wants(Part::Stampede) {
        let scene = proxy::Scene::for_stampedes(arguments.release);
        report.describe(|| describe(&scene.client));
        report.add(proxy::stampede(&scene, 200, if arguments.quick { 1 } else { arguments.rounds.min(3) }));
    }
    println!("\n{}", report.summary());
    if let Some(file) = arguments.json {
        fs::write(&file, report.to_json()).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
    ExitCode::SUCCESS
}

fn builds(arguments: &Arguments, report: &mut Report) {
    let (quick, rounds) = (arguments.quick, arguments.rounds());
    let scene = Scene::new(arguments.release);
    report.describe(|| describe(&scene.client));
    if arguments.wants(Part::Independent) {
        report.add(many::independent(&scene, if quick { 20 } else { 100 }, rounds));
    }
    if arguments.wants(Part::Chain) {
        report.add(many::chain(&scene, 20, rounds));
    }
    if arguments.wants(Part::Reply) {
        let times = if quick { 20 } else { 200 };
        report.add(ask::reply(&scene, times));
        report.add(ask::reply_in_a_fleet(&scene, times, 1000));
        report.add(ask::reply_in_a_used_fleet(&scene, times, 1000, 10));
        report.add(ask::reply_with_postponed(&scene, times, if quick { 1000 } else { 10_000 }));
        report.add(ask::reply_while_sending(&scene, times, arguments.mebibytes()));
    }
    if arguments.wants(Part::Cpu) {
        report.add(many::cpu(&scene, 20, rounds, if quick { 5 } else { 40 }));
    }
    if arguments.wants(Part::SharedInput) {
        report.add(shared::input(&scene, 8, 100, rounds));
    }
    if arguments.wants(Part::Big) {
        // Two copies of it are in memory, and each transfer takes seconds.
        report.add(big::output(&scene, arguments.mebibytes(), rounds.min(3)));
        report.add(big::input(&scene, arguments.mebibytes(), rounds.min(3)));
    }
}

fn warm_proxy(arguments: &Arguments, report: &mut Report) {
    let (quick, rounds) = (arguments.quick, arguments.rounds());
    let scene = proxy::Scene::warm(arguments.release);
    report.describe(|| describe(&scene.client));
    if arguments.wants(Part::Jump) {
        report.add(proxy::jump(&scene, rounds));
    }
    if arguments.wants(Part::ProxyStart) {
        report.add(proxy::start(&scene, if quick { 30 } else { 100 }));
    }
    if arguments.wants(Part::Stream) {
        // One transfer that was disturbed must not count; small ones are disturbed more easily.
        let rounds = rounds.max(if quick { 9 } else { 3 });
        for direction in proxy::Direction::BOTH {
            report.add(proxy::stream(&scene, direction, arguments.mebibytes(), rounds));
        }
        report.add(proxy::sessions(&scene, arguments.mebibytes(), rounds.min(3)));
    }
}

/// Versions, processors and load.
fn describe(client: &Machine) -> String {
    let nix = client.run("nix --version");
    let ssh = client.run("ssh -V 2>&1");
    let cpus = thread::available_parallelism().unwrap();
    let load = fs::read_to_string("/proc/loadavg").unwrap();
    format!(
        "{}, {}, {cpus} processors, load before {}",
        nix.trim(),
        ssh.split(',').next().unwrap_or("").trim(),
        load.split(' ').next().unwrap_or("?")
    )
}
