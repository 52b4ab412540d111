//! The audit: a chain of hashes over what was done, asked and refused. Format: `docs/formats/audit.md`.
//!
//! An entry is appended in the transaction of what it tells, so there is no change without its entry. Each carries
//! the SHA-256 of the previous hash and itself, which anybody can check, and a seal under a key derived from the
//! root key, which only the server can make: a chain that was computed anew is found at its first forged entry, and
//! one that was cut off is found by the sealed head.

use aws_lc_rs::hmac;
use sqlx::{FromRow, SqliteConnection};
use vmseal_api::audit::{AuditBreak, AuditEntry, AuditVerification};
use vmseal_keys::{SecretError, derive};
use vmseal_provider::RootKey;

use crate::{
    digest::{hex, sha256_hex, unhex},
    store::{StoreError, from_db, meta, to_db},
};

/// Hash before the first entry.
const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Outcome of what succeeded; all others are stable words of refusals.
pub const DONE: &str = "done";
/// Longest text of a field; longer ones are cut.
const MAX_TEXT: usize = 4096;
/// Entries read at a time.
const BATCH: i64 = 500;

/// What is to be told.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// By whom: `local root`, `user:<name>`, `host:<name>`, `nobody`, `server`.
    pub who: &'a str,
    /// What.
    pub verb: &'a str,
    /// On what: an object path.
    pub object: &'a str,
    /// [`DONE`], or the word of a refusal.
    pub outcome: &'a str,
    /// More, in words. Never a secret.
    pub detail: &'a str,
}

/// Seals entries.
pub struct AuditKey(hmac::Key);

impl AuditKey {
    /// The key of this installation.
    pub fn of(root: &RootKey) -> Result<Self, SecretError> {
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, root.derive("audit-seal")?.expose())))
    }

    fn seal(&self, purpose: &str, text: &str) -> String {
        hex(hmac::sign(&self.0, &derive::info(purpose, &[text.as_bytes()])).as_ref())
    }

    fn verify(&self, purpose: &str, text: &str, seal: &str) -> bool {
        unhex(seal).is_some_and(|tag| {
            hmac::verify(&self.0, &derive::info(purpose, &[text.as_bytes()]), &tag).is_ok()
        })
    }
}

#[derive(FromRow)]
struct Row {
    seq: i64,
    at_ms: i64,
    who: String,
    verb: String,
    object: String,
    outcome: String,
    detail: String,
    hash: String,
    seal: String,
}

