//! KEKs by id: whose they are, when they were given, since when they are missing. Never their bytes.

use sqlx::{FromRow, SqliteConnection};
use vmseal_model::id::KekId;

use super::StoreError;
use crate::digest::{hex, unhex};

/// A key.
#[derive(Debug, Clone, Default, PartialEq, Eq, FromRow)]
pub struct KeyRow {
    /// Its provider's name.
    pub provider: String,
    /// Its id, hexadecimal digits.
    pub kek_id: String,
    /// Which provider of that name; absent if it was never there.
    pub provider_uuid: Option<String>,
    /// The VM it belongs to.
    pub vm_id: Option<String>,
    /// libvirt's UUID of that VM, or of the one a task works on.
    pub domain_uuid: Option<String>,
    /// The host it was last given to, or reserved for.
    pub host_id: Option<String>,
    /// The task it was allocated for.
    pub task_id: Option<String>,
    /// When it was allocated, or first asked for.
    pub created_ms: i64,
    /// When a host last got it.
    pub granted_ms: Option<i64>,
    /// Since when it is missing.
    pub missing_since_ms: Option<i64>,
}

/// A key with the names that people know.
#[derive(Debug, Clone, FromRow)]
pub struct NamedKeyRow {
    /// The key.
    #[sqlx(flatten)]
    pub key: KeyRow,
    /// Its VM's name.
    pub vm_name: Option<String>,
    /// Its host's name.
    pub host_name: Option<String>,
}

/// A key's id as it stands in the database.
pub fn column(kek: &KekId) -> String {
    hex(kek.as_bytes())
}

/// A key's id as people see it.
pub fn shown(kek_id: &str) -> String {
    match unhex(kek_id).and_then(KekId::from_bytes) {
        Some(kek) => kek.to_string(),
        None => kek_id.to_owned(),
    }
}

/// One.
pub async fn get(
    db: &mut SqliteConnection,
    provider: &str,
    kek_id: &str,
) -> Result<Option<KeyRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM keys WHERE provider = $1 AND kek_id = $2")
        .bind(provider)
        .bind(kek_id)
        .fetch_optional(db)
        .await?)
}

/// All, by provider and time.
pub async fn list(db: &mut SqliteConnection) -> Result<Vec<NamedKeyRow>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT k.*, (SELECT MIN(v.name) FROM vms v WHERE v.vm_id = k.vm_id) AS vm_name, \
         (SELECT h.name FROM hosts h WHERE h.id = k.host_id) AS host_name \
         FROM keys k ORDER BY k.provider, k.created_ms, k.kek_id",
    )
    .fetch_all(db)
    .await?)
}

/// Adds one, or writes all of it anew.
pub async fn put(db: &mut SqliteConnection, key: &KeyRow) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO keys (provider, kek_id, provider_uuid, vm_id, domain_uuid, host_id, task_id, created_ms, \
         granted_ms, missing_since_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) \
         ON CONFLICT (provider, kek_id) DO UPDATE SET provider_uuid = excluded.provider_uuid, \
         vm_id = excluded.vm_id, domain_uuid = excluded.domain_uuid, host_id = excluded.host_id, \
         task_id = excluded.task_id, granted_ms = excluded.granted_ms, \
         missing_since_ms = excluded.missing_since_ms",
    )
    .bind(&key.provider)
    .bind(&key.kek_id)
    .bind(&key.provider_uuid)
    .bind(&key.vm_id)
    .bind(&key.domain_uuid)
    .bind(&key.host_id)
    .bind(&key.task_id)
    .bind(key.created_ms)
    .bind(key.granted_ms)
    .bind(key.missing_since_ms)
    .execute(db)
    .await?;
    Ok(())
}

/// Forgets the keys of a task that ended without using them: one that was given may wrap a volume by now.
pub async fn forget_unused(db: &mut SqliteConnection, task_id: &str) -> Result<(), StoreError> {
    sqlx::query(
        "DELETE FROM keys WHERE task_id = $1 AND vm_id IS NULL AND granted_ms IS NULL AND NOT EXISTS \
         (SELECT 1 FROM disk_keys d WHERE d.provider = keys.provider AND d.kek_id = keys.kek_id)",
    )
    .bind(task_id)
    .execute(db)
    .await?;
    Ok(())
}

