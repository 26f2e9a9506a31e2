//! Registering outputs in the local store.

use super::database::{Access, Database};
use super::order::order;
use super::{DatabaseError, Location};
use crate::path_info::PathInfo;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix_derivation::{CAHash, NixHash, StoreDir, StorePath};
use rusqlite::{OptionalExtension, Transaction, TransactionBehavior, params};
use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How much Nix's settings ask to be on disk before a path counts as valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durability {
    /// `fsync-metadata`: the database is synced (at its checkpoints).
    pub fsync_metadata: bool,
    /// `fsync-store-paths`: every file is synced when it is restored.
    pub fsync_store_paths: bool,
    /// `sync-before-registering`: all file systems are synced before each registration.
    pub sync_before_registering: bool,
}

impl Default for Durability {
    /// Nix's own defaults.
    fn default() -> Self {
        Self { fsync_metadata: true, fsync_store_paths: false, sync_before_registering: false }
    }
}

impl Durability {
    /// Reads the settings as Nix hands them to its hook; those that are absent have Nix's defaults.
    pub fn from_settings<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Self {
        let default = Self::default();
        let flag = |name, default| match get(name) {
            Some("true" | "yes" | "1") => true,
            Some("false" | "no" | "0") => false,
            _ => default,
        };
        Self {
            fsync_metadata: flag("fsync-metadata", default.fsync_metadata),
            fsync_store_paths: flag("fsync-store-paths", default.fsync_store_paths),
            sync_before_registering: flag("sync-before-registering", default.sync_before_registering),
        }
    }
}

/// Writes valid paths into the database, in the way of `LocalStore::registerValidPaths`.
///
/// Owns: the rows of new paths. Must never: register what [`restore`](super::restore()) has not checked.
pub struct Registrar {
    database: Database,
    store_dir: StoreDir,
    sync: bool,
    since: Instant,
}

impl Registrar {
    /// Opens the database for writing; refuses schemas other than the one we know.
    pub fn open(location: &Location, durability: &Durability) -> Result<Self, DatabaseError> {
        let database = Database::open(location, Access::Write)?;
        let synchronous = if durability.fsync_metadata { "normal" } else { "off" };
        // As LocalStore::openDB (local-store.cc), but for the journal mode: that is Nix's to choose.
        let settings = format!(
            "pragma foreign_keys = 1; pragma synchronous = {synchronous}; pragma wal_autocheckpoint = 40000;"
        );
        database.connection.execute_batch(&settings).map_err(database.failed("set up a connection"))?;
        for statement in [FIND_HASH, FIND_ID, ADD_PATH, ADD_REFERENCE] {
            database.connection.prepare_cached(statement).map_err(database.failed("set up a connection"))?;
        }
        let sync = durability.sync_before_registering;
        Ok(Self { database, store_dir: location.store_dir.clone(), sync, since: Instant::now() })
    }

    /// Whether it was opened so lately that nobody can have replaced the database since.
    pub fn is_fresh(&self) -> bool {
        self.since.elapsed() < FRESH
    }

    /// The hash of a path's NAR in Nix's base 16 form with its kind; none if the path is not valid.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn registered_hash(&self, path: &StorePath) -> Result<Option<String>, DatabaseError> {
        let failed = self.database.failed("look up a path");
        let mut statement = self.database.connection.prepare_cached(FIND_HASH).map_err(&failed)?;
        let path = self.store_dir.render_path(path);
        statement.query_row([path], |row| row.get(0)).optional().map_err(&failed)
    }

    /// Makes paths valid, all or none of them.
    ///
    /// They may refer to each other, in any order, and to themselves. `ultimate` is not written: it says
    /// that this store built the path. A path that has become valid meanwhile with the same contents is
    /// left as it is, as `LocalStore::addToStore` does. Malformed signatures are left out. Waits for other writers, an hour at most.
    pub fn register(&mut self, infos: &[PathInfo]) -> Result<(), DatabaseError> {
        order(infos).map_err(DatabaseError::Cycle)?;
        let addresses =
            infos.iter().map(|info| check(&self.store_dir, info)).collect::<Result<Vec<_>, _>>()?;
        if self.sync {
            nix::unistd::sync();
        }
        let failed = self.database.failed("register a path");
        let connection = &mut self.database.connection;
        // Immediate: a transaction that becomes a writer later may find its snapshot outdated.
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(&failed)?;
        let batch = Batch { transaction: &transaction, store_dir: &self.store_dir, failed: &failed };
        let mut added = Vec::with_capacity(infos.len());
        for (info, address) in infos.iter().zip(&addresses) {
            if let Some(id) = batch.add(info, address.as_deref())? {
                added.push((id, info));
            }
        }
        for (id, info) in added {
            batch.add_references(id, info)?;
        }
        transaction.commit().map_err(&failed)
    }
}

