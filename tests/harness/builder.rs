//! A builder: a machine with sshd and, unless it is to be without, a nix-daemon.

use std::{
    fs,
    net::TcpListener,
    ops::Deref,
    time::{Duration, Instant},
};

use crate::{
    command::Running,
    machine::Machine,
    paths::Release,
    wait::wait_until,
    world::{World, generate_key},
};

const START_LIMIT: Duration = Duration::from_secs(20);
const PORT_TRIES: u32 = 5;
/// A store that is not at /nix is always built for in a chroot, which is to have the shell too.
const SYSTEM_PLACES: &str = "/bin /lib /lib64 /usr";
const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

/// What a builder is to be like.
#[must_use]
pub struct BuilderPlan {
    world: World,
    name: String,
    release: Release,
    nix: bool,
    daemon: bool,
    login: String,
    sshd: Vec<String>,
    nix_conf: Vec<String>,
    bashrc: String,
    authorized_prefix: String,
}

impl BuilderPlan {
    pub(crate) fn new(world: World, name: &str) -> Self {
        Self {
            world,
            name: name.into(),
            release: Release::Bookworm,
            nix: true,
            daemon: true,
            login: "root".into(),
            sshd: Vec::new(),
            nix_conf: Vec::new(),
            bashrc: String::new(),
            authorized_prefix: String::new(),
        }
    }

    /// Runs the programs of this release; Bookworm otherwise.
    pub fn release(mut self, release: Release) -> Self {
        self.release = release;
        self
    }

    /// No daemon, and no program of Nix to be found.
    pub fn without_nix(mut self) -> Self {
        self.nix = false;
        self.daemon = false;
        self
    }

    /// Nix's programs, but no daemon and no socket.
    pub fn without_daemon(mut self) -> Self {
        self.daemon = false;
        self
    }

    /// An sshd that forwards to no unix socket.
    pub fn refusing_forwarding(self) -> Self {
        self.sshd_option("AllowStreamLocalForwarding no")
    }

    /// An sshd that allows this many sessions in one connection.
    pub fn max_sessions(self, sessions: u32) -> Self {
        self.sshd_option(&format!("MaxSessions {sessions}"))
    }

    /// A line of sshd_config; one that begins with `Match`, with the lines of its block, stands at the end.
    pub fn sshd_option(mut self, line: &str) -> Self {
        self.sshd.push(line.into());
        self
    }

    /// A line of nix.conf.
    pub fn nix_conf(mut self, line: &str) -> Self {
        self.nix_conf.push(line.into());
        self
    }

    /// What root's shell runs when it starts; empty otherwise.
    pub fn bashrc(mut self, text: &str) -> Self {
        self.bashrc = text.into();
        self
    }

    /// Options in front of the client's key in authorized_keys, such as `command="..."` or `restrict`.
    pub fn key_options(mut self, options: &str) -> Self {
        self.authorized_prefix = format!("{options} ");
        self
    }

    /// Clients log in as the user without rights instead of root.
    pub fn as_user(mut self) -> Self {
        self.login = "user".into();
        self
    }

    /// Starts it and waits until it can be used.
    pub fn start(self) -> Builder {
        let machine = Machine::start(&self.world, &self.name, self.release, self.nix, false);
        write_nix_conf(&machine, &self.nix_conf);
        machine.write("/root/.bashrc", &self.bashrc);
        let host_key = self.world.directory().join(format!("host-key-{}", machine.init()));
        generate_key(&host_key);
        let host_public_key = fs::read_to_string(host_key.with_extension("pub")).unwrap();
        machine.write_mode("/etc/ssh/host_key", &fs::read_to_string(&host_key).unwrap(), 0o600);
        let public = fs::read_to_string(self.world.client_key().with_extension("pub")).unwrap();
        machine.write("/etc/ssh/authorized_keys", &format!("{}{public}", self.authorized_prefix));
        let mut builder = Builder {
            port: 0,
            login: self.login,
            host_public_key: host_public_key.split_whitespace().take(2).collect::<Vec<_>>().join(" "),
            sshd_options: self.sshd,
            sshd: None,
            daemon: None,
            machine,
        };
        if self.daemon {
            builder.start_daemon();
        }
        builder.start_sshd();
        builder
    }
}

/// A running builder; everything a [`Machine`] can do, it can do.
pub struct Builder {
    // First, so that it is dropped first: ending the machine ends its services.
    machine: Machine,
    port: u16,
    login: String,
    host_public_key: String,
    sshd_options: Vec<String>,
    sshd: Option<Running>,
    daemon: Option<Running>,
}

impl Deref for Builder {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Builder {
    /// Its name in the ssh configuration of clients that know it.
    pub fn alias(&self) -> &str {
        self.machine.name()
    }

    /// The port its sshd listens on, at 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The account clients log in to.
    pub fn login(&self) -> &str {
        &self.login
    }

    /// Type and text of its host key, as in known_hosts behind the host name.
    pub fn host_public_key(&self) -> &str {
        &self.host_public_key
    }

    /// Starts the daemon and waits until its socket answers.
    pub fn start_daemon(&mut self) {
        self.daemon = Some(start_daemon(&self.machine, &[]));
    }

