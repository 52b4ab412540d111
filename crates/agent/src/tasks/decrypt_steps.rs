//! Makes clear files of encrypted disks and switches a domain to them: the steps of `DecryptStep`.
//!
//! A plan that was written down in; the domain on clear files, or everything as before, out. Each step may be repeated
//! after a crash. Records stay in the store, retired: a volume that was kept, or an old backup of it, may need them.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use vmseal_model::{control::Job, id::DomainUuid, refusal::Code, task::SourceFate};

use crate::{
    domain_xml::DomainXml,
    new_volume::{allocate, create_exclusive, rename_exclusive},
    ours,
    rbd::Location,
    tasks::{
        context::{Context, World},
        encrypt_steps::about,
        hold::{lock_again, lock_source, patiently},
        image::shell,
        pass::Pass,
        place::{self, Clear},
        plan::{ClearDisk, DecryptPlan, Identity, for_job},
        refusal::{Halt, Refusal, io_refusal},
        switch::{self, NewFiles, settle},
        unlock, wipe,
    },
    volume::{self, OpenVolume, open_regular},
};

#[derive(Default)]
struct Held {
    volume: Option<OpenVolume>,
    keys: Option<unlock::Opened>,
    /// The clear file or image, locked.
    clear: Option<Clear>,
}

/// Goes through the steps that are not done; gives what to tell at the end.
pub(crate) fn run(ctx: &mut Context, plan: &DecryptPlan) -> Result<String, Halt> {
    ctx.set_total(plan.disks.iter().map(|d| d.bytes.saturating_mul(2)).fold(0, u64::saturating_add));
    let mut all: Vec<Held> = plan.disks.iter().map(|_| Held::default()).collect();
    settle(ctx, plan, |ctx| switch(ctx, plan))?;
    if !ctx.is_done("", "switched")
        && let Err(halt) = up_to_switch(ctx, plan, &mut all)
    {
        if !matches!(halt, Halt::Stopped) {
            all.iter().for_each(release);
        }
        return Err(halt);
    }
    ctx.commit();
    all.iter().for_each(release);
    drop(all);
    ctx.make_startable();
    let mut notes = Vec::new();
    for disk in &plan.disks {
        ctx.step(&disk.target, "source-gone", |ctx| {
            notes.extend(source_gone(ctx, plan, disk)?);
            Ok(())
        })?;
    }
    let targets: Vec<_> = plan.disks.iter().map(|d| format!("{} in {}", d.target, d.clear)).collect();
    let mut text = format!("{} is clear: {}", plan.name, targets.join(", "));
    for note in notes {
        text.push_str("; ");
        text.push_str(&note);
    }
    Ok(text)
}

fn up_to_switch(ctx: &mut Context, plan: &DecryptPlan, all: &mut [Held]) -> Result<(), Halt> {
    for (disk, held) in plan.disks.iter().zip(all) {
        let steps = |ctx: &mut Context, held: &mut Held| {
            open(ctx, plan, disk, held)?;
            allocated(ctx, disk)?;
            copied(ctx, plan, disk, held)?;
            verified(ctx, plan, disk, held)
        };
        steps(ctx, held).map_err(|halt| about(halt, &disk.target))?;
    }
    ctx.step("", "switched", |ctx| switch(ctx, plan))
}

/// Says in the owner block that nobody holds the volume. Information only: what fails here is passed over.
fn release(held: &Held) {
    if let Some(volume) = &held.volume {
        let _ = volume.release();
    }
}

