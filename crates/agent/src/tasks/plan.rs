//! What a task will do to each disk, written down before it does anything.

use std::{
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use serde::{Deserialize, Serialize};
use vmseal_luks::HEADER_BYTES;
use vmseal_model::{
    class::{Chosen, DiskClass},
    control::DiskSetup,
    id::{DiskId, DomainUuid, TaskId, VmId},
    state::InnerFormat,
    task::SourceFate,
};

use crate::{
    journal,
    new_volume::Ownership,
    tasks::{command::KeyChoice, place},
};

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
    /// When it came to be, in nanoseconds since 1970: a file system gives the inode of a deleted file to the next one.
    /// None where the file system does not say, and in plans of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) born_ns: Option<u64>,
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
            // statx(2) of the very file, where there is one.
            born_ns: metadata
                .created()
                .ok()
                .and_then(|born| u64::try_from(born.duration_since(UNIX_EPOCH).ok()?.as_nanos()).ok()),
        }
    }

    /// The same file, whatever was written to it.
    pub(crate) fn same_file(&self, other: &Self) -> bool {
        let born = self.born_ns.zip(other.born_ns);
        (self.device, self.inode) == (other.device, other.inode) && born.is_none_or(|(a, b)| a == b)
    }

    /// The same file, and nothing was written to it.
    pub(crate) fn is_unchanged(&self, other: &Self) -> bool {
        let written = |i: &Self| (i.bytes, i.modified_s, i.modified_ns);
        self.same_file(other) && written(self) == written(other)
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
    /// How that came about.
    #[serde(default)]
    pub(crate) chosen: Option<Chosen>,
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
    place::beside(path, &format!("{task}.{kind}"))
}

/// The directory a file is, or will be, in.
pub(crate) fn directory(path: &str) -> &Path {
    Path::new(path).parent().unwrap_or(Path::new("/"))
}

/// What a passing process sees of a volume for a job over a part of it.
pub(crate) fn for_job(setup: &DiskSetup) -> DiskSetup {
    DiskSetup { discard: false, ..setup.clone() }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn file_in_the_place_and_inode_of_another_is_another() {
        let scratch = Scratch::new();
        let path = scratch.path().join("x.img");
        fs::write(&path, "x").unwrap();
        let metadata = fs::metadata(&path).unwrap();
        let old = Identity::of(&metadata);
        assert!(old.same_file(&old) && old.is_unchanged(&old));
        assert_eq!(old.born_ns.is_some(), metadata.created().is_ok());
        // Not every file system says it.
        let old = Identity { born_ns: old.born_ns.or(Some(1)), ..old };
        // As ext4 does it; whether this file system reuses the number now is its own affair.
        let new = Identity { born_ns: old.born_ns.map(|ns| ns + 1), ..old };
        assert!(!old.same_file(&new) && !old.is_unchanged(&new));
        let written = Identity { modified_ns: old.modified_ns ^ 1, ..old };
        assert!(old.same_file(&written) && !old.is_unchanged(&written));
        // Time goes by, the file stays: through another name and after a write.
        let moved = scratch.path().join("y.img");
        fs::rename(&path, &moved).unwrap();
        fs::write(&moved, "longer").unwrap();
        let moved = Identity::of(&fs::metadata(&moved).unwrap());
        assert!(old.same_file(&Identity { born_ns: moved.born_ns.or(Some(1)), ..moved }));
    }

    #[test]
    fn identity_of_an_earlier_version_is_read_and_compared_without_its_birth() {
        let scratch = Scratch::new();
        let path = scratch.path().join("x.img");
        fs::write(&path, "x").unwrap();
        let now = Identity { born_ns: Some(1), ..Identity::of(&fs::metadata(&path).unwrap()) };
        let mut json = serde_json::to_value(now).unwrap();
        json.as_object_mut().unwrap().remove("born_ns").expect("it is written down");
        let old: Identity = serde_json::from_value(json).unwrap();
        assert!(old.same_file(&now) && now.same_file(&old) && old.is_unchanged(&now));
    }
}
