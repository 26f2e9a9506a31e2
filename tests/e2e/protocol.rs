//! The hook program itself, spoken to as Nix does: whatever it is sent, it answers in one line and ends.

use std::time::Duration;

use harness::{Client, Hook, OURS, Output, World, drv};

/// The program must have ended by then, however long the lengths it was told.
const LIMIT: Duration = Duration::from_secs(5);
/// In KiB of address space: far less than the lengths below, far more than is needed.
const MEMORY: &str = "300000";

/// A growing dialogue in the format Nix writes: numbers of 8 bytes, texts padded to 8.
#[derive(Clone, Default)]
struct Dialogue(Vec<u8>);

impl Dialogue {
    fn number(mut self, number: u64) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn text(self, text: &str) -> Self {
        let mut this = self.number(text.len() as u64);
        this.0.extend(text.as_bytes());
        this.0.resize(this.0.len().next_multiple_of(8), 0);
        this
    }

    fn setting(self, name: &str, value: &str) -> Self {
        self.number(1).text(name).text(value)
    }

    fn end_of_settings(self) -> Self {
        self.number(0)
    }

    fn request(self, system: &str, drv: &str, features: &[&str]) -> Self {
        let this = self.text("try").number(1).text(system).text(drv).number(features.len() as u64);
        features.iter().fold(this, |this, feature| this.text(feature))
    }
}

fn settings(builders: &str) -> Dialogue {
    Dialogue::default()
        .setting("builders", builders)
        .setting("system", "x86_64-linux")
        .setting("max-jobs", "1")
        .setting("store", "auto")
        .end_of_settings()
}

/// A machine that is never connected to.
const FAR: &str = "ssh-ng://far armv7l-linux - 1 1";
const DRV: &str = "/nix/store/00000000000000000000000000000000-x.drv";

fn client(world: &World) -> Client {
    let client = world.client().hook(Hook::Ours).start();
    client.run("nix-store --init");
    client
}

/// Runs the hook with its input ending after these bytes and the descriptors Nix gives it.
fn speak(client: &Client, bytes: &[u8]) -> Output {
    speak_with(client, bytes, "3")
}

fn speak_with(client: &Client, bytes: &[u8], args: &str) -> Output {
    client.write_bytes("/tmp/dialogue", bytes);
    let line =
        format!("ulimit -v {MEMORY}; : > /tmp/log; exec {OURS} {args} </tmp/dialogue 4>>/tmp/log 5</tmp/log");
    client.command("bash").args(["-c", &line]).limit(LIMIT).run()
}

/// It fails with one line that has all these words, and nothing else.
#[track_caller]
fn assert_refused(output: &Output, words: &[&str]) {
    assert_eq!((output.code(), output.stdout()), (1, ""), "{output}");
    let lines: Vec<&str> = output.stderr().lines().collect();
    assert_eq!(lines.len(), 1, "{output}");
    assert!(lines[0].starts_with("nix-offload: error: "), "{output}");
    for word in words {
        assert!(lines[0].contains(word), "{word:?} is missing: {output}");
    }
    assert!(!lines[0].contains("panicked"), "{output}");
}

#[track_caller]
fn assert_said(output: &Output, stderr: &str) {
    assert_eq!((output.code(), output.stdout(), output.stderr()), (0, "", stderr), "{output}");
}

#[test]
fn garbage_ends_in_one_line() {
    let world = World::new();
    let client = client(&world);
    let not_ours = "not the build hook protocol";
    for garbage in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 4096], &[1; 64]] {
        assert_refused(&speak(&client, garbage), &[not_ours]);
    }
    let wrong_word = settings(FAR).text("frobnicate");
    assert_refused(&speak(&client, &wrong_word.0), &[not_ours, "frobnicate", "'try'"]);
}

#[test]
fn every_truncation_ends_in_one_line() {
    let world = World::new();
    let client = client(&world);
    let settings = settings(FAR);
    let whole = settings.clone().request("x86_64-linux", DRV, &["kvm"]);
    // The end between two requests is no fault; each 4 bytes come inside of every field, and at its ends.
    for end in (0..whole.0.len()).step_by(4).filter(|end| *end != settings.0.len()) {
        let output = speak(&client, &whole.0[..end]);
        assert_refused(&output, &["not the build hook protocol", "ended"]);
    }
    assert_said(&speak(&client, &settings.0), "");
    assert_said(&speak(&client, &whole.0), "# decline\n");
}