impl Row {
    /// Hash of this entry after one with the hash `previous`.
    fn hash_after(&self, previous: &str) -> String {
        let mut bytes = b"vmseal/v1/audit".to_vec();
        bytes.extend_from_slice(previous.as_bytes());
        bytes.extend_from_slice(&self.seq.to_le_bytes());
        bytes.extend_from_slice(&self.at_ms.to_le_bytes());
        for text in [&self.who, &self.verb, &self.object, &self.outcome, &self.detail] {
            bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        sha256_hex(&bytes)
    }

    fn into_api(self) -> AuditEntry {
        AuditEntry {
            seq: from_db(self.seq),
            at_ms: self.at_ms,
            who: self.who,
            verb: self.verb,
            object: self.object,
            outcome: self.outcome,
            detail: self.detail,
            hash: self.hash,
        }
    }
}

/// Appends. Whatever else is done in `db`'s transaction is done only if this succeeds.
pub(crate) async fn append(
    db: &mut SqliteConnection,
    key: &AuditKey,
    at_ms: i64,
    entry: &Entry<'_>,
) -> Result<(), StoreError> {
    let last: Option<(i64, String)> = sqlx::query_as("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
        .fetch_optional(&mut *db)
        .await?;
    let (seq, previous) = match last {
        Some((seq, hash)) => (seq.saturating_add(1), hash),
        None => (1, GENESIS.to_owned()),
    };
    let text = |text: &str| text.chars().take(MAX_TEXT).collect::<String>();
    let mut row = Row {
        seq,
        at_ms,
        who: text(entry.who),
        verb: text(entry.verb),
        object: text(entry.object),
        outcome: text(entry.outcome),
        detail: text(entry.detail),
        hash: String::new(),
        seal: String::new(),
    };
    row.hash = row.hash_after(&previous);
    row.seal = key.seal("audit-entry", &row.hash);
    sqlx::query(
        "INSERT INTO audit (seq, at_ms, who, verb, object, outcome, detail, hash, seal) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(row.seq)
    .bind(row.at_ms)
    .bind(&row.who)
    .bind(&row.verb)
    .bind(&row.object)
    .bind(&row.outcome)
    .bind(&row.detail)
    .bind(&row.hash)
    .bind(&row.seal)
    .execute(&mut *db)
    .await?;
    let head = format!("{}:{}", row.seq, row.hash);
    let seal = key.seal("audit-head", &head);
    meta::set(db, meta::AUDIT_HEAD, &format!("{head}:{seal}")).await
}

/// Entries after `after`, oldest first, and where to go on.
pub async fn list(
    db: &mut SqliteConnection,
    after: u64,
    limit: u32,
) -> Result<(Vec<AuditEntry>, bool), StoreError> {
    let mut rows = batch(db, to_db(after), i64::from(limit) + 1).await?;
    let more = rows.len() > limit as usize;
    rows.truncate(limit as usize);
    Ok((rows.into_iter().map(Row::into_api).collect(), more))
}

async fn batch(db: &mut SqliteConnection, after: i64, limit: i64) -> Result<Vec<Row>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT seq, at_ms, who, verb, object, outcome, detail, hash, seal FROM audit \
         WHERE seq > $1 ORDER BY seq LIMIT $2",
    )
    .bind(after)
    .bind(limit)
    .fetch_all(db)
    .await?)
}

/// Checks every entry and the head. Run it in a transaction: entries come in meanwhile.
pub async fn verify(db: &mut SqliteConnection, key: &AuditKey) -> Result<AuditVerification, StoreError> {
    let (mut last, mut head) = (0i64, GENESIS.to_owned());
    let broken = 'chain: {
        let found = |seq: i64, what: String| Some(AuditBreak { seq: from_db(seq), what });
        loop {
            let rows = batch(db, last, BATCH).await?;
            if rows.is_empty() {
                break;
            }
            for row in rows {
                let expected = last + 1;
                if row.seq != expected {
                    let what = format!("entries {expected} to {} were removed", row.seq - 1);
                    break 'chain found(expected, what);
                }
                if row.hash_after(&head) != row.hash {
                    break 'chain found(row.seq, "the entry was changed or moved".into());
                }
                if !key.verify("audit-entry", &row.hash, &row.seal) {
                    break 'chain found(row.seq, "the entry was not written by this server".into());
                }
                (last, head) = (row.seq, row.hash);
            }
        }
        match meta::get(db, meta::AUDIT_HEAD).await? {
            None if last == 0 => None,
            None => found(last, "the head is gone: entries after this one may be missing".into()),
            Some(stored) => match check_head(key, &stored) {
                None => found(last, "the head was changed: entries after this one may be missing".into()),
                Some((seq, _)) if seq > last => {
                    found(last + 1, format!("entries {} to {seq} were cut off the end", last + 1))
                }
                Some((seq, hash)) if seq < last || hash != head => {
                    found(seq.saturating_add(1).min(last), "the head is older than the entries".into())
                }
                Some(_) => None,
            },
        }
    };
    Ok(AuditVerification { intact: broken.is_none(), entries: from_db(last), head, broken })
}

fn check_head(key: &AuditKey, stored: &str) -> Option<(i64, String)> {
    let (head, seal) = stored.rsplit_once(':')?;
    let (seq, hash) = head.split_once(':')?;
    key.verify("audit-head", head, seal).then_some(())?;
    Some((seq.parse().ok()?, hash.to_owned()))
}

#[cfg(test)]
mod tests;
