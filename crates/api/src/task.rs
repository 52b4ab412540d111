//! Long operations.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmseal_model::task::{TaskKind, TaskState};

/// A task. For disk work the host's journal is the truth; this is what it last said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// Its id.
    pub id: String,
    /// What it does: `vm-encrypt`, `vm-decrypt`, `vm-create`, `disk-create`, `vm-repair`.
    #[schema(value_type = String, example = "vm-encrypt")]
    pub kind: TaskKind,
    /// Where it stands: `queued`, `running`, `waiting`, `succeeded`, `failed` or `cancelled`.
    #[schema(value_type = String, example = "running")]
    pub state: TaskState,
    /// The host that does it, by name.
    pub host: String,
    /// The VM, by name.
    pub vm: String,
    /// libvirt's UUID of it; absent while the VM is being made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_uuid: Option<String>,
    /// The step reached, with the disk's target: `vda copied`.
    pub step: String,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all; 0 while not known.
    pub total_bytes: u64,
    /// What it says.
    pub message: String,
    /// Once it failed: the stable word of the refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// What to do next.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
    /// Whether its end was asked for.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cancel_requested: bool,
    /// Who asked for it.
    pub by: String,
    /// When it was asked for.
    pub created_ms: i64,
    /// When it last changed.
    pub updated_ms: i64,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_ms: Option<i64>,
}
