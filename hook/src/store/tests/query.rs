use super::*;
use crate::derivation;
use std::time::{Duration, Instant};

#[test]
fn nix_and_we_read_the_same() {
    let world = World::new();
    let tree = world.dir.path().join("tree");
    nasty_tree(&tree);
    let added = world.nix_line(&["--add", tree.to_str().unwrap()]);
    let path: StorePath = added.parse().unwrap();
    let query = world.query();
    let info = query.path_info(&path).unwrap().unwrap();
    assert_eq!(
        NixHash::Sha256(info.nar_hash).to_nix_nixbase32_string(),
        world.nix_line(&["-q", "--hash", &added])
    );
    assert_eq!(info.nar_size.to_string(), world.nix_line(&["-q", "--size", &added]));
    let ultimate = |info: &PathInfo| info.ultimate;
    assert_eq!(ultimate(&info), world.row(&path).4 == Some(1));
    world.sqlite().execute("update ValidPaths set ultimate = 1", []).unwrap();
    assert!(ultimate(&query.path_info(&path).unwrap().unwrap()));
    assert!(info.content_address.unwrap().starts_with("fixed:r:sha256:"));
    assert!(query.is_valid(&path).unwrap());
    let absent = store_path("absent");
    assert!(!query.is_valid(&absent).unwrap());
    assert_eq!(query.path_info(&absent).unwrap(), None);
    assert_eq!(query.references(&absent).unwrap(), None);
}

#[test]
fn an_open_query_sees_what_others_commit() {
    let world = World::new();
    let query = world.query();
    let path = store_path("late");
    assert!(!query.is_valid(&path).unwrap());
    let mut registrar = Registrar::open(&world.location, &Durability::default()).unwrap();
    let restored = world.restore(&path, &file_nar(b"late", false), None).unwrap();
    registrar.register(&[info(&path, &restored, &[])]).unwrap();
    assert!(query.is_valid(&path).unwrap());
    assert!(world.query().is_valid(&path).unwrap(), "the row is only in the log yet");
    drop(registrar);
    assert!(world.query().is_valid(&path).unwrap());
    let source = world.dir.path().join("source");
    fs::write(&source, b"by Nix").unwrap();
    let added: StorePath = world.nix_line(&["--add", source.to_str().unwrap()]).parse().unwrap();
    assert!(query.is_valid(&added).unwrap());
    world.verify();
}

