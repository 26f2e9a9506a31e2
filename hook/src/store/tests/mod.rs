//! Tests of this room against the `nix-store` of the PATH, which must be there.

mod import;
mod location;
mod optimise;
mod order;
mod query;
mod restore;

use super::*;
use crate::path_info::PathInfo;
use nix_derivation::{CAHash, NixHash, StorePath};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};
use tempfile::TempDir;

/// A private store under a root of its own, with the usual `/nix/store` as logical directory.
struct World {
    dir: TempDir,
    location: Location,
    config: &'static str,
}

impl World {
    fn new() -> Self {
        Self::with_config("")
    }

    fn with_config(config: &'static str) -> Self {
        let dir = TempDir::new().unwrap();
        let root = dir.path().join("root").to_str().unwrap().to_owned();
        let location = Location::parse(&root, |_| None).unwrap();
        let world = Self { dir, location, config };
        world.nix(&["--init"]);
        world
    }

    /// Runs `nix-store` on this store and gives its standard output; a failure fails the test.
    fn nix(&self, arguments: &[&str]) -> Vec<u8> {
        let Output { status, stdout, stderr } = self.try_nix(arguments);
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        assert!(status.success(), "nix-store {arguments:?}: {status}\n{stderr}");
        stdout
    }

    fn try_nix(&self, arguments: &[&str]) -> Output {
        self.run("nix-store", arguments)
    }

    /// The derivations of an expression, in its order.
    fn instantiate(&self, expression: &str) -> Vec<StorePath> {
        let Output { status, stdout, stderr } = self.run("nix-instantiate", &["-E", expression]);
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap().lines().map(|path| path.parse().unwrap()).collect()
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        for (name, _) in env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"NIX_")) {
            command.env_remove(name);
        }
        command
            .env("HOME", self.dir.path())
            .env("NIX_CONF_DIR", self.dir.path().join("etc"))
            .env("NIX_CONFIG", format!("substituters =\nbuild-users-group =\n{}", self.config))
            .arg("--store")
            .arg(self.dir.path().join("root"))
            .args(arguments)
            .output()
            .expect("these tests need Nix in the PATH")
    }

    fn nix_line(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.nix(arguments)).unwrap().trim().to_owned()
    }

    fn verify(&self) {
        let Output { status, stderr, .. } = self.try_nix(&["--verify", "--check-contents"]);
        let stderr = String::from_utf8_lossy(&stderr);
        assert!(status.success() && !stderr.contains("error"), "--verify: {status}\n{stderr}");
    }

    /// Restores `nar` to `path` and registers it with these references.
    fn import(&self, path: &StorePath, nar: &[u8], references: &[&StorePath]) -> PathInfo {
        let restored = self.restore(path, nar, None).unwrap();
        let info = info(path, &restored, references);
        self.register(std::slice::from_ref(&info)).unwrap();
        info
    }

    fn restore(
        &self,
        path: &StorePath,
        mut nar: &[u8],
        content_address: Option<&CAHash>,
    ) -> Result<Restored, RestoreError> {
        let expected = Expected { nar_size: nar.len() as u64, nar_hash: None, content_address };
        self.restore_from(path, &mut nar, &expected)
    }

    fn restore_from(
        &self,
        path: &StorePath,
        nar: &mut dyn Read,
        expected: &Expected<'_>,
    ) -> Result<Restored, RestoreError> {
        restore(&self.location, &self.registrar(), path, nar, expected, &Durability::default())
    }

    fn registrar(&self) -> Registrar {
        Registrar::open(&self.location, &Durability::default()).unwrap()
    }

    fn register(&self, infos: &[PathInfo]) -> Result<(), DatabaseError> {
        self.registrar().register(infos)
    }

    fn query(&self) -> Query {
        Query::open(&self.location).unwrap()
    }

    /// A connection of the test's own, for looking behind the curtain.
    fn sqlite(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(self.location.state_dir.join("db/db.sqlite")).unwrap()
    }

    fn row(&self, path: &StorePath) -> Row {
        let columns = "hash, registrationTime, deriver, narSize, ultimate, sigs, ca";
        self.sqlite()
            .query_row(
                &format!("select {columns} from ValidPaths where path = ?"),
                [self.location.render(path)],
                |row| {
                    Ok((
                        row.get(0)?,
                        row.get(1)?,
                        row.get(2)?,
                        row.get(3)?,
                        row.get(4)?,
                        row.get(5)?,
                        row.get(6)?,
                    ))
                },
            )
            .unwrap()
    }
}

