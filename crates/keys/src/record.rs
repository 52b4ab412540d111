//! Key records: writing, opening, and changing what may change.
//!
//! In goes a decoded [`KeyRecord`], which is only bytes of the right shape; out comes [`Opened`], which has been
//! unwrapped, whose key check and MAC verified, in that order, and nothing else gives a payload. No I/O: where
//! records lie and which of several is the newest is for others to say.

use std::fmt;

use vmseal_model::{
    id::{DiskId, KekId, ProviderId, RecordId, VmId},
    record::{
        HeaderKind, KeyRecord, MAC_LEN, MAX_RECIPIENTS, MAX_RECORD_LEN, RecipientId, RecipientKind,
        RecordHead, RecordState, Subject, UnitBytes,
    },
};

pub use crate::wrap::{Freshness, Mismatch, WrapError, Wrapping};
use crate::{
    dek::Dek,
    derive,
    home_key::HomeKey,
    kek::Kek,
    key_check::key_check,
    recipient::{Opener, Wrappable},
    secret::SecretBytes,
};

/// What a new disk record says of its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDiskRecord {
    /// The record.
    pub record: RecordId,
    /// The VM.
    pub vm: VmId,
    /// The disk.
    pub disk: DiskId,
    /// Attached or detached.
    pub header: HeaderKind,
    /// Data unit.
    pub unit: UnitBytes,
    /// Where data begins, in bytes.
    pub payload_offset: u64,
    /// Now, in milliseconds since 1970.
    pub created_ms: u64,
    /// First epoch and sizes.
    pub state: RecordState,
}

/// What a new home record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewHomeRecord {
    /// The record.
    pub record: RecordId,
    /// The VM.
    pub vm: VmId,
    /// Now, in milliseconds since 1970.
    pub created_ms: u64,
    /// First epoch; sizes are zero.
    pub state: RecordState,
}

/// A payload whose record was verified: unwrapped, key check and MAC right. Nothing else makes one.
pub struct Opened<P> {
    /// The key.
    pub payload: P,
    head: RecordHead,
    state: RecordState,
    under: RecipientId,
}

impl<P> Opened<P> {
    /// The record's head, verified.
    pub fn head(&self) -> &RecordHead {
        &self.head
    }

    /// The record's state when it was opened, verified.
    pub fn state(&self) -> &RecordState {
        &self.state
    }

    /// The recipient that opened it.
    pub fn under(&self) -> &RecipientId {
        &self.under
    }
}

impl<P> fmt::Debug for Opened<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opened({}, epoch {}, under {:?})", self.head.record, self.state.epoch, self.under)
    }
}

/// What a record can wrap: [`Dek`] or [`HomeKey`].
pub trait Payload: Wrappable {}

impl Payload for Dek {}
impl Payload for HomeKey {}

/// A new record of a disk with one recipient of kind 1 or 2. Salt and nonce are random.
///
/// # Errors
///
/// [`WrapError::UnwrapOnly`] if `kek` was rotated out; [`WrapError::Unwritable`] if the format cannot say it.
pub fn seal_disk(
    new: &NewDiskRecord,
    dek: &Dek,
    kek: &Kek,
    kind: RecipientKind,
    provider: &ProviderId,
) -> Result<KeyRecord, WrapError> {
    seal_disk_with(new, dek, &Wrapping::under(kek, kind)?, provider, Freshness::random()?)
}

/// [`seal_disk`] for every kind of recipient, with salt and nonce given: for test vectors, and for writers that
/// draw [`Freshness::random`] themselves.
///
/// # Errors
///
/// As [`seal_disk`].
pub fn seal_disk_with(
    new: &NewDiskRecord,
    dek: &Dek,
    wrapping: &Wrapping<'_>,
    provider: &ProviderId,
    fresh: Freshness,
) -> Result<KeyRecord, WrapError> {
    if new.header == HeaderKind::None {
        return Err(WrapError::Unwritable { field: "header kind for a disk" });
    }
    let head = RecordHead {
        record: new.record,
        vm: new.vm,
        subject: Subject::Disk {
            disk: new.disk,
            header: new.header,
            unit: new.unit,
            payload_offset: new.payload_offset,
        },
        created_ms: new.created_ms,
        key_check: key_check(dek.payload(), new.vm, new.disk),
    };
    seal(head, new.state, dek, wrapping, provider, fresh)
}

