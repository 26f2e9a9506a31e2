//! What a build says on its machine is seen at the client.

use harness::{Hook, World, drv};

crate::theirs_and_ours!(lines_are_seen_and_kept, a_failed_directory_is_kept_there);

fn lines_are_seen_and_kept(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    for protocol in ["ssh", "ssh-ng"] {
        let client = world.client().named(protocol).hook(hook.clone()).uses(&mac, protocol, 2).start();
        let name = format!("talks-{protocol}");
        let talks = drv::script(&name, "echo one line; echo another line >&2; echo x > $out");
        let built = client.nix_build(&talks, &["-j0"]);
        built.assert_success().assert_stderr_has("one line").assert_stderr_has("another line");
        assert!(built.stderr().contains(&format!("on '{protocol}://mac'")), "{built}");
        let log = client.build_log(&built.out_path());
        assert!(log.contains("one line\nanother line\n"), "{log}");
    }
}

fn a_failed_directory_is_kept_there(hook: Hook) {
    let world = World::new();
    let mac = world.builder("mac").start();
    let client = world.client().hook(hook).uses(&mac, "ssh", 2).start();
    let bad = drv::script("bad", "echo here > left-over; exit 1");
    let built = client.nix_build(&bad, &["-j0", "--keep-failed"]);
    built.assert_failure().assert_stderr_has("keeping build directory");
    let (_, rest) = built.stderr().split_once("keeping build directory '").unwrap();
    let (directory, _) = rest.split_once('\'').unwrap();
    assert_eq!(mac.read(&format!("{directory}/left-over")), "here\n");
}
