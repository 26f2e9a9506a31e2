//! The sampler: hooks know the real load of machines, and what they are short of; nothing depends on it.
//!
//! All machines of a test share one kernel, so what `/proc` says of load is the same everywhere. Where machines are to
//! differ, files with other figures are mounted over those of `/proc`: whatever reads them there sees what it would see
//! on a machine with that load. What file systems say is their own.

use std::time::Duration;

use harness::{Builder, Client, ClientPlan, Hook, OURS, Output, World, drv, wait_until};
use serde_json::Value;

use crate::support::{
    NO_SAMPLES, OFTEN, SOON, assert_only_masters_left, begun, gated, open, picky, pretend, wait_for_begin,
};

/// Longer than the sampler stays after the last build.
const IDLE: Duration = Duration::from_secs(60);

/// A client with these machines, in this order, four slots each.
fn client(world: &World, builders: &[&Builder]) -> Client {
    let plan = |plan: ClientPlan, builder: &&Builder| plan.uses(builder, "ssh-ng", 4);
    let plan = builders.iter().fold(world.client().hook(Hook::Ours), plan);
    let client = plan.journald().env("NIX_OFFLOAD_LOG", "debug").start();
    client.write("/etc/nix/offload.toml", OFTEN);
    client
}

fn build(client: &Client, name: &str) -> Output {
    client.nix_build(&drv::where_built(name), &["-j0"])
}

#[track_caller]
fn assert_built_on(client: &Client, output: &Output, machine: &str) {
    assert_eq!(client.read(&output.assert_success().out_path()), format!("{machine}\n"), "{output}");
}

/// What is written down of the machines.
fn samples(client: &Client) -> Vec<Value> {
    if !client.exists("/run/nix-offload/load.json") {
        return Vec::new();
    }
    let all: Value = serde_json::from_str(&client.read("/run/nix-offload/load.json")).unwrap();
    all["machines"].as_object().unwrap().values().cloned().collect()
}

#[track_caller]
fn wait_for_sample(client: &Client, what: &str, is_meant: impl Fn(&Value) -> bool) {
    wait_until(what, SOON, || samples(client).iter().any(&is_meant));
}

#[track_caller]
fn wait_for_load(client: &Client, load: f64) {
    wait_for_sample(client, &format!("a load of {load}"), |sample| sample["load_average"] == load);
}

fn samplers(client: &Client) -> Vec<u32> {
    client.pids_matching("nix-offload sample")
}

/// Shells of samplers, which have no argument.
fn shells(builder: &Builder) -> usize {
    builder.processes().iter().filter(|process| process.command_line == "sh").count()
}

#[test]
fn builds_go_where_others_leave_more_room() {
    let world = World::new();
    let (left, right) = (world.builder("left").start(), world.builder("right").start());
    pretend(&left, 40.0, 100.0);
    pretend(&right, 0.5, 0.0);
    let client = client(&world, &[&left, &right]);
    assert_built_on(&client, &build(&client, "nothing-is-known-yet"), "left");
    wait_for_load(&client, 40.0);
    for name in ["a", "b"] {
        assert_built_on(&client, &build(&client, name), "right");
    }
    wait_for_load(&client, 0.5);
    pretend(&left, 0.25, 0.0);
    pretend(&right, 50.0, 100.0);
    wait_for_load(&client, 0.25);
    wait_for_load(&client, 50.0);
    assert_built_on(&client, &build(&client, "c"), "left");
    let sample = &samples(&client)[0];
    let number = |name: &str| sample[name].as_f64().unwrap_or_else(|| panic!("no {name}: {sample}"));
    assert!(number("cores") > 0.0 && number("memory_free") > 1e6 && number("disk_free") > 1e6);
    assert!(number("round_trip") > 0.0 && number("round_trip") < 1.0, "{sample}");
    assert_eq!((left.logins(), right.logins()), (1, 1));
    assert_only_masters_left(&client, 2);
}

