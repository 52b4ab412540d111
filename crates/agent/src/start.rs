//! Starts the disks of a VM: its definition in, sockets that QEMU can connect to out, or a refusal in one line.
//!
//! Used by libvirt's `prepare` and, with the plan of the first time, when a disk process was lost. Copies of a key
//! record are candidates only: the newest that verifies is used, and it must reach the highest epoch that this host or
//! the server has seen. libvirt is not called, since libvirtd waits for us. What fails leaves nothing behind.

pub mod plan;

use std::{
    cell::Cell,
    collections::HashMap,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use vmseal_keys::{Dek, Kek};
use vmseal_model::{
    id::{DiskId, HostId, KekId, ProviderId},
    record::KeyRecord,
    refusal::Code,
};

use self::plan::{Plan, PlannedDisk};
use crate::{
    backend::{BackendError, Backends, Why},
    causes::causes,
    choice::{Candidate, Chosen, NoChoice, Origin, choose, open_record},
    config::AgentConfig,
    domain_xml::DomainXml,
    floors::{Floors, ServerFloors},
    ports::{KeyMissing, KeyPurpose, KeySource},
    rbd::Location,
    store::{Store, StoredDisk},
    tasks::Refusal,
    uplink::Uplink,
    volume::{self, OpenVolume, token_of},
};

/// How long keys and floors may take together: a missing key is refused within two seconds.
pub const PATIENCE: Duration = Duration::from_millis(1700);
/// How much of that the server may take to say its floors.
const FLOORS: Duration = Duration::from_millis(900);
/// How long a volume may still be held by a process that is just ending.
const HELD: Duration = Duration::from_secs(1);
/// Between two looks at such a volume.
const PAUSE: Duration = Duration::from_millis(30);

/// What a start needs.
pub struct Starter {
    /// Paths.
    pub config: Arc<AgentConfig>,
    /// Records and bindings.
    pub store: Arc<Store>,
    /// KEKs.
    pub keys: Arc<dyn KeySource>,
    /// The server's floors.
    pub floors: Arc<Floors>,
    /// Disk processes.
    pub backends: Arc<Backends>,
    /// Who hears of copies that do not verify.
    pub uplink: Arc<Uplink>,
    /// Whose name goes into owner blocks.
    pub host: Box<dyn Fn() -> Option<HostId> + Send + Sync>,
}

/// Why a VM does not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoStart {
    /// A key cannot be had now; the VM may start by itself later.
    Locked(KeyMissing),
    /// It is refused.
    Refused(Refusal),
}

impl From<Refusal> for NoStart {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<BackendError> for NoStart {
    fn from(error: BackendError) -> Self {
        Self::Refused(error.into())
    }
}

impl NoStart {
    /// The one line for whoever started the VM: what, why, what to do.
    pub fn line(&self, name: &str) -> String {
        match self {
            Self::Locked(missing) => format!(
                "VM '{name}' is locked: {missing}; it starts by itself when the key is there: vmseal vm show {name}"
            ),
            Self::Refused(refusal) if refusal.hint.is_empty() => {
                format!("VM '{name}' does not start: {}", refusal.message)
            }
            Self::Refused(refusal) => {
                format!("VM '{name}' does not start: {}; {}", refusal.message, refusal.hint)
            }
        }
    }
}

impl Starter {
    /// Serves the disks of a domain that is about to start; its plan, or none if no disk is ours. At `until` libvirt
    /// gives up.
    ///
    /// # Errors
    ///
    /// [`NoStart`]; nothing was left behind.
    pub fn prepare(&self, xml: &DomainXml, until: Instant) -> Result<Option<Plan>, NoStart> {
        let Some(plan) = plan::plan(xml, &self.config, &self.store)? else { return Ok(None) };
        self.serve(plan.clone(), Why::Starts { until }, PATIENCE)?;
        Ok(Some(plan))
    }

