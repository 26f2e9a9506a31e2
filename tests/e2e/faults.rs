//! Machines that cannot be used: the build goes elsewhere or fails soon, and the user is told why.

use std::{
    iter,
    net::{TcpListener, TcpStream},
    os::unix::net::UnixListener,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use harness::{Builder, Client, ClientPlan, Hook, Mode, Output, Release, World, drv, event, wait_until};
use nix::sys::socket;
use serde_json::Value;

use crate::support::{SOON, assert_only_masters_left, begun, gated, open, wait_for_begin};

const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";
const LIMIT: Duration = Duration::from_secs(10);

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// One message of standard error, with the lines that belong to it, names machine, cause and cure.
#[track_caller]
fn assert_told(output: &Output, machine: &str, cause: &str, cure: &str) {
    let lines: Vec<&str> = output.stderr().lines().collect();
    let contains = |line: &str, text: &str| line.to_lowercase().contains(&text.to_lowercase());
    let told = lines.iter().enumerate().any(|(index, line)| {
        let message = [line, lines.get(index + 1).copied().unwrap_or_default()].join("\n");
        contains(line, machine) && contains(line, cause) && contains(&message, cure)
    });
    assert!(told, "no message names {machine:?}, {cause:?} and {cure:?}: {output}");
}

/// With -j0 the build fails soon, and the user is told why; without it it is made here. Whoever cannot do without is told
/// each time.
fn assert_explained(client: &Client, machine: &str, cause: &str, cure: &str) {
    for time in ["first", "second"] {
        let refused = client.nix_build(&drv::where_built("refused"), &["-j0"]);
        assert_eq!(refused.assert_failure().stdout(), "", "{refused}");
        assert!(refused.took() < LIMIT, "{refused}");
        // What was said a moment ago is said again by the table of what is missing only.
        let name = if time == "first" { machine } else { machine.trim_matches('\'') };
        assert_told(&refused, name, cause, cure);
    }
    let local = client.nix_build(&drv::where_built("local"), &[]);
    let path = local.assert_success().out_path();
    assert_eq!(client.read(&path), format!("{}\n", client.name()));
    assert!(local.took() < LIMIT, "{local}");
    client.verify_store();
}

/// The machine is used all the same, without a word of complaint.
fn assert_used(client: &Client, builder: &Builder) {
    let built = client.nix_build(&drv::where_built("a"), &["-j0"]);
    let path = built.assert_success().out_path();
    assert_eq!(client.read(&path), format!("{}\n", builder.name()));
    built.assert_stderr_lacks("cannot").assert_stderr_lacks("error");
}

#[test]
fn a_machine_that_is_off() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    mac.stop();
    assert_explained(&client, "'ssh-ng://mac'", "connection refused", "check that sshd runs on mac");
}

#[test]
fn a_machine_that_swallows_everything() {
    let world = World::new();
    // The kernel takes connections in; nobody ever says a word.
    let hole = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = hole.local_addr().unwrap().port();
    let client = plan(&world)
        .ssh_config(&format!("Host hole\n HostName 127.0.0.1\n Port {port}\n"))
        .machines("ssh-ng://hole x86_64-linux - 1 1")
        .start();
    assert_explained(&client, "'ssh-ng://hole'", "cannot connect to hole", "whether sshd is well");
}

