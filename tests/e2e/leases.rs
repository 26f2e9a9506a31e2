//! Slots that several clients share on a machine that knows nothing of it.

use std::{
    collections::BTreeSet,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use harness::{Builder, BuilderPlan, Client, Hook, Running, World, drv, event, wait_until};
use nix::sys::signal::Signal;

use crate::{
    running::{builds, marked},
    support::{SOON, begun, gated, held_locks, hide, open, wait_for_begin},
};

const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks.
const PACE: Duration = Duration::from_millis(2);
const WAITING: &str = "waiting for one of 2 shared slots of 'ssh-ng://mac'";
const WITHOUT: &str = "has no means to share its slots";

/// One that knows the machine, with four slots of its own, and shares `slots` with others.
fn client(world: &World, mac: &Builder, name: &str, slots: u32) -> Client {
    client_by("ssh-ng", world, mac, name, slots)
}

fn client_by(protocol: &str, world: &World, mac: &Builder, name: &str, slots: u32) -> Client {
    let client = world.client().named(name).hook(Hook::Ours).uses(mac, protocol, 4).start();
    client.write("/etc/nix/offload.toml", &format!("[[machine]]\nname = 'mac'\nshared-slots = {slots}\n"));
    client
}

/// Builds that each take a moment.
fn several(name: &str, count: usize) -> String {
    let one = |number| {
        let name = format!("{name}-{number}");
        let script = drv::quote(&marked(&name, "sleep 0.3; echo $name > $out"));
        format!("(d \"{name}\" {script} {{ }})")
    };
    let all: Vec<String> = (0..count).map(one).collect();
    drv::expression(&format!("[ {} ]", all.join(" ")))
}

fn start(client: &Client, name: &str) -> Running {
    client.spawn_beside_others(client.nix_build_command(&gated(name), &["-j0"]).limit(LIMIT))
}

/// Nobody holds a lock there, and nothing of what held them runs.
pub(crate) fn assert_all_given_back(mac: &Builder) {
    wait_until("all slots are given back", SOON, || {
        let held = mac.run(
            "for f in /tmp/nix-offload-slots/*; do flock -n \"$f\" true || echo \"$f\"; done 2>/dev/null",
        );
        held.is_empty() && mac.pids_matching("head -c 1").is_empty()
    });
}

#[test]
fn two_clients_never_have_more_builds_there_than_slots_they_share() {
    const EACH: usize = 8;
    let world = World::new();
    let mac = world.builder("mac").start();
    let clients = ["one", "two"].map(|name| client(&world, &mac, name, 2));
    let (over, is_over) = mpsc::channel::<()>();
    let (most, clients_seen) = thread::scope(|scope| {
        let mac = &mac;
        let watcher = scope.spawn(move || {
            let (mut most, mut seen) = (0, BTreeSet::new());
            while is_over.recv_timeout(PACE) == Err(RecvTimeoutError::Timeout) {
                let running = builds(mac);
                most = most.max(running.len());
                seen.extend(running.iter().map(|build| build.name[..3].to_owned()));
            }
            (most, seen)
        });
        // Dropped at the end whatever happens, or the watcher would watch for ever.
        let over = over;
        let running: Vec<Running> = clients
            .iter()
            .map(|client| {
                let build = client.nix_build_command(&several(client.name(), EACH), &["-j0"]);
                client.spawn_beside_others(build.limit(LIMIT))
            })
            .collect();
        let outputs: Vec<_> = running.into_iter().map(Running::wait).collect();
        drop(over);
        for built in outputs {
            assert_eq!(built.assert_success().out_paths().len(), EACH);
            built.assert_stderr_lacks(WITHOUT).assert_stderr_lacks("lost");
        }
        watcher.join().unwrap()
    });
    assert_eq!((most, clients_seen.len()), (2, 2));
    assert_all_given_back(&mac);
    for client in &clients {
        assert_eq!(held_locks(client), "");
        client.verify_store();
    }
    mac.verify_store();
}

/// A build of the second client waits for one of the slots that the first one has both of.
fn with_both_taken(test: impl FnOnce(&Client, [Running; 2], &Client)) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let one = client(&world, &mac, "one", 2);
    let two = client(&world, &mac, "two", 2);
    let holders = ["first", "second"].map(|name| start(&one, name));
    let both = || begun(&one, "first").len() + begun(&one, "second").len() == 2;
    let begin = Instant::now();
    wait_until("both are begun or late", SOON * 2, || both() || begin.elapsed() > SOON);
    let said = holders.each_ref().map(Running::stderr_so_far);
    assert!(both(), "{said:?}\n{:?}\n{:?}", one.processes(), mac.processes());
    let waiter = start(&two, "third");
    wait_until("the third waits", SOON, || waiter.stderr_so_far().contains(WAITING));
    assert_eq!(begun(&two, "third"), Vec::<String>::new());
    test(&one, holders, &two);
    wait_for_begin(&two, "third", &["mac"]);
    open(&two, "third");
    let built = waiter.wait();
    assert_eq!(built.assert_success().stderr().matches(WAITING).count(), 1, "{built}");
    assert_all_given_back(&mac);
}