#[test]
fn builds_of_this_client_are_no_foreign_load() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac]);
    // One after the other: two first users of a store may hinder each other as they make its database.
    let begin = |name| {
        let build = client.spawn_nix_build(&gated(name), &["-j0"]);
        wait_for_begin(&client, name, &["mac"]);
        build
    };
    let running = ["x", "y"].map(begin);
    // Two slots, averaged over a minute as the load average is: after ten seconds some 0.3.
    wait_for_sample(&client, "own load is counted", |sample| sample["own_load"].as_f64() > Some(0.2));
    for name in ["x", "y"] {
        open(&client, name);
    }
    for build in running {
        build.wait().assert_success();
    }
    let before = samples(&client)[0]["own_load"].as_f64();
    wait_for_sample(&client, "it fades", |sample| sample["own_load"].as_f64() < before);
}

#[test]
fn an_inhibit_file_keeps_builds_away_and_says_why() {
    const FILE: &str = "/etc/nix/offload-inhibit";
    let world = World::new();
    let (left, right) = (world.builder("left").start(), world.builder("right").start());
    for builder in [&left, &right] {
        pretend(builder, 0.0, 0.0);
    }
    let client = client(&world, &[&left, &right]);
    assert_built_on(&client, &build(&client, "before"), "left");
    left.write(FILE, "nightly backup\nand more\n");
    wait_for_sample(&client, "left is inhibited", |sample| sample["inhibited"] == "nightly backup");
    assert_built_on(&client, &build(&client, "away"), "right");
    right.write(FILE, "");
    wait_for_sample(&client, "right is inhibited", |sample| sample["inhibited"] == "");
    // With nowhere to go it waits, and begins soon after the file is gone.
    let waiting = client.spawn_nix_build(&drv::where_built("waiting"), &["-j0"]);
    wait_until("the reason is told", SOON, || {
        let said = |entry: &Value| entry.to_string().contains("nightly backup");
        client.journal("-t nix-offload").iter().any(said)
    });
    right.run(&format!("rm {FILE}"));
    assert_built_on(&client, &waiting.wait(), "right");
    left.run(&format!("rm {FILE}"));
    wait_until("nobody is inhibited", SOON, || {
        samples(&client).iter().all(|sample| sample.get("inhibited").is_none())
    });
    assert_built_on(&client, &build(&client, "after"), "left");
}

#[test]
fn machines_that_are_short_of_room_get_no_builds() {
    for (what, options) in [("disk_free", "size=100m"), ("inodes_free", "size=2g,nr_inodes=5000")] {
        let world = World::new();
        let (short, other) = (world.builder("short").start(), world.builder("other").start());
        for builder in [&short, &other] {
            pretend(builder, 0.0, 0.0);
        }
        short.run(&format!("mount -t tmpfs -o mode=1775,{options} tmpfs /nix/store"));
        let client = client(&world, &[&short, &other]);
        assert_built_on(&client, &build(&client, "first"), "short");
        let limit = if what == "disk_free" { 100 << 20 } else { 5000 };
        wait_for_sample(&client, what, |sample| {
            sample[what].as_u64() <= Some(limit) && sample[what].is_u64()
        });
        assert_built_on(&client, &build(&client, "second"), "other");
    }
}

