//! Which disks of a definition are served by us, on sockets or as block devices, and which disk of ours each is.
//!
//! A definition's disk, its metadata and the agent's store in; the place, the class QEMU will expect there, and the id
//! out. The definition decides the class, for it is what QEMU is given; nothing is verified here.

use std::path::Path;

use vmseal_model::{
    class::DiskClass,
    id::{DiskId, DomainUuid},
    metadata::VmMetadata,
};

use crate::{
    config::AgentConfig,
    domain_xml::{DiskSource, DiskView},
    store::Store,
    ublk_disk,
};

/// A disk on a socket below our run directory, whichever domain's that is, or a block device with a name of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ours<'a> {
    /// Socket or device.
    place: &'a Path,
    /// How QEMU is given it.
    pub(crate) class: DiskClass,
    /// Its name in the guest.
    pub(crate) target: &'a str,
    /// The name of the disk behind it, where the definition has a place for one.
    pub(crate) export: Option<&'a str>,
}

impl<'a> Ours<'a> {
    /// A disk, if it is at a place of ours.
    pub(crate) fn of(config: &AgentConfig, disk: &'a DiskView) -> Option<Self> {
        let (place, class, export) = match &disk.source {
            DiskSource::NbdUnix { socket, export } => (socket, DiskClass::Compatible, Some(export.as_str())),
            DiskSource::VhostUser { socket } => (socket, DiskClass::Fast, None),
            DiskSource::Block(device) => (device, DiskClass::Ublk, Some(ublk_disk::name(device)?)),
            DiskSource::File(_) | DiskSource::Rbd(_) | DiskSource::None | DiskSource::Other(_) => {
                return None;
            }
        };
        let place = Path::new(place);
        let ours = Self { place, class, target: &disk.target, export };
        (class == DiskClass::Ublk || place.starts_with(&config.run_dir)).then_some(ours)
    }

    /// Whether it is where that domain's disk of that target is served, and not where another's is. The name of a device
    /// says which disk it is and nothing of a domain.
    pub(crate) fn is_of(&self, config: &AgentConfig, domain: DomainUuid) -> bool {
        self.class == DiskClass::Ublk || self.place == config.disk_socket(domain, self.target)
    }

    /// The disk behind it, if anybody says which. NBD and devices have its id for a name. vhost-user has no name: the metadata that
    /// stands in the same definition says it, else the store, if it has one disk of that target for the VM.
    pub(crate) fn disk(
        &self,
        metadata: Option<&VmMetadata>,
        store: &Store,
        domain: DomainUuid,
    ) -> Option<DiskId> {
        if let Some(export) = self.export {
            return export.parse().ok();
        }
        let in_metadata = metadata.and_then(|m| m.disks.iter().find(|disk| disk.target == self.target));
        in_metadata.map(|disk| disk.disk).or_else(|| {
            let vm = metadata.map(|m| m.vm).or_else(|| store.vm_of_domain(domain))?;
            let disks = store.vm(vm)?.disks;
            let mut there = disks.iter().filter(|disk| !disk.retired && disk.target == self.target);
            let only = there.next()?;
            there.next().is_none().then_some(only.disk)
        })
    }
}

/// The disk behind a disk of a definition, if it is one of ours and anybody says which.
pub(crate) fn behind(
    config: &AgentConfig,
    store: &Store,
    domain: DomainUuid,
    metadata: Option<&VmMetadata>,
    disk: &DiskView,
) -> Option<DiskId> {
    Ours::of(config, disk)?.disk(metadata, store, domain)
}

#[cfg(test)]
mod tests {
    use vmseal_model::{id::VmId, state::InnerFormat};

    use super::*;
    use crate::{domain_xml::DomainXml, scratch::Scratch, store::StoredDisk};

    const DOMAIN: DomainUuid = DomainUuid::from_bytes([1; 16]);
    const VM: VmId = VmId::from_bytes([3; 16]);

    fn stored(id: u8, target: &str, retired: bool) -> StoredDisk {
        StoredDisk {
            target: target.into(),
            disk: DiskId::from_bytes([id; 16]),
            source: format!("/v{id}"),
            header: None,
            format: InnerFormat::Raw,
            class: DiskClass::Fast,
            record: vec![1],
            epoch: 1,
            epoch_unverified: false,
            retired,
        }
    }

    fn xml(socket: &str) -> DomainXml {
        DomainXml::parse(&format!(
            "<domain><name>a</name><uuid>{DOMAIN}</uuid><devices><disk type='vhostuser' device='disk'>\
             <source type='unix' path='{socket}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
        ))
        .unwrap()
    }

    #[test]
    fn fast_disk_without_metadata_is_the_one_the_store_has_of_that_target() {
        let scratch = Scratch::new();
        let (store, config) = (Store::open(scratch.path()).unwrap(), AgentConfig::default());
        let disk = xml("/run/vmseal/x/vda.sock").disks().remove(0);
        let on = Ours::of(&config, &disk).unwrap();
        assert_eq!((on.class, on.disk(None, &store, DOMAIN)), (DiskClass::Fast, None));
        store.put_disk(VM, DOMAIN, stored(4, "vda", true)).unwrap();
        store.put_disk(VM, DOMAIN, stored(5, "vdb", false)).unwrap();
        assert_eq!(on.disk(None, &store, DOMAIN), None, "one is retired, the other is another");
        store.put_disk(VM, DOMAIN, stored(6, "vda", false)).unwrap();
        assert_eq!(on.disk(None, &store, DOMAIN), Some(DiskId::from_bytes([6; 16])));
        store.put_disk(VM, DOMAIN, stored(7, "vda", false)).unwrap();
        assert_eq!(on.disk(None, &store, DOMAIN), None, "nobody says which of two");
    }

    #[test]
    fn vhost_user_disk_of_somebody_else_is_none_of_ours() {
        let config = AgentConfig::default();
        for socket in ["/run/vmseal-other/vda.sock", "/run/spdk/vda.sock"] {
            assert_eq!(Ours::of(&config, &xml(socket).disks()[0]), None);
        }
    }

    #[test]
    fn block_device_says_by_its_name_whose_it_is() {
        let scratch = Scratch::new();
        let (store, config) = (Store::open(scratch.path()).unwrap(), AgentConfig::default());
        let disk = DiskId::from_bytes([5; 16]);
        let seen = |dev: &str| {
            let xml = format!(
                "<domain><devices><disk type='block' device='disk'><source dev='{dev}'/><target dev='vda'/></disk>\
                 </devices></domain>"
            );
            DomainXml::parse(&xml).unwrap().disks().remove(0)
        };
        let ours = seen(&AgentConfig::ublk_device(disk));
        let ours = Ours::of(&config, &ours).unwrap();
        assert_eq!((ours.class, ours.disk(None, &store, DOMAIN)), (DiskClass::Ublk, Some(disk)));
        assert!(ours.is_of(&config, DOMAIN));
        let nameless = seen("/dev/vmseal/data");
        assert_eq!(Ours::of(&config, &nameless).unwrap().disk(None, &store, DOMAIN), None);
        for other in ["/dev/sda", "/dev/ublkb0", "/dev/vmseal-other/x", "/dev/vmseal"] {
            assert_eq!(Ours::of(&config, &seen(other)), None, "{other}");
        }
    }
}
