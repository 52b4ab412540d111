//! The audit, to read and to verify.

use std::sync::Arc;

use axum::extract::State;
use serde::Deserialize;
use sqlx::Connection as _;
use utoipa::IntoParams;
use vmseal_api::{
    audit::{AuditEntry, AuditVerification},
    page::Page,
    paths,
    problem::Problem,
};

use super::{
    answer::{Answer, Outcome},
    call::Call,
};
use crate::{audit, authz::allow, refusal::Refusal, server::Server, store::StoreError};

/// Which part of the audit.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Range {
    /// Entries after this number; `next` of the page before.
    #[serde(default)]
    after: u64,
    /// At most so many; 100 if absent, 1000 at most.
    limit: Option<u32>,
}

/// Entries of the audit, oldest first.
#[utoipa::path(get, path = paths::AUDIT, operation_id = "audit-list", tag = "audit", params(Range), responses(
    (status = 200, body = Page<AuditEntry>),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "audit-list", "").await?;
    let outcome = list_range(&server, &call).await;
    permit.settle(outcome).await
}

async fn list_range(server: &Server, call: &Call) -> Result<Answer, Refusal> {
    let Range { after, limit } = call.query()?;
    let mut db = server.store.read().await?;
    let (items, more) = audit::list(&mut db, after, limit.unwrap_or(100).clamp(1, 1000)).await?;
    let next = items.last().filter(|_| more).map(|entry| entry.seq.to_string());
    Answer::ok(&Page { items, next })
}

/// Checks the whole chain.
#[utoipa::path(get, path = paths::AUDIT_VERIFY, operation_id = "audit-verify", tag = "audit", responses(
    (status = 200, body = AuditVerification),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn verify(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "audit-verify", "").await?;
    let outcome = verify_all(&server).await;
    permit.settle(outcome).await
}

async fn verify_all(server: &Server) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    // Entries and head as they are at one moment.
    let mut tx = db.begin().await.map_err(StoreError::from)?;
    Answer::ok(&audit::verify(&mut tx, server.store.audit_key()).await?)
}
