//! `disk set --class`: a disk is presented another way from the VM's next start on. What is refused, the plan, the steps
//! of `SetClassStep`.
//!
//! Nothing of a volume is touched: the disk's part of the definition and of its metadata changes in one define, then the
//! agent's store follows. A start believes the definition, so a crash between the two harms nothing.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vmseal_model::{
    class::{Chosen, DiskClass, Resolved},
    id::{DiskId, DomainUuid, VmId},
    metadata::DiskMetadata,
    refusal::Code,
    state::InnerFormat,
};

use crate::{
    domain_xml::{DomainXml, EncryptedSource},
    ours::Ours,
    ports::Definition,
    store::StoredDisk,
    tasks::{
        context::{Context, World},
        image::shell,
        refusal::{Halt, Refusal},
        refuse::{check_class, check_off, check_targets, idle_domain, vm_id},
        switch::{self, NewFiles, settle},
    },
};

/// What will be done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ClassPlan {
    vm: VmId,
    domain: DomainUuid,
    name: String,
    target: String,
    disk: DiskId,
    format: InnerFormat,
    socket: String,
    class: DiskClass,
    #[serde(default)]
    chosen: Option<Chosen>,
    /// It is of that class already.
    already: bool,
}

/// Looks at everything, changes nothing.
pub(crate) fn plan(
    ctx: &Context,
    domain: DomainUuid,
    target: &str,
    Resolved { class, chosen }: Resolved,
) -> Result<ClassPlan, Refusal> {
    let world = &ctx.world;
    let info = world.hypervisor.domain(domain)?;
    let name = &info.name;
    let xml = DomainXml::parse(&world.hypervisor.xml(domain, Definition::Persistent)?)?;
    check_targets(&xml, &[target.to_owned()], name)?;
    let Some((disk, now)) = ours(world, &xml, domain, target)? else {
        let text = format!("disk {target} of {name} is clear: only an encrypted disk has a class");
        let hint = format!("vmseal vm encrypt {} --disk {target} --class {}", shell(name), class.as_str());
        return Err(Refusal::new(Code::UnsupportedDisk, text).hint(hint));
    };
    let vm = vm_id(world, domain, &xml, name)?;
    if let Some((owner, _)) = world.store.disk(disk).filter(|(owner, _)| *owner != vm) {
        let text = format!("disk {target} of {name} belongs to VM {owner}, which this is not");
        return Err(Refusal::new(Code::Integrity, text).hint(format!(
            "put back the definition it had, or, if the VM is to be that one: vmseal vm adopt {}",
            shell(name)
        )));
    }
    let entry = metadata_of(world, &xml, disk)?;
    let already = now == class;
    if !already {
        check_off(&info).map_err(|refusal| {
            let text = format!("{}, and libvirt fixes a disk's class when its VM starts", refusal.message);
            let hint = format!("{}; then do this again", refusal.hint);
            Refusal::new(refusal.code, text).hint(hint)
        })?;
        idle_domain(world, domain)?;
        check_class(&xml, target, entry.format, class)?;
    }
    let socket = world.config.disk_socket(domain, target).to_string_lossy().into_owned();
    let (name, target) = (name.clone(), target.to_owned());
    let (format, chosen) = (entry.format, Some(chosen));
    Ok(ClassPlan { vm, domain, name, target, disk, format, socket, class, chosen, already })
}

/// The disk of ours behind a target, and its class; none if it is not on a socket of ours. As a start does, it believes
/// no socket but the one that is this disk's own.
fn ours(
    world: &World,
    xml: &DomainXml,
    domain: DomainUuid,
    target: &str,
) -> Result<Option<(DiskId, DiskClass)>, Refusal> {
    let Some(view) = xml.disk(target) else { return Ok(None) };
    let Some(on) = Ours::of(&world.config, &view) else { return Ok(None) };
    let name = xml.name().unwrap_or_default();
    if !on.is_of(&world.config, domain) {
        let text = format!("disk {target} of {name} is on the socket of another disk or VM: a copy?");
        return Err(Refusal::new(Code::Integrity, text).hint(format!("vmseal vm adopt {}", shell(name))));
    }
    let metadata = xml.metadata()?;
    match on.disk(metadata.as_ref(), &world.store, domain) {
        Some(disk) => Ok(Some((disk, on.class))),
        None => Err(unknown(&format!("disk {target} of {name}"))),
    }
}

fn unknown(disk: &str) -> Refusal {
    Refusal::new(Code::UnknownVm, format!("nothing is known here of {disk}"))
        .hint("put the vmseal element back into its domain's metadata")
}

