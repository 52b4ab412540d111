//! Answers that were given to requests with an idempotency key, to be given again for 24 hours.

use sqlx::{FromRow, SqliteConnection};

use super::StoreError;

/// How long an answer is kept.
pub const KEPT_MS: i64 = 24 * 3_600_000;

/// A stored answer.
#[derive(Debug, FromRow)]
pub struct StoredAnswer {
    /// Keyed digest of the request.
    pub fingerprint: String,
    /// HTTP status.
    pub status: i64,
    /// Body, sealed.
    pub sealed_body: Vec<u8>,
}

/// The answer that was given, if it is not too old.
pub async fn get(
    db: &mut SqliteConnection,
    who: &str,
    request_key: &str,
    now_ms: i64,
) -> Result<Option<StoredAnswer>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT fingerprint, status, sealed_body FROM idempotency \
         WHERE who = $1 AND request_key = $2 AND created_ms > $3",
    )
    .bind(who)
    .bind(request_key)
    .bind(now_ms - KEPT_MS)
    .fetch_optional(db)
    .await?)
}

/// Keeps an answer; those that are too old go. A duplicate is an error ([`StoreError::is_duplicate`]).
pub async fn insert(
    db: &mut SqliteConnection,
    who: &str,
    request_key: &str,
    answer: &StoredAnswer,
    now_ms: i64,
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM idempotency WHERE created_ms <= $1")
        .bind(now_ms - KEPT_MS)
        .execute(&mut *db)
        .await?;
    sqlx::query(
        "INSERT INTO idempotency (who, request_key, fingerprint, status, sealed_body, created_ms) \
         VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(who)
    .bind(request_key)
    .bind(&answer.fingerprint)
    .bind(answer.status)
    .bind(&answer.sealed_body)
    .bind(now_ms)
    .execute(db)
    .await?;
    Ok(())
}