/// The volume, open and locked until the switch: nobody writes it meanwhile.
fn open(ctx: &mut Context, plan: &DecryptPlan, disk: &ClearDisk, held: &mut Held) -> Result<(), Halt> {
    let keys = unlock::stored_dek(ctx, plan.vm, plan.domain, disk.disk)?;
    let (path, header) = (Path::new(&disk.volume), disk.header.as_deref().map(Path::new));
    let mut volume = patiently(ctx, || {
        volume::open(&ctx.world.config, path, header, &keys.record, &keys.dek, &disk.target, 0, false)
    })?;
    let now = match &volume.remote {
        Some(_) => place::look(&ctx.world, &disk.volume)?,
        None => {
            let metadata = volume.data.metadata().map_err(|e| io_refusal("look at", path, &e))?;
            Some(Identity::of(&metadata))
        }
    };
    if !now.is_some_and(|now| now.same_file(&disk.identity)) {
        let text = format!("{} was replaced by another file meanwhile", disk.volume);
        return Err(Refusal::new(Code::Conflict, text).into());
    }
    volume.hold(ctx.world.host()).map_err(Refusal::from)?;
    volume.setup = for_job(&volume.setup);
    held.volume = Some(volume);
    held.keys = Some(keys);
    Ok(())
}

fn allocated(ctx: &mut Context, disk: &ClearDisk) -> Result<(), Halt> {
    ctx.step(&disk.target, "allocated", |ctx| {
        let (unfinished, clear) = (disk.unfinished(ctx.command.task), Path::new(&disk.clear));
        let made: Option<Identity> = ctx.data(&disk.target, "created");
        if made.is_some_and(|made| place::is_still(&ctx.world, &disk.clear, &made)) {
            return Ok(json!({}));
        }
        place::delete(&ctx.world, &unfinished.to_string_lossy())?;
        if Location::is_meant_by(&disk.clear) {
            place::make_image(ctx, &disk.target, (&unfinished, &disk.clear), disk.bytes, None)?;
            return Ok(json!({}));
        }
        let file = create_exclusive(&unfinished, disk.ownership)
            .map_err(|e| io_refusal("create", &unfinished, &e))?;
        let metadata = file.metadata().map_err(|e| io_refusal("look at", &unfinished, &e))?;
        ctx.note(&disk.target, "created", &Identity::of(&metadata))?;
        allocate(&file, disk.bytes).map_err(Refusal::from)?;
        file.sync_all().map_err(|e| io_refusal("flush", &unfinished, &e))?;
        rename_exclusive(&unfinished, clear).map_err(|e| io_refusal("name the clear file", clear, &e))?;
        Ok(json!({}))
    })
}

fn copied(ctx: &mut Context, plan: &DecryptPlan, disk: &ClearDisk, held: &mut Held) -> Result<(), Halt> {
    ctx.count_done(&disk.target, "copied", disk.bytes);
    ctx.step(&disk.target, "copied", |ctx| {
        pass(ctx, plan, disk, held, Job::Decrypt)?;
        Ok(json!({}))
    })
}

fn verified(ctx: &mut Context, plan: &DecryptPlan, disk: &ClearDisk, held: &mut Held) -> Result<(), Halt> {
    ctx.count_done(&disk.target, "verified", disk.bytes);
    ctx.step(&disk.target, "verified", |ctx| {
        let sha256 = pass(ctx, plan, disk, held, Job::Verify)?;
        let clear = held.clear.as_ref().expect("the pass opened it");
        Ok(json!({ "sha256": sha256, "clear": clear.identity(&ctx.world, &disk.clear)? }))
    })
}

fn pass(
    ctx: &mut Context,
    plan: &DecryptPlan,
    disk: &ClearDisk,
    held: &mut Held,
    job: Job,
) -> Result<String, Halt> {
    if held.clear.is_none() {
        held.clear = Some(hold_clear(ctx, disk)?);
    }
    let (volume, keys) = (held.volume.as_ref(), held.keys.as_ref());
    let (volume, dek) = (volume.expect("the disk's first step opens it"), &keys.expect("as above").dek);
    let (target, other) = (disk.target.as_str(), held.clear.as_ref().map(Clear::fd));
    Pass { vm: plan.vm, target, job, volume, dek, other, bytes: disk.bytes }.run(ctx)
}

