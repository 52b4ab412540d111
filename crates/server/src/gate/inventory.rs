//! A host's inventory: everything it has, written down anew each time, and what follows from it.
//!
//! What follows: new VMs are placed on the host, floors rise, keys in records are bound to their VMs. What a host says
//! of a VM that is not its own changes none of these.

use std::collections::HashSet;

use vmseal_api::{
    agent::v1::{self, Disk as SeenDisk, Inventory, Vm as SeenVm},
    disk::Disk,
    host::Capabilities,
};
use vmseal_model::{
    id::{DiskId, DomainUuid, VmId},
    record::KeyRecord,
    state::VmState,
};

use super::{Host, session::findings};
use crate::{
    audit::{DONE, Entry},
    placement::{self, Placement},
    server::Server,
    store::{
        StoreError, Write, binding, disk, floor,
        floor::FloorRow,
        host, key,
        key::{KeyRow, column},
        to_db, to_word, vm,
        vm::VmRow,
    },
};

/// Most VMs and disks taken of one host.
const MAX_VMS: usize = 10_000;
const MAX_DISKS: usize = 1_000;

/// Takes an inventory over.
pub(super) async fn apply(server: &Server, host: &Host, all: Inventory) -> Result<(), StoreError> {
    let host_id = host.id.to_string();
    let mut write = server.store.write().await?;
    let flagged = flagged(&mut write, &host_id).await?;
    vm::clear(&mut write, &host_id).await?;
    let mut seen = HashSet::new();
    for reported in all.vms.iter().take(MAX_VMS) {
        // A domain UUID that does not read, or comes twice, is a fault of the host.
        let Ok(domain) = reported.domain_uuid.parse::<DomainUuid>() else {
            tracing::warn!(host = host.name, uuid = reported.domain_uuid, "a VM without a UUID was reported");
            continue;
        };
        if seen.insert(domain) {
            take(&mut write, host, domain, reported, &flagged).await?;
        }
    }
    let now_ms = write.now_ms;
    let said = (&*findings(&all.warnings), &*capabilities(all.capabilities.as_ref()));
    host::seen(&mut write, &host_id, said, now_ms).await?;
    write.commit().await
}

/// What a host can present disks by, as it is kept: JSON.
fn capabilities(said: Option<&v1::HostCapabilities>) -> String {
    let short = |text: &str| text.chars().take(1000).collect::<String>();
    let kept = said.map_or_else(Capabilities::default, |said| Capabilities {
        ublk: said.ublk,
        no_ublk: short(&said.no_ublk),
        vhost_user: said.vhost_user,
    });
    serde_json::to_string(&kept).unwrap_or_else(|_| "{}".into())
}

/// Domains of the host whose ids were already found not to belong together.
async fn flagged(write: &mut Write, host_id: &str) -> Result<HashSet<String>, StoreError> {
    let found: Vec<String> =
        sqlx::query_scalar("SELECT domain_uuid FROM vms WHERE host_id = $1 AND unknown_ids = 1")
            .bind(host_id)
            .fetch_all(&mut **write)
            .await?;
    Ok(found.into_iter().collect())
}

async fn take(
    write: &mut Write,
    host: &Host,
    domain: DomainUuid,
    reported: &SeenVm,
    flagged: &HashSet<String>,
) -> Result<(), StoreError> {
    let (host_id, domain_uuid) = (host.id.to_string(), domain.to_string());
    let vm_id = reported.vm_id.parse::<VmId>().ok();
    let ours = match vm_id {
        Some(vm_id) => place(write, host, vm_id, &domain_uuid, flagged).await?,
        None => {
            binding::release(write, &domain_uuid, &host_id).await?;
            true
        }
    };
    let short = |text: &str| text.chars().take(1000).collect::<String>();
    let locked = reported.locked.as_ref();
    let unprotected: Vec<String> = reported.unprotected.iter().take(100).map(|l| short(l)).collect();
    let row = VmRow {
        host_id: host_id.clone(),
        host_name: host.name.clone(),
        domain_uuid: domain_uuid.clone(),
        name: short(&reported.name),
        state: to_word(&state(&reported.state)),
        vm_id: vm_id.map(|id| id.to_string()),
        unknown_ids: i64::from(!ours),
        transient: i64::from(reported.transient),
        unprotected: serde_json::to_string(&unprotected).unwrap_or_else(|_| "[]".into()),
        locked_provider: locked.map(|l| short(&l.provider)),
        locked_key: locked.map(|l| short(&l.kek)),
        locked_since_ms: locked.map(|l| l.since_ms).filter(|ms| *ms > 0),
        locked_reason: locked.map(|l| short(&l.reason)),
        locked_wanted: i64::from(locked.is_some_and(|l| l.wanted)),
        seen_ms: write.now_ms,
        task_id: None,
    };
    vm::insert(write, &row).await?;
    let mut targets = HashSet::new();
    for reported in reported.disks.iter().take(MAX_DISKS) {
        if !targets.insert(reported.target.as_str()) {
            continue;
        }
        disk::insert(write, &host_id, &domain_uuid, &as_disk(reported)).await?;
        if let (true, Some(vm_id)) = (ours, vm_id) {
            learn(write, host, &domain_uuid, vm_id, reported).await?;
        }
    }
    Ok(())
}

