//! The Debian package: what installing, upgrading and removing it does, with the real dpkg.

use std::{fs, os::unix::fs::PermissionsExt, os::unix::net::UnixListener, process::Command};

use harness::{Builder, Client, Hook, Output, Process, Release, World, binaries, drv, wait_until, workspace};

use crate::support::SOON;

const PROXY: &str = "/opt/nix-offload/bin/nix-offload-proxy";
/// What the package depends on or goes with.
const NEEDS: [&str; 4] = ["libc6", "libgcc-s1", "nix-bin", "openssh-client"];
const USERS_PLACES: [&str; 4] =
    ["/home/user/gone", "/home/user/own", "/run/user/1000/nix-offload", "/tmp/nix-offload-1000"];

/// Makes the package, and returns its path inside the world's machines.
fn package(world: &World, version: &str) -> String {
    let output = Command::new(workspace().join("packaging/debian/build"))
        .args([&binaries(), &world.directory().join("share")])
        .arg(version)
        // The test is not about making it small.
        .env("DPKG_DEB_COMPRESSOR_TYPE", "none")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    format!("/mnt/share/{}", said.trim().rsplit_once('/').unwrap().1)
}

/// A client with Nix's own hook, whose dpkg can install something.
fn client(world: &World, mac: &Builder) -> Client {
    let client = world.client().release(Release::Bookworm).hook(Hook::Stock).uses(mac, "ssh-ng", 8).start();
    make_usr_writable(&client);
    client.run("mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates");
    let database = Release::Bookworm.root().join("var/lib/dpkg");
    let status = fs::read_to_string(database.join("status")).unwrap();
    let needed = status
        .split_inclusive("\n\n")
        .filter(|stanza| NEEDS.iter().any(|name| stanza.lines().next() == Some(&format!("Package: {name}"))));
    client.write("/var/lib/dpkg/status", &needed.collect::<String>());
    client.write("/var/lib/dpkg/info/format", "1\n");
    for entry in fs::read_dir(database.join("info")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let package = name.strip_suffix(".list").map(|name| name.trim_end_matches(":amd64"));
        if package.is_some_and(|package| NEEDS.contains(&package)) {
            let list = fs::read_to_string(database.join("info").join(&name)).unwrap();
            client.write(&format!("/var/lib/dpkg/info/{name}"), &list);
        }
    }
    client
}

fn make_usr_writable(client: &Client) {
    client.run(
        "mkdir -p /over/upper /over/work && \
         mount -t overlay -o lowerdir=/usr,upperdir=/over/upper,workdir=/over/work overlay /usr",
    );
}

fn dpkg(client: &Client, action: &str, what: &str) -> Output {
    let output = client.command("dpkg").args([action, what]).run();
    output.assert_success();
    output
}

/// Installs it and does what it says. Returns what dpkg printed.
fn install(client: &Client, package: &str) -> Output {
    let installed = dpkg(client, "-i", package);
    let line = installed.stdout().split('\'').find(|word| word.starts_with("!include")).unwrap().to_owned();
    client.write("/etc/nix/nix.conf", &format!("{}{line}\n", client.read("/etc/nix/nix.conf")));
    installed
}

/// Starts a master as the user without rights, with this environment.
fn start_master(client: &Client, name: &str, value: &str) {
    let output = client.command("nix-offload-proxy").args(["start", "mac"]).env(name, value).as_user().run();
    output.assert_success();
}

fn masters(client: &Client) -> Vec<Process> {
    let mut found = client.processes();
    found.retain(|process| process.command_line.starts_with("ssh"));
    found
}

fn pids(client: &Client) -> Vec<u32> {
    let mut pids: Vec<u32> = masters(client).iter().map(|process| process.pid).collect();
    pids.sort_unstable();
    pids
}

/// Builds where the stock hook and our own would build it, and says where that was.
#[track_caller]
fn build(client: &Client, name: &str, args: &[&str]) -> (String, Output) {
    let built = client.nix_build(&drv::where_built(name), args);
    (client.read(&built.assert_success().out_path()).trim().to_owned(), built)
}

