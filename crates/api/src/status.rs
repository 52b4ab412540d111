//! How the whole stands: counts for `status`, findings for `doctor`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The installation at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Version of the server.
    pub version: String,
    /// Id of this server's installation.
    pub server_id: String,
    /// When it was started.
    pub started_ms: i64,
    /// As whom the caller is known.
    pub you: String,
    /// Provider that new keys come from when none is named.
    pub default_provider: Option<String>,
    /// Key providers.
    pub providers: u32,
    /// Hosts joined.
    pub hosts: u32,
    /// Of these, with a session now.
    pub hosts_connected: u32,
    /// VMs known.
    pub vms: u32,
    /// All disks encrypted.
    pub vms_encrypted: u32,
    /// Some disks encrypted.
    pub vms_partly_encrypted: u32,
    /// No disk encrypted.
    pub vms_clear: u32,
    /// Waiting for a key.
    pub vms_locked: u32,
    /// Tasks not ended.
    pub tasks_unfinished: u32,
    /// What `doctor` would list.
    pub findings: u32,
    /// How the server keeps keys in memory: `memfd_secret` or `mlock`.
    pub secret_memory: String,
}

/// Something an administrator should look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// Stable word.
    pub code: String,
    /// What is so, in one line.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
    /// The host it was found on; absent if it concerns the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// All findings; empty when all is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Doctor {
    /// The server's own first, then host by host.
    pub findings: Vec<Finding>,
}