/// A new record of a VM's home with one recipient.
///
/// # Errors
///
/// As [`seal_disk`].
pub fn seal_home(
    new: &NewHomeRecord,
    key: &HomeKey,
    wrapping: &Wrapping<'_>,
    provider: &ProviderId,
    fresh: Freshness,
) -> Result<KeyRecord, WrapError> {
    let head = RecordHead {
        record: new.record,
        vm: new.vm,
        subject: Subject::Home,
        created_ms: new.created_ms,
        key_check: key_check(key.payload(), new.vm, DiskId::from_bytes([0; 16])),
    };
    seal(head, new.state, key, wrapping, provider, fresh)
}

fn seal<P: Payload>(
    head: RecordHead,
    state: RecordState,
    payload: &P,
    wrapping: &Wrapping<'_>,
    provider: &ProviderId,
    fresh: Freshness,
) -> Result<KeyRecord, WrapError> {
    let recipient = payload.wrap(&head, provider, wrapping, fresh)?;
    finish(KeyRecord { head, state, recipients: vec![recipient], mac: [0; MAC_LEN] }, payload.bytes())
}

/// Opens a disk's record with a KEK of the provider: for kinds 3 and 4 with the per-VM KEK.
///
/// The order is unwrap, key check, MAC; only then there is an [`Opened`].
///
/// # Errors
///
/// [`WrapError::OtherSubject`] if it is not of the VM or disk expected, [`WrapError::NotARecipient`] if another KEK
/// is needed, [`WrapError::Integrity`] if anything in the record is not as it was written.
pub fn open_disk(
    record: &KeyRecord,
    expect_vm: Option<VmId>,
    expect_disk: Option<DiskId>,
    kek: &Kek,
    provider: &ProviderId,
) -> Result<Opened<Dek>, WrapError> {
    open(record, expect_vm, expect_disk, &Opener::Kek(kek), provider)
}

/// [`open_disk`] with the private key of a recovery recipient.
///
/// # Errors
///
/// As [`open_disk`].
pub fn open_disk_by_recovery(
    record: &KeyRecord,
    expect_vm: Option<VmId>,
    expect_disk: Option<DiskId>,
    private: &SecretBytes<32>,
    id: &KekId,
    provider: &ProviderId,
) -> Result<Opened<Dek>, WrapError> {
    open(record, expect_vm, expect_disk, &Opener::Recovery { private, id }, provider)
}

/// Opens a home's record; see [`open_disk`].
///
/// # Errors
///
/// As [`open_disk`].
pub fn open_home(
    record: &KeyRecord,
    expect_vm: Option<VmId>,
    kek: &Kek,
    provider: &ProviderId,
) -> Result<Opened<HomeKey>, WrapError> {
    open(record, expect_vm, None, &Opener::Kek(kek), provider)
}

/// [`open_home`] with the private key of a recovery recipient.
///
/// # Errors
///
/// As [`open_disk`].
pub fn open_home_by_recovery(
    record: &KeyRecord,
    expect_vm: Option<VmId>,
    private: &SecretBytes<32>,
    id: &KekId,
    provider: &ProviderId,
) -> Result<Opened<HomeKey>, WrapError> {
    open(record, expect_vm, None, &Opener::Recovery { private, id }, provider)
}

fn open<P: Payload>(
    record: &KeyRecord,
    expect_vm: Option<VmId>,
    expect_disk: Option<DiskId>,
    opener: &Opener<'_>,
    provider: &ProviderId,
) -> Result<Opened<P>, WrapError> {
    let head = &record.head;
    let other = |mismatch| Err(WrapError::OtherSubject { record: head.record, mismatch });
    if head.role() != P::ROLE {
        return other(Mismatch::Role { found: head.role() });
    }
    if let Some(expected) = expect_vm.filter(|vm| *vm != head.vm) {
        return other(Mismatch::Vm { found: head.vm, expected });
    }
    if let Some(expected) = expect_disk.filter(|disk| *disk != head.disk()) {
        return other(Mismatch::Disk { found: head.disk(), expected });
    }
    let Some(recipient) =
        record.recipients.iter().find(|r| r.id.provider == *provider && r.id.kek == *opener.kek_id())
    else {
        return Err(WrapError::NotARecipient {
            record: head.record,
            provider: provider.clone(),
            kek: opener.kek_id().clone(),
        });
    };
    let payload = P::unwrap(head, recipient, opener)?;
    if !verified(record, payload.bytes())? {
        return Err(WrapError::Integrity { record: head.record, kek: opener.kek_id().clone() });
    }
    Ok(Opened { payload, head: head.clone(), state: record.state, under: recipient.id.clone() })
}