#[test]
fn machines_that_swallow_everything_do_not_hold_up_one_that_answers() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let holes = [0, 1].map(|_| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    let mut plan = plan(&world);
    for (number, hole) in holes.iter().enumerate() {
        let port = hole.local_addr().unwrap().port();
        plan = plan
            .ssh_config(&format!("Host hole{number}\n HostName 127.0.0.1\n Port {port}\n"))
            // Better than any other.
            .machines(&format!("ssh-ng://hole{number} x86_64-linux - 4 9"));
    }
    let client = plan.uses(&mac, "ssh-ng", 4).start();
    client.write("/etc/nix/offload.toml", "[ssh]\nconnect-timeout = 12\n");
    // One after the other they would take 24 seconds.
    let built = client.nix_build(&drv::where_built("cold"), &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n", "{built}");
    assert!(built.took() < Duration::from_secs(22), "{built}");
    // Nobody waits for them again for as long as that.
    let built = client.nix_build(&drv::where_built("known"), &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n", "{built}");
    assert!(built.took() < Duration::from_secs(10), "{built}");
}

/// A port whose kernel drops every further SYN: its queue of connections nobody takes is full.
fn black_hole() -> (TcpListener, u16, Vec<TcpStream>) {
    let hole = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    // A shorter queue than the library's.
    socket::listen(&hole, socket::Backlog::new(0).unwrap()).unwrap();
    let port = hole.local_addr().unwrap().port();
    let mut queue = Vec::new();
    while let Ok(stream) =
        TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_millis(300))
    {
        queue.push(stream);
    }
    (hole, port, queue)
}

/// Milliseconds that each hook took for each of its answers so far.
fn answers(client: &Client) -> Vec<f64> {
    let entries = client.journal("-t nix-offload");
    let answered = entries.iter().filter(|entry| event(entry) == "answered");
    answered.map(|entry| entry["DURATION_US"].as_str().unwrap().parse::<f64>().unwrap() / 1000.0).collect()
}

#[test]
fn one_dead_machine_holds_up_one_build_for_the_connect_timeout_and_none_after_that() {
    const TIMEOUT_MS: f64 = 1000.0;
    // Far more than an answer takes that waits for nobody; the machine may have much to do.
    const WAITED_MS: f64 = 700.0;
    const BUSY_MS: f64 = 1000.0;
    let world = World::new();
    let mac = world.builder("mac").start();
    let (_hole, port, _queue) = black_hole();
    let client = plan(&world)
        .mode(Mode::Daemon)
        .journald()
        .env("NIX_OFFLOAD_LOG", "debug")
        .ssh_config(&format!("Host hole\n HostName 127.0.0.1\n Port {port}\n"))
        .uses(&mac, "ssh-ng", 4)
        .start();
    client.nix_build(&drv::trivial("warm-up"), &["-j0"]).assert_success();
    client.write("/etc/nix/offload.toml", "[ssh]\nconnect-timeout = 1\n");
    let fleet = client.read("/etc/nix/machines");
    client.set_machines(&format!("ssh-ng://hole x86_64-linux - 4 9\n{fleet}"));
    let six = |name: &str| {
        drv::expression(&format!(
            r#"builtins.genList (i: d "{name}-${{toString i}}" "cat /etc/machine-name > $out" {{ }}) 6"#
        ))
    };
    let mut before = answers(&client).len();
    // Answers since the last look, and those among them that waited.
    let mut since = || {
        let all = answers(&client);
        let new = all[before..].to_vec();
        before = all.len();
        let waited: Vec<f64> = new.iter().copied().filter(|took| *took > WAITED_MS).collect();
        (new.len(), waited)
    };
    for (cool_down, holds) in [("first", 1), ("second", 0)] {
        let built = client.nix_build(&six(cool_down), &["-j0"]);
        for path in built.assert_success().out_paths() {
            assert_eq!(client.read(&path), "mac\n", "{built}");
        }
        let (asked, waited) = since();
        // Nobody waits for the attempts after the first.
        assert!(asked >= 6 && waited.len() == holds, "{asked} answers, {waited:?}");
        assert!(waited.iter().all(|took| *took < TIMEOUT_MS + BUSY_MS), "{waited:?}");
        if holds > 0 {
            assert_told(&built, "'ssh-ng://hole'", "cannot connect to hole", "is up");
        }

        // Other processes of Nix know it already: the daemon's for another client, and root's own.
        let again = client.nix_build(&six(&format!("{cool_down}-again")), &["-j0"]);
        again.assert_success();
        let roots = six(&format!("{cool_down}-root"));
        let root = client.command("nix-build").env("NIX_OFFLOAD_LOG", "debug");
        root.args(["--no-out-link", "-j0", "-E", &roots]).run().assert_success();
        let (asked, waited) = since();
        assert!(asked >= 12 && waited.is_empty(), "{asked} answers, {waited:?}");
        wait_for_end_of_cool_down(&client);
    }
    client.verify_store();
}

fn wait_for_end_of_cool_down(client: &Client) {
    let names = client.entries("/run/nix-offload/down").into_iter().filter(|name| name.ends_with(".down"));
    for name in names {
        let down: Value =
            serde_json::from_str(&client.read(&format!("/run/nix-offload/down/{name}"))).unwrap();
        wait_until("the pause is over", SOON, || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            down["next"].as_f64().unwrap() < now.as_secs_f64()
        });
    }
}

