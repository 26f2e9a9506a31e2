//! Whether the machines' hosts can be found, and whether one of them is this very machine.
//!
//! Asks ssh for what ssh_config makes of a name, and the name service for the rest, all of them side by side and not longer
//! than a bound. Must never connect to a host.

use super::machines::Host;
use crate::nix_here;
use nix_offload_proxy::settings;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::net::{IpAddr, ToSocketAddrs};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Lookups at the same time. They wait, and do no work.
const LOOKUPS: usize = 64;
/// Processes of ssh at the same time. They work, and do not wait.
const PROCESSES: usize = 8;
/// How long ssh may take to say what holds for all hosts.
const FIRST_BOUND: Duration = Duration::from_secs(5);
/// How long it may take to end those that took too long: none is to outlive us.
const END_BOUND: Duration = Duration::from_millis(500);
/// A name that no block of ssh_config is for, unless it is for all.
const NOBODY: &str = "nix-offload-check.invalid";
/// ssh's words before a file's name, at its first level of verbosity (`read_config_file_depth` in readconf.c).
const READING: &str = "Reading configuration data ";
/// The port of ssh where none is set.
const SSH_PORT: u16 = 22;

/// What is known of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing is wrong with it, or it is found by others, as behind a jump host.
    Well,
    /// It is this very machine, by that name or address.
    Here(String),
    /// No name service knows the name.
    Unknown(String),
    /// Nobody answered, or not in time.
    NoAnswer,
    /// ssh did not say in time what its configuration makes of it.
    NotAsked,
}

/// What is known of all hosts.
#[derive(Debug, Default)]
pub(super) struct LookedUp {
    /// Of each of them.
    pub(super) found: BTreeMap<Host, Found>,
    /// Why ssh itself cannot be used.
    pub(super) trouble: Option<String>,
}

/// Where ssh would connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    name: String,
    port: u16,
    /// Somebody else connects: a ProxyCommand, a jump host.
    by_others: bool,
    /// What ssh_config says is not known.
    not_asked: bool,
}

/// Looks all hosts up. `options` are further words for ssh, `bound` is for all names together.
pub(super) fn look_up(hosts: &BTreeSet<Host>, options: &[String], bound: Duration) -> LookedUp {
    if hosts.is_empty() {
        return LookedUp::default();
    }
    let hosts: Vec<Host> = hosts.iter().cloned().collect();
    let (targets, trouble) = match targets(&hosts, options, bound) {
        Ok(targets) => (targets, None),
        Err(trouble) => (hosts.iter().map(plain).collect(), Some(trouble)),
    };
    let own = own_addresses();
    let own_name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let names: BTreeSet<String> = targets
        .iter()
        .filter(|target| !target.by_others && target.name.parse::<IpAddr>().is_err())
        .map(|target| target.name.clone())
        .collect();
    let deadline = Instant::now() + bound;
    let addresses = side_by_side(names.into_iter().collect(), LOOKUPS, deadline, |name: &String| {
        (name.as_str(), SSH_PORT)
            .to_socket_addrs()
            .map(|found| found.map(|address| address.ip()).collect::<Vec<_>>())
            .map_err(|error| error.to_string())
    });
    let found = targets.iter().map(|target| {
        if target.by_others {
            return if target.not_asked { Found::NotAsked } else { Found::Well };
        }
        // Another port is that of a tunnel or of a machine within this one.
        let is_here =
            |address: &IpAddr| target.port == SSH_PORT && (address.is_loopback() || own.contains(address));
        if let Ok(address) = target.name.parse::<IpAddr>() {
            return if is_here(&address) { Found::Here(address.to_string()) } else { Found::Well };
        }
        if target.port == SSH_PORT && target.name.eq_ignore_ascii_case(own_name.trim()) {
            return Found::Here(target.name.clone());
        }
        match addresses.get(&target.name) {
            None => Found::NoAnswer,
            // So the C library calls it when no name server answers (EAI_AGAIN).
            Some(Err(error))
                if ["Temporary failure", "Try again"].iter().any(|words| error.contains(words)) =>
            {
                Found::NoAnswer
            }
            Some(Err(error)) => Found::Unknown(error.clone()),
            Some(Ok(addresses)) => addresses
                .iter()
                .find(|address| is_here(address))
                .map_or(Found::Well, |a| Found::Here(a.to_string())),
        }
    });
    let found: Vec<Found> = found.collect();
    LookedUp { found: hosts.into_iter().zip(found).collect(), trouble }
}

/// As the URI says.
fn plain(host: &Host) -> Target {
    Target {
        name: host.name().to_owned(),
        port: host.port.unwrap_or(SSH_PORT),
        by_others: false,
        not_asked: false,
    }
}

