//! What a daemon does for everybody, and how one that does not trust us shows it, in every version.

use crate::real::{Store, events};
use crate::serving::{releases, store_in};
use nix_derivation::StorePath;
use nix_offload::builder::{Ahead, BuilderError, Clocks};
use nix_offload::path_info::PathInfo;
use nix_offload::plan::trust;
use nix_offload::store::{self, Query, references_first};
use nix_offload::wire::worker::{NEWEST_MINOR, OLDEST_MINOR, Outcome};
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::Write;
use std::time::Duration;

const BOUND: Duration = Duration::from_secs(20);

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// One with two outputs and an input that is made by another one.
fn pair(name: &str, end: &str) -> String {
    format!(
        r#"let d = name: attrs: derivation ({{ inherit name; system = builtins.currentSystem; builder = "/bin/sh";
                PATH = "/bin:/usr/bin"; }} // attrs);
              first = d "first-{name}" {{ args = [ "-c" "echo {name} > $out" ]; }};
            in d "second-{name}" {{ outputs = [ "out" "dev" ]; first = first;
                args = [ "-c" ''echo log {name}; read x < $first; echo $x > $dev; echo $x > $out; {end}'' ]; }}"#
    )
}

/// Paths that the store had and has forgotten, references first, with their NARs.
fn forget(store: &Store, roots: &[StorePath]) -> (Vec<PathInfo>, HashMap<StorePath, Vec<u8>>) {
    let closure = Query::open(&store.location).unwrap().closure(roots.iter().cloned()).unwrap();
    let infos = references_first(closure.into_values().collect()).unwrap();
    let mut nars = HashMap::new();
    for info in &infos {
        let mut nar = Vec::new();
        store::dump(&store.location, &info.path, &mut nar).unwrap();
        nars.insert(info.path.clone(), nar);
    }
    let rendered: Vec<String> = infos.iter().map(|info| store.location.render(&info.path)).collect();
    let args: Vec<&str> = ["--delete"].into_iter().chain(rendered.iter().map(String::as_str)).collect();
    store.output("nix-store", &args);
    (infos, nars)
}

#[test]
fn every_version_of_every_release_builds_outputs_of_a_derivation_in_the_store() {
    for (release, root) in releases() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store_in(directory.path(), root);
        for minor in OLDEST_MINOR..=NEWEST_MINOR {
            let what = format!("{release} 1.{minor}");
            let (drv_path, drv) = store.instantiate(&pair(&format!("v{minor}"), ""));
            let mut builder = store.daemon_with(minor, &[]);
            assert_eq!(builder.ask_trust(BOUND).unwrap(), None, "{what}");
            let mut log = Vec::new();
            for _ in 0..2 {
                let wanted = names(&["dev", "out"]);
                let result =
                    builder.build_outputs(&drv_path, &wanted, Clocks::default(), &mut events(&mut log));
                assert_eq!(result.unwrap().outcome(false), Outcome::Built, "{what}");
            }
            assert_eq!(log, [format!("log v{minor}")], "{what}: it is built once");
            for (name, output) in drv.outputs() {
                let path = output.path_in(drv.store_dir(), drv.name(), name).unwrap().unwrap();
                assert!(Query::open(&store.location).unwrap().is_valid(&path).unwrap(), "{what}: {name}");
            }
            let (drv_path, _) = store.instantiate(&pair(&format!("f{minor}"), "exit 5"));
            let failed =
                builder.build_outputs(&drv_path, &names(&["out"]), Clocks::default(), &mut |_| {}).unwrap();
            assert_eq!(failed.outcome(false), Outcome::Failed, "{what}: {failed:?}");
            assert!(failed.message.contains(&store.location.render(&drv_path)), "{what}: {failed:?}");
            assert!(failed.message.contains("failed"), "{what}: {failed:?}");
            assert!(builder.round_trip(BOUND).is_ok(), "{what}");
        }
    }
}

