//! Key providers and their sealed generations.

use sqlx::{FromRow, SqliteConnection};
use vmseal_provider::StoredGeneration;

use super::{StoreError, count};

/// A provider.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct ProviderRow {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: String,
    /// Its kind, as its word.
    pub kind: String,
    /// 1 for the default.
    pub is_default: i64,
    /// When it was made or imported.
    pub created_ms: i64,
}

#[derive(FromRow)]
struct GenerationRow {
    number: i64,
    sealed_kdk: Vec<u8>,
    created_ms: i64,
    backed_up_ms: Option<i64>,
}

/// All, by name.
pub async fn list(db: &mut SqliteConnection) -> Result<Vec<ProviderRow>, StoreError> {
    Ok(sqlx::query_as("SELECT name, uuid, kind, is_default, created_ms FROM providers ORDER BY name")
        .fetch_all(db)
        .await?)
}

/// One.
pub async fn get(db: &mut SqliteConnection, name: &str) -> Result<Option<ProviderRow>, StoreError> {
    Ok(sqlx::query_as("SELECT name, uuid, kind, is_default, created_ms FROM providers WHERE name = $1")
        .bind(name)
        .fetch_optional(db)
        .await?)
}

/// Name of the default provider.
pub async fn default_name(db: &mut SqliteConnection) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar("SELECT name FROM providers WHERE is_default = 1").fetch_optional(db).await?)
}

/// Its generations, sealed, oldest first.
pub async fn generations(db: &mut SqliteConnection, name: &str) -> Result<Vec<StoredGeneration>, StoreError> {
    let rows: Vec<GenerationRow> = sqlx::query_as(
        "SELECT number, sealed_kdk, created_ms, backed_up_ms FROM generations WHERE provider = $1 ORDER BY number",
    )
    .bind(name)
    .fetch_all(db)
    .await?;
    let open = |row: GenerationRow| StoredGeneration {
        number: count(row.number),
        created_ms: row.created_ms,
        backed_up_at_ms: row.backed_up_ms,
        sealed: row.sealed_kdk,
    };
    Ok(rows.into_iter().map(open).collect())
}

/// Adds one, without generations.
pub async fn insert(db: &mut SqliteConnection, provider: &ProviderRow) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO providers (name, uuid, kind, is_default, created_ms) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(&provider.name)
    .bind(&provider.uuid)
    .bind(&provider.kind)
    .bind(provider.is_default)
    .bind(provider.created_ms)
    .execute(db)
    .await?;
    Ok(())
}

/// Writes its generations: new ones are added, of those that are there only the time of the backup changes.
pub async fn put_generations(
    db: &mut SqliteConnection,
    name: &str,
    generations: &[StoredGeneration],
) -> Result<(), StoreError> {
    for generation in generations {
        sqlx::query(
            "INSERT INTO generations (provider, number, sealed_kdk, created_ms, backed_up_ms) \
             VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (provider, number) DO UPDATE SET backed_up_ms = excluded.backed_up_ms",
        )
        .bind(name)
        .bind(i64::from(generation.number))
        .bind(&generation.sealed)
        .bind(generation.created_ms)
        .bind(generation.backed_up_at_ms)
        .execute(&mut *db)
        .await?;
    }
    Ok(())
}

/// Makes it the default, and no other.
pub async fn set_default(db: &mut SqliteConnection, name: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE providers SET is_default = CASE WHEN name = $1 THEN 1 ELSE 0 END")
        .bind(name)
        .execute(db)
        .await?;
    Ok(())
}

/// Removes it and its generations. SQLite overwrites what it frees; out of the write-ahead log the sealed KDKs go with
/// [`super::Store::forget_deleted`].
pub async fn remove(db: &mut SqliteConnection, name: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM providers WHERE name = $1").bind(name).execute(db).await?;
    Ok(())
}
