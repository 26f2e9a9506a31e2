//! `check`: what is wrong with the configuration, as the Nix that is here reads it.

use std::{os::unix::net::UnixStream, time::Duration};

use harness::{Client, ClientPlan, Hook, Mode, OURS, Output, Release, World, wait_until};
use serde_json::Value;

use crate::support::SOON;

const CONF: &str = "/etc/nix/nix.conf";
/// Who is asked for names: the file alone, which knows what it does not have.
const NO_DNS: &str = "passwd: files\ngroup: files\nhosts: files\n";
/// Names that every machine of this world knows.
const HOSTS: &str = "127.0.0.1 localhost\n198.51.100.1 one\n198.51.100.2 two\n";

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// Runs it as root, with nothing in its environment.
fn check(client: &Client, args: &[&str]) -> Output {
    client.command(OURS).arg("check").args(args).run()
}

fn told(output: &Output) -> Vec<Value> {
    let report: Value =
        serde_json::from_str(output.stdout()).unwrap_or_else(|error| panic!("{error}: {output}"));
    let findings = report["findings"].as_array().unwrap().clone();
    let count = |severity: &str| findings.iter().filter(|finding| finding["severity"] == severity).count();
    assert_eq!((&report["errors"], &report["warnings"]), (&count("error").into(), &count("warning").into()));
    assert_eq!(output.code(), i32::from(count("error") > 0), "{output}");
    findings
}

/// What it finds with `--json`: severity, place, message and hint of each in a line.
fn findings(client: &Client, args: &[&str]) -> Vec<String> {
    lines(&told(&check(client, &[&["--json"], args].concat())))
}

fn lines(findings: &[Value]) -> Vec<String> {
    let word = |finding: &Value, name: &str| match &finding[name] {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    };
    let names = ["severity", "source", "line", "column", "message", "hint"];
    findings.iter().map(|finding| names.map(|name| word(finding, name)).join(" ")).collect()
}

/// There is this one finding, with all these parts.
#[track_caller]
fn assert_one(found: &[String], parts: &[&str]) {
    assert_eq!(found.len(), 1, "{found:#?}");
    for part in parts {
        assert!(found[0].contains(part), "lacks {part:?}: {found:#?}");
    }
}

/// The line of a file that begins so.
fn line_of(client: &Client, file: &str, begin: &str) -> usize {
    let text = client.read(file);
    text.lines().position(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("{file}: {text}")) + 1
}

#[test]
fn every_release_that_is_set_up_well_has_no_findings() {
    let world = World::new();
    let mac = world.builder("mac").start();
    for release in Release::ALL {
        for mode in [Mode::SingleUser, Mode::Daemon] {
            let is_daemon = mode == Mode::Daemon;
            let name = format!("{}-{is_daemon}", release.name());
            let client =
                plan(&world).named(&name).release(release).mode(mode).uses(&mac, "ssh-ng", 4).start();
            // The daemon's environment is taken from the daemon.
            let output = if is_daemon {
                check(&client, &["--strict"])
            } else {
                client.nix_offload(&["check", "--strict"])
            };
            assert_eq!((output.code(), output.stderr()), (0, ""), "{output}");
            assert!(output.stdout().ends_with("\n1 machine: no errors, no warnings\n"), "{output}");
            let version = client.run("nix --version");
            let reader = if is_daemon { "the daemon (process " } else { "this user" };
            let head = output.stdout().lines().next().unwrap();
            assert!(head.starts_with(&format!("{}, as {reader}", version.trim())), "{output}");
            let words =
                if release == Release::Bookworm { " show-config --json" } else { " config show --json" };
            assert!(head.contains(words), "{output}");
            for line in [
                &format!("  build-hook = {OURS}"),
                "  builders = @/etc/nix/machines",
                "  system = x86_64-linux",
            ] {
                assert!(output.stdout().lines().any(|found| found == line), "{line}: {output}");
            }
        }
    }
}

