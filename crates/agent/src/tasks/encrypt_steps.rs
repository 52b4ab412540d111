//! Makes encrypted disks and switches a domain to them: the steps of `EncryptStep`, for `vm encrypt`, `disk create` and
//! `vm create`.
//!
//! A plan that was written down in; the domain on its volumes, or everything as before, out. Each step may be repeated
//! after a crash. Key material of a volume is in the agent's store before the volume exists, the clear image goes only
//! after the domain was switched away from it.

use std::{fs::File, os::fd::AsFd, path::Path};

use serde_json::json;
use vmseal_keys::{Dek, NewDiskRecord, random_bytes, seal_disk};
use vmseal_luks::HEADER_BYTES;
use vmseal_model::{
    control::Job,
    id::RecordId,
    record::{HeaderKind, KeyRecord, RecipientKind, RecordState, UnitBytes},
};

use crate::{
    clock::now_ms,
    new_volume::{create_exclusive, fill, header_of, rename_exclusive},
    rbd::Location,
    store::StoredDisk,
    tasks::{
        context::Context,
        encrypt_switch,
        hold::{changed, claim_source, patiently},
        image::size,
        origin::{make_empty_image, source_gone},
        pass::Pass,
        place::{self, Clear},
        plan::{EncryptPlan, Identity, NewDisk, Origin, for_job},
        refusal::{Halt, Refusal, io_refusal},
        switch::settle,
        unlock,
    },
    volume::{self, OpenVolume},
};

/// More than this under one key is worth a word (IEEE Std 1619-2018, annex D).
const MUCH_FOR_ONE_KEY: u64 = 1 << 40;

/// What is open of a disk while the task works on it.
#[derive(Default)]
struct Held {
    /// The clear image, locked.
    source: Option<Clear>,
    volume: Option<OpenVolume>,
    keys: Option<unlock::Opened>,
}

/// Goes through the steps that are not done; gives what to tell at the end.
pub(crate) fn run(ctx: &mut Context, plan: &EncryptPlan) -> Result<String, Halt> {
    ctx.set_total(
        plan.disks.iter().map(|d| d.image_bytes.saturating_mul(d.passes())).fold(0, u64::saturating_add),
    );
    let mut all: Vec<Held> = plan.disks.iter().map(|_| Held::default()).collect();
    settle(ctx, plan, |ctx| encrypt_switch::switch(ctx, plan))?;
    if !ctx.is_done("", "switched") {
        for (disk, held) in plan.disks.iter().zip(&mut all) {
            held.source = claim_source(ctx, disk)?;
        }
        for (disk, held) in plan.disks.iter().zip(&mut all) {
            let about = |halt| about(halt, &disk.target);
            keyed(ctx, plan, disk, held).map_err(about)?;
            allocated(ctx, plan, disk, held).map_err(about)?;
            copied(ctx, plan, disk, held).map_err(about)?;
            verified(ctx, plan, disk, held).map_err(about)?;
        }
        ctx.step("", "switched", |ctx| encrypt_switch::switch(ctx, plan))?;
    }
    ctx.commit();
    for held in &mut all {
        // Information only; and the locks go, so that the VM can start.
        let _ = held.volume.take().map(|volume| volume.release());
    }
    ctx.make_startable();
    let mut notes = Vec::new();
    for (disk, held) in plan.disks.iter().zip(&mut all) {
        ctx.step(&disk.target, "source-gone", |ctx| {
            notes.extend(source_gone(ctx, disk, held.source.take())?);
            Ok(())
        })?;
    }
    Ok(summary(plan, &notes))
}

fn summary(plan: &EncryptPlan, notes: &[String]) -> String {
    let targets: Vec<_> = plan.disks.iter().map(|d| d.target.as_str()).collect();
    let big = plan.disks.iter().filter(|d| d.stored_bytes > MUCH_FOR_ONE_KEY);
    let big = big.map(|d| format!("disk {} has more than 1 TiB under one key", d.target));
    let mut text = format!("{} encrypted: {}", plan.name, targets.join(", "));
    for note in notes.iter().cloned().chain(big) {
        text.push_str("; ");
        text.push_str(&note);
    }
    text
}

pub(crate) fn about(halt: Halt, target: &str) -> Halt {
    match halt {
        Halt::Failed(refusal) => Halt::Failed(refusal.about(target)),
        halt => halt,
    }
}