/// A disk's part of the metadata: as it stands there, else as the store would write it.
fn metadata_of(world: &World, xml: &DomainXml, disk: DiskId) -> Result<DiskMetadata, Refusal> {
    let there = xml.metadata()?.and_then(|m| m.disks.into_iter().find(|d| d.disk == disk));
    let stored = || world.store.disk(disk).map(|(_, stored)| crate::reconcile::disk_metadata(&stored));
    there.or_else(stored).ok_or_else(|| unknown(&format!("disk {disk}")))
}

/// Goes through the steps that are not done; gives what to tell at the end.
pub(crate) fn run(ctx: &mut Context, plan: &ClassPlan) -> Result<String, Halt> {
    let (what, class) = (format!("disk {} of {}", plan.target, plan.name), plan.class.as_str());
    if plan.already {
        return Ok(format!("{what} is {class} already{}", because(plan)));
    }
    settle(ctx, plan, |ctx| switch(ctx, plan))?;
    ctx.step("", "switched", |ctx| switch(ctx, plan))?;
    ctx.commit();
    // Before a start can verify the record and write it to the store, too.
    ctx.step("", "recorded", |ctx| record(ctx, plan))?;
    ctx.make_startable();
    Ok(format!("{what} is {class} from its next start on{}", because(plan)))
}

/// Who left the choice to us is told how it came about.
fn because(plan: &ClassPlan) -> String {
    let left_to_us = plan.chosen.as_ref().filter(|chosen| chosen.asked.is_auto());
    left_to_us.map_or(String::new(), |chosen| format!(": {}", chosen.why))
}

/// Nothing was done that could be undone.
pub(crate) fn roll_back(_: &mut Context, _: &ClassPlan) -> Result<Vec<String>, Halt> {
    Ok(Vec::new())
}

impl NewFiles for ClassPlan {
    fn domain(&self) -> DomainUuid {
        self.domain
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn targets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn named_in(&self, xml: &DomainXml) -> bool {
        !self.already && xml.disk(&self.target).is_some_and(|disk| disk.source == self.source().view())
    }

    fn is_named(&self) -> String {
        format!("the definition of {} has disk {} as {} already", self.name, self.target, self.class.as_str())
    }
}

impl ClassPlan {
    fn source(&self) -> EncryptedSource {
        EncryptedSource {
            disk: self.disk,
            format: self.format,
            socket: self.socket.clone(),
            class: self.class,
        }
    }
}

fn switch(ctx: &mut Context, plan: &ClassPlan) -> Result<Value, Halt> {
    let world = ctx.world.clone();
    switch::switch(ctx, plan, None, |xml| apply(&world, xml, plan), |xml| is_done(xml, plan))
}

fn apply(world: &World, xml: &mut DomainXml, plan: &ClassPlan) -> Result<(), Refusal> {
    if ours(world, xml, plan.domain, &plan.target)?.is_none_or(|(disk, _)| disk != plan.disk) {
        let text = format!("disk {} of {} was redefined meanwhile", plan.target, plan.name);
        return Err(Refusal::new(Code::Conflict, text).hint("try again"));
    }
    check_class(xml, &plan.target, plan.format, plan.class)?;
    let mut entry = metadata_of(world, xml, plan.disk)?;
    let others = xml.metadata()?.map(|m| m.disks).unwrap_or_default();
    let mut disks: Vec<_> =
        others.into_iter().filter(|d| d.target != plan.target && d.disk != plan.disk).collect();
    // It may have had another name in the guest when its metadata was written.
    entry.target.clone_from(&plan.target);
    (entry.class, entry.chosen) = (plan.class, plan.chosen.clone());
    entry.aside = xml.encrypt_disk(&plan.target, &plan.source())?;
    disks.push(entry);
    xml.set_disks(plan.vm, plan.domain, disks)?;
    Ok(())
}

fn is_done(xml: &DomainXml, plan: &ClassPlan) -> bool {
    let Ok(Some(metadata)) = xml.metadata() else { return false };
    plan.named_in(xml)
        && metadata
            .disks
            .iter()
            .any(|d| (d.disk, d.class, &d.target) == (plan.disk, plan.class, &plan.target))
}

/// One that the store does not know comes there with the next start.
fn record(ctx: &Context, plan: &ClassPlan) -> Result<Value, Halt> {
    if let Some((vm, stored)) = ctx.world.store.disk(plan.disk) {
        let known = StoredDisk { class: plan.class, target: plan.target.clone(), ..stored };
        ctx.world.store.put_disk(vm, plan.domain, known)?;
    }
    Ok(json!({}))
}
