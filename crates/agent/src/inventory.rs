//! What the server hears of this host: every VM with its disks, whole, whenever something changed.
//!
//! libvirt's definitions, the agent's store and what is wanted in; inventory messages out. What a VM lacks of protection
//! is said in words. The server gives keys only for VMs it has heard of, so a VM that is about to start is told at once,
//! without asking libvirt.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vmseal_api::agent::v1::{self, from_agent::Body};
use vmseal_model::{
    class::DiskClass,
    id::{DiskId, DomainUuid, VmId},
    metadata::DiskMetadata,
    record::KeyRecord,
    state::{InnerFormat, VmState},
};

use crate::{
    config::AgentConfig,
    domain_xml::{DiskDevice, DiskSource, DiskView, DomainXml},
    ours::{self, Ours},
    ports::{Definition, DomainInfo, Hypervisor, HypervisorError},
    store::{Store, StoredDisk, StoredVm},
    ublk,
    uplink::{Uplink, word},
    wanted::Wanted,
};

/// What is known of the host, and what was last sent of it.
pub struct Inventory {
    config: Arc<AgentConfig>,
    hypervisor: Arc<dyn Hypervisor>,
    store: Arc<Store>,
    wanted: Arc<Wanted>,
    uplink: Arc<Uplink>,
    warnings: Arc<dyn Fn() -> Vec<v1::Warning> + Send + Sync>,
    known: Mutex<Known>,
}

struct Known {
    vms: BTreeMap<DomainUuid, v1::Vm>,
    /// libvirt was asked for all of them at least once; before that a list would lack VMs.
    complete: bool,
    warnings: Vec<v1::Warning>,
    capabilities: v1::HostCapabilities,
    sent: Option<v1::Inventory>,
}

impl Inventory {
    /// Knows at first only the VMs in the store.
    pub fn new(
        config: Arc<AgentConfig>,
        hypervisor: Arc<dyn Hypervisor>,
        store: Arc<Store>,
        wanted: Arc<Wanted>,
        uplink: Arc<Uplink>,
        warnings: Arc<dyn Fn() -> Vec<v1::Warning> + Send + Sync>,
    ) -> Self {
        let vms = store.vms().iter().map(|vm| (vm.domain, remembered(vm))).collect();
        let known = Known {
            vms,
            complete: false,
            warnings: Vec::new(),
            capabilities: capabilities(&config),
            sent: None,
        };
        let known = Mutex::new(known);
        Self { config, hypervisor, store, wanted, uplink, warnings, known }
    }

    /// Looks at every domain.
    ///
    /// # Errors
    ///
    /// libvirt's; what was known stays.
    pub fn refresh_all(&self) -> Result<(), HypervisorError> {
        let mut vms = BTreeMap::new();
        for info in self.hypervisor.domains()? {
            // One that went away since is not in it.
            if let Ok(vm) = self.look_at(&info) {
                vms.insert(info.uuid, vm);
            }
        }
        let mut known = self.lock();
        (known.vms, known.complete) = (vms, true);
        Ok(())
    }

    /// Looks at one domain. While libvirt does not answer, what was known stays.
    pub fn refresh(&self, domain: DomainUuid) {
        let looked = self.hypervisor.domain(domain).and_then(|info| self.look_at(&info));
        let mut known = self.lock();
        match looked {
            Ok(vm) => {
                known.vms.insert(domain, vm);
            }
            Err(HypervisorError::NoDomain { .. }) => {
                known.vms.remove(&domain);
            }
            Err(error) => tracing::debug!(%domain, "not looked at: {error}"),
        }
    }

    /// A session is new: its server has heard nothing yet.
    pub fn session_began(&self) {
        self.lock().sent = None;
    }

    /// Sends what is known, if it is whole, or as whole as what was announced already, and differs from what was sent last.
    pub fn send(&self) {
        let (warnings, capabilities) = ((self.warnings)(), capabilities(&self.config));
        let mut known = self.lock();
        (known.warnings, known.capabilities) = (warnings, capabilities);
        if known.complete || known.sent.is_some() {
            self.send_known(&mut known);
        }
    }

