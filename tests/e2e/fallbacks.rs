//! The second-best ways to a builder's store: each one taken because a real sshd refuses the better one, remembered,
//! and given up again once the better one is open.

use harness::{Builder, BuilderPlan, Client, Hook, Output, Running, World, drv, event, wait_until};

use crate::support::{SOON, begun, gated, hide, open, wait_for_begin};

const SOCKET: &str = "daemon socket";
const SESSION: &str = "nix-daemon --stdio";
const SERVE: &str = "nix-store --serve";
const CLOSED: &str = "the daemon's socket is not open to us";
const NO_DAEMON: &str = "no daemon can be started for us";
/// Where the hook notes which ways are closed.
const NOTES: &str = "/run/nix-offload/answered";

/// How the daemon's socket is kept from us.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closed {
    /// sshd is told to refuse channels to it.
    Refused,
    /// There is none.
    Absent,
}

/// A build goes the second-best way at once, nobody asks for the better one again, and when `allow` has opened that
/// one it is taken as soon as the note is old.
fn assert_taken_until_the_socket_is_open(
    plan: impl FnOnce(BuilderPlan) -> Builder,
    closed: Closed,
    protocol: &str,
    way: &str,
    allow: impl FnOnce(&mut Builder),
) {
    let world = World::new();
    let mut mac = plan(world.builder("mac"));
    let client = world.client().hook(Hook::Ours).journald().uses(&mac, protocol, 2).start();
    for name in ["first", "second", "third"] {
        assert_built_there(&client, name);
    }
    assert_way(&client, protocol, way);
    assert_eq!(told(&client, CLOSED), 1, "a hook asked again though it was noted");
    assert_eq!(told(&client, NO_DAEMON), usize::from(way == SERVE), "a hook tried again though it was noted");
    let refused = usize::from(closed == Closed::Refused);
    assert_eq!(mac.refused_channels(), refused, "{}", mac.log("sshd"));
    assert_eq!(holders(&client), 1, "{:?}", client.processes());
    allow(&mut mac);
    assert_built_there(&client, "fourth");
    assert_way(&client, protocol, way);
    age_notes(&client);
    assert_built_there(&client, "fifth");
    assert_way(&client, protocol, SOCKET);
    assert_eq!(mac.refused_channels(), refused, "{}", mac.log("sshd"));
    client.verify_store();
    mac.verify_store();
}

fn assert_built_there(client: &Client, name: &str) {
    let built = client.nix_build(&drv::where_built(name), &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n");
    built.assert_stderr_lacks("cannot").assert_stderr_lacks("error").assert_stderr_lacks("lost");
}

/// What `ping-store` says.
fn ping(client: &Client, uri: &str) -> Output {
    let output = client.nix_offload(&["ping-store", "--store", uri]);
    output.assert_success();
    output
}

#[track_caller]
fn assert_way(client: &Client, protocol: &str, way: &str) {
    let output = ping(client, &format!("{protocol}://mac"));
    assert!(output.stdout().contains(&format!("\nWay: {way}\n")), "{output}");
    assert_eq!(output.stdout().contains("\nDetour: "), way != SOCKET, "{output}");
}

/// How often hooks told this.
fn told(client: &Client, message: &str) -> usize {
    client.journal("-t nix-offload").iter().filter(|entry| event(entry) == message).count()
}

/// Each refused channel leaves one process until its master ends.
fn holders(client: &Client) -> usize {
    client
        .processes()
        .iter()
        .filter(|process| process.command_line.starts_with("/bin/sh -c exec 3>&-"))
        .count()
}

/// As if they had been written longer ago than they count.
fn age_notes(client: &Client) {
    client.run(&format!("touch -d '11 minutes ago' {NOTES}/*.refused"));
    client.run(&format!("for note in {NOTES}/*.serve; do touch -cd '11 minutes ago' $note; done"));
}

fn without_options(mac: &mut Builder) {
    mac.restart_sshd_with(&[]);
}

/// sshd reads them at each login.
fn without_key_options(mac: &mut Builder) {
    mac.set_key_options("");
    mac.restart_sshd_with(&[]);
}

#[test]
fn an_sshd_that_forwards_to_no_socket() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.sshd_option("AllowStreamLocalForwarding no").start(),
        Closed::Refused,
        "ssh-ng",
        SESSION,
        without_options,
    );
}

#[test]
fn an_sshd_that_forwards_nothing() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.sshd_option("DisableForwarding yes").start(),
        Closed::Refused,
        "ssh-ng",
        SESSION,
        without_options,
    );
}

