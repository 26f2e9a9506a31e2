//! Masters to a real sshd: started once, found, replaced, ended, and every way in which a start fails.

use std::{
    fs,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use crate::world::{BOUND, World, extensions, free_port, gone, signal, wait_until};
use nix::sys::signal::Signal;
use nix_offload_proxy::master::{Endpoint, Fault, OpenError, StartError};

#[test]
fn twenty_processes_at_once_make_one_connection() {
    let world = World::new();
    let processes: Vec<_> = (0..20)
        .map(|_| world.start_command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
        .collect();
    let mut paths = Vec::new();
    for process in processes {
        let output = process.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert!(output.status.success());
        paths.push(String::from_utf8(output.stdout).unwrap());
    }
    paths.dedup();
    assert_eq!(paths.len(), 1);
    assert_eq!(world.logins(), 1);
    assert!(world.only_master().alive);
}

#[test]
fn a_failing_start_is_made_once_for_all_who_wait_for_it() {
    let world = World::new();
    // Takes connections (the kernel does) and says nothing: only the bound ends the attempt.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    silent.set_nonblocking(true).unwrap();
    let mut endpoint = world.endpoint();
    endpoint.port = Some(silent.local_addr().unwrap().port());
    let bound = Duration::from_secs(2);
    let barrier = Barrier::new(8);
    let begin = Instant::now();
    let errors: Vec<_> = thread::scope(|scope| {
        let attempt = || {
            barrier.wait();
            world.pool.start(&endpoint, bound, "true").unwrap_err().to_string()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(attempt)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(begin.elapsed() < bound * 3, "{:?}", begin.elapsed());
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    assert_eq!(std::iter::from_fn(|| silent.accept().ok()).count(), 1);
    // Whoever comes later tries anew.
    world.pool.start(&endpoint, Duration::from_secs(1), "true").unwrap_err();
    assert_eq!(std::iter::from_fn(|| silent.accept().ok()).count(), 1);
}

#[test]
fn the_first_command_tells_its_output() {
    let world = World::new();
    let master = world.pool.start(&world.endpoint(), BOUND, "echo ' hello '; echo error >&2").unwrap();
    assert_eq!(master.first_output().as_deref(), Some("hello"));
    assert_eq!(master.destination(), "127.0.0.1");
    let again = world.pool.start(&world.endpoint(), BOUND, "echo other").unwrap();
    assert_eq!(again.first_output().as_deref(), Some("hello"));
    assert_eq!(world.pool.live(&world.endpoint()).unwrap().control_path(), master.control_path());
    assert_eq!(world.logins(), 1);
}

#[test]
fn a_first_command_that_fails_or_goes_on_is_no_failure_of_the_master() {
    let world = World::new();
    let master = world.pool.start(&world.endpoint(), BOUND, "echo x; no-such-program").unwrap();
    assert_eq!(master.first_output(), None);
    master.open_session("true", BOUND).unwrap();
    world.pool.stop(&world.only_master()).unwrap();

    let master = world.pool.start(&world.endpoint(), Duration::from_secs(6), "exec sleep 10").unwrap();
    assert_eq!(master.first_output(), None);
    master.open_session("true", BOUND).unwrap();
    assert_eq!(world.logins(), 2);
}

#[test]
fn a_stopped_master_is_noticed_and_replaced() {
    let world = World::new();
    let master = world.start();
    let old = world.only_master();
    signal(old.pid, Signal::SIGSTOP);
    let bound = Duration::from_millis(200);
    let begin = Instant::now();
    let error = master.open_unix_socket("/nowhere", bound).unwrap_err();
    assert!(matches!(error, OpenError::TimedOut { master_answers: false, .. }), "{error:?}");
    assert!(error.is_master_lost());
    let error = master.open_session("true", bound).unwrap_err();
    assert!(matches!(error, OpenError::TimedOut { master_answers: false, .. }), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(5));

    let new = world.start();
    assert!(gone(old.pid));
    assert_ne!(world.only_master().pid, old.pid);
    new.open_session("true", BOUND).unwrap();
    assert_eq!(world.logins(), 2);
    // The old handle must not end the new master.
    master.retire();
    assert!(world.only_master().alive);
}

#[test]
fn a_stopped_master_with_a_full_queue_does_not_hold_anybody_up() {
    let world = World::new();
    let master = world.start();
    signal(world.only_master().pid, Signal::SIGSTOP);
    let mut queue = Vec::new();
    while let Some(one) = world.pool.live(&world.endpoint()) {
        queue.push(one);
        assert!(queue.len() < 10_000);
    }
    let begin = Instant::now();
    let error = master.open_unix_socket("/nowhere", Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, OpenError::Gone { .. }), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(5));
    world.start().open_session("true", BOUND).unwrap();
}

#[test]
fn a_killed_master_is_noticed_and_replaced() {
    let world = World::new();
    let master = world.start();
    let old = world.only_master();
    signal(old.pid, Signal::SIGKILL);
    wait_until("the master is gone", || gone(old.pid));
    assert!(old.control_path.exists(), "a stale socket is part of the test");
    assert!(world.pool.live(&world.endpoint()).is_none());
    assert!(!world.only_master().alive);
    let error = master.open_unix_socket("/nowhere", BOUND).unwrap_err();
    assert!(matches!(error, OpenError::Gone { .. }), "{error:?}");
    world.start().open_session("true", BOUND).unwrap();
    assert_ne!(world.only_master().pid, old.pid);
}

#[test]
fn a_retired_master_is_ended_and_forgotten() {
    let world = World::new();
    let master = world.start();
    let pid = world.only_master().pid;
    master.retire();
    assert!(gone(pid));
    assert!(!master.control_path().exists());
    assert!(world.pool.live(&world.endpoint()).is_none());
    world.start();
    assert_eq!(world.logins(), 2);
}

#[test]
fn stopping_leaves_nothing_but_logs() {
    let world = World::new();
    let mut pinned = world.endpoint();
    pinned.host_keys = Some(world.public_key("host"));
    world.pool.start(&pinned, BOUND, "echo x").unwrap();
    world.start();
    let masters = world.pool.list().unwrap();
    assert_eq!(masters.len(), 2);
    for master in &masters {
        assert!(master.alive && master.log_path.exists());
        world.pool.stop(master).unwrap();
        assert!(gone(master.pid));
    }
    assert_eq!(extensions(world.pool.directory()), ["log", "log", "pace"]);
    assert_eq!(world.pool.list().unwrap(), []);
}

#[test]
fn a_pinned_host_key_is_accepted_and_any_other_refused() {
    let world = World::new();
    let mut endpoint = world.endpoint();
    // The pin is all that counts: no known_hosts, and the user's own words cannot weaken it.
    endpoint.ssh_options = world.ssh_options("missing");
    endpoint.ssh_options.extend(["-o".into(), "StrictHostKeyChecking=no".into()]);
    endpoint.host_keys = Some(format!("{}\n{}", world.public_key("other"), world.public_key("host")));
    world.pool.start(&endpoint, BOUND, "true").unwrap();
    endpoint.host_keys = Some(world.public_key("other"));
    let error = world.pool.start(&endpoint, BOUND, "true").unwrap_err();
    let StartError::Failed { fault: Fault::PinnedKeyMismatch { fingerprint }, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(fingerprint.as_deref(), Some(&*format!("ED25519 {}", world.fingerprint("host"))));
    assert!(error.to_string().contains(&world.fingerprint("host")), "{error}");
    assert!(error.cure().unwrap().contains("ssh-keyscan"), "{:?}", error.cure());
    assert!(!error.is_temporary());
}

/// Starts to an endpoint that cannot work, and returns the fault, the line and the cure.
fn failure(world: &World, endpoint: &Endpoint) -> (Fault, String, String) {
    let error = world.pool.start(endpoint, BOUND, "true").unwrap_err();
    let (line, cure) = (error.to_string(), error.cure().unwrap());
    println!("{line}\n  {cure}");
    assert!(line.contains(&endpoint.destination) && !line.contains('\n'), "{line}");
    assert!(world.pool.live(endpoint).is_none());
    match error {
        StartError::Failed { fault, .. } => (fault, line, cure),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_unknown_host_key_is_named_with_the_command_that_adds_it() {
    let world = World::new();
    let mut endpoint = world.endpoint();
    endpoint.ssh_options = world.ssh_options("missing");
    let (fault, line, cure) = failure(&world, &endpoint);
    let unknown =
        || Fault::HostKeyUnknown { fingerprint: Some(format!("ssh-ed25519 {}", world.fingerprint("host"))) };
    assert_eq!(fault, unknown());
    assert!(line.contains(&world.fingerprint("host")), "{line}");
    assert!(cure.contains(&world.path("missing").display().to_string()), "{cure}");
    assert!(cure.contains(&format!("-p {} 127.0.0.1 true", world.port)), "{cure}");
    endpoint.ssh_options.extend(["-o".into(), "StrictHostKeyChecking=yes".into()]);
    assert_eq!(failure(&world, &endpoint).0, unknown());
}

#[test]
fn a_changed_host_key_is_named_with_its_file() {
    let world = World::new();
    fs::write(world.path("old_hosts"), world.known_hosts_line("other")).unwrap();
    let mut endpoint = world.endpoint();
    endpoint.ssh_options = world.ssh_options("old_hosts");
    let (fault, line, cure) = failure(&world, &endpoint);
    let file = world.path("old_hosts").display().to_string();
    let name = Some(format!("[127.0.0.1]:{}", world.port));
    let fingerprint = Some(format!("ED25519 {}", world.fingerprint("host")));
    assert_eq!(fault, Fault::HostKeyChanged { known_hosts: Some(format!("{file}:1")), name, fingerprint });
    assert!(line.contains(&file) && line.contains(&world.fingerprint("host")), "{line}");
    assert!(cure.contains(&format!("ssh-keygen -f {file} -R '[127.0.0.1]:{}'", world.port)), "{cure}");
}

#[test]
fn keys_that_do_not_open_are_told_apart() {
    let world = World::new();
    let with = |name: &str| Endpoint { identity: Some(world.path(name)), ..world.endpoint() };
    let (fault, line, cure) = failure(&world, &with("stranger"));
    assert_eq!(fault, Fault::PermissionDenied { methods: "publickey".into() });
    assert!(line.contains("permission denied (publickey)"), "{line}");
    assert!(cure.contains("authorized_keys") && cure.contains("stranger"), "{cure}");

    let (fault, _, cure) = failure(&world, &with("absent"));
    assert!(matches!(fault, Fault::IdentityUnreadable { .. }), "{fault:?}");
    assert!(cure.contains("absent"), "{cure}");

    // A key that would be let in: ssh looks at the private half only then.
    fs::set_permissions(world.path("user"), fs::Permissions::from_mode(0o644)).unwrap();
    let (fault, _, cure) = failure(&world, &with("user"));
    assert!(matches!(fault, Fault::IdentityPermissions { .. }), "{fault:?}");
    assert!(cure.contains("chmod 600"), "{cure}");
}

#[test]
fn a_host_that_is_not_there_is_named_with_the_reason() {
    let world = World::new();
    let closed = Endpoint { port: Some(free_port()), ..world.endpoint() };
    let (fault, _, cure) = failure(&world, &closed);
    assert!(matches!(fault, Fault::Refused { .. }), "{fault:?}");
    assert!(cure.contains("sshd"), "{cure}");

    let nameless = Endpoint { destination: "no-such-host.invalid".into(), ..world.endpoint() };
    let (fault, _, cure) = failure(&world, &nameless);
    assert!(matches!(fault, Fault::NameNotResolved { .. }), "{fault:?}");
    assert!(cure.contains("no-such-host.invalid"), "{cure}");
}

#[test]
fn a_host_that_accepts_and_says_nothing_times_out() {
    let world = World::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = Endpoint { port: Some(silent.local_addr().unwrap().port()), ..world.endpoint() };
    let begin = Instant::now();
    let error = world.pool.start(&endpoint, Duration::from_micros(699_987), "true").unwrap_err();
    assert!(matches!(error, StartError::TimedOut { connected: true, .. }), "{error:?}");
    let told = "it took the connection, but no login was complete within 0.7 s";
    assert!(error.to_string().contains(told) && error.is_temporary(), "{error}");
    // ssh said nothing, so it may be a key.
    let cure = error.cure().unwrap();
    assert!(cure.contains("whether sshd is well") && cure.contains("touch"), "{cure}");
    assert!(begin.elapsed() < Duration::from_secs(5));
    // ssh itself is gone too: its connection ends.
    let (mut connection, _) = silent.accept().unwrap();
    connection.set_read_timeout(Some(BOUND)).unwrap();
    let mut banner = Vec::new();
    connection.read_to_end(&mut banner).unwrap();
    assert!(banner.starts_with(b"SSH-2.0-"));
}

#[test]
fn without_ssh_or_with_a_long_directory_the_error_says_so() {
    let world = World::new();
    let output = world.start_command().env("PATH", "/nowhere").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("`ssh` in PATH") && text.contains("hint: install OpenSSH"), "{text}");

    let long = world.path(&"x".repeat(90));
    let output = world.start_command().env("NIX_OFFLOAD_RUNTIME_DIR", long).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("too long for ssh") && text.contains("NIX_OFFLOAD_RUNTIME_DIR"), "{text}");
}

#[test]
fn the_commands_list_start_and_stop() {
    let world = World::new();
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let listed = || -> serde_json::Value {
        let (code, out, err) = run(world.command().args(["list", "--json"]));
        assert_eq!((code, &*err), (Some(0), ""));
        serde_json::from_str(&out).unwrap()
    };
    assert_eq!(listed(), serde_json::json!([]));
    let (code, out, _) = run(world.start_command().args(["--command", "echo hi", "--json"]));
    assert_eq!(code, Some(0));
    let started: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(started["first-output"], "hi");
    assert_eq!(listed()[0]["destination"], "127.0.0.1");
    assert_eq!(listed()[0]["alive"], true);
    assert_eq!(listed()[0]["control-path"], started["control-path"]);
    let (code, out, _) = run(world.command().arg("list"));
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((code, lines.len(), lines[0][0]), (Some(0), 2, "HOST"), "{out}");
    assert_eq!((lines[1][0], lines[1][1]), ("127.0.0.1", "alive"), "{out}");
    let (code, _, err) = run(world.command().args(["stop", "elsewhere"]));
    assert!(code == Some(1) && err.starts_with("error: there is no master to elsewhere\nhint: "), "{err}");
    let (code, out, err) = run(world.command().args(["stop", "127.0.0.1"]));
    assert_eq!((code, &*out, &*err), (Some(0), "stopped 127.0.0.1\n", ""));
    assert_eq!(listed(), serde_json::json!([]));
    assert_eq!(run(world.command().args(["stop", "--all"])).0, Some(0));
    assert_eq!(run(world.command().arg("stop")).0, Some(2));
    assert_eq!(run(world.command().args(["start", "-p", "1", "--", "-oProxyCommand=x"])).0, Some(2));
}

#[test]
fn the_master_inherits_no_descriptor() {
    let world = World::new();
    // As under a build hook: descriptors without close-on-exec, whose other ends wait for the last holder.
    let mut child = Command::new("sh")
        .args(["-c", "exec 4>&1 5<&0; exec \"$@\" >/dev/null", "sh"])
        .arg(env!("CARGO_BIN_EXE_nix-offload-proxy"))
        .args(world.start_command().get_args())
        .env("NIX_OFFLOAD_RUNTIME_DIR", world.pool.directory())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut rest = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut rest).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(world.only_master().alive);
    let error = input.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    drop(TcpStream::connect(("127.0.0.1", world.port)).unwrap());
}
