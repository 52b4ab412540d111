//! Disks of VMs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmseal_model::{class::ClassChoice, state::InnerFormat};

/// A disk as its host reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// libvirt's target: `vda`.
    pub target: String,
    /// File or device that holds it.
    pub source: String,
    /// What lies inside: `raw`, `qcow2`.
    pub format: String,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Its id, which is its LUKS2 UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Epoch of its key record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// The host could not compare the epoch with anybody's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub epoch_unverified: bool,
    /// Bytes stored.
    pub stored_bytes: u64,
    /// Bytes the guest's side sees.
    pub presented_bytes: u64,
    /// How QEMU is given it: `compatible`, `ublk` or `fast`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub class: String,
    /// What that was asked for as: `auto`, `compatible` or `fast`; absent where nobody knows.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub asked: String,
    /// Why that became this class, in one line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// Detached header, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    /// Keys its data key is wrapped under.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<DiskKey>,
}

/// A key that opens a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskKey {
    /// Its provider's name.
    pub provider: String,
    /// Its id.
    pub key: String,
}

/// Asks for a new, empty, encrypted disk.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateDisk {
    /// libvirt's target: `vdb`.
    pub target: String,
    /// Absolute path of the file to make.
    pub path: String,
    /// What lies inside.
    #[schema(value_type = String, example = "raw")]
    pub format: InnerFormat,
    /// Size the guest sees.
    pub bytes: u64,
    /// Whence the key; absent: the default provider.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// How QEMU is given it: `auto`, `compatible` or `fast`; absent: `auto`.
    #[serde(default, skip_serializing_if = "ClassChoice::is_auto")]
    #[schema(value_type = String, example = "auto")]
    pub class: ClassChoice,
}

/// Asks for another class of an encrypted disk, from the next start of its VM on. A task; the VM must be off.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetDisk {
    /// libvirt's target: `vda`.
    pub target: String,
    /// How QEMU is to be given it: `auto`, `compatible` or `fast`.
    #[schema(value_type = String, example = "fast")]
    pub class: ClassChoice,
}