#[test]
fn a_line_for_the_hook_that_nix_ignores_is_told_with_its_place() {
    let world = World::new();
    for release in Release::ALL {
        for mode in [Mode::SingleUser, Mode::Daemon] {
            let is_daemon = mode == Mode::Daemon;
            let name = format!("{}-{is_daemon}", release.name());
            let client =
                plan(&world).named(&name).release(release).mode(mode).hook_only_in_nix_conf().start();
            let found = findings(&client, &[]);
            if release == Release::Trixie {
                let place =
                    format!("error {CONF} {} 1 nix (Nix) 2.26.", line_of(&client, CONF, "build-hook"));
                let cure = if is_daemon {
                    "nix-daemon.service.d/nix-offload.conf"
                } else {
                    "~/.config/nix/nix.conf"
                };
                assert_one(&found, &[&place, "ignores this line", cure]);
            } else {
                assert!(found.is_empty(), "{release:?}: {found:#?}");
            }
        }
    }
    // What it proposes without a daemon works.
    let client = plan(&world).release(Release::Trixie).hook_only_in_nix_conf().start();
    client.write("/root/.config/nix/nix.conf", &format!("build-hook = {OURS}\n"));
    assert_eq!(findings(&client, &[]), [""; 0]);
}

#[test]
fn hooks_that_are_not_ours_or_cannot_be_run() {
    let world = World::new();
    for release in [Release::Bookworm, Release::Sid] {
        let client = world.client().named(release.name()).release(release).hook(Hook::Stock).start();
        assert_one(&findings(&client, &[]), &["warning build-hook - - Nix uses a hook of its own", OURS]);
        let conf = client.read(CONF);
        client.write_mode("/opt/dead", "", 0o644);
        client.write_mode("/opt/other", "#!/bin/sh\n", 0o755);
        for (hook, severity, part) in [
            ("/opt/absent/nix-offload", "error", "is not there, so no build works"),
            ("/opt/dead", "error", "cannot be run, so no build works"),
            ("/opt/other", "warning", "and not nix-offload"),
        ] {
            client.write(CONF, &format!("{conf}build-hook = {hook}\n"));
            let place = format!("{severity} {CONF} {} 1 ", line_of(&client, CONF, "build-hook"));
            assert_one(&findings(&client, &[]), &[&place, hook, part]);
        }
        client.write(CONF, &format!("{conf}build-hook = {OURS} hook\n"));
        let found = findings(&client, &[]);
        if release == Release::Bookworm {
            assert_one(&found, &["error", "before Nix 2.17 all of the line is one path"]);
        } else {
            assert!(found.is_empty(), "{found:#?}");
        }
    }
}

#[test]
fn a_list_with_many_faults_is_told_all_of_them_in_order() {
    let world = World::new();
    let client = plan(&world).machines("ssh-ng://one x86_64-linux - 2").start();
    client.write("/etc/hosts", HOSTS);
    client.write_mode("/root/open", "-----BEGIN", 0o644);
    client.write_mode("/root/good", "-----BEGIN", 0o600);
    client.write_mode("/root/key.pub", "ssh-ed25519 A", 0o644);
    client.write_mode("/etc/more", "ssh-ng://two - /root/absent\n", 0o666);
    client.write(
        "/etc/list",
        "ssh-ng://one x86_64 /root/open 4\r\n\
         ssh-ng://two x86_64-linux /root/good 0 x\n\
         two - /root/key.pub ; @/etc/more\n\
         @/etc/nothing\n",
    );
    let expected = [
        ("warning /etc/list 1 14 'x86_64' is no system", "did you mean 'x86_64-linux'?"),
        ("error /etc/list 1 21 others can read the key file /root/open", "chmod 600 /root/open"),
        ("warning /etc/list 1 33 lines end in carriage returns", "sed -i"),
        ("error /etc/list 2 40 the speed factor", "left out"),
        ("warning /etc/list 3 7 this is the public half", "'/root/key'"),
        ("warning /etc/list 4 1 there is no file '/etc/nothing'", "correct the name"),
        ("warning /etc/more - - others can write it", "chmod go-w /etc/more"),
        ("error /etc/more 1 16 there is no key file /root/absent", "ssh-keygen"),
    ];
    let found = findings(&client, &["/etc/list"]);
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, (begin, part)) in found.iter().zip(expected) {
        assert!(found.starts_with(begin) && found.contains(part), "{begin:?} {part:?}: {found}");
    }
    // The same from a pipe, and as an option.
    let piped = client.run(&format!("{OURS} check --json - < /etc/list || true"));
    assert_eq!(
        piped.replace("(standard input)", "/etc/list"),
        check(&client, &["--json", "/etc/list"]).stdout()
    );
    let option = findings(&client, &["--builders", "@/etc/more; one x86-64-linux"]);
    assert_eq!(option.len(), 3, "{option:#?}");
    assert!(option[0].starts_with("warning --builders 1 17 'x86-64-linux'"), "{option:#?}");
    // For people: the same with the line and a caret, and the number of all.
    let text = check(&client, &["/etc/list"]);
    assert_eq!((text.code(), text.stderr()), (1, ""), "{text}");
    let lines = "warning: /etc/list:1:14: 'x86_64' is no system that Nix knows (column 2)\n  \
                 ssh-ng://one x86_64 /root/open 4\n               ^^^^^^\n  did you mean 'x86_64-linux'?\n\n";
    assert!(text.stdout().contains(lines), "{text}");
    assert!(text.stdout().ends_with("\n3 machines: 3 errors, 5 warnings\n"), "{text}");
    assert_eq!(found.iter().filter(|line| line.starts_with("error")).count(), 3);
    let absent = check(&client, &["/etc/absent"]);
    assert_eq!(absent.code(), 1, "{absent}");
    assert!(absent.stdout().starts_with("error: /etc/absent: it cannot be read: No such file"), "{absent}");
}