#[test]
fn a_machine_that_was_short_of_disk_is_asked_before_it_gets_a_build_though_its_connection_has_ended() {
    const STORE: &str = "mount -t tmpfs -o mode=1775,size=100m tmpfs /nix/store";
    let world = World::new();
    let (short, other) = (world.builder("short").start(), world.builder("other").start());
    short.run(STORE);
    let client = world.client().hook(Hook::Ours).uses(&short, "ssh-ng", 4).knows(&other).start();
    client.write("/etc/nix/offload.toml", OFTEN);
    assert_built_on(&client, &build(&client, "first"), "short");
    let is_short = |sample: &Value| sample["disk_free"].as_u64().is_some_and(|left| left <= 100 << 20);
    // What was said is made two minutes old, and nobody is there to ask again.
    let forget = || {
        wait_for_sample(&client, "a sample", is_short);
        let connected = || {
            let matching = ["nix-offload sample", "nix-offload keep", "ssh: /run/nix-offload/"];
            matching.iter().flat_map(|text| client.pids_matching(text)).collect::<Vec<_>>()
        };
        connected().into_iter().for_each(|process| client.kill(process, "KILL"));
        wait_until("all are gone", SOON, || connected().is_empty());
        let mut all: Value = serde_json::from_str(&client.read("/run/nix-offload/load.json")).unwrap();
        for sample in all["machines"].as_object_mut().unwrap().values_mut() {
            sample["at"] = (sample["at"].as_f64().unwrap() - 120.0).into();
        }
        client.write_mode("/run/nix-offload/load.json", &all.to_string(), 0o600);
        samples(&client)[0]["at"].as_f64().unwrap()
    };
    let at = forget();
    let waiting = client.spawn_nix_build(&gated("waiting"), &["-j0"]);
    wait_until("it is told why", SOON, || waiting.stderr_so_far().contains("it is to be asked again"));
    wait_for_sample(&client, "it is asked", |sample| is_short(sample) && sample["at"].as_f64() > Some(at));
    assert_eq!(begun(&client, "waiting"), [""; 0]);
    short.run("mount -o remount,size=4g /nix/store");
    wait_for_begin(&client, "waiting", &["short"]);
    open(&client, "waiting");
    let built = waiting.wait();
    assert_built_on(&client, &built, "short");
    assert_eq!(built.stderr().matches("at present:").count(), 1, "{built}");
    // Nor is it left out for ever where another one does the builds.
    short.run("mount -o remount,size=100m /nix/store");
    wait_for_sample(&client, "it is short again", is_short);
    forget();
    short.run("mount -o remount,size=4g /nix/store");
    client.set_machines("ssh-ng://short x86_64-linux - 4 9\nssh-ng://other x86_64-linux - 4 1\n");
    assert_built_on(&client, &build(&client, "elsewhere"), "other");
    wait_until("it is asked for the next one", SOON, || {
        samples(&client).iter().all(|sample| !is_short(sample))
    });
    assert_built_on(&client, &build(&client, "back"), "short");
}

#[test]
fn many_hooks_share_one_sampler_which_ends_after_them() {
    let world = World::new();
    let (mac, never) = (world.builder("mac").start(), world.builder("never").start());
    let client = world
        .client()
        .hook(Hook::Ours)
        .journald()
        .env("NIX_OFFLOAD_LOG", "debug")
        .uses(&mac, "ssh-ng", 10)
        .knows(&never)
        .machines("ssh-ng://never x86_64-linux - 10 1 - never")
        .start();
    client.write("/etc/nix/offload.toml", OFTEN);
    let names: Vec<String> = (0..10).map(|number| format!("at-once-{number}")).collect();
    let running: Vec<_> = names.iter().map(|name| client.spawn_nix_build(&gated(name), &["-j0"])).collect();
    for name in &names {
        wait_for_begin(&client, name, &["mac"]);
    }
    wait_until("there is a sample", SOON, || !samples(&client).is_empty());
    assert_eq!((samplers(&client).len(), shells(&mac)), (1, 1));
    let (first, sessions) = (samplers(&client), mac.sessions());
    names.iter().for_each(|name| open(&client, name));
    for build in running {
        build.wait().assert_success();
    }
    // Builds that run are reason enough to stay; after them it goes.
    assert_eq!(samplers(&client), first);
    wait_until("the sampler is gone", IDLE, || samplers(&client).is_empty());
    wait_until("its shell is gone", SOON, || shells(&mac) == 0);
    assert_eq!((mac.sessions(), mac.logins(), never.logins(), samples(&client).len()), (sessions, 1, 0, 1));
    assert_only_masters_left(&client, 1);
    let said = |text: &str| {
        let entries = client.journal("-t nix-offload");
        entries.iter().filter(|entry| entry["MESSAGE"].as_str().is_some_and(|it| it.contains(text))).count()
    };
    assert_eq!(said("looking at the load of machines"), 1);
    assert_eq!(said("nobody wants to know the load of machines any more"), 1);
    assert_eq!(client.entries("/run/nix-offload/sample"), ["lock"]);
}

