//! The world of the builds: one client, one builder with 8 slots, and those who compete.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use harness::{Builder, Client, Hook, Output, Release, World, drv};
use serde_json::Value;

use crate::BENCH;

const LIMIT: Duration = Duration::from_secs(600);
const OURS: &str = "/opt/nix-offload/bin/nix-offload";
const USAGE: &str = "/tmp/hook-usage";
const SLOTS: u32 = 8;

/// Who gets the builds done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// Nix's own hook, a connection for each build.
    Stock,
    /// Nix's own hook with `ControlMaster auto` in the user's ssh configuration.
    StockMaster,
    /// nix-offload.
    Ours,
    /// No hook: the client itself, 8 at once.
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

    fn alias(self) -> &'static str {
        if self == Self::StockMaster { "shared" } else { "mac" }
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
    salt: AtomicU32,
    _world: World,
}

impl Scene {
    /// Starts both machines and makes a build with every contender.
    pub(crate) fn new(release: Release) -> Self {
        let world = World::new();
        let builder = world.builder("mac").release(release).start();
        // The same builder by another name, so that one client can do both.
        let shared = format!(
            "Host shared\n  HostName 127.0.0.1\n  Port {}\n  User {}\n  ControlMaster auto\n  \
             ControlPath /root/.ssh/master-%C\n  ControlPersist 3600\n",
            builder.port(),
            builder.login()
        );
        let client =
            world.client().release(release).hook(Hook::Ours).knows(&builder).ssh_config(&shared).start();
        client.command("ssh").args(["shared", "true"]).run().assert_success();
        let scene = Self { client, builder, salt: AtomicU32::new(0), _world: world };
        for contender in Contender::ALL {
            let (plain, _) = scene.hook_words(contender);
            let measured = format!("#!/bin/sh\nexec {BENCH} measure {USAGE} {plain} \"$@\"\n");
            scene.client.write_mode(&measured_hook(contender), &measured, 0o755);
            let _ = scene.build(contender, &drv::trivial(&scene.fresh("warm-up")));
        }
        scene
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
    pub(crate) fn builders(contender: Contender) -> String {
        match contender {
            Contender::Local => String::new(),
            _ => format!("ssh-ng://{} x86_64-linux - {SLOTS} 1", contender.alias()),
        }
    }

    /// Builds an expression to the end, which must succeed.
    pub(crate) fn build(&self, contender: Contender, expression: &str) -> Output {
        let (hook, _) = self.hook_words(contender);
        self.build_with(contender, &hook, expression)
    }

    /// The same with a wrapper around each hook process; gives also what they used.
    pub(crate) fn build_measured(&self, contender: Contender, expression: &str) -> (Output, Vec<Usage>) {
        self.client.write(USAGE, "");
        let output = self.build_with(contender, &measured_hook(contender), expression);
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

    fn build_with(&self, contender: Contender, hook: &str, expression: &str) -> Output {
        let jobs = if contender == Contender::Local { "-j8" } else { "-j0" };
        let builders = Self::builders(contender);
        let args = [jobs, "--builders", &builders, "--option", "build-hook", hook];
        let output = self.client.nix_build_command(expression, &args).limit(LIMIT).run();
        output.assert_success();
        output
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
