//! A master that somebody opened by hand, and that is to be used because offload.toml says so.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use nix_offload_proxy::master::{Endpoint, Fault, Pool, StartError};

use crate::world::{BOUND, Echo, Trouble, World, session_on_any, signal, wait_until};

/// `ssh -M` of the user, with a key that opens.
struct ByHand {
    ssh: Child,
    path: PathBuf,
}

impl ByHand {
    fn open(world: &World) -> ByHand {
        let path = world.path("mine");
        let ssh = Command::new("ssh")
            .args(world.ssh_options("known_hosts"))
            .args(["-p", &world.port.to_string(), "-M", "-N", "-S"])
            .arg(&path)
            .arg("-i")
            .arg(world.path("user"))
            .arg("127.0.0.1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("the master takes connections", || path.exists());
        ByHand { ssh, path }
    }

    fn is_running(&mut self) -> bool {
        self.ssh.try_wait().unwrap().is_none()
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = self.ssh.kill();
        let _ = self.ssh.wait();
    }
}

fn pool(world: &World, path: &Path) -> Pool {
    world.pool_with(&format!("[[host]]\nname = '127.0.0.1'\ncontrol-path = '{}'\n", path.display()))
}

/// With a key that does not open: the pool alone cannot log in.
fn without_key(world: &World) -> Endpoint {
    Endpoint { identity: Some(world.path("stranger")), ..world.endpoint() }
}

fn assert_denied(error: &StartError) {
    assert!(matches!(error, StartError::Failed { fault: Fault::PermissionDenied { .. }, .. }), "{error:?}");
}

#[test]
fn it_is_used_and_belongs_to_whoever_opened_it() {
    let world = World::new();
    let mut by_hand = ByHand::open(&world);
    let pool = pool(&world, &by_hand.path);
    let endpoint = without_key(&world);
    let master = pool.start(&endpoint, BOUND, "true").unwrap();
    assert_eq!((master.control_path(), master.start_time()), (&*by_hand.path, None));
    assert_eq!(pool.live(&endpoint).unwrap().control_path(), by_hand.path);
    let (on, session) = session_on_any(&pool, &endpoint, "cat", BOUND).unwrap();
    assert_eq!(on.control_path(), by_hand.path);
    let mut echo = Echo::of(session);
    echo.says("before");
    assert_eq!(world.logins(), 1);

    // It is neither shown nor ended.
    assert_eq!(pool.list().unwrap(), []);
    let stopped = world.command().args(["stop", "--all"]).output().unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(!master.retire());
    assert!(by_hand.is_running() && by_hand.path.exists());
    echo.says("after");
    echo.ends();
}

#[test]
fn the_commands_use_it_too() {
    let world = World::new();
    let by_hand = ByHand::open(&world);
    let check = || {
        let mut check = world.command();
        check.args(["check", "127.0.0.1", "-p", &world.port.to_string(), "-i"]).arg(world.path("stranger"));
        check.args(world.endpoint_of_command().ssh_options).output().unwrap()
    };
    let refused = check();
    assert_eq!(refused.status.code(), Some(77), "it is not set yet: {refused:?}");
    pool(&world, &by_hand.path);
    let done = check();
    assert!(done.status.success(), "{done:?}");
    assert_eq!(world.logins(), 1);
}

#[test]
fn without_the_setting_or_with_a_pinned_key_it_is_not_used() {
    let world = World::new();
    let by_hand = ByHand::open(&world);
    assert_denied(&world.pool.start(&without_key(&world), BOUND, "true").unwrap_err());
    let other =
        world.pool_with(&format!("[[host]]\nname = 'other'\ncontrol-path = '{}'\n", by_hand.path.display()));
    assert_denied(&other.start(&without_key(&world), BOUND, "true").unwrap_err());
    let pool = pool(&world, &by_hand.path);
    let pinned = Endpoint { host_keys: Some(world.public_key("host")), ..without_key(&world) };
    assert!(pool.live(&pinned).is_none());
    assert_denied(&pool.start(&pinned, BOUND, "true").unwrap_err());
    assert_eq!(world.logins(), 1);
}

#[test]
fn when_it_is_gone_the_pool_makes_its_own() {
    let world = World::new();
    let by_hand = ByHand::open(&world);
    let path = by_hand.path.clone();
    let pool = pool(&world, &path);
    pool.start(&without_key(&world), BOUND, "true").unwrap();
    // Killed, so that its socket is left behind.
    drop(by_hand);
    assert!(path.exists());
    assert!(pool.live(&without_key(&world)).is_none());
    assert_denied(&pool.start(&without_key(&world), BOUND, "true").unwrap_err());
    match session_on_any(&pool, &without_key(&world), "true", BOUND).map(drop).unwrap_err() {
        Trouble::Start(error) => assert_denied(&error),
        Trouble::Open(error) => panic!("{error:?}"),
    }
    let own = pool.start(&world.endpoint(), BOUND, "true").unwrap();
    assert!(own.control_path().starts_with(pool.directory()));
    assert_eq!(world.logins(), 2);
    assert!(path.exists(), "the file is not ours to remove");
}

#[test]
fn when_it_hangs_another_way_is_taken_and_it_is_left_alone_for_a_while() {
    let world = World::new();
    let mut by_hand = ByHand::open(&world);
    let pool = pool(&world, &by_hand.path);
    signal(by_hand.ssh.id(), Signal::SIGSTOP);
    let begin = Instant::now();
    let (own, _) = session_on_any(&pool, &world.endpoint(), "true", Duration::from_secs(1)).unwrap();
    // Stated: the caller's own bound and a second.
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    assert!(own.control_path().starts_with(pool.directory()));
    assert_eq!(world.logins(), 2);
    let begin = Instant::now();
    let (again, _) = session_on_any(&pool, &world.endpoint(), "true", BOUND).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    assert_eq!(again.control_path(), own.control_path());
    signal(by_hand.ssh.id(), Signal::SIGCONT);
    assert_eq!(pool.start(&world.endpoint(), BOUND, "true").unwrap().control_path(), own.control_path());
    assert!(by_hand.is_running());
    assert_eq!(world.logins(), 2);
}

#[test]
fn a_start_that_finds_it_hanging_lets_the_others_know() {
    let world = World::new();
    let by_hand = ByHand::open(&world);
    let pool = pool(&world, &by_hand.path);
    signal(by_hand.ssh.id(), Signal::SIGSTOP);
    assert_denied(&pool.start(&without_key(&world), BOUND, "true").unwrap_err());
    // Nobody is sent to it for a while.
    assert!(pool.live(&without_key(&world)).is_none());
}
