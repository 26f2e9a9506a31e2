//! `ping-store`: tells beforehand whether builds will go to a machine, or the culprit and the cure.

use std::{net::TcpListener, time::Duration};

use harness::{Client, ClientPlan, Hook, Output, Release, World};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

fn ping(client: &Client, args: &[&str]) -> Output {
    let output = client.nix_offload(&[&["ping-store"], args].concat());
    assert!(output.took() < LIMIT, "{output}");
    output
}

/// The values of the report's lines of that name.
fn values<'a>(output: &'a Output, name: &str) -> Vec<&'a str> {
    let prefix = format!("{name}: ");
    output.stdout().lines().filter_map(|line| line.strip_prefix(&prefix)).collect()
}

/// A machine answers, and all that is to be known of it is told.
#[track_caller]
fn assert_answers(output: &Output, url: &str) {
    assert_eq!((output.code(), output.stderr()), (0, ""), "{output}");
    assert_eq!(values(output, "Store URL"), [url], "{output}");
    assert!(values(output, "Version")[0].starts_with("2."), "{output}");
    // Only since Nix 2.15 a daemon says whether it trusts us; others are asked.
    assert_eq!(values(output, "Trusted"), ["1"], "{output}");
    assert_eq!(values(output, "Way"), ["daemon socket"], "{output}");
    let ms = values(output, "Round trip")[0].strip_suffix(" ms").unwrap().parse::<f64>().unwrap();
    assert!(ms > 0.0 && ms < 5000.0, "{output}");
    assert_eq!(values(output, "Error"), [""; 0], "{output}");
}

/// A machine does not answer; cause and cure are told, each in its line.
#[track_caller]
fn assert_culprit(output: &Output, url: &str, cause: &str, cure: &str) {
    assert!(output.code() != 0 && output.code() != 2, "{output}");
    assert_eq!(output.stderr(), "", "{output}");
    assert_eq!(values(output, "Store URL"), [url], "{output}");
    let has = |name: &str, text: &str| {
        let found = values(output, name);
        found.len() == 1 && found[0].to_lowercase().contains(&text.to_lowercase())
    };
    assert!(has("Error", cause), "the error lacks {cause:?}: {output}");
    assert!(has("Hint", cure), "the hint lacks {cure:?}: {output}");
    assert_eq!(values(output, "Version"), [""; 0], "{output}");
}

#[test]
fn a_machine_answers_by_either_protocol_and_with_a_key() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).knows(&mac).start();
    client.run("mv /root/.ssh/id_ed25519 /root/builder-key");
    for url in ["ssh-ng://mac?ssh-key=/root/builder-key", "ssh://mac?ssh-key=/root/builder-key"] {
        assert_answers(&ping(&client, &["--store", url]), url);
    }
    // The name alone means ssh, as in Nix; without the key nobody is let in.
    let output = ping(&client, &["--store", "mac"]);
    assert_culprit(&output, "ssh://mac", "permission denied", "authorized_keys");
}

#[test]
fn every_release_answers() {
    let world = World::new();
    let builders = Release::ALL.map(|release| world.builder(release.name()).release(release).start());
    let client = builders.iter().fold(plan(&world), |plan, builder| plan.knows(builder)).start();
    for builder in &builders {
        let url = format!("ssh-ng://{}", builder.alias());
        let output = ping(&client, &["--store", &url]);
        assert_answers(&output, &url);
        let version = builder.run("nix --version");
        assert_eq!(values(&output, "Version"), [version.trim().rsplit(' ').next().unwrap()], "{output}");
    }
}

#[test]
fn every_configured_machine_is_asked_when_none_is_named() {
    let world = World::new();
    let (left, right) = (world.builder("left").start(), world.builder("right").start());
    let client = plan(&world).uses(&left, "ssh-ng", 1).uses(&right, "ssh", 1).start();
    let both = |output: &Output, urls: &[&str]| {
        assert_eq!((output.code(), output.stderr()), (0, ""), "{output}");
        assert_eq!(values(output, "Store URL"), urls, "{output}");
    };
    both(&ping(&client, &[]), &["ssh-ng://left", "ssh://right"]);
    client.write("/etc/nix/others", "ssh-ng://right\n");
    both(&ping(&client, &["--builders", "@/etc/nix/others; ssh://left"]), &["ssh-ng://right", "ssh://left"]);
    both(
        &ping(&client, &["--store", "ssh-ng://right", "--store", "left"]),
        &["ssh-ng://right", "ssh://left"],
    );
    let configured = plan(&world)
        .named("configured")
        .knows(&right)
        .nix_conf("builders = ssh-ng://right x86_64-linux")
        .machines("ssh-ng://unused")
        .start();
    both(&ping(&configured, &[]), &["ssh-ng://right"]);
}