struct Batch<'a, F> {
    transaction: &'a Transaction<'a>,
    store_dir: &'a StoreDir,
    failed: F,
}

impl<F: Fn(rusqlite::Error) -> DatabaseError> Batch<'_, F> {
    /// Writes the row of a path and gives its number, or nothing if there is one already.
    fn add(&self, info: &PathInfo, address: Option<&str>) -> Result<Option<i64>, DatabaseError> {
        let path = self.store_dir.render_path(&info.path);
        let hash = NixHash::Sha256(info.nar_hash).to_nix_base16_string();
        let registered: Option<String> = self
            .transaction
            .prepare_cached(FIND_HASH)
            .and_then(|mut statement| statement.query_row([&path], |row| row.get(0)).optional())
            .map_err(&self.failed)?;
        match registered {
            Some(registered) if registered == hash => return Ok(None),
            Some(registered) => return Err(DatabaseError::ValidOtherwise { path, registered, ours: hash }),
            None => {}
        }
        let deriver = info.deriver.as_ref().map(|deriver| self.store_dir.render_path(deriver));
        // As a set of signatures Nix sorts them.
        let signatures: BTreeSet<&str> =
            info.signatures.iter().map(String::as_str).filter(|text| is_signature(text)).collect();
        let signatures = signatures.into_iter().collect::<Vec<_>>().join(" ");
        let time = if info.registration_time == 0 { now() } else { info.registration_time };
        self.transaction
            .prepare_cached(ADD_PATH)
            .and_then(|mut statement| {
                statement.insert(params![
                    path,
                    hash,
                    i64::try_from(time).unwrap_or(i64::MAX),
                    deriver,
                    i64::try_from(info.nar_size).ok().filter(|size| *size != 0),
                    Some(signatures).filter(|signatures| !signatures.is_empty()),
                    address,
                ])
            })
            .map(Some)
            .map_err(&self.failed)
    }

    fn add_references(&self, referrer: i64, info: &PathInfo) -> Result<(), DatabaseError> {
        for reference in &info.references {
            let reference = self.store_dir.render_path(reference);
            let id: Option<i64> = self
                .transaction
                .prepare_cached(FIND_ID)
                .and_then(|mut statement| statement.query_row([&reference], |row| row.get(0)).optional())
                .map_err(&self.failed)?;
            let Some(id) = id else {
                let path = self.store_dir.render_path(&info.path);
                return Err(DatabaseError::InvalidReference { path, reference });
            };
            self.transaction
                .prepare_cached(ADD_REFERENCE)
                .and_then(|mut statement| statement.execute([referrer, id]))
                .map_err(&self.failed)?;
        }
        Ok(())
    }
}

/// Refuses what the database must not hold; gives the content address in Nix's own spelling.
fn check(store_dir: &StoreDir, info: &PathInfo) -> Result<Option<String>, DatabaseError> {
    let path = || store_dir.render_path(&info.path);
    if info.path.is_derivation() {
        return Err(DatabaseError::Derivation { path: path() });
    }
    let Some(content_address) = info.content_address.clone().filter(|address| !address.is_empty()) else {
        return Ok(None);
    };
    let address = match CAHash::parse(&content_address) {
        Ok(address) => address,
        Err(source) => {
            return Err(DatabaseError::MalformedContentAddress { path: path(), content_address, source });
        }
    };
    let others = info.references.iter().filter(|reference| **reference != info.path);
    let itself = info.references.contains(&info.path);
    match store_dir.build_ca_path(info.path.name(), &address, others, itself) {
        Ok(computed) if computed == info.path => Ok(Some(address.to_nix_string())),
        Ok(computed) => Err(DatabaseError::NotContentAddressed {
            path: path(),
            content_address,
            computed: store_dir.render_path(&computed),
        }),
        Err(source) => Err(DatabaseError::UnusableContentAddress { path: path(), content_address, source }),
    }
}

/// Whether every Nix can read this signature.
///
/// One that is malformed proves nothing, and Nix 2.34 (`Signature::parse`) could no longer read the row.
fn is_signature(text: &str) -> bool {
    text.split_once(':').is_some_and(|(name, data)| {
        !name.is_empty()
            && !name.contains(char::is_whitespace)
            && STANDARD.decode(data).is_ok_and(|bytes| !bytes.is_empty())
    })
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs())
}

/// How long an open database is good; after a long build it is opened again, and its schema looked at.
const FRESH: Duration = Duration::from_secs(10);

const FIND_HASH: &str = "select hash from ValidPaths where path = ?";
const FIND_ID: &str = "select id from ValidPaths where path = ?";
const ADD_REFERENCE: &str = "insert or replace into Refs (referrer, reference) values (?, ?)";
const ADD_PATH: &str = "insert into ValidPaths (path, hash, registrationTime, deriver, narSize, sigs, ca) \
                        values (?, ?, ?, ?, ?, ?, ?)";
