//! The world of the builds: one client, one builder, and those who compete.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use harness::{Builder, Client, Command, Hook, Output, Relay, Release, Running, World, drv};
use serde_json::Value;

use crate::BENCH;

const LIMIT: Duration = Duration::from_secs(600);
const OURS: &str = "/opt/nix-offload/bin/nix-offload";
const USAGE: &str = "/tmp/hook-usage";
const SLOTS: u32 = 8;
const MANY_SLOTS: u32 = 20;

/// Who gets the builds done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// Nix's own hook, a connection for each build.
    Stock,
    /// Nix's own hook with `ControlMaster auto` in the user's ssh configuration.
    StockMaster,
    /// nix-offload.
    Ours,
    /// No hook: the client itself, as many at once as the builder has slots.
    Local,
}

impl Contender {
    /// All of them, in the order of their turns.
    pub(crate) const ALL: [Self; 4] = [Self::Stock, Self::StockMaster, Self::Ours, Self::Local];
    /// Those that build elsewhere.
    pub(crate) const REMOTE: [Self; 3] = [Self::Stock, Self::StockMaster, Self::Ours];

    /// What the tables call it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::StockMaster => "stock, master",
            Self::Ours => "nix-offload",
            Self::Local => "local",
        }
    }

    fn alias(self, link: Link) -> String {
        format!("{}{}", if self == Self::StockMaster { "shared" } else { "mac" }, link.suffix())
    }
}

/// What lies between the client and the builder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// The loopback network alone.
    Direct,
    /// A relay that passes everything on at once.
    Near,
    /// The same relay with a delay.
    Far,
}

impl Link {
    fn suffix(self) -> &'static str {
        match self {
            Self::Direct => "",
            Self::Near => "-near",
            Self::Far => "-far",
        }
    }
}

/// What one hook process and the children it waited for used.
pub(crate) struct Usage {
    /// Processor time, user and system.
    pub(crate) cpu_ms: f64,
    /// The largest resident set of one of the processes.
    pub(crate) peak_mib: f64,
}

/// The world, warm: every connection that is to live is alive.
pub(crate) struct Scene {
    /// Where Nix is asked.
    pub(crate) client: Client,
    /// Where it is to be built.
    pub(crate) builder: Builder,
    slots: u32,
    relays: Vec<(Link, Relay)>,
    salt: AtomicU32,
    _world: World,
}

impl Scene {
    /// Starts both machines, the builder with 8 slots, and makes a build with every contender.
    pub(crate) fn new(release: Release) -> Self {
        Self::start(release, SLOTS, &[])
    }

    /// The same with 20 slots.
    pub(crate) fn wide(release: Release) -> Self {
        Self::start(release, MANY_SLOTS, &[])
    }

    /// The same as the first, with links besides: one with this round trip, and one like it without a delay.
    pub(crate) fn linked(release: Release, round_trip: Duration) -> Self {
        Self::start(release, SLOTS, &[(Link::Near, Duration::ZERO), (Link::Far, round_trip)])
    }

    fn start(release: Release, slots: u32, links: &[(Link, Duration)]) -> Self {
        let world = World::new();
        let plan = world.builder("mac").release(release).nix_conf(&format!("max-jobs = {slots}"));
        let builder = plan.start();
        let relays: Vec<(Link, Relay)> =
            links.iter().map(|(link, round_trip)| (*link, Relay::to(builder.port(), *round_trip))).collect();
        // The same builder by other names, so that one client can do everything.
        let host = |alias: &str, port: u16, more: &str| {
            format!(
                "Host {alias}\n  HostName 127.0.0.1\n  Port {port}\n  HostKeyAlias [127.0.0.1]:{}\n  User {}\n{more}\n",
                builder.port(),
                builder.login()
            )
        };
        let shares = "  ControlMaster auto\n  ControlPath /root/.ssh/master-%C\n  ControlPersist 3600\n";
        let mut ssh_config = host(&Contender::StockMaster.alias(Link::Direct), builder.port(), shares);
        for (link, relay) in &relays {
            for (contender, more) in [(Contender::StockMaster, shares), (Contender::Ours, "")] {
                ssh_config.push_str(&host(&contender.alias(*link), relay.port(), more));
            }
        }
        let client =
            world.client().release(release).hook(Hook::Ours).knows(&builder).ssh_config(&ssh_config).start();
        let scene = Self { client, builder, slots, relays, salt: AtomicU32::new(0), _world: world };
        for link in links.iter().map(|(link, _)| *link).chain([Link::Direct]) {
            let alias = Contender::StockMaster.alias(link);
            scene.client.command("ssh").args([&alias, "true"]).run().assert_success();
            for contender in Contender::ALL {
                let (plain, _) = scene.hook_words(contender);
                let measured = format!("#!/bin/sh\nexec {BENCH} measure {USAGE} {plain} \"$@\"\n");
                scene.client.write_mode(&measured_hook(contender), &measured, 0o755);
                let _ = scene.build_over(contender, link, &drv::trivial(&scene.fresh("warm-up")));
            }
        }
        scene
    }

