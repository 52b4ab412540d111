//! Virtual machines and their disks.

mod find;

use std::sync::Arc;

use axum::{extract::State, http::StatusCode};
use vmseal_api::{
    agent::v1::{self as agent, Command, command, to_agent},
    disk::{CreateDisk, SetDisk},
    page::Page,
    paths,
    problem::Problem,
    task::Task,
    vm::{CreateVm, DecryptVm, EncryptVm, Vm},
};
use vmseal_keys::random_bytes;
use vmseal_model::{id::TaskId, refusal::Code, task::TaskKind};

use super::{
    answer::{Answer, Outcome, etag},
    call::{Call, Name},
    page::Part,
};
use crate::{
    authz::{Permit, allow},
    placement,
    refusal::Refusal,
    server::Server,
    store::{to_word, vm, vm::After},
    tasks::{self, NewTask},
};

/// VMs of all hosts, by name.
#[utoipa::path(get, path = paths::VMS, operation_id = "vm-list", tag = "vms", params(Part), responses(
    (status = 200, body = Page<Vm>),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "vm-list", "").await?;
    let outcome = list_part(&server, &call).await;
    permit.settle(outcome).await
}

async fn list_part(server: &Server, call: &Call) -> Result<Answer, Refusal> {
    let part: Part = call.query()?;
    let mut db = server.store.read().await?;
    let rows = vm::page(&mut db, &part.after(After::default())?, part.fetch()).await?;
    let mut shown = Vec::with_capacity(rows.len());
    for row in rows {
        let place = After(row.name.clone(), row.host_id.clone(), row.domain_uuid.clone());
        shown.push((place, find::to_api(server, &mut db, row).await?));
    }
    Answer::ok(&part.page(shown, |(place, _)| place.clone(), |(_, vm)| vm))
}

/// One VM, by name, VM id or libvirt UUID. Carries an ETag. 409 with the choices if several have that name.
#[utoipa::path(get, path = paths::VM, operation_id = "vm-show", tag = "vms",
    params(("name" = String, Path)), responses(
        (status = 200, body = Vm),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn show(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "vm-show", &name).await?;
    let outcome = show_one(&server, &name).await;
    permit.settle(outcome).await
}

async fn show_one(server: &Server, name: &str) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    let row = find::one(&mut db, name).await?;
    let vm = find::to_api(server, &mut db, row).await?;
    Ok(Answer::ok(&vm)?.tagged(etag(&find::for_tag(&vm))))
}

/// Makes a VM with encrypted disks.
#[utoipa::path(post, path = paths::VMS, operation_id = "vm-create", tag = "vms", request_body = CreateVm,
    responses(
        (status = 202, body = Task),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn create(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "vm-create", "").await?;
    let outcome = begin_create(&server, &permit, &call).await;
    permit.settle(outcome).await
}

async fn begin_create(server: &Server, permit: &Permit, call: &Call) -> Result<Answer, Refusal> {
    let asked: CreateVm = call.json()?;
    let (host_id, host_name) = find::host(server, asked.host.as_deref()).await?;
    let vm_name = find::name_in(&asked.xml)
        .ok_or_else(|| Refusal::bad_request("'xml' is no domain XML: it has no <name>"))?;
    let body = command::Body::CreateVm(agent::CreateVm {
        xml: asked.xml,
        provider: String::new(),
        kek_id: Vec::new(),
        disk_bytes: asked.disk_bytes.into_iter().collect(),
        class: asked.class.as_str().to_owned(),
        hosts: None,
    });
    let new = NewTask {
        kind: TaskKind::VmCreate,
        host_id,
        host_name,
        domain_uuid: None,
        vm_id: None,
        vm_name,
        key_of: Some(asked.provider),
        body,
    };
    tasks::start(server, permit, new).await
}

/// Encrypts disks of a VM that is off.
#[utoipa::path(post, path = paths::VM_ENCRYPT, operation_id = "vm-encrypt", tag = "vms",
    params(("name" = String, Path)), request_body = EncryptVm, responses(
        (status = 202, body = Task),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn encrypt(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "vm-encrypt", &name).await?;
    let outcome = begin_encrypt(&server, &permit, &call, &name).await;
    permit.settle(outcome).await
}

