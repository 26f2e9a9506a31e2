//! The command line: words to an action, and the action's result to text and an exit code.

use std::{
    ffi::OsString,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use clap::{Args, Parser, Subcommand};
use serde_json::json;

use crate::{
    exit::{self, Failure},
    listing,
    log::{self, Fallback},
    master::{Endpoint, Pool, PoolError, SetupError, StartError},
    removal,
    tunnel::{self, Checked},
};

/// The level of the log, by name or number.
const LOG_VARIABLE: &str = "NIX_OFFLOAD_LOG";

const AFTER_HELP: &str = "\
In ~/.ssh/config, for hosts behind a bastion (which stands above it, with its own settings):

  Host bastion
    User me
  Host *.internal
    ProxyCommand nix-offload-proxy --via bastion %h %p

or, so that no process stays behind for each connection:

  Host *.internal
    ProxyCommand nix-offload-proxy --fdpass --via bastion %h %p
    ProxyUseFdpass yes

A host whose name is that of a command: nix-offload-proxy -- list 22

Exit codes:
  0   done
  1   failed
  2   wrong usage
  69  the host cannot be reached
  75  the host failed lately and is not tried again yet, or another process is busy with it
  77  the host does not let us in, or this is for root only
  78  something is set up wrongly here (host keys, identity file, ssh, runtime directory, offload.toml)

Environment:
  NIX_OFFLOAD_RUNTIME_DIR  where sockets and logs are, instead of /run/nix-offload (root)
                           or $XDG_RUNTIME_DIR/nix-offload
  NIX_OFFLOAD_CONFIG       another file than /etc/nix/offload.toml
  NIX_OFFLOAD_LOG          level of the messages in the journal (journalctl -t nix-offload-proxy):
                           off, error, warn, info (default), debug, trace";

const LIST_HELP: &str = "\
Columns:
  HOST      the destination, as it was given when the connection was started
  STATE     alive, or dead: it does not answer and is replaced when it is next needed
  PID       its process, an ssh
  AGE       how long ago it was started
  CHANNELS  what runs over it now: streams, sessions and forwards
  SENT      how much went to the host since it was started, as counted on the network
  RECEIVED  how much came from there
  LOG       the file with what its ssh had to say

A ? stands for what is not known. SENT and RECEIVED are known where ssh itself has the TCP connection to the
host, and not where it goes through a ProxyCommand's pipe or another shared connection.";

/// Connects ssh with a host, and shares SSH connections between many processes.
///
/// With HOST and PORT it is a ProxyCommand for ssh_config: what it reads goes to the host, what comes from there
/// it writes. With --via it goes through a jump host, to which one SSH connection is opened and kept for all.
/// Without --via it uses TCP or, where that fails, a shared connection to the host itself if there is one.
#[derive(Debug, Parser)]
#[command(
    name = "nix-offload-proxy",
    version,
    after_help = AFTER_HELP,
    arg_required_else_help = true,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Cli {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show the shared connections (masters) of this user: host, state, process, age, channels, traffic, log
    #[command(after_help = LIST_HELP)]
    List {
        /// As a JSON array: ages in seconds, traffic in bytes, null for what is not known; with the control sockets
        #[arg(long)]
        json: bool,
    },
    /// Start the master to a host, unless it runs already
    Start(StartArgs),
    /// End the masters to a host at once, with everything that runs over them
    Stop(StopArgs),
    /// Run `true` on a host over its shared connection, which is started if need be
    Check(CheckArgs),
}

#[derive(Debug, Args)]
struct ConnectArgs {
    /// The host (%h in ssh_config)
    #[arg(required = true)]
    host: Option<String>,
    /// Its port (%p in ssh_config)
    #[arg(required = true, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Go through this host, as given to ssh: [USER@]HOST
    #[arg(long, value_name = "JUMP")]
    via: Option<String>,
    /// Hand the connection over to ssh and end (with `ProxyUseFdpass yes` in ssh_config)
    #[arg(long)]
    fdpass: bool,
    /// Wait for a host that is down, that many seconds (300 if none are given)
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "300",
          value_parser = clap::value_parser!(u32).range(1..=86400))]
    wait: Option<u32>,
    #[command(flatten)]
    ssh: SshArgs,
}

/// How ssh makes a shared connection.
#[derive(Debug, Args)]
struct SshArgs {
    /// The port of the shared connection, instead of that of ssh_config
    #[arg(id = "ssh-port", short = 'p', long = "port", value_name = "PORT")]
    ssh_port: Option<u16>,
    /// The private key file, instead of those of ssh_config
    #[arg(short, long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// The configuration file for ssh (as its -F), instead of the usual ones
    #[arg(short = 'F', long, value_name = "FILE")]
    config: Option<String>,
    /// An option for ssh (as in its -o); may be given several times
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE")]
    options: Vec<String>,
    /// How long connecting may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
}