    /// Tells of a VM that is about to start, unless the server has heard of it as it is.
    pub fn announce(&self, domain: DomainUuid, xml: &DomainXml) {
        let vm_id = self.vm_id(domain, xml);
        let vm = self.describe(domain, xml.name().unwrap_or_default(), VmState::Unknown, false, xml);
        let mut known = self.lock();
        let listed = |vm: &v1::Vm| vm.domain_uuid == domain.to_string() && vm.vm_id == vm_id;
        if known.sent.as_ref().is_some_and(|sent| sent.vms.iter().any(listed)) {
            return;
        }
        known.vms.insert(domain, vm);
        self.send_known(&mut known);
    }

    fn send_known(&self, known: &mut Known) {
        let mut vms: Vec<v1::Vm> = known.vms.values().cloned().collect();
        for vm in &mut vms {
            self.add_locked(vm);
        }
        let inventory = v1::Inventory {
            vms,
            warnings: known.warnings.clone(),
            capabilities: Some(known.capabilities.clone()),
        };
        if known.sent.as_ref() != Some(&inventory)
            && self.uplink.send(Body::Inventory(inventory.clone())).is_ok()
        {
            known.sent = Some(inventory);
        }
    }

    fn look_at(&self, info: &DomainInfo) -> Result<v1::Vm, HypervisorError> {
        let xml = self.hypervisor.xml(info.uuid, Definition::Live)?;
        Ok(match DomainXml::parse(&xml) {
            Ok(xml) => self.describe(info.uuid, &info.name, info.state, !info.persistent, &xml),
            Err(error) => {
                tracing::warn!(domain = %info.uuid, "the definition of '{}' is not understood: {error}", info.name);
                v1::Vm {
                    domain_uuid: info.uuid.to_string(),
                    name: info.name.clone(),
                    state: word(&info.state),
                    // Without it the server would take the VM for a clear one.
                    vm_id: self.store.vm_of_domain(info.uuid).map_or(String::new(), |vm| vm.to_string()),
                    ..v1::Vm::default()
                }
            }
        })
    }

    fn describe(
        &self,
        domain: DomainUuid,
        name: &str,
        state: VmState,
        transient: bool,
        xml: &DomainXml,
    ) -> v1::Vm {
        let metadata = xml.metadata().ok().flatten();
        let in_metadata = |disk: DiskId| metadata.as_ref()?.disks.iter().find(|d| d.disk == disk);
        let all = xml.disks();
        let disks = all.iter().filter(|disk| disk.device == DiskDevice::Disk);
        let disks: Vec<v1::Disk> = disks
            .map(|disk| match Ours::of(&self.config, disk) {
                Some(on) => match on.disk(metadata.as_ref(), &self.store, domain) {
                    Some(id) => self.encrypted(&on, id, in_metadata(id)),
                    None => unknown(&on),
                },
                None => clear(disk),
            })
            .collect();
        let encrypted = disks.iter().any(|disk| disk.encrypted);
        v1::Vm {
            domain_uuid: domain.to_string(),
            name: name.to_owned(),
            state: word(&state),
            vm_id: if encrypted { self.vm_id(domain, xml) } else { String::new() },
            unprotected: if encrypted { unprotected(xml, &disks) } else { Vec::new() },
            disks,
            locked: None,
            transient,
        }
    }

    fn vm_id(&self, domain: DomainUuid, xml: &DomainXml) -> String {
        vm_of(&self.store, &self.config, domain, xml).map_or(String::new(), |vm| vm.to_string())
    }

    fn encrypted(&self, on: &Ours<'_>, id: DiskId, in_metadata: Option<&DiskMetadata>) -> v1::Disk {
        let described = match (self.store.disk(id), in_metadata) {
            (Some((_, stored)), _) => stored_disk(on.target, &stored),
            // Nobody has verified it, so the server is not to learn epochs or keys from it.
            (None, Some(m)) => {
                let place = (m.source.as_str(), m.header.as_deref(), m.format, m.class);
                let described = described(on.target, id, place, &m.record, true);
                v1::Disk { record: Vec::new(), ..described }
            }
            (None, None) => v1::Disk { disk_id: id.to_string(), ..unknown(on) },
        };
        // The definition decides it, whatever its copies say. How it came about is only known of what they say.
        let chosen = in_metadata.filter(|m| m.class == on.class).and_then(|m| m.chosen.clone());
        let (asked, why) = chosen.map_or_else(Default::default, |c| (c.asked.as_str().to_owned(), c.why));
        v1::Disk { class: on.class.as_str().to_owned(), asked, why, ..described }
    }

