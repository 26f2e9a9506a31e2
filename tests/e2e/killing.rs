//! Twenty at a time on two machines, and a killer among them: slots are never exceeded, none leaks, all work ends.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    env,
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use harness::{Builder, Client, Hook, Machine, Process, Running, World, drv, wait_until};
use nix::sys::signal::Signal;

use crate::{
    leases::assert_all_given_back,
    running::{Build, builds, held_slots, marked, name_in, parent, slot_files},
    support::{SOON, held_locks},
};

const SLOTS: usize = 4;
/// Of those, where they are shared on the machines.
const SHARED: usize = 3;
const AT_A_TIME: usize = 20;
const WORKS: usize = 60;
/// How many are killed at least, and of masters at most: three lost connections to one machine are a reason to give it
/// up, and this is not to happen to a build that nobody killed.
const KILLS: usize = 70;
const MOST_MASTERS: usize = 2;
/// Pauses between two kills, in milliseconds.
const PAUSES: (u64, u64) = (20, 250);
/// How long a build of a killed client may run on, and is not counted meanwhile. A machine that has nothing else to do
/// needs a tenth of it.
const TOLERANCE: Duration = Duration::from_secs(1);
/// Longer than streams are kept after the last build.
const IDLE: Duration = Duration::from_secs(40);
/// Files of two masters and of two machines that may be left in the runtime directory, besides queues.
const MOST_FILES: usize = 50;
/// Masters that may be left, and processes that hold something for one.
const MOST_OF_EACH: usize = 6;
/// Between two looks of the watcher, or of the killer.
const PACE: Duration = Duration::from_millis(3);

/// Numbers that look like chance and are the same for the same seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        if of.is_empty() { None } else { of.get(self.below(of.len() as u64) as usize) }
    }
}

/// Whose builds may end because of a kill.
#[derive(Clone, Debug, PartialEq)]
enum Whose {
    /// Those of this name.
    Named(String),
    /// Those that this daemon started on the machine with this number.
    Of(usize, u32),
    /// All: it was a master, and which one is not known.
    Any,
    /// Nobody's.
    None,
}

#[derive(Clone, Debug)]
struct Kill {
    whose: Whose,
    before: Instant,
    after: Instant,
}

/// What the watcher saw on one machine: first the builds, then the slots.
struct Look {
    begin: Instant,
    end: Instant,
    builds: Vec<Build>,
    slots: usize,
}

fn work(number: usize, dice: &mut Dice) -> String {
    let name = name_of(number);
    let pause = format!("sleep {}.{}", dice.below(2), 1 + dice.below(9));
    let (script, attributes) = match number % 6 {
        0 => (
            format!("{pause}; mkdir $out $dev; echo {name} > $out/name; ln -s $dev $out/dev"),
            "outputs = [ \"out\" \"dev\" ];",
        ),
        1 => (format!("{pause}; cat $input | cksum > $out"), "INPUT"),
        2 => (
            format!(
                "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i + 1)); done; {pause}; echo {name} > $out"
            ),
            "",
        ),
        3 => (format!("{pause}; head -c 8M /dev/zero > $out"), ""),
        4 => (format!("sleep 2; echo {name} > $out"), ""),
        _ => (format!("{pause}; echo {name} > $out"), ""),
    };
    let attributes = attributes.replace(
        "INPUT",
        // Several share one.
        &format!("input = builtins.path {{ name = \"input\"; path = /root/input-{}; }};", number % 12),
    );
    let all = if number.is_multiple_of(6) { ".all" } else { "" };
    let script = drv::quote(&marked(&name, &script));
    drv::expression(&format!("(d \"{name}\" {script} {{ {attributes} }}){all}"))
}

fn name_of(work: usize) -> String {
    format!("work-{work}")
}

fn number_of(name: &str) -> Option<usize> {
    name.strip_prefix("work-")?.parse().ok()
}

/// The hooks, by the work that they are for.
fn hooks(client: &Client) -> BTreeMap<usize, u32> {
    let processes = client.processes();
    let is_hook = |process: &&Process| {
        let level = process.command_line.strip_prefix("nix-offload ");
        level.is_some_and(|level| level.parse::<u32>().is_ok())
    };
    let work = |hook: &Process| {
        let nix = parent(client, hook.pid)?;
        let nix = processes.iter().find(|process| process.pid == nix)?;
        name_in(&nix.command_line).and_then(number_of)
    };
    processes.iter().filter(is_hook).filter_map(|hook| Some((work(hook)?, hook.pid))).collect()
}