impl SshArgs {
    /// Anything but the time limit.
    fn is_given(&self) -> bool {
        self.ssh_port.is_some()
            || self.identity.is_some()
            || self.config.is_some()
            || !self.options.is_empty()
    }

    fn endpoint(self, destination: String) -> Result<(Endpoint, Duration), StartError> {
        let mut endpoint = Endpoint::new(destination)?;
        endpoint.port = self.ssh_port;
        endpoint.identity = self.identity.map(|file| from_here(&file));
        let config = self.config.map(|file| from_here(Path::new(&file)).to_string_lossy().into_owned());
        let config = config.into_iter().flat_map(|file| ["-F".to_owned(), file]);
        let options = self.options.into_iter().flat_map(|option| ["-o".to_owned(), option]);
        endpoint.ssh_options = config.chain(options).collect();
        Ok((endpoint, Duration::from_secs(self.timeout.into())))
    }
}

/// A file that is named from where we stand: masters start in another directory. Anything else is left to ssh, which
/// knows `none`, `~` and `%d`.
fn from_here(file: &Path) -> PathBuf {
    let absolute = std::path::absolute(file).ok().filter(|absolute| absolute.exists());
    absolute.unwrap_or_else(|| file.to_owned())
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// The host, as given to ssh: [USER@]HOST
    destination: String,
    #[command(flatten)]
    ssh: SshArgs,
    /// The result as a JSON object, also when it is a failure
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct StartArgs {
    /// The host, as given to ssh: [USER@]HOST
    destination: String,
    #[command(flatten)]
    ssh: SshArgs,
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
    #[arg(required_unless_present_any = ["all", "all_users"], conflicts_with_all = ["all", "all_users"])]
    destination: Option<String>,
    /// All masters of this user
    #[arg(long)]
    all: bool,
    /// All masters of all users; for root only
    #[arg(long, conflicts_with = "all")]
    all_users: bool,
    /// Become this user first; what --all-users starts for each user
    #[arg(long, hide = true, requires = "all", value_name = "UID")]
    r#become: Option<u32>,
    /// The result as a JSON array
    #[arg(long)]
    json: bool,
}

impl Failure {
    /// Both, one below the other.
    fn after(self, before: Option<Failure>) -> Failure {
        match before {
            Some(before) => {
                Failure { report: format!("{}\n{}", before.report, self.report), code: before.code }
            }
            None => self,
        }
    }
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
        None => connect(cli.connect).map(|()| String::new()),
        Some(Action::List { json }) => list(json),
        Some(Action::Start(args)) => start(args),
        Some(Action::Stop(args)) => stop(&args),
        Some(Action::Check(args)) => check(args),
    };
    match result.and_then(|text| print(&text)) {
        Ok(()) => ExitCode::from(exit::OK),
        Err(failure) => ExitCode::from(failure.tell()),
    }
}

fn connect(args: ConnectArgs) -> Result<(), Failure> {
    let (Some(host), Some(port)) = (args.host, args.port) else {
        return Err(Failure { report: "error: HOST and PORT are missing".into(), code: exit::USAGE });
    };
    let bound = Duration::from_secs(args.ssh.timeout.into());
    if args.via.is_none() && args.ssh.is_given() {
        let report = "error: --port, --identity, --config and --option say how to connect to the jump host, and there is none\n\
                      hint: name it with --via";
        return Err(Failure { report: report.into(), code: exit::USAGE });
    }
    let via = args.via.map(|via| args.ssh.endpoint(via)).transpose()?.map(|(endpoint, _)| endpoint);
    let pool = Pool::from_env()?;
    let wait = args.wait.map(|seconds| Duration::from_secs(seconds.into()));
    let cut = |time: Duration| pool.time_for_start().map_or(time, |most| time.min(most));
    let (bound, wait) = (cut(bound), wait.map(cut));
    let request = tunnel::Request { host, port, via, fdpass: args.fdpass, bound, wait };
    tunnel::run(&pool, &request).map_err(|error| {
        let reason = exit::reason(&error);
        tracing::warn!(
            event = "no connection",
            host = request.host,
            port = request.port,
            error = reason,
            "{reason}"
        );
        pool.tell_starter(&reason, error.cure().as_deref());
        error.into()
    })
}

fn check(args: CheckArgs) -> Result<String, Failure> {
    let pool = Pool::from_env()?;
    let began = Instant::now();
    let destination = args.destination.clone();
    let (endpoint, bound) = args.ssh.endpoint(args.destination)?;
    let answer = tunnel::check(&pool, &endpoint, bound);
    let milliseconds = began.elapsed().as_millis() as u64;
    match answer {
        Ok(state) if args.json => Ok(json!({
            "destination": destination,
            "answers": true,
            "master": if state == Checked::Found { "found" } else { "started" },
            "milliseconds": milliseconds,
        })
        .to_string()),
        Ok(state) => Ok(format!(
            "{destination} answers, {} ({milliseconds} ms)",
            if state == Checked::Found {
                "over a connection that was there"
            } else {
                "over a new connection"
            }
        )),
        Err(error) => {
            if args.json {
                print(
                    &json!({
                        "destination": destination,
                        "answers": false,
                        "error": exit::reason(&error),
                        "hint": error.cure(),
                        "milliseconds": milliseconds,
                    })
                    .to_string(),
                )?;
            }
            Err(error.into())
        }
    }
}

