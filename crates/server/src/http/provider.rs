//! Key providers.

use std::sync::Arc;

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;
use vmseal_api::{
    paths,
    problem::Problem,
    provider::{
        ConfirmBackup, CreateProvider, ExportProvider, ImportProvider, ImportedProvider, Provider,
        ProviderBackup, RemovedProvider,
    },
};

use super::{
    answer::{Answer, Outcome, etag},
    call::{Call, Name},
};
use crate::{
    authz::{Permit, allow},
    providers,
    refusal::Refusal,
    server::Server,
};

/// All providers, by name.
#[utoipa::path(get, path = paths::PROVIDERS, operation_id = "provider-list", tag = "providers", responses(
    (status = 200, body = Vec<Provider>),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "provider-list", "").await?;
    let outcome = list_all(&server).await;
    permit.settle(outcome).await
}

async fn list_all(server: &Server) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    Answer::ok(&providers::list(server, &mut db).await?)
}

/// Makes a provider. It gives no key before its first verified backup.
#[utoipa::path(post, path = paths::PROVIDERS, operation_id = "provider-create", tag = "providers",
    request_body = CreateProvider, responses(
        (status = 201, body = Provider),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn create(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "provider-create", "").await?;
    let outcome = make(&server, &permit, &call).await;
    permit.settle(outcome).await
}

async fn make(server: &Server, permit: &Permit, call: &Call) -> Result<Answer, Refusal> {
    providers::create(server, permit, call.json()?).await
}

/// One provider. Carries an ETag.
#[utoipa::path(get, path = paths::PROVIDER, operation_id = "provider-show", tag = "providers",
    params(("name" = String, Path)), responses(
        (status = 200, body = Provider),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn show(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "provider-show", &name).await?;
    let outcome = show_one(&server, &name).await;
    permit.settle(outcome).await
}

async fn show_one(server: &Server, name: &str) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    let provider = providers::show(server, &mut db, name).await?;
    Ok(Answer::ok(&provider)?.tagged(etag(&provider)))
}

/// How to remove a provider.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Removal {
    /// Remove it although VMs need its keys.
    #[serde(default)]
    danger_lose_keys: bool,
}

/// Removes a provider. Refused while its keys are in use, with the VMs that would break in `details`.
#[utoipa::path(delete, path = paths::PROVIDER, operation_id = "provider-remove", tag = "providers",
    params(("name" = String, Path), Removal), responses(
        (status = 200, body = RemovedProvider),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn remove(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "provider-remove", &name).await?;
    let outcome = remove_one(&server, &permit, &call, &name).await;
    permit.settle(outcome).await
}

async fn remove_one(server: &Server, permit: &Permit, call: &Call, name: &str) -> Result<Answer, Refusal> {
    let Removal { danger_lose_keys } = call.query()?;
    providers::remove(server, permit, call, name, danger_lose_keys).await
}

/// Gives a backup. It counts once it came back through `confirm-backup`.
#[utoipa::path(post, path = paths::PROVIDER_EXPORT, operation_id = "provider-export", tag = "providers",
    params(("name" = String, Path)), request_body = ExportProvider, responses(
        (status = 200, body = ProviderBackup),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn export(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "provider-export", &name).await?;
    let outcome = give(&server, &permit, &call, &name).await;
    permit.settle(outcome).await
}

async fn give(server: &Server, permit: &Permit, call: &Call, name: &str) -> Result<Answer, Refusal> {
    providers::export(server, permit, name, call.json()?).await
}

/// Takes a backup as it was read from where it is kept; if it opens, the provider may be used.
#[utoipa::path(post, path = paths::PROVIDER_CONFIRM_BACKUP, operation_id = "provider-confirm-backup",
    tag = "providers", params(("name" = String, Path)), request_body = ConfirmBackup, responses(
        (status = 200, body = Provider),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn confirm_backup(
    State(server): State<Arc<Server>>,
    Name(name): Name,
    call: Call,
) -> Outcome {
    let permit = allow(&server, &call, "provider-confirm-backup", &name).await?;
    let outcome = confirm(&server, &permit, &call, &name).await;
    permit.settle(outcome).await
}

async fn confirm(server: &Server, permit: &Permit, call: &Call, name: &str) -> Result<Answer, Refusal> {
    providers::confirm_backup(server, permit, call, name, call.json()?).await
}

/// Brings a provider back from a backup, or generations it lacks; hosts then try the VMs that wait.
#[utoipa::path(post, path = paths::PROVIDER_IMPORT, operation_id = "provider-import", tag = "providers",
    request_body = ImportProvider, responses(
        (status = 200, body = ImportedProvider),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn import(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "provider-import", "").await?;
    let outcome = bring_back(&server, &permit, &call).await;
    permit.settle(outcome).await
}

async fn bring_back(server: &Server, permit: &Permit, call: &Call) -> Result<Answer, Refusal> {
    providers::import(server, permit, call.json::<ImportProvider>()?).await
}

/// Makes a provider the default.
#[utoipa::path(post, path = paths::PROVIDER_DEFAULT, operation_id = "provider-set-default", tag = "providers",
    params(("name" = String, Path)), responses(
        (status = 200, body = Provider),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn set_default(State(server): State<Arc<Server>>, Name(name): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "provider-set-default", &name).await?;
    let outcome = providers::set_default(&server, &permit, &call, &name).await;
    permit.settle(outcome).await
}
