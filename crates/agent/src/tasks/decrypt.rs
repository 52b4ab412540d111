//! `vm decrypt`: what is refused, and the plan.

use std::path::Path;

use vmseal_model::{
    control::DiskSetup,
    id::{DomainUuid, VmId},
    metadata::DiskMetadata,
    refusal::Code,
    state::InnerFormat,
    task::SourceFate,
};

use crate::{
    domain_xml::DomainXml,
    new_volume::Ownership,
    rbd::Location,
    store::StoredDisk,
    tasks::{
        context::Context,
        image::{check_space, examine},
        place,
        plan::{ClearDisk, DecryptPlan, directory},
        refusal::{Halt, Refusal},
        refuse::{check_targets, idle_domain, is_encrypted, vm_id},
        unlock,
    },
    volume,
};

/// Looks at everything; the agent's store gets the newest record of each disk, and nothing else changes.
pub(crate) fn plan(
    ctx: &mut Context,
    domain: DomainUuid,
    targets: &[String],
    fate: SourceFate,
) -> Result<DecryptPlan, Halt> {
    let idle = idle_domain(&ctx.world, domain)?;
    let name = idle.info.name.clone();
    check_targets(&idle.xml, targets, &name)?;
    let vm = vm_id(&ctx.world, domain, &idle.xml, &name)?;
    let nothing = |text: String| Refusal::new(Code::NothingToDo, text);
    let Some(metadata) = idle.xml.metadata().map_err(Refusal::from)? else {
        return Err(nothing(format!("{name} has no encrypted disk")).into());
    };
    let mut chosen = Vec::new();
    for disk in idle.xml.disks() {
        let encrypted = is_encrypted(&ctx.world, domain, &disk, Some(&metadata));
        if targets.contains(&disk.target) && !encrypted {
            return Err(nothing(format!("disk {} of {name} is not encrypted", disk.target)).into());
        }
        if encrypted && (targets.is_empty() || targets.contains(&disk.target)) {
            chosen.extend(metadata.disks.iter().find(|d| d.target == disk.target).cloned());
        }
    }
    if chosen.is_empty() {
        return Err(nothing(format!("{name} has no encrypted disk")).into());
    }
    let mut disks = Vec::new();
    for disk in &chosen {
        let planned = clear_disk(ctx, vm, domain, &idle.xml, disk);
        disks.push(planned.map_err(|halt| match halt {
            Halt::Failed(refusal) => Halt::Failed(refusal.about(&disk.target)),
            halt => halt,
        })?);
    }
    let files = disks.iter().filter(|d| !Location::is_meant_by(&d.clear));
    let needs: Vec<_> = files.map(|d| (directory(&d.clear), d.bytes)).collect();
    check_space(&needs)?;
    Ok(DecryptPlan { vm, domain, name, disks, fate })
}

fn clear_disk(
    ctx: &mut Context,
    vm: VmId,
    domain: DomainUuid,
    xml: &DomainXml,
    disk: &DiskMetadata,
) -> Result<ClearDisk, Halt> {
    let (volume, header) = (Path::new(&disk.source), disk.header.as_deref().map(Path::new));
    let (identity, ownership) = match place::location(&disk.source)? {
        Some(at) => (place::identity(&at, &place::idle_image(&ctx.world, &at)?), Ownership::default()),
        None => {
            let image = examine(&disk.source)?;
            (image.identity, image.ownership)
        }
    };
    let opened = unlock::newest(ctx, vm, domain, disk.disk, &disk.record, (volume, header))?;
    let (record, dek, config) = (&opened.record, &opened.dek, &ctx.world.config);
    let open = volume::open(config, volume, header, record, dek, &disk.target, 0, true);
    let open = open.map_err(Refusal::from)?;
    // A crash resumes from the store alone.
    let stored = ctx.world.store.disk(disk.disk).map(|(_, stored)| stored);
    if stored.as_ref().is_none_or(|s| s.record != opened.record.encode() || s.retired) {
        // No floor was asked of the server here.
        let unverified = stored.is_none_or(|s| s.epoch_unverified);
        ctx.world.store.put_disk(vm, domain, to_store(disk, &opened, unverified))?;
    }
    let clear = clear_path(ctx, xml, &disk.source)?;
    Ok(ClearDisk {
        target: disk.target.clone(),
        disk: disk.disk,
        volume: disk.source.clone(),
        header: disk.header.clone(),
        identity,
        format: disk.format,
        clear,
        bytes: bytes_of(&open.setup, open.stored_bytes, disk.format),
        ownership: Ownership { mode: ownership.mode & 0o666, ..ownership },
    })
}

fn to_store(disk: &DiskMetadata, opened: &unlock::Opened, epoch_unverified: bool) -> StoredDisk {
    StoredDisk {
        target: disk.target.clone(),
        disk: disk.disk,
        source: disk.source.clone(),
        header: disk.header.clone(),
        format: disk.format,
        class: disk.class,
        record: opened.record.encode(),
        epoch: opened.record.state.epoch,
        epoch_unverified,
        retired: false,
    }
}

/// A raw disk is as long as it presents; a qcow2 image is as long as it has grown.
fn bytes_of(setup: &DiskSetup, stored: u64, format: InnerFormat) -> u64 {
    match format {
        InnerFormat::Raw => setup.presented_bytes,
        InnerFormat::Qcow2 => stored,
    }
}

/// The image's old name if that is free, else one more than the volume's.
fn clear_path(ctx: &Context, xml: &DomainXml, volume: &str) -> Result<String, Refusal> {
    let named = |path: &str| xml.disks().iter().any(|d| place::is_at(&d.source, path));
    let (old, clear) = place::clear_names(volume);
    if let Some(old) = old
        && !named(&old)
        && place::check_free(&ctx.world, &old).is_ok()
    {
        return Ok(old);
    }
    place::check_free(&ctx.world, &clear)?;
    Ok(clear)
}
