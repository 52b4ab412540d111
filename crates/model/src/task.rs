//! Long operations: kinds, states and the step lists, which are also the crash-test lists.

use serde::{Deserialize, Serialize};

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// `vm encrypt`.
    VmEncrypt,
    /// `vm decrypt`.
    VmDecrypt,
    /// `vm create`.
    VmCreate,
    /// `disk create`.
    DiskCreate,
    /// `disk set`.
    DiskSet,
    /// `vm repair`.
    VmRepair,
}

/// Where a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// Sent to the host, not begun.
    Queued,
    /// At work.
    Running,
    /// Waits for something outside: a key, the host.
    Waiting,
    /// Done.
    Succeeded,
    /// Ended with an error; everything is as before it began.
    Failed,
    /// Ended by the administrator; everything is as before it began.
    Cancelled,
}

impl TaskState {
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// Steps of `vm encrypt` for one disk, in order. Each is journalled before and after; a crash between any two
/// resumes, or, before [`EncryptStep::Switched`], may be rolled back by deleting the new volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EncryptStep {
    /// Checked and written down: source, target path, sizes, ids.
    Planned,
    /// The key record is durable in the agent's store.
    Keyed,
    /// The volume exists with its header and space.
    Allocated,
    /// Every byte is in the volume, flushed.
    Copied,
    /// Read back and equal, hash written down.
    Verified,
    /// The domain names the volume; records are in its metadata.
    Switched,
    /// The clear source is wiped, or kept as asked.
    SourceGone,
}

impl EncryptStep {
    /// All, in order.
    pub const ALL: [Self; 7] = [
        Self::Planned,
        Self::Keyed,
        Self::Allocated,
        Self::Copied,
        Self::Verified,
        Self::Switched,
        Self::SourceGone,
    ];
}

/// Steps of `vm decrypt` for one disk, in order; rules as for [`EncryptStep`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecryptStep {
    /// Checked and written down.
    Planned,
    /// The clear file exists with its space.
    Allocated,
    /// Every byte is in the clear file, flushed.
    Copied,
    /// Read back and equal, hash written down.
    Verified,
    /// The domain names the clear file; its metadata names the disk no more.
    Switched,
    /// The volume is deleted, or kept as asked. Its record stays in the store, marked retired.
    SourceGone,
}

impl DecryptStep {
    /// All, in order.
    pub const ALL: [Self; 6] =
        [Self::Planned, Self::Allocated, Self::Copied, Self::Verified, Self::Switched, Self::SourceGone];
}

/// Steps of `disk set --class`, in order. Nothing is copied; before [`SetClassStep::Switched`] nothing was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SetClassStep {
    /// Checked and written down.
    Planned,
    /// The domain's definition has the disk in its new form, and so have its metadata.
    Switched,
    /// The agent's store has the new class.
    Recorded,
}

impl SetClassStep {
    /// All, in order.
    pub const ALL: [Self; 3] = [Self::Planned, Self::Switched, Self::Recorded];
}

/// What becomes of the old file after a disk was encrypted or decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceFate {
    /// Overwritten, then deleted.
    Wipe,
    /// Left where it is.
    Keep,
}