#[test]
fn a_machine_with_a_name_nobody_knows() {
    let world = World::new();
    let client = plan(&world).machines("ssh-ng://no-such-host.invalid x86_64-linux - 1 1").start();
    assert_explained(&client, "'ssh-ng://no-such-host.invalid'", "cannot be resolved", "check the spelling");
}

#[test]
fn a_key_that_is_not_let_in() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).key(&world.stray_key()).start();
    assert_explained(&client, "'ssh-ng://mac'", "permission denied", "authorized_keys");
}

#[test]
fn a_host_key_nobody_knows() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client =
        plan(&world).knows_without_host_key(&mac).machines("ssh-ng://mac x86_64-linux - 1 1").start();
    assert_explained(&client, "'ssh-ng://mac'", "the host's key is not known", "known_hosts");
}

#[test]
fn a_host_key_that_changed() {
    let world = World::new();
    let (mac, other) = (world.builder("mac").start(), world.builder("other").start());
    let client = plan(&world)
        .knows_with_host_key(&mac, other.host_public_key())
        .machines("ssh-ng://mac x86_64-linux - 1 1")
        .start();
    assert_explained(&client, "'ssh-ng://mac'", "the host's key has changed", "ssh-keygen");
}

#[test]
fn a_machine_without_nix() {
    let world = World::new();
    let mac = world.builder("mac").without_nix().start();
    for protocol in ["ssh", "ssh-ng"] {
        let client = plan(&world).named(protocol).uses(&mac, protocol, 1).start();
        let name = format!("'{protocol}://mac'");
        assert_explained(&client, &name, "nix-daemon: not found", "install Nix there");
    }
}

#[test]
fn an_sshd_that_does_not_forward() {
    let world = World::new();
    let mac = world.builder("mac").refusing_forwarding().start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    assert_used(&client, &mac);
}

/// Nix's programs somewhere a login without terminal does not look.
#[test]
fn an_sshd_that_does_not_forward_with_nix_in_another_place() {
    let world = World::new();
    for place in ["/nix/var/nix/profiles/default/bin", "/root/.nix-profile/bin", "/usr/local/bin"] {
        let mac = world.builder("mac").without_daemon().refusing_forwarding().start();
        // A PATH without Nix: the real programs are in /usr/bin with everything else.
        mac.run(&format!(
            "mkdir -p {place} /only; for p in bash sh cat sleep env mkdir rm; do ln -s /usr/bin/$p /only/$p; done; \
             cp -P /usr/bin/nix* {place}/ 2>/dev/null; rm -f {place}/nix-offload*; ls {place}/nix-daemon"
        ));
        mac.write("/root/.bashrc", "export PATH=/only\n");
        let name = place.replace(['/', '.'], "");
        let client = plan(&world).named(&name).uses(&mac, "ssh-ng", 1).start();
        assert_used(&client, &mac);
    }
}

#[test]
fn a_machine_without_daemon() {
    let world = World::new();
    let mac = world.builder("mac").without_daemon().start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    assert_used(&client, &mac);
}

#[test]
fn a_named_remote_program_is_used() {
    let world = World::new();
    let mac = world.builder("mac").start();
    mac.write_mode(
        "/opt/my-daemon",
        "#!/bin/sh\necho \"$*\" >> /mnt/share/called\nexec nix-daemon \"$@\"\n",
        0o755,
    );
    let client = plan(&world)
        .knows(&mac)
        .machines("ssh-ng://mac?remote-program=/opt/my-daemon x86_64-linux - 1 1")
        .start();
    assert_used(&client, &mac);
    assert_eq!(client.read("/mnt/share/called"), "--stdio\n");
}

#[test]
fn a_login_shell_that_talks() {
    let world = World::new();
    for refusing in [false, true] {
        let mac = world.builder("mac").bashrc("echo Welcome, dear user; echo and a warning >&2");
        let mac = if refusing { mac.refusing_forwarding() } else { mac }.start();
        let client = plan(&world).named(&format!("client-{refusing}")).uses(&mac, "ssh-ng", 1).start();
        assert_used(&client, &mac);
    }
}

#[test]
fn an_sshd_with_one_session_only() {
    let world = World::new();
    let mac = world.builder("mac").max_sessions(1).start();
    let client = plan(&world).uses(&mac, "ssh-ng", 4).start();
    let built = client.nix_build(&drv::independent(8), &["-j0"]);
    assert_eq!(built.assert_success().out_paths().len(), 8);
    assert_only_masters_left(&client, 1);
}

