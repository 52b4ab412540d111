//! Keys by id.

use std::sync::Arc;

use axum::extract::State;
use vmseal_api::{
    key::{Key, KeyState},
    paths,
    problem::Problem,
};

use super::{
    answer::{Answer, Outcome},
    call::Call,
};
use crate::{
    authz::allow,
    refusal::Refusal,
    server::Server,
    store::{key, key::NamedKeyRow},
};

/// All keys that are known, by provider and age. Never their bytes.
#[utoipa::path(get, path = paths::KEYS, operation_id = "key-list", tag = "keys", responses(
    (status = 200, body = Vec<Key>),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "key-list", "").await?;
    let outcome = list_all(&server).await;
    permit.settle(outcome).await
}

async fn list_all(server: &Server) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    let all: Vec<Key> = key::list(&mut db).await?.into_iter().map(to_api).collect();
    Answer::ok(&all)
}

fn to_api(NamedKeyRow { key, vm_name, host_name }: NamedKeyRow) -> Key {
    let state = match (key.missing_since_ms, &key.vm_id) {
        (Some(_), _) => KeyState::Missing,
        (None, None) => KeyState::Reserved,
        (None, Some(_)) => KeyState::Active,
    };
    Key {
        key: key::shown(&key.kek_id),
        state,
        vm: vm_name.or(key.vm_id),
        host: host_name,
        created_ms: key.created_ms,
        granted_ms: key.granted_ms,
        missing_since_ms: key.missing_since_ms,
        provider: key.provider,
    }
}
