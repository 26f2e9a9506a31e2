//! A bastion and, in a network namespace of their own, three hosts at 127.0.0.2, 127.0.0.3 and 127.0.0.4. The
//! bastion's sshd runs in that namespace too, for each connection anew, as systemd's socket activation has it:
//! the test takes the connections outside. So the way to the hosts leads through it alone.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use nix_offload_proxy::master::{Endpoint, MasterInfo, Pool};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Enough for a handshake on a loaded machine.
pub(crate) const BOUND: Duration = Duration::from_secs(30);
pub(crate) const MIB: usize = 1024 * 1024;
const SSHD: &str = "/usr/sbin/sshd";
/// Debian's own. Another python3 may come first in PATH.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// What a command said and how it ended.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Said { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }
}

pub(crate) struct World {
    directory: TempDir,
    pub(crate) pool: Pool,
    /// The port of the hosts, where nobody listens outside.
    pub(crate) port: u16,
    pub(crate) bastion_port: u16,
    hosts: Vec<Child>,
    over: Arc<AtomicBool>,
    /// The processes of the bastion's connections.
    sessions: Arc<Mutex<Vec<u32>>>,
    bastion: Option<JoinHandle<()>>,
}

impl World {
    pub(crate) fn new() -> World {
        fs::create_dir_all("/run/sshd").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for key in ["host", "user"] {
            run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path(key)));
        }
        let port = free_port();
        let config = |name: &str, more: &str| {
            let text = format!(
                "HostKey {0}/host\nAuthorizedKeysFile {0}/user.pub\nPidFile none\nStrictModes no\nUsePAM no\n\
                 PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n\
                 MaxStartups 200\nLogLevel VERBOSE\nSubsystem sftp internal-sftp\n{more}\n",
                directory.path().display()
            );
            fs::write(path(name), text).unwrap();
        };
        config("bastion.conf", "");
        let mut hosts: Vec<Child> = Vec::new();
        for number in [2, 3, 4] {
            let name = format!("host{number}");
            config(&format!("{name}.conf"), &format!("Port {port}\nListenAddress 127.0.0.{number}"));
            let mut command = match hosts.first() {
                None => {
                    let mut command = Command::new("unshare");
                    command.args(["--net", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]);
                    command
                }
                Some(first) => entering(first.id()),
            };
            let log = path(&format!("{name}.log"));
            command.args([SSHD, "-D", "-E"]).arg(&log).arg("-f").arg(path(&format!("{name}.conf")));
            hosts.push(command.stdin(Stdio::null()).spawn().unwrap());
            wait_until("a host listens", || {
                fs::read_to_string(&log).is_ok_and(|text| text.contains("Server listening"))
            });
        }

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let bastion_port = listener.local_addr().unwrap().port();
        let over = Arc::new(AtomicBool::new(false));
        let (first, end, home) = (hosts[0].id(), Arc::clone(&over), directory.path().to_owned());
        let sessions = Arc::default();
        let known: Arc<Mutex<Vec<u32>>> = Arc::clone(&sessions);
        let bastion = thread::spawn(move || {
            serve_bastion(&listener, first, &end, &home, |pid| known.lock().unwrap().push(pid));
        });
        let pool = Pool::open(path("run")).unwrap();
        let world =
            World { directory, pool, port, bastion_port, hosts, over, sessions, bastion: Some(bastion) };
        world.write_client_config("");
        world
    }

    /// ssh's configuration, with blocks of a test's own before the others.
    pub(crate) fn write_client_config(&self, first: &str) {
        let home = self.directory.path().display();
        let proxy = self.proxy_command("--via bastion");
        let direct = format!("{} --timeout 20", env!("CARGO_BIN_EXE_nix-offload-proxy"));
        let (port, bastion_port) = (self.port, self.bastion_port);
        let text = format!(
            "{first}\nHost bastion\n HostName 127.0.0.1\n Port {bastion_port}\n\
             Host fd2 fd3 fd4\n ProxyCommand {proxy} --fdpass %h %p\n ProxyUseFdpass yes\n\
             Host host2 host3 host4 127.0.0.2 127.0.0.3 127.0.0.4\n ProxyCommand {proxy} %h %p\n\
             Host direct fddirect\n HostName 127.0.0.1\n Port {bastion_port}\n\
             Host direct\n ProxyCommand {direct} %h %p\n\
             Host fddirect\n ProxyCommand {direct} --fdpass %h %p\n ProxyUseFdpass yes\n\
             Host *2\n HostName 127.0.0.2\nHost *3\n HostName 127.0.0.3\nHost *4\n HostName 127.0.0.4\n\
             Host *\n Port {port}\n IdentityFile {home}/user\n IdentitiesOnly yes\n IdentityAgent none\n\
             UserKnownHostsFile {home}/known_hosts\n GlobalKnownHostsFile /dev/null\n\
             StrictHostKeyChecking accept-new\n BatchMode yes\n"
        );
        fs::write(self.path("ssh_config"), text).unwrap();
    }

    /// What stands in ssh_config, up to the host.
    pub(crate) fn proxy_command(&self, words: &str) -> String {
        let config = self.path("ssh_config");
        format!("{} -F {} --timeout 20 {words}", env!("CARGO_BIN_EXE_nix-offload-proxy"), config.display())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A program, set up for this world.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("NIX_OFFLOAD_RUNTIME_DIR", self.pool.directory()).stdin(Stdio::null());
        command
    }

    /// ssh, scp or sftp with this world's configuration.
    pub(crate) fn client(&self, program: &str) -> Command {
        let mut command = self.command(program);
        command.arg("-F").arg(self.path("ssh_config"));
        command
    }

    pub(crate) fn ssh(&self, host: &str, remote: &str) -> Said {
        self.client("ssh").args([host, remote]).output().unwrap().into()
    }

    /// The binary itself.
    pub(crate) fn proxy(&self) -> Command {
        self.command(env!("CARGO_BIN_EXE_nix-offload-proxy"))
    }

    pub(crate) fn proxy_says(&self, words: &[&str]) -> Said {
        self.proxy().args(words).output().unwrap().into()
    }

    /// The words that lead through the bastion.
    pub(crate) fn via(&self) -> Vec<String> {
        ["-F", self.path("ssh_config").to_str().unwrap(), "--via", "bastion"].map(String::from).to_vec()
    }

    /// In front of a line of shell, what leads among the hosts behind the bastion.
    pub(crate) fn enter(&self) -> String {
        format!("nsenter --net --target {}", self.hosts[0].id())
    }

    /// The process that listens at one of the hosts, 2, 3 or 4.
    pub(crate) fn host(&self, number: usize) -> u32 {
        self.hosts[number - 2].id()
    }

    /// Has an address among the hosts swallow connections, for as long as what this gives lives.
    pub(crate) fn swallow(&self, address: &str, port: u16) -> Swallowing {
        const SCRIPT: &str = "import socket, sys\n\
            place = (sys.argv[1], int(sys.argv[2]))\n\
            listener, queue, full = socket.socket(), [], False\n\
            listener.bind(place)\n\
            listener.listen(0)\n\
            while not full:\n\
            \x20   queue.append(socket.socket())\n\
            \x20   queue[-1].settimeout(0.3)\n\
            \x20   try: queue[-1].connect(place)\n\
            \x20   except TimeoutError: full = True\n\
            print('full', flush=True)\n\
            sys.stdin.read()\n";
        let mut command = entering(self.hosts[0].id());
        command.args([PYTHON, "-c", SCRIPT, address, &port.to_string()]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = [0; 5];
        process.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        Swallowing(process)
    }

    pub(crate) fn endpoint(&self, destination: &str) -> Endpoint {
        let mut endpoint = Endpoint::new(destination).unwrap();
        endpoint.ssh_options = vec!["-F".into(), self.path("ssh_config").display().to_string()];
        endpoint
    }

    /// The processes of the bastion's connections, with their children.
    pub(crate) fn bastion_processes(&self) -> Vec<u32> {
        let mut processes = self.sessions.lock().unwrap().clone();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
            if parent.is_some_and(|parent| processes.contains(&parent)) {
                processes.extend(entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
            }
        }
        processes
    }

    pub(crate) fn bastion_logins(&self) -> usize {
        logins(&self.path("bastion.log"))
    }

    pub(crate) fn master(&self, destination: &str) -> MasterInfo {
        let masters = self.pool.list().unwrap();
        let mut found = masters.into_iter().filter(|master| master.destination == destination);
        let master = found.next().unwrap();
        assert_eq!(found.next(), None);
        master
    }

    /// Processes of the binary that work for this world.
    pub(crate) fn proxies(&self) -> usize {
        let mark = self.path("ssh_config").display().to_string();
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let lines = entries.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
        lines
            .filter(|line| line.starts_with(env!("CARGO_BIN_EXE_nix-offload-proxy")) && line.contains(&mark))
            .count()
    }
}