#[test]
fn a_daemon_that_hangs_is_done_without() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    mac.stop_daemon();
    mac.run(&format!("rm -f {DAEMON_SOCKET}"));
    let silent = UnixListener::bind(mac.path(DAEMON_SOCKET)).unwrap();
    silent.set_nonblocking(true).unwrap();
    let asked = || iter::from_fn(|| silent.accept().ok()).count();
    // Root needs no daemon to build, and its connection has not failed.
    assert_used(&client, &mac);
    assert_eq!(mac.logins(), 1);
    assert!(asked() > 0);
    // It is asked again when it is time for that, in a way that waits for no more than three seconds, and not by each build.
    let built = client.nix_build(&drv::where_built("b"), &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n");
    assert_eq!(asked(), 0, "{built}");
    client.run("touch -d '11 minutes ago' /run/nix-offload/answered/*.refused");
    for (name, times) in [("c", 1), ("d", 0)] {
        client.nix_build(&drv::where_built(name), &["-j0"]).assert_success();
        assert_eq!(asked(), times, "{name}");
    }
}

#[test]
fn a_daemon_that_hangs_for_a_user_who_needs_it() {
    let world = World::new();
    let mut mac =
        world.builder("mac").release(Release::Sid).nix_conf("trusted-users = root user").as_user().start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    mac.stop_daemon();
    mac.run(&format!("rm -f {DAEMON_SOCKET}"));
    // The kernel takes connections in; nobody ever says a word.
    let silent = UnixListener::bind(mac.path(DAEMON_SOCKET)).unwrap();
    mac.run(&format!("chmod 666 {DAEMON_SOCKET}"));
    let refused = client.nix_build(&drv::where_built("refused"), &["-j0"]);
    assert_eq!(refused.assert_failure().stdout(), "", "{refused}");
    assert!(refused.took() < LIMIT, "{refused}");
    assert_told(&refused, "'ssh-ng://mac'", "no answer within", "nix-daemon runs and is well");
    drop(silent);
    mac.run(&format!("rm {DAEMON_SOCKET}"));
    mac.start_daemon();
    assert_used(&client, &mac);
}

#[test]
fn a_machine_that_comes_back_is_used_again() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    mac.stop_sshd();
    client.nix_build(&drv::where_built("off"), &["-j0"]).assert_failure();
    mac.start_sshd();
    assert_used(&client, &mac);
}

#[test]
fn a_machine_that_loses_one_build_after_another_is_left_alone_for_a_while() {
    let world = World::new();
    let (mac, pc) = (world.builder("mac").start(), world.builder("pc").start());
    let client = plan(&world).uses(&mac, "ssh-ng", 4).uses(&pc, "ssh-ng", 4).start();
    let told = "cannot build on 'ssh-ng://mac'";
    let build = client.spawn_nix_build(&gated("lost"), &["-j0"]);
    for times in 1..=3 {
        wait_for_begin(&client, "lost", &["mac"; 3][..times]);
        for pid in mac.pids_matching("sshd: root") {
            // One may have gone with another.
            mac.run(&format!("kill -s KILL {pid} || true"));
        }
    }
    wait_for_begin(&client, "lost", &["mac", "mac", "mac", "pc"]);
    let (_, down) = note(&client, "mac").expect("it is noted");
    assert!(down["reason"].as_str().unwrap().contains("connection was lost"), "{down}");
    // The pause is made longer, so that a slow machine does not outlast it.
    end_in(&client, "mac", 60.0);
    // That it can be connected to was known before.
    client.nix_offload(&["ping-store", "--store", "ssh-ng://mac"]).assert_success();
    let other = client.nix_build(&drv::where_built("other"), &["-j0"]);
    assert_eq!(client.read(&other.assert_success().out_path()), "pc\n");
    other.assert_stderr_lacks(told);
    open(&client, "lost");
    let built = build.wait();
    assert_eq!(built.assert_success().stderr().matches(told).count(), 1, "{built}");
    // When the pause is over it gets a build, and nothing is held against it once that has ended there.
    end_in(&client, "mac", 0.0);
    let last = client.nix_build(&drv::where_built("last"), &["-j0"]);
    assert_eq!(client.read(&last.assert_success().out_path()), "mac\n");
    assert_eq!(note(&client, "mac"), None);
    client.verify_store();
}

