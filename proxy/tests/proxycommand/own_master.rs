//! Without a jump host: TCP comes first, and a living master to the host itself, which nobody asked for, last.

use std::{
    io::{Read, Write},
    net::TcpListener,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::{
    bastion::signal,
    world::{BOUND, World},
};

/// A living master to one of the hosts by its address, to which no other way leads.
fn master_to(world: &World, address: &str) {
    // What ssh writes on the way for the first time lies beside its configuration, and counts as a change of that.
    assert_eq!(world.ssh("host2", "true").code, Some(0));
    let mut endpoint = world.endpoint(address);
    endpoint.port = Some(world.port);
    world.pool.start(&endpoint, BOUND, "true").unwrap();
}

#[test]
fn the_host_sees_where_a_login_comes_from_whatever_masters_there_are() {
    let world = World::new();
    master_to(&world, "127.0.0.4");
    let outside = TcpListener::bind(("127.0.0.4", world.port)).unwrap();
    let server =
        thread::spawn(move || outside.accept().unwrap().0.write_all(b"SSH-2.0-outside\r\n").unwrap());
    let said = world.proxy_says(&["127.0.0.4", &world.port.to_string()]);
    assert!(said.code == Some(0) && said.out == "SSH-2.0-outside\r\n", "{said:?}");
    server.join().unwrap();
    // Where TCP does not lead there, the master does; the second time without another look at TCP.
    for _ in 0..2 {
        let said = world.proxy_says(&["127.0.0.4", &world.port.to_string()]);
        assert!(said.code == Some(0) && said.out.starts_with("SSH-2.0-OpenSSH"), "{said:?}");
    }
    // Both ways, and to the end.
    let mut proxy = world
        .proxy()
        .args(["127.0.0.4", &world.port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    proxy.stdin.take().unwrap().write_all(b"no ssh\r\n").unwrap();
    let mut text = String::new();
    proxy.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("Invalid SSH identification string"), "{text}");
    assert!(proxy.wait().unwrap().success());
}

#[test]
fn a_host_that_cannot_reach_its_own_address_is_logged_in_to_while_a_master_lives() {
    let world = World::new();
    assert_eq!(world.ssh("host2", "true").code, Some(0));
    let mut itself = world.endpoint("127.0.0.1");
    itself.port = Some(world.bastion_port);
    world.pool.start(&itself, BOUND, "true").unwrap();
    assert!(world.pool.live_to("127.0.0.1", world.bastion_port).is_some());
    let _swallowing = world.swallow("127.0.0.1", world.bastion_port);
    for host in ["direct", "fddirect"] {
        let said = world.ssh(host, "echo hi");
        assert_eq!(said.out, "hi\n", "{host}: {said:?}");
    }
}

#[test]
fn a_master_that_is_of_no_use_for_this_is_not_asked_again_at_once_and_lives() {
    let world = World::new();
    master_to(&world, "127.0.0.4");
    let master = world.master("127.0.0.4").pid;
    // Connections are taken in by the kernel, and nobody says a word.
    signal(world.host(4), Signal::SIGSTOP);
    let begin = Instant::now();
    let first = world.proxy_says(&["127.0.0.4", &world.port.to_string()]);
    assert!(first.code == Some(69) && first.err.contains("Connection refused"), "{first:?}");
    assert!(begin.elapsed() >= Duration::from_secs(3), "it was asked, that is part of the test");
    let begin = Instant::now();
    let second = world.proxy_says(&["127.0.0.4", &world.port.to_string()]);
    assert_eq!(second.code, Some(75), "{second:?}");
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    signal(world.host(4), Signal::SIGCONT);
    let info = world.master("127.0.0.4");
    assert!(info.alive && info.pid == master);
}
