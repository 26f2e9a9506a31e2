//! Machines that fail: how often they are tried, by whom, what people are told, and how they come back.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use harness::{Builder, Client, ClientPlan, Hook, Mode, Output, Uplink, World, drv, event, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{SOON, gated, open, wait_for_begin};

/// A few pauses.
const PAUSES: Duration = Duration::from_secs(60);

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// Where connections are counted, and answered only from some moment on.
struct Door {
    port: u16,
    target: Arc<AtomicU16>,
    knocks: Arc<AtomicUsize>,
    held: Arc<Mutex<Vec<TcpStream>>>,
}

impl Door {
    /// One behind which nobody is.
    fn shut() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let door = Self { port, target: Arc::default(), knocks: Arc::default(), held: Arc::default() };
        let (target, knocks, held) = (door.target.clone(), door.knocks.clone(), door.held.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                knocks.fetch_add(1, Ordering::Relaxed);
                match target.load(Ordering::Relaxed) {
                    0 => held.lock().unwrap().push(client),
                    port => carry(&client, &TcpStream::connect(("127.0.0.1", port)).unwrap()),
                }
            }
        });
        door
    }

    /// From now on it leads to the builder. Those who came before are let down.
    fn open_to(&self, builder: &Builder) {
        self.target.store(builder.port(), Ordering::Relaxed);
        self.held.lock().unwrap().clear();
    }

    fn knocks(&self) -> usize {
        self.knocks.load(Ordering::Relaxed)
    }

    fn ssh_config(&self, name: &str, builder: &Builder) -> String {
        format!(
            "Host {name}\n HostName 127.0.0.1\n Port {}\n User root\n HostKeyAlias [127.0.0.1]:{}\n",
            self.port,
            builder.port()
        )
    }
}