#[test]
fn the_configuration_is_that_of_the_daemons_hook() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world)
        .mode(harness::Mode::Daemon)
        .knows(&mac)
        .machines("ssh-ng://inside x86_64-linux - 2")
        .daemon_env("NIX_SSHOPTS", "-F /etc/inside")
        .start();
    client.run("sed 's/^Host mac/Host inside/' /root/.ssh/config > /etc/inside");
    // As under a sudo that knows no Nix.
    client.run("mkdir /opt/few && ln -s $(command -v ssh) /opt/few/");
    let ping = |args: &[&str]| {
        let ping = client.command(harness::OURS).arg("ping-store").args(args);
        ping.env("PATH", "/opt/few").run()
    };
    assert_answers(&ping(&[]), "ssh-ng://inside");
    assert_answers(&ping(&["--builders", "ssh-ng://inside"]), "ssh-ng://inside");
    assert_answers(&ping(&["--store", "ssh-ng://inside"]), "ssh-ng://inside");
    client.run("echo 'cores = many' >> /etc/nix/nix.conf");
    for args in [&[][..], &["--builders", "ssh-ng://inside"]] {
        let output = ping(args);
        assert_eq!((output.code(), output.stdout()), (78, ""), "{output}");
        output.assert_stderr_has("'cores'").assert_stderr_has("hint: correct what Nix complains of");
    }
    assert_answers(&ping(&["--store", "ssh-ng://inside"]), "ssh-ng://inside");
}

#[test]
fn a_list_with_a_comment_that_is_no_utf_8_works() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).knows(&mac).start();
    client.run(r"printf '# B\374ro\nssh-ng://mac\n' > /etc/nix/latin");
    assert_answers(&ping(&client, &["--builders", "@/etc/nix/latin"]), "ssh-ng://mac");
}

#[test]
fn without_machines_it_says_what_to_do() {
    let world = World::new();
    let client = plan(&world).nix_conf("builders = @/etc/nix/absent").start();
    let output = ping(&client, &[]);
    assert_eq!((output.code(), output.stdout()), (78, ""), "{output}");
    output.assert_stderr_has("no machines are configured (/etc/nix/absent does not exist)");
    output.assert_stderr_has("hint: name a store with --store");
}

#[test]
fn a_dead_machine_among_others_is_told_and_changes_the_exit_status_only() {
    let world = World::new();
    let mut machines = ["one", "dead", "two"].map(|name| world.builder(name).start());
    let client = machines.iter().fold(plan(&world), |plan, builder| plan.uses(builder, "ssh-ng", 1)).start();
    machines[1].stop();
    let text = ping(&client, &[]);
    assert_eq!((text.code(), text.stderr()), (69, ""), "{text}");
    assert_eq!(values(&text, "Store URL"), ["ssh-ng://one", "ssh-ng://dead", "ssh-ng://two"], "{text}");
    assert_eq!(values(&text, "Trusted"), ["1", "1"], "{text}");
    assert_eq!(values(&text, "Error").len(), 1, "{text}");

    let json = ping(&client, &["--json"]);
    assert_eq!((json.code(), json.stderr()), (69, ""), "{json}");
    let list: Vec<Value> = serde_json::from_str(json.stdout()).unwrap();
    let urls: Vec<&Value> = list.iter().map(|entry| &entry["url"]).collect();
    assert_eq!(urls, ["ssh-ng://one", "ssh-ng://dead", "ssh-ng://two"]);
    for alive in [&list[0], &list[2]] {
        assert!(alive["version"].as_str().unwrap().starts_with("2."), "{json}");
        assert_eq!(
            (&alive["trusted"], &alive["way"]),
            (&Value::Bool(true), &"daemon socket".into()),
            "{json}"
        );
        assert_eq!((&alive["detour"], &alive["error"]), (&Value::Null, &Value::Null), "{json}");
        assert!(alive["connectMs"].is_number() && alive["roundTripMs"].is_number(), "{json}");
    }
    assert!(list[1]["error"].as_str().unwrap().contains("refused"), "{json}");
    assert!(list[1]["hint"].as_str().unwrap().contains("sshd"), "{json}");
    assert_eq!(list[1]["version"], Value::Null, "{json}");
}