type Row = (String, i64, Option<String>, Option<i64>, Option<i64>, Option<String>, Option<String>);

fn info(path: &StorePath, restored: &Restored, references: &[&StorePath]) -> PathInfo {
    PathInfo {
        path: path.clone(),
        deriver: None,
        nar_hash: restored.nar_hash,
        nar_size: restored.nar_size,
        references: references.iter().map(|path| (*path).clone()).collect(),
        registration_time: 1_700_000_000,
        ultimate: true,
        signatures: Vec::new(),
        content_address: None,
    }
}

/// An input-addressed path: nothing follows from its hash.
fn store_path(name: &str) -> StorePath {
    let mut digest = [7; 20];
    digest.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    StorePath::from_parts(digest, name).unwrap()
}

/// `nix-store --dump` of a file or directory.
fn dump_by_nix(path: &Path) -> Vec<u8> {
    let output = Command::new("nix-store").arg("--dump").arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The NAR of a file with these contents.
fn file_nar(contents: &[u8], executable: bool) -> Vec<u8> {
    let mut nar = Vec::new();
    nix_archive::nar::encode_regular(&mut nar, contents, executable).unwrap();
    nar
}

/// A tree with everything that a NAR can say.
fn nasty_tree(at: &Path) {
    fs::create_dir(at).unwrap();
    for dir in ["empty", "nested", "nested/a", "nested/a/b", "nested/a/b/c", " a b ", "-rf"] {
        fs::create_dir(at.join(dir)).unwrap();
    }
    let long = "n".repeat(255);
    let names: [&[u8]; 11] = [
        b"plain",
        b"with space",
        b"\xff\xfe not utf-8",
        b"new\nline",
        b"\x01control",
        b"~case~nix~case~hack~1",
        b"caf\xc3\xa9",
        b"*?[glob]",
        b"nested/a/b/c/deep",
        b" a b /.hidden",
        long.as_bytes(),
    ];
    for name in names {
        fs::write(at.join(OsStr::from_bytes(name)), name).unwrap();
    }
    fs::write(at.join("nothing"), b"").unwrap();
    for size in [1, 7, 8, 9, 4096, 1 << 17, (1 << 17) + 1, 3_000_000] {
        let bytes: Vec<u8> =
            (0..size).map(|index: u32| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        fs::write(at.join(format!("size-{size}")), bytes).unwrap();
    }
    for (name, mode) in
        [("run", 0o755), ("run-user", 0o744), ("run-group", 0o654), ("secret", 0o600), ("wide", 0o666)]
    {
        fs::write(at.join(name), name).unwrap();
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let targets: [(&str, &[u8]); 6] = [
        ("to-file", b"plain"),
        ("to-dir", b"nested/"),
        ("dangling", b"/does/not/exist"),
        ("up", b"../../.."),
        ("to-itself", b"to-itself"),
        ("to-bytes", b"\xff\n "),
    ];
    for (name, target) in targets {
        symlink(OsStr::from_bytes(target), at.join(name)).unwrap();
    }
    fs::hard_link(at.join("plain"), at.join("hard")).unwrap();
}

/// Everything about a file that must be as Nix has it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct File {
    name: PathBuf,
    mode: u32,
    mtime: (i64, i64),
    owner: (u32, u32),
    size: u64,
    links: u64,
    target: Option<PathBuf>,
}

/// The files of a tree, the root included.
fn metadata(root: &Path) -> Vec<File> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        found.push(File {
            name: path.strip_prefix(root).unwrap().to_owned(),
            mode: stat.mode(),
            mtime: (stat.mtime(), stat.mtime_nsec()),
            owner: (stat.uid(), stat.gid()),
            size: if stat.is_dir() { 0 } else { stat.len() },
            links: if stat.is_dir() { 0 } else { stat.nlink() },
            target: fs::read_link(&path).ok(),
        });
        if stat.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    found.sort();
    found
}

fn sha256(bytes: &[u8]) -> NixHash {
    nix_derivation::hash_bytes(nix_derivation::HashAlgorithm::Sha256, bytes)
}

fn set(paths: &[&StorePath]) -> BTreeSet<StorePath> {
    paths.iter().map(|path| (*path).clone()).collect()
}
