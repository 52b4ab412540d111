//! Keys for a task: the KEK a new record is wrapped under, the DEK of a volume that is there.
//!
//! Records and the key source in, keys in secret memory out. A first run is refused if a key is missing; a resumed one
//! waits, for half a disk is no state to leave a VM in.

use std::{path::Path, sync::Arc, time::Duration};

use vmseal_keys::{Dek, Kek, open_disk};
use vmseal_model::{
    id::{DiskId, DomainUuid, KekId, ProviderId, VmId},
    record::{KeyRecord, RecipientKind},
    refusal::Code,
};

use crate::{
    ports::KeyPurpose,
    store::StoredDisk,
    tasks::{
        context::Context,
        refusal::{Halt, Refusal},
    },
    volume::token_record,
};

/// How long one question for a key may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// The KEK.
pub(crate) fn kek(
    ctx: &mut Context,
    vm: VmId,
    domain: DomainUuid,
    provider: &ProviderId,
    kek: &KekId,
) -> Result<Arc<Kek>, Halt> {
    let purpose = KeyPurpose { domain, vm: Some(vm), task: Some(ctx.command.task) };
    loop {
        ctx.check_wanted()?;
        match ctx.world.keys.kek(provider, kek, &purpose, DEADLINE) {
            Ok(kek) => return Ok(kek),
            Err(missing) if !ctx.resumed => return Err(missing.into()),
            Err(missing) => {
                ctx.say_waiting(&missing.into());
                ctx.control.pause(ctx.world.patience);
            }
        }
    }
}

/// The DEK of a disk whose record is in the store.
pub(crate) fn stored_dek(
    ctx: &mut Context,
    vm: VmId,
    domain: DomainUuid,
    disk: DiskId,
) -> Result<Opened, Halt> {
    let Some((_, stored)) = ctx.world.store.disk(disk) else {
        let text = format!("the agent's store has no record of disk {disk}");
        return Err(Refusal::new(Code::Integrity, text).into());
    };
    let record = KeyRecord::decode(&stored.record)
        .map_err(|e| Refusal::new(Code::Integrity, format!("the stored record of disk {disk}: {e}")))?;
    open(ctx, vm, domain, disk, record)
}

/// A record that was verified, and its key.
pub(crate) struct Opened {
    pub(crate) record: KeyRecord,
    pub(crate) dek: Dek,
}

/// Opens a record with whichever of its KEKs can be had.
fn open(
    ctx: &mut Context,
    vm: VmId,
    domain: DomainUuid,
    disk: DiskId,
    record: KeyRecord,
) -> Result<Opened, Halt> {
    let mut failed = None;
    for recipient in &record.recipients {
        if !matches!(recipient.id.kind, RecipientKind::Kek | RecipientKind::Native) {
            continue;
        }
        let (provider, id) = (recipient.id.provider.clone(), recipient.id.kek.clone());
        let opened = kek(ctx, vm, domain, &provider, &id).and_then(|kek| {
            Ok(open_disk(&record, Some(vm), Some(disk), &kek, &provider).map_err(Refusal::from)?)
        });
        match opened {
            Ok(opened) => return Ok(Opened { record, dek: opened.payload }),
            Err(Halt::Failed(refusal)) => failed = Some(refusal),
            Err(halt) => return Err(halt),
        }
    }
    let none = || {
        Refusal::new(Code::NoProvider, format!("no provider of this host opens the record of disk {disk}"))
    };
    Err(failed.unwrap_or_else(none).into())
}

/// The newest record of a disk that verifies, out of the store, the metadata and the volume's header, not older than
/// the store's. What is older there is passed over; what does not verify too.
pub(crate) fn newest(
    ctx: &mut Context,
    vm: VmId,
    domain: DomainUuid,
    disk: DiskId,
    metadata: &[u8],
    volume: (&Path, Option<&Path>),
) -> Result<Opened, Halt> {
    let stored: Option<StoredDisk> = ctx.world.store.disk(disk).map(|(_, stored)| stored);
    let floor = stored.as_ref().map_or(0, |s| s.epoch);
    let token = token_record(volume.0, volume.1, disk);
    let bytes = stored.map(|s| s.record).into_iter().chain(token).chain([metadata.to_vec()]);
    let mut candidates: Vec<KeyRecord> = Vec::new();
    for record in bytes.filter_map(|bytes| KeyRecord::decode(&bytes).ok()) {
        if !candidates.contains(&record) {
            candidates.push(record);
        }
    }
    candidates.sort_by_key(|record| std::cmp::Reverse(record.state.epoch));
    let mut failed =
        Refusal::new(Code::Integrity, format!("no copy of the key record of disk {disk} can be read"));
    for record in candidates {
        let epoch = record.state.epoch;
        if epoch < floor {
            let text = format!(
                "every copy of the key record of disk {disk} that verifies is older than the one seen before: epoch \
                 {epoch}, not below {floor} is accepted"
            );
            return Err(Refusal::new(Code::EpochTooOld, text).into());
        }
        match open(ctx, vm, domain, disk, record) {
            Ok(opened) => return Ok(opened),
            Err(Halt::Failed(refusal)) => failed = refusal,
            Err(halt) => return Err(halt),
        }
    }
    Err(failed.into())
}