#[test]
fn warnings_count_only_when_that_is_asked_for() {
    let world = World::new();
    let client = plan(&world).machines("ssh-ng://one x86_64 - 2").start();
    client.write("/etc/hosts", HOSTS);
    for (args, code) in [
        (&[][..], 0),
        (&["--strict"], 1),
        (&["/etc/nix/machines"], 0),
        (&["--strict", "/etc/nix/machines"], 1),
    ] {
        let output = check(&client, args);
        assert_eq!(output.code(), code, "{args:?} {output}");
        assert!(output.stdout().ends_with("\n1 machine: no errors, 1 warning\n"), "{output}");
    }
    assert_eq!(check(&client, &["--frobnicate"]).code(), 2);
}

#[test]
fn machines_are_pointed_at_in_the_line_of_nix_conf() {
    let world = World::new();
    for release in Release::ALL {
        let client = plan(&world)
            .named(release.name())
            .release(release)
            .nix_conf("builders = one x86_64-linux ; two x86_64 - 2")
            .start();
        client.write("/etc/hosts", HOSTS);
        let place = format!("warning {CONF} {} 35 'x86_64'", line_of(&client, CONF, "builders"));
        assert_one(&lines(&told(&client.nix_offload(&["check", "--json"]))), &[&place]);
    }
}

#[test]
fn the_ssh_options_of_the_daemon_count() {
    let world = World::new();
    let with = |name: &str, options: &str| {
        let client = plan(&world)
            .named(name)
            .mode(Mode::Daemon)
            .daemon_env("NIX_SSHOPTS", options)
            .machines("ssh-ng://inside x86_64-linux - 2")
            .start();
        client.write("/etc/hosts", HOSTS);
        client.write("/etc/nsswitch.conf", NO_DNS);
        client.write("/etc/inside", "Host inside\n HostName one\n");
        // Who calls has others.
        let output = client.command(OURS).args(["check", "--json"]).env("NIX_SSHOPTS", "-F none").run();
        lines(&told(&output))
    };
    assert_eq!(with("well", "-F /etc/inside"), [""; 0]);
    assert_one(
        &with("open", "-F '/etc/inside"),
        &["error ", "NIX_SSHOPTS cannot be split", "close the quote"],
    );
}

