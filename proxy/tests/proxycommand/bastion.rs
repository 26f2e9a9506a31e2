//! ssh to hosts that only the bastion can reach.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Child, Stdio},
    thread,
    time::Instant,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::world::{BOUND, World, wait_until};

pub(crate) fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

#[test]
fn three_hosts_cost_one_login_at_the_bastion() {
    let world = World::new();
    for host in ["host2", "host3", "host4", "fd2", "fd3", "fd4"] {
        let said = world.ssh(host, "echo $SSH_CONNECTION");
        let address = format!("127.0.0.{}", &host[host.len() - 1..]);
        assert!(said.code == Some(0) && said.out.contains(&address), "{host}: {said:?}");
    }
    assert_eq!(world.bastion_logins(), 1);
    let direct = world.proxy_says(&["127.0.0.2", &world.port.to_string()]);
    assert!(direct.code == Some(69) && direct.err.contains("Connection refused"), "{direct:?}");
    wait_until("no process stays", || world.proxies() == 0);
}

#[test]
fn fifty_at_once_cost_one_login_at_the_bastion() {
    let world = World::new();
    let start = |number: usize| {
        let host = ["host2", "fd3", "host4"][number % 3];
        let mut ssh = world.client("ssh");
        ssh.args([host, "echo", &number.to_string()]).stdout(Stdio::piped()).stderr(Stdio::piped());
        ssh.spawn().unwrap()
    };
    let begin = Instant::now();
    let all: Vec<Child> = (0..50).map(start).collect();
    for (number, ssh) in all.into_iter().enumerate() {
        let output = ssh.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{number}: {err}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{number}\n"));
    }
    println!("50 logins behind the bastion in {:?}", begin.elapsed());
    assert_eq!(world.bastion_logins(), 1);
}