    fn add_locked(&self, vm: &mut v1::Vm) {
        let Ok(domain) = vm.domain_uuid.parse() else { return };
        vm.locked = self.wanted.locked(domain).map(|(missing, wanted)| v1::Locked {
            provider: missing.provider.to_string(),
            kek: missing.kek.to_string(),
            since_ms: missing.since_ms,
            reason: missing.reason,
            wanted,
        });
        if vm.locked.as_ref().is_some_and(|locked| locked.wanted) {
            vm.state = word(&VmState::Locked);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The VM a domain says it is: what this host has bound, else what its metadata says, else whose its disks are.
pub(crate) fn vm_of(
    store: &Store,
    config: &AgentConfig,
    domain: DomainUuid,
    xml: &DomainXml,
) -> Option<VmId> {
    let metadata = xml.metadata().ok().flatten();
    let owner = |disk: &DiskView| {
        let disk = ours::behind(config, store, domain, metadata.as_ref(), disk)?;
        Some(store.disk(disk)?.0)
    };
    let in_metadata = || metadata.as_ref().map(|metadata| metadata.vm);
    let of_disks = || xml.disks().iter().find_map(owner);
    store.vm_of_domain(domain).or_else(in_metadata).or_else(of_disks)
}

fn capabilities(config: &AgentConfig) -> v1::HostCapabilities {
    let here = ublk::capabilities(config, Path::new("/"));
    v1::HostCapabilities { ublk: here.ublk, no_ublk: here.no_ublk, vhost_user: here.vhost_user }
}

/// A VM as the store has it, before libvirt was asked.
fn remembered(vm: &StoredVm) -> v1::Vm {
    let disks = vm.disks.iter().filter(|disk| !disk.retired);
    v1::Vm {
        domain_uuid: vm.domain.to_string(),
        name: vm.domain.to_string(),
        state: word(&VmState::Unknown),
        vm_id: vm.vm.to_string(),
        disks: disks.map(|disk| stored_disk(&disk.target, disk)).collect(),
        ..v1::Vm::default()
    }
}

fn stored_disk(target: &str, disk: &StoredDisk) -> v1::Disk {
    let place = (disk.source.as_str(), disk.header.as_deref(), disk.format, disk.class);
    described(target, disk.disk, place, &disk.record, disk.epoch_unverified)
}

fn described(
    target: &str,
    disk: DiskId,
    (source, header, format, class): (&str, Option<&str>, InnerFormat, DiskClass),
    record: &[u8],
    epoch_unverified: bool,
) -> v1::Disk {
    let state = KeyRecord::decode(record).map(|record| record.state).ok();
    v1::Disk {
        target: target.to_owned(),
        source: source.to_owned(),
        format: format.as_str().to_owned(),
        encrypted: true,
        disk_id: disk.to_string(),
        epoch: state.as_ref().map_or(0, |s| s.epoch),
        epoch_unverified,
        stored_bytes: state.as_ref().map_or(0, |s| s.stored_bytes),
        presented_bytes: state.as_ref().map_or(0, |s| s.presented_bytes),
        class: class.as_str().to_owned(),
        record: record.to_vec(),
        header: header.unwrap_or_default().to_owned(),
        ..v1::Disk::default()
    }
}

/// A disk of ours of which nobody says which it is: its VM does not start, and it is certainly not clear.
fn unknown(on: &Ours<'_>) -> v1::Disk {
    v1::Disk {
        target: on.target.to_owned(),
        encrypted: true,
        class: on.class.as_str().to_owned(),
        ..v1::Disk::default()
    }
}

fn clear(disk: &DiskView) -> v1::Disk {
    // Not looked at: a file system that does not answer would hold up everybody.
    let source = match &disk.source {
        DiskSource::File(path) | DiskSource::Block(path) => path.clone(),
        DiskSource::Rbd(location) => location.to_string(),
        DiskSource::NbdUnix { socket, .. } | DiskSource::VhostUser { socket } => socket.clone(),
        DiskSource::None => String::new(),
        DiskSource::Other(kind) => kind.clone(),
    };
    v1::Disk {
        target: disk.target.clone(),
        source,
        format: disk.format.clone().unwrap_or_else(|| "raw".to_owned()),
        ..v1::Disk::default()
    }
}

/// What of an encrypted VM still lies in clear, one line each.
fn unprotected(xml: &DomainXml, disks: &[v1::Disk]) -> Vec<String> {
    let clear = disks.iter().filter(|disk| !disk.encrypted);
    let mut lines: Vec<String> =
        clear.map(|disk| format!("disk {} ({}), which is clear", disk.target, disk.source)).collect();
    lines.push("saved images and memory snapshots (virsh save, managedsave, snapshot)".into());
    lines.push("memory dumps (virsh dump)".into());
    if xml.has_nvram() {
        lines.push("NVRAM (firmware variables)".into());
    }
    if xml.has_tpm() {
        lines.push("state of the vTPM".into());
    }
    lines.push("QEMU's log".into());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{scratch::Scratch, uplink::QUEUE};
    use vmseal_api::agent::v1::FromAgent;

    const DOMAIN: DomainUuid = DomainUuid::from_bytes([1; 16]);
    const VM: VmId = VmId::from_bytes([3; 16]);
    const DISK: DiskId = DiskId::from_bytes([4; 16]);

    /// One domain, or none.
    struct One(Mutex<Option<String>>);

    impl One {
        fn info(&self) -> Option<DomainInfo> {
            self.0.lock().unwrap().as_ref().map(|_| DomainInfo {
                uuid: DOMAIN,
                name: "web01".into(),
                state: VmState::Off,
                persistent: true,
                autostart: false,
            })
        }
    }

    impl Hypervisor for One {
        fn domains(&self) -> Result<Vec<DomainInfo>, HypervisorError> {
            Ok(self.info().into_iter().collect())
        }
        fn domain(&self, uuid: DomainUuid) -> Result<DomainInfo, HypervisorError> {
            self.info().ok_or(HypervisorError::NoDomain { domain: uuid.to_string() })
        }
        fn xml(&self, uuid: DomainUuid, _: Definition) -> Result<String, HypervisorError> {
            let xml = self.0.lock().unwrap().clone();
            xml.ok_or(HypervisorError::NoDomain { domain: uuid.to_string() })
        }
        fn define(&self, _: &str) -> Result<DomainUuid, HypervisorError> {
            Ok(DOMAIN)
        }
        fn snapshots(&self, _: DomainUuid) -> Result<u32, HypervisorError> {
            Ok(0)
        }
        fn has_managed_save(&self, _: DomainUuid) -> Result<bool, HypervisorError> {
            Ok(false)
        }
        fn start(&self, _: DomainUuid) -> Result<(), HypervisorError> {
            Ok(())
        }
        fn set_metadata(&self, _: DomainUuid, _: Option<&str>) -> Result<(), HypervisorError> {
            Ok(())
        }
        fn resume_after_io_error(&self, _: DomainUuid) -> Result<bool, HypervisorError> {
            Ok(false)
        }
    }

    struct Lab {
        _scratch: Scratch,
        hypervisor: Arc<One>,
        wanted: Arc<Wanted>,
        inventory: Inventory,
        sent: tokio::sync::mpsc::Receiver<FromAgent>,
    }

    impl Lab {
        fn new(bound: bool) -> Self {
            let scratch = Scratch::new();
            let store = Arc::new(Store::open(scratch.path()).unwrap());
            if bound {
                store.bind(VM, DOMAIN).unwrap();
            }
            let hypervisor = Arc::new(One(Mutex::default()));
            let wanted = Arc::new(Wanted::open(scratch.path()));
            let uplink = Arc::new(Uplink::new("no server"));
            let (out, sent) = tokio::sync::mpsc::channel(QUEUE);
            uplink.opened(out);
            let inventory = Inventory::new(
                Arc::new(AgentConfig::default()),
                Arc::clone(&hypervisor) as Arc<dyn Hypervisor>,
                store,
                Arc::clone(&wanted),
                uplink,
                Arc::new(Vec::new),
            );
            Self { _scratch: scratch, hypervisor, wanted, inventory, sent }
        }

        fn define(&self) -> DomainXml {
            let socket = self.inventory.config.disk_socket(DOMAIN, "vda");
            let xml = format!(
                "<domain><name>web01</name><uuid>{DOMAIN}</uuid><devices>\
                 <disk type='network' device='disk'><source protocol='nbd' name='{DISK}'>\
                 <host transport='unix' socket='{}'/></source><target dev='vda'/></disk>\
                 <disk type='file' device='disk'><source file='/data.img'/><target dev='vdb'/></disk>\
                 <disk type='file' device='cdrom'><target dev='sda'/></disk><tpm/></devices></domain>",
                socket.display()
            );
            *self.hypervisor.0.lock().unwrap() = Some(xml.clone());
            DomainXml::parse(&xml).unwrap()
        }

        fn sent(&mut self) -> Option<v1::Inventory> {
            match self.sent.try_recv().ok()?.body? {
                Body::Inventory(inventory) => Some(inventory),
                _ => None,
            }
        }
    }

    #[test]
    fn nothing_is_sent_before_libvirt_said_what_there_is() {
        let mut lab = Lab::new(true);
        lab.inventory.send();
        assert_eq!(lab.sent(), None);
        lab.define();
        lab.inventory.refresh_all().unwrap();
        lab.inventory.send();
        let all = lab.sent().unwrap();
        assert_eq!((all.vms[0].name.as_str(), all.vms[0].vm_id.as_str()), ("web01", &*VM.to_string()));
        lab.inventory.send();
        assert_eq!(lab.sent(), None, "the same is not sent twice");
        lab.inventory.session_began();
        lab.inventory.send();
        assert!(lab.sent().is_some());
    }

    #[test]
    fn vm_that_starts_before_that_is_told_with_all_that_the_store_knows() {
        let mut lab = Lab::new(true);
        let xml = lab.define();
        lab.inventory.announce(DOMAIN, &xml);
        assert_eq!(lab.sent().unwrap().vms.len(), 1);
        lab.inventory.announce(DOMAIN, &xml);
        assert_eq!(lab.sent(), None, "the server has heard of it");
    }

    #[test]
    fn clear_disks_and_other_clear_parts_of_an_encrypted_vm_are_listed() {
        let mut lab = Lab::new(true);
        lab.define();
        lab.inventory.refresh_all().unwrap();
        lab.inventory.send();
        let vm = lab.sent().unwrap().vms.remove(0);
        let seen: Vec<_> = vm.disks.iter().map(|d| (d.target.as_str(), d.encrypted)).collect();
        assert_eq!(seen, [("vda", true), ("vdb", false)]);
        let text = vm.unprotected.join("\n");
        for part in ["disk vdb", "saved images", "dumps", "vTPM", "log"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("NVRAM"), "{text}");
    }

    #[test]
    fn disk_of_ours_that_nobody_knows_is_not_called_clear() {
        let mut lab = Lab::new(false);
        let socket = lab.inventory.config.disk_socket(DOMAIN, "vda");
        *lab.hypervisor.0.lock().unwrap() = Some(format!(
            "<domain><name>web01</name><uuid>{DOMAIN}</uuid><devices><disk type='vhostuser' device='disk'>\
             <source type='unix' path='{}'/><target dev='vda' bus='virtio'/></disk></devices></domain>",
            socket.display()
        ));
        lab.inventory.refresh_all().unwrap();
        lab.inventory.send();
        let vm = lab.sent().unwrap().vms.remove(0);
        let disk = &vm.disks[0];
        assert_eq!((disk.encrypted, disk.disk_id.as_str(), disk.class.as_str()), (true, "", "fast"));
        assert!(!vm.unprotected.join("").contains("clear"), "{:?}", vm.unprotected);
    }

    #[test]
    fn vm_without_its_key_is_locked_and_one_that_is_gone_is_gone() {
        let mut lab = Lab::new(true);
        lab.define();
        lab.inventory.refresh_all().unwrap();
        let missing = crate::ports::KeyMissing {
            provider: "main".parse().unwrap(),
            kek: vmseal_model::id::KekId::from_bytes(vec![1]).unwrap(),
            reason: "gone".into(),
            code: vmseal_model::refusal::Code::KeyMissing,
            since_ms: 7,
        };
        lab.wanted.refused(DOMAIN, "web01", &missing);
        lab.inventory.send();
        let vm = lab.sent().unwrap().vms.remove(0);
        assert_eq!(vm.state, "locked");
        let locked = vm.locked.unwrap();
        assert_eq!((locked.provider.as_str(), locked.since_ms, locked.wanted), ("main", 7, true));
        *lab.hypervisor.0.lock().unwrap() = None;
        lab.inventory.refresh(DOMAIN);
        lab.inventory.send();
        assert!(lab.sent().unwrap().vms.is_empty());
    }
}