#[test]
fn builds_go_on_when_the_sampler_is_killed_or_stopped() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac]);
    let running = client.spawn_nix_build(&gated("running"), &["-j0"]);
    wait_for_begin(&client, "running", &["mac"]);
    wait_until("there is a sample", SOON, || !samples(&client).is_empty());
    let killed = samplers(&client);
    client.kill(killed[0], "KILL");
    wait_until("it is gone with its shell", SOON, || samplers(&client).is_empty() && shells(&mac) == 0);
    assert_built_on(&client, &build(&client, "after-the-kill"), "mac");
    wait_until("there is another one", SOON, || samplers(&client).len() == 1 && shells(&mac) == 1);
    let stopped = samplers(&client);
    client.kill(stopped[0], "STOP");
    for name in ["a", "b", "c"] {
        assert_built_on(&client, &build(&client, name), "mac");
    }
    assert_eq!(samplers(&client), stopped);
    client.kill(stopped[0], "KILL");
    open(&client, "running");
    assert_built_on(&client, &running.wait(), "mac");
    assert_eq!(mac.logins(), 1);
    // Nor does anything depend on what it left.
    client.write("/run/nix-offload/load.json", "{");
    assert_built_on(&client, &build(&client, "with-a-broken-file"), "mac");
}

#[test]
fn a_hook_whose_program_was_replaced_starts_no_sampler_that_would_end_at_once() {
    const HOOK: &str = "/usr/local/bin/nix-offload";
    let world = World::new();
    let (mac, pi) = (world.builder("mac").start(), world.builder("pi").start());
    let client = world
        .client()
        .hook(Hook::Ours)
        .uses(&mac, "ssh-ng", 1)
        .knows(&pi)
        .machines("ssh-ng://pi x86_64-linux - 1 1 - benchmark")
        .start();
    client.write("/etc/nix/offload.toml", OFTEN);
    client.run(&format!("mkdir -p /usr/local/bin; cp {OURS} {HOOK}"));
    let start = |build: &str| client.spawn_nix_build(build, &["-j0", "--option", "build-hook", HOOK]);
    let first = start(&gated("first"));
    wait_for_begin(&client, "first", &["mac"]);
    let second = start(&gated("second"));
    wait_until("it waits", SOON, || second.stderr_so_far().contains("waits for a slot"));
    wait_until("there is a sampler", SOON, || samplers(&client).len() == 1);
    client.run(&format!("cp {OURS} {HOOK}.new; mv {HOOK}.new {HOOK}"));
    wait_until("it has ended", SOON, || samplers(&client).is_empty());
    let shown = || client.run("stat -c %y /run/nix-offload/sample/*.list");
    for _ in 0..3 {
        let before = shown();
        wait_until("the hook that waits shows its interest", SOON, || shown() != before);
    }
    let parents = "/^State:/ { dead = $2 == \"Z\" } /^PPid:/ { if (dead) print $2 }";
    let parents = client.run(&format!("awk '{parents}' /proc/[0-9]*/status 2>/dev/null || true"));
    for hook in client.pids_matching("nix-offload 3") {
        assert!(!parents.lines().any(|parent| parent == hook.to_string()), "{hook}: {parents}");
    }
    let third = start(&picky("third", "benchmark"));
    wait_until("the new program has its sampler", SOON, || samplers(&client).len() == 1);
    for name in ["first", "second", "third"] {
        open(&client, name);
    }
    for (build, machine) in [(first, "mac"), (second, "mac"), (third, "pi")] {
        assert_built_on(&client, &build.wait(), machine);
    }
}