/// Where ssh would connect to for each host. ssh is asked for those that a block of its configuration may be for, and
/// once for all others.
fn targets(hosts: &[Host], options: &[String], bound: Duration) -> Result<Vec<Target>, String> {
    let nobody = Host { destination: NOBODY.into(), port: None };
    let (default, patterns) = ask_ssh(&nobody, options, Instant::now() + FIRST_BOUND)?;
    let deadline = Instant::now() + bound;
    let is_special = |host: &&Host| {
        let name = host.name();
        default.name != NOBODY
            || patterns.as_ref().is_none_or(|patterns| patterns.iter().any(|p| settings::matches(p, name)))
    };
    let special: Vec<Host> = hosts.iter().filter(is_special).cloned().collect();
    let options = options.to_vec();
    let asked = side_by_side(special, PROCESSES, deadline + END_BOUND, move |host| {
        ask_ssh(host, &options, deadline).map(|(target, _)| target)
    });
    let target = |host: &Host| match asked.get(host) {
        Some(Ok(target)) => target.clone(),
        // Its block is there, and what it says is not known.
        _ if is_special(&host) => Target { by_others: true, not_asked: true, ..plain(host) },
        _ => Target { by_others: default.by_others, port: host.port.unwrap_or(default.port), ..plain(host) },
    };
    Ok(hosts.iter().map(target).collect())
}

/// What ssh makes of a host, and the names that blocks of its configuration are for: none if it has conditions that only
/// ssh can judge.
fn ask_ssh(
    host: &Host,
    options: &[String],
    deadline: Instant,
) -> Result<(Target, Option<Vec<String>>), String> {
    let mut ssh = Command::new("ssh");
    ssh.args(["-v", "-G", "-oBatchMode=yes"]).args(options);
    if let Some(port) = host.port {
        ssh.args(["-p", &port.to_string()]);
    }
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err("there is no time left".into());
    }
    let answer = nix_here::run(ssh.args(["--", &host.destination]).current_dir("/"), left);
    let answer = answer.map_err(|error| format!("cannot run 'ssh -G {}': {error}", host.destination))?;
    if !answer.status.success() {
        let said =
            answer.stderr.lines().filter(|line| !line.starts_with("debug") && !line.starts_with("OpenSSH"));
        let said = said.map(str::trim).collect::<Vec<_>>().join(" ");
        return Err(format!("'ssh -G {}' ended with {}: {said}", host.destination, answer.status));
    }
    let value =
        |name: &str| answer.stdout.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let is_set = |name: &str| value(name).is_some_and(|value| value != "none");
    let target = Target {
        name: value("hostname").unwrap_or(host.name()).to_owned(),
        port: value("port").and_then(|port| port.parse().ok()).unwrap_or(SSH_PORT),
        by_others: is_set("proxycommand") || is_set("proxyjump"),
        not_asked: false,
    };
    let files = answer.stderr.lines().filter_map(|line| Some(line.split_once(READING)?.1.trim()));
    let texts: Vec<String> = files.filter_map(|file| fs::read_to_string(file).ok()).collect();
    Ok((target, patterns(&texts)))
}

/// The names in `Host` lines, but `*`. None if there is a `Match` line.
fn patterns(texts: &[String]) -> Option<Vec<String>> {
    let mut found = Vec::new();
    for line in texts.iter().flat_map(|text| text.lines()) {
        let mut words = line.split(|c: char| c.is_whitespace() || c == '=').filter(|word| !word.is_empty());
        match words.next().map(str::to_ascii_lowercase).as_deref() {
            Some("match") => return None,
            Some("host") => found.extend(words.map(|word| word.trim_matches(['!', '"']).to_owned())),
            _ => {}
        }
    }
    found.retain(|pattern| pattern != "*");
    Some(found)
}

fn own_addresses() -> BTreeSet<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
        })
        .collect()
}

/// Does the same for all, `most` at a time. What is not done at the deadline is missing, and goes on in the
/// background.
fn side_by_side<K, V>(
    keys: Vec<K>,
    most: usize,
    deadline: Instant,
    work: impl Fn(&K) -> V + Send + Sync + 'static,
) -> BTreeMap<K, V>
where
    K: Ord + Send + 'static,
    V: Send + 'static,
{
    let (wanted, threads) = (keys.len(), keys.len().min(most));
    let queue = Arc::new(Mutex::new(VecDeque::from(keys)));
    let work = Arc::new(work);
    let (done, results) = mpsc::channel();
    for _ in 0..threads {
        let (queue, work, done) = (Arc::clone(&queue), Arc::clone(&work), done.clone());
        thread::spawn(move || {
            loop {
                let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some(key) = next else { break };
                let value = work(&key);
                if done.send((key, value)).is_err() {
                    break;
                }
            }
        });
    }
    let mut found = BTreeMap::new();
    while found.len() < wanted {
        match results.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((key, value)) => found.insert(key, value),
            Err(_) => break,
        };
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_is_left_out() {
        let deadline = Instant::now() + Duration::from_millis(300);
        let found = side_by_side(vec![1, 2, 60_000], 3, deadline, |wait| {
            thread::sleep(Duration::from_millis(*wait));
            wait * 2
        });
        assert_eq!(found, BTreeMap::from([(1, 2), (2, 4)]));
        assert!(Instant::now() < deadline + Duration::from_secs(20));
    }

    #[test]
    fn names_that_blocks_of_ssh_config_are_for() {
        let text = "Host a *.farm\n  HostName x\n# Host no\nhost=\"b\" !c\nHost *\n User me\n".to_owned();
        assert_eq!(patterns(std::slice::from_ref(&text)).unwrap(), ["a", "*.farm", "b", "c"]);
        assert_eq!(patterns(&[text, "  Match user me\n".into()]), None);
    }
}
