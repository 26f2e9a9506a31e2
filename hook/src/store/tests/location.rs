use super::*;
use std::ffi::OsString;

fn parse(setting: &str) -> Result<Location, LocationError> {
    Location::parse(setting, |_| None)
}

fn location(store: &str, real: &str, state: &str) -> Location {
    Location { store_dir: store.parse().unwrap(), real_store_dir: real.into(), state_dir: state.into() }
}

#[test]
fn the_default_store_is_where_nix_has_it() {
    for setting in ["auto", "", "local", "local://", "local:", "local?trusted=true", "auto?"] {
        assert_eq!(
            parse(setting).unwrap(),
            location("/nix/store", "/nix/store", "/nix/var/nix"),
            "{setting}"
        );
    }
}

#[test]
fn every_spelling_of_a_root_means_the_same() {
    let expected = location("/nix/store", "/a b/%/nix/store", "/a b/%/nix/var/nix");
    for setting in [
        "/a b/%",
        "/a b/./c/..//%/",
        "/a b/%?trusted=1",
        "local:///a%20b/%25",
        "local:/a%20b/%25",
        "local:///a b/%25?require-sigs=false",
        "local?root=/a%20b/%25",
        "local://?root=/a b/%25",
        "auto?root=/a%20b/%25",
        "local:///ignored?root=/a%20b/%25",
        "local?root=/a%20b/%25&root=/second",
        "local?dubious&root=/a%20b/%25",
    ] {
        assert_eq!(parse(setting).unwrap(), expected, "{setting}");
    }
}

#[test]
fn parameters_win_over_the_root() {
    assert_eq!(
        parse("local?root=/r&state=/s&real=/x&store=/gnu/store").unwrap(),
        location("/gnu/store", "/x", "/s")
    );
    assert_eq!(
        parse("local?store=/gnu/store").unwrap(),
        location("/gnu/store", "/gnu/store", "/nix/var/nix")
    );
    assert_eq!(
        parse("/r?store=/gnu/store").unwrap(),
        location("/gnu/store", "/r/nix/store", "/r/nix/var/nix")
    );
}

#[test]
fn the_environment_gives_the_defaults_only() {
    let env = |name: &str| {
        let value = match name {
            "NIX_STORE_DIR" => "/e/store/",
            "NIX_STORE" => "/never",
            "NIX_STATE_DIR" => "/e/state",
            _ => return None,
        };
        Some(OsString::from(value))
    };
    let own = location("/e/store", "/e/store", "/e/state");
    assert_eq!(Location::parse("auto", env).unwrap(), own);
    assert_eq!(Location::parse("local?root=", env).unwrap(), own);
    assert_eq!(Location::parse("/r", env).unwrap(), location("/e/store", "/r/nix/store", "/r/nix/var/nix"));
    let empty = |name: &str| (name == "NIX_STATE_DIR").then(OsString::new);
    assert_eq!(Location::parse("auto", empty).unwrap().state_dir, Path::new("/nix/var/nix"));
}

#[test]
fn stores_of_others_are_not_local() {
    for setting in [
        "daemon",
        "daemon?root=/x",
        "unix://",
        "unix:///run/socket",
        "file:///cache",
        "ssh://host",
        "ssh-ng://host/path",
        "https://cache.example/a/b",
        "local-overlay://",
        "dummy://",
        "foo",
        "localhost",
        "Local",
    ] {
        assert!(matches!(parse(setting), Err(LocationError::NotLocal { .. })), "{setting}");
    }
}

#[test]
fn relative_paths_and_bad_escapes_are_refused() {
    for setting in ["./store", "a/b", "~/store", "local://store", "local?root=store", "local?state=."] {
        assert!(matches!(parse(setting), Err(LocationError::Relative { .. })), "{setting}");
    }
    for setting in ["local?root=/%2", "local:///%zz", "local?root=/%ff", "local?root=/%+1"] {
        assert!(matches!(parse(setting), Err(LocationError::Escape { .. })), "{setting}");
    }
    assert!(matches!(parse("local?root=/%00"), Err(LocationError::Relative { .. })));
}

#[test]
fn a_state_directory_with_a_foreign_socket_belongs_to_the_daemon() {
    let dir = TempDir::new().unwrap();
    let state = dir.path().join("absent");
    let socket = dir.path().join("socket");
    let env = |name: &str| match name {
        "NIX_STATE_DIR" => Some(state.clone().into_os_string()),
        "NIX_DAEMON_SOCKET_PATH" => Some(socket.clone().into_os_string()),
        _ => None,
    };
    assert_eq!(Location::find("auto", env).unwrap().state_dir, state);
    fs::write(&socket, b"").unwrap();
    assert!(matches!(Location::find("auto", env), Err(LocationError::NotLocal { .. })));
    assert_eq!(Location::find("local", env).unwrap().state_dir, state);
    fs::create_dir(&state).unwrap();
    assert_eq!(Location::find("auto", env).unwrap().state_dir, state);
}
