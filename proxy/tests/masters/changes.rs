//! ssh_config says something else than when the master was started.

use std::{fs, path::Path};

use nix_offload_proxy::master::Endpoint;

use crate::{
    ssh_config::{base, endpoint, way, write_config},
    world::{BOUND, Echo, World, gone, wait_until},
};

/// The block of a host that leads to a world's sshd.
fn block(world: &World) -> String {
    let known_hosts = world.path("known_hosts");
    format!("Host mac\n {}\n UserKnownHostsFile {}\n", way(world).join("\n "), known_hosts.display())
}

fn mac(world: &World) -> Endpoint {
    endpoint(world, "mac")
}

/// A master was started to `here`. Now that the configuration leads to `there`, so does the next start, and what runs on
/// the old master goes on.
fn assert_moved(here: &World, there: &World, change: impl FnOnce()) {
    let old = here.pool.start(&mac(here), BOUND, "true").unwrap();
    let pid = here.only_master().pid;
    let (logins, logins_there) = (here.logins(), there.logins());
    assert!(here.pool.live(&mac(here)).is_some());
    let mut echo = Echo::of(old.open_session("cat", BOUND).unwrap());
    echo.says("before");
    change();
    assert!(here.pool.live(&mac(here)).is_none(), "the change is noticed");
    let new = here.pool.start(&mac(here), BOUND, "true").unwrap();
    assert_eq!((here.logins(), there.logins()), (logins, logins_there + 1));
    assert_ne!(here.only_master().pid, pid);
    echo.says("after");
    new.open_session("true", BOUND).unwrap();
    assert!(!gone(pid));
    assert!(here.pool.live(&mac(here)).is_some());
    echo.says("still");
    echo.ends();
    wait_until("the old master ends with its last stream", || gone(pid));
    new.open_session("true", BOUND).unwrap();
    assert_eq!((here.logins(), there.logins()), (logins, logins_there + 1));
}

#[test]
fn a_host_that_has_moved_gets_a_new_master_and_the_old_one_ends_with_its_last_stream() {
    let (here, there) = (World::new(), World::new());
    write_config(&here, &block(&here));
    assert_moved(&here, &there, || write_config(&here, &block(&there)));
    // And back. Nothing ran over this one, so it ends at once.
    let pid = here.only_master().pid;
    write_config(&here, &block(&here));
    here.pool.start(&mac(&here), BOUND, "true").unwrap();
    wait_until("the old master ends", || gone(pid));
    assert_eq!((here.logins(), there.logins()), (2, 1));
}

#[test]
fn another_user_is_another_connection() {
    let world = World::with_sshd(|_| "AllowUsers nobody root".into());
    // sshd reads authorized_keys with the rights of nobody.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    fs::set_permissions(world.directory.path(), open).unwrap();
    write_config(&world, &block(&world));
    world.pool.start(&mac(&world), BOUND, "true").unwrap();
    assert!(!world.sshd_log().contains("Accepted publickey for nobody"));
    write_config(&world, &format!("{} User nobody\n", block(&world)));
    world.pool.start(&mac(&world), BOUND, "true").unwrap();
    assert!(world.sshd_log().contains("Accepted publickey for nobody"));
}

#[test]
fn a_file_that_says_the_same_in_other_words_changes_nothing() {
    let world = World::new();
    write_config(&world, &block(&world));
    let master = world.pool.start(&mac(&world), BOUND, "true").unwrap();
    let pid = world.only_master().pid;
    let mut echo = Echo::of(master.open_session("cat", BOUND).unwrap());
    let more = ["# A comment\n", "Host other\n Port 9\n", ""];
    for more in more {
        write_config(&world, &format!("{}\n{more}", block(&world)));
        assert!(world.pool.live(&mac(&world)).is_none(), "nobody has asked ssh yet");
        let same = world.pool.start(&mac(&world), BOUND, "true").unwrap();
        assert_eq!((same.start_time(), same.control_path()), (None, master.control_path()));
        assert!(world.pool.live(&mac(&world)).is_some(), "now it is known");
        assert!(world.pool.live_to("mac", 22).is_some());
    }
    assert_eq!((world.only_master().pid, world.logins()), (pid, 1));
    echo.says("still");
    echo.ends();
}

#[test]
fn a_new_file_in_an_included_directory_is_noticed() {
    let (here, there) = (World::new(), World::new());
    let parts = here.path("parts");
    fs::create_dir(&parts).unwrap();
    write_config(&here, &format!("Include {}/*.conf\n{}", parts.display(), block(&here)));
    // ssh does not name a directory that it found nothing in, nor one that it did.
    assert_moved(&here, &there, || fs::write(parts.join("b.conf"), block(&there)).unwrap());
    fs::write(parts.join("b.conf"), "Host other\n Port 9\n").unwrap();
    assert_moved(&here, &there, || fs::write(parts.join("a.conf"), block(&there)).unwrap());
    // One that was there says something else, or is there no more.
    fs::write(parts.join("a.conf"), "").unwrap();
    assert_moved(&here, &there, || fs::write(parts.join("b.conf"), block(&there)).unwrap());
    fs::remove_file(parts.join("b.conf")).unwrap();
    let logins = here.logins();
    here.pool.start(&mac(&here), BOUND, "true").unwrap();
    assert_eq!(here.logins(), logins + 1);
}

#[test]
fn a_file_of_configuration_that_is_made_later_is_noticed() {
    let (here, there) = (World::new(), World::new());
    let late: &Path = &here.path("late");
    let config = format!("Include {}\n{}{}", late.display(), block(&here), base(&here));
    fs::write(here.path("config"), config).unwrap();
    assert_moved(&here, &there, || fs::write(late, block(&there)).unwrap());
}