#[test]
fn a_long_build_has_its_machine_looked_at_again_after_the_sampler_was_killed() {
    let world = World::new();
    let (left, right) = (world.builder("left").start(), world.builder("right").start());
    let client = client(&world, &[&left, &right]);
    let running = client.spawn_nix_build(&gated("running"), &["-j0"]);
    wait_for_begin(&client, "running", &["left"]);
    wait_until("there is a sample", SOON, || !samples(&client).is_empty());
    client.kill(samplers(&client)[0], "KILL");
    wait_until("it is gone", SOON, || samplers(&client).is_empty());
    // As after hours: nothing is known, and nothing but the build tells that the machine is in use.
    client.run("rm /run/nix-offload/load.json; touch -d '2 days ago' /run/nix-offload/answered/*");
    wait_until("there is another sampler", IDLE, || samplers(&client).len() == 1);
    wait_until("the machine is looked at", SOON, || samples(&client).len() == 1);
    open(&client, "running");
    assert_built_on(&client, &running.wait(), "left");
}

#[test]
fn the_sampler_ends_with_the_runtime_directory() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac]);
    assert_built_on(&client, &build(&client, "one"), "mac");
    wait_until("there is a sample", SOON, || !samples(&client).is_empty());
    client.run("mv /run/nix-offload /run/elsewhere");
    wait_until("the sampler is gone", Duration::from_secs(10), || samplers(&client).is_empty());
}

#[test]
fn the_only_session_is_left_to_builds() {
    let world = World::new();
    let mac = world.builder("mac").refusing_forwarding().max_sessions(1).start();
    let client = client(&world, &[&mac]);
    let held = client.spawn_nix_build(&gated("held"), &["-j0"]);
    wait_for_begin(&client, "held", &["mac"]);
    wait_until("the sampler was refused", SOON, || {
        let is_refused =
            |entry: &Value| entry["MESSAGE"].as_str().is_some_and(|it| it.contains("no sample of a machine"));
        client.journal("-t nix-offload").iter().any(is_refused)
    });
    open(&client, "held");
    let held = held.wait();
    assert_built_on(&client, &held, "mac");
    held.assert_stderr_lacks("warning");
    for name in ["a", "b", "c"] {
        let built = build(&client, name);
        built.assert_stderr_lacks("warning");
        assert_built_on(&client, &built, "mac");
    }
}

#[test]
fn an_account_without_a_shell_is_asked_once() {
    let world = World::new();
    let mac = world.builder("mac").key_options("restrict,command=\"nix-store --serve --write\"").start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh", 4).start();
    client.write("/etc/nix/offload.toml", OFTEN);
    assert_built_on(&client, &build(&client, "first"), "mac");
    wait_until("it is known to be mute", SOON, || {
        client.exists("/run/nix-offload/load.json")
            && client.read("/run/nix-offload/load.json").contains("mute\":{\"")
    });
    let sessions = mac.sessions();
    for name in ["a", "b", "c"] {
        assert_built_on(&client, &build(&client, name), "mac");
    }
    // Not by another sampler either.
    let killed = samplers(&client);
    client.kill(killed[0], "KILL");
    wait_until("it is gone", SOON, || samplers(&client).is_empty());
    assert_built_on(&client, &build(&client, "d"), "mac");
    wait_until("there is another one", SOON, || samplers(&client).len() == 1);
    assert_built_on(&client, &build(&client, "e"), "mac");
    assert_eq!(mac.sessions() - sessions, 5, "one for each build");
    assert_eq!(mac.logins(), 1);
}

#[test]
fn a_file_system_that_hangs_holds_nobody() {
    let world = World::new();
    let mac = world.builder("mac").start();
    // As a server that is away would have it: it is asked, and never answers.
    mac.write_mode("/usr/local/bin/df", "#!/bin/sh\necho asked >> /run/df-asked\nexec sleep 1000\n", 0o755);
    mac.write("/root/.bashrc", "PATH=/usr/local/bin:$PATH\n");
    let client = client(&world, &[&mac]);
    assert_built_on(&client, &build(&client, "one"), "mac");
    wait_for_sample(&client, "what is known without it", |sample| sample["cores"].is_u64());
    assert!(samples(&client)[0].get("disk_free").is_none());
    let at = samples(&client)[0]["at"].as_f64();
    wait_for_sample(&client, "another one", |sample| sample["at"].as_f64() > at);
    assert_built_on(&client, &build(&client, "two"), "mac");
    // Nor by another sampler.
    client.kill(samplers(&client)[0], "KILL");
    wait_until("it is gone", SOON, || samplers(&client).is_empty());
    let at = samples(&client)[0]["at"].as_f64();
    assert_built_on(&client, &build(&client, "three"), "mac");
    wait_for_sample(&client, "one of another sampler", |sample| sample["at"].as_f64() > at);
    assert_eq!(mac.read("/run/df-asked"), "asked\n");
}

