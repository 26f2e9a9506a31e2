//! The world of these measurements: a client, a bastion, and three hosts that the client reaches through it.

use std::{fmt::Write as _, time::Duration};

use harness::{Builder, Client, Hook, Release, World};

use crate::BENCH;

/// The program itself.
pub(crate) const PROXY: &str = "/opt/nix-offload/bin/nix-offload-proxy";
/// Where it keeps what it knows when root runs it.
const RUNTIME: &str = "/run/nix-offload";
const HOSTS: usize = 3;
const LIMIT: Duration = Duration::from_secs(600);

/// A way through the bastion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// `ProxyJump`: a login at the bastion for each connection.
    Jump,
    /// `ssh -W` over a master that `ControlMaster auto` keeps.
    Shared,
    /// nix-offload-proxy.
    Ours,
    /// The same, which hands a descriptor over.
    Passing,
}

impl Contender {
    /// All of them, in the order of their turns.
    pub(crate) const ALL: [Self; 4] = [Self::Jump, Self::Shared, Self::Ours, Self::Passing];
    /// Those that use a connection that is there.
    pub(crate) const WARM: [Self; 3] = [Self::Shared, Self::Ours, Self::Passing];

    /// What the tables call it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Jump => "ProxyJump",
            Self::Shared => "ssh -W over ControlMaster auto",
            Self::Ours => "nix-offload-proxy",
            Self::Passing => "nix-offload-proxy --fdpass",
        }
    }

    /// The ssh_config name of a host (from 1 on) that is reached this way.
    pub(crate) fn host(self, number: usize) -> String {
        let way = match self {
            Self::Jump => "jump",
            Self::Shared => "shared",
            Self::Ours => "ours",
            Self::Passing => "passing",
        };
        format!("{way}{number}")
    }

    /// What stands behind `ProxyCommand`.
    pub(crate) fn proxy_command(self, host: &str, port: &str) -> String {
        match self {
            Self::Jump => format!("ssh -W {host}:{port} bastion"),
            Self::Shared => format!("ssh -W {host}:{port} with-master"),
            Self::Ours => format!("{PROXY} --via bastion {host} {port}"),
            Self::Passing => format!("{PROXY} --fdpass --via bastion {host} {port}"),
        }
    }
}

/// The machines.
pub(crate) struct Scene {
    /// Where ssh is run.
    pub(crate) client: Client,
    /// What stands in the way.
    pub(crate) bastion: Builder,
    _hosts: Vec<Builder>,
    _world: World,
}

impl Scene {
    /// Starts them, with no connection yet. The hosts bear more logins at once than an sshd that nobody has told.
    pub(crate) fn for_stampedes(release: Release) -> Self {
        Self::new(release, &["MaxStartups 300"])
    }

    fn new(release: Release, sshd_options: &[&str]) -> Self {
        let world = World::new();
        let bastion = world.builder("bastion").release(release).without_nix().start();
        let hosts: Vec<Builder> = (1..=HOSTS)
            .map(|number| {
                let plan = world.builder(&format!("host{number}")).release(release).without_nix();
                sshd_options.iter().fold(plan, |plan, line| plan.sshd_option(line)).start()
            })
            .collect();
        let mut config = format!(
            "Host jump*\n  ProxyJump bastion\nHost shared*\n  ProxyCommand {}\nHost ours*\n  ProxyCommand {}\n\
             Host passing*\n  ProxyCommand {}\n  ProxyUseFdpass yes\n\
             Host with-master\n  HostName 127.0.0.1\n  Port {}\n  User {}\n  ControlMaster auto\n  \
             ControlPath /root/.ssh/master-%C\n  ControlPersist 3600\n",
            Contender::Shared.proxy_command("%h", "%p"),
            Contender::Ours.proxy_command("%h", "%p"),
            Contender::Passing.proxy_command("%h", "%p"),
            bastion.port(),
            bastion.login(),
        );
        for (index, host) in hosts.iter().enumerate() {
            let number = index + 1;
            writeln!(config, "Host *{number}\n  HostName 127.0.0.1\n  Port {}", host.port()).unwrap();
        }
        // Only ssh is of interest here; the client's Nix builds nothing.
        let plan = world.client().release(release).hook(Hook::Stock).ssh_config(&config).knows(&bastion);
        let client = hosts.iter().fold(plan, harness::ClientPlan::knows).start();
        Self { client, bastion, _hosts: hosts, _world: world }
    }

    /// The same with every master alive and every host known.
    pub(crate) fn warm(release: Release) -> Self {
        let scene = Self::new(release, &[]);
        scene.client.command("ssh").args(["with-master", "true"]).run().assert_success();
        for contender in Contender::ALL {
            for number in 1..=HOSTS {
                scene.client.command("ssh").args([&contender.host(number), "true"]).run().assert_success();
            }
        }
        scene
    }

    /// A host of each number, reached this way.
    pub(crate) fn hosts(contender: Contender) -> Vec<String> {
        (1..=HOSTS).map(|number| contender.host(number)).collect()
    }

    /// Runs this program inside the client's machine and gives the numbers it prints, line by line.
    pub(crate) fn inside<S: AsRef<str>>(&self, words: impl IntoIterator<Item = S>) -> Vec<Vec<f64>> {
        self.inside_with_stderr(words).0
    }

    /// The same, and what it says on stderr.
    pub(crate) fn inside_with_stderr<S: AsRef<str>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> (Vec<Vec<f64>>, String) {
        let output = self.client.command(BENCH).arg("proxy").args(words).limit(LIMIT).run();
        output.assert_success();
        let number = |word: &str| word.parse().expect("it prints numbers");
        let numbers = output.stdout().lines().map(|line| line.split(' ').map(number).collect());
        (numbers.collect(), output.stderr().to_owned())
    }

    /// Ends all masters of nix-offload-proxy, and makes it forget everything.
    pub(crate) fn forget(&self) {
        self.client.command(PROXY).args(["stop", "--all"]).run().assert_success();
        self.client.run(&format!("rm -rf {RUNTIME}"));
    }
}
