use super::*;
use std::collections::BTreeSet;

fn machine(uri: &str) -> Machine {
    Machine::for_uri(uri, BTreeSet::new()).unwrap()
}

fn interest<'a>(directory: &Path, machines: &'a [Machine], every: u64) -> Interest<'a> {
    Interest {
        directory: directory.to_owned(),
        machines,
        every: Some(Duration::from_secs(every)),
        slots: "/slots".into(),
        store_dir: "/nix/store".into(),
        file: OnceCell::new(),
    }
}

fn post(directory: &Path) -> Post {
    let lock =
        OpenOptions::new().write(true).create(true).truncate(false).open(directory.join(LOCK)).unwrap();
    Post { directory: directory.to_owned(), lock }
}

#[test]
fn a_list_is_written_once_and_touched_afterwards() {
    let above = tempfile::tempdir().unwrap();
    let directory = above.path().join("sample");
    let machines =
        [machine("ssh-ng://a"), machine("https://foreign"), machine("ssh://b?remote-store=/srv/x")];
    let every = Duration::from_secs(5);
    interest(&directory, &machines, 5).touch(every).unwrap();
    let post = post(&directory);
    let [(path, _)] = &post.lists()[..] else { panic!() };
    let list = post.read(path).unwrap();
    assert_eq!((list.every_ms, list.slots.as_path()), (5000, Path::new("/slots")));
    let subjects: Vec<_> = list.machines.iter().map(|m| (m.name.as_str(), m.store_dir.as_deref())).collect();
    let expected =
        [("ssh-ng://a", Some("/nix/store")), ("ssh://b?remote-store=/srv/x", Some("/srv/x/nix/store"))];
    assert_eq!(subjects, expected);

    let long_ago = SystemTime::now() - Duration::from_secs(100);
    File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
    let before = fs::metadata(path).unwrap().ino();
    interest(&directory, &machines, 5).touch(every).unwrap();
    let lists = post.lists();
    assert_eq!((lists.len(), fs::metadata(path).unwrap().ino()), (1, before));
    assert!(lists[0].1.elapsed().unwrap_or_default() < Duration::from_secs(50));

    interest(&directory, &machines[..1], 5).touch(every).unwrap();
    interest(&directory, &machines, 6).touch(Duration::from_secs(6)).unwrap();
    assert_eq!(post.lists().len(), 3, "other lists have other files");
    post.remove(path);
    assert_eq!(post.lists().len(), 2);
}

#[test]
fn a_list_that_cannot_be_read_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let post = post(directory.path());
    for text in ["", "{}", "nonsense", "{\"every_ms\":-1}"] {
        let path = directory.path().join("a.list");
        fs::write(&path, text).unwrap();
        assert!(post.lists().len() == 1 && post.read(&path).is_none(), "{text}");
    }
    assert!(post.read(Path::new("/no/such/file")).is_none());
}

#[test]
fn the_post_is_lost_with_its_lock() {
    let directory = tempfile::tempdir().unwrap();
    let post = post(directory.path());
    assert!(post.is_held());
    fs::remove_file(directory.path().join(LOCK)).unwrap();
    assert!(!post.is_held());
    fs::write(directory.path().join(LOCK), "").unwrap();
    assert!(!post.is_held(), "that is another one's");
}

#[test]
fn the_store_of_a_machine_is_where_its_line_says() {
    let store_dir = |uri: &str| store_dir(&machine(uri), "/nix/store");
    for (uri, expected) in [
        ("ssh-ng://m", Some("/nix/store")),
        ("ssh://m?remote-store=auto", Some("/nix/store")),
        ("ssh://m?remote-store=/srv/x/", Some("/srv/x/nix/store")),
        ("ssh://m?remote-store=local%3Froot%3D/srv/y", Some("/srv/y/nix/store")),
        ("ssh://m?remote-store=local%3Fstore%3D/s%26real%3D/srv/z/s", Some("/srv/z/s")),
        ("ssh://m?remote-store=local:///srv/x", Some("/srv/x/nix/store")),
        ("ssh://m?remote-store=ssh://other", None),
        ("daemon", Some("/nix/store")),
        ("local?root=/srv/w", Some("/srv/w/nix/store")),
        ("/srv/v", Some("/srv/v/nix/store")),
        ("unix:///run/other.socket", None),
    ] {
        assert_eq!(store_dir(uri).as_deref(), expected, "{uri}");
    }
}
