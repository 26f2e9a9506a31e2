//! Reading the local store's database.

use super::database::{Access, Database};
use super::{DatabaseError, Location};
use crate::path_info::PathInfo;
use nix_derivation::{NixHash, StoreDir, StorePath};
use rusqlite::{OptionalExtension, params};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// A derivation in the database, by its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DrvId(i64);

/// A read-only view of the database that sees what other processes commit.
///
/// Owns: validity, references, path info, closures. Must never: write, or be kept open across a build.
pub struct Query {
    database: Database,
    store_dir: StoreDir,
}

impl Query {
    /// Opens the database; refuses schemas other than the one we know.
    pub fn open(location: &Location) -> Result<Self, DatabaseError> {
        let database = Database::open(location, Access::Read)?;
        Ok(Self { database, store_dir: location.store_dir.clone() })
    }

    /// Whether `path` is registered.
    pub fn is_valid(&self, path: &StorePath) -> Result<bool, DatabaseError> {
        let failed = self.database.failed("look up a path");
        let mut statement = self
            .database
            .connection
            .prepare_cached("select 1 from ValidPaths where path = ?")
            .map_err(&failed)?;
        statement.exists([self.store_dir.render_path(path)]).map_err(&failed)
    }

    /// All that is known of `path`, or nothing if it is not valid.
    pub fn path_info(&self, path: &StorePath) -> Result<Option<PathInfo>, DatabaseError> {
        let failed = self.database.failed("look up a path");
        let rendered = self.store_dir.render_path(path);
        let mut statement = self.database.connection.prepare_cached(PATH_INFO).map_err(&failed)?;
        let row = statement
            .query_row([&rendered], |row| {
                Ok(Row {
                    id: row.get(0)?,
                    hash: row.get(1)?,
                    registration_time: row.get(2)?,
                    deriver: row.get(3)?,
                    nar_size: row.get(4)?,
                    ultimate: row.get(5)?,
                    signatures: row.get(6)?,
                    content_address: row.get(7)?,
                })
            })
            .optional()
            .map_err(&failed)?;
        let Some(row) = row else { return Ok(None) };
        let references = self.references_of(row.id, &rendered)?;
        self.read(path, &rendered, row, references).map(Some)
    }