#[test]
fn hosts_that_nobody_knows_or_that_are_this_machine() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world)
        .knows(&mac)
        .ssh_config(
            "Host alias\n HostName two\nHost back\n HostName 127.0.0.1\nHost *.inner\n ProxyJump two\n\
             Host tunnel\n HostName 127.0.0.1\n Port 2022\nHost wrong\n HostName no-such-host",
        )
        .start();
    client.write("/etc/hosts", &format!("{HOSTS}127.0.0.2 me-too\n"));
    // Nobody else is to be asked for names.
    client.write("/etc/nsswitch.conf", NO_DNS);
    let list = |text: &str| {
        client.write("/etc/list", text);
        findings(&client, &["/etc/list"])
    };
    assert_eq!(
        list("mac\nme@alias\na.inner\ntunnel\n198.51.100.7\none:2022\nme-too:2022\n[2001:db8::1]:22\n"),
        [""; 0]
    );
    assert_one(
        &list("one\nno-such-host\n"),
        &["warning /etc/list 2 1 nobody knows the host 'no-such-host'", "ssh_config"],
    );
    assert_one(&list("wrong\n"), &["warning /etc/list 1 1 nobody knows the host 'wrong'"]);
    for host in [
        "client",
        "CLIENT",
        "127.0.0.1",
        "[::1]",
        "me-too",
        "back",
        "me@back",
        "root@localhost",
        "ssh-ng://localhost:22",
    ] {
        assert_one(&list(&format!("{host}\n")), &["is this very machine", "max-jobs"]);
    }
    assert_eq!(list("ssh-ng://back?remote-store=/srv/x\n"), [""; 0]);
    // An address of a network card.
    let card = client.run("ip -4 -o addr show scope global | sed -n '1s/.* inet \\([0-9.]*\\).*/\\1/p'");
    if !card.trim().is_empty() {
        assert_one(&list(&card), &[card.trim(), "is this very machine"]);
    }
    // No name server runs here.
    client.write("/etc/nsswitch.conf", "passwd: files\nhosts: files dns\n");
    let found = list(&(0..8).map(|n| format!("absent{n}.example\n")).collect::<String>());
    assert_one(&found, &["warning - - - the name service had no answer", "absent4.example and 3 more"]);
    client.write("/etc/nsswitch.conf", NO_DNS);
    // With a condition that ssh alone can judge.
    let config = client.read("/root/.ssh/config");
    client.write("/root/.ssh/config", &format!("Match host dream\n HostName one\n{config}"));
    assert_one(&list("dream\nno-such-host\n"), &["warning /etc/list 2 1"]);
    client.write("/root/.ssh/config", "Match host slow exec \"sleep 600\"\n User me\n");
    client.write("/etc/list", "slow\none\n");
    let output = check(&client, &["/etc/list"]);
    assert_eq!(output.stdout(), "2 machines: no errors, no warnings\n", "{output}");
    output.assert_stderr_has(
        "note: 'ssh -G' did not say within 2 seconds where it finds slow; that is not checked",
    );
    assert_eq!(client.pids_matching("sleep 600"), [0; 0]);
    client.write("/root/.ssh/config", "Frobnicate yes\n");
    assert_one(
        &list("one\n"),
        &["error - - - 'ssh -G ", "Bad configuration option: frobnicate", "ssh complains"],
    );
}

#[test]
fn keys_are_judged_as_the_user_sees_them_who_runs_builds() {
    let world = World::new();
    let client = plan(&world).start();
    client.write("/etc/hosts", HOSTS);
    client.write_mode("/home/user/of-root", "-----BEGIN", 0o600);
    client.write_mode("/home/user/good", "-----BEGIN", 0o600);
    client.give_to_user("/home/user/good");
    client.write("/etc/list", "one - ~/good\ntwo - /home/user/of-root\nssh-ng://two?ssh-key=/root/key\n");
    let output = client.command(OURS).args(["check", "--json", "/etc/list"]).as_user().run();
    let found = lines(&told(&output));
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(
        found[0].starts_with("error /etc/list 2 7 user cannot read the key file /home/user/of-root"),
        "{found:#?}"
    );
    assert!(
        found[1].starts_with("error /etc/list 3 14 user cannot see the key file /root/key"),
        "{found:#?}"
    );
    let root = findings(&client, &["/etc/list"]);
    assert_eq!(root.len(), 2, "{root:#?}");
    assert!(
        root[0].contains("no key file /root/good") && root[1].contains("no key file /root/key"),
        "{root:#?}"
    );
}