#[test]
fn absurd_lengths_cost_neither_time_nor_memory() {
    let world = World::new();
    let client = client(&world);
    for length in [u64::MAX, u64::MAX - 7, 1 << 40, 1 << 63] {
        let request = settings(FAR).text("try").number(1);
        let with_system = request.clone().text("x86_64-linux");
        for dialogue in [
            Dialogue::default().number(1).number(length),
            Dialogue::default().number(1).text("builders").number(length),
            settings(FAR).number(length),
            request.clone().number(length),
            with_system.clone().number(length),
            with_system.clone().text(DRV).number(length),
            with_system.clone().text(DRV).number(1).number(length),
        ] {
            let output = speak(&client, &dialogue.0);
            assert_refused(&output, &["not the build hook protocol"]);
        }
    }
}

#[test]
fn a_length_that_is_believed_is_not_reserved_at_once() {
    let world = World::new();
    let client = client(&world);
    // Within the bounds of one setting, but nothing follows.
    let promised = Dialogue::default().number(1).text("builders").number(60 << 20).0;
    assert_refused(&speak(&client, &promised), &["ended"]);
}

#[test]
fn ten_mebibytes_of_machines_are_read() {
    let world = World::new();
    let client = client(&world);
    let mut builders = String::new();
    while builders.len() < 10 << 20 {
        builders.push_str(&format!("ssh-ng://far-{} armv7l-linux - 1 1\n", builders.len()));
    }
    let dialogue = settings(&builders).request("x86_64-linux", DRV, &[]);
    let output = speak(&client, &dialogue.0);
    assert_said(&output, "# decline\n");
}

#[test]
fn one_process_answers_any_number_of_requests() {
    let world = World::new();
    let client = client(&world);
    let path = client.run(&format!("nix-instantiate -E '{}' 2>/dev/null", drv::trivial("real")));
    let mut dialogue = settings(FAR);
    for number in 0..300 {
        let drv = if number % 2 == 0 { DRV } else { path.trim() };
        let features: &[&str] = if number % 3 == 0 { &["kvm", "big-parallel"] } else { &[] };
        dialogue = dialogue.request("x86_64-linux", drv, features);
    }
    let said = speak(&client, &dialogue.0);
    let (lines, replies): (Vec<&str>, Vec<&str>) =
        said.assert_success().stderr().lines().partition(|line| line.starts_with("@nix "));
    assert_eq!((replies.len(), replies.iter().all(|reply| *reply == "# decline")), (300, true), "{said}");
    // Those that need what no machine has are told of once.
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].contains("lacks the features [big-parallel, kvm]"), "{said}");
    assert_eq!(client.processes().len(), 0, "{:?}", client.processes());
}

#[test]
fn without_machines_it_declines_for_ever() {
    let world = World::new();
    let client = client(&world);
    for builders in ["", "# none\n ; \n", "@/no/such/file"] {
        let dialogue = settings(builders).request("x86_64-linux", DRV, &[]);
        assert_said(&speak(&client, &dialogue.0), "# decline-permanently\n");
    }
}

#[test]
fn both_forms_of_its_arguments_are_understood() {
    let world = World::new();
    let client = client(&world);
    let dialogue = settings(FAR).request("x86_64-linux", DRV, &[]);
    for args in ["3", "0", "7", "hook 3"] {
        assert_said(&speak_with(&client, &dialogue.0, args), "# decline\n");
    }
    let wrong = speak_with(&client, &dialogue.0, "frobnicate");
    assert_eq!((wrong.code(), wrong.stdout()), (2, ""), "{wrong}");
    wrong.assert_stderr_has("frobnicate");
}

#[test]
fn started_by_hand_it_says_what_it_is() {
    let world = World::new();
    let client = client(&world);
    for args in [&["3"][..], &["hook", "3"]] {
        let output = client.command(OURS).args(args).limit(LIMIT).run();
        assert_refused(&output, &["descriptor 4", "not started by Nix"]);
    }
    let read_only = format!("exec {OURS} 3 </dev/null 4</dev/null");
    let output = client.command("bash").args(["-c", &read_only]).limit(LIMIT).run();
    assert_refused(&output, &["descriptor 4", "not started by Nix"]);
}

