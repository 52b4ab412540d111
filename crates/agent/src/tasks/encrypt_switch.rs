//! The definition's side of encrypting: disks of ours in, metadata in, and how to see that both are there.

use serde_json::Value;
use vmseal_model::{
    class::DiskClass,
    id::DomainUuid,
    metadata::{Aside, DiskMetadata},
    refusal::Code,
};

use crate::{
    config::AgentConfig,
    domain_xml::{DiskSource, DiskView, DomainXml, EncryptedSource},
    store::StoredDisk,
    tasks::{
        command::Work,
        context::Context,
        place,
        plan::{EncryptPlan, NewDisk, Origin, Target},
        refusal::{Halt, Refusal},
        switch::{self, NewFiles},
    },
};

impl NewFiles for EncryptPlan {
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
        // A fast disk has no name: whatever is on a socket of that kind at that target may be the new one.
        let names = |seen: &DiskView, new: &NewDisk| match &seen.source {
            DiskSource::NbdUnix { export, .. } => *export == new.disk.to_string(),
            DiskSource::Block(device) => *device == AgentConfig::ublk_device(new.disk),
            DiskSource::VhostUser { .. } => new.class == DiskClass::Fast && seen.target == new.target,
            _ => false,
        };
        self.disks.iter().any(|new| there.iter().any(|seen| names(seen, new)))
    }
}

/// All disks of the plan, in one define.
pub(crate) fn switch(ctx: &mut Context, plan: &EncryptPlan) -> Result<Value, Halt> {
    let mut entries = Vec::new();
    for disk in &plan.disks {
        let stored = ctx.world.store.disk(disk.disk).map(|(_, stored)| stored);
        let stored = stored.ok_or_else(|| {
            Refusal::new(Code::Integrity, format!("the agent's store lost the record of disk {}", disk.disk))
        })?;
        entries.push(entry(stored));
    }
    let new = match (&ctx.command.work, plan.definition) {
        (Work::CreateVm { xml, .. }, Target::Define) => Some(DomainXml::parse(xml)?),
        _ => None,
    };
    let sockets: Vec<_> = plan.disks.iter().map(|d| socket(ctx, plan, d)).collect();
    let apply = |xml: &mut DomainXml| apply(xml, plan, &sockets, &entries);
    switch::switch(ctx, plan, new.as_ref(), apply, |xml| is_done(xml, plan, &sockets, &entries))
}

fn socket(ctx: &Context, plan: &EncryptPlan, disk: &NewDisk) -> String {
    ctx.world.config.disk_socket(plan.domain, &disk.target).to_string_lossy().into_owned()
}

/// A disk as it stands in the metadata.
pub(crate) fn entry(stored: StoredDisk) -> DiskMetadata {
    DiskMetadata {
        target: stored.target,
        disk: stored.disk,
        source: stored.source,
        header: stored.header,
        format: stored.format,
        class: stored.class,
        chosen: None,
        aside: Aside::new(),
        record: stored.record,
    }
}

fn apply(
    xml: &mut DomainXml,
    plan: &EncryptPlan,
    sockets: &[String],
    entries: &[DiskMetadata],
) -> Result<(), Refusal> {
    let others = xml.metadata()?.map(|m| m.disks).unwrap_or_default();
    let mut disks: Vec<_> =
        others.iter().filter(|d| entries.iter().all(|e| e.target != d.target)).cloned().collect();
    for ((disk, socket), entry) in plan.disks.iter().zip(sockets).zip(entries) {
        let there = xml.disk(&disk.target).map(|d| d.source);
        let source = encrypted_source(disk, socket);
        let aside = match (&disk.origin, plan.definition, there) {
            (_, _, Some(now)) if now == source.view() => {
                others.iter().find(|d| d.disk == disk.disk).map(|d| d.aside.clone()).unwrap_or_default()
            }
            (_, Target::Add, None) => xml.add_encrypted_disk(&disk.target, &source)?,
            (Origin::Image { path, .. }, _, Some(now)) if place::is_at(&now, path) => {
                xml.encrypt_disk(&disk.target, &source)?
            }
            // A new VM's disk whose image was never there.
            (_, Target::Define, Some(_)) => xml.encrypt_disk(&disk.target, &source)?,
            _ => {
                let text = format!("disk {} of {} was redefined meanwhile", disk.target, plan.name);
                return Err(Refusal::new(Code::Conflict, text).hint("try again"));
            }
        };
        disks.push(DiskMetadata { aside, chosen: disk.chosen.clone(), ..entry.clone() });
    }
    xml.set_disks(plan.vm, plan.domain, disks)?;
    Ok(())
}

fn encrypted_source(disk: &NewDisk, socket: &str) -> EncryptedSource {
    EncryptedSource { disk: disk.disk, format: disk.format, socket: socket.to_owned(), class: disk.class }
}

fn is_done(xml: &DomainXml, plan: &EncryptPlan, sockets: &[String], entries: &[DiskMetadata]) -> bool {
    let Ok(Some(metadata)) = xml.metadata() else { return false };
    let disks = plan.disks.iter().zip(sockets).all(|(disk, socket)| {
        xml.disk(&disk.target).is_some_and(|there| {
            there.source == encrypted_source(disk, socket).view()
                && there.format.as_deref() == Some(disk.format.as_str())
        })
    });
    disks
        && (metadata.vm, metadata.domain) == (plan.vm, plan.domain)
        && entries.iter().all(|entry| metadata.disks.iter().any(|there| is_as(there, entry)))
}

/// Whether it says the same, whatever was set aside, and however its class came about.
pub(crate) fn is_as(there: &DiskMetadata, wanted: &DiskMetadata) -> bool {
    DiskMetadata { aside: wanted.aside.clone(), chosen: wanted.chosen.clone(), ..there.clone() } == *wanted
}