#[test]
fn a_daemon_that_does_not_trust_us_takes_derivations_and_builds_their_outputs() {
    for (release, root) in releases().into_iter().filter(|(release, _)| release != "here") {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store_in(directory.path(), root);
        for minor in OLDEST_MINOR..=NEWEST_MINOR {
            let what = format!("{release} 1.{minor}");
            let (drv_path, drv) = store.instantiate(&pair(&format!("u{minor}"), ""));
            let (infos, nars) = forget(&store, std::slice::from_ref(&drv_path));
            assert_eq!(infos.len(), 2, "{what}: the derivation and the one that it needs");
            let untrusted = ["--force-untrusted"];
            let mut builder = store.daemon_with(minor, &untrusted);
            assert_eq!(builder.peer().trusted, (minor >= 35).then_some(false), "{what}");
            let dump = |path: &StorePath, to: &mut dyn Write| to.write_all(&nars[path]);
            // In parts, the arrival of each of which is told.
            let parts: Vec<&[PathInfo]> = infos.chunks(1).collect();
            let mut arrived = Vec::new();
            let mut note = |part: &[PathInfo]| arrived.extend_from_slice(part);
            builder.upload(&parts, &dump, &|_| {}, &mut note, Ahead::default(), &mut |_| {}).unwrap();
            assert_eq!(arrived, infos, "{what}");
            let wanted = names(&["dev", "out"]);
            let built = builder.build_outputs(&drv_path, &wanted, Clocks::default(), &mut |_| {}).unwrap();
            assert_eq!(built.outcome(false), Outcome::Built, "{what}: {built:?}");

            let alone = builder.build(&drv_path, &drv, &[], Clocks::default(), &mut |_| {});
            let Err(BuilderError::Refused { message, .. }) = alone else { panic!("{what}: {alone:?}") };
            assert!(trust::is_refusal_to_build(&message), "{what}: {message}");

            let words = store.daemon_with(minor, &untrusted).ask_trust(BOUND).unwrap().unwrap();
            assert!(trust::is_refusal_to_repair(&words), "{what}: {words}");
        }
    }
}

#[test]
fn whether_a_path_is_taken_can_be_asked_without_sending_it() {
    for (release, root) in releases().into_iter().filter(|(release, _)| release != "here") {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store_in(directory.path(), root);
        let key = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        for name in ["known", "strange"] {
            let (secret, public) = (key(name), key(&format!("{name}.public")));
            store.output(
                "nix-store",
                &["--generate-binary-cache-key", &format!("{name}-1"), &secret, &public],
            );
        }
        let conf = store.root.join("etc/nix.conf");
        let known = fs::read_to_string(key("known.public")).unwrap();
        let text = fs::read_to_string(&conf).unwrap();
        fs::write(&conf, format!("{text}trusted-public-keys = {known}\n")).unwrap();
        let mut forgotten = Vec::new();
        for signer in ["", "known", "strange"] {
            let (drv_path, drv) = store.instantiate(&crate::real::expression(
                &format!("by-{signer}"),
                &format!("echo by {signer} > $out"),
            ));
            let out = drv.outputs()["out"].path_in(drv.store_dir(), drv.name(), "out").unwrap().unwrap();
            store.output("nix-store", &["--realise", &store.location.render(&drv_path)]);
            if !signer.is_empty() {
                store.output(
                    "nix",
                    &["store", "sign", "--key-file", &key(signer), &store.location.render(&out)],
                );
            }
            forgotten.push(forget(&store, &[out]).0.remove(0));
        }
        let mut source = forgotten[0].clone();
        source.content_address = Some(format!("fixed:r:sha256:{}", "0".repeat(52)));
        for minor in (OLDEST_MINOR..=NEWEST_MINOR).filter(|minor| *minor >= 23) {
            let what = format!("{release} 1.{minor}");
            let mut builder = store.daemon_with(minor, &["--force-untrusted"]);
            let mut refused = |info: &PathInfo| {
                let words = builder.ask_import(info, BOUND).unwrap();
                words.filter(|words| trust::is_want_of_signature(words))
            };
            let words = refused(&forgotten[0]).unwrap_or_else(|| panic!("{what}: nobody signed it"));
            let named = trust::path_in(&words, &store.location.store_dir);
            assert_eq!(named.as_ref(), Some(&forgotten[0].path), "{what}: {words}");
            assert_eq!(refused(&forgotten[1]), None, "{what}: its key is trusted");
            assert!(refused(&forgotten[2]).is_some(), "{what}: its key is not");
            let paths: Vec<StorePath> = forgotten.iter().map(|info| info.path.clone()).collect();
            assert_eq!(builder.find(&paths, true, BOUND).unwrap(), BTreeSet::new(), "{what}: nothing came");
            for path in &paths {
                let real = store.location.real_path(path);
                assert!(!real.exists(), "{what}: {} was left", real.display());
            }
        }
        // Content speaks for itself, so a wrong address must be what it is refused for.
        let mut builder = store.daemon_with(NEWEST_MINOR, &["--force-untrusted"]);
        let words = builder.ask_import(&source, BOUND).unwrap().unwrap_or_default();
        assert!(trust::is_want_of_signature(&words), "a false address is not believed: {words}");
    }
}
