//! How a request that did not succeed is answered: `application/problem+json` (RFC 9457).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmseal_model::refusal::Code;

/// What went wrong, for programs (`code`) and for people (`detail`, `hint`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// HTTP status, again.
    pub status: u16,
    /// Short text that goes with the status.
    pub title: String,
    /// Stable word; see [`Code`]. A client takes one it does not know for `failed`.
    pub code: String,
    /// What failed, on which object, why.
    pub detail: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What the detail counts, one each: the VMs that would break, the VMs that share a name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

impl Problem {
    /// Media type of the answer.
    pub const CONTENT_TYPE: &str = "application/problem+json";

    /// The code, or [`Code::Failed`] for a word this version does not know.
    pub fn code(&self) -> Code {
        Code::from_word(&self.code).unwrap_or(Code::Failed)
    }
}
