//! What several of these tests need: a build that waits for a sign, and the search for what was left behind.

use std::{
    fs,
    time::{Duration, Instant},
};

use harness::{Builder, Client, Machine, Process, drv, wait_until};

/// For what happens at once, but on a machine that may be busy with other tests.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// For tests of which machine is chosen: the load of all of them is that of the machine the tests run on.
pub(crate) const NO_SAMPLES: &str = "[choice]\nsample-every = 0\n";

/// In offload.toml: samples as often as a test needs them.
pub(crate) const OFTEN: &str = "[choice]\nsample-every = '1s'\n";
/// How long the connection to a master that has not answered yet is held when its hook is gone, lest the master end.
pub(crate) const UNANSWERED: Duration = Duration::from_secs(65);
/// How long hooks and their helpers may take to go when their work is over.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Notes where it was begun, waits for [`open`] and then writes where it was built.
pub(crate) fn gate(name: &str) -> String {
    format!(
        "cat /etc/machine-name >> /mnt/share/{name}.begun; \
         until [ -e /mnt/share/{name}.go ]; do sleep 0.02; done; cat /etc/machine-name > $out"
    )
}

/// A derivation that notes where it was begun, waits for [`open`] and then writes where it was built.
pub(crate) fn gated(name: &str) -> String {
    drv::script(name, &gate(name))
}

/// The same for a machine with this feature.
pub(crate) fn picky(name: &str, feature: &str) -> String {
    let script = drv::quote(&gate(name));
    drv::expression(&format!(r#"d "{name}" {script} {{ requiredSystemFeatures = [ "{feature}" ]; }}"#))
}

/// The machines on which a gated build was begun so far, in their order.
pub(crate) fn begun(machine: &Machine, name: &str) -> Vec<String> {
    let notes = fs::read_to_string(machine.path(&format!("/mnt/share/{name}.begun"))).unwrap_or_default();
    notes.lines().map(str::to_owned).collect()
}

/// Waits until a gated build was begun on these machines.
pub(crate) fn wait_for_begin(machine: &Machine, name: &str, on: &[&str]) {
    wait_until(&format!("{name} is begun on {on:?}"), SOON, || begun(machine, name) == on);
}

/// Lets a gated build go on.
pub(crate) fn open(machine: &Machine, name: &str) {
    machine.write(&format!("/mnt/share/{name}.go"), "");
}

/// Locks of Nix and of ours that somebody holds.
pub(crate) fn held_locks(client: &Client) -> String {
    client.run(
        "find /nix/var/nix/current-load /nix/store /run/nix-offload -maxdepth 3 -type f \
         \\( -path '/nix/var/*' -o -path '/run/*' -o -name '*.lock' \\) 2>/dev/null | \
         while read -r file; do case $file in *.keeping | */sample/lock) continue ;; esac; flock -n \"$file\" true || echo \"$file\"; done",
    )
}

/// Only these many SSH masters are left of all hooks, each with its socket and perhaps a keeper of streams, and no
/// lock; the sampler may be there, too. What the client runs anyway is not counted.
pub(crate) fn assert_only_masters_left(client: &Client, masters: usize) {
    assert_left(client, masters, 0, END_LIMIT);
}

/// The same after a refused channel: the master needs the other end of that for the rest of its life, so a
/// small process holds it.
pub(crate) fn assert_masters_and_holder_left(client: &Client, masters: usize) {
    assert_left(client, masters, 1, END_LIMIT);
}

/// The same when a process may still have to wait for an answer of a master that does not answer.
pub(crate) fn assert_only_masters_left_after(client: &Client, masters: usize, limit: Duration) {
    assert_left(client, masters, 0, limit);
}

fn assert_left(client: &Client, masters: usize, holders: usize, limit: Duration) {
    let services = ["nix-daemon", "systemd-journald"];
    let mut left: Vec<Process> = Vec::new();
    let start = Instant::now();
    wait_until("what is left is known", limit * 2, || {
        left = client.processes();
        left.retain(|process| !services.iter().any(|service| process.command_line.contains(service)));
        left.retain(|process| !process.command_line.starts_with("nix-offload keep "));
        left.retain(|process| process.command_line != "nix-offload sample");
        left.len() == masters + holders || start.elapsed() > limit
    });
    let is_master = |process: &Process| process.command_line.starts_with("ssh: /run/nix-offload/");
    let is_holder = |process: &Process| process.command_line.starts_with("/bin/sh -c exec 3>&-");
    let count = |wanted: &dyn Fn(&Process) -> bool| left.iter().filter(|process| wanted(process)).count();
    assert_eq!(
        (left.len(), count(&is_master), count(&is_holder)),
        (masters + holders, masters, holders),
        "{left:?}"
    );
    assert_eq!(held_locks(client), "");
    let sockets = client.run("find /run/nix-offload -name '*.sock' -type s 2>/dev/null || true");
    assert_eq!(sockets.lines().count(), masters, "sockets: {sockets}");
}

/// The builds that do nothing but sleep for that many seconds, and not the command lines that mention it.
pub(crate) fn sleeping(machine: &Machine, seconds: &str) -> Vec<u32> {
    let command_line = format!("sleep {seconds}");
    machine.processes().iter().filter(|process| process.command_line == command_line).map(|p| p.pid).collect()
}

/// Leaves a program out until /usr/bin is unmounted.
pub(crate) fn hide(mac: &Builder, program: &str) {
    mac.run(&format!(
        "mkdir -p /run/{program}/upper /run/{program}/work; mknod /run/{program}/upper/{program} c 0 0; \
         mount -t overlay -o lowerdir=/usr/bin,upperdir=/run/{program}/upper,workdir=/run/{program}/work \
         overlay /usr/bin; hash -r; if {program} --version; then exit 1; fi 2>/dev/null"
    ));
}

/// From now on the machine has that load average, and its processors are that busy, in percent. What the kernel says is
/// covered by mounts, which whoever reads it there sees.
pub(crate) fn pretend(builder: &Builder, load: f64, pressure: f64) {
    builder.write("/run/load/loadavg", &format!("{load:.2} {load:.2} {load:.2} 1/100 4711\n"));
    let average = format!("avg10={pressure:.2} avg60={pressure:.2} avg300={pressure:.2} total=1");
    builder.write("/run/load/cpu", &format!("some {average}\nfull {average}\n"));
    builder.run(
        "for place in loadavg pressure/cpu; do \
         if [ -e /proc/$place ] && ! grep -q \" /proc/$place \" /proc/self/mounts; then \
         mount --bind /run/load/${place##*/} /proc/$place; fi; done",
    );
}