async fn begin_encrypt(server: &Server, permit: &Permit, call: &Call, name: &str) -> Result<Answer, Refusal> {
    let asked: EncryptVm = call.json()?;
    let body = |domain_uuid| {
        command::Body::EncryptVm(agent::EncryptVm {
            domain_uuid,
            targets: asked.disks,
            provider: String::new(),
            kek_id: Vec::new(),
            source: to_word(&asked.source),
            class: asked.class.as_str().to_owned(),
            hosts: None,
        })
    };
    on_vm(server, permit, call, name, TaskKind::VmEncrypt, Some(asked.provider), body).await
}

/// Decrypts disks of a VM that is off.
#[utoipa::path(post, path = paths::VM_DECRYPT, operation_id = "vm-decrypt", tag = "vms",
    params(("name" = String, Path)), request_body = DecryptVm, responses(
        (status = 202, body = Task),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn decrypt(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "vm-decrypt", &name).await?;
    let outcome = begin_decrypt(&server, &permit, &call, &name).await;
    permit.settle(outcome).await
}

async fn begin_decrypt(server: &Server, permit: &Permit, call: &Call, name: &str) -> Result<Answer, Refusal> {
    let asked: DecryptVm = call.json()?;
    let body = |domain_uuid| {
        command::Body::DecryptVm(agent::DecryptVm {
            domain_uuid,
            targets: asked.disks,
            source: to_word(&asked.source),
        })
    };
    on_vm(server, permit, call, name, TaskKind::VmDecrypt, None, body).await
}

/// Brings back what a VM lacks: stale records, a lost backend process.
#[utoipa::path(post, path = paths::VM_REPAIR, operation_id = "vm-repair", tag = "vms",
    params(("name" = String, Path)), responses(
        (status = 202, body = Task),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn repair(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "vm-repair", &name).await?;
    let body = |domain_uuid| command::Body::RepairVm(agent::RepairVm { domain_uuid });
    let outcome = on_vm(&server, &permit, &call, &name, TaskKind::VmRepair, None, body).await;
    permit.settle(outcome).await
}

/// Makes a new, empty, encrypted disk for a VM.
#[utoipa::path(post, path = paths::VM_DISKS, operation_id = "disk-create", tag = "vms",
    params(("name" = String, Path)), request_body = CreateDisk, responses(
        (status = 202, body = Task),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn create_disk(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "disk-create", &name).await?;
    let outcome = begin_disk(&server, &permit, &call, &name).await;
    permit.settle(outcome).await
}

async fn begin_disk(server: &Server, permit: &Permit, call: &Call, name: &str) -> Result<Answer, Refusal> {
    let asked: CreateDisk = call.json()?;
    // An image on Ceph RBD is named as QEMU names it; the agent knows what can stand behind that.
    let is_place = asked.path.starts_with('/') || asked.path.starts_with("rbd:");
    if !is_place || asked.target.is_empty() || asked.bytes == 0 {
        return Err(Refusal::bad_request(
            "a disk needs a target, an absolute path or an image (rbd:POOL/IMAGE), and a size",
        ));
    }
    let body = |domain_uuid| {
        command::Body::CreateDisk(agent::CreateDisk {
            domain_uuid,
            target: asked.target,
            path: asked.path,
            format: asked.format.as_str().to_owned(),
            bytes: asked.bytes,
            provider: String::new(),
            kek_id: Vec::new(),
            class: asked.class.as_str().to_owned(),
            hosts: None,
        })
    };
    on_vm(server, permit, call, name, TaskKind::DiskCreate, Some(asked.provider), body).await
}

/// Gives an encrypted disk another class, while its VM is off.
#[utoipa::path(post, path = paths::VM_DISK_SET, operation_id = "disk-set", tag = "vms",
    params(("name" = String, Path)), request_body = SetDisk, responses(
        (status = 202, body = Task),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn set_disk(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "disk-set", &name).await?;
    let outcome = begin_set_disk(&server, &permit, &call, &name).await;
    permit.settle(outcome).await
}

