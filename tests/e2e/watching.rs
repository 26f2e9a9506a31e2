//! `status`: the state of machines, without asking them.

use harness::{Client, ClientPlan, Hook, Mode, OURS, Output, World, drv, wait_until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{SOON, gated, open, wait_for_begin};

fn plan(world: &World) -> ClientPlan {
    world.client().hook(Hook::Ours)
}

fn status(client: &Client) -> Vec<Value> {
    let output = client.nix_offload(&["status", "--json"]);
    let list: Value = serde_json::from_str(output.assert_success().stdout()).unwrap();
    list.as_array().unwrap().clone()
}

fn text(output: &Output) -> String {
    output.assert_success().stdout().to_owned()
}

#[test]
fn builds_of_another_store_wait_for_nothing_here() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let mode = Mode::Private { store: "/tmp/private".into(), as_user: false };
    let client = plan(&world).mode(mode).uses(&mac, "ssh-ng", 1).start();
    let running = client.spawn_nix_build(&gated("first"), &["-j0"]);
    wait_for_begin(&client, "first", &["mac"]);
    let waiting = client.spawn_nix_build(&gated("second"), &["-j0"]);
    let of_store = |store: &[&str]| {
        let output = client.command(OURS).args(["status", "--json"]).args(store).run();
        let list: Value = serde_json::from_str(output.assert_success().stdout()).unwrap();
        (list[0]["taken"].clone(), list[0]["waiting"].clone())
    };
    let private = ["--store", "/tmp/private"];
    wait_until("one waits for the private store's slot", SOON, || of_store(&private) == (json!(1), json!(1)));
    assert_eq!(of_store(&[]), (json!(0), json!(0)));
    for (name, build) in [("first", running), ("second", waiting)] {
        open(&client, name);
        build.wait().assert_success();
    }
}

#[test]
fn what_runs_where_and_what_is_drained() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world)
        .uses(&mac, "ssh-ng", 2)
        .machines("ssh://pi x86_64-linux - 3\nssh://none x86_64-linux - 0\nplugin://x x86_64-linux\n/ x86_64-linux\n")
        .start();
    let idle = status(&client);
    let states: Vec<&Value> = idle.iter().map(|machine| &machine["state"]).collect();
    assert_eq!(states, ["ready", "ready", "no slots", "not used", "not used"]);
    assert_eq!(
        (&idle[0]["taken"], &idle[0]["slots"], &idle[0]["master"]),
        (&json!(0), &json!(2), &Value::Null)
    );
    assert_eq!(idle[0]["builds"], json!([]));
    assert!(idle[4]["reason"].as_str().unwrap().contains("this client's own"), "{idle:?}");
    let build = client.spawn_nix_build(&gated("one-1"), &["-j0"]);
    wait_for_begin(&client, "one-1", &["mac"]);
    // What Nix's own hook builds is counted, too.
    client.run("mkdir /etc/nix-stock; head -n 1 /etc/nix/machines > /etc/nix-stock/machines; grep -v build-hook /etc/nix/nix.conf > /etc/nix-stock/nix.conf");
    let stock =
        client.nix_build_command(&gated("two-2"), &["-j0"]).env("NIX_CONF_DIR", "/etc/nix-stock").spawn();
    wait_for_begin(&client, "two-2", &["mac"]);
    client.nix_offload(&["drain", "pi", "--for", "2h", "--reason", "new disk"]).assert_success();
    let mut busy = Vec::new();
    wait_until("the build has said what it is", SOON, || {
        busy = status(&client);
        busy[0]["builds"].as_array().unwrap().iter().any(|build| !build["derivation"].is_null())
    });
    assert_eq!((&busy[0]["state"], &busy[0]["taken"]), (&"full".into(), &2.into()), "{busy:?}");
    let builds = busy[0]["builds"].as_array().unwrap();
    let derivations: Vec<Option<&str>> = builds.iter().map(|build| build["derivation"].as_str()).collect();
    assert_eq!(derivations.len(), 2, "{busy:?}");
    assert!(derivations.contains(&None), "{busy:?}");
    assert!(derivations.iter().flatten().any(|path| path.ends_with("-one-1.drv")), "{busy:?}");
    assert!(busy[0]["master"]["since"].as_u64().unwrap() > 1_700_000_000, "{busy:?}");
    assert_eq!((&busy[1]["state"], &busy[1]["reason"]), (&"drained".into(), &"new disk".into()));
    assert!(busy[1]["until"].as_u64().is_some(), "{busy:?}");
    let shown = text(&client.nix_offload(&["status"]));
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines[0].starts_with("MACHINE       STATE       SLOTS  LOAD"), "{shown}");
    assert!(lines[1].starts_with("ssh-ng://mac  full        2/2 "), "{shown}");
    let inner = [lines[2], lines[3]];
    assert!(inner.iter().any(|line| line.starts_with("  one-1, for ")), "{shown}");
    assert!(inner.contains(&"  a build that another hook sent, or that has only begun"), "{shown}");
    assert!(lines[4].starts_with("ssh://pi      drained 2h  0/3  "), "{shown}");
    assert_eq!(lines[5], "  new disk", "{shown}");
    assert!(!shown.contains('\u{1b}') && lines.iter().all(|line| line.chars().count() <= 110), "{shown}");
    for name in ["one-1", "two-2"] {
        open(&client, name);
    }
    build.wait().assert_success();
    stock.wait().assert_success();
    assert_eq!(status(&client)[0]["builds"], json!([]));
}