#[test]
fn with_fdpass_no_process_stays_and_the_end_of_the_host_is_seen() {
    let world = World::new();
    for (host, stays) in [("fd2", 0), ("fddirect", 0), ("host2", 1)] {
        let mut ssh = world
            .client("ssh")
            .args([host, "echo $PPID; cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(ssh.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        wait_until("only those stay that must", || world.proxies() == stays);
        // The far sshd ends without a word; ssh must see the end of the connection. No process namespace is
        // between us and it.
        signal(line.trim().parse().unwrap(), Signal::SIGKILL);
        assert_eq!(ssh.wait().unwrap().code(), Some(255), "{host}");
    }
    wait_until("nothing stays", || world.proxies() == 0);
}

#[test]
fn nothing_is_left_behind_in_the_runtime_directory() {
    let world = World::new();
    for host in ["host2", "fd2"] {
        assert_eq!(world.ssh(host, "true").code, Some(0));
    }
    assert_eq!(world.proxy_says(&["stop", "bastion"]).code, Some(0));
    let left: Vec<_> =
        fs::read_dir(world.pool.directory()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let may_stay = |path: &PathBuf| path.extension().is_some_and(|e| e == "log" || e == "pace");
    assert!(left.iter().all(may_stay), "{left:?}");
}

#[test]
fn a_master_can_be_started_through_the_bastion() {
    let world = World::new();
    let port = world.port;
    for host in ["host3", "fd3"] {
        let master = world.pool.start(&world.endpoint(host), BOUND, "echo there").unwrap();
        assert_eq!(master.first_output().as_deref(), Some("there"));
        master.open_session("true", BOUND).unwrap();
    }
    assert_eq!(world.bastion_logins(), 1);
    // The host itself is now a way to it, too, for those who name it as the master was named. Nobody else is.
    let alias = world.proxy_says(&["127.0.0.4", &port.to_string()]);
    assert_eq!(alias.code, Some(69), "{alias:?}");
    let mut by_address = world.endpoint("127.0.0.4");
    by_address.port = Some(port);
    world.pool.start(&by_address, BOUND, "true").unwrap();
    let said = world.proxy_says(&["127.0.0.4", &port.to_string()]);
    assert!(said.code == Some(0) && said.out.starts_with("SSH-2.0-"), "{said:?}");
    assert_eq!(world.bastion_logins(), 1);
}

#[test]
fn a_bastion_behind_itself_is_reached_directly() {
    let world = World::new();
    // What people write: a ProxyCommand for all hosts, the bastion among them.
    world.write_client_config(&format!(
        "Host *\n ProxyCommand {} %h %p\n",
        world.proxy_command("--via bastion")
    ));
    let begin = Instant::now();
    assert_eq!(world.ssh("host2", "echo hi").out, "hi\n");
    assert_eq!(world.bastion_logins(), 1);
    // Through the bastion to the bastion is no circle either: its own address, seen from there, is refused.
    let master = world.pool.start(&world.endpoint("bastion"), BOUND, "true").unwrap();
    assert_eq!(master.destination(), "bastion");
    assert!(begin.elapsed() < BOUND);
    assert_eq!(world.bastion_logins(), 1);
}

#[test]
fn two_bastions_that_name_each_other_end_in_a_direct_connection() {
    let world = World::new();
    let (one, two) = (world.proxy_command("--via other"), world.proxy_command("--via bastion"));
    world.write_client_config(&format!(
        "Host bastion\n ProxyCommand {one} %h %p\nHost other\n HostName 127.0.0.3\n ProxyCommand {two} %h %p\n"
    ));
    // bastion <- other <- bastion: the inner bastion is the one being started, so TCP, which is refused for
    // `other`. Nobody waits for anybody.
    let begin = Instant::now();
    let said = world.ssh("host2", "true");
    assert_ne!(said.code, Some(0));
    assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
}

#[test]
fn why_a_master_did_not_start_through_us_is_told() {
    let world = World::new();
    let closed = world.proxy_command("--via bastion");
    world.write_client_config(&format!("Host gone\n HostName 127.0.0.9\n ProxyCommand {closed} %h %p\n"));
    let error = world.pool.start(&world.endpoint("gone"), BOUND, "true").unwrap_err();
    let (line, cure) = (error.to_string(), error.cure().unwrap());
    assert!(line.contains("cannot connect to 127.0.0.9") && line.contains("through bastion"), "{line}");
    assert!(cure.contains("check on bastion that 127.0.0.9 can be reached"), "{cure}");
    assert!(world.pool.start(&world.endpoint("gone"), BOUND, "true").unwrap_err().is_temporary());
}

#[test]
fn a_master_that_hangs_or_died_is_replaced_on_the_way() {
    let world = World::new();
    assert_eq!(world.ssh("host2", "true").code, Some(0));
    for (count, number) in [(2, Signal::SIGSTOP), (3, Signal::SIGKILL)] {
        signal(world.master("bastion").pid, number);
        let begin = Instant::now();
        let said = world.ssh(["host2", "fd3"][count % 2], "echo hi");
        assert_eq!(said.out, "hi\n", "{said:?}");
        println!("replaced after {number} in {:?}", begin.elapsed());
        assert_eq!(world.bastion_logins(), count);
    }
}

#[test]
fn a_dead_link_is_noticed_and_replaced() {
    let world = World::new();
    assert_eq!(world.ssh("host2", "true").code, Some(0));
    // The far side of the master's connection stands still: it answers nothing, like a link without packets.
    let stopped = world.bastion_processes();
    stopped.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
    let mut words = world.via();
    words.extend(["--timeout".into(), "2".into(), "127.0.0.2".into(), world.port.to_string()]);
    let begin = Instant::now();
    let said: crate::world::Said = world.proxy().args(&words).output().unwrap().into();
    println!("a dead link replaced in {:?}", begin.elapsed());
    stopped.iter().for_each(|pid| signal(*pid, Signal::SIGKILL));
    assert!(said.code == Some(0) && said.out.starts_with("SSH-2.0-"), "{said:?}");
    assert_eq!(world.bastion_logins(), 2);
}

#[test]
fn a_dead_master_to_the_host_itself_gets_nothing_of_the_stream() {
    let world = World::new();
    assert_eq!(world.ssh("host2", "true").code, Some(0));
    let mut itself = world.endpoint("127.0.0.1");
    itself.port = Some(world.bastion_port);
    world.pool.start(&itself, BOUND, "true").unwrap();
    assert!(world.pool.live_to("127.0.0.1", world.bastion_port).is_some());
    let stopped = world.bastion_processes();
    stopped.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
    let port = world.bastion_port.to_string();
    let mut proxy = world
        .proxy()
        .args(["--timeout", "2", "127.0.0.1", &port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // What is written while the master still has the descriptors must reach the host, all of it.
    proxy.stdin.take().unwrap().write_all(b"no ssh\r\n").unwrap();
    let output = proxy.wait_with_output().unwrap();
    stopped.iter().for_each(|pid| signal(*pid, Signal::SIGCONT));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("SSH-2.0-") && text.contains("Invalid SSH identification string"), "{text}");
    assert!(world.pool.live(&itself).is_some(), "nobody asked for it, so nobody ended it");
}

#[test]
fn a_master_that_ends_in_the_middle_is_an_error() {
    let world = World::new();
    let mut proxy = world
        .proxy()
        .args(world.via())
        .args(["127.0.0.2", &world.port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut banner = [0; 8];
    proxy.stdout.as_mut().unwrap().read_exact(&mut banner).unwrap();
    assert_eq!(&banner, b"SSH-2.0-");
    signal(world.master("bastion").pid, Signal::SIGKILL);
    let output = proxy.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{err}");
    assert!(err.contains("because the SSH master to bastion ended"), "{err}");
}

#[test]
fn a_killed_stream_is_closed_at_the_host() {
    let world = World::new();
    let mut proxy = world
        .proxy()
        .args(world.via())
        .args(["127.0.0.2", &world.port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    proxy.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    signal(proxy.id(), Signal::SIGKILL);
    proxy.wait().unwrap();
    let log = || fs::read_to_string(world.path("host2.log")).unwrap();
    // The pipes are still open here: it is the kill that counts.
    wait_until("the host sees the end", || log().contains("Connection closed by"));
    assert_eq!(world.ssh("host2", "true").code, Some(0));
    assert_eq!(world.bastion_logins(), 1);
}

#[test]
fn an_idle_stream_does_nothing() {
    let world = World::new();
    let port = world.port.to_string();
    let bastion_port = &world.bastion_port.to_string();
    for (via, host, port) in [(true, "127.0.0.2", &*port), (false, "127.0.0.1", bastion_port)] {
        let mut command = world.proxy();
        if via {
            command.args(world.via());
        }
        let mut proxy =
            command.args([host, port]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut banner = [0; 8];
        proxy.stdout.as_mut().unwrap().read_exact(&mut banner).unwrap();
        let status = |task: &str| {
            let text = fs::read_to_string(format!("/proc/{}/task/{task}/status", proxy.id())).unwrap();
            let switches = text.lines().filter(|line| line.contains("ctxt_switches"));
            (text.contains("S (sleeping)"), switches.map(str::to_owned).collect::<Vec<_>>())
        };
        let tasks: Vec<String> = fs::read_dir(format!("/proc/{}/task", proxy.id()))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        wait_until("it sleeps", || tasks.iter().all(|task| status(task).0));
        let before: Vec<_> = tasks.iter().map(|task| status(task)).collect();
        // Time passes, with work of others.
        assert_eq!(world.ssh("host3", "true").code, Some(0));
        let after: Vec<_> = tasks.iter().map(|task| status(task)).collect();
        assert_eq!(before, after);
        drop(proxy.stdin.take());
        assert_eq!(proxy.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn input_that_ends_early_is_answered_in_full() {
    let world = World::new();
    let len = 300_000;
    crate::world::pattern_file(&world.path("in"), len);
    let input = fs::read(world.path("in")).unwrap();
    for host in ["host2", "fd2", "direct", "fddirect"] {
        let mut ssh = world
            .client("ssh")
            .args([host, "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = ssh.stdin.take().unwrap();
        let bytes = input.clone();
        let writer = thread::spawn(move || stdin.write_all(&bytes).unwrap());
        let output = ssh.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.status.success() && output.stdout == input, "{host}");
    }
}
