//! The public API: one file a noun, and the document made from them.
//!
//! Every handler asks [`crate::authz::allow`] first, with the name that is its `operationId` too. What it then does
//! is in the module of its noun, outside of HTTP.

pub(crate) mod answer;
mod audit;
pub(crate) mod call;
mod events;
mod host;
mod key;
pub(crate) mod listen;
mod login;
mod page;
mod provider;
mod status;
mod task;
mod vm;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
};
use utoipa::{
    Modify, OpenApi,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};
use vmseal_api::paths;
use vmseal_model::refusal::Code;

use crate::{refusal::Refusal, server::Server};

/// Longest body of a request.
const MAX_BODY: usize = 1 << 20;
/// A request that takes longer is given up; none waits for a host.
const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(OpenApi)]
#[openapi(
    info(
        title = "vmseal",
        description = "VM encryption for QEMU/KVM. Refusals are application/problem+json with a stable `code`. A POST may \
                       carry an Idempotency-Key; its answer is given again for 24 hours.",
        version = "1.0.0",
        license(name = "Apache-2.0 OR MIT")
    ),
    modifiers(&Bearer),
    security(("session" = []))
)]
struct Document;

/// How a session is shown.
struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        document
            .components
            .get_or_insert_default()
            .add_security_scheme("session", SecurityScheme::Http(scheme));
    }
}

fn routes() -> OpenApiRouter<Arc<Server>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(status::show))
        .routes(routes!(status::doctor))
        .routes(routes!(login::begin, login::end))
        .routes(routes!(login::create_user))
        .routes(routes!(provider::list, provider::create))
        .routes(routes!(provider::import))
        .routes(routes!(provider::show, provider::remove))
        .routes(routes!(provider::export))
        .routes(routes!(provider::confirm_backup))
        .routes(routes!(provider::set_default))
        .routes(routes!(host::list))
        .routes(routes!(host::join_token))
        .routes(routes!(host::show, host::remove))
        .routes(routes!(vm::list, vm::create))
        .routes(routes!(vm::show))
        .routes(routes!(vm::encrypt))
        .routes(routes!(vm::decrypt))
        .routes(routes!(vm::repair))
        .routes(routes!(vm::adopt))
        .routes(routes!(vm::create_disk))
        .routes(routes!(vm::set_disk))
        .routes(routes!(key::list))
        .routes(routes!(task::list))
        .routes(routes!(task::show))
        .routes(routes!(task::cancel))
        .routes(routes!(events::watch))
        .routes(routes!(audit::list))
        .routes(routes!(audit::verify))
}

/// Everything the API answers.
pub(crate) fn router(server: Arc<Server>) -> Router {
    let (router, _) = routes().split_for_parts();
    router
        .fallback(async || Refusal::new(Code::NotFound, "there is no such endpoint"))
        .method_not_allowed_fallback(async || {
            Refusal::bad_request("this endpoint has no such method").status(StatusCode::METHOD_NOT_ALLOWED)
        })
        .layer(middleware::from_fn(in_time))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(server)
}

/// The OpenAPI document, as it is kept in `openapi/v1.json`.
pub fn document() -> String {
    let (_, document) = routes().split_for_parts();
    let mut text = document.to_pretty_json().expect("the document is plain data");
    text.push('\n');
    text
}

async fn in_time(request: Request, next: Next) -> Response {
    if request.uri().path() == paths::EVENTS {
        return next.run(request).await;
    }
    // On its own: a caller that hangs up or is given up must not leave what is half done behind a commit.
    let done = tokio::spawn(next.run(request));
    match tokio::time::timeout(TIMEOUT, done).await {
        Ok(Ok(response)) => response,
        Ok(Err(_)) => Refusal::new(Code::Failed, "the request failed; see the server's log").into_response(),
        Err(_) => Refusal::new(Code::Failed, "the request took too long and was given up")
            .hint("send it again with the same idempotency key: it is not done twice")
            .status(StatusCode::SERVICE_UNAVAILABLE)
            .into_response(),
    }
}