#[test]
fn a_machine_that_failed_is_down_and_nobody_is_asked() {
    let world = World::new();
    let mut off = world.builder("off").start();
    let client = plan(&world).uses(&off, "ssh-ng", 1).start();
    let logins = off.logins();
    assert_eq!(status(&client)[0]["state"], "ready");
    assert_eq!(off.logins(), logins);
    off.stop();
    assert_eq!(status(&client)[0]["state"], "ready", "nobody has tried it");
    client.nix_build(&drv::trivial("a"), &["-j0"]).assert_failure();
    let down = status(&client);
    assert_eq!(down[0]["state"], "down", "{down:?}");
    assert!(down[0]["reason"].as_str().unwrap().contains("refused"), "{down:?}");
    assert!(down[0]["hint"].as_str().unwrap().starts_with("check that sshd runs on off"), "{down:?}");
}

#[test]
fn what_a_machine_said_of_itself_is_shown_with_its_age() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = plan(&world).uses(&mac, "ssh-ng", 1).start();
    client.write("/etc/nix/offload.toml", "[choice]\nsample-every = '1s'\n");
    let build = client.spawn_nix_build(&gated("a"), &["-j0"]);
    wait_for_begin(&client, "a", &["mac"]);
    let mut sample = Value::Null;
    wait_until("there is a sample", SOON, || {
        sample = status(&client)[0]["sample"].clone();
        !sample.is_null()
    });
    for field in ["at", "ageSeconds", "cores", "loadAverage", "memoryFree", "diskFree"] {
        assert!(sample[field].is_number(), "{field}: {sample}");
    }
    let shown = text(&client.nix_offload(&["status"]));
    let words: Vec<&str> = shown.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((words.len(), words[0]), (8, "ssh-ng://mac"), "{shown}");
    assert!(words[3].ends_with(&format!("/{}", sample["cores"])), "{shown}");
    assert!(words[6].ends_with('s') && words[3..].iter().all(|word| *word != "-"), "{shown}");
    open(&client, "a");
    build.wait().assert_success();
}

#[test]
fn looking_on_shows_what_changes() {
    let world = World::new();
    let client = plan(&world).machines("ssh://mac x86_64-linux").start();
    let watch = format!("{OURS} status --watch --json > /root/seen");
    let mut watch = client.command("sh").args(["-c", &format!("exec {watch}")]).spawn();
    let last = || {
        let seen = if client.exists("/root/seen") { client.read("/root/seen") } else { String::new() };
        let mut whole = seen.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        whole.next_back().map(|list| list[0]["state"].clone()).unwrap_or_default()
    };
    wait_until("it looks", SOON, || last() == "ready");
    client.nix_offload(&["disable", "mac"]).assert_success();
    wait_until("it looks again", SOON, || last() == "disabled");
    assert!(watch.is_running());
    watch.signal(Signal::SIGINT);
    assert_ne!(watch.wait().code(), 0);
    // It ends with its reader.
    let piped = client.run(&format!("{OURS} status --watch --json | head -n 2"));
    let last: Value = serde_json::from_str(piped.lines().last().unwrap()).unwrap();
    assert_eq!((piped.lines().count(), &last[0]["state"]), (2, &"disabled".into()), "{piped}");
}

#[test]
fn only_the_user_of_the_hook_sees_its_state() {
    let world = World::new();
    let client = plan(&world).mode(Mode::Daemon).machines("ssh://mac x86_64-linux").start();
    let refused = client.nix(OURS).arg("status").run();
    assert_eq!((refused.code(), refused.stdout()), (77, ""), "{refused}");
    refused.assert_stderr_has("hint: run the same with sudo");
    assert_eq!(status(&client)[0]["state"], "ready");
    let nothing = world.client().named("nothing").hook(Hook::Ours).start();
    let nothing = nothing.nix_offload(&["status"]);
    assert_eq!(nothing.code(), 78, "{nothing}");
    nothing.assert_stderr_has("error: no machines are configured").assert_stderr_has("hint: set 'builders'");
}