/// Whether the VM is this host's, after placing it here if it is nobody's.
async fn place(
    write: &mut Write,
    host: &Host,
    vm_id: VmId,
    domain_uuid: &str,
    flagged: &HashSet<String>,
) -> Result<bool, StoreError> {
    let (host_id, vm_id) = (host.id.to_string(), vm_id.to_string());
    let (verb, detail) = match placement::of(write, &host_id, &vm_id, domain_uuid).await? {
        Placement::Here => return Ok(true),
        Placement::New => ("vm.placed", String::new()),
        Placement::Left { from } => ("vm.moved", format!("from host {from}")),
        Placement::Elsewhere { host: other } => ("alarm.vm-elsewhere", format!("it is on host {other}")),
        Placement::Contradicted => {
            ("alarm.unknown-vm", "the two ids are not known to belong together".into())
        }
    };
    let ours = !verb.starts_with("alarm.");
    if ours {
        let now_ms = write.now_ms;
        placement::place(write, &host_id, &vm_id, domain_uuid, now_ms).await?;
    } else if flagged.contains(domain_uuid) {
        // Told when it was first seen.
        return Ok(false);
    }
    let who = host.who();
    let object = format!("/hosts/{}", host.name);
    let detail = format!("VM {vm_id}, domain {domain_uuid} {detail}");
    write
        .audit(&Entry { who: &who, verb, object: &object, outcome: DONE, detail: detail.trim_end() })
        .await?;
    Ok(ours)
}

/// Raises the floor of a disk by its record, and binds the keys in it.
async fn learn(
    write: &mut Write,
    host: &Host,
    domain_uuid: &str,
    vm_id: VmId,
    reported: &SeenDisk,
) -> Result<(), StoreError> {
    if reported.record.is_empty() {
        return Ok(());
    }
    let disk_id = reported.disk_id.parse::<DiskId>().ok();
    let record = match KeyRecord::decode(&reported.record) {
        Ok(record) if record.head.vm == vm_id && Some(record.head.disk()) == disk_id => record,
        _ => {
            tracing::warn!(
                host = host.name,
                domain_uuid,
                target = reported.target,
                "a record does not fit its disk"
            );
            return Ok(());
        }
    };
    let (host_id, vm_id) = (host.id.to_string(), vm_id.to_string());
    let now_ms = write.now_ms;
    let raised = FloorRow {
        disk_id: record.head.disk().to_string(),
        vm_id: vm_id.clone(),
        epoch: to_db(record.state.epoch),
        record: reported.record.clone(),
    };
    floor::raise(write, &raised, now_ms).await?;
    for recipient in &record.recipients {
        let (provider, kek_id) = (recipient.id.provider.as_str(), column(&recipient.id.kek));
        disk::insert_key(write, &host_id, domain_uuid, &reported.target, provider, &kek_id).await?;
        let row = match key::get(write, provider, &kek_id).await? {
            Some(row) if row.vm_id.is_some() => continue,
            Some(row) => {
                KeyRow { vm_id: Some(vm_id.clone()), domain_uuid: Some(domain_uuid.to_owned()), ..row }
            }
            None => KeyRow {
                provider: provider.to_owned(),
                kek_id,
                vm_id: Some(vm_id.clone()),
                domain_uuid: Some(domain_uuid.to_owned()),
                host_id: Some(host_id.clone()),
                created_ms: now_ms,
                ..KeyRow::default()
            },
        };
        // A key reserved for another host's task is not bound by what this one says.
        if row.host_id.as_deref().is_none_or(|h| h == host_id) {
            key::put(write, &row).await?;
        }
    }
    Ok(())
}

fn state(word: &str) -> VmState {
    match word {
        "running" => VmState::Running,
        "paused" => VmState::Paused,
        "off" => VmState::Off,
        "saved" => VmState::Saved,
        "locked" => VmState::Locked,
        _ => VmState::Unknown,
    }
}

fn as_disk(reported: &SeenDisk) -> Disk {
    let short = |text: &str| text.chars().take(4096).collect::<String>();
    let filled = |text: &str| (!text.is_empty()).then(|| short(text));
    Disk {
        target: short(&reported.target),
        source: short(&reported.source),
        format: short(&reported.format),
        encrypted: reported.encrypted,
        id: filled(&reported.disk_id),
        epoch: reported.encrypted.then_some(reported.epoch),
        epoch_unverified: reported.epoch_unverified,
        stored_bytes: reported.stored_bytes,
        presented_bytes: reported.presented_bytes,
        class: short(&reported.class),
        asked: short(&reported.asked),
        why: short(&reported.why),
        header: filled(&reported.header),
        keys: Vec::new(),
    }
}
