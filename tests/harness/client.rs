//! A client: a machine that asks Nix for builds.

use std::{fs, ops::Deref, sync::OnceLock, time::Duration};

use crate::{
    builder::{Builder, start_daemon, write_nix_conf},
    command::{Command, Output, Running},
    machine::Machine,
    paths::Release,
    wait::wait_until,
    world::World,
};

const JOURNAL_LIMIT: Duration = Duration::from_secs(10);
/// Where the program under test is in every machine.
pub const OURS: &str = "/opt/nix-offload/bin/nix-offload";

/// Which program Nix asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hook {
    /// The one under test.
    Ours,
    /// The one that comes with Nix.
    Stock,
    /// Another one: what would stand behind `build-hook =`.
    Path(String),
}

impl Hook {
    /// Both, for tests that compare them.
    pub const BOTH: [Self; 2] = [Self::Stock, Self::Ours];
}

/// Who does the building at the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// nix-build itself, run by root.
    SingleUser,
    /// A nix-daemon run by root; nix-build is run by the user without rights.
    Daemon,
    /// nix-build itself with a private store, run by root or by the user without rights.
    Private {
        /// What stands behind `--store`.
        store: String,
        /// Run by the user without rights.
        as_user: bool,
    },
}

/// What a client is to be like.
#[must_use]
pub struct ClientPlan {
    world: World,
    name: String,
    release: Release,
    mode: Mode,
    hook: Option<Hook>,
    hook_in_nix_conf: bool,
    journald: bool,
    own_network: bool,
    ssh_config: String,
    known_hosts: String,
    key: Option<String>,
    machines: String,
    nix_conf: Vec<String>,
    env: Vec<(String, String)>,
    daemon_env: Vec<(String, String)>,
}

impl ClientPlan {
    pub(crate) fn new(world: World) -> Self {
        Self {
            world,
            name: "client".into(),
            release: Release::Bookworm,
            mode: Mode::SingleUser,
            hook: None,
            hook_in_nix_conf: false,
            journald: false,
            own_network: false,
            ssh_config: String::new(),
            known_hosts: String::new(),
            key: None,
            machines: String::new(),
            nix_conf: Vec::new(),
            env: Vec::new(),
            daemon_env: Vec::new(),
        }
    }

    /// Another host name than `client`.
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// Runs the programs of this release; Bookworm otherwise.
    pub fn release(mut self, release: Release) -> Self {
        self.release = release;
        self
    }

    /// Who builds; [`Mode::SingleUser`] otherwise.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// Which hook; must be said.
    pub fn hook(mut self, hook: Hook) -> Self {
        self.hook = Some(hook);
        self
    }

    /// Names the hook in nix.conf only, also for Nix versions that ignore the setting there.
    /// Without this such versions get it through NIX_CONFIG.
    pub fn hook_only_in_nix_conf(mut self) -> Self {
        self.hook_in_nix_conf = true;
        self
    }

    /// A real journald.
    pub fn journald(mut self) -> Self {
        self.journald = true;
        self
    }

    /// With a network of its own, in which there is nothing but itself until an [`Uplink`](crate::Uplink) is plugged in.
    pub fn own_network(mut self) -> Self {
        self.own_network = true;
        self
    }

    /// Can log in to the builder: alias in ~/.ssh/config, host key in known_hosts.
    pub fn knows(self, builder: &Builder) -> Self {
        self.knows_with_host_key(builder, builder.host_public_key())
    }

    /// The same with this host key, which need not be the right one.
    pub fn knows_with_host_key(self, builder: &Builder, host_key: &str) -> Self {
        let line = format!("[127.0.0.1]:{} {host_key}\n", builder.port());
        let mut plan = self.knows_without_host_key(builder);
        plan.known_hosts.push_str(&line);
        plan
    }

    /// The same with an unknown host key.
    pub fn knows_without_host_key(mut self, builder: &Builder) -> Self {
        self.ssh_config.push_str(&format!(
            "Host {}\n  HostName 127.0.0.1\n  Port {}\n  User {}\n\n",
            builder.alias(),
            builder.port(),
            builder.login()
        ));
        self
    }

