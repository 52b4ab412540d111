//! Hosts that joined.

use sqlx::{FromRow, SqliteConnection};
use vmseal_api::host::Capabilities;

use super::StoreError;

/// A host.
#[derive(Debug, Clone, FromRow)]
pub struct HostRow {
    /// Its id.
    pub id: String,
    /// Its name, unique.
    pub name: String,
    /// When its certificate expires.
    pub certificate_expires_ms: i64,
    /// When it joined.
    pub joined_ms: i64,
    /// When it was last heard of.
    pub seen_ms: Option<i64>,
    /// Version of its agent.
    pub version: String,
    /// The libvirt it works with.
    pub libvirt_uri: String,
    /// How it keeps keys in memory.
    pub secret_memory: String,
    /// Its doctor's findings, JSON.
    pub warnings: String,
    /// VMs on it.
    pub vms: i64,
    /// What it can present disks by, JSON.
    pub capabilities: String,
}

impl HostRow {
    /// What it can present disks by; of one that never said, nothing.
    pub fn capabilities(&self) -> Capabilities {
        serde_json::from_str(&self.capabilities).unwrap_or_default()
    }
}

/// What is known of a host that joins.
pub struct NewHost<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its name.
    pub name: &'a str,
    /// `/etc/machine-id`.
    pub machine_id: &'a str,
    /// Its certificate's digest.
    pub certificate_sha256: &'a str,
    /// When that expires.
    pub certificate_expires_ms: i64,
}

/// What it said of itself when its session began.
pub struct Greeting<'a> {
    /// Version of its agent.
    pub version: &'a str,
    /// The libvirt it works with.
    pub libvirt_uri: &'a str,
    /// How it keeps keys in memory.
    pub secret_memory: &'a str,
    /// Its doctor's findings, JSON.
    pub warnings: &'a str,
}

const COLUMNS: &str = "SELECT h.id, h.name, h.certificate_expires_ms, h.joined_ms, h.seen_ms, h.version, h.libvirt_uri, \
     h.secret_memory, h.warnings, h.capabilities, (SELECT COUNT(*) FROM vms v WHERE v.host_id = h.id) AS vms FROM hosts h";

/// All, by name.
pub async fn list(db: &mut SqliteConnection) -> Result<Vec<HostRow>, StoreError> {
    let sql = sqlx::AssertSqlSafe(format!("{COLUMNS} ORDER BY h.name"));
    Ok(sqlx::query_as(sql).fetch_all(db).await?)
}

/// The one of this name or id.
pub async fn find(db: &mut SqliteConnection, name: &str) -> Result<Option<HostRow>, StoreError> {
    let sql = sqlx::AssertSqlSafe(format!("{COLUMNS} WHERE h.name = $1 OR h.id = $1"));
    Ok(sqlx::query_as(sql).bind(name).fetch_optional(db).await?)
}

/// Name of a host that may be gone.
pub async fn name_of(db: &mut SqliteConnection, id: &str) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar("SELECT name FROM hosts WHERE id = $1").bind(id).fetch_optional(db).await?)
}

/// Id and name of the host with this certificate.
pub async fn of_certificate(
    db: &mut SqliteConnection,
    sha256: &str,
) -> Result<Option<(String, String)>, StoreError> {
    Ok(sqlx::query_as("SELECT id, name FROM hosts WHERE certificate_sha256 = $1")
        .bind(sha256)
        .fetch_optional(db)
        .await?)
}

/// Whether a name is taken.
pub async fn is_taken(db: &mut SqliteConnection, name: &str) -> Result<bool, StoreError> {
    let found: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM hosts WHERE name = $1 OR id = $1")
        .bind(name)
        .fetch_one(db)
        .await?;
    Ok(found > 0)
}

/// Adds one.
pub async fn insert(db: &mut SqliteConnection, host: &NewHost<'_>, now_ms: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO hosts (id, name, machine_id, certificate_sha256, certificate_expires_ms, joined_ms) \
         VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(host.id)
    .bind(host.name)
    .bind(host.machine_id)
    .bind(host.certificate_sha256)
    .bind(host.certificate_expires_ms)
    .bind(now_ms)
    .execute(db)
    .await?;
    Ok(())
}

/// Notes what it said of itself.
pub async fn greet(
    db: &mut SqliteConnection,
    id: &str,
    said: &Greeting<'_>,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE hosts SET version = $2, libvirt_uri = $3, secret_memory = $4, warnings = $5, seen_ms = $6 WHERE id = $1",
    )
    .bind(id)
    .bind(said.version)
    .bind(said.libvirt_uri)
    .bind(said.secret_memory)
    .bind(said.warnings)
    .bind(now_ms)
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Whether any host has joined.
pub async fn any(db: &mut SqliteConnection) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar::<_, i64>("SELECT EXISTS (SELECT 1 FROM hosts)").fetch_one(db).await? != 0)
}

/// Notes that it was heard of, with its doctor's findings and what it can present disks by, both JSON.
pub async fn seen(
    db: &mut SqliteConnection,
    id: &str,
    (warnings, capabilities): (&str, &str),
    now_ms: i64,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE hosts SET warnings = $2, capabilities = $3, seen_ms = $4 WHERE id = $1")
        .bind(id)
        .bind(warnings)
        .bind(capabilities)
        .bind(now_ms)
        .execute(db)
        .await?;
    Ok(())
}

/// Removes it and what it reported.
pub async fn remove(db: &mut SqliteConnection, id: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM hosts WHERE id = $1").bind(id).execute(db).await?;
    Ok(())
}
