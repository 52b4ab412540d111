//! `status` and `doctor`.

use std::sync::Arc;

use axum::extract::State;
use vmseal_api::{
    paths,
    problem::Problem,
    status::{Doctor, Status},
};
use vmseal_model::state::Coverage;

use super::{
    answer::{Answer, Outcome},
    call::Call,
};
use crate::{
    authz::allow,
    doctor,
    refusal::Refusal,
    server::Server,
    store::{host, provider, task, vm},
};

/// The installation at a glance.
#[utoipa::path(get, path = paths::STATUS, operation_id = "status", tag = "status", responses(
    (status = 200, body = Status),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn show(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "status", "").await?;
    let outcome = count(&server, permit.who()).await;
    permit.settle(outcome).await
}

async fn count(server: &Server, you: &str) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let vms = vm::coverage(&mut db).await?;
    let of = |coverage: Coverage| {
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        number(vms.iter().filter(|v| Coverage::of(size(v.encrypted), size(v.disks)) == coverage).count())
    };
    Answer::ok(&Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        server_id: server.server_id.clone(),
        started_ms: server.started_ms,
        you: you.to_owned(),
        default_provider: provider::default_name(&mut db).await?,
        providers: number(provider::list(&mut db).await?.len()),
        hosts: number(host::list(&mut db).await?.len()),
        hosts_connected: number(server.sessions.count()),
        vms: number(vms.len()),
        vms_encrypted: of(Coverage::Encrypted),
        vms_partly_encrypted: of(Coverage::PartlyEncrypted),
        vms_clear: of(Coverage::Clear),
        vms_locked: number(vms.iter().filter(|v| v.locked != 0).count()),
        tasks_unfinished: number(task::unfinished(&mut db, "").await?.len()),
        findings: number(doctor::findings(server, &mut db).await?.len()),
        secret_memory: vmseal_keys::protection().to_string(),
    })
}

/// What an administrator should look at.
#[utoipa::path(get, path = paths::DOCTOR, operation_id = "doctor", tag = "status", responses(
    (status = 200, body = Doctor),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn doctor(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "doctor", "").await?;
    let outcome = examine(&server).await;
    permit.settle(outcome).await
}

async fn examine(server: &Server) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    Answer::ok(&Doctor { findings: doctor::findings(server, &mut db).await? })
}