/// Leaves the keys of a removed host's tasks to whoever shows them in a record: the host may have used them.
pub async fn release_of_host(db: &mut SqliteConnection, host_id: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE keys SET host_id = NULL, task_id = NULL WHERE host_id = $1 AND vm_id IS NULL")
        .bind(host_id)
        .execute(db)
        .await?;
    Ok(())
}

/// How many keys of a provider there are.
pub async fn count_of(db: &mut SqliteConnection, provider: &str) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar("SELECT COUNT(*) FROM keys WHERE provider = $1")
        .bind(provider)
        .fetch_one(db)
        .await?)
}

/// The uuid of the provider that keys of this name were made by, if any were.
pub async fn provider_uuid(db: &mut SqliteConnection, provider: &str) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT provider_uuid FROM keys WHERE provider = $1 AND provider_uuid IS NOT NULL LIMIT 1",
    )
    .bind(provider)
    .fetch_optional(db)
    .await?)
}

/// Ids of the keys of a provider that are in use: in a disk's record, of a bound VM, or a running task's.
pub async fn in_use(db: &mut SqliteConnection, provider: &str) -> Result<Vec<String>, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT kek_id FROM disk_keys WHERE provider = $1 \
         UNION SELECT kek_id FROM keys WHERE provider = $1 AND (vm_id IN (SELECT vm_id FROM bindings) \
         OR task_id IN (SELECT id FROM tasks WHERE finished_ms IS NULL)) ORDER BY kek_id",
    )
    .bind(provider)
    .fetch_all(db)
    .await?)
}

/// Names of the VMs that do not start without this provider; a VM of which only its id is known by that.
pub async fn vms_in_need(db: &mut SqliteConnection, provider: &str) -> Result<Vec<String>, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT v.name FROM vms v JOIN disk_keys d ON d.host_id = v.host_id AND d.domain_uuid = v.domain_uuid \
         WHERE d.provider = $1 AND NOT EXISTS (SELECT 1 FROM disk_keys o JOIN providers p ON p.name = o.provider \
         WHERE o.host_id = d.host_id AND o.domain_uuid = d.domain_uuid AND o.target = d.target AND o.provider <> $1) \
         UNION SELECT 'VM ' || k.vm_id FROM keys k WHERE k.provider = $1 \
         AND k.vm_id IN (SELECT vm_id FROM bindings) AND k.vm_id NOT IN \
         (SELECT vm_id FROM vms WHERE vm_id IS NOT NULL) ORDER BY 1",
    )
    .bind(provider)
    .fetch_all(db)
    .await?)
}

/// Notes that all keys of a provider are missing from now on.
pub async fn all_missing(db: &mut SqliteConnection, provider: &str, now_ms: i64) -> Result<u64, StoreError> {
    let done =
        sqlx::query("UPDATE keys SET missing_since_ms = $2 WHERE provider = $1 AND missing_since_ms IS NULL")
            .bind(provider)
            .bind(now_ms)
            .execute(db)
            .await?;
    Ok(done.rows_affected())
}

/// Ids of the keys of a provider that are missing.
pub async fn missing(db: &mut SqliteConnection, provider: &str) -> Result<Vec<String>, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT kek_id FROM keys WHERE provider = $1 AND missing_since_ms IS NOT NULL ORDER BY kek_id",
    )
    .bind(provider)
    .fetch_all(db)
    .await?)
}

/// Notes that a key may be had again.
pub async fn is_back(
    db: &mut SqliteConnection,
    provider: &str,
    kek_id: &str,
    provider_uuid: &str,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE keys SET missing_since_ms = NULL, provider_uuid = $3 WHERE provider = $1 AND kek_id = $2",
    )
    .bind(provider)
    .bind(kek_id)
    .bind(provider_uuid)
    .execute(db)
    .await?;
    Ok(())
}