/// What is noted of the machine `name`: file and content.
fn note(client: &Client, name: &str) -> Option<(String, Value)> {
    client.entries("/run/nix-offload/down").into_iter().filter(|file| file.ends_with(".down")).find_map(
        |file| {
            let path = format!("/run/nix-offload/down/{file}");
            let value: Value = serde_json::from_str(&client.read(&path)).ok()?;
            value["way"].as_str().unwrap().contains(name).then_some((path, value))
        },
    )
}

/// Has the machine left alone for that many seconds from now on.
fn end_in(client: &Client, name: &str, seconds: f64) {
    let (path, mut down) = note(client, name).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    down["next"] = (now.as_secs_f64() + seconds).into();
    client.write(&path, &down.to_string());
}

#[test]
fn a_daemon_stopped_in_mid_build_fails_the_build_when_there_is_no_other() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let client = plan(&world).mode(Mode::Daemon).uses(&mac, "ssh-ng", 1).start();
    let build = client.spawn_nix_build(&gated("mid"), &["-j0"]);
    wait_for_begin(&client, "mid", &["mac"]);
    mac.stop_sshd();
    let failed = build.wait();
    failed.assert_failure();
    assert_eq!(failed.stdout(), "", "{failed}");
    assert_told(&failed, "ssh-ng://mac", "connection was lost", "connecting again");
    assert_told(&failed, "ssh-ng://mac", "connection refused", "check that sshd runs");
    wait_until("the build has ended there", SOON, || mac.pids_matching("mid.go").is_empty());
    assert_eq!(begun(&client, "mid"), ["mac"]);
    client.verify_store();
}

#[test]
fn the_builders_own_words_and_log_are_shown_when_a_build_fails() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for (name, mode) in [("single", Mode::SingleUser), ("daemon", Mode::Daemon)] {
        let client = plan(&world).named(name).mode(mode).uses(&mac, "ssh-ng", 1).start();
        let bad = drv::script(&format!("bad-{name}"), "for i in 1 2 3; do echo line $i; done; exit 7");
        let failed = client.nix_build(&bad, &["-j0"]);
        assert_eq!(failed.assert_failure().stdout(), "", "{failed}");
        failed.assert_stderr_has("failed with exit code 7").assert_stderr_has("ssh-ng://mac");
        failed.assert_stderr_has("line 1").assert_stderr_has("line 3");
        client.verify_store();
    }
}

/// No Nix older than 2.8 is at hand, but this one still speaks as older ones did if both sides are told that the other is
/// as old: 1.26 is what Nix 2.3 speaks.
#[test]
fn a_daemon_of_nix_2_3_is_asked_in_its_own_form_and_loses_no_connection() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let told =
        "head -c 8; head -c 8 > /dev/null; printf '\\032\\001\\000\\000\\000\\000\\000\\000'; exec cat";
    mac.write_mode(
        "/opt/old-daemon",
        &format!("#!/bin/sh\necho x >> /mnt/share/conversations\n({told}) | nix-daemon --stdio | ({told})\n"),
        0o755,
    );
    let client = plan(&world)
        .journald()
        .knows(&mac)
        .machines("ssh-ng://mac?remote-program=/opt/old-daemon x86_64-linux - 1 1")
        .start();
    let source = |text: &str| {
        drv::expression(&format!(
            r#"d "{text}" "cat ${{builtins.toFile "source" "words"}} > $out; echo {text} >> $out" {{ }}"#
        ))
    };
    for (builds, name) in ["first", "second", "third"].into_iter().enumerate() {
        let built = client.nix_build(&source(name), &["-j0"]);
        let path = built.assert_success().assert_stderr_lacks("lost").out_path();
        assert_eq!(client.read(&path), format!("words{name}\n"));
        assert_eq!(mac.read("/mnt/share/conversations").lines().count(), builds + 1, "{built}");
    }
    // A note that is gone costs one conversation, and nothing that is known of the machine.
    client.run("rm $(find /run/nix-offload -name '*.old')");
    client.nix_build(&source("fourth"), &["-j0"]).assert_success().assert_stderr_lacks("lost");
    client.nix_build(&source("fifth"), &["-j0"]).assert_success();
    assert_eq!(mac.read("/mnt/share/conversations").lines().count(), 6);
    let said = client.journal("-t nix-offload");
    let guesses = said.iter().filter(|entry| entry["MESSAGE"] == "inputs are not there any more");
    assert_eq!(guesses.count(), 0, "{said:#?}");
    assert_only_masters_left(&client, 1);
    client.verify_store();
}
