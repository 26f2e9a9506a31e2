//! Programs that bring ssh along or know a ProxyCommand only: rsync, git, Python's paramiko.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

use crate::world::{MIB, PYTHON, Said, World, hash_of, pattern_file, run, wait_until};

/// Some hundred files in some directories, a large one, an empty one and a link.
fn make_tree(root: &Path) {
    for number in 0..300 {
        let directory = root.join(format!("{}/{}", number % 7, number % 3));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(format!("file {number}")), format!("{number}\n").repeat(number)).unwrap();
    }
    pattern_file(&root.join("large"), 32 * MIB);
    fs::write(root.join("empty"), "").unwrap();
    symlink("large", root.join("link")).unwrap();
}

fn assert_same_tree(one: &Path, other: &Path) {
    let said: Said =
        Command::new("diff").args(["-r", "--no-dereference"]).args([one, other]).output().unwrap().into();
    assert_eq!(said.code, Some(0), "{said:?}");
}

#[test]
fn trees_are_copied_both_ways_by_rsync() {
    let world = World::new();
    let tree = world.path("tree");
    make_tree(&tree);
    let shell = format!("ssh -F {}", world.path("ssh_config").display());
    let rsync = |from: &str, to: &str| run(world.command("rsync").args(["-a", "-e", &shell, from, to]));
    for host in ["host2", "fd3"] {
        let (there, back) = (world.path(&format!("there-{host}")), world.path(&format!("back-{host}")));
        let remote = format!("{host}:{}/", there.display());
        rsync(&format!("{}/", tree.display()), &remote);
        assert_same_tree(&tree, &there);
        rsync(&remote, &format!("{}/", back.display()));
        assert_same_tree(&tree, &back);
        // A second time only what has changed is sent.
        fs::write(tree.join("0/0/changed"), host).unwrap();
        rsync(&format!("{}/", tree.display()), &remote);
        assert_same_tree(&tree, &there);
    }
    assert_eq!(world.bastion_logins(), 1);
    wait_until("no process stays", || world.proxies() == 0);
}

/// git with nobody's configuration, and this world's ssh.
fn git(world: &World, directory: &Path) -> Command {
    let mut git = world.command("git");
    git.arg("-C")
        .arg(directory)
        .args(["-c", "init.defaultBranch=main"])
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .env("GIT_SSH_COMMAND", format!("ssh -F {}", world.path("ssh_config").display()))
        .stdout(Stdio::null());
    for role in ["AUTHOR", "COMMITTER"] {
        git.env(format!("GIT_{role}_NAME"), "A Person")
            .env(format!("GIT_{role}_EMAIL"), "person@example.com");
    }
    git
}

#[test]
fn repositories_are_cloned_and_pushed_to_by_git() {
    let world = World::new();
    for host in ["host2", "fd3"] {
        let home = world.path(host);
        let (bare, first, second) = (home.join("bare.git"), home.join("first"), home.join("second"));
        let remote = format!("{host}:{}", bare.display());
        let commit = |repository: &Path, message: &str| {
            run(git(&world, repository).args(["add", "."]));
            run(git(&world, repository).args(["commit", "-q", "-m", message]));
        };
        let head = |repository: &Path| -> String {
            let output = git(&world, repository).args(["rev-parse", "main"]).stdout(Stdio::piped()).output();
            String::from_utf8(output.unwrap().stdout).unwrap()
        };
        fs::create_dir(&home).unwrap();
        run(git(&world, &home).args(["init", "-q", "--bare", "-b", "main"]).arg(&bare));

        run(git(&world, &home).args(["clone", "-q", &remote]).arg(&first).stderr(Stdio::null()));
        pattern_file(&first.join("large"), 8 * MIB);
        commit(&first, "a large file");
        run(git(&world, &first).args(["push", "-q", "origin", "HEAD:main"]));
        assert_eq!(head(&bare), head(&first));

        run(git(&world, &home).args(["clone", "-q", &remote]).arg(&second));
        assert_eq!(hash_of(&second.join("large")), hash_of(&first.join("large")));
        fs::write(second.join("small"), host).unwrap();
        commit(&second, "a small file");
        run(git(&world, &second).args(["push", "-q", "origin", "main"]));
        run(git(&world, &first).args(["pull", "-q", "--ff-only", "origin", "main"]));
        assert_eq!(fs::read_to_string(first.join("small")).unwrap(), host);
        assert_eq!(head(&first), head(&second));
        run(git(&world, &bare).args(["fsck", "--full", "--strict"]).stderr(Stdio::null()));
    }
    assert_eq!(world.bastion_logins(), 1);
    wait_until("no process stays", || world.proxies() == 0);
}

#[test]
fn paramiko_that_knows_a_proxy_command_only_works() {
    let world = World::new();
    let hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"];
    let port = world.port.to_string();
    let wanted = pattern_file(&world.path("large"), 8 * MIB);
    let known_hosts = |name: &str, key: &str| {
        let key = fs::read_to_string(world.path(key)).unwrap();
        fs::write(world.path(name), hosts.map(|host| format!("[{host}]:{port} {key}")).concat()).unwrap();
    };
    known_hosts("right", "host.pub");
    known_hosts("wrong", "user.pub");
    let client = |known_hosts: &str| -> Said {
        world
            .command(PYTHON)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/proxycommand/paramiko_client.py"))
            .arg(world.proxy_command("--via bastion"))
            .args([world.path(known_hosts), world.path("user")])
            .arg(&port)
            .args([world.path("large"), world.path("")])
            .args(hosts)
            .output()
            .unwrap()
            .into()
    };
    let said = client("right");
    assert_eq!(said.code, Some(0), "{said:?}");
    let there: Vec<_> = said.out.lines().filter_map(|line| line.split(' ').nth(2)).collect();
    assert_eq!(there, hosts, "{said:?}");
    for host in hosts {
        for place in ["there", "back"] {
            assert_eq!(hash_of(&world.path(&format!("{place}-{host}"))), wanted, "{place} {host}");
        }
    }
    // What comes through is the host itself, with its own key.
    let refused = client("wrong");
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert_eq!(world.bastion_logins(), 1);
    wait_until("no process stays", || world.proxies() == 0);
}
