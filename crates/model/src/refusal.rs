//! Stable codes of refusals: what a program may match on. Texts may change, codes do not.

use serde::{Deserialize, Serialize};

/// Why something was refused or failed; `code` of every problem answer, `[code]` in the CLI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Code {
    /// No such object.
    NotFound,
    /// There already is one of that name.
    Exists,
    /// Not signed in.
    Unauthenticated,
    /// The caller's roles do not allow it.
    Forbidden,
    /// A field is missing or wrong.
    BadRequest,
    /// The object changed meanwhile.
    Conflict,
    /// Something failed that the message names.
    Failed,
    /// The host does not answer.
    HostUnreachable,
    /// The server does not answer.
    ServerUnreachable,
    /// The key cannot be had now.
    KeyMissing,
    /// The record, header or key does not verify.
    Integrity,
    /// The record is older than one seen before.
    EpochTooOld,
    /// The VM is not known under that pair of ids.
    UnknownVm,
    /// The VM runs.
    VmRunning,
    /// The VM is transient.
    VmTransient,
    /// The VM has snapshots or checkpoints.
    VmHasSnapshots,
    /// The VM has a managed-save image.
    VmHasSavedImage,
    /// The disk has a backing chain.
    BackingChain,
    /// Another domain uses the image.
    ImageShared,
    /// Not enough space.
    NoSpace,
    /// The disk is not one this version handles.
    UnsupportedDisk,
    /// The volume is in use by another process.
    VolumeInUse,
    /// Already as asked.
    NothingToDo,
    /// The provider has no verified backup yet.
    ProviderNotBackedUp,
    /// Keys of it are in use.
    ProviderInUse,
    /// There is no provider to take a key from.
    NoProvider,
    /// The operation needs something this host lacks.
    HostNotReady,
    /// Another task works on the VM.
    TaskRunning,
}

impl Code {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not-found",
            Self::Exists => "exists",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden => "forbidden",
            Self::BadRequest => "bad-request",
            Self::Conflict => "conflict",
            Self::Failed => "failed",
            Self::HostUnreachable => "host-unreachable",
            Self::ServerUnreachable => "server-unreachable",
            Self::KeyMissing => "key-missing",
            Self::Integrity => "integrity",
            Self::EpochTooOld => "epoch-too-old",
            Self::UnknownVm => "unknown-vm",
            Self::VmRunning => "vm-running",
            Self::VmTransient => "vm-transient",
            Self::VmHasSnapshots => "vm-has-snapshots",
            Self::VmHasSavedImage => "vm-has-saved-image",
            Self::BackingChain => "backing-chain",
            Self::ImageShared => "image-shared",
            Self::NoSpace => "no-space",
            Self::UnsupportedDisk => "unsupported-disk",
            Self::VolumeInUse => "volume-in-use",
            Self::NothingToDo => "nothing-to-do",
            Self::ProviderNotBackedUp => "provider-not-backed-up",
            Self::ProviderInUse => "provider-in-use",
            Self::NoProvider => "no-provider",
            Self::HostNotReady => "host-not-ready",
            Self::TaskRunning => "task-running",
        }
    }

    /// The code of a word; `None` for one a newer peer knows.
    pub fn from_word(word: &str) -> Option<Self> {
        serde::Deserialize::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(
            word,
        ))
        .ok()
    }

    /// Exit code of the CLI: 3 refused, 4 locked, 5 unreachable, 1 failed, 2 usage.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::BadRequest => 2,
            Self::KeyMissing => 4,
            Self::HostUnreachable | Self::ServerUnreachable => 5,
            _ => 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_on_the_wire_is_what_serde_writes() {
        for code in [Code::NotFound, Code::VmHasSavedImage, Code::EpochTooOld, Code::TaskRunning] {
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("\"{}\"", code.as_str()));
            assert_eq!(Code::from_word(code.as_str()), Some(code));
        }
        assert_eq!(Code::from_word("from-the-future"), None);
    }
}
