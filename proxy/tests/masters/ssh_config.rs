//! The user's ssh_config holds for masters too, each word of it: a destination is an alias there, and nothing but
//! the file given with `-F`, or the user's own in his home, says how to get there.

use std::{
    fs::{self, Permissions},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::unistd::{User, geteuid};
use nix_offload_proxy::master::{Endpoint, Fault, Master, StartError};

use crate::world::{BOUND, World, free_port, wait_until};

/// No name that could be resolved: only ssh_config can know it.
const ALIAS: &str = "mac.invalid";
/// Shorter than the bound that starts get here: none of them waits for it.
const SOON: Duration = Duration::from_secs(15);

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What every configuration here has: nothing of this machine's user is to help.
pub(crate) fn base(world: &World) -> String {
    let known_hosts = world.path("known_hosts");
    format!(
        "Host *\n IdentitiesOnly yes\n UserKnownHostsFile {}\n GlobalKnownHostsFile /dev/null\n\
         StrictHostKeyChecking yes\n ConnectTimeout 10\n",
        known_hosts.display()
    )
}

pub(crate) fn write_config(world: &World, text: &str) {
    fs::write(world.path("config"), format!("{text}\n{}", base(world))).unwrap();
}

/// The lines that lead to sshd.
pub(crate) fn way(world: &World) -> [String; 3] {
    [
        "HostName 127.0.0.1".into(),
        format!("Port {}", world.port),
        format!("IdentityFile {}", world.path("user").display()),
    ]
}

pub(crate) fn endpoint(world: &World, destination: &str) -> Endpoint {
    let mut endpoint = Endpoint::new(destination).unwrap();
    endpoint.ssh_options = vec!["-F".into(), world.path("config").display().to_string()];
    endpoint
}

fn try_start(world: &World, command: &str) -> Result<Master, StartError> {
    world.pool.start(&endpoint(world, ALIAS), BOUND, command)
}

/// Starts a master to the alias, sees that it works, and ends it. Returns what its first command said.
fn start_and_stop(world: &World, command: &str) -> Option<String> {
    let master = try_start(world, command).unwrap_or_else(|error| panic!("{error}: {error:?}"));
    master.open_session("true", BOUND).unwrap();
    let said = master.first_output();
    world.pool.stop(&world.only_master()).unwrap();
    said
}

/// With all lines there is a master, without any single one of them there is none.
fn assert_each_line_counts(world: &World, head: &str, lines: &[&str]) {
    let block = |lines: &[&str]| format!("{head}\n {}", lines.join("\n "));
    for left_out in 0..lines.len() {
        let mut some = lines.to_vec();
        let line = some.remove(left_out);
        write_config(world, &block(&some));
        let Err(error) = try_start(world, "true") else { panic!("there is a master without {line}") };
        println!("without {line}: {error}");
    }
    write_config(world, &block(lines));
    start_and_stop(world, "true");
}

#[test]
fn an_alias_says_where_and_with_which_key() {
    let world = World::new();
    let lines = way(&world);
    assert_each_line_counts(&world, &format!("Host {ALIAS}"), &lines.each_ref().map(String::as_str));
}

#[test]
fn an_alias_says_who() {
    let world = World::with_sshd(|_| "AllowUsers nobody".into());
    // sshd reads authorized_keys with the rights of nobody.
    fs::set_permissions(world.directory.path(), Permissions::from_mode(0o711)).unwrap();
    let way = way(&world).join("\n ");
    assert_each_line_counts(&world, &format!("Host {ALIAS}\n {way}"), &["User nobody"]);
    let log = fs::read_to_string(world.path("sshd.log")).unwrap();
    assert!(log.contains("Accepted publickey for nobody"), "{log}");
}

#[test]
fn match_blocks_are_looked_at_for_each_start() {
    let world = World::new();
    let flag = world.path("flag");
    let way = way(&world).join("\n ");
    write_config(
        &world,
        &format!("Match originalhost {ALIAS} exec \"test -e {} -a %n = {ALIAS}\"\n {way}", flag.display()),
    );
    try_start(&world, "true").unwrap_err();
    fs::write(&flag, "").unwrap();
    start_and_stop(&world, "true");
    write_config(&world, &format!("Match host other.invalid\n {way}"));
    try_start(&world, "true").unwrap_err();
    // `Match host` is about the name that HostName has made of the alias.
    write_config(&world, &format!("Host {ALIAS}\n HostName 127.0.0.1\nMatch host 127.0.0.1\n {way}"));
    start_and_stop(&world, "true");
}

#[test]
fn included_files_count() {
    let world = World::new();
    fs::write(world.path("part"), format!("Host {ALIAS}\n {}", way(&world).join("\n "))).unwrap();
    assert_each_line_counts(&world, "", &[&format!("Include {}", world.path("part").display())]);
}

/// ssh looks for its file in the home directory of the password database, and for what that includes (glob(3) of the
/// C library) in $HOME. So a process gets a home of its own in both.
#[test]
fn the_users_own_file_counts_and_includes_what_lies_beside_it() {
    let world = World::new();
    let home = world.path("home");
    fs::create_dir_all(home.join(".ssh/hosts.d")).unwrap();
    let me = User::from_uid(geteuid()).unwrap().unwrap();
    let passwd: String = fs::read_to_string("/etc/passwd")
        .unwrap()
        .lines()
        .map(|line| {
            let mut fields: Vec<&str> = line.split(':').collect();
            if fields[0] == me.name {
                fields[5] = home.to_str().unwrap();
            }
            fields.join(":") + "\n"
        })
        .collect();
    fs::write(world.path("passwd"), passwd).unwrap();
    let start = || {
        Command::new("unshare")
            .args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/passwd && exec \"$@\""])
            .arg(world.path("passwd"))
            .args([env!("CARGO_BIN_EXE_nix-offload-proxy"), "start", ALIAS])
            .env("NIX_OFFLOAD_RUNTIME_DIR", world.pool.directory())
            .env("HOME", &home)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    fs::write(home.join(".ssh/config"), format!("Include hosts.d/*\n{}", base(&world))).unwrap();
    let failed = start();
    assert!(!failed.status.success(), "{failed:?}");
    fs::write(home.join(".ssh/hosts.d/mac"), format!("Host {ALIAS}\n {}", way(&world).join("\n "))).unwrap();
    let started = start();
    assert!(started.status.success(), "{started:?}");
    assert!(world.only_master().alive);
}

