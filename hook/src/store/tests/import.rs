use super::super::database::says_wal;
use super::*;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

#[test]
fn outputs_may_refer_to_each_other_and_themselves() {
    let world = World::new();
    let [input, dev, out] = ["input", "out-dev", "out"].map(store_path);
    world.import(&input, &file_nar(b"input", false), &[]);
    let infos = [(&out, vec![&out, &dev, &input]), (&dev, vec![&dev, &input])].map(|(path, references)| {
        let restored = world.restore(path, &file_nar(path.name().as_bytes(), false), None).unwrap();
        info(path, &restored, &references)
    });
    world.register(&infos).unwrap();
    world.verify();
    let references = world.nix_line(&["-q", "--references", &out.to_string()]);
    let references: BTreeSet<StorePath> = references.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(references, set(&[&input, &dev, &out]));
    let referrers = world.nix_line(&["-q", "--referrers", &input.to_string()]);
    assert_eq!(referrers.lines().count(), 2);
    // Self references must not keep Nix from deleting.
    world.nix(&["--delete", &out.to_string()]);
    assert!(!world.location.real_path(&out).exists());
    world.nix(&["--gc"]);
    assert!(!world.query().is_valid(&input).unwrap());
    world.verify();
}

#[test]
fn every_column_is_written_as_nix_does() {
    let world = World::new();
    let path = store_path("out");
    let deriver = store_path("out.drv");
    let restored = world.restore(&path, &file_nar(b"x", false), None).unwrap();
    let full = PathInfo {
        deriver: Some(deriver.clone()),
        signatures: [
            "b:AQ==", "a:AAEC", "", "no colon", ":AAEC", "c:", "d:A", "e f:AAEC", "g:%%%%", "b:AQ==",
        ]
        .map(str::to_owned)
        .to_vec(),
        ..info(&path, &restored, &[])
    };
    world.register(std::slice::from_ref(&full)).unwrap();
    let hash = NixHash::Sha256(restored.nar_hash).to_nix_base16_string();
    let size = i64::try_from(restored.nar_size).unwrap();
    assert_eq!(
        world.row(&path),
        (
            hash,
            1_700_000_000,
            Some(deriver.to_string()),
            Some(size),
            None,
            Some("a:AAEC b:AQ==".into()),
            None
        )
    );
    let found = world.query().path_info(&path).unwrap().unwrap();
    assert_eq!(
        found,
        PathInfo { ultimate: false, signatures: vec!["a:AAEC".into(), "b:AQ==".into()], ..full }
    );
    assert_eq!(world.nix_line(&["-q", "--deriver", &path.to_string()]), deriver.to_string());

    let fresh = store_path("fresh");
    let restored = world.restore(&fresh, &file_nar(b"y", false), None).unwrap();
    world.register(&[PathInfo { registration_time: 0, ..info(&fresh, &restored, &[]) }]).unwrap();
    let (_, time, deriver, .., sigs, ca) = world.row(&fresh);
    assert!(time > 1_700_000_000);
    assert_eq!((deriver, sigs, ca), (None, None, None));
    world.verify();
}

#[test]
fn an_invalid_reference_leaves_no_row() {
    let world = World::new();
    let [good, bad, absent] = ["good", "bad", "absent"].map(store_path);
    let restored = Restored { nar_hash: [0; 32], nar_size: 1 };
    let error =
        world.register(&[info(&good, &restored, &[]), info(&bad, &restored, &[&good, &absent])]).unwrap_err();
    assert!(matches!(error, DatabaseError::InvalidReference { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&bad.to_string()) && text.contains(&absent.to_string()), "{text}");
    let query = world.query();
    assert!(!query.is_valid(&good).unwrap() && !query.is_valid(&bad).unwrap());
    world.verify();
}

#[test]
fn what_must_not_be_registered_is_refused() {
    let world = World::new();
    let [a, b] = ["a", "b"].map(store_path);
    let restored = Restored { nar_hash: [0; 32], nar_size: 1 };
    let cycle = [info(&a, &restored, &[&b]), info(&b, &restored, &[&a])];
    assert!(matches!(world.register(&cycle), Err(DatabaseError::Cycle(_))));
    let drv = info(&store_path("a.drv"), &restored, &[]);
    assert!(matches!(world.register(&[drv]), Err(DatabaseError::Derivation { .. })));

    let address = CAHash::Nar(sha256(b"x"));
    let with = |path: &StorePath, address: &str, references: &[&StorePath]| PathInfo {
        content_address: Some(address.to_owned()),
        ..info(path, &restored, references)
    };
    let elsewhere = with(&a, &address.to_nix_string(), &[]);
    assert!(matches!(world.register(&[elsewhere]), Err(DatabaseError::NotContentAddressed { .. })));
    assert!(matches!(
        world.register(&[with(&a, "fixed:r:sha256:zz", &[])]),
        Err(DatabaseError::MalformedContentAddress { .. })
    ));
    let flat = CAHash::Flat(sha256(b"x")).to_nix_string();
    assert!(matches!(
        world.register(&[with(&a, &flat, &[&b])]),
        Err(DatabaseError::UnusableContentAddress { .. })
    ));
    assert_eq!(world.sqlite().query_row("select count(*) from ValidPaths", [], |row| row.get(0)), Ok(0));
}

#[test]
fn a_path_that_became_valid_meanwhile_is_left_alone() {
    let world = World::new();
    let path = store_path("out");
    let first = world.import(&path, &file_nar(b"x", false), &[]);
    let again = PathInfo { registration_time: 5, signatures: vec!["k:AAEC".into()], ..first.clone() };
    world.register(&[again]).unwrap();
    assert_eq!(
        world.query().path_info(&path).unwrap().unwrap(),
        PathInfo { ultimate: false, ..first.clone() }
    );
    let other = PathInfo { nar_hash: [9; 32], ..first };
    assert!(matches!(world.register(&[other]), Err(DatabaseError::ValidOtherwise { .. })));
    world.verify();
}

/// Registers on another thread and reports when it is done.
fn register_elsewhere(world: &World, info: PathInfo) -> mpsc::Receiver<Result<(), DatabaseError>> {
    let location = world.location.clone();
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let result = Registrar::open(&location, &Durability::default())
            .and_then(|mut registrar| registrar.register(&[info]));
        let _ = send.send(result);
    });
    receive
}

