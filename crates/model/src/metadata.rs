//! What stands in a domain's `<metadata>` under our namespace. A copy, never the authority.
//!
//! XML form: `docs/formats/domain-metadata.md`; reading and writing it is the agent's.

use crate::{
    id::{DiskId, DomainUuid, VmId},
    state::{DiskClass, InnerFormat},
};

/// Namespace of the element.
pub const NAMESPACE: &str = "urn:vmseal:domain:1";
/// Prefix we write.
pub const PREFIX: &str = "vmseal";

/// The element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmMetadata {
    /// Our id of the VM.
    pub vm: VmId,
    /// The libvirt UUID it was written for: a copied definition (virt-clone) shows by a difference.
    pub domain: DomainUuid,
    /// Its encrypted disks.
    pub disks: Vec<DiskMetadata>,
}

/// One encrypted disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskMetadata {
    /// Target device name: `vda`.
    pub target: String,
    /// The disk.
    pub disk: DiskId,
    /// Path of the volume.
    pub source: String,
    /// Path of the detached header, if it is detached.
    pub header: Option<String>,
    /// What lies inside.
    pub format: InnerFormat,
    /// How it is presented.
    pub class: DiskClass,
    /// The key record, encoded.
    pub record: Vec<u8>,
}
