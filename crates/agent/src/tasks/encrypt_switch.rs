//! The definition's side of encrypting: disks of ours in, metadata in, and how to see that both are there.

use std::collections::HashSet;

use serde_json::{Value, json};
use vmseal_model::{
    id::DomainUuid,
    metadata::{DiskMetadata, VmMetadata},
    refusal::Code,
};

use crate::{
    domain_xml::{DiskSource, DomainXml, EncryptedSource},
    store::StoredDisk,
    tasks::{
        command::Work,
        context::Context,
        plan::{EncryptPlan, NewDisk, Origin, Target},
        refusal::{Halt, Refusal},
        switch::{NewFiles, Switch},
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
        let named = |export: &str| {
            there.iter().any(|d| matches!(&d.source, DiskSource::NbdUnix { export: e, .. } if e == export))
        };
        self.disks.iter().any(|disk| named(&disk.disk.to_string()))
    }

    fn clear_files(&self) -> Vec<(&str, &str)> {
        Vec::new()
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
    let is_done = |xml: &DomainXml| is_done(xml, plan, &sockets, &entries);
    let names_new = |xml: &DomainXml| plan.named_in(xml);
    let switch = Switch {
        domain: plan.domain,
        name: &plan.name,
        new: new.as_ref(),
        apply: &apply,
        is_done: &is_done,
        names_new: &names_new,
    };
    switch.run(ctx)?;
    Ok(json!({}))
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
        record: stored.record,
    }
}

fn apply(
    xml: &mut DomainXml,
    plan: &EncryptPlan,
    sockets: &[String],
    entries: &[DiskMetadata],
) -> Result<(), Refusal> {
    for (disk, socket) in plan.disks.iter().zip(sockets) {
        let there = xml.disk(&disk.target).map(|d| d.source);
        let source = EncryptedSource { disk: disk.disk, format: disk.format, socket: socket.clone() };
        if there.as_ref() == Some(&nbd(&source)) {
            continue;
        }
        match (&disk.origin, plan.definition, there) {
            (_, Target::Add, None) => xml.add_encrypted_disk(&disk.target, &source)?,
            (Origin::Image { path, .. }, _, Some(DiskSource::File(now))) if now == *path => {
                xml.encrypt_disk(&disk.target, &source)?;
            }
            // A new VM's disk whose image was never there.
            (_, Target::Define, Some(_)) => xml.encrypt_disk(&disk.target, &source)?,
            _ => {
                let text = format!("disk {} of {} was redefined meanwhile", disk.target, plan.name);
                return Err(Refusal::new(Code::Conflict, text).hint("try again"));
            }
        }
    }
    let others = xml.metadata()?.map(|m| m.disks).unwrap_or_default();
    let ours: HashSet<_> = entries.iter().map(|e| e.target.as_str()).collect();
    let mut disks: Vec<_> = others.into_iter().filter(|d| !ours.contains(d.target.as_str())).collect();
    disks.extend(entries.iter().cloned());
    xml.set_metadata(&VmMetadata { vm: plan.vm, domain: plan.domain, disks });
    Ok(())
}

fn nbd(source: &EncryptedSource) -> DiskSource {
    DiskSource::NbdUnix { socket: source.socket.clone(), export: source.disk.to_string() }
}

fn is_done(xml: &DomainXml, plan: &EncryptPlan, sockets: &[String], entries: &[DiskMetadata]) -> bool {
    let Ok(Some(metadata)) = xml.metadata() else { return false };
    let disks = plan.disks.iter().zip(sockets).all(|(disk, socket)| {
        let source = EncryptedSource { disk: disk.disk, format: disk.format, socket: socket.clone() };
        xml.disk(&disk.target).is_some_and(|there| {
            there.source == nbd(&source) && there.format.as_deref() == Some(disk.format.as_str())
        })
    });
    disks
        && (metadata.vm, metadata.domain) == (plan.vm, plan.domain)
        && entries.iter().all(|entry| metadata.disks.contains(entry))
}