#[test]
fn a_build_that_ends_gives_its_slot_to_the_one_that_waits() {
    with_both_taken(|one, [first, second], two| {
        open(one, "first");
        first.wait().assert_success();
        wait_for_begin(two, "third", &["mac"]);
        open(one, "second");
        second.wait().assert_success();
    });
}

#[test]
fn a_slot_is_given_back_while_outputs_travel() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let [one, two] = ["one", "two"].map(|name| client(&world, &mac, name, 1));
    let large = drv::script(
        "large",
        "cat /etc/machine-name >> /mnt/share/large.begun; head -c 300M /dev/zero > $out",
    );
    let mut first = one.spawn_beside_others(one.nix_build_command(&large, &["-j0"]).limit(LIMIT));
    wait_for_begin(&one, "large", &["mac"]);
    let second = start(&two, "second");
    wait_for_begin(&two, "second", &["mac"]);
    assert!(first.is_running(), "the first build had ended before");
    open(&two, "second");
    first.wait().assert_success();
    second.wait().assert_success();
    assert_all_given_back(&mac);
}

#[test]
fn a_client_that_is_killed_gives_its_slots_back() {
    with_both_taken(|_, [first, second], two| {
        first.signal(Signal::SIGKILL);
        wait_for_begin(two, "third", &["mac"]);
        second.signal(Signal::SIGKILL);
    });
}

#[test]
fn a_connection_that_is_cut_gives_its_slots_back_and_its_builds_wait_again() {
    with_both_taken(|one, holders, two| {
        let master = one.pids_matching("ssh: /run/nix-offload/");
        one.kill(master[0], "KILL");
        wait_for_begin(two, "third", &["mac"]);
        for name in ["first", "second"] {
            open(one, name);
        }
        for holder in holders {
            assert_eq!(one.read(&holder.wait().assert_success().out_path()), "mac\n");
        }
    });
}

#[test]
fn more_builds_than_one_connection_has_shells_for_all_have_their_slots() {
    const COUNT: u32 = 20;
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().named("one").hook(Hook::Ours).uses(&mac, "ssh-ng", COUNT).start();
    client.write("/etc/nix/offload.toml", &format!("[[machine]]\nname = 'mac'\nshared-slots = {COUNT}\n"));
    let names: Vec<String> = (0..COUNT).map(|number| format!("many-{number}")).collect();
    let builds: Vec<Running> = names.iter().map(|name| start(&client, name)).collect();
    for name in &names {
        wait_until("all are begun", LIMIT, || begun(&client, name) == ["mac"]);
    }
    assert_eq!(held(&mac), COUNT as usize);
    for (name, build) in names.iter().zip(builds) {
        open(&client, name);
        build.wait().assert_success().assert_stderr_lacks(WITHOUT);
    }
    assert_all_given_back(&mac);
}

/// How many slots are taken there.
fn held(mac: &Builder) -> usize {
    let lines =
        mac.run("for f in /tmp/nix-offload-slots/slot-*; do flock -n \"$f\" true || echo \"$f\"; done");
    lines.lines().count()
}

