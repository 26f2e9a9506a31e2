//! The commands around the ProxyCommand: what they say, and their documents.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    net::TcpStream,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::world::{MIB, World, free_port, pattern_file, run, wait_until};

fn help(words: &[&str]) -> String {
    let output =
        Command::new(env!("CARGO_BIN_EXE_nix-offload-proxy")).args(words).arg("--help").output().unwrap();
    assert!(output.status.success(), "{words:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_list_counts_what_runs_over_a_connection() {
    let world = World::new();
    let listed = || -> Value {
        let said = world.proxy_says(&["list", "--json"]);
        assert_eq!((said.code, &*said.err), (Some(0), ""));
        serde_json::from_str(&said.out).unwrap()
    };
    assert_eq!(world.ssh("host2", "true").code, Some(0));
    assert_eq!(listed()[0]["destination"], "bastion");
    wait_until("all streams are gone", || listed()[0]["channels"] == 0);
    let mut sessions: Vec<_> = ["host2", "fd2", "host3"]
        .map(|host| {
            let mut ssh = world.client("ssh");
            ssh.args([host, "echo ready; cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        })
        .into();
    for session in &mut sessions {
        let mut line = String::new();
        BufReader::new(session.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
    }
    // A list is a client too, for a moment.
    wait_until("three streams are there", || listed()[0]["channels"] == 3);
    wait_until("the list says so", || {
        let text = world.proxy_says(&["list"]).out;
        let line = text.lines().nth(1).unwrap_or_default();
        let cells: Vec<&str> = line.split_whitespace().collect();
        matches!(cells[..], ["bastion", "alive", _, _, "3", ..])
    });
    for mut session in sessions {
        drop(session.stdin.take());
        assert!(session.wait().unwrap().success());
    }
    wait_until("all streams are gone", || listed()[0]["channels"] == 0);
}

#[test]
fn the_list_tells_the_traffic_of_a_connection() {
    const FILE: usize = 8 * MIB;
    let world = World::new();
    let listed = |host: &str| -> Value {
        let said = world.proxy_says(&["list", "--json"]);
        assert_eq!((said.code, &*said.err), (Some(0), ""));
        let masters: Vec<Value> = serde_json::from_str(&said.out).unwrap();
        masters.into_iter().find(|master| master["destination"] == host).unwrap()
    };
    let said = world.proxy_says(&["list"]);
    assert_eq!((said.code, &*said.out), (Some(0), ""));
    assert!(said.err.starts_with("there are no shared connections"), "{said:?}");

    let traffic = || {
        let bastion = listed("bastion");
        ["sent", "received"].map(|key| bastion[key].as_u64().unwrap() as usize)
    };
    let expected = FILE..2 * FILE;
    pattern_file(&world.path("file"), FILE);
    let mut ssh = world.client("ssh");
    ssh.args(["host2", "cat > /dev/null"]).stdin(File::open(world.path("file")).unwrap());
    run(&mut ssh);
    let [sent, received] = traffic();
    assert!(expected.contains(&sent) && received < MIB, "sent {sent}, received {received}");
    let mut ssh = world.client("ssh");
    ssh.args(["host2", &format!("cat {}", world.path("file").display())]).stdout(Stdio::null());
    run(&mut ssh);
    let [sent, received] = traffic();
    assert!(expected.contains(&sent) && expected.contains(&received), "sent {sent}, received {received}");

    // Links that are a pipe, a stream of another master, and a TCP socket that was handed over.
    let config = world.path("ssh_config").display().to_string();
    for (host, is_known) in [("host3", false), ("fd3", false), ("fddirect", true)] {
        let said = world.proxy_says(&["start", "-F", &config, host]);
        assert_eq!(said.code, Some(0), "{said:?}");
        let master = listed(host);
        for key in ["sent", "received"] {
            assert_eq!((master[key].is_u64(), master[key].is_null()), (is_known, !is_known), "{master}");
        }
        assert!(master["age"].as_u64().unwrap() < 600, "{master}");
    }
    // A forward that somebody asked for has TCP sockets too, which are no link.
    let port = free_port();
    let control = listed("host3")["control-path"].as_str().unwrap().to_owned();
    let forward = format!("127.0.0.1:{port}:127.0.0.3:{}", world.port);
    run(world.client("ssh").args(["-S", &control, "-O", "forward", "-L", &forward, "host3"]));
    let mut forwarded = TcpStream::connect(("127.0.0.1", port)).unwrap();
    forwarded.read_exact(&mut [0; 4]).unwrap();
    assert!(listed("host3")["sent"].is_null());

    let said = world.proxy_says(&["list"]);
    assert_eq!((said.code, &*said.err), (Some(0), ""));
    let lines: Vec<&str> = said.out.lines().collect();
    assert_eq!(lines.len(), 5, "{said:?}");
    let heads: Vec<&str> = lines[0].split_whitespace().collect();
    assert_eq!(heads, ["HOST", "STATE", "PID", "AGE", "CHANNELS", "SENT", "RECEIVED", "LOG"]);
    let cell = |line: &str, from: &str, to: &str| {
        line[lines[0].find(from).unwrap()..lines[0].find(to).unwrap()].trim().to_owned()
    };
    let log = lines[0].find("LOG").unwrap();
    for (line, host) in lines[1..].iter().zip(["bastion", "fd3", "fddirect", "host3"]) {
        assert_eq!(cell(line, "HOST", "STATE"), host);
        assert_eq!(&line[log..], listed(host)["log-path"].as_str().unwrap());
        let ends_well = |text: String| match host {
            "bastion" => text.ends_with(" MiB"),
            "fddirect" => text.ends_with(" KiB"),
            _ => text == "?",
        };
        assert!(ends_well(cell(line, "SENT", "RECEIVED")), "{line}");
        assert!(ends_well(cell(line, "RECEIVED", "LOG")), "{line}");
    }
}

#[test]
fn check_says_whether_a_host_answers() {
    let world = World::new();
    let config = world.path("ssh_config").display().to_string();
    let said = world.proxy_says(&["check", "-F", &config, "host2"]);
    assert!(
        said.code == Some(0) && said.out.starts_with("host2 answers, over a new connection ("),
        "{said:?}"
    );
    let said = world.proxy_says(&["check", "--json", "-F", &config, "host2"]);
    let result: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((&result["answers"], &result["master"]), (&Value::from(true), &Value::from("found")));
    assert_eq!(world.bastion_logins(), 1);
    // A file named from here, though the master starts elsewhere.
    let mut here = world.proxy();
    here.current_dir(world.path("")).args(["check", "-F", "ssh_config", "-i", "user", "host2"]);
    assert_eq!(here.output().unwrap().status.code(), Some(0));

    let said = world.proxy_says(&["check", "--json", "-F", "none", "-p", "1", "127.0.0.1"]);
    let result: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((said.code, &result["answers"]), (Some(69), &Value::from(false)));
    assert!(result["error"].as_str().unwrap().contains("connection refused"), "{result}");
    assert!(
        said.err.starts_with("error: cannot connect to 127.0.0.1") && said.err.contains("hint: "),
        "{said:?}"
    );
}

#[test]
fn wrong_words_are_said_to_be_so() {
    let world = World::new();
    for words in
        [&["host"][..], &["host", "0"], &["host", "ssh"], &["--wait=x", "host", "22"], &["list", "22"]]
    {
        let said = world.proxy_says(words);
        assert_eq!(said.code, Some(2), "{words:?}: {said:?}");
        assert!(said.err.contains("Usage") || said.err.contains("--help"), "{said:?}");
    }
    let said = world.proxy_says(&["--fdpass", "127.0.0.1", "22"]);
    assert!(said.code == Some(2) && said.err.contains("hint: leave --fdpass out, or say"), "{said:?}");
    let said = world.proxy_says(&["--via", "-oProxyCommand=x", "127.0.0.1", "22"]);
    assert_eq!(said.code, Some(2), "{said:?}");
    let said = world.proxy_says(&["-i", "key", "127.0.0.1", "22"]);
    assert!(said.code == Some(2) && said.err.contains("hint: name it with --via"), "{said:?}");
    // A host called like a command.
    let said = world.proxy_says(&["--", "list", "22"]);
    assert!(said.code == Some(69) && said.err.contains("cannot connect to list port 22"), "{said:?}");
}

#[test]
fn the_manual_has_every_command_and_every_flag() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/man/nix-offload-proxy.1");
    // Without roff's escapes of hyphens.
    let manual = fs::read_to_string(path).unwrap().replace("\\-", "-");
    let top = help(&[]);
    let commands: Vec<&str> = top
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .map_while(|line| line.strip_prefix("  ")?.split_whitespace().next())
        .filter(|word| *word != "help")
        .collect();
    assert_eq!(commands, ["list", "start", "stop", "check"]);
    let mut flags = 0;
    for words in [vec![]].into_iter().chain(commands.iter().map(|command| vec![*command])) {
        let text = help(&words);
        for line in text.lines().filter(|line| line.trim_start().starts_with('-')) {
            for flag in line.split([' ', ',', '=', '[', ')']).filter(|word| word.starts_with('-')) {
                flags += 1;
                let named = [format!("{flag} "), format!("{flag}\n"), format!("{flag},"), format!("{flag}=")];
                assert!(
                    named.iter().any(|named| manual.contains(named)),
                    "the manual lacks {words:?} {flag}"
                );
            }
        }
        for command in &words {
            assert!(manual.contains(&format!(".SS {command}")), "the manual lacks {command}");
        }
    }
    assert!(flags > 30, "{flags} flags found");
    for code in ["69", "75", "77", "78"] {
        assert!(manual.contains(&format!(".B {code}\n")), "the manual lacks exit code {code}");
    }
}