/// See [`World::swallow`].
pub(crate) struct Swallowing(Child);

impl Drop for Swallowing {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A session on a host, which must give back what it gets.
pub(crate) struct Echo {
    ssh: Child,
    from: BufReader<ChildStdout>,
}

impl Echo {
    pub(crate) fn begin(world: &World, host: &str) -> Echo {
        let mut ssh = world.client("ssh");
        let mut ssh = ssh.args([host, "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let from = BufReader::new(ssh.stdout.take().unwrap());
        let mut echo = Echo { ssh, from };
        echo.says("begun");
        echo
    }

    pub(crate) fn says(&mut self, word: &str) {
        writeln!(self.ssh.stdin.as_mut().unwrap(), "{word}").unwrap();
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        assert_eq!(line, format!("{word}\n"));
    }

    /// It ends by itself, as one that nothing happened to does.
    pub(crate) fn ends(mut self) {
        drop(self.ssh.stdin.take());
        assert!(self.ssh.wait().unwrap().success());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for master in self.pool.list().unwrap_or_default() {
            let _ = self.pool.stop(&master);
        }
        self.over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(("127.0.0.1", self.bastion_port));
        if let Some(bastion) = self.bastion.take() {
            let _ = bastion.join();
        }
        for host in &mut self.hosts {
            let _ = host.kill();
            let _ = host.wait();
        }
        if thread::panicking() {
            for name in ["bastion", "host2", "host3", "host4"] {
                let log = fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
                println!("{name} said:\n{log}");
            }
        }
    }
}

fn serve_bastion(listener: &TcpListener, namespace: u32, over: &AtomicBool, home: &Path, tell: impl Fn(u32)) {
    let mut children: Vec<Child> = Vec::new();
    for connection in listener.incoming() {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let socket = OwnedFd::from(connection.unwrap());
        let mut command = entering(namespace);
        command
            .args([SSHD, "-i", "-E"])
            .arg(home.join("bastion.log"))
            .arg("-f")
            .arg(home.join("bastion.conf"));
        command.stdin(socket.try_clone().unwrap()).stdout(socket).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        tell(child.id());
        children.push(child);
        children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }
    for child in &mut children {
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn entering(process: u32) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--net", "--target", &process.to_string()]);
    command
}

pub(crate) fn logins(log: &Path) -> usize {
    fs::read_to_string(log).unwrap_or_default().matches("Accepted publickey").count()
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub(crate) fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        sleep(Duration::from_millis(5));
    }
}

/// A file of bytes that repeat nowhere near, and its hash.
pub(crate) fn pattern_file(path: &Path, len: usize) -> [u8; 32] {
    let bytes: Vec<u8> =
        (0..len as u64).map(|position| (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path).unwrap();
    file.write_all(&bytes).unwrap();
    Sha256::digest(&bytes).into()
}

pub(crate) fn hash_of(path: &Path) -> [u8; 32] {
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    Sha256::digest(&bytes).into()
}
