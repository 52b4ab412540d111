//! Floors: the highest epoch seen of each disk's key record, with that record. They only rise.

use sqlx::{FromRow, SqliteConnection};

use super::StoreError;

/// A disk's floor.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct FloorRow {
    /// The disk.
    pub disk_id: String,
    /// The VM of the record.
    pub vm_id: String,
    /// The epoch.
    pub epoch: i64,
    /// The record, encoded.
    pub record: Vec<u8>,
}

/// A floor.
pub async fn get(db: &mut SqliteConnection, disk_id: &str) -> Result<Option<FloorRow>, StoreError> {
    Ok(sqlx::query_as("SELECT disk_id, vm_id, epoch, record FROM floors WHERE disk_id = $1")
        .bind(disk_id)
        .fetch_optional(db)
        .await?)
}

/// Raises a floor; a lower or equal epoch, or another VM's record, changes nothing.
pub async fn raise(db: &mut SqliteConnection, floor: &FloorRow, now_ms: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO floors (disk_id, vm_id, epoch, record, seen_ms) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (disk_id) DO UPDATE \
         SET epoch = excluded.epoch, record = excluded.record, seen_ms = excluded.seen_ms \
         WHERE excluded.epoch > floors.epoch AND excluded.vm_id = floors.vm_id",
    )
    .bind(&floor.disk_id)
    .bind(&floor.vm_id)
    .bind(floor.epoch)
    .bind(&floor.record)
    .bind(now_ms)
    .execute(db)
    .await?;
    Ok(())
}
