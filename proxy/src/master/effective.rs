//! What ssh_config says of an endpoint, and which files say it: asked of ssh itself (`ssh -v -G`), for nobody else
//! knows Match and Include. A master that was started from another configuration than now is told by this.

use std::{
    fs, io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::unistd::{User, geteuid};
use sha2::{Digest, Sha256};

use super::{
    name::Endpoint,
    process,
    start::{self, Files},
};

/// The file that ssh reads for everybody.
const SYSTEM_CONFIG: &str = "/etc/ssh/ssh_config";
/// ssh's words before a file's name, at its first level of verbosity (`read_config_file_depth` in readconf.c).
const READING: &str = "Reading configuration data ";
/// More files than this are not watched.
const MOST_FILES: usize = 64;
/// The port of ssh where none is set.
const SSH_PORT: u16 = 22;

/// What ssh_config makes of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Effective {
    /// The host that is connected to.
    pub(super) host: String,
    /// Its port.
    pub(super) port: u16,
    /// That it is connected to by ssh itself, and is not this machine.
    pub(super) needs_network: bool,
    /// Where it writes the keys of new hosts.
    pub(super) known_hosts: Option<PathBuf>,
    /// All of it, as a hash. Empty if ssh did not say.
    pub(super) hash: String,
    /// The files that were read, and those whose appearance would count.
    pub(super) stamps: Vec<Stamp>,
}

/// A file as it was. What it says may have changed if this has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) path: PathBuf,
    pub(super) state: String,
}

impl Stamp {
    fn of(path: PathBuf) -> Self {
        let state = Stamp::state(&path);
        Stamp { path, state }
    }

    pub(super) fn still_holds(&self) -> bool {
        Stamp::state(&self.path) == self.state
    }

    fn state(path: &Path) -> String {
        fs::metadata(path).map_or_else(
            |_| "absent".into(),
            |m| format!("{}.{:09} {} {}", m.mtime(), m.mtime_nsec(), m.ino(), m.len()),
        )
    }
}

impl Effective {
    /// Whether a master that was started from that configuration is still as it should be. When in doubt it is.
    pub(super) fn is_as(&self, configuration: &str) -> bool {
        self.hash.is_empty() || configuration.is_empty() || self.hash == configuration
    }
}

/// Whether ssh would say nothing when it fails (`LogLevel` QUIET or FATAL). To be told which files it reads it has to be
/// given another level, so it is asked once more.
pub(super) fn is_silent(endpoint: &Endpoint, files: &Files, bound: Duration) -> bool {
    let mut command = asking(endpoint, files, bound, "-G");
    let (stdout, _) = process::output(&mut command, bound).unwrap_or_default();
    let level = stdout.lines().find_map(|line| line.strip_prefix("loglevel "));
    // The names it has for QUIET and FATAL (`log_levels` in log.c).
    matches!(level, Some("SILENT" | "QUIET" | "FATAL"))
}

fn asking(endpoint: &Endpoint, files: &Files, bound: Duration, how: &str) -> Command {
    let mut command = Command::new("ssh");
    command
        .arg(how)
        .args(start::words(endpoint, files, bound))
        .args(["--", endpoint.destination.as_str()])
        .stdin(Stdio::null())
        .current_dir("/");
    start::set_environment(&mut command, files);
    command
}

/// Asks ssh. If it fails, what is wrong is better told by its start, so the answer is made from what is known here.
pub(super) fn ask(endpoint: &Endpoint, files: &Files, bound: Duration) -> Effective {
    let mut command = asking(endpoint, files, bound, "-vG");
    let (stdout, stderr) = process::output(&mut command, bound).unwrap_or_else(|error: io::Error| {
        tracing::debug!(destination = endpoint.destination, %error, "ssh -G");
        Default::default()
    });
    let mut effective = read(&stdout, &stderr, &main_files());
    if effective.host.is_empty() {
        effective.host = endpoint.host().to_owned();
        effective.port = endpoint.port.unwrap_or(SSH_PORT);
        effective.needs_network = !is_this_machine(&effective.host);
    }
    effective
}

/// The files that ssh reads unless it is told otherwise.
fn main_files() -> Vec<PathBuf> {
    let home = User::from_uid(geteuid()).ok().flatten().map(|user| user.dir.join(".ssh/config"));
    home.into_iter().chain([PathBuf::from(SYSTEM_CONFIG)]).collect()
}