#[test]
fn a_thousand_machines_are_checked_at_once() {
    let world = World::new();
    let client = plan(&world).start();
    let names = |format: &dyn Fn(u32) -> String| (0..1000).map(format).collect::<String>();
    client.write("/etc/hosts", &names(&|n| format!("10.7.{}.{} m{n}\n", n / 250, n % 250 + 1)));
    client.write("/etc/nsswitch.conf", NO_DNS);
    client.write("/etc/known", &names(&|n| format!("ssh-ng://m{n} x86_64-linux - 4 1 kvm\n")));
    client
        .write("/etc/unknown", &names(&|n| format!("ssh-ng://unknown{n} x86_64 /root/absent{n} 4 1 kmv\n")));
    let known = check(&client, &["/etc/known"]);
    assert!(known.stdout().ends_with("1000 machines: no errors, no warnings\n"), "{}", known.stdout().len());
    let unknown = check(&client, &["/etc/unknown"]);
    let end = "1000 machines: 1000 errors, 2000 warnings\n";
    assert!(unknown.stdout().ends_with(end), "{}", unknown.stdout().lines().next_back().unwrap());
    // On a machine that is busy with other tests; else a tenth of it.
    for output in [known, unknown] {
        assert!(output.took() < Duration::from_secs(4), "{:?}", output.took());
    }
}

#[test]
fn what_a_daemon_does_not_take_from_a_user() {
    let world = World::new();
    for release in Release::ALL {
        let start = |name: &str, trusted: &str| {
            let client = plan(&world)
                .named(&format!("{name}-{}", release.name()))
                .release(release)
                .mode(Mode::Daemon)
                .machines("ssh-ng://one x86_64-linux /root/key\n@/root/list")
                .nix_conf(&format!("trusted-users = root {trusted}"))
                .start();
            client.write("/etc/hosts", HOSTS);
            let text = "max-jobs = 2\nbuilders = ssh-ng://two x86_64-linux\n";
            client.write("/home/user/.config/nix/nix.conf", text);
            client
        };
        let as_user = |client: &Client| client.command(OURS).args(["check", "--json"]).as_user().run();
        let output = as_user(&start("eve", "nobody"));
        let place =
            "warning /home/user/.config/nix/nix.conf 2 1 the daemon does not take 'builders' from user";
        assert_one(&lines(&told(&output)), &[place, "'trusted-users'"]);
        // What only root can see is no fault.
        let report: Value = serde_json::from_str(output.stdout()).unwrap();
        let notes = report["notes"].to_string();
        assert!(notes.contains("run this as root") && notes.contains("/root/key, /root/list"), "{output}");
        assert_eq!(release == Release::Trixie, notes.contains("'build-hook'"), "{output}");
        assert_eq!(lines(&told(&as_user(&start("user", "user")))), [""; 0]);
        assert_eq!(lines(&told(&as_user(&start("group", "@user")))), [""; 0]);
    }
}

#[test]
fn a_daemon_that_has_not_read_what_is_written_now() {
    let world = World::new();
    let client = plan(&world).mode(Mode::Daemon).nix_conf("!include more.conf").start();
    client.write("/etc/nix/more.conf", "cores = 1\n");
    client.run("touch -d '-1 hour' /etc/nix/more.conf");
    assert_eq!(findings(&client, &[]), [""; 0]);
    client.run("touch -d '+1 hour' /etc/nix/more.conf");
    let found = findings(&client, &[]);
    assert_one(
        &found,
        &["warning /etc/nix/more.conf - - it was written after the daemon (process ", "restart"],
    );
    // Machines are read for each build.
    client.run("touch -d '-1 hour' /etc/nix/more.conf; touch -d '+1 hour' /etc/nix/machines");
    assert_eq!(findings(&client, &[]), [""; 0]);
}

#[test]
fn a_daemon_is_told_from_its_children() {
    let world = World::new();
    let client = plan(&world).mode(Mode::Daemon).start();
    let daemon = client.pids_matching("nix-daemon");
    let _held = UnixStream::connect(client.path("/nix/var/nix/daemon-socket/socket")).unwrap();
    wait_until("the daemon has a child for the connection", SOON, || {
        client.pids_matching("nix-daemon").len() > daemon.len()
    });
    let report: Value = serde_json::from_str(check(&client, &["--json"]).stdout()).unwrap();
    let oldest = daemon.iter().min().unwrap();
    assert_eq!(report["nix"]["reader"], format!("the daemon (process {oldest})"));
}

