//! Masters of the user's own: whoever has ControlMaster and ControlPath in ssh_config, or in the words for ssh,
//! keeps them to himself. The pool neither uses nor ends nor makes them.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use nix_offload_proxy::master::Endpoint;

use crate::{
    ssh_config::{endpoint, way, write_config},
    world::{BOUND, World},
};

/// The user's ssh, with masters of his own in a directory for them.
struct Own<'a> {
    world: &'a World,
    directory: PathBuf,
}

impl Own<'_> {
    /// `lines` are more of the host's block.
    fn new<'a>(world: &'a World, lines: &str) -> Own<'a> {
        let directory = world.path("own");
        fs::create_dir(&directory).unwrap();
        write_config(
            world,
            &format!(
                "Host mac\n {}\n {lines}\nHost *\n ControlMaster auto\n ControlPath {}/%C\n ControlPersist 60\n",
                way(world).join("\n "),
                directory.display()
            ),
        );
        Own { world, directory }
    }

    fn ssh(&self, words: &[&str]) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(self.world.path("config")).args(words);
        // For a ProxyCommand of ours.
        ssh.env("NIX_OFFLOAD_RUNTIME_DIR", self.world.pool.directory()).stdin(Stdio::null());
        ssh
    }

    fn says(&self, words: &[&str]) -> Output {
        // A master in the background keeps the descriptors of whoever started it, but for stderr.
        let output = self.ssh(words).stderr(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        output
    }

    fn is_running(&self) -> bool {
        self.ssh(&["-O", "check", "mac"]).stderr(Stdio::null()).status().unwrap().success()
    }

    fn sockets(&self) -> usize {
        fs::read_dir(&self.directory).unwrap().count()
    }
}

impl Drop for Own<'_> {
    fn drop(&mut self) {
        for socket in fs::read_dir(&self.directory).unwrap().flatten() {
            let path = socket.path().display().to_string();
            let _ = self.ssh(&["-S", &path, "-O", "exit", "mac"]).stderr(Stdio::null()).status();
        }
    }
}

/// Starts a master of the pool, which is a login of its own, and ends it.
fn start_and_stop(world: &World, endpoint: &Endpoint) {
    let before = world.logins();
    let master = world.pool.start(endpoint, BOUND, "echo ours").unwrap();
    assert_eq!(master.first_output().as_deref(), Some("ours"));
    assert_eq!(world.logins() - before, 1, "a login of its own");
    master.open_session("true", BOUND).unwrap();
    assert!(master.control_path().starts_with(world.pool.directory()));
    world.pool.stop(&world.only_master()).unwrap();
}