#[test]
fn removing_the_package_leaves_no_master_of_anybody_and_nix_as_it_was() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &mac);
    let installed = install(&client, &package(&world, "0.1"));
    assert_eq!(installed.stderr(), "", "{installed}");
    let files =
        client.run("dpkg -L nix-offload | while read -r file; do [ -d \"$file\" ] || echo \"$file\"; done");
    assert!(files.lines().count() > 5 && files.contains("/usr/bin/nix-offload-proxy\n"), "{files}");
    assert!(
        files.contains("/man1/nix-offload.1.gz\n") && files.contains("/man1/nix-offload-proxy.1.gz\n"),
        "{files}"
    );

    let (place, built) = build(&client, "by-ours", &["-j0"]);
    assert_eq!(place, "mac", "{built}");
    assert_eq!(masters(&client).len(), 1, "{:?}", masters(&client));
    start_master(&client, "XDG_RUNTIME_DIR", "/run/user/1000");
    start_master(&client, "XDG_RUNTIME_DIR", "");
    start_master(&client, "NIX_OFFLOAD_RUNTIME_DIR", "/home/user/own");
    start_master(&client, "NIX_OFFLOAD_RUNTIME_DIR", "/home/user/gone");
    client.run("rm -r /home/user/gone");
    let own = "ssh -M -S /home/user/.ssh/own -fN mac >/dev/null 2>&1";
    client.command("bash").args(["-c", own]).as_user().run().assert_success();
    assert_eq!(masters(&client).len(), 6, "{:?}", masters(&client));

    let removed = dpkg(&client, "-r", "nix-offload");
    let left = masters(&client);
    assert_eq!(left.len(), 1, "{removed}{left:?}");
    assert!(left[0].command_line.contains("/home/user/.ssh/own"), "{left:?}");
    let sockets =
        client.run("find /run /tmp /home -type s -not -path '/home/user/.ssh/*' 2>/dev/null || true");
    assert_eq!(sockets, "", "{removed}");
    removed.assert_stderr_lacks("warning");
    for part in ["stopped mac of root\n", "stopped mac of user\n", "stopped process "] {
        assert!(removed.stdout().contains(part), "{part:?}: {removed}");
    }

    let runtime = client.run("find /run/nix-offload | sort");
    let (place, built) = build(&client, "locally", &["--builders", ""]);
    assert_eq!(place, "client", "{built}");
    built.assert_stderr_lacks("hook").assert_stderr_lacks("offload").assert_stderr_lacks("warning");
    let (place, built) = build(&client, "by-stock", &["-j0"]);
    assert_eq!(place, "mac", "{built}");
    built.assert_stderr_lacks("offload");
    assert_eq!(client.run("find /run/nix-offload | sort"), runtime, "{built}");

    let _ = dpkg(&client, "-P", "nix-offload");
    for file in files.lines() {
        assert!(!client.exists(file), "{file}");
    }
    let named = client.run(
        "find / \\( -path /proc -o -path /sys -o -path /mnt -o -path /opt -o -path /nix \\) -prune -o \
         \\( -name '*nix-offload*' -o -path /home/user/own \\) -print | sort",
    );
    assert_eq!(named.lines().collect::<Vec<_>>(), USERS_PLACES[1..], "only users' own directories are left");
}

#[test]
fn an_upgrade_of_the_package_keeps_all_masters() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &mac);
    let _ = install(&client, &package(&world, "0.1"));
    let _ = build(&client, "before", &["-j0"]);
    start_master(&client, "XDG_RUNTIME_DIR", "/run/user/1000");
    let before = pids(&client);
    assert_eq!(before.len(), 2);
    let upgraded = dpkg(&client, "-i", &package(&world, "0.2"));
    assert!(!upgraded.stdout().contains("include"), "it is set up already: {upgraded}");
    assert!(client.run("dpkg -s nix-offload").contains("Version: 0.2\n"));
    assert_eq!(pids(&client), before, "{upgraded}");
    let (place, _) = build(&client, "after", &["-j0"]);
    assert_eq!(place, "mac");
    assert_eq!(pids(&client), before);
    assert_eq!(mac.logins(), 2);
}

#[test]
fn a_hook_that_nix_conf_names_itself_is_warned_of_when_the_package_goes() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = client(&world, &mac);
    let _ = install(&client, &package(&world, "0.1"));
    let conf = client.read("/etc/nix/nix.conf");
    client.write("/etc/nix/nix.conf", &format!("{conf}build-hook = /usr/bin/nix-offload\n"));
    client.write(
        "/etc/nix/other.conf",
        "# include /usr/share/nix-offload/nix.conf\ninclude /usr/share/nix-offload/nix.conf\n",
    );
    let removed = dpkg(&client, "-r", "nix-offload");
    let warnings: Vec<&str> = removed.stderr().lines().filter(|line| line.contains("warning")).collect();
    assert_eq!(warnings.len(), 2, "{removed}");
    assert!(warnings[0].ends_with("build-hook = /usr/bin/nix-offload"), "{removed}");
    assert!(warnings[1].ends_with(": include /usr/share/nix-offload/nix.conf"), "{removed}");
}

#[test]
fn a_file_that_is_included_with_a_mark_may_be_absent_in_every_nix() {
    let world = World::new();
    for release in Release::ALL {
        let plan = world.client().named(release.name()).release(release).hook(Hook::Stock);
        let client = plan.nix_conf("!include /usr/share/nix-offload/nix.conf").start();
        let (place, built) = build(&client, "a", &[]);
        assert_eq!(place, release.name(), "{built}");
        built.assert_stderr_lacks("offload");
    }
}