struct Killer<'a> {
    client: &'a Client,
    macs: &'a [Builder],
    dice: Dice,
    kills: Vec<Kill>,
    masters: usize,
    next: Instant,
    /// What was killed how often, for people.
    tally: HashMap<&'static str, usize>,
}

impl Killer<'_> {
    /// Kills somebody when it is time, and says whom it was about.
    fn strike(&mut self, running: &[(usize, Running)]) -> Option<Whose> {
        if Instant::now() < self.next {
            return None;
        }
        self.next = Instant::now() + Duration::from_millis(PAUSES.0 + self.dice.below(PAUSES.1 - PAUSES.0));
        let before = Instant::now();
        let (kind, whose) = match self.dice.below(100) {
            0..45 => {
                let number = self.aim(running.iter().map(|(number, _)| *number).collect())?;
                let (_, client) = running.iter().find(|(other, _)| *other == number)?;
                client.signal_if_running(Signal::SIGKILL).then_some(())?;
                ("client", Whose::Named(name_of(number)))
            }
            45..75 => {
                let hooks = hooks(self.client);
                let number = self.aim(hooks.keys().copied().collect())?;
                Self::kill(self.client, hooks[&number])?;
                ("hook", Whose::Named(name_of(number)))
            }
            75..85 => {
                let keepers = self.client.pids_matching("nix-offload keep ");
                Self::kill(self.client, *self.dice.one(&keepers)?)?;
                ("keeper", Whose::None)
            }
            85..90 if self.masters < MOST_MASTERS => {
                let masters = self.client.pids_matching("ssh: /run/nix-offload/");
                Self::kill(self.client, *self.dice.one(&masters)?)?;
                self.masters += 1;
                ("master", Whose::Any)
            }
            _ => {
                let machine = self.dice.below(self.macs.len() as u64) as usize;
                let mac = &self.macs[machine];
                let daemons = mac.pids_matching("nix-daemon");
                // Those that serve a connection. What they fork is not of this name for long, and has another parent.
                let first = daemons.iter().min().copied();
                let serving: Vec<u32> =
                    daemons.into_iter().filter(|daemon| parent(mac, *daemon) == first).collect();
                let daemon = *self.dice.one(&serving)?;
                Self::kill(mac, daemon)?;
                ("daemon", Whose::Of(machine, daemon))
            }
        };
        *self.tally.entry(kind).or_default() += 1;
        self.kills.push(Kill { whose: whose.clone(), before, after: Instant::now() });
        Some(whose)
    }

    /// One of these works, in half of all cases one that is being built now.
    fn aim(&mut self, mut among: Vec<usize>) -> Option<usize> {
        among.sort_unstable();
        let building: BTreeSet<String> =
            self.macs.iter().flat_map(|mac| builds(mac)).map(|build| build.name).collect();
        let aimed: Vec<usize> =
            among.iter().copied().filter(|number| building.contains(&name_of(*number))).collect();
        let half = self.dice.below(2) == 0;
        self.dice.one(if half && !aimed.is_empty() { &aimed } else { &among }).copied()
    }

    fn kill(machine: &Machine, pid: u32) -> Option<()> {
        let killed = machine.command("kill").args(["-KILL", &pid.to_string()]).run();
        (killed.code() == 0).then_some(())
    }
}

/// Looks until the other end of the channel is gone, which it is at the end whatever happens. Leaves the processors to others
/// between two looks.
fn watch(client: &Client, macs: &[Builder], is_over: &Receiver<()>) -> Vec<Vec<Look>> {
    let mut looks: Vec<Vec<Look>> = macs.iter().map(|_| Vec::new()).collect();
    while is_over.recv_timeout(PACE) == Err(RecvTimeoutError::Timeout) {
        for (mac, looks) in macs.iter().zip(&mut looks) {
            let begin = Instant::now();
            let builds = builds(mac);
            let end = Instant::now();
            let slots = held_slots(client, &format!("ssh-ng://{}", mac.alias()));
            looks.push(Look { begin, end, builds, slots });
        }
    }
    looks
}

/// All that happened.
struct Chaos {
    kills: Vec<Kill>,
    tally: HashMap<&'static str, usize>,
    outputs: Vec<String>,
}