#[test]
fn a_jump_host_or_a_command_leads_to_the_host() {
    let world = World::new();
    let way = way(&world).join("\n ");
    let through_ssh = format!("ProxyCommand ssh -F {} -W %h:%p jump", world.path("config").display());
    for (count, line) in [(1, "ProxyJump jump"), (2, &*through_ssh)] {
        write_config(&world, &format!("Host {ALIAS} jump\n {way}\nHost {ALIAS}\n {line}"));
        let before = world.logins();
        start_and_stop(&world, "true");
        assert_eq!(world.logins() - before, 2, "{line} is the way, so there is a login at the jump host");
        assert_eq!(world.logins(), 2 * count);
        // With the master goes what it went through.
        wait_until("nothing is left", || world.sshd_sessions().is_empty());
    }
}

/// Signs a public key, and leaves the certificate where ssh does not look by itself.
fn certify(directory: &Path, key: &str, words: &[&str], certificate: &str) {
    let ca = directory.join("ca");
    if !ca.exists() {
        let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&ca).status();
        assert!(made.unwrap().success());
    }
    let copy = directory.join("to-be-signed.pub");
    fs::copy(directory.join(format!("{key}.pub")), &copy).unwrap();
    let signed = Command::new("ssh-keygen")
        .args(["-q", "-I", "a test", "-s"])
        .arg(&ca)
        .args(words)
        .arg(&copy)
        .status()
        .unwrap();
    assert!(signed.success());
    fs::rename(directory.join("to-be-signed-cert.pub"), directory.join(certificate)).unwrap();
}

#[test]
fn a_users_certificate_is_shown() {
    let me = User::from_uid(geteuid()).unwrap().unwrap().name;
    let world = World::with_sshd(|directory| {
        certify(directory, "user", &["-n", &me], "pass.pub");
        format!("AuthorizedKeysFile none\nTrustedUserCAKeys {}/ca.pub", directory.display())
    });
    let way = way(&world).join("\n ");
    let line = format!("CertificateFile {}", world.path("pass.pub").display());
    assert_each_line_counts(&world, &format!("Host {ALIAS}\n {way}"), &[&line]);
    let log = fs::read_to_string(world.path("sshd.log")).unwrap();
    assert!(log.contains("ED25519-CERT"), "{log}");
}