#[test]
fn a_slot_that_is_lost_in_mid_build_is_taken_anew() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().named("one").hook(Hook::Ours).uses(&mac, "ssh-ng", 4).journald().start();
    client.write("/etc/nix/offload.toml", "[[machine]]\nname = 'mac'\nshared-slots = 1\n");
    let said = |message: &str| {
        let entries = client.journal("-t nix-offload");
        entries.iter().filter(|entry| event(entry) == message).count()
    };
    let build = start(&client, "mid");
    wait_for_begin(&client, "mid", &["mac"]);
    assert_eq!(held(&mac), 1);
    // What holds the slot is gone, and the build is well.
    for pid in mac.pids_matching("head -c 1") {
        mac.kill(pid, "KILL");
    }
    wait_until("it is noticed", SOON, || said("the shared slot was lost") == 1);
    wait_until("it is taken anew", SOON, || said("a shared slot again") == 1);
    assert_eq!((held(&mac), begun(&client, "mid")), (1, vec!["mac".to_owned()]));
    // Of one that is lost for good the build takes no notice.
    hide(&mac, "flock");
    for pid in mac.pids_matching("head -c 1") {
        mac.kill(pid, "KILL");
    }
    let lasting = "no shared slot again";
    wait_until("it is given up", SOON, || said(lasting) == 1);
    open(&client, "mid");
    let built = build.wait();
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n");
    built.assert_stderr_lacks("lost");
}

#[test]
fn a_shell_that_cannot_be_had_just_now_is_no_fault_of_the_connection() {
    let world = World::new();
    let mac = world.builder("mac").max_sessions(1).start();
    let client = world.client().named("one").hook(Hook::Ours).uses(&mac, "ssh-ng", 4).journald().start();
    let settings = "[choice]\nsample-every = 0\n[[machine]]\nname = 'mac'\nshared-slots = 2\n";
    client.write("/etc/nix/offload.toml", settings);
    let first = start(&client, "first");
    wait_for_begin(&client, "first", &["mac"]);
    // The first one's shell has the only session, and nobody can log in for another one.
    mac.set_key_options("from=\"192.0.2.1\"");
    let second = start(&client, "second");
    wait_until("another master is tried for", SOON, || {
        let entries = client.journal("-t nix-offload");
        entries.iter().any(|entry| event(entry) == "SSH master not started")
    });
    assert_eq!(begun(&client, "second"), Vec::<String>::new());
    open(&client, "first");
    first.wait().assert_success();
    wait_for_begin(&client, "second", &["mac"]);
    assert_eq!(held(&mac), 1);
    open(&client, "second");
    second.wait().assert_success().assert_stderr_lacks("connecting again").assert_stderr_lacks(WITHOUT);
    assert_all_given_back(&mac);
}

/// A login shell that does not come to run anything while the machine has too much to do.
const SLOW: &str = "#!/bin/bash\n\
    if [ \"$2\" = sh ]; then while [ -e /tmp/too-much-to-do ]; do sleep 0.1; done; fi\n\
    exec /bin/bash \"$@\"\n";

#[test]
fn a_machine_that_has_too_much_to_do_to_start_a_shell_gets_no_more_builds_than_before() {
    /// More than the time in which a shell should say something.
    const PATIENT: Duration = Duration::from_secs(150);
    let world = World::new();
    let mac = world.builder("mac").start();
    mac.write_mode("/usr/local/bin/slow", SLOW, 0o755);
    mac.run("sed -i '/^root:/s|/bin/bash|/usr/local/bin/slow|' /etc/passwd");
    let client = client(&world, &mac, "one", 1);
    let settings = "[choice]\nsample-every = 0\n[[machine]]\nname = 'mac'\nshared-slots = 1\n";
    client.write("/etc/nix/offload.toml", settings);
    client.nix_build(&drv::where_built("first"), &["-j0"]).assert_success().assert_stderr_lacks(WITHOUT);
    mac.write("/tmp/too-much-to-do", "");
    let names = ["second", "third"];
    let running = names.map(|name| {
        client.spawn_beside_others(client.nix_build_command(&gated(name), &["-j0"]).limit(PATIENT))
    });
    for build in &running {
        wait_until("the user is told", PATIENT, || {
            build.stderr_so_far().contains("waiting for one of 1 shared slots of 'ssh-ng://mac'")
        });
    }
    let all_begun = || names.map(|name| begun(&client, name).len());
    assert_eq!(all_begun(), [0, 0]);
    mac.run("rm /tmp/too-much-to-do");
    wait_until("one is begun", SOON, || all_begun() != [0, 0]);
    let first = usize::from(all_begun() == [0, 1]);
    assert_eq!((all_begun().iter().sum::<usize>(), held(&mac)), (1, 1));
    open(&client, names[first]);
    wait_for_begin(&client, names[1 - first], &["mac"]);
    open(&client, names[1 - first]);
    for build in running {
        build.wait().assert_success().assert_stderr_lacks(WITHOUT).assert_stderr_lacks("shared slots (");
    }
    assert_all_given_back(&mac);
}

