//! A cancelled build: how long the builder goes on with it.

use std::{fs, time::Duration};

use harness::{Builder, Client, Hook, Machine, Mode, Release, World, drv, wait_until};
use nix::sys::signal::Signal;

use crate::report::{Bound, Figure, Section};

const GOAL_MS: f64 = 100.0;
const LIMIT: Duration = Duration::from_secs(60);
/// No build of these ends by itself.
const FIRST_SLEEP: u32 = 40_000;

/// A way to a store, and where its builds run.
struct Way<'a> {
    label: &'static str,
    client: &'a Client,
    uri: &'static str,
    runs_on: &'a Machine,
}

/// Kills and interrupts nix-build `times` times each by every way.
///
/// `known` is given the client before anything is measured.
pub(crate) fn cancel(release: Release, times: u32, known: impl FnOnce(&Machine)) -> Section {
    let world = World::new();
    let open = world.builder("open").release(release).start();
    let closed = world.builder("closed").release(release).refusing_forwarding().start();
    let forced = |name, command: &str| -> Builder {
        let options = format!("command=\"{command}\",restrict");
        world.builder(name).release(release).key_options(&options).start()
    };
    let daemon = forced("daemon", "nix-daemon --stdio");
    let serve = forced("serve", "nix-store --serve --write");
    let plan = world.client().release(release).hook(Hook::Ours);
    let client = [&open, &closed, &daemon, &serve].into_iter().fold(plan, |plan, mac| plan.knows(mac));
    let client = client.start();
    known(&client);
    // Its own /nix is a machine for it.
    let mode = Mode::Private { store: "/root/my-nix".into(), as_user: false };
    let own = world.client().named("own").release(release).mode(mode).hook(Hook::Ours).start();
    own.run(
        "nix-daemon </dev/null >/tmp/daemon.log 2>&1 & \
         until [ -S /nix/var/nix/daemon-socket/socket ]; do sleep 0.02; done",
    );
    let there = |label, uri, runs_on| Way { label, client: &client, uri, runs_on };
    let here = |label, uri| Way { label, client: &own, uri, runs_on: &own };
    let ways = [
        there("the daemon's socket", "ssh-ng://open", &*open),
        there("nix-daemon --stdio in a session", "ssh-ng://closed", &closed),
        there("nix-store --serve, as named", "ssh://open?remote-program=nix-store", &open),
        there("nix-daemon --stdio, forced", "ssh-ng://daemon", &daemon),
        there("nix-store --serve, forced", "ssh://serve", &serve),
        here("localhost, a child", "ssh-ng://localhost"),
        here("a socket here", "unix:///nix/var/nix/daemon-socket/socket"),
    ];
    let mut figures = Vec::new();
    let mut seconds = FIRST_SLEEP;
    for way in &ways {
        for signal in [Signal::SIGKILL, Signal::SIGINT] {
            let mut figure = Figure::new(&format!("{}: {signal}", way.label), "ms");
            for _ in 0..times {
                seconds += 1;
                figure.push(way.cancelled(seconds, signal));
            }
            figures.push(figure);
        }
    }
    let goals: Vec<(String, f64)> = figures
        .iter()
        .map(|figure| (format!("cancel: slowest, {}, ms", figure.label()), figure.max()))
        .collect();
    let title = format!(
        "A silent build whose nix-build is killed or interrupted, {times} times each: until its process is gone"
    );
    let section = Section::new(title, figures);
    goals
        .iter()
        .fold(section, |section, (text, slowest)| section.goal(text, *slowest, Bound::AtMost(GOAL_MS)))
}

impl Way<'_> {
    /// Milliseconds from the signal to the end of the build's process.
    fn cancelled(&self, seconds: u32, signal: Signal) -> f64 {
        let machines = format!("{} x86_64-linux - 1 1", self.uri);
        let expression = drv::silent_sleep(&format!("sleeper-{seconds}"), &seconds.to_string());
        let build = self.client.spawn_nix_build(&expression, &["-j0", "--builders", &machines]);
        let command_line = format!("sleep {seconds}");
        let mut pid = None;
        wait_until("the build has begun", LIMIT, || {
            let processes = self.runs_on.processes();
            pid =
                processes.iter().find(|process| process.command_line == command_line).map(|found| found.pid);
            pid.is_some()
        });
        let file = self.runs_on.path(&format!("/proc/{}/cmdline", pid.expect("it has begun")));
        build.signal(signal);
        // One that is dead and still to be waited for has no command line.
        let what = format!("{command_line} has ended: {}", self.label);
        let took = wait_until(&what, LIMIT, || fs::read(&file).map_or(true, |words| words.is_empty()));
        build.wait().assert_failure();
        took.as_secs_f64() * 1000.0
    }
}
