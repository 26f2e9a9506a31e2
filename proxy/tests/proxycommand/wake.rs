//! Hosts that are down and woken by a command of offload.toml, which here starts their sshd.

use std::{
    collections::HashSet,
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

use crate::world::{Said, World, free_port, wait_until};

/// A port where nobody listens until the host is woken.
struct Sleeper<'a> {
    world: &'a World,
    port: u16,
}

impl<'a> Sleeper<'a> {
    /// Among the hosts behind the bastion, or outside. `name` is that of its block in offload.toml.
    fn new(world: &'a World, name: &str, behind: bool) -> Self {
        let sleeper = Sleeper { world, port: free_port() };
        let path = |name: &str| world.path(name).display().to_string();
        let enter = if behind { world.enter() } else { String::new() };
        let address = if behind { "127.0.0.2" } else { "127.0.0.1" };
        // Late enough for all to wait, however slowly they are started.
        sleeper.wake_with(
            name,
            60,
            &format!(
                "echo $NIX_OFFLOAD_HOST >>{0}\nuntil [ -e {1} ]; do sleep 0.05; done\n\
                 exec {enter} /usr/sbin/sshd -f {2} -p {3} -o ListenAddress={address} -o PidFile={4} -E {5}",
                path("runs"),
                path("go"),
                path("bastion.conf"),
                sleeper.port,
                path("woken.pid"),
                path("woken.log"),
            ),
        );
        sleeper
    }

    /// With another command, which leaves it asleep.
    fn deep(world: &'a World, name: &str, seconds: u32, script: &str) -> Self {
        let sleeper = Sleeper { world, port: free_port() };
        sleeper.wake_with(name, seconds, script);
        sleeper
    }

    fn wake_with(&self, name: &str, seconds: u32, script: &str) {
        let command = self.world.path("wake");
        fs::write(&command, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&command, fs::Permissions::from_mode(0o755)).unwrap();
        let command = command.display();
        let text = format!("[[host]]\nname = '{name}'\nwake = '{command}'\nwake-timeout = '{seconds}s'\n");
        fs::write(self.world.path("offload.toml"), text).unwrap();
    }

    fn set<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        let file = self.world.path("offload.toml");
        command.env("NIX_OFFLOAD_CONFIG", file).stdout(Stdio::piped()).stderr(Stdio::piped())
    }

    fn ssh(&self, host: &str) -> Child {
        self.set(self.world.client("ssh").args([host, "echo there"])).spawn().unwrap()
    }

    fn proxy(&self, words: &[&str]) -> Child {
        self.set(self.world.proxy().args(words)).spawn().unwrap()
    }

    fn proxy_says(&self, words: &[&str]) -> Said {
        said(self.proxy(words))
    }

    /// As a ProxyCommand for a host outside.
    fn direct(&self) -> Said {
        self.proxy_says(&["127.0.0.1", &self.port.to_string()])
    }

    /// The hosts that the command was run for.
    fn runs(&self) -> String {
        fs::read_to_string(self.world.path("runs")).unwrap_or_default()
    }

    /// Somebody has tried again and again: each attempt in vain is noted anew.
    fn is_waited_for(&self) {
        let mut notes = HashSet::new();
        wait_until("attempts in vain are noted", || {
            let files =
                fs::read_dir(self.world.pool.directory().join("down")).into_iter().flatten().flatten();
            let down = files.filter(|file| file.path().extension().is_some_and(|e| e == "down"));
            notes.extend(down.filter_map(|file| fs::read(file.path()).ok()));
            notes.len() > 2
        });
    }

    fn wakes_up(&self) {
        fs::write(self.world.path("go"), "").unwrap();
    }

    /// All of them get through after it has woken up, and the command ran once, for this host.
    fn assert_all_there(&self, all: Vec<Child>, host: &str) {
        wait_until("the command runs", || !self.runs().is_empty());
        // Some are waiting now, and none has given up.
        self.is_waited_for();
        self.wakes_up();
        for one in all {
            let said = said(one);
            assert!(said.code == Some(0) && said.out == "there\n", "{said:?}");
        }
        assert_eq!(self.runs(), format!("{host}\n"));
    }
}