#[test]
fn another_writer_is_waited_for() {
    let world = World::new();
    let writer = world.sqlite();
    writer.execute_batch("begin immediate").unwrap();
    let restored = Restored { nar_hash: [0; 32], nar_size: 1 };
    let done = register_elsewhere(&world, info(&store_path("out"), &restored, &[]));
    assert!(done.recv_timeout(Duration::from_millis(300)).is_err(), "did not wait");
    writer.execute_batch("commit").unwrap();
    done.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    assert!(world.query().is_valid(&store_path("out")).unwrap());
}

#[test]
fn stores_without_write_ahead_log_have_locks_of_their_own() {
    let world = World::with_config("use-sqlite-wal = false");
    let path = store_path("out");
    // Before the lock: it is asked first whether the path is valid.
    let restored = world.restore(&path, &file_nar(b"x", false), None).unwrap();
    let lock = world.location.state_dir.join("db/db.sqlite.lock");
    fs::create_dir(&lock).unwrap();
    let done = register_elsewhere(&world, info(&path, &restored, &[]));
    assert!(done.recv_timeout(Duration::from_millis(300)).is_err(), "ignored Nix's lock");
    fs::remove_dir(&lock).unwrap();
    done.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    assert!(world.query().is_valid(&path).unwrap());
    assert!(!lock.exists());
    assert!(!world.location.state_dir.join("db/db.sqlite-wal").exists());
    world.verify();
}

#[test]
fn the_file_itself_says_whether_it_has_a_write_ahead_log() {
    let says_wal = |world: &World| says_wal(&world.location.state_dir.join("db/db.sqlite"));
    let world = World::new();
    assert!(says_wal(&world).unwrap());
    assert!(!says_wal(&World::with_config("use-sqlite-wal = false")).unwrap());
    let database = world.location.state_dir.join("db/db.sqlite");
    for short in [0, 19] {
        fs::File::options().write(true).open(&database).unwrap().set_len(short).unwrap();
        assert!(says_wal(&world).is_err(), "{short} bytes");
    }
}

#[test]
fn nix_and_we_write_side_by_side() {
    let world = World::new();
    thread::scope(|scope| {
        for writer in 0..3 {
            let world = &world;
            scope.spawn(move || {
                for round in 0..10 {
                    let path = store_path(&format!("{writer}-{round}"));
                    world.import(&path, &file_nar(path.name().as_bytes(), false), &[&path]);
                }
            });
        }
        for writer in 0..2 {
            let world = &world;
            scope.spawn(move || {
                for round in 0..10 {
                    let file = world.dir.path().join(format!("{writer}-{round}"));
                    fs::write(&file, format!("{writer} {round}")).unwrap();
                    world.nix(&["--add", file.to_str().unwrap()]);
                }
            });
        }
    });
    let count: i64 =
        world.sqlite().query_row("select count(*) from ValidPaths", [], |row| row.get(0)).unwrap();
    assert_eq!(count, 50);
    world.verify();
}

#[test]
fn other_schemas_are_refused() {
    let world = World::new();
    let schema = world.location.state_dir.join("db/schema");
    fs::write(&schema, "11").unwrap();
    for error in [
        Query::open(&world.location).err().unwrap(),
        Registrar::open(&world.location, &Durability::default()).err().unwrap(),
    ] {
        assert!(matches!(&error, DatabaseError::Schema { found, .. } if found == "11"), "{error:?}");
        assert!(error.to_string().contains(schema.to_str().unwrap()), "{error}");
    }
    fs::write(&schema, "10\n").unwrap();
    world.query();
    fs::remove_file(&schema).unwrap();
    assert!(matches!(Query::open(&world.location), Err(DatabaseError::NoSchema { .. })));
}

#[test]
fn nothing_is_created_where_no_store_is() {
    let world = World::new();
    let db = world.location.state_dir.join("db/db.sqlite");
    fs::remove_file(&db).unwrap();
    assert!(Query::open(&world.location).is_err());
    let text = Registrar::open(&world.location, &Durability::default()).err().unwrap().to_string();
    assert!(text.contains(db.to_str().unwrap()), "{text}");
    assert!(!db.exists());
}

#[test]
fn settings_are_read_with_nixs_defaults() {
    assert_eq!(Durability::from_settings(|_| None), Durability::default());
    let all = Durability::from_settings(|name| (name != "fsync-metadata").then_some("true"));
    assert!(all.fsync_metadata && all.fsync_store_paths && all.sync_before_registering);
    let none = Durability::from_settings(|_| Some("false"));
    assert!(!none.fsync_metadata && !none.fsync_store_paths && !none.sync_before_registering);
    let world = World::new();
    let durability =
        Durability { sync_before_registering: true, fsync_metadata: false, fsync_store_paths: true };
    let restored = Restored { nar_hash: [0; 32], nar_size: 1 };
    let path = store_path("out");
    Registrar::open(&world.location, &durability).unwrap().register(&[info(&path, &restored, &[])]).unwrap();
    assert!(world.query().is_valid(&path).unwrap());
}
