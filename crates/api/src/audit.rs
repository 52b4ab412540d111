//! The audit: what was done, asked and refused, in a chain of hashes. Rules: `docs/formats/audit.md`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// From 1 on, without gaps.
    pub seq: u64,
    /// When.
    pub at_ms: i64,
    /// By whom: `local root`, `user:<name>`, `host:<name>`, `nobody`, `server`.
    pub who: String,
    /// What: the verb of the operation, or of an event such as `key.grant`.
    pub verb: String,
    /// On what: `/vms/web01`.
    pub object: String,
    /// `done`, or the stable word of the refusal.
    pub outcome: String,
    /// More, in words.
    pub detail: String,
    /// SHA-256 of the previous entry's hash and this entry, in hexadecimal digits.
    pub hash: String,
}

/// What the verification of the chain found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditVerification {
    /// Whether all is as it was written.
    pub intact: bool,
    /// Entries checked.
    pub entries: u64,
    /// Hash of the last good entry.
    pub head: String,
    /// Where the chain breaks first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<AuditBreak>,
}

/// A place where the chain does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditBreak {
    /// The first entry that is not as it was written, or is not there.
    pub seq: u64,
    /// What is wrong with it.
    pub what: String,
}
