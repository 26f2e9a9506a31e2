//! An ssh that was told to say nothing still says why it fails; an agent that does not sign is told from a wrong key.

use std::{
    fs,
    process::{Child, Command, Stdio},
};

use nix_offload_proxy::master::{Endpoint, Fault, StartError};

use crate::{
    ssh_config::{endpoint, way, write_config},
    world::{BOUND, World, free_port, wait_until},
};

fn fault(world: &World, endpoint: &Endpoint) -> Fault {
    match world.pool.start(endpoint, BOUND, "true").unwrap_err() {
        StartError::Failed { fault, .. } => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn whatever_level_of_its_log_is_set_the_culprit_is_found() {
    let world = World::new();
    let denied = Fault::PermissionDenied { methods: "publickey".into() };
    let stranger = format!("IdentityFile {}", world.path("stranger").display());
    let [name, port, _] = way(&world);
    for level in ["QUIET", "FATAL", "quiet", "ERROR", "INFO"] {
        write_config(&world, &format!("Host mac\n {name}\n {port}\n {stranger}\n LogLevel {level}\n"));
        assert_eq!(fault(&world, &endpoint(&world, "mac")), denied, "{level}");
    }
    write_config(&world, &format!("Host mac\n {name}\n Port {}\n LogLevel FATAL\n", free_port()));
    let refused = fault(&world, &endpoint(&world, "mac"));
    assert!(matches!(refused, Fault::Refused { .. }), "{refused:?}");
    write_config(&world, &format!("Host mac\n {name}\n {port}\n {stranger}\n"));
    for words in [&["-q"][..], &["-4q"], &["-o", "LogLevel=QUIET"], &["-oLogLevel=FATAL", "-q"]] {
        let mut endpoint = endpoint(&world, "mac");
        endpoint.ssh_options.extend(words.iter().map(ToString::to_string));
        assert_eq!(fault(&world, &endpoint), denied, "{words:?}");
    }
}

#[test]
fn a_change_of_the_configuration_is_seen_by_who_wants_to_hear_nothing() {
    let world = World::new();
    let block = format!("Host mac\n {}\n LogLevel QUIET\n", way(&world).join("\n "));
    for words in [&["-q"][..], &["-o", "LogLevel=QUIET"]] {
        write_config(&world, &block);
        let mut endpoint = endpoint(&world, "mac");
        endpoint.ssh_options.extend(words.iter().map(ToString::to_string));
        let before = world.logins();
        world.pool.start(&endpoint, BOUND, "true").unwrap();
        write_config(&world, &format!("{block} Compression yes\n"));
        world.pool.start(&endpoint, BOUND, "true").unwrap();
        assert_eq!(world.logins() - before, 2, "{words:?}");
    }
}

/// An agent that ends with the test.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_agent_that_does_not_sign_is_named() {
    let world = World::new();
    let socket = world.path("agent");
    let agent = Command::new("ssh-agent")
        .args(["-D", "-a"])
        .arg(&socket)
        // Asks for each use of a key that wants to be confirmed, and is told no.
        .envs([("SSH_ASKPASS", "/bin/false"), ("SSH_ASKPASS_REQUIRE", "force")])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let _agent = Agent(agent);
    wait_until("the agent listens", || socket.exists());
    let add = |words: &[&str]| {
        let mut add = Command::new("ssh-add");
        add.arg("-q").args(words).arg(world.path("user")).env("SSH_AUTH_SOCK", &socket);
        assert!(add.status().unwrap().success());
    };
    add(&["-c"]);
    // The agent alone has the private half.
    fs::copy(world.path("user.pub"), world.path("public.pub")).unwrap();
    let mut endpoint = Endpoint { identity: Some(world.path("public.pub")), ..world.endpoint() };
    let agent = format!("IdentityAgent={}", socket.display());
    endpoint.ssh_options.retain(|word| word != "IdentityAgent=none");
    endpoint.ssh_options.push(agent);
    let error = world.pool.start(&endpoint, BOUND, "true").unwrap_err();
    let (line, cure) = (error.to_string(), error.cure().unwrap());
    assert!(matches!(error, StartError::Failed { fault: Fault::AgentRefused { .. }, .. }), "{error:?}");
    assert!(line.contains("signing failed for ED25519") && line.contains("refused operation"), "{line}");
    assert!(cure.contains("agent") && cure.contains("touch") && !cure.contains("authorized_keys"), "{cure}");
    assert!(error.exit_code() == 77 && !error.is_temporary());
    // With its consent it is a key like any other.
    add(&[]);
    world.pool.start(&endpoint, BOUND, "true").unwrap();
}
