//! Which disks of a domain are ours to serve, and whether it is the VM it says it is: a definition and the agent's
//! store in, a [`Plan`] out.
//!
//! The definition may be any: one that was copied, edited, or brought back from an old saved image. What it says of ids
//! must agree with what this host has bound; a source path it gives is used only where the store has none.

use std::path::{Path, PathBuf};

use vmseal_model::{
    class::DiskClass,
    id::{DiskId, DomainUuid, VmId},
    metadata::DiskMetadata,
    refusal::Code,
    state::InnerFormat,
};

use crate::{
    config::AgentConfig,
    domain_xml::DomainXml,
    metadata::is_target,
    ours::Ours,
    rbd::Location,
    store::{Store, StoredDisk},
    tasks::Refusal,
};

/// What is served for one domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// libvirt's UUID.
    pub domain: DomainUuid,
    /// libvirt's name, for messages and the pid file.
    pub name: String,
    /// The VM.
    pub vm: VmId,
    /// Whether this host had bound the two before.
    pub bound: bool,
    /// CPUs its guest may have.
    pub cpus: u32,
    /// Its encrypted disks, at least one.
    pub disks: Vec<PlannedDisk>,
}

/// One disk of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedDisk {
    /// Name in the guest, and of its socket.
    pub target: String,
    /// The disk.
    pub disk: DiskId,
    /// Path of the volume.
    pub source: PathBuf,
    /// Path of its header, if that is detached.
    pub header: Option<PathBuf>,
    /// What lies inside.
    pub format: InnerFormat,
    /// How it is presented: as the definition says, whatever its copies in metadata and store do.
    pub class: DiskClass,
    /// What the guest reads as its serial number, if the class makes us answer that.
    pub serial: String,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// The record in the domain's metadata.
    pub in_metadata: Option<Vec<u8>>,
    /// What the store has of it.
    pub stored: Option<StoredDisk>,
}

/// Makes the plan of a domain; none if no disk of it is ours.
///
/// # Errors
///
/// A [`Refusal`] that names what does not fit and what to do.
pub fn plan(xml: &DomainXml, config: &AgentConfig, store: &Store) -> Result<Option<Plan>, Refusal> {
    let name = xml.name().unwrap_or_default().to_owned();
    let views = xml.disks();
    let ours: Vec<_> = views.iter().filter_map(|view| Some((view, Ours::of(config, view)?))).collect();
    let Some(domain) = xml.uuid().filter(|_| !ours.is_empty()) else { return Ok(None) };
    let wrong = |what: String| Refusal::new(Code::Integrity, format!("VM '{name}': {what}"));
    // Damaged metadata does not lock a VM out: the store and the headers may have everything.
    let metadata = xml.metadata().unwrap_or_else(|error| {
        tracing::warn!("the metadata of VM '{name}' is passed over: {error}");
        None
    });
    if let Some(other) = metadata.as_ref().map(|m| m.domain).filter(|other| *other != domain) {
        return Err(copied(&name, &format!("its metadata was written for domain {other}")));
    }
    let mut vm = metadata.as_ref().map(|m| m.vm);
    let mut disks = Vec::with_capacity(ours.len());
    for (view, on) in &ours {
        let target = on.target;
        if !on.is_of(config, domain) {
            return Err(copied(&name, &format!("disk {target} is on the socket of another VM")));
        }
        if !is_target(target) {
            return Err(wrong(format!("'{}' is no target of an encrypted disk", target.escape_debug())));
        }
        let unknown = |which: String| {
            Refusal::new(
                Code::UnknownVm,
                format!("VM '{name}': nothing is known here of its disk {target}{which}"),
            )
            .hint("put the vmseal element back into its metadata, or start it on the host it comes from")
        };
        let disk: DiskId = match on.export {
            Some(export) => export.parse().map_err(|e| wrong(format!("disk {target}: {e}")))?,
            None => {
                let disk = on.disk(metadata.as_ref(), store, domain);
                disk.ok_or_else(|| unknown(String::new()))?
            }
        };
        if let Some(other) = disks.iter().find(|other: &&PlannedDisk| other.disk == disk) {
            return Err(wrong(format!("{} and {target} are the same disk ({disk})", other.target))
                .hint("take one of the two out of the definition: virsh edit"));
        }
        let stored = store.disk(disk);
        if let Some((owner, _)) = stored.as_ref().filter(|(owner, _)| vm.is_some_and(|vm| vm != *owner)) {
            return Err(wrong(format!("disk {target} belongs to VM {owner}, which this is not"))
                .hint("put back the definition it had, or give the VM its own disk"));
        }
        vm = vm.or(stored.as_ref().map(|(owner, _)| *owner));
        let in_metadata = metadata.as_ref().and_then(|m| m.disks.iter().find(|d| d.disk == disk));
        let stored = stored.map(|(_, stored)| stored);
        let seen = Seen { target: target.to_owned(), disk, class: on.class, read_only: view.read_only };
        let Some(planned) = planned(seen, in_metadata, stored) else {
            return Err(unknown(format!(" ({disk})")));
        };
        disks.push(planned);
    }
    let vm = vm.expect("a planned disk is in the metadata or the store, and either names the VM");
    match (store.vm_of_domain(domain), store.domain_of_vm(vm)) {
        (Some(other), _) if other != vm => {
            Err(wrong(format!("its metadata says VM {vm}, this host knows it as VM {other}"))
                .hint(adopt(&name)))
        }
        (_, Some(other)) if other != domain => {
            Err(copied(&name, &format!("this host knows VM {vm} as domain {other}")))
        }
        (bound, _) => Ok(Some(Plan { domain, name, vm, bound: bound.is_some(), cpus: xml.cpus(), disks })),
    }
}