fn carry(one: &TcpStream, other: &TcpStream) {
    for (from, to) in [(one, other), (other, one)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        thread::spawn(move || {
            let mut chunk = vec![0; 64 << 10];
            while let Ok(len @ 1..) = from.read(&mut chunk) {
                if to.write_all(&chunk[..len]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }
}

/// What is noted of the machine `name`: file and content.
fn note(client: &Client, name: &str) -> Option<(String, Value)> {
    client.entries("/run/nix-offload/down").into_iter().filter(|file| file.ends_with(".down")).find_map(
        |file| {
            let path = format!("/run/nix-offload/down/{file}");
            let value: Value =
                serde_json::from_str(&std::fs::read_to_string(client.path(&path)).ok()?).ok()?;
            value["way"].as_str().unwrap().contains(name).then_some((path, value))
        },
    )
}

fn failures(client: &Client, name: &str) -> usize {
    note(client, name).map_or(0, |(_, note)| note["failures"].as_u64().unwrap() as usize)
}

/// The length of the pause, from the note alone.
fn pause(client: &Client, name: &str) -> f64 {
    let (path, note) = note(client, name).unwrap();
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let noted = std::fs::metadata(client.path(&path)).unwrap();
    note["next"].as_f64().unwrap() - seconds(noted.modified().unwrap())
}

fn wait_for_end_of_pause(client: &Client, name: &str) {
    let (_, note) = note(client, name).unwrap();
    wait_until("the pause is over", PAUSES, || {
        note["next"].as_f64().unwrap() < SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
    });
}

fn notices(output: &Output, name: &str) -> usize {
    output.stderr().matches(&format!("cannot build on 'ssh-ng://{name}'")).count()
}

fn many(name: &str, count: usize) -> String {
    drv::expression(&format!(
        r#"builtins.genList (i: d "{name}-${{toString i}}" "cat /etc/machine-name > $out" {{ }}) {count}"#
    ))
}

fn assert_built_on(client: &Client, output: &Output, machine: &str) {
    let paths = output.assert_success().out_paths();
    assert_eq!(client.read(&paths[0]), format!("{machine}\n"), "{output}");
    let all = client.run(&format!("cat {}", paths.join(" ")));
    assert!(all.lines().all(|line| line == machine), "{output}");
}

/// An ssh that notes whether anybody has the right to choose when it is asked for its configuration.
const ASKED: &str = "#!/bin/bash
case \" $* \" in
*\" -G \"*) flock -n /nix/var/nix/current-load/main-lock true && lock=free || lock=taken
        echo \"${!#}: $lock\" >> /tmp/asked ;;
esac
exec /usr/bin/ssh \"$@\"
";

#[test]
fn a_dead_machine_costs_one_attempt_and_one_notice_for_each_pause_and_comes_back_by_one() {
    const BUILDS: usize = 100;
    let world = World::new();
    let mac = world.builder("mac").start();
    let late = world.builder("late").start();
    let door = Door::shut();
    let mut client = plan(&world)
        .mode(Mode::Daemon)
        .journald()
        .ssh_config(&door.ssh_config("hole", &late))
        .uses(&mac, "ssh-ng", 4)
        .knows(&late)
        .start();
    client.nix_build(&drv::trivial("warm-up"), &["-j0"]).assert_success();
    client.write("/etc/nix/offload.toml", "[ssh]\nconnect-timeout = 1\n");
    let fleet = client.read("/etc/nix/machines");
    // Better than any other.
    client.set_machines(&format!("ssh-ng://hole x86_64-linux - 4 9\n{fleet}"));
    let mut told = 0;

    let built = client.nix_build(&many("first", BUILDS), &["-j0"]);
    assert_built_on(&client, &built, "mac");
    told += notices(&built, "hole");
    let first = failures(&client, "hole");
    // One for each pause that was over while these were built.
    assert_eq!(door.knocks(), first, "{built}");
    assert!((1..4).contains(&first), "{first} failures in {:?}", built.took());
    assert!(pause(&client, "hole") > 7.9 * f64::from(1 << (first - 1)));
    assert!(pause(&client, "hole") < 12.1 * f64::from(1 << (first - 1)));

    // Neither the daemon nor its hooks forget it when they are started again.
    client.stop_daemon();
    client.start_daemon();
    wait_for_end_of_pause(&client, "hole");
    // Several commands at once, and still one attempt.
    let begin = Instant::now();
    let several: Vec<_> =
        (0..4).map(|number| client.spawn_nix_build(&many(&format!("again-{number}"), 5), &["-j0"])).collect();
    for build in several {
        let built = build.wait();
        assert_built_on(&client, &built, "mac");
        told += notices(&built, "hole");
    }
    wait_until("somebody has tried", SOON, || failures(&client, "hole") > first);
    let second = failures(&client, "hole");
    assert_eq!((door.knocks(), second), (first + 1, first + 1), "in {:?}", begin.elapsed());
    assert!(pause(&client, "hole") > 7.9 * f64::from(1 << (second - 1)));
    let built = client.nix_build(&many("told", 5), &["-j0"]);
    told += notices(&built, "hole");
    assert_eq!((told, door.knocks()), (second, second), "{built}");

    // It comes back, be it slowly.
    client.write("/etc/nix/offload.toml", "[ssh]\nconnect-timeout = 10\n");
    door.open_to(&late);
    wait_for_end_of_pause(&client, "hole");
    let built = client.nix_build(&drv::where_built("knock"), &["-j0"]);
    // Nobody waits for the attempt.
    assert_built_on(&client, &built, "mac");
    wait_until("it is seen to be well", SOON, || note(&client, "hole").is_none());
    assert_eq!(door.knocks(), second + 1);
    let entries = client.journal("-t nix-offload");
    let tried = entries.iter().filter(|entry| event(entry) == "trying this machine again").count();
    // All but the first, each by one process.
    assert_eq!(tried, second);
    let built = client.nix_build(&many("back", 4), &["-j0"]);
    assert_built_on(&client, &built, "late");
    assert_eq!((door.knocks(), late.logins(), notices(&built, "hole")), (second + 1, 1, 0));
    client.verify_store();
}

#[test]
fn a_process_that_was_told_no_uses_the_only_machine_again_when_it_is_back() {
    let world = World::new();
    let late = world.builder("late").start();
    let door = Door::shut();
    let client =
        plan(&world).ssh_config(&door.ssh_config("hole", &late)).machines("ssh-ng://hole x86_64-linux - 1 1");
    let client = client.knows(&late).start();
    client.write("/etc/nix/offload.toml", "[ssh]\nconnect-timeout = 3\n");
    // Each takes the only local slot for a while, so that one process of Nix asks for long.
    let body = "until [ -e /mnt/share/$name.go ]; do sleep 0.05; done; cat /etc/machine-name > $out";
    let chain = drv::expression(&format!(
        r#"let step = name: input: d name "test -z '${{input}}' || cat ${{input}} ; {body}" {{ }};
           in step "three" (step "two" (step "one" ""))"#
    ));
    let build = client.spawn_nix_build(&chain, &["-j1"]);
    wait_until("it was tried in vain", SOON, || failures(&client, "hole") == 1);
    // Another one that cannot but try, too, has nothing new to tell.
    let other = client.nix_build(&drv::where_built("other"), &["-j1"]);
    assert_built_on(&client, &other, "client");
    assert_eq!((failures(&client, "hole"), notices(&other, "hole")), (1, 0), "{other}");
    door.open_to(&late);
    wait_for_end_of_pause(&client, "hole");
    // The second request finds that it is time.
    client.write("/mnt/share/one.go", "");
    wait_until("it is seen to be well", SOON, || note(&client, "hole").is_none());
    client.write("/mnt/share/two.go", "");
    client.write("/mnt/share/three.go", "");
    let built = build.wait();
    assert_built_on(&client, &built, "late");
    assert_eq!(notices(&built, "hole"), 1, "{built}");
}

#[test]
fn without_any_network_builds_are_done_here_at_once_and_elsewhere_as_soon_as_there_is_one() {
    let world = World::new();
    let uplink = Uplink::new();
    let mac = world.builder("mac").sshd_option(&format!("ListenAddress {}", uplink.far_address())).start();
    let host = |name: &str, address: &str| {
        format!(
            "Host {name}\n HostName {address}\n Port {}\n User root\n HostKeyAlias [127.0.0.1]:{0}\n",
            mac.port()
        )
    };
    let far = host("far", &uplink.far_address());
    let client = plan(&world)
        .own_network()
        .ssh_config(&format!("{far}{}{}", host("near", "127.0.0.1"), host("named", "mac.example.org")))
        .knows(&mac)
        .machines("ssh-ng://far x86_64-linux - 4 3\nssh-ng://named x86_64-linux - 4 2")
        .start();
    uplink.lead_to(&client);
    client.write("/etc/nix/offload.toml", "[ssh]\nconnect-timeout = 40\n");
    let no_network = "this machine has no network";

    let built = client.nix_build(&many("offline", 5), &["-j1"]);
    assert_built_on(&client, &built, "client");
    assert_eq!(built.stderr().matches(no_network).count(), 1, "{built}");
    built.assert_stderr_lacks("cannot build on");
    let again = client.nix_build(&many("offline-again", 5), &["-j1"]);
    assert_built_on(&client, &again, "client");
    again.assert_stderr_lacks("network").assert_stderr_lacks("cannot");
    let stock = client.nix_build(&many("no-machines", 5), &["-j1", "--builders", ""]);
    println!(
        "5 builds without a network: {:?}, when that is known {:?}, without machines {:?}",
        built.took(),
        again.took(),
        stock.took()
    );
    // Nobody waited for a machine even once.
    for output in [&again, &built] {
        assert!(output.took() < stock.took() + Duration::from_secs(20), "{output}");
    }
    // What cannot be built here is told so at once, and waits.
    let waiting = client.spawn_nix_build(&drv::where_built("waiting"), &["-j0"]);
    wait_until("the user is told", SOON, || {
        let said = waiting.stderr_so_far();
        said.contains("no machine can take") && said.contains("this client has no network")
    });
    waiting.signal(Signal::SIGINT);
    waiting.wait().assert_failure();
    // Nothing is held against machines for that.
    assert!(client.entries("/run/nix-offload/down").iter().all(|name| !name.ends_with(".down")));

    // What is reached without one is tried all the same. ssh says which these are, and nobody waits for a lock meanwhile.
    client.write_mode("/usr/local/bin/ssh", ASKED, 0o755);
    let fleet = client.read("/etc/nix/machines");
    client.set_machines(&format!("ssh-ng://near x86_64-linux - 4 9\n{fleet}"));
    let waiting = client.spawn_nix_build(&drv::where_built("near"), &["-j0"]);
    let refused = "cannot build on 'ssh-ng://near': cannot connect to near: connection refused";
    wait_until("the user is told", SOON, || waiting.stderr_so_far().contains(refused));
    waiting.signal(Signal::SIGINT);
    waiting.wait().assert_failure();
    client.set_machines(&fleet);
    let asked = client.read("/tmp/asked");
    assert!(asked.contains("near: free") && !asked.contains("taken"), "{asked}");
    client.run("rm /usr/local/bin/ssh");

    uplink.plug_in(&client);
    let begin = Instant::now();
    let online = client.nix_build(&drv::where_built("online"), &["-j0"]);
    assert_built_on(&client, &online, "mac");
    println!("the first build with a network: {:?}", begin.elapsed());
    // A name that nobody knows is another matter now.
    online.assert_stderr_lacks(no_network);

    // A master that was there does not answer any more, and nobody is told of the same again for each derivation.
    client.run("/opt/nix-offload/bin/nix-offload-proxy stop --all");
    uplink.pull_out(&client);
    let built = client.nix_build(&many("offline-once-more", 5), &["-j1"]);
    assert_built_on(&client, &built, "client");
    assert_eq!(built.stderr().matches(no_network).count(), 1, "{built}");
}

#[test]
fn builds_that_run_or_wait_when_the_network_goes_are_done_when_it_is_back() {
    let world = World::new();
    let uplink = Uplink::new();
    let mac = world.builder("mac").sshd_option(&format!("ListenAddress {}", uplink.far_address())).start();
    let far = format!(
        "Host far\n HostName {}\n Port {}\n User root\n HostKeyAlias [127.0.0.1]:{1}\n",
        uplink.far_address(),
        mac.port()
    );
    let client = plan(&world)
        .own_network()
        .ssh_config(&far)
        .knows(&mac)
        .machines("ssh-ng://far x86_64-linux - 1 1")
        .start();
    uplink.lead_to(&client);
    uplink.plug_in(&client);
    let running = client.spawn_nix_build(&gated("running"), &["-j0"]);
    wait_for_begin(&client, "running", &["mac"]);
    let waiting = client.spawn_nix_build(&many("waiting", 4), &["-j0"]);
    wait_until("they wait", SOON, || {
        client.entries("/run/nix-offload/queue").iter().filter(|name| name.contains("-u")).count() == 4
    });
    uplink.pull_out(&client);
    client.run("/opt/nix-offload/bin/nix-offload-proxy stop --all");
    // By whoever sees it first.
    wait_until("the user is told", SOON, || {
        [&running, &waiting].iter().any(|one| one.stderr_so_far().contains("this machine has no network"))
    });
    wait_until("so is the other one", SOON, || {
        waiting.stderr_so_far().contains("this client has no network")
    });
    open(&client, "running");
    uplink.plug_in(&client);
    let (running, waiting) = (running.wait(), waiting.wait());
    assert_built_on(&client, &running, "mac");
    assert_built_on(&client, &waiting, "mac");
    for output in [running, waiting] {
        output.assert_stderr_lacks("cannot build on");
        assert!(output.stderr().matches("this machine has no network").count() <= 1, "{output}");
        assert!(output.stderr().matches("this client has no network").count() <= 1, "{output}");
    }
}

/// That many doors to the same machine, all of them shut, with what ssh and Nix are told of them.
fn doors(count: usize, builder: &Builder) -> (Vec<Door>, String, String) {
    let doors: Vec<Door> = (0..count).map(|_| Door::shut()).collect();
    let named = doors.iter().enumerate();
    let config = named.map(|(number, door)| door.ssh_config(&format!("hole{number}"), builder)).collect();
    let list = (0..count).map(|number| format!("ssh-ng://hole{number} x86_64-linux - 1 9\n")).collect();
    (doors, config, list)
}

fn all_knocks(doors: &[Door]) -> Vec<usize> {
    doors.iter().map(Door::knocks).collect()
}

/// Has all that failed left alone for that many seconds from now on.
fn pause_all(client: &Client, seconds: f64) {
    for file in client.entries("/run/nix-offload/down").iter().filter(|file| file.ends_with(".down")) {
        let path = format!("/run/nix-offload/down/{file}");
        let mut note: Value = serde_json::from_str(&client.read(&path)).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        note["next"] = (now + seconds).into();
        client.write(&path, &note.to_string());
    }
}

#[test]
fn many_dead_machines_hold_nix_up_once_and_are_used_when_they_are_well_again() {
    const DEAD: usize = 12;
    const TIMEOUT: Duration = Duration::from_secs(8);
    // One after the other in fours they took three times as long, and more.
    const BUSY: Duration = Duration::from_secs(12);
    let world = World::new();
    let late = world.builder("late").start();
    let (doors, config, list) = doors(DEAD, &late);
    let client = plan(&world).ssh_config(&config).machines(&list).knows(&late).start();
    client.write("/etc/nix/offload.toml", &format!("[ssh]\nconnect-timeout = {}\n", TIMEOUT.as_secs()));
    let first = client.nix_build(&drv::where_built("first"), &["-j1"]);
    assert_built_on(&client, &first, "client");
    assert!(first.took() < TIMEOUT + BUSY, "{first}");
    assert_eq!(all_knocks(&doors), [1; DEAD], "{first}");

    // Another process of Nix, which has no slot for most of its builds, asks nobody again: because of what is noted of each
    // machine, or, where that is not enough, because somebody has just waited for nothing.
    pause_all(&client, 200.0);
    for name in ["second", "third"] {
        let built = client.nix_build(&many(name, 3), &["-j1"]);
        assert_built_on(&client, &built, "client");
        assert_eq!(all_knocks(&doors), [1; DEAD], "{built}");
        client.run("rm -f /run/nix-offload/in-vain");
    }

    let is_noted = |number: usize| note(&client, &format!("//hole{number}\0")).is_some();
    assert!((0..DEAD).all(is_noted));
    doors.iter().for_each(|door| door.open_to(&late));
    pause_all(&client, -1.0);
    // Their pauses are over, and there is no other machine.
    let built = client.nix_build(&drv::where_built("back"), &["-j1"]);
    assert_built_on(&client, &built, "late");
}

#[test]
fn many_dead_machines_do_not_hide_the_one_that_answers_and_are_told_if_there_is_none() {
    const DEAD: usize = 12;
    // Nix asks again five seconds after it was told to. In fours they took three times the timeout, and more.
    const LIMIT: Duration = Duration::from_secs(24);
    let world = World::new();
    let late = world.builder("late").start();
    let (doors, config, list) = doors(DEAD, &late);
    let client = plan(&world).ssh_config(&config).machines(&list).knows(&late).start();
    client.write("/etc/nix/offload.toml", "[ssh]\nconnect-timeout = 8\n");
    let none = client.nix_build(&drv::where_built("none"), &["-j0"]);
    none.assert_failure().assert_stderr_has("nothing can build").assert_stderr_has("ssh-ng://hole");
    assert!(none.took() < LIMIT, "{none}");
    assert_eq!(all_knocks(&doors), [1; DEAD], "{none}");
    // What Nix cannot do itself is tried all the same, by those who have not tried.
    let refused = client.nix_build(&drv::where_built("again"), &["-j0"]);
    refused.assert_failure();
    assert!(all_knocks(&doors).iter().sum::<usize>() > DEAD, "{refused}");
    // With nothing noted of them, they are all asked before the one that answers.
    client.run("rm -r /run/nix-offload/down");
    client.set_machines(&format!("{list}ssh-ng://late x86_64-linux - 1 1\n"));
    let built = client.nix_build(&drv::where_built("last"), &["-j0"]);
    assert_built_on(&client, &built, "late");
    assert!(built.took() < LIMIT, "{built}");
}

#[test]
fn of_many_dead_machines_a_few_are_tried_again_at_a_time() {
    const DEAD: usize = 24;
    const AT_A_TIME: usize = 16;
    let world = World::new();
    let mac = world.builder("mac").start();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = format!("Host hole*\n HostName 127.0.0.1\n Port {nobody}\n");
    let list = |speed: usize| -> String {
        (0..DEAD).map(|number| format!("ssh-ng://hole{number} x86_64-linux - 1 {speed}\n")).collect()
    };
    let client = plan(&world).journald().ssh_config(&config).uses(&mac, "ssh-ng", 4).start();
    let fleet = client.read("/etc/nix/machines");
    client.set_machines(&list(9));
    client.nix_build(&drv::where_built("first"), &["-j1"]).assert_success();
    let is_noted = |number: usize| note(&client, &format!("//hole{number}\0")).is_some();
    wait_until("all have failed", SOON, || (0..DEAD).all(is_noted));
    client.set_machines(&format!("{}{fleet}", list(9)));
    client.nix_build(&drv::where_built("warm-up"), &["-j0"]).assert_success();
    let tried = || {
        let entries = client.journal("-t nix-offload");
        entries.iter().filter(|entry| event(entry) == "trying this machine again").count()
    };
    let before = tried();
    pause_all(&client, -1.0);
    let built = client.nix_build(&drv::where_built("again"), &["-j0"]);
    assert_built_on(&client, &built, "mac");
    assert_eq!(tried() - before, AT_A_TIME, "{built}");
}
