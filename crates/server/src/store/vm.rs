//! VMs as the hosts report them.

use sqlx::{FromRow, SqliteConnection};

use super::StoreError;

/// A VM on a host.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct VmRow {
    /// The host.
    pub host_id: String,
    /// Its name.
    pub host_name: String,
    /// libvirt's UUID.
    pub domain_uuid: String,
    /// libvirt's name.
    pub name: String,
    /// State, as its word.
    pub state: String,
    /// Our id, if it is not clear.
    pub vm_id: Option<String>,
    /// 1 if the two ids do not belong together.
    pub unknown_ids: i64,
    /// 1 if it has no persistent definition.
    pub transient: i64,
    /// JSON list of lines.
    pub unprotected: String,
    /// While it is locked: the provider.
    pub locked_provider: Option<String>,
    /// The key, as people see it.
    pub locked_key: Option<String>,
    /// Since when.
    pub locked_since_ms: Option<i64>,
    /// Why.
    pub locked_reason: Option<String>,
    /// 1 if the host starts it when the key comes.
    pub locked_wanted: i64,
    /// When it was last reported.
    pub seen_ms: i64,
    /// The task at work on it.
    pub task_id: Option<String>,
}

/// Where a page of VMs goes on: after this name, host and UUID.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct After(pub String, pub String, pub String);

/// So many VMs, by name, after `after`.
pub async fn page(db: &mut SqliteConnection, after: &After, limit: i64) -> Result<Vec<VmRow>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT v.*, h.name AS host_name, (SELECT MIN(t.id) FROM tasks t WHERE t.host_id = v.host_id \
         AND t.domain_uuid = v.domain_uuid AND t.finished_ms IS NULL) AS task_id \
         FROM vms v JOIN hosts h ON h.id = v.host_id \
         WHERE (v.name, v.host_id, v.domain_uuid) > ($1, $2, $3) \
         ORDER BY v.name, v.host_id, v.domain_uuid LIMIT $4",
    )
    .bind(&after.0)
    .bind(&after.1)
    .bind(&after.2)
    .bind(limit)
    .fetch_all(db)
    .await?)
}

/// Those with this name, VM id or libvirt UUID.
pub async fn find(db: &mut SqliteConnection, name: &str) -> Result<Vec<VmRow>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT v.*, h.name AS host_name, (SELECT MIN(t.id) FROM tasks t WHERE t.host_id = v.host_id \
         AND t.domain_uuid = v.domain_uuid AND t.finished_ms IS NULL) AS task_id \
         FROM vms v JOIN hosts h ON h.id = v.host_id \
         WHERE v.name = $1 OR v.vm_id = $1 OR v.domain_uuid = $1 ORDER BY h.name, v.domain_uuid",
    )
    .bind(name)
    .fetch_all(db)
    .await?)
}

/// Whether a host reported this domain.
pub async fn is_on(db: &mut SqliteConnection, host_id: &str, domain_uuid: &str) -> Result<bool, StoreError> {
    let found: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM vms WHERE host_id = $1 AND domain_uuid = $2")
        .bind(host_id)
        .bind(domain_uuid)
        .fetch_one(db)
        .await?;
    Ok(found > 0)
}

/// Forgets what a host reported, before it is written anew.
pub async fn clear(db: &mut SqliteConnection, host_id: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM vms WHERE host_id = $1").bind(host_id).execute(db).await?;
    Ok(())
}

/// Writes one down.
pub async fn insert(db: &mut SqliteConnection, vm: &VmRow) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO vms (host_id, domain_uuid, name, state, vm_id, unknown_ids, transient, unprotected, \
         locked_provider, locked_key, locked_since_ms, locked_reason, locked_wanted, seen_ms) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
    )
    .bind(&vm.host_id)
    .bind(&vm.domain_uuid)
    .bind(&vm.name)
    .bind(&vm.state)
    .bind(&vm.vm_id)
    .bind(vm.unknown_ids)
    .bind(vm.transient)
    .bind(&vm.unprotected)
    .bind(&vm.locked_provider)
    .bind(&vm.locked_key)
    .bind(vm.locked_since_ms)
    .bind(&vm.locked_reason)
    .bind(vm.locked_wanted)
    .bind(vm.seen_ms)
    .execute(db)
    .await?;
    Ok(())
}

/// Notes that a VM's two ids belong together.
pub async fn known(db: &mut SqliteConnection, host_id: &str, domain_uuid: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE vms SET unknown_ids = 0 WHERE host_id = $1 AND domain_uuid = $2")
        .bind(host_id)
        .bind(domain_uuid)
        .execute(db)
        .await?;
    Ok(())
}

/// A VM's disks, counted.
#[derive(Debug, Clone, Copy, FromRow)]
pub struct DiskCount {
    /// All.
    pub disks: i64,
    /// The encrypted ones.
    pub encrypted: i64,
    /// 1 if the VM is locked.
    pub locked: i64,
}

/// For every VM, how many of its disks are encrypted.
pub async fn coverage(db: &mut SqliteConnection) -> Result<Vec<DiskCount>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT COUNT(d.target) AS disks, COALESCE(SUM(d.encrypted), 0) AS encrypted, \
         CASE WHEN v.state = 'locked' THEN 1 ELSE 0 END AS locked \
         FROM vms v LEFT JOIN disks d ON d.host_id = v.host_id AND d.domain_uuid = v.domain_uuid \
         GROUP BY v.host_id, v.domain_uuid, v.state",
    )
    .fetch_all(db)
    .await?)
}