#[test]
fn an_account_that_may_open_only_one_way_out() {
    assert_taken_until_the_socket_is_open(
        |mac| {
            let block = "Match User root\n  PermitOpen none\n  AllowStreamLocalForwarding remote";
            mac.sshd_option(block).start()
        },
        Closed::Refused,
        "ssh",
        SESSION,
        without_options,
    );
}

#[test]
fn a_restricted_key() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.key_options("restrict").start(),
        Closed::Refused,
        "ssh-ng",
        SESSION,
        without_key_options,
    );
}

#[test]
fn a_key_that_may_forward_nothing() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.key_options("no-port-forwarding").start(),
        Closed::Refused,
        "ssh",
        SESSION,
        without_key_options,
    );
}

#[test]
fn no_daemon_runs() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.without_daemon().start(),
        Closed::Absent,
        "ssh-ng",
        SESSION,
        Builder::start_daemon,
    );
}

#[test]
fn a_shell_that_talks_first() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.refusing_forwarding().bashrc("echo Welcome, dear user; echo and a warning >&2").start(),
        Closed::Refused,
        "ssh-ng",
        SESSION,
        without_options,
    );
}

#[test]
fn a_key_for_a_daemon() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.key_options(r#"command="nix-daemon --stdio",restrict"#).start(),
        Closed::Refused,
        "ssh-ng",
        SESSION,
        without_key_options,
    );
}

#[test]
fn a_key_for_a_store() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.key_options(r#"command="nix-store --serve --write",restrict"#).start(),
        Closed::Refused,
        "ssh",
        SERVE,
        without_key_options,
    );
}

/// A block of sshd_config for an account that runs one command whatever is asked for.
fn account(command: &str) -> String {
    format!("Match User root\n  ForceCommand {command}\n  DisableForwarding yes")
}

#[test]
fn an_account_for_a_daemon() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.sshd_option(&account("nix-daemon --stdio")).start(),
        Closed::Refused,
        "ssh-ng",
        SESSION,
        without_options,
    );
}

#[test]
fn an_account_for_a_store() {
    assert_taken_until_the_socket_is_open(
        |mac| mac.sshd_option(&account("nix-store --serve --write")).start(),
        Closed::Refused,
        "ssh",
        SERVE,
        without_options,
    );
}

#[test]
fn no_daemon_can_be_started() {
    assert_taken_until_the_socket_is_open(
        |mac| {
            let mac = mac.without_daemon().start();
            hide(&mac, "nix-daemon");
            mac
        },
        Closed::Absent,
        "ssh",
        SERVE,
        |mac| {
            mac.run("umount -l /usr/bin");
            mac.start_daemon();
        },
    );
}

#[test]
fn a_socket_that_stays_closed_is_looked_at_again_and_again_at_no_cost() {
    let world = World::new();
    let mut mac = world.builder("mac").refusing_forwarding().start();
    let client = world.client().hook(Hook::Ours).journald().uses(&mac, "ssh-ng", 1).start();
    for round in 1..=3 {
        assert_built_there(&client, &format!("round-{round}"));
        assert_way(&client, "ssh-ng", SESSION);
        assert_eq!(mac.refused_channels(), round, "{}", mac.log("sshd"));
        assert_eq!((holders(&client), told(&client, CLOSED)), (1, 1), "{:?}", client.processes());
        age_notes(&client);
    }
    assert_eq!(mac.logins(), 1);
    // On another master there is not even the first one.
    client.run("/opt/nix-offload/bin/nix-offload-proxy stop --all");
    assert_built_there(&client, "another");
    assert_way(&client, "ssh-ng", SESSION);
    assert_eq!((mac.refused_channels(), holders(&client), mac.logins()), (4, 0, 2), "{}", mac.log("sshd"));
    age_notes(&client);
    without_options(&mut mac);
    assert_built_there(&client, "open");
    assert_way(&client, "ssh-ng", SOCKET);
}

/// Three builds that are under way at the same time.
fn three_at_once(client: &Client, round: &str) -> Vec<Running> {
    let names = [1, 2, 3].map(|number| format!("{round}-{number}"));
    let builds = names.iter().map(|name| client.spawn_nix_build(&gated(name), &["-j0"])).collect();
    for name in &names {
        wait_for_begin(client, name, &["mac"]);
    }
    for name in &names {
        open(client, name);
    }
    builds
}

