//! Nix's database: opening it, and the one schema we know.

use super::{CycleError, Location};
use nix_derivation::{hash, store_path};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use std::fs::{self, File};
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

/// The database could not be read or written, or must not be.
#[derive(Debug, Error)]
pub enum DatabaseError {
    /// There is no store here, or it belongs to someone else.
    #[error("cannot read '{}'; is there a Nix store, and may this user use it?", path.display())]
    NoSchema {
        /// The file that tells the version of the schema.
        path: PathBuf,
        /// Why it could not be read.
        #[source]
        source: io::Error,
    },
    /// A Nix that we do not know has upgraded the database (or never has).
    #[error(
        "the Nix database has schema '{found}' ('{}'), nix-offload knows only {KNOWN_SCHEMA}; \
         a nix-offload that fits this Nix is needed",
        path.display()
    )]
    Schema {
        /// The file that tells the version of the schema.
        path: PathBuf,
        /// The version in it.
        found: String,
    },
    /// SQLite failed.
    #[error("cannot {action} in the Nix database '{}'", path.display())]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// What was to be done.
        action: &'static str,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// A row has a value that no Nix writes.
    #[error("the Nix database has an unreadable {column} for '{path}': {value:?}")]
    Row {
        /// The path of the row.
        path: String,
        /// The column.
        column: &'static str,
        /// The beginning of the value.
        value: String,
    },
    /// A path is to be registered whose reference is not there.
    #[error("cannot register '{path}': it refers to '{reference}', which is not valid")]
    InvalidReference {
        /// The path to be registered.
        path: String,
        /// The path that is missing.
        reference: String,
    },
    /// Paths to be registered refer to each other in a circle.
    #[error("cannot register outputs that refer to each other")]
    Cycle(
        /// The circle.
        #[source]
        CycleError,
    ),
    /// The content address does not lead to the path.
    #[error("cannot register '{path}': its content address '{content_address}' belongs to '{computed}'")]
    NotContentAddressed {
        /// The path to be registered.
        path: String,
        /// The address it claims.
        content_address: String,
        /// The path of that address.
        computed: String,
    },
    /// No path can have this content address.
    #[error("cannot register '{path}': its content address '{content_address}' fits no path")]
    UnusableContentAddress {
        /// The path to be registered.
        path: String,
        /// The address it claims.
        content_address: String,
        /// What is wrong with it.
        #[source]
        source: store_path::Error,
    },
    /// The content address cannot be read.
    #[error("cannot register '{path}': its content address '{content_address}' is malformed")]
    MalformedContentAddress {
        /// The path to be registered.
        path: String,
        /// The address it claims.
        content_address: String,
        /// What is wrong with it.
        #[source]
        source: hash::Error,
    },
    /// A derivation is more than a path: Nix also records its outputs.
    #[error("cannot register '{path}': it is a derivation")]
    Derivation {
        /// The path to be registered.
        path: String,
    },
    /// Another process has registered other contents while we worked.
    #[error("'{path}' has become valid meanwhile, with the NAR hash {registered} instead of {ours}")]
    ValidOtherwise {
        /// The path to be registered.
        path: String,
        /// The hash in the database.
        registered: String,
        /// The hash of what we restored.
        ours: String,
    },
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// An open database, with its path for messages.
pub(super) struct Database {
    pub(super) connection: Connection,
    path: PathBuf,
}

impl Database {
    pub(super) fn open(location: &Location, access: Access) -> Result<Self, DatabaseError> {
        let directory = location.state_dir.join("db");
        check_schema(&directory.join("schema"))?;
        let path = directory.join("db.sqlite");
        let connection = connect(&path, access).and_then(|connection| {
            connection.busy_timeout(BUSY_TIMEOUT)?;
            // Without this the last one out deletes the write-ahead log, which readers without write
            // permission need; Nix keeps it too (SQLITE_FCNTL_PERSIST_WAL in local-store.cc since 2.22).
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
            Ok(connection)
        });
        match connection {
            Ok(connection) => Ok(Self { connection, path }),
            Err(source) => Err(DatabaseError::Sqlite { path, action: "open a connection", source }),
        }
    }

    /// For `map_err`: names the action and the file.
    pub(super) fn failed(&self, action: &'static str) -> impl Fn(rusqlite::Error) -> DatabaseError + use<> {
        let path = self.path.clone();
        move |source| DatabaseError::Sqlite { path: path.clone(), action, source }
    }
}

/// Opens the file with the kind of locks that Nix uses for it.
///
/// With `use-sqlite-wal = false` Nix locks by a directory `db.sqlite.lock` (`unix-dotfile`, see `sqlite.cc`),
/// which the usual locks do not respect. The file itself tells: such a database has no write-ahead log.
/// Looking must not write, for a read-write connection would roll back the journal of a transaction that
/// is under way. So unless it says that it has one, the usual read-only connection comes first, and `unix-dotfile` only
/// after it.
fn connect(path: &Path, access: Access) -> rusqlite::Result<Connection> {
    let reading = OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_READ_ONLY;
    let writing = OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_READ_WRITE;
    if access == Access::Write && says_wal(path).unwrap_or(false) {
        return Connection::open_with_flags(path, writing);
    }
    let usual = Connection::open_with_flags(path, reading).and_then(|connection| {
        connection.busy_timeout(BUSY_TIMEOUT)?;
        let mode: String = connection.query_row("pragma main.journal_mode", [], |row| row.get(0))?;
        Ok((connection, mode == "wal"))
    });
    match (usual, access) {
        (Ok((connection, true)), Access::Read) => Ok(connection),
        (Ok((_open, true)), Access::Write) => Connection::open_with_flags(path, writing),
        (Err(error), _) if !is_journal_trouble(&error) => Err(error),
        (_, access) => {
            let flags = if access == Access::Read { reading } else { writing };
            Connection::open_with_flags_and_vfs(path, flags, c"unix-dotfile")
        }
    }
}

/// Whether the head of a database file says that it has a write-ahead log, which is much cheaper than a connection.
///
/// Source: <https://www.sqlite.org/fileformat2.html>, "File format version numbers".
pub(super) fn says_wal(path: &Path) -> io::Result<bool> {
    const MAGIC: &[u8] = b"SQLite format 3\0";
    /// The versions for writing and reading, of a file with a write-ahead log.
    const WAL: [u8; 2] = [2, 2];
    let mut head = [0; 20];
    let file = File::open(path)?;
    let read = file.read_exact_at(&mut head, 0);
    // Closing it would drop the locks that all our connections have on this file, so it stays open to the end of the
    // process, which opens few connections for writing.
    let _ = file.into_raw_fd();
    read.map(|()| head.starts_with(MAGIC) && head[18..] == WAL)
}

/// Whether a read-only connection met the journal of somebody's transaction.
fn is_journal_trouble(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen))
}

fn check_schema(path: &Path) -> Result<(), DatabaseError> {
    let text = fs::read(path).map_err(|source| DatabaseError::NoSchema { path: path.to_owned(), source })?;
    let text = String::from_utf8_lossy(&text);
    let found = text.trim();
    if found == KNOWN_SCHEMA {
        Ok(())
    } else {
        Err(DatabaseError::Schema { path: path.to_owned(), found: found.chars().take(40).collect() })
    }
}

/// `nixSchemaVersion` in `local-store.hh`, the same since Nix 2.0.
const KNOWN_SCHEMA: &str = "10";

/// As long as Nix itself waits (`sqlite.cc`).
const BUSY_TIMEOUT: Duration = Duration::from_secs(60 * 60);