fn keyed(ctx: &mut Context, plan: &EncryptPlan, disk: &NewDisk, held: &mut Held) -> Result<(), Halt> {
    ctx.step(&disk.target, "keyed", |ctx| {
        // A crash between store and journal: the record is there, and its key is the one to use.
        if ctx.world.store.disk(disk.disk).is_some() {
            return Ok(json!({}));
        }
        let kek = unlock::kek(ctx, plan.vm, plan.domain, &plan.key.provider, &plan.key.kek)?;
        let dek = Dek::generate().map_err(Refusal::from)?;
        let new = NewDiskRecord {
            record: RecordId::from_random(random_bytes().map_err(Refusal::from)?),
            vm: plan.vm,
            disk: disk.disk,
            header: HeaderKind::Attached,
            unit: UnitBytes::B512,
            payload_offset: HEADER_BYTES,
            created_ms: u64::try_from(now_ms()).unwrap_or(0),
            state: RecordState {
                epoch: 1,
                stored_bytes: disk.stored_bytes,
                presented_bytes: disk.presented_bytes,
            },
        };
        // The native provider is the only one this version takes keys from.
        let record =
            seal_disk(&new, &dek, &kek, RecipientKind::Native, &plan.key.provider).map_err(Refusal::from)?;
        let stored = StoredDisk {
            target: disk.target.clone(),
            disk: disk.disk,
            source: disk.volume.clone(),
            header: None,
            format: disk.format,
            class: disk.class,
            record: record.encode(),
            epoch: record.state.epoch,
            epoch_unverified: false,
            retired: false,
        };
        ctx.world.store.put_disk(plan.vm, plan.domain, stored)?;
        let id = record.head.record;
        held.keys = Some(unlock::Opened { record, dek });
        Ok(json!({ "record": id }))
    })
}

/// The disk's key, out of this run or out of its record.
fn keys<'a>(
    ctx: &mut Context,
    plan: &EncryptPlan,
    disk: &NewDisk,
    held: &'a mut Held,
) -> Result<&'a unlock::Opened, Halt> {
    if held.keys.is_none() {
        held.keys = Some(unlock::stored_dek(ctx, plan.vm, plan.domain, disk.disk)?);
    }
    Ok(held.keys.as_ref().expect("put there above"))
}

fn allocated(ctx: &mut Context, plan: &EncryptPlan, disk: &NewDisk, held: &mut Held) -> Result<(), Halt> {
    ctx.step(&disk.target, "allocated", |ctx| {
        let (unfinished, volume) = (disk.unfinished(ctx.command.task), Path::new(&disk.volume));
        let made: Option<Identity> = ctx.data(&disk.target, "created");
        if made.is_some_and(|made| place::is_still(&ctx.world, &disk.volume, &made)) {
            // It got its name when it was whole.
            return Ok(json!({}));
        }
        // Only this task uses that name.
        place::delete(&ctx.world, &unfinished.to_string_lossy())?;
        let (record, task_dek): (&KeyRecord, &Dek) = {
            let keys = keys(ctx, plan, disk, held)?;
            (&keys.record, &keys.dek)
        };
        if Location::is_meant_by(&disk.volume) {
            let header = header_of(task_dek, record).map_err(Refusal::from)?;
            let places = (&*unfinished, disk.volume.as_str());
            place::make_image(ctx, &disk.target, places, disk.file_bytes(), Some(&header))?;
            return Ok(json!({}));
        }
        let file = create_exclusive(&unfinished, disk.ownership)
            .map_err(|e| io_refusal("create", &unfinished, &e))?;
        let metadata = file.metadata().map_err(|e| io_refusal("look at", &unfinished, &e))?;
        ctx.note(&disk.target, "created", &Identity::of(&metadata))?;
        fill(&file, task_dek, record).map_err(|e| {
            let mut refusal = Refusal::from(e);
            refusal.message =
                format!("{}: {} ({} are needed)", disk.volume, refusal.message, size(disk.file_bytes()));
            refusal
        })?;
        rename_exclusive(&unfinished, volume).map_err(|e| io_refusal("name the new volume", volume, &e))?;
        Ok(json!({}))
    })
}

/// Opens and locks the volume until the switch.
fn open(ctx: &mut Context, plan: &EncryptPlan, disk: &NewDisk, held: &mut Held) -> Result<(), Halt> {
    if held.volume.is_some() {
        return Ok(());
    }
    let path = Path::new(&disk.volume);
    let keys = keys(ctx, plan, disk, held)?;
    let mut volume = patiently(ctx, || {
        volume::open(&ctx.world.config, path, None, &keys.record, &keys.dek, &disk.target, 0, false)
    })?;
    volume.setup = for_job(&volume.setup);
    volume.hold(ctx.world.host()).map_err(Refusal::from)?;
    held.volume = Some(volume);
    Ok(())
}