#[test]
fn a_machine_that_is_off() {
    let world = World::new();
    let mut mac = world.builder("mac").start();
    let client = plan(&world).knows(&mac).start();
    mac.stop();
    let output = ping(&client, &["--store", "ssh-ng://mac"]);
    assert_culprit(
        &output,
        "ssh-ng://mac",
        "cannot connect to mac: connection refused",
        "check that sshd runs on mac",
    );
    assert_eq!(output.code(), 69, "{output}");
    let hint = values(&output, "Hint")[0];
    assert!(hint.contains(&mac.port().to_string()), "the port of ssh_config is not in the hint: {output}");
}

#[test]
fn a_machine_that_does_not_answer() {
    const TAKEN: &str = "cannot connect to hole: it took the connection, but no login was complete";
    let world = World::new();
    // The kernel takes connections in; nobody ever says a word.
    let hole = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = hole.local_addr().unwrap().port();
    let client = plan(&world).ssh_config(&format!("Host hole\n HostName 127.0.0.1\n Port {port}\n")).start();
    let output = ping(&client, &["--store", "ssh-ng://hole", "--timeout", "2"]);
    assert_culprit(&output, "ssh-ng://hole", TAKEN, "whether sshd is well");
    assert!(output.took() < Duration::from_secs(5), "{output}");
    let default = ping(&client, &["--store", "ssh-ng://hole"]);
    assert_culprit(&default, "ssh-ng://hole", TAKEN, "whether sshd is well");
}

#[test]
fn a_wrong_key() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).knows(&mac).key(&world.stray_key()).start();
    let output = ping(&client, &["--store", "ssh-ng://mac"]);
    assert_culprit(
        &output,
        "ssh-ng://mac",
        "cannot connect to mac: permission denied (publickey",
        "authorized_keys",
    );
    assert_eq!(output.code(), 77, "{output}");
}

#[test]
fn a_key_with_a_passphrase() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).knows(&mac).start();
    client.run(
        "mv /root/.ssh/id_ed25519 /root/locked; ssh-keygen -q -p -f /root/locked -P '' -N 'open sesame'",
    );
    let url = "ssh-ng://mac?ssh-key=/root/locked";
    let output = ping(&client, &["--store", url]);
    assert_culprit(&output, url, "permission denied", "the key /root/locked has a passphrase");
    assert!(
        values(&output, "Hint")[0].contains("`ssh -o BatchMode=yes -i /root/locked mac true`"),
        "{output}"
    );
    client.run("mv /root/locked /root/.ssh/id_ed25519");
    let usual = ping(&client, &["--store", "ssh-ng://mac"]);
    assert_culprit(
        &usual,
        "ssh-ng://mac",
        "permission denied",
        "the key /root/.ssh/id_ed25519 has a passphrase",
    );
    client.run("ssh-keygen -q -p -f /root/.ssh/id_ed25519 -P 'open sesame' -N ''");
    assert_answers(&ping(&client, &["--store", "ssh-ng://mac"]), "ssh-ng://mac");
}

#[test]
fn a_key_file_that_is_not_there_or_open_to_others() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).knows(&mac).start();
    client.run("mv /root/.ssh/id_ed25519 /root/open-key; chmod 644 /root/open-key");
    for (key, cause, cure) in
        [("/root/absent", "/root/absent", "/root/absent"), ("/root/open-key", "others can read", "chmod 600")]
    {
        let url = format!("ssh-ng://mac?ssh-key={key}");
        let output = ping(&client, &["--store", &url]);
        assert_culprit(&output, &url, cause, cure);
    }
}

#[test]
fn an_unknown_host_key() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).knows_without_host_key(&mac).start();
    let output = ping(&client, &["--store", "ssh-ng://mac"]);
    assert_culprit(&output, "ssh-ng://mac", "the host's key is not known", "known_hosts");
}