async fn begin_set_disk(
    server: &Server,
    permit: &Permit,
    call: &Call,
    name: &str,
) -> Result<Answer, Refusal> {
    let asked: SetDisk = call.json()?;
    if asked.target.is_empty() {
        return Err(Refusal::bad_request("name the disk's target"));
    }
    let class = asked.class.as_str().to_owned();
    let body = |domain_uuid| {
        command::Body::SetDisk(agent::SetDisk { domain_uuid, target: asked.target, class, hosts: None })
    };
    on_vm(server, permit, call, name, TaskKind::DiskSet, None, body).await
}

/// Begins a task on a VM that is there.
async fn on_vm(
    server: &Server,
    permit: &Permit,
    call: &Call,
    name: &str,
    kind: TaskKind,
    key_of: Option<Option<String>>,
    body: impl FnOnce(String) -> command::Body,
) -> Result<Answer, Refusal> {
    let row = {
        let mut db = server.store.read().await?;
        let row = find::one(&mut db, name).await?;
        let vm = find::to_api(server, &mut db, row.clone()).await?;
        call.if_match(&find::for_tag(&vm))?;
        row
    };
    // What `repair` mends may be what the ids tell.
    if row.unknown_ids != 0 && kind != TaskKind::VmRepair {
        return Err(Refusal::new(
            Code::UnknownVm,
            format!("the ids of VM {} are not known to belong together here", row.name),
        )
        .hint(format!("if this copy is the one to run: `vmseal vm adopt {}`", row.domain_uuid)));
    }
    let new = NewTask {
        kind,
        host_id: row.host_id,
        host_name: row.host_name,
        domain_uuid: Some(row.domain_uuid.clone()),
        vm_id: row.vm_id,
        vm_name: row.name,
        key_of,
        body: body(row.domain_uuid),
    };
    tasks::start(server, permit, new).await
}

/// Says that a VM's two ids belong together and that it is on this host: after a copy, a new UUID, a lost host.
#[utoipa::path(post, path = paths::VM_ADOPT, operation_id = "vm-adopt", tag = "vms",
    params(("name" = String, Path)), responses(
        (status = 202, body = Vm),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn adopt(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "vm-adopt", &name).await?;
    let outcome = take_in(&server, &permit, &name).await;
    permit.settle(outcome).await
}

async fn take_in(server: &Server, permit: &Permit, name: &str) -> Result<Answer, Refusal> {
    let mut change = permit.begin().await?;
    let row = find::one(&mut change, name).await?;
    let Some(vm_id) = row.vm_id.clone() else {
        return Err(Refusal::new(Code::NothingToDo, format!("VM {} is clear", row.name)));
    };
    if !server.sessions.is_connected(&row.host_id) {
        return Err(Refusal::new(Code::HostUnreachable, format!("host {} is not connected", row.host_name)));
    }
    let now_ms = change.now_ms();
    placement::place(&mut change, &row.host_id, &vm_id, &row.domain_uuid, now_ms).await?;
    vm::known(&mut change, &row.host_id, &row.domain_uuid).await?;
    let command = Command {
        id: TaskId::from_random(random_bytes()?).to_string(),
        fencing_token: 0,
        deadline_ms: now_ms.saturating_add(60_000),
        approvals: Vec::new(),
        body: Some(command::Body::AdoptVm(agent::AdoptVm { domain_uuid: row.domain_uuid.clone() })),
    };
    let detail = format!("VM {vm_id}, domain {} on host {}", row.domain_uuid, row.host_name);
    let host_id = row.host_id.clone();
    let shown = find::to_api(server, &mut change, vm::VmRow { unknown_ids: 0, ..row }).await?;
    let answer = change.commit(StatusCode::ACCEPTED, &shown, &detail).await?;
    server.sessions.send(&host_id, to_agent::Body::Command(tasks::fenced(server, command)));
    Ok(answer)
}
