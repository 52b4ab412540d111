//! What a task will do to each disk, written down before it does anything.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmseal_luks::HEADER_BYTES;
use vmseal_model::{
    control::DiskSetup,
    id::{DiskId, DomainUuid, TaskId, VmId},
    state::{DiskClass, InnerFormat},
    task::SourceFate,
};

use crate::{journal, new_volume::Ownership, tasks::command::KeyChoice};

/// Data unit of new volumes.
pub(crate) const UNIT: u64 = 512;

/// A file as it was looked at: another file of that name, or one that was written meanwhile, differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) bytes: u64,
    pub(crate) modified_s: i64,
    pub(crate) modified_ns: i64,
}

impl Identity {
    pub(crate) fn of(metadata: &std::fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }
    }

    /// The same file, whatever was written to it.
    pub(crate) fn same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

/// New volumes for a VM, and how its definition comes to name them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct EncryptPlan {
    pub(crate) vm: VmId,
    pub(crate) domain: DomainUuid,
    pub(crate) name: String,
    pub(crate) key: KeyChoice,
    pub(crate) disks: Vec<NewDisk>,
    pub(crate) definition: Target,
}

/// What happens to the definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Target {
    /// Disks that are there change.
    Change,
    /// A disk is added.
    Add,
    /// The domain is new; its XML is in the command.
    Define,
}

/// One new volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NewDisk {
    pub(crate) target: String,
    pub(crate) disk: DiskId,
    pub(crate) origin: Origin,
    /// Path of the volume.
    pub(crate) volume: String,
    pub(crate) format: InnerFormat,
    pub(crate) class: DiskClass,
    /// Bytes of the image, not rounded; what jobs are about.
    pub(crate) image_bytes: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) presented_bytes: u64,
    pub(crate) ownership: Ownership,
}

/// What comes into a new volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Origin {
    /// A clear image, which then meets its fate.
    Image {
        /// Where it is.
        path: String,
        /// As it was looked at.
        identity: Identity,
        /// What becomes of it.
        fate: SourceFate,
    },
    /// Zeros: a new raw disk.
    Zeros,
    /// An empty qcow2 image of so many bytes for the guest.
    EmptyQcow2 {
        /// Bytes the guest sees.
        virtual_bytes: u64,
    },
}

impl NewDisk {
    /// Where the volume lies until it is whole.
    pub(crate) fn unfinished(&self, task: TaskId) -> PathBuf {
        beside(&self.volume, task, "new")
    }

    /// Where an empty qcow2 image lies until it is in the volume: beside the task's journal. It holds nothing secret,
    /// but qemu-img follows links, and others may write where images are.
    pub(crate) fn empty_image(&self, state_dir: &Path, task: TaskId) -> PathBuf {
        journal::directory(state_dir).join(format!("{task}.{}.empty", self.target))
    }

    /// Bytes the file takes.
    pub(crate) fn file_bytes(&self) -> u64 {
        HEADER_BYTES.saturating_add(self.stored_bytes)
    }

    /// Passes over the data: writing, and comparing where there is something to compare with.
    pub(crate) fn passes(&self) -> u64 {
        if self.origin == Origin::Zeros { 1 } else { 2 }
    }
}

/// Encrypted disks of a VM that become clear.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DecryptPlan {
    pub(crate) vm: VmId,
    pub(crate) domain: DomainUuid,
    pub(crate) name: String,
    pub(crate) disks: Vec<ClearDisk>,
    pub(crate) fate: SourceFate,
}

/// One disk that becomes clear.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ClearDisk {
    pub(crate) target: String,
    pub(crate) disk: DiskId,
    pub(crate) volume: String,
    pub(crate) header: Option<String>,
    pub(crate) identity: Identity,
    pub(crate) format: InnerFormat,
    /// Path of the clear file.
    pub(crate) clear: String,
    pub(crate) bytes: u64,
    pub(crate) ownership: Ownership,
}

impl ClearDisk {
    /// Where the clear file lies until it has its length.
    pub(crate) fn unfinished(&self, task: TaskId) -> PathBuf {
        beside(&self.clear, task, "new")
    }
}

/// A name only this task uses: whatever lies there is its own.
fn beside(path: &str, task: TaskId, kind: &str) -> PathBuf {
    PathBuf::from(format!("{path}.{task}.{kind}"))
}

/// The directory a file is, or will be, in.
pub(crate) fn directory(path: &str) -> &Path {
    Path::new(path).parent().unwrap_or(Path::new("/"))
}

/// What a passing process sees of a volume for a job over a part of it.
pub(crate) fn for_job(setup: &DiskSetup) -> DiskSetup {
    DiskSetup { discard: false, ..setup.clone() }
}
