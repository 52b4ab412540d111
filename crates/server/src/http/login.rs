//! `login`, `logout`, `user-create`.

use std::sync::Arc;

use axum::extract::State;
use vmseal_api::{
    login::{CreateUser, Login, Session, User},
    paths,
    problem::Problem,
};
use vmseal_model::refusal::Code;

use super::{
    answer::{Answer, Outcome},
    call::Call,
};
use crate::{
    authz::{Caller, Permit, allow},
    login,
    refusal::Refusal,
    server::Server,
};

/// Begins a session. Never given again for an idempotency key: its token is stored nowhere.
#[utoipa::path(post, path = paths::LOGIN, operation_id = "login", tag = "users", request_body = Login, responses(
    (status = 200, body = Session),
    (status = "default", body = Problem, content_type = "application/problem+json"),
), security(()))]
pub(super) async fn begin(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    Ok(login::begin(&server, call.json()?).await?)
}

/// Ends the caller's session.
#[utoipa::path(delete, path = paths::LOGIN, operation_id = "logout", tag = "users", responses(
    (status = 200, body = serde_json::Value),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn end(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    match (&call.caller, &call.token) {
        (Caller::User(name), Some(token)) => Ok(login::end(&server, name, token).await?),
        _ => Err(Refusal::new(Code::Unauthenticated, "there is no session to end").into()),
    }
}

/// Makes a user.
#[utoipa::path(post, path = paths::USERS, operation_id = "user-create", tag = "users", request_body = CreateUser,
    responses(
        (status = 201, body = User),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn create_user(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "user-create", "").await?;
    let outcome = make(&server, &permit, &call).await;
    permit.settle(outcome).await
}

async fn make(server: &Server, permit: &Permit, call: &Call) -> Result<Answer, Refusal> {
    login::create(server, permit, call.json()?).await
}
