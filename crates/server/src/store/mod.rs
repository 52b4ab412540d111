//! The database: SQLite in WAL mode, every commit on the disk before it is answered.
//!
//! One writer at a time, in the order in which they came ([`Store::write`]); readers see the last commit. A file of
//! this module knows the rows of one noun and nothing of who may see them. SQL keeps to what PostgreSQL understands
//! too: `$1`, TEXT, BIGINT, no `query!`.

pub mod binding;
pub mod disk;
pub mod floor;
pub mod host;
pub mod idempotency;
pub mod join_token;
pub mod key;
pub mod meta;
pub mod provider;
pub mod task;
pub mod user;
pub mod vm;

use std::{
    ops::{Deref, DerefMut},
    path::Path,
    sync::Arc,
    time::Duration,
};

use sqlx::{
    Sqlite, SqliteConnection, SqlitePool, Transaction,
    migrate::MigrateError,
    pool::PoolConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::{
    audit::{self, AuditKey, Entry},
    clock::Clock,
};

/// The database, open.
#[derive(Clone)]
pub struct Store {
    pool: SqlitePool,
    turn: Arc<Mutex<()>>,
    audit_key: Arc<AuditKey>,
    clock: Clock,
}

impl Store {
    /// Opens it, makes it if missing, brings it up to date.
    pub async fn open(path: &Path, audit_key: AuditKey, clock: Clock) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            // What is deleted is overwritten: a removed provider's sealed KDK stays in no free page.
            .pragma("secure_delete", "ON")
            .busy_timeout(Duration::from_secs(10));
        let pool = SqlitePoolOptions::new().max_connections(8).connect_with(options).await?;
        sqlx::migrate!("migrations/sqlite").run(&pool).await?;
        Ok(Self { pool, turn: Arc::default(), audit_key: Arc::new(audit_key), clock })
    }

    /// A connection for reading.
    pub async fn read(&self) -> Result<PoolConnection<Sqlite>, StoreError> {
        Ok(self.pool.acquire().await?)
    }

    /// A transaction. Dropped without [`Write::commit`] it changes nothing.
    pub async fn write(&self) -> Result<Write, StoreError> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        Ok(Write { tx, audit_key: Arc::clone(&self.audit_key), now_ms: self.clock.now_ms(), _turn: turn })
    }

    /// Moves what was committed from the write-ahead log into the database and empties the log, so that what was
    /// deleted is in neither.
    pub async fn forget_deleted(&self) -> Result<(), StoreError> {
        let _turn = self.turn.lock().await;
        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&self.pool).await?;
        Ok(())
    }

    /// What seals audit entries.
    pub fn audit_key(&self) -> &AuditKey {
        &self.audit_key
    }

    /// Waits for what is being written, then closes.
    pub async fn close(&self) {
        let _turn = self.turn.lock().await;
        self.pool.close().await;
    }
}

/// A transaction in progress, and the writer's turn.
pub struct Write {
    tx: Transaction<'static, Sqlite>,
    audit_key: Arc<AuditKey>,
    /// When it began.
    pub now_ms: i64,
    _turn: OwnedMutexGuard<()>,
}

impl Write {
    /// Appends to the audit; part of the transaction like everything else.
    pub async fn audit(&mut self, entry: &Entry<'_>) -> Result<(), StoreError> {
        audit::append(&mut self.tx, &self.audit_key, self.now_ms, entry).await
    }

    /// Makes it durable.
    pub async fn commit(self) -> Result<(), StoreError> {
        Ok(self.tx.commit().await?)
    }
}

impl Deref for Write {
    type Target = SqliteConnection;
    fn deref(&self) -> &SqliteConnection {
        &self.tx
    }
}

impl DerefMut for Write {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.tx
    }
}

/// Why the database did not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// SQLite's own words are the source.
    #[error("the server's database failed")]
    Sql(#[from] sqlx::Error),
    /// It was made by a newer version, or is damaged.
    #[error("the server's database cannot be brought to this version")]
    Migrate(#[from] MigrateError),
    /// A row that no version of the server writes.
    #[error("the server's database holds a {what} that does not read: '{text}'")]
    Row {
        /// Which column.
        what: &'static str,
        /// What stands there, shortened.
        text: String,
    },
}

impl StoreError {
    /// A value that does not read.
    pub(crate) fn row(what: &'static str, text: &str) -> Self {
        Self::Row { what, text: text.chars().take(64).collect() }
    }

    /// Whether a row of that key was there already.
    pub fn is_duplicate(&self) -> bool {
        matches!(self, Self::Sql(sqlx::Error::Database(e)) if e.is_unique_violation())
    }
}

/// SQLite's integers are signed; sizes and epochs beyond 2^63 do not occur and are kept at the limit.
pub(crate) fn to_db(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Back from [`to_db`].
pub(crate) fn from_db(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// A count for the API.
pub(crate) fn count(value: i64) -> u32 {
    u32::try_from(value.max(0)).unwrap_or(u32::MAX)
}

/// An enumeration of the model, from the word in its column.
pub(crate) fn word<T: serde::de::DeserializeOwned>(what: &'static str, text: &str) -> Result<T, StoreError> {
    serde_json::from_value(serde_json::Value::String(text.to_owned()))
        .map_err(|_| StoreError::row(what, text))
}

/// The word of an enumeration of the model.
pub(crate) fn to_word<T: serde::Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}
