//! What a key record's payload can be wrapped under, what the wrapping is bound to, and why it may fail.
//!
//! Names and errors only; the wrapping itself is in `recipient`, whole records are in [`crate::record`].

use std::fmt;

use vmseal_model::{
    id::{DiskId, KekId, ProviderId, RecordId, VmId},
    record::{RecipientId, RecipientKind, RecordHead, Role, WrappedKek},
};

use crate::{kek::Kek, random::random_bytes, secret::SecretError};

/// `info` of HPKE for recovery recipients.
pub const RECOVERY_INFO: &[u8] = b"vmseal/v1/recovery";

/// What a payload is wrapped under.
#[derive(Debug)]
pub enum Wrapping<'a> {
    /// A KEK of a KMIP provider.
    Kek(&'a Kek),
    /// A KEK of the native provider.
    Native(&'a Kek),
    /// A per-VM KEK that the broker unwraps.
    Wrapped {
        /// The per-VM KEK in the clear.
        kek: &'a Kek,
        /// The same, wrapped by the provider.
        wrapped: WrappedKek,
    },
    /// A per-VM KEK that the key server unwraps.
    InKms {
        /// The per-VM KEK in the clear.
        kek: &'a Kek,
        /// The same, wrapped by the key server.
        wrapped: WrappedKek,
    },
    /// An X25519 public key whose private key is kept for the worst day.
    Recovery {
        /// Its 32 bytes.
        public: &'a [u8; 32],
        /// The name it has in records.
        id: KekId,
    },
}

impl<'a> Wrapping<'a> {
    /// Wrapping under `kek` as a recipient of kind 1 or 2.
    ///
    /// # Errors
    ///
    /// [`WrapError::Unwritable`] for the kinds that need more than a KEK.
    pub fn under(kek: &'a Kek, kind: RecipientKind) -> Result<Self, WrapError> {
        match kind {
            RecipientKind::Kek => Ok(Self::Kek(kek)),
            RecipientKind::Native => Ok(Self::Native(kek)),
            RecipientKind::Wrapped | RecipientKind::InKms | RecipientKind::Recovery => {
                Err(WrapError::Unwritable { field: "recipient kind, which needs more than a KEK" })
            }
        }
    }

    pub(crate) fn recipient_id(&self, provider: &ProviderId) -> RecipientId {
        let (kind, kek) = match self {
            Self::Kek(kek) => (RecipientKind::Kek, kek.id()),
            Self::Native(kek) => (RecipientKind::Native, kek.id()),
            Self::Wrapped { kek, .. } => (RecipientKind::Wrapped, kek.id()),
            Self::InKms { kek, .. } => (RecipientKind::InKms, kek.id()),
            Self::Recovery { id, .. } => (RecipientKind::Recovery, id),
        };
        RecipientId { kind, provider: provider.clone(), kek: kek.clone() }
    }
}

/// Salt and nonce of one wrapping. They come once: never make two recipients with the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freshness {
    /// Salt of the wrap key's derivation.
    pub salt: [u8; 32],
    /// Nonce of the GCM.
    pub nonce: [u8; 12],
}

impl Freshness {
    /// Random, as every writer but a test vector wants it.
    ///
    /// # Errors
    ///
    /// [`SecretError::Random`] if the system gives no random bytes.
    pub fn random() -> Result<Self, SecretError> {
        Ok(Self { salt: random_bytes()?, nonce: random_bytes()? })
    }
}

/// What a recipient's ciphertext is bound to: the 120 bytes of the head, then kind, provider id and KEK id as stored.
pub fn associated_data(head: &RecordHead, id: &RecipientId) -> Vec<u8> {
    let mut out = head.encode().to_vec();
    out.extend_from_slice(&id.encode());
    out
}

/// What a per-VM KEK wrapped by AES-256-GCM (kinds 3 and 4) is bound to: VM id, then provider id and KEK id as stored.
pub fn kek_associated_data(vm: VmId, provider: &ProviderId, kek: &KekId) -> Vec<u8> {
    let id = RecipientId { kind: RecipientKind::Wrapped, provider: provider.clone(), kek: kek.clone() };
    // The name of a recipient without its kind, which the broker does not depend on.
    [&vm.to_bytes(), &id.encode()[1..]].concat()
}

/// What a record is of, where another was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mismatch {
    /// It opens a disk and not a home, or the other way round.
    Role {
        /// What it opens.
        found: Role,
    },
    /// Another VM.
    Vm {
        /// Whose it is.
        found: VmId,
        /// Whose was expected.
        expected: VmId,
    },
    /// Another disk.
    Disk {
        /// Whose it is.
        found: DiskId,
        /// Whose was expected.
        expected: DiskId,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Role { found: Role::Disk } => f.write_str("a disk, not to a VM's home"),
            Self::Role { found: Role::Home } => f.write_str("a VM's home, not to a disk"),
            Self::Vm { found, expected } => write!(f, "VM {found}, not to VM {expected}"),
            Self::Disk { found, expected } => write!(f, "disk {found}, not to disk {expected}"),
        }
    }
}

/// Why a key was not wrapped or unwrapped. Holds ids, never key bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WrapError {
    /// Wrong KEK, or a record that was damaged, edited or moved. Trying again does not help.
    #[error(
        "key record {record} does not open under KEK {kek}: the KEK is another one, or the record was damaged, edited \
         or moved; use another copy of the record"
    )]
    Integrity {
        /// The record.
        record: RecordId,
        /// The KEK it names.
        kek: KekId,
    },
    /// The payload at hand is not the record's, or the record was edited.
    #[error(
        "key record {record} does not verify under the key at hand: it was damaged or edited; use another copy"
    )]
    Unverified {
        /// The record.
        record: RecordId,
    },
    /// The record is wrapped under other KEKs.
    #[error("KEK {kek} of provider {provider} opens nothing in key record {record}")]
    NotARecipient {
        /// The record.
        record: RecordId,
        /// The provider asked.
        provider: ProviderId,
        /// The KEK at hand.
        kek: KekId,
    },
    /// The record belongs to something else.
    #[error("key record {record} belongs to {mismatch}")]
    OtherSubject {
        /// The record.
        record: RecordId,
        /// What it is and what was expected.
        mismatch: Mismatch,
    },
    /// The KEK was rotated out; wrap under its successor.
    #[error("KEK {kek} was rotated out and may only unwrap; wrap under its successor")]
    UnwrapOnly {
        /// The KEK.
        kek: KekId,
    },
    /// There are 16 already, or the record would pass 16 KiB.
    #[error("key record {record} has no room for another recipient; remove one first")]
    TooManyRecipients {
        /// The record.
        record: RecordId,
    },
    /// It is there already.
    #[error("KEK {kek} of provider {provider} is a recipient of key record {record} already")]
    AlreadyRecipient {
        /// The record.
        record: RecordId,
        /// The provider.
        provider: ProviderId,
        /// The KEK.
        kek: KekId,
    },
    /// A record without recipients would open for nobody.
    #[error("the only recipient of key record {record} is not removed; add another one first")]
    LastRecipient {
        /// The record.
        record: RecordId,
    },
    /// Something the format cannot say.
    #[error("no key record can have this {field}")]
    Unwritable {
        /// What.
        field: &'static str,
    },
    /// HPKE refused the recovery key.
    #[error("the recovery key is no usable X25519 public key")]
    RecoveryKey,
    /// No secret memory, or no randomness.
    #[error(transparent)]
    Memory(#[from] SecretError),
}
