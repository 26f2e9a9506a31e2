//! A jump host whose connection falls silent, and a silent host behind one that is well: nobody loses a stream by the
//! impatience of another.

use std::{
    fs::{self, File},
    process::Stdio,
    time::Duration,
};

use nix::sys::signal::Signal;

use crate::{
    bastion::signal,
    world::{BOUND, Echo, Said, World, wait_until},
};

/// What ends as soon as it has no answer.
const IMPATIENT: &str = "2";

fn impatient(world: &World, host: &str) -> Said {
    let mut words = world.via();
    words.extend(["--timeout".into(), IMPATIENT.into(), host.into(), world.port.to_string()]);
    // A file: of a pipe the master would go on holding the other end.
    let mut proxy = world.proxy();
    proxy.args(&words).stdout(File::create(world.path("out")).unwrap()).stderr(Stdio::piped());
    let output = proxy.spawn().unwrap().wait_with_output().unwrap();
    let out = fs::read_to_string(world.path("out")).unwrap();
    Said { out, ..output.into() }
}

/// A block of ssh_config for a host whose ProxyCommand has little patience and hands the connection over.
fn impatient_block(world: &World) -> String {
    let proxy = world.proxy_command("--via bastion --fdpass").replace("--timeout 20", "--timeout 2");
    format!("Host hasty\n HostName 127.0.0.3\n ProxyCommand {proxy} %h %p\n ProxyUseFdpass yes\n")
}

#[test]
fn a_link_that_is_silent_for_a_while_keeps_the_streams_of_the_patient() {
    for fdpass in [false, true] {
        let world = World::new();
        world.write_client_config(&impatient_block(&world));
        let mut echo = Echo::begin(&world, "host2");
        let master = world.master("bastion").pid;
        let stopped = world.bastion_processes();
        stopped.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
        if fdpass {
            // Nothing was given away, so it goes on over another master.
            let said = world.ssh("hasty", "echo hi");
            assert_eq!(said.out, "hi\n", "{said:?}");
        } else {
            let said = impatient(&world, "127.0.0.3");
            assert_eq!(said.code, Some(69), "{said:?}");
            assert!(said.err.contains("the connection to bastion is silent"), "{said:?}");
            assert!(said.err.contains("hint: try again"), "{said:?}");
            // The next one does, and does not wait: it is no fault of the host's.
            let said = impatient(&world, "127.0.0.3");
            assert!(said.code == Some(0) && said.out.starts_with("SSH-2.0-"), "{said:?}");
        }
        assert_eq!(world.bastion_logins(), 2);
        stopped.iter().for_each(|pid| signal(*pid, Signal::SIGCONT));
        echo.says("after");
        echo.ends();
        assert!(world.pool.list().unwrap().iter().any(|info| info.pid == master && info.alive));
    }
}

#[test]
fn a_silent_host_behind_a_jump_host_that_runs_no_commands_costs_nobody_a_stream() {
    // One that waits for its input, and one that does not end whatever it gets.
    for command in ["cat", "sleep 60"] {
        let world = World::new();
        let config = fs::read_to_string(world.path("bastion.conf")).unwrap();
        fs::write(world.path("bastion.conf"), format!("ForceCommand {command}\n{config}")).unwrap();
        let _swallowing = world.swallow("127.0.0.9", world.port);
        world.pool.start(&world.endpoint("bastion"), Duration::from_secs(8), "true").unwrap();
        let mut echo = Echo::begin(&world, "host2");
        let said = impatient(&world, "127.0.0.9");
        assert_eq!(said.code, Some(69), "{said:?}");
        assert!(said.err.contains("check that 127.0.0.9 is up and that bastion can reach it"), "{said:?}");
        echo.says("after");
        echo.ends();
        let idle = || world.master("bastion").channels.is_some_and(|channels| channels <= 2);
        wait_until("nobody else is on it", idle);
        // Nor is it ended when nobody would miss it.
        let master = world.master("bastion").pid;
        let _swallowing = world.swallow("127.0.0.10", world.port);
        assert_eq!(impatient(&world, "127.0.0.10").code, Some(69));
        assert_eq!(world.ssh("host3", "echo hi").out, "hi\n");
        assert_eq!((world.master("bastion").pid, world.bastion_logins()), (master, 1), "{command}");
    }
}

#[test]
fn a_host_that_does_something_else_than_the_command_is_said_to() {
    let world = World::new();
    let config = fs::read_to_string(world.path("bastion.conf")).unwrap();
    let check = || {
        let config = world.path("ssh_config").display().to_string();
        world.proxy_says(&["check", "-F", &config, "--timeout", "4", "bastion"])
    };
    fs::write(world.path("bastion.conf"), format!("ForceCommand cat\n{config}")).unwrap();
    let said = check();
    assert_eq!(said.code, Some(0), "{said:?}");
    world.pool.stop(&world.master("bastion")).unwrap();
    fs::write(world.path("bastion.conf"), format!("ForceCommand sleep 60\n{config}")).unwrap();
    let said = check();
    assert_eq!(said.code, Some(69), "{said:?}");
    assert!(
        said.err.contains("has not ended it within 4 s") && said.err.contains("ForceCommand"),
        "{said:?}"
    );
    // It answers, so it is not left alone, nor is another one made.
    world.pool.start(&world.endpoint("bastion"), BOUND, "true").unwrap();
    assert_eq!(world.bastion_logins(), 2);
}