#[test]
fn a_changed_host_key() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let other = world.builder("other").start();
    let client = plan(&world).knows_with_host_key(&mac, other.host_public_key()).start();
    let output = ping(&client, &["--store", "ssh-ng://mac"]);
    assert_culprit(
        &output,
        "ssh-ng://mac",
        "the host's key has changed since /root/.ssh/known_hosts:1",
        "ssh-keygen",
    );
    // The cure cures: what it says removes the old key, whatever name ssh_config gives the host.
    let hint = values(&output, "Hint")[0];
    let command = hint.split('`').find(|part| part.starts_with("ssh-keygen")).unwrap();
    client.run(command);
    assert_eq!(client.read("/root/.ssh/known_hosts"), "", "{output}");
    let output = ping(&client, &["--store", "ssh-ng://mac"]);
    assert_culprit(&output, "ssh-ng://mac", "the host's key is not known", "known_hosts");
}

#[test]
fn a_pinned_host_key_is_the_only_one_that_counts() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let other = world.builder("other").start();
    // In known_hosts the key would be unknown.
    let client = plan(&world).knows_without_host_key(&mac).start();
    let pinned = |key: &str| {
        let key = client.run(&format!("printf '%s' '{key}' | base64 -w0"));
        ping(&client, &["--builders", &format!("ssh-ng://mac x86_64-linux - 1 1 - - {key}")])
    };
    assert_answers(&pinned(mac.host_public_key()), "ssh-ng://mac");
    let wrong = pinned(other.host_public_key());
    assert_culprit(
        &wrong,
        "ssh-ng://mac",
        "not the one that is pinned",
        "compare the pinned public host key",
    );
}

#[test]
fn a_machine_without_nix() {
    let world = World::new();
    let mac = world.builder("mac").without_nix().start();
    let client = plan(&world).knows(&mac).start();
    for (url, cure) in [
        ("ssh-ng://mac", "append ?remote-program=/path/to/nix-daemon to"),
        ("ssh://mac", "append ?remote-program=/path/to/nix-store to"),
    ] {
        let output = ping(&client, &["--store", url]);
        assert_culprit(&output, url, "nix-daemon: not found", "install Nix there");
        assert!(values(&output, "Hint")[0].contains(cure), "{output}");
    }
}

#[test]
fn a_remote_program_that_is_not_there() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).knows(&mac).start();
    for (scheme, program) in [("ssh-ng", "nix-daemon"), ("ssh", "nix-store")] {
        let url = format!("{scheme}://root@mac?remote-program=/opt/nix/bin/{program}");
        let output = ping(&client, &["--store", &url]);
        let cause = format!("there is no /opt/nix/bin/{program} on mac");
        assert_culprit(&output, &url, &cause, "correct remote-program in the machine's URI");
        assert!(!values(&output, "Hint")[0].contains("/path/to"), "{output}");
    }
}

#[test]
fn a_remote_program_that_speaks_another_protocol() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).knows(&mac).start();
    let path = mac.run("command -v nix-daemon");
    let url = format!("ssh://mac?remote-program={}", path.trim());
    assert_culprit(&ping(&client, &["--store", &url]), &url, "--serve", "is its nix-store");
}

#[test]
fn a_wrong_user_name() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).knows(&mac).start();
    let output = ping(&client, &["--store", "ssh-ng://nobody-there@mac"]);
    assert_culprit(&output, "ssh-ng://nobody-there@mac", "permission denied", "authorized_keys");
    assert!(values(&output, "Error")[0].contains("nobody-there"), "{output}");
}

#[test]
fn a_host_name_that_does_not_exist() {
    let world = World::new();
    let client = plan(&world).start();
    let url = "ssh-ng://no-such-host.invalid";
    let output = ping(&client, &["--store", url]);
    assert_culprit(
        &output,
        url,
        "the host name cannot be resolved",
        "check the spelling of no-such-host.invalid",
    );
}