#[test]
fn a_running_master_of_the_user_is_neither_used_nor_ended() {
    let world = World::new();
    let own = Own::new(&world, "");
    assert_eq!(own.says(&["mac", "echo hi"]).stdout, b"hi\n");
    assert!(own.is_running() && own.sockets() == 1);
    let mut session = own.ssh(&["mac", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut to = session.stdin.take().unwrap();
    let mut from = BufReader::new(session.stdout.take().unwrap());
    let mut echo = |text: &str| {
        let mut line = String::new();
        to.write_all(text.as_bytes()).unwrap();
        from.read_line(&mut line).unwrap();
        assert_eq!(line, text);
    };
    echo("before\n");
    assert_eq!(world.logins(), 1);
    start_and_stop(&world, &endpoint(&world, "mac"));
    echo("after\n");
    assert!(own.is_running() && own.sockets() == 1);
    assert_eq!(own.says(&["mac", "echo still"]).stdout, b"still\n");
    assert_eq!(world.logins(), 2, "the user's own sessions have gone over his master");
    drop(to);
    assert!(session.wait().unwrap().success());
}

#[test]
fn no_master_of_the_user_is_made() {
    let world = World::new();
    let own = Own::new(&world, "");
    start_and_stop(&world, &endpoint(&world, "mac"));
    let master = world.pool.start(&endpoint(&world, "mac"), BOUND, "true").unwrap();
    assert!(!own.is_running());
    assert_eq!(own.sockets(), 0);
    // Nor does his ssh take ours for his.
    let before = world.logins();
    assert_eq!(own.says(&["mac", "echo hi"]).stdout, b"hi\n");
    assert_eq!((world.logins() - before, own.sockets()), (1, 1));
    master.open_session("true", BOUND).unwrap();
}

#[test]
fn words_about_masters_among_those_for_ssh_change_nothing() {
    let world = World::new();
    let own = Own::new(&world, "");
    let path = world.path("elsewhere").display().to_string();
    let path_option = format!("ControlPath={path}");
    let all: [&[&str]; 9] = [
        &["-o", &path_option, "-o", "ControlMaster=no"],
        &["-o", &path_option, "-o", "ControlMaster=auto", "-o", "ControlPersist=no"],
        &["-o", "ControlPath=none", "-o", "ControlMaster=no"],
        &["-S", &path],
        &[&format!("-S{path}")],
        &["-S", "none"],
        &["-M"],
        &["-M", "-S", &path, "-o", "ControlPersist=1"],
        &["-4MC"],
    ];
    for running in [false, true] {
        if running {
            own.says(&["-M", "-S", &path, "mac", "true"]);
            assert!(fs::exists(&path).unwrap());
        }
        for words in all {
            println!("{words:?}, running: {running}");
            let mut endpoint = endpoint(&world, "mac");
            endpoint.ssh_options.extend(words.iter().map(ToString::to_string));
            start_and_stop(&world, &endpoint);
            assert_eq!(fs::exists(&path).unwrap(), running);
            assert_eq!(own.sockets(), 0);
        }
    }
    let checked = own.ssh(&["-S", &path, "-O", "check", "mac"]).stderr(Stdio::null()).status().unwrap();
    assert!(checked.success(), "it is still the user's");
    own.says(&["-S", &path, "-O", "exit", "mac"]);
}

#[test]
fn a_master_of_the_user_works_over_our_proxy_command() {
    for options in ["", "--fdpass"] {
        let world = World::new();
        let fdpass = if options.is_empty() { "" } else { "ProxyUseFdpass yes" };
        let proxy = env!("CARGO_BIN_EXE_nix-offload-proxy");
        let own = Own::new(&world, &format!("ProxyCommand {proxy} {options} %h %p\n {fdpass}"));
        for number in 0..3 {
            let said = own.says(&["mac", &format!("echo {number}")]);
            assert_eq!(String::from_utf8_lossy(&said.stdout), format!("{number}\n"));
        }
        assert!(own.is_running());
        assert_eq!((world.logins(), own.sockets()), (1, 1));
        // The pool's own master goes through the same command, and again they do not meet.
        start_and_stop(&world, &endpoint(&world, "mac"));
        assert_eq!(own.says(&["mac", "echo still"]).stdout, b"still\n");
        assert_eq!(world.logins(), 2);
    }
}

#[test]
fn a_master_of_the_user_to_the_jump_host_is_his_own_affair() {
    let world = World::new();
    // As ssh has it, whoever needs the jump host makes or uses the user's master to it. Another name for the same
    // host keeps their sockets apart.
    let jump = way(&world).join("\n ").replace("127.0.0.1", "localhost");
    let own = Own::new(&world, &format!("ProxyJump jump\nHost jump\n {jump}"));
    let known_here = world.known_hosts_line("host");
    let known = format!("{known_here}{}", known_here.replace("127.0.0.1", "localhost"));
    fs::write(world.path("known_hosts"), known).unwrap();
    let check =
        |host: &str| own.ssh(&["-O", "check", host]).stderr(Stdio::null()).status().unwrap().success();
    let jumped = world.pool.start(&endpoint(&world, "mac"), BOUND, "echo ours").unwrap();
    assert_eq!(jumped.first_output().as_deref(), Some("ours"));
    jumped.open_session("true", BOUND).unwrap();
    assert_eq!(world.logins(), 2);
    assert!(!check("mac"));
    let (before, kept) = (own.sockets(), check("jump"));
    println!("the user has a master to the jump host: {kept}");
    world.pool.stop(&world.only_master()).unwrap();
    assert_eq!((own.sockets(), check("jump")), (before, kept));
    own.says(&["jump", "true"]);
    assert!(check("jump"));
    start_and_stop(&world, &endpoint(&world, "mac"));
    assert!(check("jump") && !check("mac"));
}