#[test]
fn nix_that_ignores_the_line_obeys_the_packaged_drop_in_while_the_package_is_there() {
    const DROP_IN: &str = "/usr/share/doc/nix-offload/nix-daemon.service.d/nix-offload.conf";
    let world = World::new();
    let mac = world.builder("mac").start();
    let package = package(&world, "0.1");
    mac.run(&format!("dpkg -x {package} /tmp/package"));
    let drop_in = mac.read(&format!("/tmp/package{DROP_IN}"));
    let value = drop_in.lines().find_map(|line| line.strip_prefix("Environment=\"NIX_CONFIG=")).unwrap();
    let plan = world.client().release(Release::Trixie).hook(Hook::Stock).uses(&mac, "ssh-ng", 1);
    let client = plan.env("NIX_CONFIG", value.trim_end_matches('"')).start();
    make_usr_writable(&client);
    client.run(&format!("dpkg -x {package} /"));
    let (place, built) = build(&client, "with", &["-j0"]);
    assert!(place == "mac" && client.exists("/run/nix-offload"), "{built}");
    client.run("rm -r /usr/bin/nix-offload /usr/share/nix-offload /run/nix-offload");
    let (place, built) = build(&client, "without", &["-j0"]);
    assert!(place == "mac" && !client.exists("/run/nix-offload"), "{built}");
    built.assert_stderr_lacks("offload");
}

#[test]
fn only_root_can_stop_the_masters_of_all_users() {
    let world = World::new();
    let client = world.client().hook(Hook::Stock).start();
    let refused = client.command(PROXY).args(["stop", "--all-users"]).as_user().run();
    assert_eq!(refused.code(), 77, "{refused}");
    refused.assert_stderr_has("error: only root can end the SSH masters of all users\nhint: ");
    let both = client.command(PROXY).args(["stop", "--all-users", "--all"]).run();
    assert_eq!(both.code(), 2, "{both}");
    let none = client.command(PROXY).args(["stop", "--all-users", "--json"]).run();
    assert_eq!((none.code(), none.stdout()), (0, "[]\n"), "{none}");
    assert!(!client.exists("/run/nix-offload"), "looking makes no directory");
    for option in [["--become", "0"], ["--become", "1"]] {
        let refused = client.command(PROXY).args(["stop", "--all"]).args(option).as_user().run();
        assert_eq!(refused.code(), 1, "{refused}");
    }
}

#[test]
fn what_a_user_has_prepared_neither_harms_root_nor_saves_others() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(Hook::Stock).knows(&mac).start();
    let victim = client.command("sleep").arg("600").spawn();
    wait_until("it runs", SOON, || client.pids_matching("sleep 600").len() == 1);
    let pid = client.pids_matching("sleep 600")[0];
    let stat = client.read(&format!("/proc/{pid}/stat"));
    let born = stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap();

    // A master that hangs and has the number of root's process.
    let name = "0123456789abcdef0123";
    let place = "/tmp/nix-offload-1000";
    let record =
        serde_json::json!({ "destination": "a\u{1b}[2J", "pid": pid, "born": born, "started-at": 1 });
    client.write(&format!("{place}/{name}.json"), &record.to_string());
    let _hung = UnixListener::bind(client.path(&format!("{place}/{name}.sock"))).unwrap();
    for file in ["", &format!("/{name}.json"), &format!("/{name}.sock")] {
        client.give_to_user(&format!("{place}{file}"));
    }
    fs::set_permissions(client.path(place), fs::Permissions::from_mode(0o700)).unwrap();
    // Places that are not what they seem.
    client.run("ln -s /root /tmp/nix-offload-1001; mkdir -m 700 /tmp/nix-offload-1002");
    let start = |user: bool| {
        let command = client.command(PROXY).args(["start", "mac"]);
        let started = if user { command.as_user() } else { command }.run();
        started.assert_success();
    };
    start(true);
    start(false);
    assert_eq!(masters(&client).len(), 2);

    let stopped = client.command(PROXY).args(["stop", "--all-users", "--json"]).run();
    assert_eq!(stopped.code(), 1, "{stopped}");
    assert!(client.pids_matching("sleep 600") == [pid], "{stopped}");
    assert!(!stopped.stderr().contains('\u{1b}'), "{stopped}");
    let report: serde_json::Value = serde_json::from_str(stopped.stdout()).unwrap();
    let of = |directory: &str| {
        let entries = report.as_array().unwrap().iter();
        entries.filter(|entry| entry["directory"] == directory).collect::<Vec<_>>()
    };
    assert_eq!(report.as_array().unwrap().len(), 3, "{stopped}");
    assert!(of(place)[0]["error"].as_str().unwrap().ends_with("does not end"), "{stopped}");
    for (directory, user, uid) in
        [("/run/nix-offload", "root", 0), ("/run/user/1000/nix-offload", "user", 1000)]
    {
        let expected = serde_json::json!({
            "user": user, "uid": uid, "directory": directory, "stopped": ["mac"], "error": null
        });
        assert_eq!(of(directory), [&expected], "{stopped}");
    }
    assert_eq!(masters(&client).len(), 0, "{:?}", masters(&client));
    drop(victim);
}