fn list(json: bool) -> Result<String, Failure> {
    let masters = Pool::from_env_unset()?.list()?;
    let now = SystemTime::now();
    if json {
        return Ok(listing::json(&masters, now));
    }
    if masters.is_empty() {
        // Said to people alone: a script sees no lines.
        let _ = writeln!(io::stderr(), "there are no shared connections (masters)");
    }
    Ok(listing::text(&masters, now))
}

fn start(args: StartArgs) -> Result<String, Failure> {
    let (endpoint, bound) = args.ssh.endpoint(args.destination)?;
    let master = Pool::from_env()?.start_waking(&endpoint, bound, &args.command)?;
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
    if args.all_users {
        return stop_all_users(args.json);
    }
    if let Some(uid) = args.r#become {
        removal::become_user(uid)?;
    }
    let pool = Pool::from_env_unset()?;
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
            Ok(()) => stopped.push(master.destination.clone()),
            Err(error) => failed = Some(Failure::from(error).after(failed)),
        }
    }
    let unlisted = if args.all { removal::stop_unlisted(pool.directory()) } else { Vec::new() };
    for (pid, gone) in unlisted {
        if gone {
            stopped.push(format!("process {pid}"));
        } else {
            let report = format!("error: the master with process {pid} does not end");
            failed = Some(Failure { report, code: exit::FAILURE }.after(failed));
        }
    }
    let report = if args.json {
        json!(stopped).to_string()
    } else {
        stopped.iter().map(|name| format!("stopped {name}")).collect::<Vec<_>>().join("\n")
    };
    match failed {
        Some(error) => print(&report).and(Err(error)),
        None => Ok(report),
    }
}

fn stop_all_users(json: bool) -> Result<String, Failure> {
    let outcomes = removal::stop_all()?;
    let name = |outcome: &removal::Outcome| outcome.user.clone().unwrap_or_else(|| outcome.uid.to_string());
    let report = if json {
        let describe = |outcome: &removal::Outcome| {
            json!({
                "user": outcome.user,
                "uid": outcome.uid,
                "directory": outcome.directory.to_string_lossy(),
                "stopped": outcome.stopped,
                "error": outcome.error,
            })
        };
        serde_json::Value::from_iter(outcomes.iter().map(describe)).to_string()
    } else {
        let lines = outcomes.iter().flat_map(|outcome| {
            outcome.stopped.iter().map(move |master| format!("stopped {master} of {}", name(outcome)))
        });
        lines.collect::<Vec<_>>().join("\n")
    };
    let failed = outcomes.iter().filter_map(|outcome| {
        let error = outcome.error.as_ref()?;
        Some(format!("error: {}, {:?}: {error}", name(outcome), outcome.directory))
    });
    let failed = failed.collect::<Vec<_>>().join("\n");
    if failed.is_empty() {
        return Ok(report);
    }
    print(&report).and(Err(Failure { report: failed, code: exit::FAILURE }))
}

fn print(text: &str) -> Result<(), Failure> {
    if text.is_empty() {
        return Ok(());
    }
    match writeln!(io::stdout(), "{text}") {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(&error, None, exit::FAILURE))
        }
        _ => Ok(()),
    }
}

impl From<SetupError> for Failure {
    fn from(error: SetupError) -> Self {
        Failure::new(&error, error.cure().as_deref(), exit::CONFIG)
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        Failure::new(&error, error.cure().as_deref(), error.exit_code())
    }
}

impl From<tunnel::TunnelError> for Failure {
    fn from(error: tunnel::TunnelError) -> Self {
        Failure::new(&error, error.cure().as_deref(), error.exit_code())
    }
}

impl From<removal::RemovalError> for Failure {
    fn from(error: removal::RemovalError) -> Self {
        let (cure, code) = match error {
            removal::RemovalError::NotRoot => {
                (Some("`stop --all` ends your own; for all others run it as root"), exit::NO_PERMISSION)
            }
            _ => (None, exit::FAILURE),
        };
        Failure::new(&error, cure, code)
    }
}

impl From<PoolError> for Failure {
    fn from(error: PoolError) -> Self {
        let code = if matches!(error, PoolError::Busy { .. }) { exit::TEMPORARY } else { exit::FAILURE };
        Failure::new(&error, None, code)
    }
}
