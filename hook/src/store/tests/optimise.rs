use super::*;

fn names(dir: &Path) -> BTreeSet<std::ffi::OsString> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

#[test]
fn the_links_are_those_that_nix_makes() {
    let (theirs, ours) = (World::new(), World::new());
    let (first, second) = (ours.dir.path().join("first"), ours.dir.path().join("second"));
    nasty_tree(&first);
    nasty_tree(&second);
    fs::write(second.join("more"), b"more").unwrap();
    fs::create_dir(second.join("dir-of-equals")).unwrap();
    for name in ["a", "b", "c"] {
        fs::write(second.join("dir-of-equals").join(name), b"plain").unwrap();
    }
    let file = ours.dir.path().join("file");
    fs::write(&file, b"plain").unwrap();

    let mut freed = Optimised::default();
    let mut paths = Vec::new();
    for source in [&first, &second, &file] {
        let added: StorePath = theirs.nix_line(&["--add", source.to_str().unwrap()]).parse().unwrap();
        let info = theirs.query().path_info(&added).unwrap().unwrap();
        ours.restore(&added, &dump_by_nix(source), None).unwrap();
        let optimised = optimise(&ours.location, &added).unwrap();
        freed.files_linked += optimised.files_linked;
        freed.bytes_freed += optimised.bytes_freed;
        ours.register(&[info]).unwrap();
        paths.push(added);
    }
    theirs.nix(&["--optimise"]);
    for path in &paths {
        assert_eq!(metadata(&ours.location.real_path(path)), metadata(&theirs.location.real_path(path)));
    }
    let [our_links, their_links] =
        [&ours, &theirs].map(|world| names(&world.location.real_store_dir.join(".links")));
    assert_eq!(our_links, their_links);
    assert_eq!(names(&ours.location.real_store_dir).len(), paths.len() + 1, "no temporary links are left");
    assert!(freed.files_linked > 20 && freed.bytes_freed > 3_000_000, "{freed:?}");
    ours.verify();

    assert_eq!(optimise(&ours.location, &paths[0]).unwrap(), Optimised::default());
    ours.nix(&["--gc"]);
    assert!(names(&ours.location.real_store_dir.join(".links")).is_empty());
}

#[test]
fn a_damaged_link_is_replaced_and_writable_files_stay() {
    let world = World::new();
    let [a, b, c] = ["a", "b", "c"].map(store_path);
    world.import(&a, &file_nar(b"same", false), &[]);
    optimise(&world.location, &a).unwrap();
    let dir = world.location.real_store_dir.join(".links");
    let link = dir.join(names(&dir).first().unwrap());
    fs::remove_file(&link).unwrap();
    fs::write(&link, b"damaged").unwrap();

    world.restore(&b, &file_nar(b"same", false), None).unwrap();
    assert_eq!(optimise(&world.location, &b).unwrap(), Optimised::default());
    assert_eq!(fs::read(world.location.real_path(&b)).unwrap(), b"same");
    assert_eq!(fs::read(&link).unwrap(), b"same");

    world.restore(&c, &file_nar(b"same", false), None).unwrap();
    let place = world.location.real_path(&c);
    fs::set_permissions(&place, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(optimise(&world.location, &c).unwrap(), Optimised::default());
    assert_eq!(fs::symlink_metadata(place).unwrap().nlink(), 1);
}
