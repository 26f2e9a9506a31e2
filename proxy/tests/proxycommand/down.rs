//! Hosts that are down: how they fail, and how fast the second time.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

use crate::world::{BOUND, World, free_port, wait_until};

/// An address that swallows connections, and what keeps it so.
fn black_hole() -> (u16, TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queue = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        queue.push(stream);
    }
    (address.port(), listener, queue)
}

#[test]
fn a_silent_host_costs_its_time_only_once() {
    let world = World::new();
    let (port, _listener, _queue) = black_hole();
    let port = port.to_string();
    let words = ["--timeout", "1", "127.0.0.1", &port];
    let begin = Instant::now();
    let first = world.proxy_says(&words);
    assert!(begin.elapsed() >= Duration::from_millis(900), "{first:?}");
    assert_eq!(first.code, Some(69), "{first:?}");
    assert!(first.err.starts_with(&format!("error: cannot connect to 127.0.0.1 port {port}: ")), "{first:?}");
    assert!(first.err.contains("\nhint: check that 127.0.0.1 is up"), "{first:?}");

    // Whoever would wait for longer is told at once, too.
    let begin = Instant::now();
    let second = world.proxy_says(&["--timeout", "60", "127.0.0.1", &port]);
    println!("the second time in {:?}: {}", begin.elapsed(), second.err);
    assert!(begin.elapsed() < Duration::from_secs(20), "{second:?}");
    assert_eq!(second.code, Some(75), "{second:?}");
    for part in ["is not tried again before", "UTC (in ", "because it failed: cannot connect", "--wait"] {
        assert!(second.err.contains(part), "no {part}: {}", second.err);
    }
    // Another port is another matter.
    assert_eq!(world.proxy_says(&["127.0.0.1", &free_port().to_string()]).code, Some(69));
}

#[test]
fn waiting_ends_with_the_reason() {
    let world = World::new();
    let port = free_port().to_string();
    let begin = Instant::now();
    let said = world.proxy_says(&["--wait=2", "127.0.0.1", &port]);
    assert!(begin.elapsed() >= Duration::from_secs(2));
    assert!(said.code == Some(69) && said.err.contains("Connection refused"), "{said:?}");
}

#[test]
fn a_host_that_the_bastion_cannot_reach_is_named_and_remembered() {
    let world = World::new();
    let mut words = world.via();
    words.extend(["127.0.0.9".into(), world.port.to_string()]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let first = world.proxy_says(&words);
    assert_eq!(first.code, Some(69), "{first:?}");
    assert!(first.err.contains("through bastion: the far side refused"), "{first:?}");
    assert!(first.err.contains("hint: check on bastion that 127.0.0.9 can be reached"), "{first:?}");
    let second = world.proxy_says(&words);
    assert!(
        second.code == Some(75) && second.err.contains("through bastion is not tried again"),
        "{second:?}"
    );
    // ssh shows it.
    let third = world.ssh("host2", "true");
    assert_eq!(third.code, Some(0), "{third:?}");
    let shown = world.client("ssh").args(["-o", "HostName=127.0.0.9", "host2", "true"]).output().unwrap();
    let shown = String::from_utf8_lossy(&shown.stderr).into_owned();
    assert!(shown.contains("error: 127.0.0.9 port ") && shown.contains("hint: "), "{shown}");
}

#[test]
fn a_bastion_that_is_down_fails_fast_for_every_host_behind_it() {
    let world = World::new();
    world.write_client_config("Host bastion\n HostName 127.0.0.1\n Port 1\n");
    let first = world.ssh("host2", "true");
    assert!(first.err.contains("cannot connect to bastion: connection refused"), "{first:?}");
    // What somebody may be mending is tried each time.
    world.write_client_config("Host bastion\n NoSuchWord yes\n");
    for _ in 0..2 {
        let config = world.path("ssh_config").display().to_string();
        let said = world.proxy_says(&["-F", &config, "--via", "other", "127.0.0.2", "22"]);
        assert!(said.code == Some(78) && said.err.contains("Bad configuration option"), "{said:?}");
    }
    world.write_client_config("Host bastion\n HostName 127.0.0.1\n Port 1\n");
    for host in ["host3", "fd4"] {
        let begin = Instant::now();
        let said = world.ssh(host, "true");
        assert!(said.err.contains("bastion is not tried again before"), "{said:?}");
        println!("{host} failed in {:?}", begin.elapsed());
    }
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The pauses of all that is noted to be down grow to minutes, as after many failures.
fn lengthen_pauses(world: &World) -> usize {
    let next = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + Duration::from_secs(200);
    let notes = fs::read_dir(world.pool.directory().join("down")).unwrap().map(|entry| entry.unwrap().path());
    let notes: Vec<_> = notes.filter(|path| path.extension().is_some_and(|e| e == "down")).collect();
    for note in &notes {
        let mut down: Value = serde_json::from_slice(&fs::read(note).unwrap()).unwrap();
        down["next"] = next.as_secs_f64().into();
        fs::write(note, down.to_string()).unwrap();
    }
    notes.len()
}

/// Its starter has a memory of its own, by which it was its turn.
#[test]
fn what_a_proxy_command_remembers_does_not_hold_up_the_start_of_a_master() {
    let world = World::new();
    let proxy = world.proxy_command("--via bastion");
    world.write_client_config(&format!("Host late\n HostName 127.0.0.9\n ProxyCommand {proxy} %h %p\n"));
    let late = world.endpoint("late");
    let error = world.pool.start(&late, BOUND, "true").unwrap_err();
    assert!(error.to_string().contains("the far side refused"), "{error}");
    // The master, and the way of its ProxyCommand.
    assert_eq!(lengthen_pauses(&world), 2);
    let mut words: Vec<String> = world.enter().split(' ').map(String::from).collect();
    words.extend(["/usr/sbin/sshd", "-D", "-e", "-o", "ListenAddress=127.0.0.9", "-p"].map(String::from));
    words.extend([world.port.to_string(), "-f".into(), world.path("bastion.conf").display().to_string()]);
    let log = fs::File::create(world.path("late.log")).unwrap();
    let mut command = Command::new(&words[0]);
    let _sshd = Running(command.args(&words[1..]).stdin(Stdio::null()).stderr(log).spawn().unwrap());
    let listens = || fs::read_to_string(world.path("late.log")).unwrap().contains("Server listening");
    wait_until("it listens", listens);
    // Everybody else leaves it alone.
    let mut others = world.via();
    others.extend(["127.0.0.9".into(), world.port.to_string()]);
    let said = world.proxy().args(&others).output().unwrap();
    assert_eq!(said.status.code(), Some(75), "{said:?}");
    world.pool.start(&late, BOUND, "true").unwrap();
    // And what it found is known to all.
    let said = world.proxy().args(&others).output().unwrap();
    assert_eq!(said.status.code(), Some(0), "{said:?}");
}
