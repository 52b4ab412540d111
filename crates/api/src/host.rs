//! Hosts that run an agent.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{secret_text::SecretText, status::Finding};

/// Whether a host can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// Its agent has a session.
    Connected,
    /// It has none.
    Unreachable,
}

impl HostState {
    /// The word for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Its id; common name of its certificate.
    pub id: String,
    /// Its host name; with `-2`, `-3`… if there already was one.
    pub name: String,
    /// Whether it can be reached.
    pub state: HostState,
    /// Version of its agent; empty before the first session.
    pub version: String,
    /// The libvirt it works with.
    pub libvirt_uri: String,
    /// How it keeps keys in memory: `memfd_secret` or `mlock`.
    pub secret_memory: String,
    /// VMs on it.
    pub vms: u32,
    /// What it can present disks by, beside NBD.
    #[serde(default)]
    pub capabilities: Capabilities,
    /// Findings of its doctor.
    pub warnings: Vec<Finding>,
    /// When it joined.
    pub joined_ms: i64,
    /// When it was last heard of; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_ms: Option<i64>,
    /// When its certificate expires.
    pub certificate_expires_ms: i64,
}

/// What a host can present disks by, beside NBD. What its agent has not said is not there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Capabilities {
    /// Block devices by the kernel's ublk.
    pub ublk: bool,
    /// Why not, in one line.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub no_ublk: String,
    /// vhost-user-blk.
    pub vhost_user: bool,
}

/// What `vmseal-agent join` wants.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct JoinToken {
    /// One line; holds a secret that works once.
    pub token: SecretText,
    /// When it stops working.
    pub expires_ms: i64,
}