/// What the hook writes to Nix in a build, by a wrapper that copies descriptor 2.
const EAVESDROPPER: &str = "#!/bin/bash\n\
    exec /opt/nix-offload/bin/nix-offload \"$@\" 2> >(exec 4>&- 5>&-; exec tee -a /tmp/wire >&2)\n";

#[test]
fn nothing_but_replies_and_lines_of_nix_is_written_to_nix() {
    let world = World::new();
    let mac = world.builder("mac").bashrc("echo Welcome; echo a warning >&2").start();
    let mut off = world.builder("off").start();
    let client = world
        .client()
        .hook(Hook::Path("/tmp/eavesdropper".into()))
        .uses(&off, "ssh-ng", 1)
        .uses(&mac, "ssh-ng", 2)
        .machines("ssh-ng://bad x86_64-linux - many")
        .start();
    off.stop();
    client.write_mode("/tmp/eavesdropper", EAVESDROPPER, 0o755);
    client.nix_build(&drv::chain(3), &["-j0", "-vv"]).assert_success();
    client.nix_build(&drv::failing("bad", "it went wrong", 3), &["-j0"]).assert_failure();
    let replies = ["# accept", "ssh-ng://mac", "# decline", "# postpone", "# decline-permanently"];
    let wire = client.read("/tmp/wire");
    let mut lines = 0;
    for line in wire.lines() {
        lines += 1;
        match line.strip_prefix("@nix ") {
            Some(json) => {
                let value: serde_json::Value = serde_json::from_str(json).unwrap();
                assert!(value["action"].is_string(), "{line}");
            }
            None => assert!(replies.contains(&line), "a stray line {line:?} in:\n{wire}"),
        }
    }
    assert!(lines > 10 && wire.contains("# accept\nssh-ng://mac\n"), "{wire}");
}

#[test]
fn a_bad_line_costs_itself_only_and_is_shown_with_a_caret() {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world
        .client()
        .hook(Hook::Ours)
        .machines("# the machines\nssh-ng://other x86_64-linux - many 1")
        .uses(&mac, "ssh-ng", 1)
        .start();
    let built = client.nix_build(&drv::where_built("a"), &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n");
    let (_, after) =
        built.stderr().split_once("/etc/nix/machines:2:31: ").unwrap_or_else(|| panic!("{built}"));
    let mut lines = after.lines().map(str::trim_end);
    let message = lines.next().unwrap();
    assert!(message.contains("column 4") && message.contains("'many'"), "{built}");
    let line = lines.next().unwrap();
    let caret = lines.next().unwrap();
    assert!(line.contains("ssh-ng://other x86_64-linux - many 1"), "{built}");
    assert_eq!(caret.trim(), "^^^^", "{built}");
    assert_eq!(line.find("many"), caret.find('^'), "{built}");
}

#[test]
fn included_files_and_all_columns_are_understood() {
    let world = World::new();
    let mac = world.builder("mac").nix_conf("system-features = kvm big-parallel").start();
    let client = world.client().hook(Hook::Ours).knows(&mac).nix_conf("builders = @/etc/nix/first").start();
    let key = client.run(&format!("printf '%s' '{}' | base64 -w0", mac.host_public_key()));
    client.write(
        "/etc/nix/first",
        "# nested\n@/etc/nix/second ; ssh-ng://unused riscv64-linux # a comment; too\n",
    );
    client.write(
        "/etc/nix/second",
        &format!(
            "mac x86_64-linux,i686-linux /root/.ssh/id_ed25519 2 1.5 kvm,big-parallel big-parallel {key}\n"
        ),
    );
    let needs = drv::expression(
        r#"d "needs" "cat /etc/machine-name > $out" { requiredSystemFeatures = [ "kvm" "big-parallel" ]; }"#,
    );
    let built = client.nix_build(&needs, &["-j0"]);
    assert_eq!(client.read(&built.assert_success().out_path()), "mac\n");
    built.assert_stderr_has("on 'ssh://mac'");
    // The mandatory feature keeps others away.
    client.nix_build(&drv::where_built("plain"), &["-j0"]).assert_failure();
}