#[test]
fn a_hosts_certificate_is_accepted_for_its_name_only() {
    let world = World::with_sshd(|directory| {
        certify(directory, "host", &["-h", "-n", "mac.example"], "host-pass.pub");
        format!("HostCertificate {}/host-pass.pub", directory.display())
    });
    let way = way(&world).join("\n ");
    let authority = format!("@cert-authority *.example {}", world.public_key("ca"));
    let configure = |alias: &str, known: &str| {
        write_config(&world, &format!("Host {ALIAS}\n {way}\n HostKeyAlias {alias}"));
        fs::write(world.path("known_hosts"), known).unwrap();
    };
    for (alias, known) in [("mac.example", ""), ("other.example", &*authority)] {
        configure(alias, known);
        let error = try_start(&world, "true").unwrap_err();
        assert!(matches!(error, StartError::Failed { fault: Fault::HostKeyUnknown { .. }, .. }), "{error:?}");
    }
    configure("mac.example", &authority);
    start_and_stop(&world, "true");
}

#[test]
fn a_key_that_only_an_agent_has_opens() {
    let world = World::new();
    let socket = world.path("agent");
    let agent = Command::new("ssh-agent").arg("-D").arg("-a").arg(&socket).stdout(Stdio::null()).spawn();
    let _agent = Running(agent.unwrap());
    let add = || {
        let mut add = Command::new("ssh-add");
        add.arg("-q").arg(world.path("user")).env("SSH_AUTH_SOCK", &socket).stderr(Stdio::null());
        add.status().unwrap().success()
    };
    wait_until("the agent has the key", add);
    fs::remove_file(world.path("user")).unwrap();
    let head =
        format!("Host {ALIAS}\n HostName 127.0.0.1\n Port {}\n IdentityFile {}", world.port, "/nowhere/id");
    let line = format!("IdentitiesOnly no\n IdentityAgent {}", socket.display());
    assert_each_line_counts(&world, &head, &[&line]);
    // Without the word, the agent of the environment is asked.
    write_config(&world, &format!("{head}\n IdentitiesOnly no"));
    let start = |agent: &Path| {
        let mut start = world.command();
        start.args(["start", ALIAS, "-F"]).arg(world.path("config")).env("SSH_AUTH_SOCK", agent);
        start.output().unwrap()
    };
    let refused = start(Path::new("/nowhere/agent"));
    assert_eq!(refused.status.code(), Some(77), "{refused:?}");
    let started = start(&socket);
    assert!(started.status.success(), "{started:?}");
}

#[test]
fn variables_that_the_configuration_sets_reach_the_first_command() {
    let world = World::with_sshd(|_| "AcceptEnv OUR_*".into());
    let way = way(&world).join("\n ");
    write_config(&world, &format!("Host {ALIAS}\n {way}\n SetEnv OUR_WORD=hello"));
    assert_eq!(start_and_stop(&world, "echo $OUR_WORD").as_deref(), Some("hello"));
}

#[test]
fn words_for_a_persons_session_do_not_get_in_the_way() {
    let world = World::new();
    let way = way(&world).join("\n ");
    let (forwarded, touched) = (free_port(), world.path("touched"));
    let touch = format!("PermitLocalCommand yes\n LocalCommand touch {}", touched.display());
    let forward = format!("LocalForward {forwarded} 127.0.0.1:9\n ExitOnForwardFailure yes");
    let _taken = TcpListener::bind(("127.0.0.1", forwarded)).unwrap();
    for line in [
        "RemoteCommand echo mine; cat",
        "RequestTTY force\n RemoteCommand tmux attach",
        "SetEnv A=b\n SendEnv *",
        &touch,
        &forward,
        "ForwardAgent yes\n ForwardX11 yes\n ForwardX11Trusted yes",
        "ControlPersist no\n ControlMaster no",
        "ControlMaster ask",
        "ControlMaster autoask",
        "BatchMode no\n NumberOfPasswordPrompts 0",
        "LogLevel QUIET",
        "LogLevel DEBUG3",
        "StdinNull yes",
        "VisualHostKey yes",
        "EscapeChar none\n Tunnel no\n Compression yes\n AddKeysToAgent yes",
        "GSSAPIAuthentication yes\n CheckHostIP yes\n HashKnownHosts yes\n UpdateHostKeys ask",
    ] {
        write_config(&world, &format!("Host {ALIAS}\n {way}\n {line}"));
        let begin = Instant::now();
        let said = start_and_stop(&world, "echo ours");
        assert_eq!(said.as_deref(), Some("ours"), "{line}");
        assert!(begin.elapsed() < SOON, "{line}: {:?}", begin.elapsed());
    }
    // With these what the first command says is not known. There is a master all the same, and soon.
    for line in ["SessionType none", "SessionType subsystem", "ForkAfterAuthentication yes"] {
        write_config(&world, &format!("Host {ALIAS}\n {way}\n {line}"));
        let begin = Instant::now();
        start_and_stop(&world, "echo ours");
        assert!(begin.elapsed() < SOON, "{line}: {:?}", begin.elapsed());
    }
    assert!(!touched.exists());
}