    /// Knows the builder and has it in the machines file: protocol `ssh` or `ssh-ng`, this many slots.
    pub fn uses(self, builder: &Builder, protocol: &str, slots: u32) -> Self {
        let line = format!("{protocol}://{} x86_64-linux - {slots} 1\n", builder.alias());
        self.knows(builder).machines(&line)
    }

    /// Adds text to /etc/nix/machines.
    pub fn machines(mut self, text: &str) -> Self {
        self.machines.push_str(text);
        self.machines.push('\n');
        self
    }

    /// Text for ~/.ssh/config, in front of the builders' entries.
    pub fn ssh_config(mut self, text: &str) -> Self {
        self.ssh_config = format!("{text}\n{}", self.ssh_config);
        self
    }

    /// Another private key than the one builders let in.
    pub fn key(mut self, private: &str) -> Self {
        self.key = Some(private.into());
        self
    }

    /// A line of nix.conf.
    pub fn nix_conf(mut self, line: &str) -> Self {
        self.nix_conf.push(line.into());
        self
    }

    /// A variable for nix-build and for the daemon.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// A variable for the daemon only.
    pub fn daemon_env(mut self, name: &str, value: &str) -> Self {
        self.daemon_env.push((name.into(), value.into()));
        self
    }

    /// Starts it.
    pub fn start(mut self) -> Client {
        let machine = Machine::start(&self.world, &self.name, self.release, true, self.own_network);
        match self.hook.take().expect("say which hook: .hook(Hook::Ours) or .hook(Hook::Stock)") {
            Hook::Ours => self.set_hook(OURS),
            Hook::Path(path) => self.set_hook(&path),
            Hook::Stock => {}
        }
        write_nix_conf(&machine, &self.nix_conf);
        machine.write("/etc/nix/machines", &self.machines);
        let key = self.key.take().unwrap_or_else(|| fs::read_to_string(self.world.client_key()).unwrap());
        for (home, user) in [("/root", false), ("/home/user", true)] {
            let files = [
                ("", None),
                ("/id_ed25519", Some((&key, 0o600))),
                ("/config", Some((&self.ssh_config, 0o644))),
                ("/known_hosts", Some((&self.known_hosts, 0o644))),
            ];
            for (file, content) in files {
                let path = format!("{home}/.ssh{file}");
                match content {
                    Some((text, mode)) => machine.write_mode(&path, text, mode),
                    None => fs::create_dir_all(machine.path(&path)).unwrap(),
                }
                if user {
                    machine.give_to_user(&path);
                }
            }
        }
        let journald = self.journald.then(|| start_journald(&machine));
        let daemon_env = [self.env.as_slice(), self.daemon_env.as_slice()].concat();
        let daemon = (self.mode == Mode::Daemon).then(|| start_daemon(&machine, &daemon_env));
        Client {
            mode: self.mode,
            env: self.env,
            daemon_env,
            daemon,
            has_database: OnceLock::new(),
            _journald: journald,
            machine,
        }
    }

    fn set_hook(&mut self, path: &str) {
        let line = format!("build-hook = {path}");
        if self.release == Release::Trixie && !self.hook_in_nix_conf {
            self.env.push(("NIX_CONFIG".into(), line));
        } else {
            self.nix_conf.push(line);
        }
    }
}

fn start_journald(machine: &Machine) -> Running {
    assert!(
        machine.release() == Release::Bookworm,
        "the small roots of {} have no journald",
        machine.release().name()
    );
    // Nothing is to be lost and nothing of the host's kernel to be read.
    machine.write(
        "/etc/systemd/journald.conf",
        "[Journal]\nStorage=volatile\nAudit=no\nReadKMsg=no\nForwardToWall=no\nRateLimitIntervalSec=0\nRateLimitBurst=0\n",
    );
    fs::create_dir_all(machine.path("/run/systemd/journal")).unwrap();
    let journald = machine.start_service("journald", machine.command("/lib/systemd/systemd-journald"));
    let socket = machine.path("/run/systemd/journal/socket");
    wait_until("journald listens", JOURNAL_LIMIT, || {
        std::os::unix::net::UnixDatagram::unbound().unwrap().connect(&socket).is_ok()
    });
    journald
}