#[test]
fn a_query_writes_nothing_and_waits_for_nobody() {
    let world = World::new();
    let path = store_path("there");
    world.import(&path, &file_nar(b"there", false), &[]);
    let writer = world.sqlite();
    writer.execute_batch("begin immediate; delete from ValidPaths").unwrap();
    let started = Instant::now();
    assert!(world.query().is_valid(&path).unwrap());
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_closure_has_everything_once() {
    let world = World::new();
    let paths = ["a", "b", "c", "d"].map(store_path);
    let [a, b, c, d] = &paths;
    for (path, references) in [(a, vec![a]), (b, vec![a]), (c, vec![a, c]), (d, vec![b, c])] {
        world.import(path, &file_nar(path.name().as_bytes(), false), &references);
    }
    let query = world.query();
    let closure = query.closure([d.clone(), store_path("absent")]).unwrap();
    assert_eq!(closure.keys().cloned().collect::<BTreeSet<_>>(), set(&[a, b, c, d]));
    assert_eq!(query.references(d).unwrap().unwrap(), set(&[b, c]));
    let sorted = references_first(closure.into_values().collect()).unwrap();
    assert_eq!(sorted[0].path, *a);
    assert_eq!(sorted[3].path, *d);
}

#[test]
fn ten_thousand_paths_are_nothing_special() {
    let world = World::new();
    let restored = Restored { nar_hash: [3; 32], nar_size: 100 };
    let paths: Vec<StorePath> =
        (0..10_000).map(|index| store_path(&format!("{index:05}-some-package-1.2.3"))).collect();
    let infos: Vec<PathInfo> = (0..paths.len())
        .map(|index| {
            let references: Vec<&StorePath> = paths[index.saturating_sub(8)..=index].iter().collect();
            info(&paths[index], &restored, &references)
        })
        .collect();
    world.register(&infos).unwrap();
    let started = Instant::now();
    let query = world.query();
    let found: Vec<PathInfo> = paths.iter().map(|path| query.path_info(path).unwrap().unwrap()).collect();
    let took = started.elapsed();
    println!("10,000 path infos: {took:?}");
    assert_eq!(found.last().unwrap().references.len(), 9);
    // Optimised it takes a tenth of this; the bound is for slow machines and unoptimised code.
    assert!(took < Duration::from_secs(3), "{took:?}");
    let started = Instant::now();
    assert_eq!(query.closure([paths[9_999].clone()]).unwrap().len(), 10_000);
    println!("closure: {:?}", started.elapsed());
}

#[test]
fn unreadable_rows_are_named() {
    let world = World::new();
    let path = store_path("odd");
    world.import(&path, &file_nar(b"odd", false), &[]);
    let sqlite = world.sqlite();
    for (column, value) in [("hash", "md5:00"), ("deriver", "/elsewhere/x"), ("registrationTime", "-5")] {
        sqlite.execute_batch("savepoint before").unwrap();
        sqlite.execute(&format!("update ValidPaths set {column} = ?"), [value]).unwrap();
        sqlite.execute_batch("release before").unwrap();
        let text = world.query().path_info(&path).unwrap_err().to_string();
        assert!(text.contains(column) && text.contains(&path.to_string()), "{text}");
        let good = if column == "deriver" { None } else { Some("1") };
        sqlite.execute(&format!("update ValidPaths set {column} = ?"), [good]).unwrap();
        sqlite.execute("update ValidPaths set hash = ?", [sha256(b"").to_nix_base16_string()]).unwrap();
    }
}

#[test]
fn derivations_that_wait_for_another_one_are_found_until_they_are_built() {
    let world = World::new();
    let drvs = world.instantiate(
        r#"let d = name: inputs: derivation { inherit name inputs; system = "x"; builder = "/b"; };
               a = d "a-1" [ ]; b = d "b-1" [ a ]; in [ a b (d "c-1" [ b ]) (d "e-1" [ a ]) (d "done-1" [ a ]) ]"#,
    );
    let [a, b, c, e, done] = drvs.try_into().unwrap();
    let names =
        |paths: &[&StorePath]| -> BTreeSet<String> { paths.iter().map(|path| path.to_string()).collect() };
    let query = world.query();
    let of = |path: &StorePath, most: usize| -> BTreeSet<String> {
        let id = query.drv_id(path).unwrap().unwrap();
        query.unbuilt_dependents(id, most).unwrap().into_iter().map(|(_, path)| path).collect()
    };
    assert_eq!(of(&a, 100), names(&[&b, &e, &done]));
    assert_eq!((of(&a, 2).len(), of(&c, 100).len()), (2, 0));
    assert_eq!(query.drv_id(&store_path("absent.drv")).unwrap(), None);
    let output = "select output.path, 'sha256:00', 1 from DerivationOutputs output \
                  join ValidPaths drv on drv.id = output.drv where drv.path like '%-done-1.drv'";
    let insert = format!("insert into ValidPaths (path, hash, registrationTime) {output}");
    assert_eq!(world.sqlite().execute(&insert, []).unwrap(), 1);
    assert_eq!(of(&a, 100), names(&[&b, &e]));

    // The seconds of the longest chain: a, b and c.
    let nothing = |_: &[&str]| Vec::new();
    assert_eq!(derivation::chain(&world.location, &a, nothing, 30.0).unwrap(), 90.0);
    let some = |names: &[&str]| names.iter().map(|name| (*name == "b-1").then_some(7.0)).collect();
    assert_eq!(derivation::chain(&world.location, &a, some, 30.0).unwrap(), 21.0);
    assert_eq!(derivation::chain(&world.location, &c, nothing, 30.0).unwrap(), 30.0);
    assert_eq!(derivation::chain(&world.location, &store_path("absent.drv"), nothing, 30.0).unwrap(), 30.0);
}

#[test]
fn a_derivation_that_much_waits_for_is_not_looked_at_for_long() {
    let world = World::new();
    let a = world.instantiate(r#"derivation { name = "a"; system = "x"; builder = "/b"; }"#).remove(0);
    // Twenty thousand refer to it, of which every tenth is still to be built, and each to the one before.
    world
        .sqlite()
        .execute_batch(
            "begin; create temp table Number as with recursive n(i) as \
             (select 1 union all select i + 1 from n where i < 20000) select i from n; \
             insert into ValidPaths (id, path, hash, registrationTime) \
             select 1000 + i, '/nix/store/' || i || '-x' || i || '.drv', 'sha256:00', 1 from Number; \
             insert into Refs select 1000 + i, (select id from ValidPaths where path like '%-a.drv') from Number; \
             insert into Refs select 1000 + i, 999 + i from Number where i > 1; \
             insert into DerivationOutputs select 1000 + i, 'out', '/nix/store/' || i || '-x' from Number; \
             insert into ValidPaths (path, hash, registrationTime) \
             select '/nix/store/' || i || '-x', 'sha256:00', 1 from Number where i % 10 > 0; commit;",
        )
        .unwrap();
    let begin = Instant::now();
    let mut asked = 0;
    let count = |names: &[&str]| {
        asked = names.len();
        Vec::new()
    };
    let seconds = derivation::chain(&world.location, &a, count, 1.0).unwrap();
    println!("{asked} derivations in {:?}", begin.elapsed());
    assert!(seconds >= 2.0, "{seconds}");
    assert!((100..5000).contains(&asked), "{asked}");
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
}