#[test]
fn a_connection_that_no_build_uses_is_not_kept_for_looking_at_its_machine() {
    let world = World::new();
    let (left, right) = (world.builder("left").start(), world.builder("right").start());
    let client = client(&world, &[&left, &right]);
    client.write("/etc/nix/offload.toml", &format!("[ssh]\nidle = '3s'\n{OFTEN}"));
    let first = client.spawn_nix_build(&gated("first"), &["-j0"]);
    wait_for_begin(&client, "first", &["left"]);
    let masters = || client.pids_matching("ssh: /run/nix-offload/").len();
    let second = client.spawn_nix_build(&gated("second"), &["-j0"]);
    wait_until("both are begun", SOON, || begun(&client, "second").len() == 1);
    assert_eq!(begun(&client, "second"), ["right"]);
    wait_until("both are looked at", SOON, || shells(&left) == 1 && shells(&right) == 1);
    open(&client, "second");
    second.wait().assert_success();
    wait_until("the one is left", IDLE, || shells(&right) == 0 && masters() == 1);
    assert_eq!((shells(&left), samplers(&client).len()), (1, 1));
    open(&client, "first");
    first.wait().assert_success();
}

#[test]
fn nothing_is_sampled_if_that_is_set() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac]);
    client.write("/etc/nix/offload.toml", NO_SAMPLES);
    for name in ["a", "b"] {
        assert_built_on(&client, &build(&client, name), "mac");
    }
    assert!(samplers(&client).is_empty() && !client.exists("/run/nix-offload/sample"));
    assert_eq!(begun(&client, "a"), Vec::<String>::new());
    assert_eq!(mac.sessions(), 1, "that of the first command");
}

#[test]
fn how_fast_bytes_travel_is_remembered_for_each_machine() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &[&mac]);
    let speed = || client.run("cat /run/nix-offload/answered/*.speed 2>/dev/null || true");
    assert_built_on(&client, &build(&client, "small"), "mac");
    assert_eq!(speed(), "");
    let big = drv::script("big", "head -c 5000000 /dev/urandom > $out");
    client.nix_build(&big, &["-j0"]).assert_success();
    let said = speed();
    let [sending, fetching] = said.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{said}") };
    assert_eq!(sending, "-");
    let fetching: f64 = fetching.parse().unwrap();
    assert!((1e5..1e10).contains(&fetching), "{said}");
}

#[test]
fn a_hundred_machines_cost_one_small_process() {
    const MACHINES: u64 = 100;
    let world = World::new();
    let mac = world.builder("mac").max_sessions(200).start();
    // One builder under a hundred names, each a machine of its own to us.
    let lines: String = (1..=MACHINES)
        .map(|number| format!("ssh-ng://mac?max-connections={number} x86_64-linux - 1 1\n"))
        .collect();
    let client = world.client().hook(Hook::Ours).knows(&mac).machines(&lines).start();
    client.write("/etc/nix/offload.toml", OFTEN);
    client.nix_offload(&["ping-store"]).assert_success();
    assert_built_on(&client, &build(&client, "one"), "mac");
    let running = client.spawn_nix_build(&gated("running"), &["-j0"]);
    wait_until("all machines are sampled", SOON * 2, || samples(&client).len() as u64 == MACHINES);
    let status = client.read(&format!("/proc/{}/status", samplers(&client)[0]));
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 30 << 10, "{kib} KiB");
    assert_eq!((samplers(&client).len(), shells(&mac) as u64, mac.logins()), (1, MACHINES, 1));
    open(&client, "running");
    assert_built_on(&client, &running.wait(), "mac");
}
