//! An sshd that turns connections away before a word, and what is said again then.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Instant,
};

use crate::world::{Said, World, free_port, wait_until};

/// An sshd outside with this limit.
struct Sshd {
    process: Child,
    port: u16,
    log: PathBuf,
}

impl Sshd {
    fn start(world: &World, limit: &str) -> Self {
        let port = free_port();
        // Of this option the last line counts.
        let config = fs::read_to_string(world.path("bastion.conf")).unwrap();
        let config = config.replace("MaxStartups 200", &format!("MaxStartups {limit}"));
        fs::write(world.path("limited.conf"), config).unwrap();
        let process = Command::new("/usr/sbin/sshd")
            .args(["-D", "-p", &port.to_string(), "-o", "ListenAddress=127.0.0.1"])
            .args(["-o", "LogLevel=DEBUG1", "-E"])
            .arg(world.path("limited.log"))
            .arg("-f")
            .arg(world.path("limited.conf"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        world.write_client_config(&format!("Host direct fddirect\n Port {port}\n"));
        let sshd = Sshd { process, port, log: world.path("limited.log") };
        wait_until("sshd listens", || sshd.said().contains("Server listening"));
        sshd
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn turned_away(&self) -> usize {
        self.said().matches("drop connection #").count()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("the limited sshd said:\n{}", fs::read_to_string(&self.log).unwrap_or_default());
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_connection_that_sshd_turns_away_is_made_again_without_a_word_to_the_user() {
    let world = World::new();
    let sshd = Sshd::start(&world, "1");
    let mut silent = TcpStream::connect(("127.0.0.1", sshd.port)).unwrap();
    // Its words show that it has the only place.
    silent.read_exact(&mut [0; 8]).unwrap();
    let before = sshd.said().matches("Remote protocol version").count();
    let ssh = world
        .client("ssh")
        .args(["direct", "echo there"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("it was turned away twice", || sshd.turned_away() > 1);
    drop(silent);
    let said: Said = ssh.wait_with_output().unwrap().into();
    assert!(said.code == Some(0) && said.out == "there\n", "{said:?}");
    // Nothing but what ssh itself says of a host that is new to it.
    assert!(said.err.lines().all(|line| line.starts_with("Warning: Permanently added")), "{said:?}");
    assert_eq!(sshd.said().matches("Remote protocol version").count() - before, 1);
}

/// Turns the first connection away with these words and answers the second; gives what both said.
fn rude_once(refusal: &'static [u8], greeting: &'static [u8]) -> (u16, thread::JoinHandle<[Vec<u8>; 2]>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let mut first = vec![0; 4096];
        let (mut stream, _) = listener.accept().unwrap();
        let len = stream.read(&mut first).unwrap();
        first.truncate(len);
        stream.write_all(refusal).unwrap();
        drop(stream);
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(greeting).unwrap();
        let mut second = Vec::new();
        stream.read_to_end(&mut second).unwrap();
        [first, second]
    });
    (port, server)
}

#[test]
fn what_a_client_said_so_far_arrives_once_at_the_one_who_answers() {
    let world = World::new();
    // As an old sshd does, and newer ones for MaxStartups, and for PerSourcePenalties.
    for refusal in [&b""[..], b"Exceeded MaxStartups\r\n", b"Not allowed at this time\r\n"] {
        let (port, server) = rude_once(refusal, b"SSH-2.0-late\r\n");
        let mut proxy = world
            .proxy()
            .args(["127.0.0.1", &port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = proxy.stdin.take().unwrap();
        input.write_all(b"SSH-2.0-client\r\n").unwrap();
        let mut heard = [0; 14];
        proxy.stdout.as_mut().unwrap().read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"SSH-2.0-late\r\n");
        input.write_all(b"the rest").unwrap();
        drop(input);
        let output = proxy.wait_with_output().unwrap();
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        let [first, second] = server.join().unwrap();
        assert_eq!(first, b"SSH-2.0-client\r\n");
        assert_eq!(String::from_utf8_lossy(&second), "SSH-2.0-client\r\nthe rest");
    }
}

#[test]
fn the_words_of_another_client_are_not_said_twice() {
    let world = World::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut proxy = world
        .proxy()
        .args(["127.0.0.1", &port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = proxy.stdin.take().unwrap();
    input.write_all(b"GET /\r\n").unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut words = [0; 7];
    stream.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"GET /\r\n");
    drop(stream);
    let mut heard = Vec::new();
    proxy.stdout.as_mut().unwrap().read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"");
    drop(input);
    let output = proxy.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "there was a second connection");
}

/// That many logins at the same moment, all of which succeed.
fn log_in_at_once(world: &World, count: usize) {
    let file = world.path("offload.toml");
    let begin = Instant::now();
    let all: Vec<Child> = (0..count)
        .map(|number| {
            let mut ssh = world.client("ssh");
            ssh.env("NIX_OFFLOAD_CONFIG", &file).args(["direct", "echo", &number.to_string()]);
            ssh.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (number, ssh) in all.into_iter().enumerate() {
        let said: Said = ssh.wait_with_output().unwrap().into();
        assert!(said.code == Some(0) && said.out == format!("{number}\n"), "{number}: {said:?}");
    }
    println!("{count} logins in {:?}", begin.elapsed());
}

#[test]
fn sixty_at_once_to_one_sshd_all_succeed() {
    let world = World::new();
    let sshd = Sshd::start(&world, "10:30:100");
    fs::write(world.path("offload.toml"), "").unwrap();
    log_in_at_once(&world, 60);
    // How many depends on how fast this machine logs in.
    println!("{} were turned away on the way", sshd.turned_away());
}

#[test]
fn at_a_modest_pace_none_is_turned_away() {
    let world = World::new();
    let sshd = Sshd::start(&world, "10:30:100");
    fs::write(world.path("offload.toml"), "[ssh]\nconnections-per-second = 3\n").unwrap();
    log_in_at_once(&world, 30);
    assert_eq!(sshd.turned_away(), 0);
}
