//! The command line: words to an action, and the action's result to text and an exit code.

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

use crate::{
    exit,
    log::{self, Fallback},
    master::{DirectoryError, Endpoint, MasterInfo, Pool, PoolError, StartError},
};

/// The level of the log, by name or number.
const LOG_VARIABLE: &str = "NIX_OFFLOAD_LOG";

const EXIT_CODES: &str = "\
Exit codes:
  0   done
  1   failed
  2   wrong usage
  69  the host cannot be reached
  75  another process is busy with the same master
  77  the host does not let us in
  78  something is set up wrongly here (host keys, identity file, ssh, runtime directory)

Environment:
  NIX_OFFLOAD_RUNTIME_DIR  where sockets and logs are, instead of /run/nix-offload (root)
                           or $XDG_RUNTIME_DIR/nix-offload
  NIX_OFFLOAD_LOG          level of the messages in the journal (journalctl -t nix-offload-proxy):
                           off, error, warn, info (default), debug, trace";

/// Shared OpenSSH masters: one connection to each host, used by many processes.
#[derive(Debug, Parser)]
#[command(name = "nix-offload-proxy", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show the masters of this user
    List {
        /// As a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Start the master to a host, unless it runs already
    Start(StartArgs),
    /// End the masters to a host at once, with everything that runs over them
    Stop(StopArgs),
}

#[derive(Debug, Args)]
struct StartArgs {
    /// The host, as given to ssh: [USER@]HOST
    destination: String,
    /// The port, instead of that of ssh_config
    #[arg(short, long)]
    port: Option<u16>,
    /// The private key file, instead of those of ssh_config
    #[arg(short, long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// An option for ssh (as in its -o); may be given several times
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE")]
    options: Vec<String>,
    /// How long it may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
    /// The first command to run there
    #[arg(long, value_name = "COMMAND", default_value = "true")]
    command: String,
    /// The result as a JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct StopArgs {
    /// The host, as it was given when the master was started
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    destination: Option<String>,
    /// All masters of this user
    #[arg(long)]
    all: bool,
    /// The result as a JSON array
    #[arg(long)]
    json: bool,
}

/// A failed command: the error for people and the code for scripts.
struct Failure {
    report: String,
    code: u8,
}

/// Runs a command line, with the program's name as its first word, and returns the exit code.
pub fn run(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout, errors to stderr; if nobody reads it there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { exit::USAGE } else { exit::OK });
        }
    };
    let level = std::env::var(LOG_VARIABLE).ok().and_then(|text| log::parse_level(&text));
    log::init(
        "nix-offload-proxy",
        level.unwrap_or(tracing::level_filters::LevelFilter::INFO),
        Fallback::Nothing,
    );
    let result = match cli.action {
        Action::List { json } => list(json),
        Action::Start(args) => start(args),
        Action::Stop(args) => stop(&args),
    };
    match result.and_then(|text| print(&text)) {
        Ok(()) => ExitCode::from(exit::OK),
        Err(Failure { report, code }) => {
            let _ = writeln!(io::stderr(), "{report}");
            ExitCode::from(code)
        }
    }
}

fn list(json: bool) -> Result<String, Failure> {
    let masters = Pool::from_env()?.list()?;
    if json {
        return Ok(Value::from_iter(masters.iter().map(describe)).to_string());
    }
    let line = |master: &MasterInfo| {
        let state = if master.alive { "alive" } else { "dead" };
        let age = SystemTime::now().duration_since(master.started_at).unwrap_or_default().as_secs();
        format!(
            "{}\t{state}\tpid {}\t{age} s\t{}",
            master.destination,
            master.pid,
            master.control_path.display()
        )
    };
    Ok(masters.iter().map(line).collect::<Vec<_>>().join("\n"))
}

fn start(args: StartArgs) -> Result<String, Failure> {
    let mut endpoint = Endpoint::new(args.destination).map_err(StartError::from)?;
    endpoint.port = args.port;
    endpoint.identity = args.identity;
    endpoint.ssh_options = args.options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect();
    let master =
        Pool::from_env()?.start(&endpoint, Duration::from_secs(args.timeout.into()), &args.command)?;
    if args.json {
        let result = json!({
            "destination": endpoint.destination,
            "control-path": master.control_path(),
            "log-path": master.log_path(),
            "first-output": master.first_output(),
        });
        return Ok(result.to_string());
    }
    Ok(master.control_path().display().to_string())
}

fn stop(args: &StopArgs) -> Result<String, Failure> {
    let pool = Pool::from_env()?;
    let mut masters = pool.list()?;
    if let Some(destination) = &args.destination {
        masters.retain(|master| master.destination == *destination);
        if masters.is_empty() {
            let report = format!(
                "error: there is no master to {destination}\nhint: `nix-offload-proxy list` shows those there are"
            );
            return Err(Failure { report, code: exit::FAILURE });
        }
    }
    // One that does not go must not save the others.
    let mut stopped = Vec::new();
    let mut failed = None;
    for master in &masters {
        match pool.stop(master) {
            Ok(()) => stopped.push(&*master.destination),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) => Err(error.into()),
        None if args.json => Ok(json!(stopped).to_string()),
        None => Ok(stopped.iter().map(|name| format!("stopped {name}")).collect::<Vec<_>>().join("\n")),
    }
}

fn describe(master: &MasterInfo) -> Value {
    json!({
        "destination": master.destination,
        "pid": master.pid,
        "control-path": master.control_path,
        "log-path": master.log_path,
        "started-at": master.started_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        "alive": master.alive,
    })
}

fn print(text: &str) -> Result<(), Failure> {
    if text.is_empty() {
        return Ok(());
    }
    match writeln!(io::stdout(), "{text}") {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure { report: exit::report(&error, None), code: exit::FAILURE })
        }
        _ => Ok(()),
    }
}

impl From<DirectoryError> for Failure {
    fn from(error: DirectoryError) -> Self {
        Failure { report: exit::report(&error, error.cure().as_deref()), code: exit::CONFIG }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        Failure { report: exit::report(&error, error.cure().as_deref()), code: error.exit_code() }
    }
}

impl From<PoolError> for Failure {
    fn from(error: PoolError) -> Self {
        let code = if matches!(error, PoolError::Busy { .. }) { exit::TEMPORARY } else { exit::FAILURE };
        Failure { report: exit::report(&error, None), code }
    }
}
