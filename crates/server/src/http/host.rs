//! Hosts, and the tokens by which they join.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sqlx::SqliteConnection;
use vmseal_api::{
    host::{Host, HostState, JoinToken},
    join::{JOIN_TOKEN_PREFIX, JoinClaims},
    paths,
    problem::Problem,
    secret_text::SecretText,
    status::Finding,
};
use vmseal_model::refusal::Code;

use super::{
    answer::{Answer, Outcome},
    call::{Call, Name},
};
use crate::{
    authz::{Permit, allow},
    digest::{random_token, sha256_hex},
    refusal::Refusal,
    server::Server,
    store::{StoreError, count, host, host::HostRow, join_token, key, task},
};

/// How long a join token works.
const JOIN_MS: i64 = 3_600_000;

/// All hosts, by name.
#[utoipa::path(get, path = paths::HOSTS, operation_id = "host-list", tag = "hosts", responses(
    (status = 200, body = Vec<Host>),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "host-list", "").await?;
    let outcome = list_all(&server).await;
    permit.settle(outcome).await
}

async fn list_all(server: &Server) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    let all: Vec<Host> = host::list(&mut db).await?.into_iter().map(|row| to_api(server, row)).collect();
    Answer::ok(&all)
}

/// One host, by name or id.
#[utoipa::path(get, path = paths::HOST, operation_id = "host-show", tag = "hosts",
    params(("name" = String, Path)), responses(
        (status = 200, body = Host),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn show(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "host-show", &name).await?;
    let outcome = show_one(&server, &name).await;
    permit.settle(outcome).await
}

async fn show_one(server: &Server, name: &str) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    Answer::ok(&to_api(server, find(&mut db, name).await?))
}

async fn find(db: &mut SqliteConnection, name: &str) -> Result<HostRow, Refusal> {
    host::find(db, name).await?.ok_or_else(|| Refusal::not_found("host", name))
}

fn to_api(server: &Server, row: HostRow) -> Host {
    let connected = server.sessions.is_connected(&row.id);
    let warnings: Vec<Finding> = serde_json::from_str(&row.warnings).unwrap_or_default();
    Host {
        capabilities: row.capabilities(),
        state: if connected { HostState::Connected } else { HostState::Unreachable },
        version: row.version,
        libvirt_uri: row.libvirt_uri,
        secret_memory: row.secret_memory,
        vms: count(row.vms),
        warnings,
        joined_ms: row.joined_ms,
        seen_ms: row.seen_ms,
        certificate_expires_ms: row.certificate_expires_ms,
        id: row.id,
        name: row.name,
    }
}

/// Makes a token by which one host may join, within an hour.
#[utoipa::path(post, path = paths::JOIN_TOKENS, operation_id = "host-join-token", tag = "hosts", responses(
    (status = 201, body = JoinToken),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn join_token(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "host-join-token", "").await?;
    let outcome = make_token(&server, &permit).await;
    permit.settle(outcome).await
}

async fn make_token(server: &Server, permit: &Permit) -> Result<Answer, Refusal> {
    let secret = random_token("")?;
    let mut change = permit.begin().await?;
    let now_ms = change.now_ms();
    let expires_ms = now_ms.saturating_add(JOIN_MS);
    let digest = sha256_hex(secret.expose().as_bytes());
    join_token::insert(&mut change, &digest, permit.who(), now_ms, expires_ms).await?;
    let claims =
        JoinClaims { address: server.gate_address.clone(), ca_sha256: server.ca.fingerprint(), secret };
    let claims = serde_json::to_vec(&claims)
        .map_err(|_| Refusal::new(Code::Failed, "the join token could not be written"))?;
    let token = SecretText::new(format!("{JOIN_TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(claims)));
    change.commit(StatusCode::CREATED, &JoinToken { token, expires_ms }, "").await
}

/// Removes a host: its session ends, its certificate is worth nothing, its running VMs go on.
#[utoipa::path(delete, path = paths::HOST, operation_id = "host-remove", tag = "hosts",
    params(("name" = String, Path)), responses(
        (status = 200, body = Host),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn remove(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "host-remove", &name).await?;
    let outcome = remove_one(&server, &permit, &name).await;
    permit.settle(outcome).await
}

async fn remove_one(server: &Server, permit: &Permit, name: &str) -> Result<Answer, Refusal> {
    let mut change = permit.begin().await?;
    let row = find(&mut change, name).await?;
    let id = row.id.clone();
    end_tasks(&mut change, &id).await?;
    key::release_of_host(&mut change, &id).await?;
    host::remove(&mut change, &id).await?;
    let removed = Host { state: HostState::Unreachable, ..to_api(server, row) };
    let answer = change.commit(StatusCode::OK, &removed, &id).await?;
    server.sessions.end(&id);
    Ok(answer)
}

/// Nobody will say any more how tasks of a removed host end.
async fn end_tasks(change: &mut crate::authz::Change<'_>, host_id: &str) -> Result<(), StoreError> {
    let now_ms = change.now_ms();
    for mut row in task::unfinished(change, host_id).await? {
        row.state = "failed".into();
        row.code = Code::HostUnreachable.as_str().into();
        row.message = format!("host {} was removed; what its journal says holds", row.host_name);
        (row.updated_ms, row.finished_ms) = (now_ms, Some(now_ms));
        task::update(change, &row).await?;
    }
    Ok(())
}
