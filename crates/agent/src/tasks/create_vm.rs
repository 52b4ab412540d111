//! `vm create`: a new domain whose disks are encrypted before it first starts. What is refused, and the plan.
//!
//! In: a definition as `virt-install --print-xml` writes it. A disk whose image is there is encrypted and its image
//! kept; one whose image is not there, and whose size was told, is made empty.

use std::collections::BTreeMap;

use vmseal_keys::random_bytes;
use vmseal_model::{
    class::Resolved,
    id::{DomainUuid, VmId},
    refusal::Code,
    task::SourceFate,
};

use crate::{
    domain_xml::{DiskDevice, DiskView, DomainXml},
    ports::HypervisorError,
    tasks::{
        command::KeyChoice,
        context::Context,
        create_disk::{Wanted, new_disk},
        encrypt::{check_new_disks, existing},
        image::{Uses, shell},
        place,
        plan::{EncryptPlan, NewDisk, Target},
        refusal::Refusal,
        refuse::{self, check_class, clear_image},
    },
};

/// Gives a definition without UUID one, so that the task can be told apart from others.
pub(crate) fn with_uuid(xml: &str) -> Result<String, Refusal> {
    let mut parsed = DomainXml::parse(xml)?;
    if parsed.uuid().is_some() {
        return Ok(xml.to_owned());
    }
    parsed.set_uuid(DomainUuid::from_random(random_bytes()?));
    Ok(parsed.to_xml())
}

/// Looks at everything, changes nothing.
pub(crate) fn plan(
    ctx: &Context,
    xml: &str,
    key: &KeyChoice,
    class: &Resolved,
    sizes: &BTreeMap<String, u64>,
) -> Result<EncryptPlan, Refusal> {
    let xml = DomainXml::parse(xml)?;
    let bad = |text: &str| Refusal::new(Code::BadRequest, text.to_owned());
    let name = xml.name().filter(|n| !n.is_empty()).ok_or_else(|| bad("the definition has no name"))?;
    let domain = xml.uuid().ok_or_else(|| bad("the definition's UUID is not understood"))?;
    check_new_domain(ctx, &xml, name, domain)?;

    let disks: Vec<_> = xml.disks().into_iter().filter(wants_encryption).collect();
    if disks.is_empty() {
        return Err(bad("the definition has no disk to encrypt").hint("add one: virt-install --disk PATH"));
    }
    if let Some(unknown) = sizes.keys().find(|target| disks.iter().all(|d| d.target != **target)) {
        let there: Vec<_> = disks.iter().map(|d| d.target.as_str()).collect();
        return Err(bad(&format!(
            "a size is given for disk {unknown}; the definition has: {}",
            there.join(", ")
        )));
    }
    let uses = refuse::uses(&ctx.world)?;
    let planned = disks.iter().map(|d| {
        disk(ctx, &uses, (&xml, d), (domain, class), sizes).map_err(|refusal| refusal.about(&d.target))
    });
    let disks: Vec<NewDisk> = planned.collect::<Result<_, _>>()?;
    check_new_disks(&disks)?;
    // What an earlier try of the same definition left bound.
    let vm = match ctx.world.store.vm_of_domain(domain) {
        Some(vm) => vm,
        None => VmId::from_random(random_bytes()?),
    };
    Ok(EncryptPlan { vm, domain, name: name.to_owned(), key: key.clone(), disks, definition: Target::Define })
}

fn wants_encryption(disk: &DiskView) -> bool {
    !matches!(disk.device, DiskDevice::Cdrom | DiskDevice::Floppy)
}

fn check_new_domain(ctx: &Context, xml: &DomainXml, name: &str, domain: DomainUuid) -> Result<(), Refusal> {
    if xml.has_metadata() {
        return Err(Refusal::new(Code::BadRequest, "the definition carries vmseal metadata already")
            .hint("take <vmseal:vm> out of it, or see: vmseal vm adopt"));
    }
    let exists = |what: &str| {
        Refusal::new(Code::Exists, format!("there already is a domain with the {what} of {name}"))
            .hint(format!("virsh dominfo {}", shell(name)))
    };
    match ctx.world.hypervisor.domain(domain) {
        Ok(_) => return Err(exists("UUID")),
        Err(HypervisorError::NoDomain { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let taken = ctx.world.hypervisor.domains()?.iter().any(|other| other.name == name);
    if taken { Err(exists("name")) } else { Ok(()) }
}

fn disk(
    ctx: &Context,
    uses: &Uses,
    (xml, disk): (&DomainXml, &DiskView),
    (domain, class): (DomainUuid, &Resolved),
    sizes: &BTreeMap<String, u64>,
) -> Result<NewDisk, Refusal> {
    let (path, format) = clear_image(disk)?;
    let there = place::look(&ctx.world, &path)?.is_some();
    match (there, sizes.get(&disk.target)) {
        (true, None) => existing(ctx, uses, (xml, disk), domain, class, SourceFate::Keep),
        (true, Some(_)) => {
            Err(Refusal::new(Code::Exists, format!("{path} is there already, and a size is given"))
                .hint("leave the size out to encrypt the image, or name another path"))
        }
        (false, Some(bytes)) => {
            check_class(xml, &disk.target, format, class.class)?;
            let volume = place::encrypted_name(&path);
            let wanted = Wanted { target: &disk.target, path: &volume, format, bytes: *bytes, class };
            new_disk(ctx, &wanted)
        }
        (false, None) => {
            Err(Refusal::new(Code::NotFound, format!("{path} is not there, and no size is given"))
                .hint(format!("vmseal vm create --xml FILE --disk-size {}=10G", disk.target)))
        }
    }
}