#[test]
fn a_path_that_was_meant_as_a_machine() {
    let world = World::new();
    let client = plan(&world).start();
    let output = ping(&client, &["--store", "ssh-ng//big"]);
    assert_eq!(values(&output, "Hint").len(), 1, "{output}");
    assert!(values(&output, "Hint")[0].starts_with("this is a relative path"), "{output}");
    assert!(values(&output, "Hint")[0].ends_with("did you mean 'ssh-ng://big'?"), "{output}");
    let output = ping(&client, &["--store", "ssh:/big"]);
    assert_culprit(&output, "ssh:/big", "not reached over SSH", "did you mean 'ssh://big'?");
    let told: Value =
        serde_json::from_str(ping(&client, &["--json", "--store", "ssh-ng//big"]).stdout()).unwrap();
    assert!(told[0]["hint"].as_str().unwrap().contains("ssh-ng://big"), "{told}");
}

#[test]
fn a_uri_that_is_none() {
    let world = World::new();
    let client = plan(&world).start();
    for (url, word) in [
        ("ssh-ng://", "host"),
        ("ssh-ng://mac:port", "port"),
        ("ssh-ng://-oProxyCommand=x", "-oProxyCommand"),
    ] {
        let output = ping(&client, &["--store", url]);
        assert!([2, 78].contains(&output.code()), "{output}");
        let said = format!("{}{}", output.stdout(), output.stderr());
        assert!(said.contains(word), "{word:?} is missing: {output}");
        assert!(said.to_lowercase().contains("hint: "), "{output}");
    }
    let other = ping(&client, &["--store", "https://cache.nixos.org"]);
    assert_culprit(&other, "https://cache.nixos.org", "not reached over SSH", "ssh-ng://");
}

#[test]
fn a_bad_line_is_pointed_at_and_the_others_are_asked() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).machines("ssh-ng://bad x86_64-linux - 1 fast").start();
    let output = ping(&client, &[]);
    assert_eq!(output.code(), 78, "{output}");
    assert_eq!(values(&output, "Store URL"), ["ssh-ng://mac"], "{output}");
    assert_eq!(values(&output, "Trusted"), ["1"], "{output}");
    output.assert_stderr_has("error: /etc/nix/machines:3:31: ").assert_stderr_has("^^^^\n");
}

#[test]
fn an_account_without_rights_is_told_of() {
    let world = World::new();
    for release in Release::ALL {
        let name = release.name();
        let mac = world.builder(name).release(release).as_user().start();
        let client = plan(&world).named(&format!("client-{name}")).knows(&mac).start();
        let output = ping(&client, &["--store", &format!("ssh-ng://{name}")]);
        assert_eq!((output.code(), output.stderr()), (0, ""), "{output}");
        assert_eq!(values(&output, "Trusted"), ["0"], "{output}");
        for words in [
            &format!("does not trust 'user@{name}'"),
            "builds work but are slower",
            "add 'user' to trusted-users",
        ] {
            assert!(values(&output, "Hint")[0].contains(words), "{words}: {output}");
        }
        let json = ping(&client, &["--json", "--store", &format!("ssh-ng://{name}")]);
        let list: Vec<Value> = serde_json::from_str(json.stdout()).unwrap();
        assert_eq!(list[0]["trusted"], Value::Bool(false), "{json}");
        assert_eq!(list[0]["account"], format!("user@{name}"), "{json}");
    }
}

#[test]
fn a_detour_is_told_with_its_reason() {
    let world = World::new();
    let closed = world.builder("closed").refusing_forwarding().start();
    let idle = world.builder("idle").without_daemon().start();
    let client = plan(&world).knows(&closed).knows(&idle).start();
    for name in ["closed", "idle"] {
        // The second time it is known already.
        for _ in 0..2 {
            let output = ping(&client, &["--store", &format!("ssh-ng://{name}")]);
            assert_eq!((output.code(), output.stderr()), (0, ""), "{output}");
            assert_eq!(values(&output, "Way"), ["nix-daemon --stdio"], "{output}");
            assert!(
                values(&output, "Detour")[0].contains("the daemon's socket is not open to us: "),
                "{output}"
            );
        }
    }
}

#[test]
fn a_user_is_told_whose_connections_count() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).mode(harness::Mode::Daemon).knows(&mac).start();
    let output =
        client.command(harness::OURS).args(["ping-store", "--store", "ssh-ng://mac"]).as_user().run();
    assert_eq!(output.code(), 0, "{output}");
    assert_eq!(values(&output, "Trusted"), ["1"], "{output}");
    output.assert_stderr_has("note: ").assert_stderr_has("connect as root");
}