#[test]
fn settings_that_keep_builds_at_home_or_send_them_nowhere() {
    let world = World::new();
    let client = plan(&world).machines("one x86_64-linux").start();
    client.write("/etc/hosts", HOSTS);
    let conf = client.read(CONF);
    let with = |line: &str| {
        client.write(CONF, &format!("{conf}{line}\n"));
        findings(&client, &[])
    };
    assert_one(&with("builders ="), &["warning /etc/nix/nix.conf", "the 1 machine of /etc/nix/machines"]);
    assert_one(&with("store = ssh-ng://one"), &["warning /etc/nix/nix.conf", "the store is 'ssh-ng://one'"]);
    assert_one(&with("extra-platforms = arm64-linux"), &["did you mean 'aarch64-linux'?"]);
    assert_one(&with("system-features = kvm bigparallel"), &["did you mean 'big-parallel'?"]);
    let both = with("builders = @/etc/nothing\nmax-jobs = 0");
    assert_eq!(both.len(), 2, "{both:#?}");
    assert!(both[0].contains("/etc/nothing") && both[1].contains("nothing can be built"), "{both:#?}");
    client.write(CONF, &conf);
    let remote = |store: &str| {
        let output = client.command(OURS).args(["check", "--json"]).env("NIX_REMOTE", store).run();
        lines(&told(&output))
    };
    assert_one(&remote("ssh-ng://one"), &["warning NIX_REMOTE - - the store is 'ssh-ng://one'"]);
    assert_one(&remote("daemon"), &["warning NIX_REMOTE", "no daemon of Nix runs here"]);
    client.run(&format!("chmod 666 {CONF}"));
    assert_one(&findings(&client, &[]), &["warning /etc/nix/nix.conf - - others can write it"]);
}

#[test]
fn a_nix_that_fails_or_never_answers_is_named_and_the_rest_is_checked() {
    let world = World::new();
    let client = plan(&world).machines("one x86_64 - 2").start();
    client.write("/etc/hosts", HOSTS);
    let conf = client.read(CONF);
    client.write(CONF, &format!("{conf}nonsense\n"));
    let found = findings(&client, &[]);
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].starts_with("error - - - '/usr/bin/nix "), "{found:#?}");
    assert!(found[0].contains("ended with exit status: 1") && found[0].contains("nonsense"), "{found:#?}");
    assert!(found[1].starts_with("warning /etc/nix/machines 1 5 'x86_64'"), "{found:#?}");
    client.write(CONF, &conf);
    client.write_mode("/opt/slow/nix", "#!/bin/sh\nsleep 600\n", 0o755);
    let path = "/opt/slow:/usr/bin:/bin";
    let output = client.command(OURS).args(["check", "--json"]).env("PATH", path).run();
    assert!(output.took() < Duration::from_secs(30), "{output}");
    let found = lines(&told(&output));
    assert!(found[0].contains("'/opt/slow/nix --version' did not end within 10 seconds"), "{found:#?}");
    assert_eq!(client.pids_matching("sleep 600"), [0; 0]);
    let output = client.command(OURS).args(["check", "--json"]).env("PATH", "/nowhere").run();
    assert!(lines(&told(&output))[0].contains("there is no program 'nix'"), "{output}");
}

#[test]
fn mistakes_in_the_settings_of_our_own() {
    let world = World::new();
    for mode in [Mode::SingleUser, Mode::Daemon] {
        let client = plan(&world).named(&format!("{}", mode == Mode::Daemon)).mode(mode).start();
        client.write("/etc/nix/offload.toml", "[ssh]\nidle = 5\n\n[[host]]\nname = 'a'\nwkae = 'x'\n");
        let found = findings(&client, &[]);
        assert_one(&found, &["error /etc/nix/offload.toml 6 1 unknown field `wkae`", "did you mean `wake`?"]);
        client.run("chmod 666 /etc/nix/offload.toml");
        assert_one(
            &findings(&client, &[]),
            &["error - - - /etc/nix/offload.toml", "mode 0666", "chmod go-w"],
        );
    }
}
