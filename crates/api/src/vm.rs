//! Virtual machines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmseal_model::{
    class::ClassChoice,
    state::{Coverage, VmState},
    task::SourceFate,
};

use crate::disk::Disk;

/// A VM as its host reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Our id; absent for a clear VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// libvirt's UUID.
    pub domain_uuid: String,
    /// libvirt's name.
    pub name: String,
    /// Its host, by name.
    pub host: String,
    /// What it does; `unknown` while its host cannot be reached.
    #[schema(value_type = String, example = "running")]
    pub state: VmState,
    /// How much of it is encrypted: `encrypted`, `partly-encrypted` or `clear`.
    #[schema(value_type = String, example = "encrypted")]
    pub coverage: Coverage,
    /// Why it is locked, while it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locked: Option<Locked>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// What of it is not yet protected, each one line.
    pub unprotected: Vec<String>,
    /// It has no persistent definition.
    pub transient: bool,
    /// Its ids do not belong together as far as the server knows: it will not start before `vm adopt`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unknown_ids: bool,
    /// The task at work on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// When its host last reported it.
    pub seen_ms: i64,
}

/// Why a VM is locked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Locked {
    /// The provider, by name.
    pub provider: String,
    /// The key.
    pub key: String,
    /// Since when it is missing; absent if nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<i64>,
    /// Why it cannot be had.
    pub reason: String,
    /// The host starts the VM when the key comes.
    pub wanted: bool,
}

/// Asks for a new VM with encrypted disks. A task.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// On which host, by name; may be absent while there is only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Domain XML, as `virt-install --print-xml` writes it.
    pub xml: String,
    /// Bytes of each disk whose file does not exist yet, by target: XML has no place for them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disk_bytes: BTreeMap<String, u64>,
    /// Whence the key; absent: the default provider.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// How QEMU is given its disks: `auto`, `compatible` or `fast`; absent: `auto`.
    #[serde(default, skip_serializing_if = "ClassChoice::is_auto")]
    #[schema(value_type = String, example = "auto")]
    pub class: ClassChoice,
}

/// Asks for encryption of a VM's disks. A task.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EncryptVm {
    /// Targets (`vda`); empty: every disk that is clear.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Whence the key; absent: the default provider.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// How QEMU is given these disks: `auto`, `compatible` or `fast`; absent: `auto`.
    #[serde(default, skip_serializing_if = "ClassChoice::is_auto")]
    #[schema(value_type = String, example = "auto")]
    pub class: ClassChoice,
    /// What becomes of the clear file: `wipe` or `keep`.
    #[schema(value_type = String, example = "wipe")]
    pub source: SourceFate,
}

/// Asks for decryption of a VM's disks. A task.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DecryptVm {
    /// Targets (`vda`); empty: every disk that is encrypted.
    #[serde(default)]
    pub disks: Vec<String>,
    /// What becomes of the encrypted file: `wipe` or `keep`.
    #[schema(value_type = String, example = "keep")]
    pub source: SourceFate,
}
