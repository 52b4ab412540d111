//! Which VM id belongs to which libvirt UUID, and on which host the VM is placed: what decides who gets its keys.

use sqlx::{FromRow, SqliteConnection};

use super::StoreError;

/// A pair that belongs together.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct Binding {
    /// Our id.
    pub vm_id: String,
    /// libvirt's.
    pub domain_uuid: String,
    /// Where it is placed.
    pub host_id: String,
}

/// The bindings of which one half fits: none, one, or two that contradict the pair.
pub async fn touching(
    db: &mut SqliteConnection,
    vm_id: &str,
    domain_uuid: &str,
) -> Result<Vec<Binding>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT vm_id, domain_uuid, host_id FROM bindings WHERE vm_id = $1 OR domain_uuid = $2 ORDER BY vm_id",
    )
    .bind(vm_id)
    .bind(domain_uuid)
    .fetch_all(db)
    .await?)
}

/// The binding of a VM.
pub async fn of_vm(db: &mut SqliteConnection, vm_id: &str) -> Result<Option<Binding>, StoreError> {
    Ok(sqlx::query_as("SELECT vm_id, domain_uuid, host_id FROM bindings WHERE vm_id = $1")
        .bind(vm_id)
        .fetch_optional(db)
        .await?)
}

/// Binds, in place of every binding that contradicts it.
pub async fn put(db: &mut SqliteConnection, binding: &Binding, now_ms: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM bindings WHERE vm_id = $1 OR domain_uuid = $2")
        .bind(&binding.vm_id)
        .bind(&binding.domain_uuid)
        .execute(&mut *db)
        .await?;
    sqlx::query("INSERT INTO bindings (vm_id, domain_uuid, host_id, bound_ms) VALUES ($1, $2, $3, $4)")
        .bind(&binding.vm_id)
        .bind(&binding.domain_uuid)
        .bind(&binding.host_id)
        .bind(now_ms)
        .execute(db)
        .await?;
    Ok(())
}

/// Forgets what was bound to a domain that its own host now reports as clear.
pub async fn release(db: &mut SqliteConnection, domain_uuid: &str, host_id: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM bindings WHERE domain_uuid = $1 AND host_id = $2")
        .bind(domain_uuid)
        .bind(host_id)
        .execute(db)
        .await?;
    Ok(())
}