/// Whether `payload` is this record's: key check, then MAC. For a process that holds the payload and no KEK.
///
/// `false` also if there is no secret memory to find out with.
pub fn verify_mac(record: &KeyRecord, payload: &[u8]) -> bool {
    verified(record, payload).unwrap_or(false)
}

fn verified(record: &KeyRecord, payload: &[u8]) -> Result<bool, WrapError> {
    let head = &record.head;
    if payload.len() != head.payload_len()
        || !derive::equal(&key_check(payload, head.vm, head.disk()), &head.key_check)
    {
        return Ok(false);
    }
    let mac = derive::record_mac(payload, head.record, &record.encode_without_mac())?;
    Ok(derive::equal(&mac, &record.mac))
}

/// The same record with another state. Head and recipients stay; no KEK is needed.
///
/// Which epochs and sizes make sense is the caller's to know; a lower epoch than before is not refused here.
///
/// # Errors
///
/// [`WrapError::Unverified`] if the record is not what was written under this payload.
pub fn restate(record: &KeyRecord, payload: &[u8], state: RecordState) -> Result<KeyRecord, WrapError> {
    checked(record, payload)?;
    finish(KeyRecord { state, ..record.clone() }, payload)
}

/// The same record, opened by one more KEK (kind 1 or 2). The state stays; raise the epoch with [`restate`].
///
/// # Errors
///
/// [`WrapError::Unverified`], [`WrapError::AlreadyRecipient`], [`WrapError::TooManyRecipients`],
/// [`WrapError::UnwrapOnly`].
pub fn add_recipient<P: Payload>(
    record: &KeyRecord,
    opened: &Opened<P>,
    kek: &Kek,
    kind: RecipientKind,
    provider: &ProviderId,
) -> Result<KeyRecord, WrapError> {
    add_recipient_with(record, opened, &Wrapping::under(kek, kind)?, provider)
}

/// [`add_recipient`] for every kind of recipient.
///
/// # Errors
///
/// As [`add_recipient`].
pub fn add_recipient_with<P: Payload>(
    record: &KeyRecord,
    opened: &Opened<P>,
    wrapping: &Wrapping<'_>,
    provider: &ProviderId,
) -> Result<KeyRecord, WrapError> {
    let payload = &opened.payload;
    checked(record, payload.bytes())?;
    let id = wrapping.recipient_id(provider);
    if record.recipients.iter().any(|r| r.id.provider == id.provider && r.id.kek == id.kek) {
        return Err(WrapError::AlreadyRecipient {
            record: record.head.record,
            provider: id.provider,
            kek: id.kek,
        });
    }
    let mut changed = record.clone();
    changed.recipients.push(payload.wrap(&record.head, provider, wrapping, Freshness::random()?)?);
    finish(changed, payload.bytes())
}

/// The same record without one recipient. It revokes nothing by itself: older copies of the record still open.
///
/// # Errors
///
/// [`WrapError::Unverified`], [`WrapError::NotARecipient`], [`WrapError::LastRecipient`].
pub fn remove_recipient(
    record: &KeyRecord,
    payload: &[u8],
    provider: &ProviderId,
    kek: &KekId,
) -> Result<KeyRecord, WrapError> {
    checked(record, payload)?;
    let mut changed = record.clone();
    changed.recipients.retain(|r| r.id.provider != *provider || r.id.kek != *kek);
    if changed.recipients.len() == record.recipients.len() {
        return Err(WrapError::NotARecipient {
            record: record.head.record,
            provider: provider.clone(),
            kek: kek.clone(),
        });
    }
    if changed.recipients.is_empty() {
        return Err(WrapError::LastRecipient { record: record.head.record });
    }
    finish(changed, payload)
}

fn checked(record: &KeyRecord, payload: &[u8]) -> Result<(), WrapError> {
    if verified(record, payload)? {
        Ok(())
    } else {
        Err(WrapError::Unverified { record: record.head.record })
    }
}

fn finish(mut record: KeyRecord, payload: &[u8]) -> Result<KeyRecord, WrapError> {
    let covered = record.encode_without_mac();
    if record.recipients.len() > MAX_RECIPIENTS || covered.len() + MAC_LEN > MAX_RECORD_LEN {
        return Err(WrapError::TooManyRecipients { record: record.head.record });
    }
    record.mac = derive::record_mac(payload, record.head.record, &covered)?;
    Ok(record)
}