    /// Kills the daemon and its workers; their socket stays, as after a crash.
    pub fn stop_daemon(&mut self) {
        for pid in self.machine.pids_matching("nix-daemon") {
            // One of them may have ended by itself in the meantime.
            let _ = self.machine.command("kill").args(["-KILL", &pid.to_string()]).run();
        }
        if let Some(daemon) = self.daemon.take() {
            let _ = daemon.wait();
        }
    }

    /// Starts sshd, again on the same port if there was one, and waits until it listens.
    pub fn start_sshd(&mut self) {
        for _ in 0..PORT_TRIES {
            if self.port == 0 {
                self.port = free_port();
            }
            if self.try_sshd() {
                return;
            }
            self.port = 0;
        }
        panic!("sshd of {} does not start: {}", self.machine.name(), self.machine.log("sshd"));
    }

    fn try_sshd(&mut self) -> bool {
        let (blocks, lines): (Vec<&str>, Vec<&str>) =
            self.sshd_options.iter().map(String::as_str).partition(|option| option.starts_with("Match "));
        let config = format!(
            "{}\nListenAddress 127.0.0.1\nPort {}\nHostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/authorized_keys\n\
             PermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nPidFile none\nPrintMotd no\nLogLevel VERBOSE\n{}\n",
            lines.join("\n"),
            self.port,
            blocks.join("\n")
        );
        self.machine.write("/etc/ssh/sshd_config", &config);
        let command = self.machine.command("/usr/sbin/sshd").args(["-D", "-e", "-f", "/etc/ssh/sshd_config"]);
        let mut sshd = self.machine.start_service("sshd", command);
        let start = Instant::now();
        let mut listening = false;
        wait_until("sshd listens or has ended", START_LIMIT, || {
            listening = self.is_listening();
            listening || !sshd.is_running()
        });
        // Somebody else may have taken the port in between; then sshd has ended.
        let ours = listening
            && self.machine.log("sshd").contains(&format!("listening on 127.0.0.1 port {}", self.port));
        if ours && sshd.is_running() && start.elapsed() < START_LIMIT {
            self.sshd = Some(sshd);
            return true;
        }
        false
    }

    fn is_listening(&self) -> bool {
        let wanted = format!("0100007F:{:04X}", self.port);
        let table = fs::read_to_string("/proc/net/tcp").unwrap();
        table.lines().any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            fields.next() == Some(&wanted) && fields.nth(1) == Some("0A")
        })
    }

    /// Kills sshd and every session of it.
    pub fn stop_sshd(&mut self) {
        for pid in self.machine.pids_matching("sshd") {
            let _ = self.machine.command("kill").args(["-KILL", &pid.to_string()]).run();
        }
        if let Some(sshd) = self.sshd.take() {
            let _ = sshd.wait();
        }
    }

    /// Ends sshd with every session and starts it with these lines instead of those it had.
    pub fn restart_sshd_with(&mut self, options: &[&str]) {
        self.stop_sshd();
        self.sshd_options = options.iter().map(|option| (*option).to_owned()).collect();
        self.start_sshd();
    }

    /// What stands in front of the client's key from its next login on.
    pub fn set_key_options(&self, options: &str) {
        let keys = "/etc/ssh/authorized_keys";
        let text = self.machine.read(keys);
        let key = text.find("ssh-ed25519").map_or("", |at| &text[at..]);
        self.machine.write(keys, &format!("{options} {key}"));
    }

    /// Number of channels to unix sockets that sshd was told to refuse and did.
    pub fn refused_channels(&self) -> usize {
        self.machine.log("sshd").matches("refused streamlocal port forward").count()
    }

    /// Number of connections that were ever let in.
    pub fn logins(&self) -> usize {
        self.machine.log("sshd").matches("Accepted publickey").count()
    }

    /// Number of sessions (commands, shells, subsystems) that were ever started.
    pub fn sessions(&self) -> usize {
        self.machine.log("sshd").lines().filter(|line| line.starts_with("Starting session")).count()
    }

    /// Cuts the power.
    pub fn stop(&mut self) {
        self.machine.stop();
    }
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

pub(crate) fn write_nix_conf(machine: &Machine, lines: &[String]) {
    let text = format!(
        "sandbox = false\nbuild-users-group =\nsubstituters =\nexperimental-features = nix-command\nsandbox-paths = {SYSTEM_PLACES}\n{}\n",
        lines.join("\n")
    );
    machine.write("/etc/nix/nix.conf", &text);
}

/// Starts a nix-daemon in a machine and waits until it answers.
pub(crate) fn start_daemon(machine: &Machine, env: &[(String, String)]) -> Running {
    // As its unit has it.
    let mut command = machine.command("nix-daemon").arg("--daemon");
    for (name, value) in env {
        command = command.env(name, value);
    }
    let daemon = machine.start_service("nix-daemon", command);
    let socket = machine.path(DAEMON_SOCKET);
    wait_until("nix-daemon answers", START_LIMIT, || {
        std::os::unix::net::UnixStream::connect(&socket).is_ok()
    });
    daemon
}
