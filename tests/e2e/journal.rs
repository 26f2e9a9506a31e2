//! What `journalctl -t nix-offload` has to say.

use harness::{Client, ClientPlan, Hook, World, drv, event};
use serde_json::Value;

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

/// The entries about that.
fn said<'a>(entries: &'a [Value], what: &str) -> Vec<&'a Value> {
    entries.iter().filter(|entry| event(entry) == what).collect()
}

/// What `journalctl` shows without `-o`: each entry is one line, and one begins and ends so.
fn assert_shown(entries: &[Value], begin: &str, end: &str) {
    let lines: Vec<&str> = entries.iter().map(|entry| entry["MESSAGE"].as_str().unwrap()).collect();
    assert!(lines.iter().all(|line| !line.contains('\n')), "{lines:#?}");
    let found = lines.iter().any(|line| line.starts_with(begin) && line.ends_with(end));
    assert!(found, "no line from {begin:?} to {end:?}: {lines:#?}");
}

fn number(entry: &Value, field: &str) -> f64 {
    entry[field]
        .as_str()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| panic!("no {field} in {entry}"))
}

fn journal(client: &Client) -> Vec<Value> {
    client.journal("-t nix-offload")
}

#[test]
fn a_build_is_told_with_its_fields() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).journald().uses(&mac, "ssh-ng", 1).start();
    let drv = drv::expression(r#"d "a" "cat ${builtins.toFile "source" "text"} > $out" { }"#);
    client.nix_build(&drv, &["-j0"]).assert_success();
    let entries = journal(&client);
    for message in ["chosen", "connected by ssh", "built"] {
        let found = said(&entries, message);
        assert_eq!(found.len(), 1, "{message}: {entries:?}");
        assert_eq!(found[0]["BUILDER"], "ssh-ng://mac", "{message}");
        assert_eq!(found[0]["SYSLOG_IDENTIFIER"], "nix-offload", "{message}");
        if message != "connected by ssh" {
            assert!(found[0]["DERIVATION"].as_str().unwrap().ends_with("-a.drv"), "{message}");
        }
    }
    let built = said(&entries, "built")[0];
    for field in ["DURATION_MS", "INPUTS_MS", "BUILD_MS", "OUTPUTS_MS", "SENT_BYTES", "FETCHED_BYTES"] {
        assert!(number(built, field) > 0.0, "{field}: {built}");
    }
    assert_eq!((number(built, "SENT_PATHS"), number(built, "FETCHED_PATHS")), (1.0, 1.0));
    assert!(number(said(&entries, "connected by ssh")[0], "DURATION_MS") > 0.0);
    assert_shown(&entries, "'a': to be built on ssh-ng://mac: ", "least loaded for its speed");
    assert_shown(&entries, "SSH master to mac started in ", " s");
    assert_shown(&entries, "connected to ssh-ng://mac by ssh in ", " s");
    assert_shown(&entries, "built 'a' on ssh-ng://mac in ", " s");
}

