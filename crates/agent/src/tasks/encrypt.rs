//! `vm encrypt`: what is refused, and the plan.

use std::collections::HashSet;

use vmseal_keys::random_bytes;
use vmseal_model::{
    class::Resolved,
    id::{DiskId, DomainUuid},
    refusal::Code,
    state::InnerFormat,
    task::SourceFate,
};

use crate::{
    domain_xml::{DiskDevice, DiskView, DomainXml},
    metadata::is_target,
    new_volume::Ownership,
    ours,
    rbd::{Location, Tool},
    tasks::{
        command::KeyChoice,
        context::Context,
        hold::{lock_source, patiently},
        image::{Uses, check_space, examine, shell},
        place,
        plan::{EncryptPlan, NewDisk, Origin, Target, UNIT, directory},
        refusal::{Halt, Refusal},
        refuse::{
            self, check_class, check_image, check_raw, check_targets, check_unshared, clear_image,
            idle_domain, is_encrypted,
        },
    },
};

/// Looks at everything, changes nothing.
pub(crate) fn plan(
    ctx: &Context,
    domain: DomainUuid,
    targets: &[String],
    key: &KeyChoice,
    class: &Resolved,
    fate: SourceFate,
) -> Result<EncryptPlan, Refusal> {
    let idle = idle_domain(&ctx.world, domain)?;
    let name = &idle.info.name;
    check_targets(&idle.xml, targets, name)?;
    let metadata = idle.xml.metadata()?;
    let vm = refuse::vm_id(&ctx.world, domain, &idle.xml, name)?;
    let nothing = |what: String| Refusal::new(Code::NothingToDo, what);

    let mut chosen: Vec<DiskView> = Vec::new();
    for disk in idle.xml.disks() {
        let encrypted = is_encrypted(&ctx.world, domain, &disk, metadata.as_ref());
        if targets.contains(&disk.target) {
            if encrypted {
                return Err(nothing(format!("disk {} of {name} is encrypted already", disk.target)));
            }
            chosen.push(disk);
        } else if targets.is_empty()
            && !encrypted
            && !matches!(disk.device, DiskDevice::Cdrom | DiskDevice::Floppy)
        {
            chosen.push(disk);
        }
    }
    if chosen.is_empty() {
        return Err(nothing(format!("{name} has no disk that is clear")));
    }
    let uses = refuse::uses(&ctx.world)?;
    let mut disks = Vec::new();
    for disk in &chosen {
        let planned = existing(ctx, &uses, (&idle.xml, disk), domain, class, fate).map_err(|refusal| {
            let refusal = refusal.about(&disk.target);
            let others = chosen.iter().filter(|d| d.target != disk.target).map(|d| d.target.as_str());
            let others: Vec<_> = others.collect();
            // Told to take all, the administrator may want the rest.
            if refusal.hint.is_empty() && targets.is_empty() && !others.is_empty() {
                refusal.hint(format!("to encrypt the others, name them: {}", others.join(", ")))
            } else {
                refusal
            }
        })?;
        disks.push(planned);
    }
    check_new_disks(&disks)?;
    Ok(EncryptPlan { vm, domain, name: name.clone(), key: key.clone(), disks, definition: Target::Change })
}

/// A disk whose clear image is there.
pub(crate) fn existing(
    ctx: &Context,
    uses: &Uses,
    (xml, disk): (&DomainXml, &DiskView),
    domain: DomainUuid,
    class: &Resolved,
    fate: SourceFate,
) -> Result<NewDisk, Refusal> {
    if !is_target(&disk.target) {
        let text = format!("'{}' is no target name this version serves", disk.target.escape_debug());
        return Err(Refusal::new(Code::UnsupportedDisk, text));
    }
    if ours::Ours::of(&ctx.world.config, disk).is_some() {
        return Err(Refusal::new(Code::UnknownVm, "it is vmseal's already, and nothing is known here of it")
            .hint("put the vmseal element back into its domain's metadata"));
    }
    let (path, format) = clear_image(disk)?;
    check_class(xml, &disk.target, format, class.class)?;
    if let Some(at) = place::location(&path)? {
        return existing_image(ctx, uses, disk, (domain, class), &at, fate);
    }
    let image = examine(&path)?;
    let sizes = check_image(&image, &path, format, disk.format.is_some(), UNIT)?;
    check_unshared(uses, &path, &image.identity, (domain, &disk.target))?;
    // In use by a process libvirt knows nothing of; asked again, and held, when the work begins.
    patiently(ctx, || lock_source(&image.file, &path)).map_err(refused)?;
    let volume = place::encrypted_name(&path);
    place::check_free(&ctx.world, &volume)?;
    Ok(NewDisk {
        target: disk.target.clone(),
        disk: DiskId::from_random(random_bytes()?),
        volume,
        format,
        class: class.class,
        chosen: Some(class.chosen.clone()),
        image_bytes: image.identity.bytes,
        stored_bytes: sizes.stored,
        presented_bytes: sizes.presented,
        ownership: image.ownership,
        origin: Origin::Image { path, identity: image.identity, fate },
    })
}

/// The same on RBD.
fn existing_image(
    ctx: &Context,
    uses: &Uses,
    disk: &DiskView,
    (domain, class): (DomainUuid, &Resolved),
    at: &Location,
    fate: SourceFate,
) -> Result<NewDisk, Refusal> {
    let path = at.to_string();
    let info = place::idle_image(&ctx.world, at)?;
    if info.snapshots > 0 && fate == SourceFate::Wipe {
        let name = shell(&at.name());
        let text = format!("{path} has {} snapshots: their clear data would stay", info.snapshots);
        return Err(Refusal::new(Code::UnsupportedDisk, text)
            .hint(format!("rbd snap ls {name}; rbd snap purge {name}; or keep the clear image")));
    }
    let beginning = Tool::new(&ctx.world.config)?.read(at, 0, 512)?;
    let sizes = check_raw(&path, info.bytes, &beginning, disk.format.is_some(), UNIT)?;
    let identity = place::identity(at, &info);
    check_unshared(uses, &path, &identity, (domain, &disk.target))?;
    let volume = place::encrypted_name(&path);
    place::check_free(&ctx.world, &volume)?;
    Ok(NewDisk {
        target: disk.target.clone(),
        disk: DiskId::from_random(random_bytes()?),
        volume,
        format: InnerFormat::Raw,
        class: class.class,
        chosen: Some(class.chosen.clone()),
        image_bytes: info.bytes,
        stored_bytes: sizes.stored,
        presented_bytes: sizes.presented,
        ownership: Ownership::default(),
        origin: Origin::Image { path, identity, fate },
    })
}

/// While nothing was begun, ending it is all the same.
fn refused(halt: Halt) -> Refusal {
    match halt {
        Halt::Failed(refusal) | Halt::Suspended(refusal) => refusal,
        Halt::Stopped | Halt::Cancelled => Refusal::new(Code::Conflict, "ended before it began"),
    }
}

/// No two new volumes are the same file, and there is room for all of them.
pub(crate) fn check_new_disks(disks: &[NewDisk]) -> Result<(), Refusal> {
    let mut seen = HashSet::new();
    for disk in disks {
        if !seen.insert(disk.volume.as_str()) {
            return Err(Refusal::new(
                Code::ImageShared,
                format!("two disks would have the volume {}", disk.volume),
            ));
        }
    }
    // How much room a pool has for whom only its administrator knows.
    let files = disks.iter().filter(|d| !Location::is_meant_by(&d.volume));
    let needs: Vec<_> = files.map(|d| (directory(&d.volume), d.file_bytes())).collect();
    check_space(&needs)
}
