//! After libvirt's events: what runs is served, what does not run is not, and copies of key records say what is true.
//!
//! Events in; disk processes taken on or ended, metadata and LUKS2 tokens written anew, the inventory sent out. This is
//! what makes it no matter that hooks were missed while the agent was away. Never called from a hook.

use std::{
    collections::HashSet,
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use vmseal_model::{
    id::{DomainUuid, VmId},
    metadata::{Aside, DiskMetadata, SharedMemory, VmMetadata},
    record::KeyRecord,
};

use crate::{
    backend::Backends,
    causes::causes,
    config::AgentConfig,
    domain_xml::DomainXml,
    inventory::Inventory,
    keyring::Keyring,
    libvirt::HypervisorEvent,
    metadata::metadata_element,
    ports::{Definition, DomainInfo, Hypervisor, HypervisorError},
    rbd::Location,
    socket_dir,
    start::plan::{Plan, PlannedDisk, plan},
    store::{Store, StoredDisk},
    tasks::Refusal,
    uplink::Uplink,
    volume::{token_record, write_token_record},
    wanted::Wanted,
};

/// How long events are gathered before the server hears of them.
const QUIET: Duration = Duration::from_millis(10);
/// How often the host's findings are looked at anew, and the server told if they changed.
const LOOK: Duration = Duration::from_secs(60);

/// What reconciling needs.
pub struct Reconciler {
    /// Paths.
    pub config: Arc<AgentConfig>,
    /// libvirt.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Records and bindings.
    pub store: Arc<Store>,
    /// Disk processes.
    pub backends: Arc<Backends>,
    /// Guests without their process.
    pub wanted: Arc<Wanted>,
    /// What the server hears.
    pub inventory: Arc<Inventory>,
    /// Keys, forgotten with the VMs that need them.
    pub keyring: Arc<Keyring>,
    /// Who hears of copies that cannot be repaired.
    pub uplink: Arc<Uplink>,
}

impl Reconciler {
    /// Follows events until their sender is gone.
    pub fn follow(&self, events: &Receiver<HypervisorEvent>) {
        let mut unsent = false;
        loop {
            let event = events.recv_timeout(if unsent { QUIET } else { LOOK });
            match event {
                Ok(event) => {
                    self.after(event);
                    unsent = true;
                }
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                    self.inventory.send();
                    unsent = false;
                }
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn after(&self, event: HypervisorEvent) {
        match event {
            HypervisorEvent::Connected => {
                if let Err(error) = self.all() {
                    tracing::warn!("what runs here is not known: {error}");
                }
            }
            HypervisorEvent::Lost => {}
            HypervisorEvent::Started(domain) | HypervisorEvent::Stopped { domain, .. } => {
                self.settle(domain);
                self.inventory.refresh(domain);
            }
            HypervisorEvent::Undefined(domain) => {
                self.inventory.refresh(domain);
                self.forget_keys();
                if let Err(HypervisorError::NoDomain { .. }) = self.hypervisor.domain(domain) {
                    self.wanted.settled(domain);
                }
            }
            HypervisorEvent::Defined(domain)
            | HypervisorEvent::Changed(domain)
            | HypervisorEvent::Metadata(domain)
            | HypervisorEvent::DeviceAdded(domain) => self.inventory.refresh(domain),
        }
    }

    /// Everything: at the agent's start, and when libvirtd came back.
    ///
    /// # Errors
    ///
    /// libvirt's; nothing was ended then.
    pub fn all(&self) -> Result<(), HypervisorError> {
        // Looked at before libvirt is asked: what begins later is no business of this.
        let dirs = socket_dir::list(&self.config.run_dir);
        let (known, moment) = (self.backends.domains(), Instant::now());
        let domains = self.hypervisor.domains()?;
        let active: HashSet<DomainUuid> =
            domains.iter().filter(|info| info.state.has_qemu()).map(|info| info.uuid).collect();
        domains.iter().filter(|info| info.state.has_qemu()).for_each(|info| self.serve(info));
        let unused: HashSet<DomainUuid> = dirs.into_iter().chain(known).collect();
        for domain in unused.difference(&active) {
            // The list may lack one that could not be looked at: only libvirt's own word ends a process.
            if self.is_off(*domain) {
                self.backends.clear_out(*domain, moment);
            }
        }
        self.inventory.refresh_all()?;
        self.forget_keys();
        Ok(())
    }

    /// One domain as it is now: served and its copies repaired if it runs, else nothing left of it.
    fn settle(&self, domain: DomainUuid) {
        let moment = Instant::now();
        match self.hypervisor.domain(domain) {
            Ok(info) if info.state.has_qemu() => self.serve(&info),
            Ok(_) | Err(HypervisorError::NoDomain { .. }) => {
                self.wanted.ended(domain);
                self.backends.clear_out(domain, moment);
            }
            Err(error) => tracing::warn!(%domain, "not looked at: {error}"),
        }
    }

    fn is_off(&self, domain: DomainUuid) -> bool {
        match self.hypervisor.domain(domain) {
            Ok(info) => !info.state.has_qemu(),
            Err(error) => matches!(error, HypervisorError::NoDomain { .. }),
        }
    }

    /// Takes on the process of a running domain, or has it started again; then repairs stale copies.
    fn serve(&self, info: &DomainInfo) {
        let plan = match self.plan_of(info.uuid) {
            Ok(Some(plan)) => plan,
            Ok(None) => return,
            Err(why) => {
                let text = format!("VM '{}' runs, but {}", info.name, why.message);
                return self.uplink.notice("vm-contradicts", Some(info.uuid), text);
            }
        };
        match self.backends.adopt(&plan) {
            Ok(true) => self.repair_copies(info, &plan),
            Ok(false) => {
                let text =
                    format!("VM '{}' runs and nothing serves its disks; starting that again", info.name);
                self.uplink.notice("disk-process-missing", Some(info.uuid), text);
                self.wanted.lost(Arc::new(plan));
            }
            Err(error) => {
                let text =
                    format!("VM '{}' runs and its disk process is not usable: {}", info.name, causes(&error));
                self.uplink.notice("disk-process-missing", Some(info.uuid), text);
                self.wanted.lost(Arc::new(plan));
            }
        }
    }

    pub(crate) fn plan_of(&self, domain: DomainUuid) -> Result<Option<Plan>, Refusal> {
        let xml = self.hypervisor.xml(domain, Definition::Live)?;
        plan(&DomainXml::parse(&xml)?, &self.config, &self.store)
    }

    /// Writes the store's records where older ones lie: the domain's metadata, the volumes' headers.
    fn repair_copies(&self, info: &DomainInfo, plan: &Plan) {
        let repaired = self.repair_metadata(info, plan).and_then(|_| self.repair_tokens(plan));
        if let Err(refusal) = repaired {
            let text = format!("a copy of a key record of VM '{}' is stale: {}", plan.name, refusal.message);
            self.uplink.notice("record-stale", Some(plan.domain), text);
        }
    }

    /// Has the domain's metadata say what the store says; whether it had to be written.
    pub(crate) fn repair_metadata(&self, info: &DomainInfo, plan: &Plan) -> Result<bool, Refusal> {
        let Some(wanted) = self.stale_metadata(info, plan.vm) else { return Ok(false) };
        self.hypervisor.set_metadata(plan.domain, Some(&metadata_element(&wanted)))?;
        tracing::info!(domain = %plan.domain, "the metadata of VM '{}' was repaired", plan.name);
        Ok(true)
    }

    /// The same for the headers of volumes that are served here; whether one had to be written.
    pub(crate) fn repair_tokens(&self, plan: &Plan) -> Result<bool, Refusal> {
        let mut repaired = false;
        // An image's is brought up to date when it is opened, and belongs to its helper afterwards.
        let in_file = |disk: &&PlannedDisk| !disk.read_only && Location::of_path(&disk.source).is_none();
        for disk in plan.disks.iter().filter(in_file) {
            let Some((_, stored)) = self.store.disk(disk.disk) else { continue };
            let header = disk.header.as_deref();
            let token = token_record(&disk.source, header, disk.disk);
            let newer = token.as_deref().is_some_and(|token| is_newer(token, &stored.record));
            if token.as_ref() != Some(&stored.record) && !newer {
                write_token_record(&disk.source, header, disk.disk, &stored.record)?;
                tracing::info!(disk = %disk.disk, "the record in a LUKS2 header was repaired");
                repaired = true;
            }
        }
        Ok(repaired)
    }

    /// What the metadata should say, if a definition says something else. One that cannot be read now is not called
    /// stale.
    fn stale_metadata(&self, info: &DomainInfo, vm: VmId) -> Option<VmMetadata> {
        let kinds: &[Definition] =
            if info.persistent { &[Definition::Live, Definition::Persistent] } else { &[Definition::Live] };
        let read = |kind: &Definition| {
            let xml = self.hypervisor.xml(info.uuid, *kind).ok()?;
            Some(DomainXml::parse(&xml).ok()?.metadata().ok().flatten())
        };
        let now: Vec<Option<VmMetadata>> = kinds.iter().filter_map(read).collect();
        let mut wanted = metadata_of(&self.store, vm)?;
        for known in now.iter().flatten().filter(|known| known.vm == vm) {
            keep_aside(&mut wanted, known);
            let retired = |disk: &DiskMetadata| self.store.disk(disk.disk).is_some_and(|(_, d)| d.retired);
            let disks = known.disks.iter().filter(|disk| !retired(disk));
            disks.for_each(|disk| keep_newer(&mut wanted, disk));
        }
        now.iter().any(|now| now.as_ref().is_none_or(|now| !same(now, &wanted))).then_some(wanted)
    }

    /// Keys stay for the VMs of this host, which must start without the server; of others they are forgotten.
    fn forget_keys(&self) {
        if let Ok(domains) = self.hypervisor.domains() {
            let here = domains.iter().map(|info| info.uuid).chain(self.backends.domains());
            self.keyring.keep_only(&here.collect());
        }
    }
}

/// The metadata of a VM, as the store has it; none without an encrypted disk.
pub(crate) fn metadata_of(store: &Store, vm: VmId) -> Option<VmMetadata> {
    let stored = store.vm(vm)?;
    let disks: Vec<DiskMetadata> =
        stored.disks.iter().filter(|disk| !disk.retired).map(disk_metadata).collect();
    let memory = SharedMemory::default();
    (!disks.is_empty()).then_some(VmMetadata { vm, domain: stored.domain, memory, disks })
}

pub(crate) fn disk_metadata(disk: &StoredDisk) -> DiskMetadata {
    DiskMetadata {
        target: disk.target.clone(),
        disk: disk.disk,
        source: disk.source.clone(),
        header: disk.header.clone(),
        format: disk.format,
        class: disk.class,
        // Only definitions know these two.
        chosen: None,
        aside: Aside::new(),
        record: disk.record.clone(),
    }
}

/// Keeps what only a definition knows: what was taken out of it or put into it for a class.
fn keep_aside(wanted: &mut VmMetadata, known: &VmMetadata) {
    wanted.memory.source |= known.memory.source;
    wanted.memory.access |= known.memory.access;
    for disk in &mut wanted.disks {
        let known = known.disks.iter().find(|known| known.disk == disk.disk);
        if let Some(known) = known.filter(|_| disk.aside.is_empty()) {
            disk.aside.clone_from(&known.aside);
        }
        if let Some(known) = known.filter(|known| disk.chosen.is_none() && known.class == disk.class) {
            disk.chosen.clone_from(&known.chosen);
        }
    }
}

/// Keeps what a definition says where the store knows nothing of a disk, or something older: a store can have been put
/// back from a backup, and only a start verifies who is right.
fn keep_newer(wanted: &mut VmMetadata, known: &DiskMetadata) {
    match wanted.disks.iter_mut().find(|disk| disk.disk == known.disk) {
        None => wanted.disks.push(known.clone()),
        Some(ours) if is_newer(&known.record, &ours.record) => ours.record.clone_from(&known.record),
        Some(_) => {}
    }
}

/// Whether a copy is of the same disk and says a higher epoch. Not verified: reason to leave it, not to use it.
fn is_newer(copy: &[u8], than: &[u8]) -> bool {
    match (KeyRecord::decode(copy), KeyRecord::decode(than)) {
        (Ok(copy), Ok(than)) => {
            (copy.head.vm, copy.head.disk()) == (than.head.vm, than.head.disk())
                && copy.state.epoch > than.state.epoch
        }
        _ => false,
    }
}

fn same(now: &VmMetadata, wanted: &VmMetadata) -> bool {
    let within = |a: &VmMetadata, b: &VmMetadata| a.disks.iter().all(|disk| b.disks.contains(disk));
    (now.vm, now.domain, now.memory) == (wanted.vm, wanted.domain, wanted.memory)
        && within(now, wanted)
        && within(wanted, now)
}

#[cfg(test)]
mod tests {
    use vmseal_keys::{Dek, Kek, NewDiskRecord, SecretBytes, restate, seal_disk};
    use vmseal_model::{
        class::DiskClass,
        id::{DiskId, KekId, RecordId},
        record::{HeaderKind, RecipientKind, RecordState, UnitBytes},
        state::InnerFormat,
    };

    use super::*;

    const VM: VmId = VmId::from_bytes([3; 16]);

    /// A disk's metadata at epoch 2, and the same at epoch 3.
    fn disk(id: u8) -> (DiskMetadata, DiskMetadata) {
        let disk = DiskId::from_bytes([id; 16]);
        let kek = Kek::new(KekId::from_bytes(vec![1]).unwrap(), SecretBytes::random().unwrap());
        let dek = Dek::generate().unwrap();
        let new = NewDiskRecord {
            record: RecordId::from_bytes([5; 16]),
            vm: VM,
            disk,
            header: HeaderKind::Attached,
            unit: UnitBytes::B512,
            payload_offset: vmseal_luks::HEADER_BYTES,
            created_ms: 1,
            state: RecordState { epoch: 2, stored_bytes: 512, presented_bytes: 512 },
        };
        let old = seal_disk(&new, &dek, &kek, RecipientKind::Kek, &"main".parse().unwrap()).unwrap();
        let newer = restate(&old, dek.payload(), RecordState { epoch: 3, ..old.state }).unwrap();
        let metadata = |record: &KeyRecord| DiskMetadata {
            target: "vda".into(),
            disk,
            source: "/v".into(),
            header: None,
            format: InnerFormat::Raw,
            class: DiskClass::Compatible,
            chosen: None,
            aside: Aside::new(),
            record: record.encode(),
        };
        (metadata(&old), metadata(&newer))
    }

    fn of(disks: Vec<DiskMetadata>) -> VmMetadata {
        VmMetadata { vm: VM, domain: DomainUuid::from_bytes([1; 16]), memory: SharedMemory::default(), disks }
    }

    #[test]
    fn repair_leaves_what_is_newer_and_disks_the_store_does_not_know() {
        let ((old, newer), (other, _)) = (disk(4), disk(6));
        let mut wanted = of(vec![old.clone()]);
        keep_newer(&mut wanted, &newer);
        keep_newer(&mut wanted, &other);
        assert!(same(&wanted, &of(vec![other.clone(), newer.clone()])));
        // What is older, or no record of that disk, is repaired.
        let mut wanted = of(vec![newer.clone()]);
        keep_newer(&mut wanted, &old);
        keep_newer(&mut wanted, &DiskMetadata { record: other.record, ..newer.clone() });
        keep_newer(&mut wanted, &DiskMetadata { record: vec![1], ..newer.clone() });
        assert!(same(&wanted, &of(vec![newer])));
    }
}