/// A running client; everything a [`Machine`] can do, it can do.
pub struct Client {
    // First, so that it is dropped first: ending the machine ends its services.
    machine: Machine,
    mode: Mode,
    env: Vec<(String, String)>,
    daemon_env: Vec<(String, String)>,
    daemon: Option<Running>,
    /// Its store has a database.
    has_database: OnceLock<()>,
    _journald: Option<Running>,
}

impl Deref for Client {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Client {
    /// A program of Nix with what this client's mode asks for: user, NIX_REMOTE or `--store`, and the
    /// variables of the plan.
    pub fn nix(&self, program: &str) -> Command {
        let mut command = self.machine.command(program);
        for (name, value) in &self.env {
            command = command.env(name, value);
        }
        match &self.mode {
            Mode::SingleUser => command,
            Mode::Daemon => command.env("NIX_REMOTE", "daemon").as_user(),
            Mode::Private { store, as_user } => {
                let command = command.args(["--store", store]);
                if *as_user { command.as_user() } else { command }
            }
        }
    }

    /// The command that [`Client::nix_build`] runs, for changes to it.
    pub fn nix_build_command(&self, expression: &str, args: &[&str]) -> Command {
        self.nix("nix-build").args(["--no-out-link"]).args(args).args(["-E", expression])
    }

    /// Builds an expression to the end.
    pub fn nix_build(&self, expression: &str, args: &[&str]) -> Output {
        self.nix_build_command(expression, args).run()
    }

    /// Starts building an expression.
    pub fn spawn_nix_build(&self, expression: &str, args: &[&str]) -> Running {
        self.spawn_beside_others(self.nix_build_command(expression, args))
    }

    /// Starts a command of Nix that others may run beside. Two that are the first to use a store would hinder each other as
    /// they make its directories and its database ("File exists", "is busy", seen with Nix 2.8), so that is done before.
    pub fn spawn_beside_others(&self, command: Command) -> Running {
        if !matches!(self.mode, Mode::Daemon) {
            self.has_database.get_or_init(|| drop(self.nix("nix-store").args(["--init"]).run()));
        }
        command.spawn()
    }

    /// The program under test as a command for people, run by root with the variables of the plan.
    pub fn nix_offload(&self, args: &[&str]) -> Output {
        let mut command = self.machine.command(OURS).args(args);
        for (name, value) in &self.env {
            command = command.env(name, value);
        }
        command.run()
    }

    /// What `nix-store --read-log` has of a path.
    pub fn build_log(&self, path: &str) -> String {
        let output = self.nix("nix-store").args(["--read-log", path]).run();
        output.assert_success();
        output.stdout().into()
    }

    /// Whether the path is valid in this client's store.
    pub fn is_valid(&self, path: &str) -> bool {
        self.nix("nix-store").args(["--check-validity", path]).run().code() == 0
    }

    /// Replaces /etc/nix/machines.
    pub fn set_machines(&self, text: &str) {
        self.machine.write("/etc/nix/machines", text);
    }

    /// Kills the client's daemon and its workers.
    pub fn stop_daemon(&mut self) {
        for pid in self.machine.pids_matching("nix-daemon") {
            let _ = self.machine.command("kill").args(["-KILL", &pid.to_string()]).run();
        }
        if let Some(daemon) = self.daemon.take() {
            let _ = daemon.wait();
        }
    }

    /// Starts the client's daemon again.
    pub fn start_daemon(&mut self) {
        self.daemon = Some(start_daemon(&self.machine, &self.daemon_env));
    }

    /// Entries of the journal as objects, selected with arguments of journalctl such as `-t nix-offload`.
    pub fn journal(&self, selection: &str) -> Vec<serde_json::Value> {
        self.machine.command("journalctl").arg("--sync").run().assert_success();
        let mut words = vec!["--no-pager", "-o", "json", "--all"];
        words.extend(selection.split_whitespace());
        let output = self.machine.command("journalctl").args(words).run();
        output.assert_success();
        output
            .stdout()
            .lines()
            .map(|line| serde_json::from_str(line).expect("journalctl prints JSON"))
            .collect()
    }
}

/// What an entry of the journal is about: its field `EVENT`, or its message where that says it all.
pub fn event(entry: &serde_json::Value) -> &str {
    entry["EVENT"].as_str().or_else(|| entry["MESSAGE"].as_str()).unwrap_or_default()
}