impl Drop for Sleeper<'_> {
    fn drop(&mut self) {
        self.wakes_up();
        let pid = fs::read_to_string(self.world.path("woken.pid")).unwrap_or_default();
        if let Ok(pid) = pid.trim().parse() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn said(child: Child) -> Said {
    child.wait_with_output().unwrap().into()
}

#[test]
fn ten_at_once_wake_a_host_behind_the_bastion_once() {
    let world = World::new();
    let sleeper = Sleeper::new(&world, "127.0.0.2", true);
    world.write_client_config(&format!("Host host2 fd2\n Port {}\n", sleeper.port));
    let all = (0..10).map(|number| sleeper.ssh(["host2", "fd2"][number % 2])).collect();
    sleeper.assert_all_there(all, "127.0.0.2");
    assert_eq!(world.bastion_logins(), 1);
    wait_until("no process stays", || world.proxies() == 0);
}

#[test]
fn ten_at_once_wake_a_host_without_bastion_once() {
    let world = World::new();
    let sleeper = Sleeper::new(&world, "127.0.0.?", false);
    world.write_client_config(&format!("Host direct fddirect\n Port {}\n", sleeper.port));
    let all = (0..10).map(|number| sleeper.ssh(["direct", "fddirect"][number % 2])).collect();
    sleeper.assert_all_there(all, "127.0.0.1");
}

#[test]
fn ten_at_once_wake_the_bastion_itself_once() {
    let world = World::new();
    let sleeper = Sleeper::new(&world, "bastion", false);
    let proxy = world.proxy_command("--via bastion");
    world.write_client_config(&format!(
        "Host bastion\n HostName 127.0.0.1\n Port {}\n\
         Host behind fdbehind\n HostName 127.0.0.1\n Port {}\n\
         Host behind\n ProxyCommand {proxy} %h %p\n\
         Host fdbehind\n ProxyCommand {proxy} --fdpass %h %p\n ProxyUseFdpass yes\n",
        sleeper.port, world.bastion_port
    ));
    let all = (0..10).map(|number| sleeper.ssh(["behind", "fdbehind"][number % 2])).collect();
    sleeper.assert_all_there(all, "bastion");
    let logins = crate::world::logins(&world.path("woken.log"));
    assert_eq!(logins, 1, "one master for all");
}

#[test]
fn check_and_start_wait_for_a_host_that_is_being_woken() {
    for action in ["check", "start"] {
        let world = World::new();
        let sleeper = Sleeper::new(&world, "plain", false);
        world.write_client_config(&format!("Host plain\n HostName 127.0.0.1\n Port {}\n", sleeper.port));
        let config = world.path("ssh_config").display().to_string();
        let waiting = sleeper.proxy(&[action, "-F", &config, "plain"]);
        wait_until("the command runs", || !sleeper.runs().is_empty());
        sleeper.is_waited_for();
        sleeper.wakes_up();
        let said = said(waiting);
        assert_eq!(said.code, Some(0), "{action}: {said:?}");
        assert_eq!(sleeper.runs(), "plain\n", "{action}");
        world.pool.stop(&world.master("plain")).unwrap();
    }
}

#[test]
fn a_command_that_fails_is_told_to_all_who_wait() {
    let world = World::new();
    let go = world.path("go").display().to_string();
    let script = format!("until [ -e {go} ]; do sleep 0.05; done\necho no such card >&2\nexit 3");
    let sleeper = Sleeper::deep(&world, "127.0.0.1", 60, &script);
    let port = sleeper.port.to_string();
    let all: Vec<Child> = (0..5).map(|_| sleeper.proxy(&["127.0.0.1", &port])).collect();
    sleeper.is_waited_for();
    sleeper.wakes_up();
    let begin = Instant::now();
    let mut all: Vec<Said> = all.into_iter().map(said).collect();
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    all.push(sleeper.direct());
    let command = world.path("wake").display().to_string();
    for said in all {
        assert_eq!(said.code, Some(78), "{said:?}");
        let error =
            format!("error: cannot wake 127.0.0.1: `{command}` failed with status 3: no such card\nhint: ");
        assert!(said.err.starts_with(&error) && said.err.contains("offload.toml"), "{said:?}");
    }
    // Once corrected, it is not held against the host.
    let script = format!("echo $NIX_OFFLOAD_HOST >>{}", world.path("runs").display());
    fs::write(world.path("wake"), format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::write(
        world.path("offload.toml"),
        format!("[[host]]\nname = '127.0.0.1'\nwake = 'exec {command}'\nwake-timeout = 1\n"),
    )
    .unwrap();
    wait_until("the new command runs", || {
        let said = sleeper.direct();
        assert!(!said.err.contains("no such card"), "{said:?}");
        !sleeper.runs().is_empty()
    });
}

#[test]
fn a_host_that_does_not_wake_up_fails_when_its_time_is_over_and_is_then_known_to_be_down() {
    let world = World::new();
    let runs = world.path("runs").display().to_string();
    let sleeper = Sleeper::deep(&world, "*", 2, &format!("echo $NIX_OFFLOAD_HOST >>{runs}"));
    let port = sleeper.port.to_string();
    let begin = Instant::now();
    let all: Vec<Child> = (0..5).map(|_| sleeper.proxy(&["127.0.0.1", &port])).collect();
    for said in all.into_iter().map(said) {
        assert!(begin.elapsed() >= Duration::from_secs(2), "{said:?}");
        assert!(begin.elapsed() < Duration::from_secs(12), "{:?}", begin.elapsed());
        assert!(said.code == Some(69) && said.err.contains("Connection refused"), "{said:?}");
    }
    let again = sleeper.direct();
    assert_eq!(again.code, Some(75), "{again:?}");
    assert!(again.err.contains("is not tried again before") && again.err.contains("refused"), "{again:?}");
    assert_eq!(sleeper.runs(), "127.0.0.1\n");
}

#[test]
fn a_master_to_a_host_that_does_not_wake_up_fails_when_its_time_is_over() {
    for action in ["check", "start"] {
        let world = World::new();
        let runs = world.path("runs").display().to_string();
        let sleeper = Sleeper::deep(&world, "plain", 2, &format!("echo $NIX_OFFLOAD_HOST >>{runs}"));
        world.write_client_config(&format!("Host plain\n HostName 127.0.0.1\n Port {}\n", sleeper.port));
        let config = world.path("ssh_config").display().to_string();
        let begin = Instant::now();
        let said = sleeper.proxy_says(&[action, "-F", &config, "plain"]);
        assert!(begin.elapsed() >= Duration::from_secs(2), "{said:?}");
        assert!(begin.elapsed() < Duration::from_secs(12), "{:?}", begin.elapsed());
        assert_eq!(said.code, Some(69), "{said:?}");
        assert!(said.err.contains("cannot connect to plain: connection refused"), "{said:?}");
        assert_eq!(sleeper.runs(), "plain\n", "{action}");
        let behind = ["-F", &config, "--via", "plain", "127.0.0.2", "22"];
        let again = sleeper.proxy_says(&behind);
        assert!(again.code == Some(75) && again.err.contains("is not tried again before"), "{again:?}");
    }
}

#[test]
fn the_command_outlives_the_process_that_started_it() {
    let world = World::new();
    let sleeper = Sleeper::new(&world, "127.0.0.1", false);
    world.write_client_config(&format!("Host direct\n Port {}\n", sleeper.port));
    let mut first = world.proxy();
    sleeper.set(first.args(["127.0.0.1", &sleeper.port.to_string()])).process_group(0);
    let mut first = first.spawn().unwrap();
    wait_until("the command runs", || !sleeper.runs().is_empty());
    // With all of its group, as a terminal and Nix do it.
    killpg(Pid::from_raw(first.id().try_into().unwrap()), Signal::SIGKILL).unwrap();
    first.wait().unwrap();
    sleeper.wakes_up();
    wait_until("it has done its work", || world.path("woken.pid").exists());
    assert_eq!(said(sleeper.ssh("direct")).out, "there\n");
    assert_eq!(sleeper.runs(), "127.0.0.1\n");
    // The time of the last waking is not over, but it was well since: it may be woken again.
    let pid = fs::read_to_string(world.path("woken.pid")).unwrap().trim().parse().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait_until("it sleeps", || std::net::TcpStream::connect(("127.0.0.1", sleeper.port)).is_err());
    assert_eq!(said(sleeper.ssh("direct")).out, "there\n");
    assert_eq!(sleeper.runs(), "127.0.0.1\n127.0.0.1\n");
}
