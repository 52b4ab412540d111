//! Single values: the server's id, its fencing token, the head of the audit.

use sqlx::SqliteConnection;

use super::StoreError;

/// Id of this installation.
pub const SERVER_ID: &str = "server_id";
/// Token of the last start.
pub const FENCING_TOKEN: &str = "fencing_token";
/// Last entry of the audit: `seq:hash:seal`.
pub const AUDIT_HEAD: &str = "audit_head";

/// A value.
pub async fn get(db: &mut SqliteConnection, name: &str) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar("SELECT value FROM meta WHERE name = $1").bind(name).fetch_optional(db).await?)
}

/// Sets a value.
pub async fn set(db: &mut SqliteConnection, name: &str, value: &str) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    )
    .bind(name)
    .bind(value)
    .execute(db)
    .await?;
    Ok(())
}
