//! What goes through: large streams both ways, their ends, file copies.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::Stdio,
    thread,
    time::Instant,
};

use crate::world::{BOUND, Echo, MIB, World, free_port, hash_of, pattern_file, run, wait_until};

#[test]
fn sixty_four_mib_go_both_ways_at_once() {
    let world = World::new();
    let wanted = pattern_file(&world.path("in"), 64 * MIB);
    for host in ["host2", "fd2", "direct", "fddirect"] {
        let begin = Instant::now();
        run(world
            .client("ssh")
            .args([host, "cat"])
            .stdin(File::open(world.path("in")).unwrap())
            .stdout(File::create(world.path("out")).unwrap()));
        println!("{host}: 64 MiB there and back in {:?}", begin.elapsed());
        assert_eq!(hash_of(&world.path("out")), wanted, "{host}");
    }
}

#[test]
fn files_are_copied_by_scp_and_sftp() {
    let world = World::new();
    let wanted = pattern_file(&world.path("in"), 3 * MIB);
    let path = |name: &str| world.path(name).display().to_string();
    for host in ["host2", "fd3", "direct"] {
        let there = path(&format!("there-{host}"));
        run(world.client("scp").args(["-q", &path("in"), &format!("{host}:{there}")]));
        run(world.client("scp").args(["-q", &format!("{host}:{there}"), &path("back")]));
        assert_eq!(hash_of(&world.path("back")), wanted, "scp {host}");
        fs::remove_file(world.path("back")).unwrap();
        fs::write(
            world.path("batch"),
            format!("get {there} {}\nput {} {there}.2\n", path("back"), path("in")),
        )
        .unwrap();
        run(world.client("sftp").args(["-q", "-b", &path("batch"), host]).stdout(Stdio::null()));
        assert_eq!(hash_of(&world.path("back")), wanted, "sftp {host}");
        assert_eq!(hash_of(&world.path(&format!("there-{host}.2"))), wanted, "sftp {host}");
    }
}

/// A server for one client on a free port of 127.0.0.1.
fn server(serve: impl FnOnce(TcpStream) + Send + 'static) -> (String, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    (port, thread::spawn(move || serve(listener.accept().unwrap().0)))
}

#[test]
fn each_direction_ends_by_itself() {
    let world = World::new();
    // The server answers only when it has seen the end of what comes.
    let (port, serving) = server(|mut client| {
        let mut question = String::new();
        client.read_to_string(&mut question).unwrap();
        client.write_all(question.to_uppercase().as_bytes()).unwrap();
    });
    let mut proxy = world
        .proxy()
        .args(["127.0.0.1", &port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    proxy.stdin.take().unwrap().write_all(b"who?").unwrap();
    let output = proxy.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, b"WHO?");
    serving.join().unwrap();

    // The server ends first; what goes up still arrives.
    let (port, serving) = server(|mut client| {
        client.write_all(b"bye").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut rest = String::new();
        client.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "late words");
    });
    let mut proxy = world
        .proxy()
        .args(["127.0.0.1", &port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    proxy.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
    proxy.stdin.take().unwrap().write_all(b"late words").unwrap();
    assert!(proxy.wait().unwrap().success());
    serving.join().unwrap();
}

#[test]
fn each_direction_ends_by_itself_through_a_bastion() {
    let world = World::new();
    // A line that no sshd understands: it answers and ends, after our own end.
    let mut proxy = world
        .proxy()
        .args(world.via())
        .args(["127.0.0.2", &world.port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    proxy.stdin.take().unwrap().write_all(b"no ssh\r\n").unwrap();
    let output = proxy.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("SSH-2.0-") && text.contains("Invalid SSH identification string"), "{text}");
}

#[test]
fn a_reader_that_does_not_read_holds_the_host_up_and_memory_stays_small() {
    let world = World::new();
    let (port, serving) = server(|mut client| {
        client.set_write_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        let chunk = vec![7; MIB];
        // Until nothing more is taken: kernel buffers only.
        let taken = (0..200).take_while(|_| client.write_all(&chunk).is_ok()).count();
        assert!(taken < 100, "{taken} MiB have gone somewhere");
    });
    let mut proxy = world
        .proxy()
        .args(["127.0.0.1", &port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    serving.join().unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", proxy.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: usize = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 20_000, "{kib} KiB");
    // Nobody reads any more: it ends, though its stdin is open.
    drop(proxy.stdout.take());
    assert!(proxy.wait().unwrap().success());
}

#[test]
fn a_reset_by_the_host_is_an_error() {
    let world = World::new();
    let (port, serving) = server(|client| {
        // Closing with unread bytes makes the kernel send a reset.
        wait_until("bytes have come", || client.peek(&mut [0]).is_ok_and(|len| len > 0));
        drop(client);
    });
    let mut proxy = world
        .proxy()
        .args(["127.0.0.1", &port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = proxy.stdin.take().unwrap();
    stdin.write_all(b"x").unwrap();
    serving.join().unwrap();
    let output = proxy.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && err.contains("the connection to 127.0.0.1 broke"), "{err}");
    drop(stdin);
}

#[test]
fn a_host_that_comes_up_is_waited_for() {
    let world = World::new();
    let port = free_port();
    let begin = Instant::now();
    let proxy = world
        .proxy()
        .args(["--wait=25", "127.0.0.1", &port.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first attempt has failed when there is a note of it.
    let noted = || {
        fs::read_dir(world.pool.directory().join("down"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|e| e.path().extension().is_some_and(|e| e == "down"))
    };
    wait_until("it has tried", noted);
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    listener.accept().unwrap().0.write_all(b"here").unwrap();
    let output = proxy.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout == b"here", "{output:?}");
    assert!(begin.elapsed() < BOUND);
    assert!(!noted(), "a success is the end of the note");
}

#[test]
fn a_connection_that_is_handed_over_notices_that_the_host_has_gone() {
    let world = World::new();
    for host in ["direct", "fddirect"] {
        let echo = Echo::begin(&world, host);
        // The kernel asks an idle connection whether the far side is there: the timer 02 of tcp(7)'s table.
        let port = format!(":{:04X}", world.bastion_port);
        wait_until("the kernel asks", || {
            let table = fs::read_to_string("/proc/net/tcp").unwrap();
            let mut ours = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            ours.any(|row| row[2].ends_with(&port) && row[3] == "01" && row[5].starts_with("02:"))
        });
        echo.ends();
    }
}
