//! An sshd that punishes its clients (PerSourcePenalties, OpenSSH 9.8 and newer): nothing we do is punished, and a
//! punishment is told and lived through.

use std::{io::Read, net::TcpStream, time::Duration};

use harness::{Builder, Client, Hook, Output, Release, Running, World, drv, wait_until};

const LIMIT: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_secs(60);

fn strict(world: &World) -> (Builder, Client) {
    let penalties = "PerSourcePenalties noauth:5s authfail:5s crash:5s grace-exceeded:5s min:5s max:60s";
    let mac = world.builder("mac").release(Release::Sid).sshd_option(penalties).start();
    let client = world.client().hook(Hook::Ours).uses(&mac, "ssh-ng", 20).start();
    (mac, client)
}

fn penalties(mac: &Builder) -> usize {
    mac.log("sshd").matches("penalty of").count()
}

fn assert_built_on_mac(client: &Client, output: &Output) {
    let path = output.assert_success().out_path();
    assert_eq!(client.read(&path), "mac\n", "{output}");
}

#[test]
fn nothing_that_the_hook_does_is_punished() {
    let world = World::new();
    let (mac, client) = strict(&world);
    let ping = || client.nix_offload(&["ping-store", "--store", "ssh-ng://mac"]).assert_success().code();
    assert_built_on_mac(&client, &client.nix_build(&drv::where_built("a"), &["-j0"]));
    ping();
    for signal in ["KILL", "TERM"] {
        for master in client.pids_matching("ssh: /run/nix-offload/") {
            client.kill(master, signal);
        }
        assert_built_on_mac(&client, &client.nix_build(&drv::where_built(signal), &["-j0"]));
    }
    let built = client.nix_build(&drv::independent(8), &["-j0"]);
    assert_eq!(built.assert_success().out_paths().len(), 8);
    client.command("/opt/nix-offload/bin/nix-offload-proxy").args(["stop", "mac"]).run().assert_success();
    let builds: Vec<Running> = (0..20)
        .map(|number| client.spawn_nix_build(&drv::where_built(&format!("at-once-{number}")), &["-j0"]))
        .collect();
    for build in builds {
        assert_built_on_mac(&client, &build.wait());
    }
    ping();
    assert_eq!(penalties(&mac), 0, "{}", mac.log("sshd"));
    assert_eq!(mac.logins(), 4);
}

#[test]
fn a_punished_client_is_told_so_and_works_again_afterwards() {
    let world = World::new();
    let (mac, client) = strict(&world);
    // What port scanners do.
    wait_until("sshd punishes this address", LIMIT, || {
        let mut stream = TcpStream::connect(("127.0.0.1", mac.port())).unwrap();
        let _ = stream.read(&mut [0; 8]);
        drop(stream);
        mac.log("sshd").contains("activating")
    });
    let ping = || client.nix_offload(&["ping-store", "--store", "ssh-ng://mac"]);
    let refused = ping();
    assert!(refused.took() < LIMIT, "{refused}");
    assert_eq!(refused.code(), 69, "{refused}");
    let line = |name: &str| {
        let found = refused.stdout().lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        found.to_lowercase()
    };
    assert!(line("Error: ").contains("turned"), "{refused}");
    assert!(line("Hint: ").contains("penalt"), "{refused}");
    wait_until("it works again", AGAIN, || ping().code() == 0);
    assert_built_on_mac(&client, &client.nix_build(&drv::where_built("a"), &["-j0"]));
}