    /// How many flights have been made so far over the long link.
    pub(crate) fn flights(&self) -> u64 {
        self.relays.iter().filter(|(link, _)| *link == Link::Far).map(|(_, relay)| relay.flights()).sum()
    }

    /// How many slots the builder has.
    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// A name no derivation had yet.
    pub(crate) fn fresh(&self, name: &str) -> String {
        format!("{name}-{}", self.salt.fetch_add(1, Ordering::Relaxed))
    }

    /// A hook as a line of the setting, and as words with Nix's last argument.
    pub(crate) fn hook_words(&self, contender: Contender) -> (String, Vec<String>) {
        let line = match (contender, self.client.release()) {
            (Contender::Ours, _) => OURS.into(),
            (_, Release::Bookworm) => "/usr/libexec/nix/build-remote".into(),
            _ => "/usr/bin/nix __build-remote".to_owned(),
        };
        let words = line.split(' ').map(str::to_owned).chain(["3".to_owned()]).collect();
        (line, words)
    }

    /// What stands in the setting `builders` for a contender.
    pub(crate) fn builders(&self, contender: Contender, link: Link) -> String {
        match contender {
            Contender::Local => String::new(),
            _ => format!("ssh-ng://{} x86_64-linux - {} 1", contender.alias(link), self.slots),
        }
    }

    /// Builds an expression to the end, which must succeed.
    pub(crate) fn build(&self, contender: Contender, expression: &str) -> Output {
        self.build_over(contender, Link::Direct, expression)
    }

    /// The same over a link.
    pub(crate) fn build_over(&self, contender: Contender, link: Link, expression: &str) -> Output {
        let (hook, _) = self.hook_words(contender);
        let output = self.build_command(contender, link, &hook, expression).run();
        output.assert_success();
        output
    }

    /// Starts building an expression.
    pub(crate) fn spawn(&self, contender: Contender, expression: &str) -> Running {
        let (hook, _) = self.hook_words(contender);
        self.build_command(contender, Link::Direct, &hook, expression).spawn()
    }

    /// The same with a wrapper around each hook process; gives also what they used.
    pub(crate) fn build_measured(&self, contender: Contender, expression: &str) -> (Output, Vec<Usage>) {
        self.client.write(USAGE, "");
        let hook = measured_hook(contender);
        let output = self.build_command(contender, Link::Direct, &hook, expression).run();
        output.assert_success();
        let text = self.client.read(USAGE);
        let number = |value: &Value, name: &str| value[name].as_f64().expect("the wrapper writes numbers");
        let usage = |line: &str| {
            let value: Value = serde_json::from_str(line).expect("the wrapper writes JSON");
            Usage {
                cpu_ms: number(&value, "cpu_us") / 1000.0,
                peak_mib: number(&value, "max_rss_kib") / 1024.0,
            }
        };
        (output, text.lines().map(usage).collect())
    }

    fn build_command(&self, contender: Contender, link: Link, hook: &str, expression: &str) -> Command {
        let jobs = format!("-j{}", if contender == Contender::Local { self.slots } else { 0 });
        let builders = self.builders(contender, link);
        let args = [&jobs, "--builders", &builders, "--option", "build-hook", hook];
        self.client.nix_build_command(expression, &args).limit(LIMIT)
    }

    /// Processor time so far of all ssh processes that live on between builds.
    pub(crate) fn masters_cpu_ms(&self) -> f64 {
        let of = |pid: u32| {
            let text = self.client.read(&format!("/proc/{pid}/schedstat"));
            let nanoseconds: f64 = text.split(' ').next().unwrap().parse().unwrap();
            nanoseconds / 1e6
        };
        self.client.pids_matching("ssh").into_iter().map(of).sum()
    }
}

fn measured_hook(contender: Contender) -> String {
    format!("/usr/local/bin/measured-{}", contender.label().replace([' ', ','], ""))
}