fn read(stdout: &str, stderr: &str, main: &[PathBuf]) -> Effective {
    let value = |name: &str| {
        stdout.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap_or_default().trim()
    };
    let mut hash = Sha256::new();
    // Of these two each process may have its own.
    let counts = |line: &&str| !line.starts_with("connecttimeout ") && !line.starts_with("controlpersist ");
    stdout.lines().filter(counts).for_each(|line| hash.update(format!("{line}\n")));
    let mut paths = main.to_vec();
    for line in stderr.lines() {
        if let Some((_, file)) = line.split_once(READING) {
            let file = PathBuf::from(file.trim());
            // A file beside one that was included may be included next time.
            // Where ssh keeps other things, too, there is always something new.
            let is_busy = |directory: &Path| main.iter().any(|file| file.parent() == Some(directory));
            let beside = file.parent().filter(|directory| !is_busy(directory)).map(Path::to_owned);
            paths.extend([Some(file), beside].into_iter().flatten());
        } else if let Some((_, rest)) = line.split_once(": include ")
            && let Some(pattern) = rest.strip_suffix(" matched no files")
        {
            let directory =
                Path::new(pattern).parent().filter(|path| !path.to_string_lossy().contains(['*', '?', '[']));
            paths.extend(directory.map(Path::to_owned));
        }
    }
    let mut stamps: Vec<Stamp> = Vec::new();
    for path in paths {
        let known = stamps.iter().any(|stamp| stamp.path == path);
        if path.is_absolute() && !known && stamps.len() < MOST_FILES {
            stamps.push(Stamp::of(path));
        }
    }
    let host = value("hostname").to_ascii_lowercase();
    let is_direct = ["proxycommand", "proxyjump"].iter().all(|name| matches!(value(name), "" | "none"));
    let known_hosts = value("userknownhostsfile").split(' ').next().filter(|word| !word.is_empty());
    Effective {
        known_hosts: known_hosts.map(PathBuf::from),
        needs_network: is_direct && !is_this_machine(&host),
        host,
        port: value("port").parse().unwrap_or(SSH_PORT),
        hash: if stdout.is_empty() {
            String::new()
        } else {
            hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
        },
        stamps,
    }
}

/// Whether a host is reached without any network.
fn is_this_machine(host: &str) -> bool {
    let is_loopback = || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    host == "localhost" || host.ends_with(".localhost") || is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ssh_says_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("d")).unwrap();
        fs::write(path("d/one"), "").unwrap();
        let stderr = format!(
            "OpenSSH_9.2p1\r\ndebug1: Reading configuration data {0}/main\r\n\
             debug1: {0}/main line 2: include {0}/d/* matched no files\r\n\
             debug1: Reading configuration data {0}/d/one\r\n",
            directory.path().display()
        );
        let stdout = "host alias\nhostname Example.ORG\nport 2222\nuserknownhostsfile /k /l\n";
        let main = [path("main"), path("absent")];
        let effective = read(stdout, &stderr, &main);
        assert_eq!((&*effective.host, effective.port), ("example.org", 2222));
        assert_eq!(effective.known_hosts, Some("/k".into()));
        let paths: Vec<_> = effective.stamps.iter().map(|stamp| stamp.path.clone()).collect();
        assert_eq!(paths, [path("main"), path("absent"), path("d"), path("d/one")]);
        assert!(effective.stamps.iter().all(Stamp::still_holds));
        fs::write(path("d/two"), "").unwrap();
        assert!(!effective.stamps[2].still_holds());
        fs::write(path("absent"), "").unwrap();
        assert!(!effective.stamps[1].still_holds());
        assert_ne!(read("host other\n", &stderr, &main).hash, effective.hash);
    }

    #[test]
    fn hosts_that_are_reached_without_a_network_are_known() {
        let needs = |said: &str| read(said, "", &[]).needs_network;
        for host in ["example.org", "10.0.0.1", "2001:db8::1", "localhost.example.org"] {
            assert!(needs(&format!("hostname {host}\nproxycommand none\n")), "{host}");
        }
        for host in ["localhost", "LOCALHOST", "vm.localhost", "127.0.0.1", "127.8.8.8", "::1"] {
            assert!(!needs(&format!("hostname {host}\n")), "{host}");
        }
        assert!(!needs("hostname example.org\nproxycommand socat - VSOCK-CONNECT:3:22\n"));
        assert!(!needs("hostname example.org\nproxyjump bastion\n"));
    }
}