/// What the definition says of a disk.
struct Seen {
    target: String,
    disk: DiskId,
    class: DiskClass,
    read_only: bool,
}

fn planned(
    seen: Seen,
    in_metadata: Option<&DiskMetadata>,
    stored: Option<StoredDisk>,
) -> Option<PlannedDisk> {
    let from_store = stored.as_ref().map(|s| (&s.source, &s.header, s.format));
    let from_metadata = in_metadata.map(|m| (&m.source, &m.header, m.format));
    // The store's path first; the metadata's where the volume was moved and the domain edited to follow.
    // Whether an image is there only its cluster can say.
    let there = |(source, _, _): &(&String, &Option<String>, _)| {
        Location::is_meant_by(source) || Path::new(source.as_str()).exists()
    };
    let (source, header, format) =
        from_store.filter(there).or(from_metadata.filter(there)).or(from_store).or(from_metadata)?;
    let serial = in_metadata.and_then(|m| m.aside.get("serial")).filter(|_| seen.class == DiskClass::Fast);
    Some(PlannedDisk {
        source: source.into(),
        header: header.as_ref().map(Into::into),
        format,
        class: seen.class,
        serial: serial.cloned().unwrap_or_default(),
        in_metadata: in_metadata.map(|m| m.record.clone()),
        target: seen.target,
        disk: seen.disk,
        read_only: seen.read_only,
        stored,
    })
}

fn copied(name: &str, why: &str) -> Refusal {
    Refusal::new(Code::UnknownVm, format!("VM '{name}' has the definition of another encrypted VM: {why}"))
        .hint(adopt(name))
}

fn adopt(name: &str) -> String {
    format!("if this VM is to have these disks from now on: vmseal vm adopt {name}")
}

#[cfg(test)]
mod tests {
    use vmseal_model::metadata::VmMetadata;

    use super::*;
    use crate::{metadata::qualified_element, scratch::Scratch};

    const DOMAIN: DomainUuid = DomainUuid::from_bytes([1; 16]);
    const OTHER: DomainUuid = DomainUuid::from_bytes([2; 16]);
    const VM: VmId = VmId::from_bytes([3; 16]);
    const DISK: DiskId = DiskId::from_bytes([4; 16]);

    struct Lab {
        scratch: Scratch,
        store: Store,
        config: AgentConfig,
    }

    impl Lab {
        fn new() -> Self {
            let scratch = Scratch::new();
            let store = Store::open(scratch.path()).unwrap();
            Self { scratch, store, config: AgentConfig::default() }
        }

        fn path(&self, name: &str) -> String {
            self.scratch.path().join(name).to_str().unwrap().to_owned()
        }

        fn xml(&self, socket_of: DomainUuid, metadata: Option<&VmMetadata>) -> DomainXml {
            let element = metadata.map_or(String::new(), |m| qualified_element(m).to_xml());
            let socket = self.config.disk_socket(socket_of, "vda");
            DomainXml::parse(&format!(
                "<domain><name>web01</name><uuid>{DOMAIN}</uuid><metadata>{element}</metadata><devices>\
                 <disk type='file' device='cdrom'><source file='/a.iso'/><target dev='sda'/></disk>\
                 <disk type='network' device='disk'><source protocol='nbd' name='{DISK}'>\
                 <host transport='unix' socket='{}'/></source><target dev='vda'/></disk></devices></domain>",
                socket.display()
            ))
            .unwrap()
        }

        fn metadata(&self, domain: DomainUuid, source: &str) -> VmMetadata {
            let disk = DiskMetadata {
                target: "vda".into(),
                disk: DISK,
                source: source.into(),
                header: None,
                format: InnerFormat::Raw,
                class: DiskClass::Compatible,
                chosen: None,
                aside: Default::default(),
                record: vec![1],
            };
            VmMetadata { vm: VM, domain, memory: Default::default(), disks: vec![disk] }
        }