    /// Bytes of the NAR of `path`, or nothing if it is not valid.
    pub fn nar_size(&self, path: &StorePath) -> Result<Option<u64>, DatabaseError> {
        let failed = self.database.failed("look up a path");
        let mut statement = self
            .database
            .connection
            .prepare_cached("select narSize from ValidPaths where path = ?")
            .map_err(&failed)?;
        let size: Option<Option<i64>> = statement
            .query_row([self.store_dir.render_path(path)], |row| row.get(0))
            .optional()
            .map_err(&failed)?;
        Ok(size.map(|size| size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0)))
    }

    /// The paths that `path` refers to, or nothing if it is not valid.
    pub fn references(&self, path: &StorePath) -> Result<Option<BTreeSet<StorePath>>, DatabaseError> {
        let failed = self.database.failed("look up a path");
        let rendered = self.store_dir.render_path(path);
        let mut statement = self
            .database
            .connection
            .prepare_cached("select id from ValidPaths where path = ?")
            .map_err(&failed)?;
        let id = statement.query_row([&rendered], |row| row.get(0)).optional().map_err(&failed)?;
        id.map(|id| self.references_of(id, &rendered)).transpose()
    }

    /// The number of a derivation, or nothing if it is not valid.
    pub fn drv_id(&self, path: &StorePath) -> Result<Option<DrvId>, DatabaseError> {
        let failed = self.database.failed("look up a path");
        let mut statement = self
            .database
            .connection
            .prepare_cached("select id from ValidPaths where path = ?")
            .map_err(&failed)?;
        let id = statement.query_row([self.store_dir.render_path(path)], |row| row.get(0));
        Ok(id.optional().map_err(&failed)?.map(DrvId))
    }

    /// Derivations that need outputs of this one and are still to be built, at most `most` of them: those that
    /// refer to it and have an output that is not valid or whose path nobody knows.
    pub fn unbuilt_dependents(&self, of: DrvId, most: usize) -> Result<Vec<(DrvId, String)>, DatabaseError> {
        let failed = self.database.failed("look up derivations");
        let mut statement = self.database.connection.prepare_cached(UNBUILT_DEPENDENTS).map_err(&failed)?;
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![of.0, most], |row| Ok((DrvId(row.get(0)?), row.get(1)?)));
        rows.map_err(&failed)?.collect::<Result<_, _>>().map_err(&failed)
    }

    /// `roots` and everything they refer to, directly or not. Paths that are not valid are left out.
    pub fn closure(
        &self,
        roots: impl IntoIterator<Item = StorePath>,
    ) -> Result<BTreeMap<StorePath, PathInfo>, DatabaseError> {
        // One snapshot for all of it, so that no path is there without its references.
        let failed = self.database.failed("look up paths");
        let _snapshot = self.database.connection.unchecked_transaction().map_err(failed)?;
        let mut todo: Vec<StorePath> = roots.into_iter().collect();
        let mut seen: HashSet<StorePath> = todo.iter().cloned().collect();
        let mut closure = BTreeMap::new();
        while let Some(path) = todo.pop() {
            if let Some(info) = self.path_info(&path)? {
                for reference in &info.references {
                    if !seen.contains(reference) {
                        seen.insert(reference.clone());
                        todo.push(reference.clone());
                    }
                }
                closure.insert(path, info);
            }
        }
        Ok(closure)
    }

    fn references_of(&self, id: i64, referrer: &str) -> Result<BTreeSet<StorePath>, DatabaseError> {
        let failed = self.database.failed("look up references");
        let mut statement = self.database.connection.prepare_cached(REFERENCES).map_err(&failed)?;
        let mut rows = statement.query(params![id]).map_err(&failed)?;
        let mut references = BTreeSet::new();
        while let Some(row) = rows.next().map_err(&failed)? {
            let reference: String = row.get(0).map_err(&failed)?;
            references.insert(self.parse(&reference, referrer, "reference")?);
        }
        Ok(references)
    }

    fn read(
        &self,
        path: &StorePath,
        rendered: &str,
        row: Row,
        references: BTreeSet<StorePath>,
    ) -> Result<PathInfo, DatabaseError> {
        let NixHash::Sha256(nar_hash) =
            NixHash::parse(&row.hash).map_err(|_| unreadable(rendered, "hash", &row.hash))?
        else {
            return Err(unreadable(rendered, "hash", &row.hash));
        };
        let number = |column, value: i64| {
            u64::try_from(value).map_err(|_| unreadable(rendered, column, &value.to_string()))
        };
        let deriver = row.deriver.map(|deriver| self.parse(&deriver, rendered, "deriver")).transpose()?;
        Ok(PathInfo {
            path: path.clone(),
            deriver,
            nar_hash,
            // NULL is how Nix writes an unknown size.
            nar_size: number("narSize", row.nar_size.unwrap_or(0))?,
            references,
            registration_time: number("registrationTime", row.registration_time)?,
            ultimate: row.ultimate == Some(1),
            signatures: row
                .signatures
                .iter()
                .flat_map(|all| all.split_whitespace())
                .map(str::to_owned)
                .collect(),
            content_address: row.content_address.filter(|address| !address.is_empty()),
        })
    }

    fn parse(&self, path: &str, of: &str, column: &'static str) -> Result<StorePath, DatabaseError> {
        self.store_dir.parse_path(path.as_bytes()).map_err(|_| unreadable(of, column, path))
    }
}

struct Row {
    id: i64,
    hash: String,
    registration_time: i64,
    deriver: Option<String>,
    nar_size: Option<i64>,
    ultimate: Option<i64>,
    signatures: Option<String>,
    content_address: Option<String>,
}

fn unreadable(path: &str, column: &'static str, value: &str) -> DatabaseError {
    DatabaseError::Row { path: path.to_owned(), column, value: value.chars().take(200).collect() }
}

// The statements of Nix's LocalStore::queryPathInfoInternal (local-store.cc).
const PATH_INFO: &str =
    "select id, hash, registrationTime, deriver, narSize, ultimate, sigs, ca from ValidPaths where path = ?";
/// Nix writes down the outputs of a derivation when it registers it (`LocalStore::addValidPath` in local-store.cc).
/// What refers to a derivation for long may be much, and built long ago; what came last is looked at first.
const UNBUILT_DEPENDENTS: &str = "select drv.id, drv.path from \
     (select referrer from Refs where reference = ?1 and referrer <> ?1 order by rowid desc limit 4 * ?2) \
     join ValidPaths drv on drv.id = referrer where drv.path glob '*.drv' \
     and (exists (select 1 from DerivationOutputs output where output.drv = drv.id \
     and not exists (select 1 from ValidPaths where path = output.path)) \
     or not exists (select 1 from DerivationOutputs output where output.drv = drv.id)) limit ?2";
const REFERENCES: &str = "select path from Refs join ValidPaths on reference = id where referrer = ?";