#[test]
fn one_session_for_each_connection_and_no_sockets() {
    let world = World::new();
    let mut mac = world.builder("mac").refusing_forwarding().max_sessions(1).start();
    let client = world.client().hook(Hook::Ours).journald().uses(&mac, "ssh-ng", 3).start();
    assert_built_there(&client, "first");
    for build in three_at_once(&client, "closed") {
        build.wait().assert_success();
    }
    // A connection for each build, and only the first was asked for the socket.
    assert!(mac.logins() >= 3, "{} logins", mac.logins());
    assert_eq!((mac.refused_channels(), told(&client, CLOSED)), (1, 1), "{}", mac.log("sshd"));
    assert_way(&client, "ssh-ng", SESSION);
    let before = mac.logins();
    mac.restart_sshd_with(&["MaxSessions 1"]);
    age_notes(&client);
    for build in three_at_once(&client, "open") {
        build.wait().assert_success();
    }
    assert_eq!(mac.logins(), before + 1, "{}", mac.log("sshd"));
    assert_way(&client, "ssh-ng", SOCKET);
    assert_eq!(mac.refused_channels(), 1);
    client.verify_store();
}

/// Eight hooks want a session at the same moment, when there is no connection yet. A connection that was made for one
/// may be taken by another, and sshd counts the command that began it for a moment longer.
#[test]
fn as_many_builds_as_there_may_be_connections_with_one_session() {
    let world = World::new();
    let mac = world.builder("mac").refusing_forwarding().max_sessions(1).start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 8).start();
    // Eight logins one after the other take their time on a machine that has much to do.
    client.write("/etc/nix/offload.toml", "[ssh]\nconnect-timeout = 60\n");
    let names: Vec<String> = (0..8).map(|number| format!("crowd-{number}")).collect();
    let mut builds: Vec<Running> = names
        .iter()
        .map(|name| {
            client.spawn_beside_others(client.nix_build_command(&gated(name), &["-j0"]).limit(SOON * 4))
        })
        .collect();
    wait_until("all are begun", SOON * 3, || {
        for build in &mut builds {
            assert!(build.is_running(), "{}", build.stderr_so_far());
        }
        names.iter().all(|name| !begun(&client, name).is_empty())
    });
    for name in &names {
        open(&client, name);
    }
    for build in builds {
        build.wait().assert_success();
    }
    client.verify_store();
    mac.verify_store();
}

/// A program that is named is what is meant: the socket, whose daemon may be another one, is not asked for.
#[test]
fn a_remote_program_of_several_words() {
    let world = World::new();
    let mac = world.builder("mac").refusing_forwarding().start();
    let uri = "ssh-ng://mac?remote-program=env%20CALLED_BY=us%20nix-daemon";
    let client =
        world.client().hook(Hook::Ours).journald().knows(&mac).machines(&format!("{uri} x86_64-linux - 1 1"));
    let client = client.start();
    let build = client.spawn_nix_build(&gated("gate"), &["-j0"]);
    wait_for_begin(&client, "gate", &["mac"]);
    let daemon = mac.pids_matching("nix-daemon --stdio");
    let environment = daemon.iter().map(|pid| mac.read(&format!("/proc/{pid}/environ"))).collect::<String>();
    assert!(environment.contains("CALLED_BY=us"), "{:?}", mac.processes());
    open(&client, "gate");
    build.wait().assert_success();
    assert!(ping(&client, uri).stdout().contains(&format!("\nWay: {SESSION}\n")));
    assert_eq!((mac.refused_channels(), told(&client, CLOSED), holders(&client)), (0, 0, 0));
}

/// The daemon behind the socket has another store.
#[test]
fn a_remote_store() {
    for (protocol, way) in [("ssh-ng", SESSION), ("ssh", SESSION)] {
        let world = World::new();
        let mac = world.builder("mac").refusing_forwarding().start();
        let uri = format!("{protocol}://mac?remote-store=/srv/store");
        let machines = format!("{uri} x86_64-linux - 1 1");
        let client = world.client().hook(Hook::Ours).journald().knows(&mac).machines(&machines).start();
        let path = client.nix_build(&drv::trivial("elsewhere"), &["-j0"]).assert_success().out_path();
        assert!(mac.exists(&format!("/srv/store{path}")) && !mac.exists(&path), "{path}");
        assert!(ping(&client, &uri).stdout().contains(&format!("\nWay: {way}\n")));
        assert_eq!((mac.refused_channels(), told(&client, CLOSED), holders(&client)), (0, 0, 0));
        client.verify_store();
    }
}
