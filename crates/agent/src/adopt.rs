//! `vm adopt`: a domain whose definition was copied from an encrypted VM, or got a new UUID, becomes that VM.
//!
//! The domain's own definition in, one whose sockets and metadata name the domain itself out, and the binding of VM and
//! domain in the store. Volumes and records stay as they are: they belong to the VM and know no domain.

use vmseal_model::{
    class::DiskClass,
    id::{DiskId, DomainUuid, VmId},
    metadata::{DiskMetadata, VmMetadata},
    refusal::Code,
    state::VmState,
};

use crate::{
    config::AgentConfig,
    domain_xml::{DomainXml, EncryptedSource},
    inventory::vm_of,
    ours::Ours,
    ports::{Definition, Hypervisor, HypervisorError},
    store::Store,
    tasks::Refusal,
};

/// Makes the domain the VM its disks belong to; what was done, in words.
///
/// # Errors
///
/// [`Refusal`]: nothing was changed, or doing it again finishes it.
pub fn adopt(
    hypervisor: &dyn Hypervisor,
    config: &AgentConfig,
    store: &Store,
    domain: DomainUuid,
) -> Result<String, Refusal> {
    let info = hypervisor.domain(domain)?;
    if info.state != VmState::Off || !info.persistent {
        let text =
            format!("VM '{}' is {}; only a VM that is off can be adopted", info.name, info.state.as_str());
        return Err(Refusal::new(Code::VmRunning, text).hint(format!("virsh shutdown {}", info.name)));
    }
    let mut xml = DomainXml::parse(&hypervisor.xml(domain, Definition::Persistent)?)?;
    let metadata = xml.metadata()?;
    let disks = xml.disks();
    let unknown = |what: String| {
        Refusal::new(Code::UnknownVm, format!("nothing is known here of {what} of '{}'", info.name))
            .hint("put the vmseal element of the original into its metadata")
    };
    let ours = disks.iter().filter_map(|disk| Ours::of(config, disk)).map(|on| {
        let disk = on.disk(metadata.as_ref(), store, domain);
        let disk = disk.ok_or_else(|| unknown(format!("disk {}", on.target)))?;
        Ok((on.target.to_owned(), disk, on.class))
    });
    let ours: Vec<(String, DiskId, DiskClass)> = ours.collect::<Result<_, Refusal>>()?;
    let owner = |disk: &DiskId| store.disk(*disk).map(|(vm, _)| vm);
    // As the inventory told the server, which has bound these two already.
    let Some(vm) = vm_of(store, config, domain, &xml).filter(|_| !ours.is_empty()) else {
        let text = format!("VM '{}' has no encrypted disk that is known here", info.name);
        return Err(Refusal::new(Code::NothingToDo, text));
    };
    if let Some((target, ..)) = ours.iter().find(|(_, disk, _)| owner(disk).is_some_and(|owner| owner != vm))
    {
        let text = format!("disk {target} of '{}' belongs to another VM than its metadata says", info.name);
        return Err(Refusal::new(Code::Integrity, text));
    }
    refuse_twice(hypervisor, store, metadata.as_ref(), vm, domain)?;

    let mut disks = Vec::with_capacity(ours.len());
    for (target, disk, class) in ours {
        let known = disk_of(store, metadata.as_ref(), &target, disk);
        let mut known = known.ok_or_else(|| unknown(format!("disk {target} ({disk})")))?;
        let socket = config.disk_socket(domain, &target).to_string_lossy().into_owned();
        let source = EncryptedSource { disk, format: known.format, socket, class };
        if known.class != class {
            (known.class, known.chosen) = (class, None);
        }
        known.aside = xml.encrypt_disk(&target, &source)?;
        disks.push(known);
    }
    xml.set_disks(vm, domain, disks)?;
    store.bind(vm, domain)?;
    hypervisor.define(&xml.to_xml())?;
    Ok(format!("VM '{}' is VM {vm} from now on", info.name))
}

/// Refuses while another domain of this host is that VM: two would share its volumes.
fn refuse_twice(
    hypervisor: &dyn Hypervisor,
    store: &Store,
    metadata: Option<&VmMetadata>,
    vm: VmId,
    domain: DomainUuid,
) -> Result<(), Refusal> {
    let others = [store.domain_of_vm(vm), metadata.map(|m| m.domain)];
    for other in others.into_iter().flatten().filter(|other| *other != domain) {
        match hypervisor.domain(other) {
            Err(HypervisorError::NoDomain { .. }) => {}
            Err(error) => return Err(error.into()),
            Ok(info) => {
                let text = format!("VM '{}' on this host has these very disks", info.name);
                let hint = format!(
                    "give the copy disks of its own, or let it take over: virsh undefine {} --keep-nvram",
                    info.name
                );
                return Err(Refusal::new(Code::Conflict, text).hint(hint));
            }
        }
    }
    Ok(())
}

fn disk_of(store: &Store, metadata: Option<&VmMetadata>, target: &str, disk: DiskId) -> Option<DiskMetadata> {
    let mut known = match store.disk(disk) {
        Some((_, stored)) => {
            let in_metadata = metadata.and_then(|m| m.disks.iter().find(|d| d.disk == disk));
            let chosen = in_metadata.and_then(|m| m.chosen.clone());
            DiskMetadata { chosen, ..crate::reconcile::disk_metadata(&stored) }
        }
        None => metadata?.disks.iter().find(|d| d.disk == disk)?.clone(),
    };
    target.clone_into(&mut known.target);
    Some(known)
}
