//! The test world keeps its own promises: it works on every release and leaves nothing behind.
#![expect(clippy::unwrap_used, reason = "a broken test world is a failed test")]

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    time::Duration,
};

use harness::{Client, Hook, Mode, Release, World, drv};

/// Everything of a world that can be seen from outside.
struct Traces {
    directory: PathBuf,
    name: String,
}

impl Traces {
    fn of(world: &World) -> Self {
        let directory = world.directory().to_path_buf();
        let name = directory.file_name().unwrap().to_str().unwrap().to_owned();
        Self { directory, name }
    }

    /// Processes of the host that carry the world's directory in their arguments or run in it.
    fn processes(&self) -> Vec<String> {
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| {
                let path = entry.unwrap().path();
                let pid: u32 = path.file_name()?.to_str()?.parse().ok()?;
                let line = fs::read(path.join("cmdline")).ok()?;
                let root = fs::read_to_string(path.join("mountinfo")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                let ours = line.contains(&self.name) || root.contains(&self.name);
                (ours && pid != std::process::id()).then_some(line)
            })
            .collect()
    }

    fn mounts(&self) -> bool {
        fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&self.name)
    }
}

fn small_world(world: &World) -> (harness::Builder, Client) {
    let builder = world.builder("mac").start();
    let client = world.client().hook(Hook::Stock).uses(&builder, "ssh-ng", 2).start();
    (builder, client)
}

#[test]
fn a_world_leaves_nothing_behind() {
    let world = World::new();
    let traces = Traces::of(&world);
    let (builder, client) = small_world(&world);
    let background = client.command("sleep").arg("1000").spawn();
    background.outer_pid();
    builder.run("setsid sleep 1000 >/dev/null 2>&1 </dev/null &");
    assert!(!traces.processes().is_empty(), "the world is not seen at all");
    assert!(!traces.mounts(), "mounts of the world are seen outside");
    drop((builder, client, background));
    drop(world);
    assert_eq!(traces.processes(), Vec::<String>::new());
    assert!(!traces.mounts());
    assert!(!traces.directory.exists());
}

#[test]
fn a_failing_test_leaves_only_its_logs() {
    let mut traces = None;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let world = World::new();
        traces = Some(Traces::of(&world));
        let (_builder, client) = small_world(&world);
        client.command("false").run().assert_success();
    }));
    assert!(outcome.is_err());
    let traces = traces.unwrap();
    assert_eq!(traces.processes(), Vec::<String>::new());
    assert!(!traces.mounts());
    let logs = fs::read_dir(&traces.directory).unwrap().count();
    assert!(logs > 0, "the logs should have been kept");
    fs::remove_dir_all(&traces.directory).unwrap();
}

#[test]
fn a_killed_test_takes_its_world_with_it() {
    // This test plays the killed one: a process that starts a machine and is gone at once.
    let world = World::new();
    let traces = Traces::of(&world);
    let stage = world.directory().join("stage");
    fs::create_dir(&stage).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/harness/machine.sh");
    let owner = format!(
        "exec 3> >(exec unshare --mount --pid --uts --fork --kill-child --propagation private \
         bash {script} m {} / >{}/ready)\nsleep 1000",
        stage.display(),
        world.directory().display()
    );
    let mut owner = std::process::Command::new("bash").args(["-c", &owner]).spawn().unwrap();
    let ready = world.directory().join("ready");
    harness::wait_until("the machine is there", Duration::from_secs(10), || {
        fs::read_to_string(&ready).is_ok_and(|text| text == "READY\n")
    });
    assert!(!traces.processes().is_empty());
    for child in children(owner.id()) {
        if !cmdline(child).contains("unshare") {
            kill(child);
        }
    }
    owner.kill().unwrap();
    owner.wait().unwrap();
    harness::wait_until("the machine is gone", Duration::from_secs(10), || traces.processes().is_empty());
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|number| number.parse().unwrap()).collect()
}

fn cmdline(pid: u32) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()).into()
}

fn kill(pid: u32) {
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
}

#[test]
fn each_release_brings_its_own_nix() {
    let world = World::new();
    for release in Release::ALL {
        let client = world.client().named(release.name()).release(release).hook(Hook::Stock).start();
        let version = client.run("nix --version");
        let number = version.trim().rsplit(' ').next().unwrap();
        assert!(number.starts_with(release.nix_version_prefix()), "{release:?}: {version}");
        client.nix_build(&drv::trivial("local"), &[]).assert_success();
        client.verify_store();
    }
}

#[test]
fn every_mode_builds() {
    let private = |as_user| Mode::Private { store: "/tmp/private".into(), as_user };
    let world = World::new();
    for (name, mode) in [
        ("single", Mode::SingleUser),
        ("daemon", Mode::Daemon),
        ("root", private(false)),
        ("user", private(true)),
    ] {
        let client = world.client().named(name).mode(mode).hook(Hook::Stock).start();
        let built = client.nix_build(&drv::trivial(name), &[]);
        let path = built.assert_success().out_path();
        assert!(client.is_valid(&path), "{name}: {path}");
    }
}

#[test]
fn a_builder_can_lack_things() {
    let world = World::new();
    let whole = world.builder("whole").start();
    let bare = world.builder("bare").without_nix().start();
    let idle = world.builder("idle").without_daemon().start();
    let client = world.client().hook(Hook::Stock).knows(&whole).knows(&bare).knows(&idle).start();
    let ssh = |name: &str, line: &str| client.command("ssh").args(["-oBatchMode=yes", name, line]).run();

    ssh("whole", "nix-daemon --version").assert_success();
    let without = ssh("bare", "nix-daemon --version");
    assert_eq!(without.code(), 127, "{without}");
    assert!(without.stderr().contains("command not found"), "{without}");
    ssh("idle", "nix-daemon --version").assert_success();
    assert!(!idle.exists("/nix/var/nix/daemon-socket/socket"));
    assert_eq!(whole.logins(), 1);
}

#[test]
fn a_stranger_is_not_let_in() {
    let world = World::new();
    let builder = world.builder("mac").start();
    let wrong =
        world.client().named("wrong").hook(Hook::Stock).knows(&builder).key(&world.stray_key()).start();
    let unsure = world.client().named("unsure").hook(Hook::Stock).knows_without_host_key(&builder).start();
    let ssh = |client: &Client| client.command("ssh").args(["-oBatchMode=yes", "mac", "true"]).run();
    ssh(&wrong).assert_failure().assert_stderr_has("Permission denied");
    ssh(&unsure).assert_failure().assert_stderr_has("Host key verification failed");
}

#[test]
fn the_journal_is_real() {
    let world = World::new();
    let client = world.client().hook(Hook::Stock).journald().start();
    client.run(
        "printf 'MESSAGE=it works\\nSYSLOG_IDENTIFIER=nix-offload\\nBUILDER=mac\\n' | logger --journald",
    );
    let entries = client.journal("-t nix-offload");
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert_eq!(entries[0]["MESSAGE"], "it works");
    assert_eq!(entries[0]["BUILDER"], "mac");
}