/// Does all the work while the killer goes about.
fn run(client: &Client, macs: &[Builder], count: usize, mut dice: Dice) -> Chaos {
    let works: Vec<String> = (0..count).map(|number| work(number, &mut dice)).collect();
    let mut waiting: VecDeque<usize> = (0..count).collect();
    let mut running: Vec<(usize, Running)> = Vec::new();
    let mut hit: BTreeSet<usize> = BTreeSet::new();
    let mut chaos = Chaos { kills: Vec::new(), tally: HashMap::new(), outputs: Vec::new() };
    let mut order = Dice(dice.below(u64::MAX));
    let mut killer = Killer {
        client,
        macs,
        dice,
        kills: Vec::new(),
        masters: 0,
        next: Instant::now(),
        tally: HashMap::new(),
    };
    while !waiting.is_empty() || !running.is_empty() {
        while running.len() < AT_A_TIME
            && let Some(number) = waiting.pop_front()
        {
            running.push((number, client.spawn_nix_build(&works[number], &["-j0"])));
        }
        if killer.kills.len() < KILLS * count / WORKS
            && let Some(Whose::Named(name)) = killer.strike(&running)
        {
            hit.extend(number_of(&name));
        }
        let mut left = Vec::new();
        for (number, mut build) in running {
            if build.is_running() {
                left.push((number, build));
                continue;
            }
            let built = build.wait();
            match built.code() {
                0 => chaos.outputs.extend(built.out_paths()),
                _ if hit.contains(&number) => {
                    // At once, while what was killed is being cleared away, or later.
                    if order.below(2) == 0 { waiting.push_front(number) } else { waiting.push_back(number) }
                }
                _ => panic!("nobody has killed this one: {built}; {:?}", killer.kills),
            }
            hit.remove(&number);
        }
        running = left;
        thread::sleep(PACE);
    }
    chaos.kills = killer.kills;
    chaos.tally = killer.tally;
    chaos
}

/// Whether the build was that of a killed client, a short while ago.
fn is_excused(build: &Build, machine: usize, first: Instant, look: &Look, kills: &[Kill]) -> bool {
    kills.iter().any(|kill| {
        let concerned = match &kill.whose {
            Whose::Named(name) => build.name == *name,
            Whose::Of(on, daemon) => (*on, *daemon) == (machine, build.parent),
            Whose::Any => true,
            Whose::None => false,
        };
        // What was on its way there when the client died may begin and end a moment later.
        concerned
            && first <= kill.after + TOLERANCE
            && kill.before <= look.end
            && look.begin <= kill.after + TOLERANCE
    })
}

/// Never more builds than slots, none without a slot, none that goes on without a client. Gives the most at a time.
fn check(looks: &[Look], machine: usize, slots: usize, kills: &[Kill]) -> usize {
    let mut first: HashMap<&Build, Instant> = HashMap::new();
    for look in looks {
        for build in &look.builds {
            first.entry(build).or_insert(look.end);
        }
    }
    let mut most = 0;
    let counted: Vec<BTreeSet<&str>> = looks
        .iter()
        .map(|look| {
            let counts = |build: &&Build| !is_excused(build, machine, first[build], look, kills);
            let counted: Vec<&Build> = look.builds.iter().filter(counts).collect();
            most = most.max(counted.len());
            assert!(counted.len() <= slots, "machine {machine}: {counted:?} at {:?}; {kills:?}", look.begin);
            counted.iter().map(|build| build.name.as_str()).collect()
        })
        .collect();
    for ((look, before), after) in looks.iter().zip(&counted).zip(counted.iter().skip(1)) {
        let both = before.intersection(after).count();
        assert!(both <= look.slots, "machine {machine}: {before:?} and {after:?} with {} slots", look.slots);
    }
    for kill in kills.iter().filter(|kill| !matches!(kill.whose, Whose::Any | Whose::None)) {
        for look in looks.iter().filter(|look| look.begin >= kill.after) {
            for build in &look.builds {
                let concerned = match &kill.whose {
                    Whose::Named(name) => build.name == *name,
                    Whose::Of(on, daemon) => (*on, *daemon) == (machine, build.parent),
                    _ => false,
                };
                if concerned && first[build] < kill.before {
                    let after = look.begin - kill.after;
                    assert!(after < TOLERANCE, "{build:?} went on {after:?} after {kill:?}");
                }
            }
        }
    }
    most
}

/// Only masters are left, and small processes that hold what a master needs for the rest of its life. A link that was slow
/// has more than one master.
fn assert_nothing_runs(client: &Client) {
    let mut others = Vec::new();
    let is_kept = |process: &Process| {
        ["ssh: /run/nix-offload/", "/bin/sh -c exec 3>&-"]
            .iter()
            .any(|head| process.command_line.starts_with(head))
            || process.command_line == "nix-offload sample"
            // The connection of one that was killed while it opened a channel, for a minute.
            || process.command_line == "sleep 60"
    };
    let begin = Instant::now();
    wait_until("what is left is known", SOON * 2, || {
        others = client.processes();
        others.retain(|process| !is_kept(process));
        others.is_empty() || begin.elapsed() > SOON
    });
    assert!(others.is_empty(), "{others:?}");
    assert!(client.pids_matching("ssh: /run/nix-offload/").len() <= MOST_OF_EACH);
    assert!(client.pids_matching("/bin/sh -c exec 3>&-").len() <= MOST_OF_EACH);
    assert_eq!(held_locks(client), "");
}

