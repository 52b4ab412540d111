//! What stands in a domain's `<metadata>` under our namespace. A copy, never the authority.
//!
//! XML form: `docs/formats/domain-metadata.md`; reading and writing it is the agent's.

use std::collections::BTreeMap;

use crate::{
    class::{Chosen, DiskClass},
    id::{DiskId, DomainUuid, VmId},
    state::InnerFormat,
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
    /// What we put into its `<memoryBacking>`, so that it can go again.
    pub memory: SharedMemory,
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
    /// How that came about, if it is known.
    pub chosen: Option<Chosen>,
    /// What its class made us take out of its definition, to be put back with another class.
    pub aside: Aside,
    /// The key record, encoded.
    pub record: Vec<u8>,
}

/// Parts of a disk's definition that were taken out of it: `serial`, `snapshot`, `driver.iothread` and so on, each with
/// its value. An empty one means that the part was not there and came with the class.
pub type Aside = BTreeMap<String, String>;

/// Which parts of a domain's `<memoryBacking>` are ours. What an administrator had there is never ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SharedMemory {
    /// `<source type='memfd'/>`.
    pub source: bool,
    /// `<access mode='shared'/>`.
    pub access: bool,
}
