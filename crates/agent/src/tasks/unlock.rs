//! Keys for a task: the KEK a new record is wrapped under, the DEK of a volume that is there.
//!
//! Records and the key source in, keys in secret memory out. A first run is refused if a key is missing; a resumed one
//! waits, for half a disk is no state to leave a VM in.

use std::{path::Path, sync::Arc, time::Duration};

use vmseal_keys::{Dek, Kek};
use vmseal_model::{
    id::{DiskId, DomainUuid, KekId, ProviderId, VmId},
    record::KeyRecord,
    refusal::Code,
};

use crate::{
    choice::{Candidate, NoChoice, Origin, choose, open_record},
    ports::{KeyMissing, KeyPurpose},
    tasks::{
        context::Context,
        refusal::{Halt, Refusal},
    },
    volume::token_of,
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
            Err(missing) => wait_for(ctx, missing)?,
        }
    }
}

/// A record that was verified, and its key.
pub(crate) struct Opened {
    pub(crate) record: KeyRecord,
    pub(crate) dek: Dek,
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
    let stored = Candidate { origin: Origin::Store, bytes: stored.record };
    unlock(ctx, vm, domain, disk, &[stored], 0)
}

/// The newest record of a disk that verifies, out of the store, the volume's header and the metadata, not older than
/// the store's.
pub(crate) fn newest(
    ctx: &mut Context,
    vm: VmId,
    domain: DomainUuid,
    disk: DiskId,
    metadata: &[u8],
    volume: (&Path, Option<&Path>),
) -> Result<Opened, Halt> {
    let stored = ctx.world.store.disk(disk).map(|(_, stored)| stored);
    let floor = stored.as_ref().map_or(0, |s| s.epoch);
    let candidates: Vec<Candidate> = [
        (Origin::Store, stored.map(|s| s.record)),
        (Origin::Token, token_of(&ctx.world.config, volume.0, volume.1, disk)),
        (Origin::Metadata, Some(metadata.to_vec())),
    ]
    .into_iter()
    .filter_map(|(origin, bytes)| Some(Candidate { origin, bytes: bytes? }))
    .collect();
    unlock(ctx, vm, domain, disk, &candidates, floor)
}

/// Chooses among the copies. While none opens for want of a key, a resumed task tries them all again and again.
fn unlock(
    ctx: &mut Context,
    vm: VmId,
    domain: DomainUuid,
    disk: DiskId,
    candidates: &[Candidate],
    floor: u64,
) -> Result<Opened, Halt> {
    let purpose = KeyPurpose { domain, vm: Some(vm), task: Some(ctx.command.task) };
    loop {
        ctx.check_wanted()?;
        let ask = |provider: &ProviderId, kek: &KekId| ctx.world.keys.kek(provider, kek, &purpose, DEADLINE);
        let chosen = choose(vm, disk, candidates, floor, |record| open_record(vm, disk, record, ask));
        match chosen {
            Ok(chosen) => return Ok(Opened { record: chosen.record, dek: chosen.dek }),
            Err(NoChoice::Refused(refusal)) => return Err(refusal.into()),
            Err(NoChoice::Missing(missing)) => wait_for(ctx, missing)?,
        }
    }
}

/// A first run does not wait: the missing key ends it.
fn wait_for(ctx: &mut Context, missing: KeyMissing) -> Result<(), Halt> {
    if !ctx.resumed {
        return Err(missing.into());
    }
    ctx.say_waiting(&missing.into());
    let patience = ctx.patience();
    ctx.control.pause(patience);
    Ok(())
}
