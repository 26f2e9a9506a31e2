//! A real sshd on a free port of 127.0.0.1, with keys of its own, and a pool of masters to it. Whatever was
//! started is ended when the world is dropped.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nix_offload_proxy::{
    master::{
        CloseWrite, Endpoint, Master, MasterInfo, OpenError, Pool, Session, SessionReader, SessionStatus,
        SessionWriter, StartError,
    },
    settings,
};
use tempfile::TempDir;

/// Enough for a handshake on a loaded machine.
pub(crate) const BOUND: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) directory: TempDir,
    pub(crate) port: u16,
    pub(crate) pool: Pool,
    sshd: Child,
}

impl World {
    pub(crate) fn new() -> World {
        World::with_sshd(|_| String::new())
    }

    /// With lines of sshd_config, which come first and so count. Keys are there when they are asked for.
    pub(crate) fn with_sshd(lines: impl FnOnce(&Path) -> String) -> World {
        // Debian's sshd wants its empty directory, which the system's own service would make.
        fs::create_dir_all("/run/sshd").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for key in ["host", "other", "user", "stranger"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", key, "-f"])
                .arg(path(key))
                .status()
                .unwrap();
            assert!(made.success());
        }
        fs::copy(path("user.pub"), path("authorized_keys")).unwrap();
        let port = free_port();
        let lines = lines(directory.path());
        // Of this word the last one counts.
        let startups = if lines.contains("MaxStartups") { "" } else { "MaxStartups 100\n" };
        // Without HOME no shell spends its time on what this user has in his .bashrc.
        let config = format!(
            "{lines}\n{startups}Port {port}\nListenAddress 127.0.0.1\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized_keys\n\
             PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n\
             KbdInteractiveAuthentication no\nPermitRootLogin yes\nLogLevel VERBOSE\n\
             SetEnv HOME=/nowhere\n",
            directory.path().display()
        );
        fs::write(path("sshd_config"), config).unwrap();
        let sshd = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(path("sshd_config"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(path("sshd.log")).unwrap())
            .spawn()
            .unwrap();
        let pool = Pool::open(path("run")).unwrap();
        let world = World { directory, port, pool, sshd };
        fs::write(world.path("known_hosts"), world.known_hosts_line("host")).unwrap();
        wait_until("sshd listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// An endpoint that works.
    pub(crate) fn endpoint(&self) -> Endpoint {
        let mut endpoint = Endpoint::new("127.0.0.1").unwrap();
        endpoint.port = Some(self.port);
        endpoint.identity = Some(self.path("user"));
        endpoint.ssh_options = self.ssh_options("known_hosts");
        endpoint
    }

    /// The endpoint of [`World::start_command`].
    pub(crate) fn endpoint_of_command(&self) -> Endpoint {
        let ssh_options = self.ssh_options("known_hosts").split_off(2);
        Endpoint { ssh_options, ..self.endpoint() }
    }

    /// Words that keep ssh from this user's own configuration, agents and keys.
    pub(crate) fn ssh_options(&self, known_hosts: &str) -> Vec<String> {
        let known_hosts = format!("UserKnownHostsFile={}", self.path(known_hosts).display());
        ["-F", "none", "-o", &known_hosts, "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none"]
            .map(String::from)
            .to_vec()
    }

    pub(crate) fn known_hosts_line(&self, key: &str) -> String {
        format!("[127.0.0.1]:{} {}", self.port, self.public_key(key))
    }

    pub(crate) fn public_key(&self, key: &str) -> String {
        fs::read_to_string(self.path(&format!("{key}.pub"))).unwrap()
    }

    /// `SHA256:...`
    pub(crate) fn fingerprint(&self, key: &str) -> String {
        let listed =
            Command::new("ssh-keygen").arg("-lf").arg(self.path(&format!("{key}.pub"))).output().unwrap();
        String::from_utf8(listed.stdout).unwrap().split(' ').nth(1).unwrap().to_owned()
    }

    pub(crate) fn start(&self) -> Master {
        self.pool.start(&self.endpoint(), BOUND, "true").unwrap()
    }

    pub(crate) fn only_master(&self) -> MasterInfo {
        let mut masters = self.pool.list().unwrap();
        assert_eq!(masters.len(), 1, "{masters:?}");
        masters.remove(0)
    }

    /// How many connections have been authenticated by sshd.
    pub(crate) fn logins(&self) -> usize {
        self.sshd_log().matches("Accepted publickey").count()
    }

    /// What sshd has said so far.
    pub(crate) fn sshd_log(&self) -> String {
        fs::read_to_string(self.path("sshd.log")).unwrap()
    }

    /// A pool in the same directory for which something is set. So it is for the binary.
    pub(crate) fn pool_with(&self, settings: &str) -> Pool {
        fs::write(self.path("offload.toml"), settings).unwrap();
        self.pool.clone().with_settings(settings::read_file(&self.path("offload.toml")).unwrap())
    }

    /// The processes of sshd's connections.
    pub(crate) fn sshd_sessions(&self) -> Vec<Pid> {
        let parent = self.sshd.id().to_string();
        let numbers =
            fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        let ours = numbers.filter(|number| {
            let stat = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.split(' ').nth(1) == Some(&parent))
        });
        ours.map(|number| Pid::from_raw(number.parse().unwrap())).collect()
    }

    /// The binary, set up for this world.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nix-offload-proxy"));
        command.env("NIX_OFFLOAD_RUNTIME_DIR", self.pool.directory()).stdin(Stdio::null());
        if self.path("offload.toml").exists() {
            command.env("NIX_OFFLOAD_CONFIG", self.path("offload.toml"));
        }
        command
    }

    /// The binary's `start` to the endpoint that works.
    pub(crate) fn start_command(&self) -> Command {
        let mut command = self.command();
        command.args(["start", "127.0.0.1", "-p", &self.port.to_string(), "-i"]).arg(self.path("user"));
        command.args(&self.endpoint_of_command().ssh_options);
        command
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for master in self.pool.list().unwrap_or_default() {
            let _ = self.pool.stop(&master);
        }
        let _ = self.sshd.kill();
        let _ = self.sshd.wait();
        if std::thread::panicking() {
            let mut log = String::new();
            let _ = File::open(self.path("sshd.log")).and_then(|mut file| file.read_to_string(&mut log));
            println!("sshd said:\n{log}");
        }
    }
}

/// Why there is no session.
#[derive(Debug)]
pub(crate) enum Trouble {
    Start(StartError),
    Open(OpenError),
}

impl From<StartError> for Trouble {
    fn from(error: StartError) -> Self {
        Trouble::Start(error)
    }
}

/// A session on whichever master has one, each master asked for `patience`. Returns that master too.
pub(crate) fn session_on_any(
    pool: &Pool,
    endpoint: &Endpoint,
    command: &str,
    patience: Duration,
) -> Result<(Master, Session), Trouble> {
    pool.with_master(
        endpoint,
        Instant::now() + BOUND,
        "true",
        |master| {
            let session = master.open_session(command, patience).map_err(Trouble::Open)?;
            Ok((master.clone(), session))
        },
        |error| match error {
            Trouble::Open(error) => Some(error),
            Trouble::Start(_) => None,
        },
    )
}

/// A `cat` on the far side that must give back what it gets.
pub(crate) struct Echo {
    reader: BufReader<SessionReader>,
    writer: SessionWriter,
    status: SessionStatus,
}

impl Echo {
    pub(crate) fn of(session: Session) -> Echo {
        let (reader, writer, status) = session.split();
        Echo { reader: BufReader::new(reader), writer, status }
    }

    pub(crate) fn says(&mut self, word: &str) {
        self.writer.write_all(format!("{word}\n").as_bytes()).unwrap();
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert_eq!(line, format!("{word}\n"));
    }

    /// It ends by itself, as one that nothing happened to does.
    pub(crate) fn ends(mut self) {
        self.writer.shutdown().unwrap();
        assert_eq!(self.reader.read_line(&mut String::new()).unwrap(), 0);
        assert_eq!(self.status.end(BOUND).exit, Some(0));
    }
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

pub(crate) fn gone(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| stat.rsplit_once(") ").unwrap().1.starts_with('Z'))
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        sleep(Duration::from_millis(5));
    }
}

/// The files of a directory by extension, sorted.
pub(crate) fn extensions(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> =
        entries.map(|path| path.extension().unwrap_or_default().to_string_lossy().into_owned()).collect();
    found.sort();
    found
}
