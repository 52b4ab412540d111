//! Disks as the hosts report them, and the keys in their records.

use sqlx::{FromRow, SqliteConnection};
use vmseal_api::disk::{Disk, DiskKey};

use super::{StoreError, from_db, key};

#[derive(FromRow)]
struct DiskRow {
    target: String,
    source: String,
    format: String,
    encrypted: i64,
    disk_id: Option<String>,
    epoch: Option<i64>,
    epoch_unverified: i64,
    stored_bytes: i64,
    presented_bytes: i64,
    class: String,
    asked: String,
    why: String,
    header: Option<String>,
}

/// A VM's disks, by target.
pub async fn of_vm(
    db: &mut SqliteConnection,
    host_id: &str,
    domain_uuid: &str,
) -> Result<Vec<Disk>, StoreError> {
    let rows: Vec<DiskRow> = sqlx::query_as(
        "SELECT target, source, format, encrypted, disk_id, epoch, epoch_unverified, stored_bytes, presented_bytes, \
         class, asked, why, header FROM disks WHERE host_id = $1 AND domain_uuid = $2 ORDER BY target",
    )
    .bind(host_id)
    .bind(domain_uuid)
    .fetch_all(&mut *db)
    .await?;
    let keys: Vec<(String, String, String)> = sqlx::query_as(
        "SELECT target, provider, kek_id FROM disk_keys WHERE host_id = $1 AND domain_uuid = $2 \
         ORDER BY target, provider, kek_id",
    )
    .bind(host_id)
    .bind(domain_uuid)
    .fetch_all(db)
    .await?;
    let disk = |row: DiskRow| Disk {
        keys: keys
            .iter()
            .filter(|(target, ..)| *target == row.target)
            .map(|(_, provider, kek)| DiskKey { provider: provider.clone(), key: key::shown(kek) })
            .collect(),
        target: row.target,
        source: row.source,
        format: row.format,
        encrypted: row.encrypted != 0,
        id: row.disk_id,
        epoch: row.epoch.map(from_db),
        epoch_unverified: row.epoch_unverified != 0,
        stored_bytes: from_db(row.stored_bytes),
        presented_bytes: from_db(row.presented_bytes),
        class: row.class,
        asked: row.asked,
        why: row.why,
        header: row.header,
    };
    Ok(rows.into_iter().map(disk).collect())
}

/// Writes one down. Its VM's row is there, its own is not.
pub async fn insert(
    db: &mut SqliteConnection,
    host_id: &str,
    domain_uuid: &str,
    disk: &Disk,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO disks (host_id, domain_uuid, target, source, format, encrypted, disk_id, epoch, \
         epoch_unverified, stored_bytes, presented_bytes, class, header, asked, why) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
    )
    .bind(host_id)
    .bind(domain_uuid)
    .bind(&disk.target)
    .bind(&disk.source)
    .bind(&disk.format)
    .bind(i64::from(disk.encrypted))
    .bind(&disk.id)
    .bind(disk.epoch.map(super::to_db))
    .bind(i64::from(disk.epoch_unverified))
    .bind(super::to_db(disk.stored_bytes))
    .bind(super::to_db(disk.presented_bytes))
    .bind(&disk.class)
    .bind(&disk.header)
    .bind(&disk.asked)
    .bind(&disk.why)
    .execute(db)
    .await?;
    Ok(())
}

/// Writes down a key that is in a disk's record.
pub async fn insert_key(
    db: &mut SqliteConnection,
    host_id: &str,
    domain_uuid: &str,
    target: &str,
    provider: &str,
    kek_id: &str,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO disk_keys (host_id, domain_uuid, target, provider, kek_id) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT DO NOTHING",
    )
    .bind(host_id)
    .bind(domain_uuid)
    .bind(target)
    .bind(provider)
    .bind(kek_id)
    .execute(db)
    .await?;
    Ok(())
}