fn copied(ctx: &mut Context, plan: &EncryptPlan, disk: &NewDisk, held: &mut Held) -> Result<(), Halt> {
    ctx.count_done(&disk.target, "copied", disk.image_bytes);
    ctx.step(&disk.target, "copied", |ctx| {
        if let Origin::EmptyQcow2 { virtual_bytes } = disk.origin {
            make_empty_image(ctx, disk, virtual_bytes)?;
        }
        pass(ctx, plan, disk, held, if disk.origin == Origin::Zeros { Job::Zero } else { Job::Encrypt })?;
        Ok(json!({}))
    })
}

/// One pass over the whole image.
fn pass(
    ctx: &mut Context,
    plan: &EncryptPlan,
    disk: &NewDisk,
    held: &mut Held,
    job: Job,
) -> Result<String, Halt> {
    let empty = match disk.origin {
        Origin::EmptyQcow2 { .. } => {
            let path = disk.empty_image(&ctx.world.config.state_dir, ctx.command.task);
            Some(File::open(&path).map_err(|e| io_refusal("open", &path, &e))?)
        }
        _ => None,
    };
    open(ctx, plan, disk, held)?;
    keys(ctx, plan, disk, held)?;
    let (volume, keys) = (held.volume.as_ref(), held.keys.as_ref());
    let (volume, dek) = (volume.expect("opened above"), &keys.expect("had above").dek);
    let other = held.source.as_ref().map(Clear::fd).or(empty.as_ref().map(AsFd::as_fd));
    let (target, bytes) = (disk.target.as_str(), disk.image_bytes);
    Pass { vm: plan.vm, target, job, volume, dek, other, bytes }.run(ctx)
}

fn verified(ctx: &mut Context, plan: &EncryptPlan, disk: &NewDisk, held: &mut Held) -> Result<(), Halt> {
    if disk.passes() > 1 {
        ctx.count_done(&disk.target, "verified", disk.image_bytes);
    }
    ctx.step(&disk.target, "verified", |ctx| {
        let sha256 = match &disk.origin {
            // Nothing to compare with, and nothing lost if it were not so.
            Origin::Zeros => String::new(),
            Origin::EmptyQcow2 { virtual_bytes } => {
                make_empty_image(ctx, disk, *virtual_bytes)?;
                pass(ctx, plan, disk, held, Job::Verify)?
            }
            Origin::Image { .. } => pass(ctx, plan, disk, held, Job::Verify)?,
        };
        if let (Origin::Image { path, identity, .. }, Some(source)) = (&disk.origin, &held.source) {
            let now = source.identity(&ctx.world, path)?;
            let there = place::look(&ctx.world, path)?;
            if !now.is_unchanged(identity) || !there.is_some_and(|there| there.same_file(identity)) {
                return Err(changed(path).into());
            }
        }
        Ok(json!({ "sha256": sha256 }))
    })
}

/// Undoes everything: new volumes and images go, records are retired, clear images were never touched. A volume that
/// became the only copy stays. Gives what could not be undone.
pub(crate) fn roll_back(ctx: &mut Context, plan: &EncryptPlan) -> Result<Vec<String>, Halt> {
    let mut left = Vec::new();
    for disk in &plan.disks {
        ctx.reach("rolling-back", "begin")?;
        let task = ctx.command.task;
        for own in [disk.unfinished(task), disk.empty_image(&ctx.world.config.state_dir, task)] {
            left.extend(place::delete(&ctx.world, &own.to_string_lossy()).err().map(|r| r.message));
        }
        if let Some(only) = only_copy(ctx, disk) {
            left.push(only);
            ctx.reach("rolling-back", "after")?;
            continue;
        }
        let created: Option<Identity> = ctx.data(&disk.target, "created");
        if created.is_some_and(|made| place::is_still(&ctx.world, &disk.volume, &made)) {
            left.extend(place::delete(&ctx.world, &disk.volume).err().map(|r| r.message));
        }
        if ctx.world.store.disk(disk.disk).is_some_and(|(_, stored)| !stored.retired) {
            left.extend(
                ctx.world.store.retire_disk(plan.vm, disk.disk).err().map(|e| Refusal::from(e).message),
            );
        }
        ctx.reach("rolling-back", "after")?;
    }
    Ok(left)
}

/// Somebody deleted the clear image, and the volume holds all of it: which volume that is.
fn only_copy(ctx: &Context, disk: &NewDisk) -> Option<String> {
    let Origin::Image { path, .. } = &disk.origin else { return None };
    let gone = matches!(place::look(&ctx.world, path), Ok(None));
    let whole =
        ctx.is_done(&disk.target, "verified") && matches!(place::look(&ctx.world, &disk.volume), Ok(Some(_)));
    let text =
        || format!("{path} is gone; all of it is in the encrypted volume {}, which is left", disk.volume);
    (gone && whole).then(text)
}