#[test]
fn refusals_and_failures_are_told_with_their_reasons() {
    let world = World::new();
    let mut off = world.builder("off").start();
    let mac = world.builder("mac").start();
    let client = plan(&world).journald().uses(&off, "ssh-ng", 1).uses(&mac, "ssh-ng", 1).start();
    off.stop();
    client.nix_build(&drv::failing("bad", "it went wrong", 3), &["-j0"]).assert_failure();
    let needs = drv::expression(r#"d "needs" "echo x > $out" { requiredSystemFeatures = [ "no-such" ]; }"#);
    client.nix_build(&needs, &["-j0"]).assert_failure();
    let entries = journal(&client);
    let reason = |message: &str, builder: &str, word: &str| {
        let found = said(&entries, message).into_iter().any(|entry| {
            let reason = entry["REASON"].as_str().unwrap_or_default();
            reason.contains(word) && (builder.is_empty() || entry["BUILDER"] == builder)
        });
        assert!(found, "no {message:?} of {builder:?} for {word:?}: {entries:?}");
    };
    reason("cannot build on this machine", "ssh-ng://off", "connection refused");
    reason("failed", "ssh-ng://mac", "failed with exit code 3");
    reason("declined", "", "no-such");
    assert_shown(&entries, "cannot build on ssh-ng://off: cannot connect to off: connection refused (", ")");
    assert_shown(&entries, "build of 'bad' on ssh-ng://mac failed: ", "failed with exit code 3");
    assert_shown(&entries, "'needs': left to Nix: no machine can take it; ", "lacks the features [no-such]");
}

#[test]
fn the_verbosity_is_nixs_unless_the_environment_says_otherwise() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let told = |name: &str, log: &str, args: &[&str]| {
        let plan = plan(&world).named(name).journald().uses(&mac, "ssh-ng", 1);
        let client = if log.is_empty() { plan } else { plan.env("NIX_OFFLOAD_LOG", log) }.start();
        client.nix_build(&drv::trivial("a"), &[&["-j0"], args].concat()).assert_success();
        let entries = journal(&client);
        (said(&entries, "answered").len(), said(&entries, "built").len(), entries.len())
    };
    assert_eq!((told("default", "", &[]).0, told("default", "", &[]).1), (0, 1));
    assert_eq!(told("quiet", "", &["-Q", "--quiet", "--quiet"]).2, 0);
    let verbose = told("verbose", "", &["-vvv"]);
    assert_eq!((verbose.0, verbose.1), (1, 1));
    let debug = told("debug", "debug", &[]);
    assert_eq!((debug.0, debug.1), (1, 1));
    assert_eq!(told("off", "off", &["-vvv"]).2, 0);
}

#[test]
fn without_journald_nothing_is_missing_and_nothing_said() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).env("NIX_OFFLOAD_LOG", "trace").uses(&mac, "ssh-ng", 1).start();
    assert!(!client.exists("/run/systemd/journal/socket"));
    let built = client.nix_build(&drv::where_built("a"), &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n");
    built.assert_stderr_lacks("error").assert_stderr_lacks("warning").assert_stderr_lacks("chosen");
    let ping = client.nix_offload(&["ping-store"]);
    assert_eq!((ping.code(), ping.stderr()), (0, ""), "{ping}");
}

#[test]
fn nothing_secret_is_told() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).journald().env("NIX_OFFLOAD_LOG", "trace").uses(&mac, "ssh-ng", 1).start();
    let secret = drv::expression(r#"d "a" "echo x > $out" { PASSWORD = "open-sesame"; }"#);
    client.nix_build(&secret, &["-j0"]).assert_success();
    let entries = journal(&client);
    assert!(!entries.is_empty());
    for entry in entries {
        assert!(!entry.to_string().contains("open-sesame"), "{entry}");
    }
}

#[test]
fn the_proxy_tells_what_it_started_and_what_failed() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).journald().knows(&mac).start();
    let proxy = |words: &[&str]| client.command("/opt/nix-offload/bin/nix-offload-proxy").args(words).run();
    proxy(&["start", "mac"]).assert_success();
    proxy(&["stop", "mac"]).assert_success();
    proxy(&["127.0.0.1", "1"]).assert_failure();
    let entries = client.journal("-t nix-offload-proxy");
    for message in ["SSH master started", "SSH master stopped"] {
        let found = said(&entries, message);
        assert_eq!(found.len(), 1, "{message}: {entries:?}");
        assert_eq!(found[0]["DESTINATION"], "mac", "{message}");
    }
    let failed = said(&entries, "no connection");
    assert_eq!((&failed[0]["HOST"], &failed[0]["PORT"]), (&"127.0.0.1".into(), &"1".into()));
    assert!(failed[0]["ERROR"].as_str().unwrap().contains("refused"), "{failed:?}");
    assert_shown(&entries, "SSH master to mac stopped", "");
    assert_shown(&entries, "cannot connect to 127.0.0.1 port 1: ", ")");
}