    /// Serves the disks of a guest that runs already; keys and floors may take as long as `patience`.
    ///
    /// # Errors
    ///
    /// As [`Starter::prepare`].
    pub fn serve_running(&self, plan: Plan, patience: Duration) -> Result<(), NoStart> {
        // Its process may be there, and only a warden be gone: that needs no key.
        if self.backends.adopt(&plan)? {
            return Ok(());
        }
        self.serve(plan, Why::Runs, patience)
    }

    fn serve(&self, plan: Plan, why: Why, patience: Duration) -> Result<(), NoStart> {
        let until = Instant::now() + patience;
        // Keys first: without them a process that is there is better left alone.
        let (chosen, floors) = self.unlock(&plan, until)?;
        let disks = plan.disks.clone();
        let records: Vec<KeyRecord> = chosen.iter().map(|c| c.record.clone()).collect();
        for (disk, chosen) in disks.iter().zip(&chosen) {
            self.tell_of_stale(&plan, disk, &chosen.stale);
        }
        let remembered = plan.clone();
        let opened = Cell::new(false);
        let open = || self.open(&disks, chosen, why).inspect(|_| opened.set(true));
        let started = self.backends.start(plan, why, open);
        // A guest that goes on may lack a block device yet; its records are in use all the same.
        if started.is_ok() || (opened.get() && matches!(why, Why::Runs)) {
            self.remember(&remembered, &records, floors.as_ref());
        }
        started
    }

    /// The record and key of every disk.
    fn unlock(&self, plan: &Plan, until: Instant) -> Result<(Vec<Chosen>, Option<ServerFloors>), NoStart> {
        let ids: Vec<DiskId> = plan.disks.iter().map(|disk| disk.disk).collect();
        let floors = if self.uplink.is_up() {
            self.floors.ask(&ids, FLOORS.min(until.saturating_duration_since(Instant::now())))
        } else {
            None
        };
        let mut keks = Keks { keys: &*self.keys, plan, until, had: HashMap::new() };
        let unlock = |disk: &PlannedDisk| {
            let from_server = floors.as_ref().and_then(|floors| floors.get(&disk.disk));
            let stored = disk.stored.as_ref();
            let floor = stored.map_or(0, |s| s.epoch).max(from_server.map_or(0, |s| s.epoch));
            let candidates: Vec<Candidate> = [
                (Origin::Store, stored.map(|s| s.record.clone())),
                (Origin::Server, from_server.map(|s| s.record.clone()).filter(|record| !record.is_empty())),
                (Origin::Token, self.token(disk)),
                (Origin::Metadata, disk.in_metadata.clone()),
            ]
            .into_iter()
            .filter_map(|(origin, bytes)| Some(Candidate { origin, bytes: bytes? }))
            .collect();
            choose(plan.vm, disk.disk, &candidates, floor, |record| {
                open_record(plan.vm, disk.disk, record, |provider, kek| keks.kek(provider, kek))
            })
            .map_err(|e| match e {
                NoChoice::Missing(missing) => NoStart::Locked(missing),
                NoChoice::Refused(refusal) => NoStart::Refused(refusal.about(&disk.target)),
            })
        };
        let chosen = plan.disks.iter().map(unlock).collect::<Result<_, _>>()?;
        Ok((chosen, floors))
    }

    /// The record in the volume's header. Of an image it is asked for only by a host that has none: a cluster that does not
    /// answer must not take the time twice, and the header is looked at again when the image is held.
    fn token(&self, disk: &PlannedDisk) -> Option<Vec<u8>> {
        if disk.stored.is_some() && Location::of_path(&disk.source).is_some() {
            return None;
        }
        token_of(&self.config, &disk.source, disk.header.as_deref(), disk.disk)
    }