/// The clear file or image of this task, locked.
fn hold_clear(ctx: &Context, disk: &ClearDisk) -> Result<Clear, Halt> {
    let made: Option<Identity> = ctx.data(&disk.target, "created");
    let check = |now: &Identity| {
        if made.is_some_and(|made| now.same_file(&made)) {
            return Ok(());
        }
        let text = format!("{} is not the file this task made", disk.clear);
        Err(Refusal::new(Code::Conflict, text))
    };
    if let Some(at) = place::location(&disk.clear)? {
        let name = place::held_name(ctx, &disk.target, "clear");
        let (clear, now) = patiently(ctx, || Clear::hold(&ctx.world, &at, &name))?;
        check(&now)?;
        return Ok(clear);
    }
    let file = open_regular(Path::new(&disk.clear), true).map_err(Refusal::from)?;
    let clear = Clear::File(file);
    check(&clear.identity(&ctx.world, &disk.clear)?)?;
    if let Clear::File(file) = &clear {
        patiently(ctx, || lock_source(file, &disk.clear))?;
    }
    Ok(clear)
}

impl NewFiles for DecryptPlan {
    fn domain(&self) -> DomainUuid {
        self.domain
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn targets(&self) -> Vec<&str> {
        self.disks.iter().map(|d| d.target.as_str()).collect()
    }

    fn named_in(&self, xml: &DomainXml) -> bool {
        let there = xml.disks();
        let named = |path: &str| there.iter().any(|d| place::is_at(&d.source, path));
        self.disks.iter().any(|disk| named(&disk.clear))
    }

    fn clear_files(&self) -> Vec<(&str, &str)> {
        self.disks.iter().map(|d| (d.target.as_str(), d.clear.as_str())).collect()
    }
}

fn switch(ctx: &mut Context, plan: &DecryptPlan) -> Result<Value, Halt> {
    let world = ctx.world.clone();
    switch::switch(ctx, plan, None, |xml| apply(&world, xml, plan), |xml| is_done(xml, plan))
}

fn apply(world: &World, xml: &mut DomainXml, plan: &DecryptPlan) -> Result<(), Refusal> {
    let metadata = xml.metadata()?;
    for disk in &plan.disks {
        let there = xml.disk(&disk.target);
        let behind = there.as_ref().and_then(|there| {
            ours::behind(&world.config, &world.store, plan.domain, metadata.as_ref(), there)
        });
        match there.map(|there| there.source) {
            _ if behind == Some(disk.disk) => {
                xml.clear_disk(&disk.target, disk.disk, &disk.clear, disk.format)?;
            }
            Some(now) if place::is_at(&now, &disk.clear) => {}
            _ => {
                let text = format!("disk {} of {} was redefined meanwhile", disk.target, plan.name);
                return Err(Refusal::new(Code::Conflict, text).hint("try again"));
            }
        }
    }
    let Some(metadata) = metadata else { return Ok(()) };
    let gone = |target: &str| plan.disks.iter().any(|d| d.target == target);
    let left = metadata.disks.into_iter().filter(|d| !gone(&d.target)).collect();
    xml.set_disks(metadata.vm, metadata.domain, left)?;
    Ok(())
}

fn is_done(xml: &DomainXml, plan: &DecryptPlan) -> bool {
    let Ok(metadata) = xml.metadata() else { return false };
    let left = metadata.map(|m| m.disks).unwrap_or_default();
    plan.disks.iter().all(|disk| {
        let there = xml.disk(&disk.target);
        there.is_some_and(|d| place::is_at(&d.source, &disk.clear))
            && left.iter().all(|d| d.target != disk.target)
    })
}

/// The record is retired, the volume meets its fate. What cannot be done is told, not failed: the VM is clear.
fn source_gone(ctx: &mut Context, plan: &DecryptPlan, disk: &ClearDisk) -> Result<Option<String>, Halt> {
    let at = place::location(&disk.volume)?;
    let left = |why: Refusal| {
        let way = match &at {
            Some(at) => format!("rbd rm {}", shell(&at.name())),
            None => format!("rm {}", shell(&disk.volume)),
        };
        Some(format!("the volume {} is still there ({}): {way}", disk.volume, why.message))
    };
    if let Err(error) = ctx.world.store.retire_disk(plan.vm, disk.disk) {
        return Ok(left(error.into()));
    }
    let done = match (plan.fate, &at) {
        (SourceFate::Keep, Some(_)) => Ok(()),
        (SourceFate::Keep, None) => wipe::keep(&disk.volume, &disk.identity).map_err(Halt::from),
        (SourceFate::Wipe, Some(at)) => {
            let name = place::held_name(ctx, &disk.target, "volume");
            place::remove_image(ctx, at, &disk.identity, Some(&name))
        }
        (SourceFate::Wipe, None) => lock_again(&disk.volume, &disk.identity)
            .map_err(Halt::from)
            .and_then(|_locked| wipe::wipe_volume(ctx, &disk.volume, disk.header.as_deref(), &disk.identity)),
    };
    match (done, plan.fate) {
        (Ok(()), SourceFate::Keep) => Ok(Some(format!("the volume is kept: {}", disk.volume))),
        (Ok(()), SourceFate::Wipe) => Ok(None),
        (Err(Halt::Failed(why)), _) => Ok(left(why)),
        (Err(halt), _) => Err(halt),
    }
}

/// Undoes everything: clear files are overwritten and deleted, volumes were only read. Gives what could not be undone.
pub(crate) fn roll_back(ctx: &mut Context, plan: &DecryptPlan) -> Result<Vec<String>, Halt> {
    let mut left = Vec::new();
    for disk in &plan.disks {
        ctx.reach("rolling-back", "begin")?;
        // Without data yet: it gets its name before the first byte.
        let unfinished = disk.unfinished(ctx.command.task);
        left.extend(place::delete(&ctx.world, &unfinished.to_string_lossy()).err().map(|r| r.message));
        let created: Option<Identity> = ctx.data(&disk.target, "created");
        let there = place::look(&ctx.world, &disk.clear).ok().flatten();
        if let (Some(created), Some(there)) = (created, there)
            && created.same_file(&there)
        {
            match clear_gone(ctx, disk, &created) {
                Err(Halt::Failed(why)) => left.push(format!(
                    "the clear file {} is still there ({}); when nothing needs it: shred -u {}",
                    disk.clear,
                    why.message,
                    shell(&disk.clear)
                )),
                other => other?,
            }
        }
        ctx.reach("rolling-back", "after")?;
    }
    Ok(left)
}

/// What a clear file was when it was whole.
#[derive(Deserialize)]
struct Verified {
    clear: Identity,
}

/// The clear file is overwritten and deleted, unless somebody uses it or has written to it: then it is not only a copy.
fn clear_gone(ctx: &mut Context, disk: &ClearDisk, created: &Identity) -> Result<(), Halt> {
    if let Some(at) = place::location(&disk.clear)? {
        let there = place::look(&ctx.world, &disk.clear)?;
        let verified: Option<Verified> = ctx.data(&disk.target, "verified");
        if let (Some(verified), Some(there)) = (verified, there)
            && !there.is_unchanged(&verified.clear)
        {
            return Err(Refusal::new(Code::Conflict, "it was written to since it was made").into());
        }
        return place::remove_image(ctx, &at, created, None);
    }
    let locked = patiently(ctx, || lock_again(&disk.clear, created))?;
    let Some(file) = locked else { return Ok(()) };
    if !ctx.is_done(&disk.target, "wiping") {
        let now = file.metadata().map_err(|e| io_refusal("look at", Path::new(&disk.clear), &e))?;
        let verified: Option<Verified> = ctx.data(&disk.target, "verified");
        if verified.is_some_and(|verified| !Identity::of(&now).is_unchanged(&verified.clear)) {
            return Err(Refusal::new(Code::Conflict, "it was written to since it was made").into());
        }
        // From here on it is written to by us.
        ctx.note(&disk.target, "wiping", &json!({}))?;
    }
    wipe::wipe(ctx, &disk.clear, created)
}
