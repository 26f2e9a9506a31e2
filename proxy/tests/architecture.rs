//! The rooms of this package and the arrows between them are those drawn in ARCHITECTURE.md.

#[path = "architecture/house.rs"]
mod house;

const MANIFEST: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn the_rooms_and_their_arrows_are_as_drawn() {
    let plan = house::plan(MANIFEST);
    let real = house::real(MANIFEST, "nix_offload_proxy", None);
    let found = house::differences(&house::drawn(&plan, "proxy"), &real);
    assert!(found.is_empty(), "ARCHITECTURE.md and proxy/src differ:\n{}", found.join("\n"));
    assert_eq!(house::without_row(&plan, "proxy", &real), [""; 0], "rooms without a row in ARCHITECTURE.md");
}

#[test]
fn what_belongs_to_one_room_is_named_nowhere_else() {
    let real = house::real(MANIFEST, "nix_offload_proxy", None);
    for (word, room) in [
        ("tokio", "master::mux"),
        ("openssh_mux_client", "master::mux"),
        ("netlink_packet_core", "master::traffic"),
        ("netlink_packet_sock_diag", "master::traffic"),
        ("tracing_journald", "log"),
        ("tracing_subscriber", "log"),
        ("clap", "cli"),
        ("unsafe", "(none)"),
    ] {
        assert_eq!(house::naming(&real, word, room), [""; 0], "'{word}' belongs to {room} only");
    }
    // Its settings have their place in /etc/nix, where those of the hook are; nothing else.
    let knows_nix = |room: &house::Room| {
        room.text.replace("/etc/nix/offload.toml", "").contains("/nix/")
            || room.code.contains("nix_derivation")
    };
    let found: Vec<&String> = real.iter().filter(|(_, room)| knows_nix(room)).map(|(name, _)| name).collect();
    assert_eq!(found, [""; 0], "a ProxyCommand that has never heard of Nix does not need that");
}
