//! What has to be loaded before a hook begins, which each build waits for.

use std::process::Command;

/// Of libgcc_s and libm, too, which the standard library and SQLite ask for, each costs as much as all of the hook's own
/// beginning (`proxy/build.rs`, `.cargo/config.toml`).
#[test]
fn the_hook_needs_no_library_but_that_of_c() {
    let output = Command::new("ldd").arg(env!("CARGO_BIN_EXE_nix-offload")).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let names: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let is_known =
        |name: &&str| ["linux-vdso.so.1", "libc.so.6"].contains(name) || name.contains("/ld-linux");
    assert!(names.contains(&"libc.so.6") && names.iter().all(is_known), "{text}");
}