        fn store(&self, vm: VmId, domain: DomainUuid, source: &str) {
            let disk = StoredDisk {
                target: "vda".into(),
                disk: DISK,
                source: source.into(),
                header: None,
                format: InnerFormat::Raw,
                class: DiskClass::Compatible,
                record: vec![2],
                epoch: 1,
                epoch_unverified: false,
                retired: false,
            };
            self.store.put_disk(vm, domain, disk).unwrap();
        }

        fn plan(&self, xml: &DomainXml) -> Result<Option<Plan>, Refusal> {
            plan(xml, &self.config, &self.store)
        }
    }

    #[test]
    fn vm_without_our_sockets_is_none_of_ours() {
        let lab = Lab::new();
        let xml = DomainXml::parse(&format!(
            "<domain><name>a</name><uuid>{DOMAIN}</uuid><devices><disk type='network' device='disk'>\
             <source protocol='nbd' name='x'><host transport='unix' socket='/run/other/x.sock'/></source>\
             <target dev='vda'/></disk></devices></domain>"
        ))
        .unwrap();
        assert_eq!(lab.plan(&xml), Ok(None));
    }

    #[test]
    fn vm_the_host_never_saw_is_planned_from_its_metadata() {
        let lab = Lab::new();
        let plan = lab.plan(&lab.xml(DOMAIN, Some(&lab.metadata(DOMAIN, "/v.vmseal")))).unwrap().unwrap();
        assert_eq!((plan.vm, plan.bound, plan.name.as_str()), (VM, false, "web01"));
        assert_eq!(plan.disks[0].source, Path::new("/v.vmseal"));
        assert_eq!(plan.disks[0].in_metadata, Some(vec![1]));
    }

    #[test]
    fn disk_that_is_named_twice_is_served_to_nobody() {
        let lab = Lab::new();
        let text = lab.xml(DOMAIN, Some(&lab.metadata(DOMAIN, "/v.vmseal"))).to_xml();
        let (from, to) = (text.find("<disk type='network'").unwrap(), text.find("</devices>").unwrap());
        let second = text[from..to].replace("vda", "vdb");
        let twice = DomainXml::parse(&text.replace("</devices>", &format!("{second}</devices>"))).unwrap();
        let refusal = lab.plan(&twice).unwrap_err();
        assert!(refusal.message.contains("vda and vdb are the same disk"), "{}", refusal.message);
        assert!(refusal.hint.contains("virsh edit"));
    }

    #[test]
    fn old_definition_without_metadata_is_planned_from_the_store() {
        let lab = Lab::new();
        lab.store(VM, DOMAIN, "/v.vmseal");
        let plan = lab.plan(&lab.xml(DOMAIN, None)).unwrap().unwrap();
        assert_eq!((plan.vm, plan.bound), (VM, true));
        assert_eq!(plan.disks[0].in_metadata, None);
    }

    #[test]
    fn stores_path_is_used_unless_only_the_metadatas_exists() {
        let lab = Lab::new();
        let (old, new) = (lab.path("old"), lab.path("new"));
        lab.store(VM, DOMAIN, &old);
        let xml = lab.xml(DOMAIN, Some(&lab.metadata(DOMAIN, &new)));
        let source = || lab.plan(&xml).unwrap().unwrap().disks[0].source.clone();
        assert_eq!(source(), Path::new(&old));
        std::fs::write(&new, "").unwrap();
        assert_eq!(source(), Path::new(&new));
        std::fs::write(&old, "").unwrap();
        assert_eq!(source(), Path::new(&old));
    }

    #[test]
    fn copied_definition_is_refused_with_the_way_out() {
        let lab = Lab::new();
        for xml in [
            lab.xml(DOMAIN, Some(&lab.metadata(OTHER, "/v"))),
            lab.xml(OTHER, Some(&lab.metadata(DOMAIN, "/v"))),
        ] {
            let refused = lab.plan(&xml).unwrap_err();
            assert_eq!(refused.code, Code::UnknownVm);
            assert!(refused.hint.contains("vmseal vm adopt web01"), "{refused:?}");
        }
        lab.store(VM, OTHER, "/v");
        let refused = lab.plan(&lab.xml(DOMAIN, Some(&lab.metadata(DOMAIN, "/v")))).unwrap_err();
        assert!(refused.message.contains(&OTHER.to_string()), "{refused:?}");
    }

    #[test]
    fn edited_vm_id_is_refused() {
        let lab = Lab::new();
        lab.store(VmId::from_bytes([9; 16]), DOMAIN, "/v");
        let refused = lab.plan(&lab.xml(DOMAIN, Some(&lab.metadata(DOMAIN, "/v")))).unwrap_err();
        assert_eq!(refused.code, Code::Integrity);
        assert!(refused.message.contains("belongs to VM 09090909"), "{refused:?}");
    }

    #[test]
    fn disk_nobody_knows_is_refused() {
        let lab = Lab::new();
        let refused = lab.plan(&lab.xml(DOMAIN, None)).unwrap_err();
        assert_eq!(refused.code, Code::UnknownVm);
        assert!(refused.message.contains("vda"), "{refused:?}");
    }
}
