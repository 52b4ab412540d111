//! Join tokens: each buys one host certificate, within its time.

use sqlx::SqliteConnection;

use super::StoreError;

/// Notes a token by its secret's digest; those long expired go.
pub async fn insert(
    db: &mut SqliteConnection,
    secret_sha256: &str,
    by: &str,
    now_ms: i64,
    expires_ms: i64,
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM join_tokens WHERE expires_ms < $1")
        .bind(now_ms - 24 * 3_600_000)
        .execute(&mut *db)
        .await?;
    sqlx::query(
        "INSERT INTO join_tokens (secret_sha256, by_whom, created_ms, expires_ms) VALUES ($1, $2, $3, $4)",
    )
    .bind(secret_sha256)
    .bind(by)
    .bind(now_ms)
    .bind(expires_ms)
    .execute(db)
    .await?;
    Ok(())
}

/// Uses a token up; `false` if there is no such one, it is used or too old.
pub async fn use_up(
    db: &mut SqliteConnection,
    secret_sha256: &str,
    host_id: &str,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE join_tokens SET used_ms = $2, host_id = $3 \
         WHERE secret_sha256 = $1 AND used_ms IS NULL AND expires_ms > $2",
    )
    .bind(secret_sha256)
    .bind(now_ms)
    .bind(host_id)
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}