/// The first daemon waits for connections, and is the only one.
fn assert_nobody_is_served(mac: &Builder, client: &Client, kills: &[Kill]) {
    let begin = Instant::now();
    let daemons = || mac.pids_matching("nix-daemon").len();
    wait_until("who is served is known", SOON * 2, || daemons() == 1 || begin.elapsed() > SOON);
    let kills: Vec<&Whose> = kills.iter().map(|kill| &kill.whose).collect();
    assert_eq!(daemons(), 1, "{:?}\n{:?}\n{kills:?}", mac.processes(), client.processes());
}

/// What the killed have left in the runtime directory is used again, and nothing of it is half written.
fn assert_nothing_piles_up(client: &Client) {
    let files = client.run("cd /run/nix-offload && find . -mindepth 1 ! -type d | sort");
    let (queues, others): (Vec<&str>, Vec<&str>) =
        files.lines().partition(|file| file.starts_with("./queue/"));
    // A place for each that waits, and one for the first of them; for each set of machines.
    assert!(queues.len() <= 3 * (AT_A_TIME + 1), "{queues:#?}");
    assert!(others.len() <= MOST_FILES, "{others:#?}");
    assert!(!others.iter().any(|file| file.ends_with(".new")), "{others:#?}");
}

struct Seed(u64);

impl Drop for Seed {
    #[expect(clippy::print_stderr, reason = "whoever looks at the failure wants to have it again")]
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("again with NIX_OFFLOAD_SEED={}", self.0);
        }
    }
}

#[test]
fn twenty_at_a_time_on_two_machines_with_a_killer_among_them() {
    survive(WORKS, None);
}

#[test]
fn with_slots_that_are_shared_on_the_machines_too() {
    survive(WORKS / 2, Some(SHARED));
}

/// Does that many works while the killer goes about, perhaps with `shared` slots on each machine.
fn survive(works: usize, shared: Option<usize>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = Seed(env::var("NIX_OFFLOAD_SEED").map_or(now, |seed| seed.parse().unwrap()));
    let world = World::new();
    let macs = [world.builder("mac0").start(), world.builder("mac1").start()];
    let mut plan = world.client().hook(Hook::Ours);
    for mac in &macs {
        plan = plan.uses(mac, "ssh-ng", SLOTS as u32);
    }
    let client = plan.start();
    if let Some(slots) = shared {
        client.write("/etc/nix/offload.toml", &format!("[[machine]]\nname = '*'\nshared-slots = {slots}\n"));
    }
    client.run("for i in 1 7; do head -c 8M /dev/urandom > /root/input-$i; done");

    let (over, is_over) = mpsc::channel();
    let (looks, chaos) = thread::scope(|scope| {
        let (client, macs) = (&client, &macs);
        let watcher = scope.spawn(move || watch(client, macs, &is_over));
        // Dropped at the end whatever happens, or the watcher would watch for ever.
        let over: Sender<()> = over;
        let chaos = run(client, macs, works, Dice(seed.0));
        drop(over);
        (watcher.join().unwrap(), chaos)
    });

    let slots = shared.unwrap_or(SLOTS);
    let most: Vec<usize> =
        looks.iter().enumerate().map(|(machine, looks)| check(looks, machine, slots, &chaos.kills)).collect();
    // One whose first master was killed may be left alone for as long as this takes.
    assert!(most.contains(&slots), "no machine was ever full: {most:?}");
    for kind in ["client", "hook"] {
        assert!(chaos.tally.contains_key(kind), "{:?}", chaos.tally);
    }
    let valid = client.nix("nix-store").args(["--check-validity"]).args(&chaos.outputs).run();
    valid.assert_success();
    wait_until("the keepers are gone", IDLE, || client.pids_matching("nix-offload keep ").is_empty());
    assert_nothing_runs(&client);
    for mac in &macs {
        wait_until("no build is left", SOON, || builds(mac).is_empty());
        assert_nobody_is_served(mac, &client, &chaos.kills);
        let name = format!("ssh-ng://{}", mac.alias());
        assert_eq!((slot_files(&client, &name).len(), held_slots(&client, &name)), (SLOTS, 0));
        if shared.is_some() {
            assert_all_given_back(mac);
        }
        mac.verify_store();
    }
    client.verify_store();
    assert_nothing_piles_up(&client);
}