/// Builds go there without leases, and why is said once.
fn assert_goes_on_without(
    protocol: &str,
    plan: impl FnOnce(BuilderPlan) -> BuilderPlan,
    change: &dyn Fn(&Builder),
    why: &str,
) {
    let world = World::new();
    let mac = plan(world.builder("mac")).start();
    change(&mac);
    let client = client_by(protocol, &world, &mac, "one", 2);
    let first = client.nix_build(&drv::where_built("first"), &["-j0"]);
    assert_eq!(client.read(&first.assert_success().out_path()), "mac\n");
    first.assert_stderr_has(WITHOUT).assert_stderr_has(why);
    assert_eq!(first.stderr().matches(WITHOUT).count(), 1, "{first}");
    for name in ["second", "third"] {
        client.nix_build(&drv::where_built(name), &["-j0"]).assert_success().assert_stderr_lacks(WITHOUT);
    }
}

#[test]
fn builds_go_on_where_there_is_no_flock() {
    assert_goes_on_without("ssh-ng", |mac| mac, &|mac| hide(mac, "flock"), "flock(1) is not there");
}

#[test]
fn builds_go_on_where_sshd_runs_one_command_only() {
    for (command, protocol) in [("nix-daemon --stdio", "ssh-ng"), ("nix-store --serve --write", "ssh")] {
        let options = format!("command=\"{command}\",restrict");
        assert_goes_on_without(protocol, |mac| mac.key_options(&options), &|_| {}, "gives us no shell");
    }
}

#[test]
fn builds_go_on_where_somebody_else_has_the_place() {
    let link = |mac: &Builder| drop(mac.run("ln -s /root /tmp/nix-offload-slots"));
    assert_goes_on_without("ssh-ng", |mac| mac, &link, "/tmp/nix-offload-slots is not a directory");
}

/// A login shell that knows no operators, quotes or variables, and says something first.
const STRANGE: &str = "#!/bin/sh\necho welcome\n[ \"$1\" = -c ] && exec $2\n";

#[test]
fn any_login_shell_few_sessions_and_another_account_will_do() {
    let strange = |mac: &Builder| {
        mac.write_mode("/usr/local/bin/strange", STRANGE, 0o755);
        mac.run("sed -i '/^root:/s|/bin/bash|/usr/local/bin/strange|' /etc/passwd");
    };
    type Plan<'a> = (&'a dyn Fn(BuilderPlan) -> BuilderPlan, &'a dyn Fn(&Builder));
    let plans: [Plan<'_>; 3] = [
        (&|mac| mac, &strange),
        (&|mac| mac.max_sessions(1), &|_| {}),
        // The directory and its files are root's, who was there first.
        (&|mac| mac.as_user().nix_conf("trusted-users = root user"), &|mac| {
            drop(mac.run("mkdir -m 1777 /tmp/nix-offload-slots; cd /tmp/nix-offload-slots; umask 0; touch queue slot-0; sysctl -q fs.protected_regular || true"))
        }),
    ];
    for (plan, change) in plans {
        let world = World::new();
        let mac = plan(world.builder("mac")).start();
        change(&mac);
        let client = client(&world, &mac, "one", 1);
        let built = client.nix_build(&several("one", 4), &["-j0"]);
        assert_eq!(built.assert_success().out_paths().len(), 4);
        built.assert_stderr_lacks(WITHOUT);
        assert!(mac.exists("/tmp/nix-offload-slots/slot-0"));
        assert_all_given_back(&mac);
    }
}
