//! The rooms of this package and the arrows between them are those drawn in ARCHITECTURE.md.

#[path = "../../proxy/tests/architecture/house.rs"]
mod house;

use std::collections::BTreeMap;

const MANIFEST: &str = env!("CARGO_MANIFEST_DIR");

fn real() -> BTreeMap<String, house::Room> {
    house::real(MANIFEST, "nix_offload", Some("nix_offload_proxy"))
}

#[test]
fn the_rooms_and_their_arrows_are_as_drawn() {
    let plan = house::plan(MANIFEST);
    let real = real();
    let found = house::differences(&house::drawn(&plan, "hook"), &real);
    assert!(found.is_empty(), "ARCHITECTURE.md and hook/src differ:\n{}", found.join("\n"));
    assert_eq!(house::without_row(&plan, "hook", &real), [""; 0], "rooms without a row in ARCHITECTURE.md");
}

#[test]
fn deciding_reading_and_speaking_are_pure() {
    let is_pure =
        |name: &str| ["plan", "wire", "config"].contains(&name.split("::").next().unwrap_or_default());
    let real = real();
    let found: Vec<&String> =
        real.iter().filter(|(name, room)| is_pure(name) && !room.pure).map(|(name, _)| name).collect();
    assert_eq!(found, [""; 0], "these lack the line that forbids I/O");
    assert!(real.keys().filter(|name| is_pure(name)).count() >= 7, "the pure rooms have other names now");
}

#[test]
fn what_belongs_to_one_room_is_named_nowhere_else() {
    let real = real();
    for (word, room) in [
        ("rusqlite", "store"),
        ("nix_archive", "store"),
        ("clap", "cli"),
        ("unsafe", "fds"),
        ("tokio", "(none)"),
        ("openssh_mux_client", "(none)"),
        ("tracing_journald", "(none)"),
        ("tracing_subscriber", "(none)"),
    ] {
        assert_eq!(house::naming(&real, word, room), [""; 0], "'{word}' belongs to {room} only");
    }
}

#[test]
fn the_words_of_the_hook_protocol_occur_in_one_room() {
    let real = real();
    for word in ["\"# accept", "\"# decline", "\"# postpone", "\"@nix "] {
        let found: Vec<&String> =
            real.iter().filter(|(_, room)| room.text.contains(word)).map(|(name, _)| name).collect();
        assert_eq!(found, ["wire::hook"], "{word}");
    }
}
