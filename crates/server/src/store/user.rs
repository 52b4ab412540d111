//! Users, what was granted to them, and their sessions.

use sqlx::{FromRow, SqliteConnection};

use super::StoreError;

/// A role on an object path and all below it.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct Grant {
    /// The role's name.
    pub role: String,
    /// The path.
    pub path: String,
}

/// A user's password hash.
pub async fn password_hash(db: &mut SqliteConnection, name: &str) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar("SELECT password_hash FROM users WHERE name = $1")
        .bind(name)
        .fetch_optional(db)
        .await?)
}

/// Adds a user; a duplicate is an error ([`StoreError::is_duplicate`]).
pub async fn insert(
    db: &mut SqliteConnection,
    name: &str,
    password_hash: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO users (name, password_hash, created_ms) VALUES ($1, $2, $3)")
        .bind(name)
        .bind(password_hash)
        .bind(now_ms)
        .execute(db)
        .await?;
    Ok(())
}

/// Grants a role.
pub async fn grant(db: &mut SqliteConnection, name: &str, grant: &Grant) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO grants (user_name, role, path) VALUES ($1, $2, $3)")
        .bind(name)
        .bind(&grant.role)
        .bind(&grant.path)
        .execute(db)
        .await?;
    Ok(())
}

/// What was granted to a user.
pub async fn grants(db: &mut SqliteConnection, name: &str) -> Result<Vec<Grant>, StoreError> {
    Ok(sqlx::query_as("SELECT role, path FROM grants WHERE user_name = $1 ORDER BY path, role")
        .bind(name)
        .fetch_all(db)
        .await?)
}

/// Begins a session; those that ended go.
pub async fn begin_session(
    db: &mut SqliteConnection,
    token_sha256: &str,
    name: &str,
    now_ms: i64,
    expires_ms: i64,
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM sessions WHERE expires_ms <= $1").bind(now_ms).execute(&mut *db).await?;
    sqlx::query(
        "INSERT INTO sessions (token_sha256, user_name, created_ms, expires_ms) VALUES ($1, $2, $3, $4)",
    )
    .bind(token_sha256)
    .bind(name)
    .bind(now_ms)
    .bind(expires_ms)
    .execute(db)
    .await?;
    Ok(())
}

/// Whose session this is, if it has not ended.
pub async fn of_session(
    db: &mut SqliteConnection,
    token_sha256: &str,
    now_ms: i64,
) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar("SELECT user_name FROM sessions WHERE token_sha256 = $1 AND expires_ms > $2")
        .bind(token_sha256)
        .bind(now_ms)
        .fetch_optional(db)
        .await?)
}

/// Ends a session.
pub async fn end_session(db: &mut SqliteConnection, token_sha256: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM sessions WHERE token_sha256 = $1").bind(token_sha256).execute(db).await?;
    Ok(())
}