    fn open(
        &self,
        disks: &[PlannedDisk],
        chosen: Vec<Chosen>,
        why: Why,
    ) -> Result<Vec<(OpenVolume, Dek)>, NoStart> {
        let host = (self.host)();
        let until = Instant::now() + HELD;
        let mut volumes = Vec::with_capacity(disks.len());
        for (slot, (disk, Chosen { record, dek, .. })) in disks.iter().zip(chosen).enumerate() {
            let slot = u32::try_from(slot).expect("a domain has far fewer disks");
            let mut volume = loop {
                let header = disk.header.as_deref();
                match volume::open(
                    &self.config,
                    &disk.source,
                    header,
                    &record,
                    &dek,
                    &disk.target,
                    slot,
                    disk.read_only,
                ) {
                    Ok(volume) => break volume,
                    // A child that is being started has a copy of every lock until it runs its program.
                    Err(error) if error.code() == Code::VolumeInUse && Instant::now() < until => {
                        thread::sleep(PAUSE)
                    }
                    Err(error) => {
                        let refusal = Refusal::new(error.code(), causes(&error)).hint(error.hint());
                        return Err(refusal.about(&disk.target).into());
                    }
                }
            };
            let held = match why {
                Why::Starts { .. } => volume.hold(host),
                Why::Runs => volume.hold_again(host),
            };
            if let Err(error) = held {
                return Err(Refusal::new(error.code(), causes(&error)).about(&disk.target).into());
            }
            volume.setup.export = disk.class.export();
            volume.setup.serial.clone_from(&disk.serial);
            volumes.push((volume, dek));
        }
        Ok(volumes)
    }

    /// Puts what was used into the store: from now on nothing older is accepted here.
    fn remember(&self, plan: &Plan, records: &[KeyRecord], floors: Option<&ServerFloors>) {
        for (disk, record) in plan.disks.iter().zip(records) {
            let confirmed = floors.is_some_and(|floors| floors.contains_key(&disk.disk));
            let unverified = match &disk.stored {
                Some(stored) => stored.epoch_unverified && !confirmed,
                None => !confirmed,
            };
            let stored = StoredDisk {
                target: disk.target.clone(),
                disk: disk.disk,
                source: disk.source.to_string_lossy().into_owned(),
                header: disk.header.as_ref().map(|path| path.to_string_lossy().into_owned()),
                format: disk.format,
                class: disk.class,
                record: record.encode(),
                epoch: record.state.epoch,
                epoch_unverified: unverified,
                retired: false,
            };
            if disk.stored.as_ref() == Some(&stored) && plan.bound {
                continue;
            }
            if unverified && disk.stored.is_none() {
                let text = format!(
                    "disk {} of VM '{}' was never seen here and no server says how new its key record is: epoch {} is \
                     accepted unverified",
                    disk.target, plan.name, stored.epoch
                );
                self.uplink.notice("epoch-unverified", Some(plan.domain), text);
            }
            if let Err(error) = self.store.put_disk(plan.vm, plan.domain, stored) {
                let text = format!("the key record of disk {} is not kept: {}", disk.target, causes(&error));
                self.uplink.notice("store-failed", Some(plan.domain), text);
            }
        }
    }

    fn tell_of_stale(&self, plan: &Plan, disk: &PlannedDisk, stale: &[Origin]) {
        if !stale.is_empty() {
            let where_from: Vec<String> = stale.iter().map(Origin::to_string).collect();
            let text = format!(
                "disk {} of VM '{}': the key record in {} is old or altered; a newer one that verifies is used and \
                 written there",
                disk.target,
                plan.name,
                where_from.join(" and ")
            );
            self.uplink.notice("record-stale", Some(plan.domain), text);
        }
    }
}

/// KEKs for one start: each is asked for once, whatever the answer.
struct Keks<'a> {
    keys: &'a dyn KeySource,
    plan: &'a Plan,
    until: Instant,
    had: HashMap<(ProviderId, KekId), Result<Arc<Kek>, KeyMissing>>,
}

impl Keks<'_> {
    fn kek(&mut self, provider: &ProviderId, kek: &KekId) -> Result<Arc<Kek>, KeyMissing> {
        let name = (provider.clone(), kek.clone());
        if let Some(known) = self.had.get(&name) {
            return known.clone();
        }
        let purpose = KeyPurpose { domain: self.plan.domain, vm: Some(self.plan.vm), task: None };
        let left = self.until.saturating_duration_since(Instant::now());
        let answer = self.keys.kek(provider, kek, &purpose, left);
        self.had.insert(name, answer.clone());
        answer
    }
}

#[cfg(test)]
mod tests;
