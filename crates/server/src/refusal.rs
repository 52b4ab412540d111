//! What a request is answered that is not done: one shape from the store up to the client.
//!
//! Goes in: a code of the model, what failed on which object, what to do next. Comes out: problem+json. What failed
//! inside is logged with its causes and told outside without them.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use vmseal_api::problem::Problem;
use vmseal_keys::SecretError;
use vmseal_model::refusal::Code;

use crate::{sealing::SealError, store::StoreError};

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Refusal {
    /// For programs.
    pub code: Code,
    /// What failed, on which object, why.
    pub detail: String,
    /// What to do next.
    pub hint: Option<String>,
    /// What the detail counts.
    pub details: Vec<String>,
    status: Option<StatusCode>,
}

impl Refusal {
    /// A refusal without a hint.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), hint: None, details: Vec::new(), status: None }
    }

    /// There is no such object.
    pub fn not_found(what: &str, name: &str) -> Self {
        Self::new(Code::NotFound, format!("there is no {what} '{}'", shown(name)))
    }

    /// A field is missing or wrong.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(Code::BadRequest, detail)
    }

    /// The same with what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same with what the detail counts.
    #[must_use]
    pub fn details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }

    /// The same with a status that is not the code's own.
    #[must_use]
    pub fn status(mut self, status: StatusCode) -> Self {
        self.status = Some(status);
        self
    }

    /// HTTP status of the answer.
    pub fn http_status(&self) -> StatusCode {
        self.status.unwrap_or(match self.code {
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::Unauthenticated => StatusCode::UNAUTHORIZED,
            Code::Forbidden => StatusCode::FORBIDDEN,
            Code::BadRequest => StatusCode::BAD_REQUEST,
            Code::Failed | Code::Integrity => StatusCode::INTERNAL_SERVER_ERROR,
            Code::HostUnreachable | Code::ServerUnreachable => StatusCode::SERVICE_UNAVAILABLE,
            // Everything else: the request is good, the state of its object is not.
            _ => StatusCode::CONFLICT,
        })
    }

    /// As it goes over the wire.
    pub fn problem(&self) -> Problem {
        let status = self.http_status();
        Problem {
            status: status.as_u16(),
            title: status.canonical_reason().unwrap_or("Error").to_owned(),
            code: self.code.as_str().to_owned(),
            detail: self.detail.clone(),
            hint: self.hint.clone(),
            details: self.details.clone(),
        }
    }
}

/// A name as somebody sent it: short, without control characters.
pub fn shown(name: &str) -> String {
    name.escape_debug().take(80).collect()
}

/// An error with its causes, in one line.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self.problem()).unwrap_or_default();
        let mut response = (self.http_status(), body).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(Problem::CONTENT_TYPE));
        if self.code == Code::Unauthenticated {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        tracing::error!(error = causes(&error), "database");
        Self::new(Code::Failed, error.to_string())
            .hint("nothing was changed; the server's log has the cause, the disk under its state directory may be full")
    }
}

impl From<SecretError> for Refusal {
    fn from(error: SecretError) -> Self {
        tracing::error!(error = causes(&error), "secret memory");
        Self::new(Code::Failed, error.to_string())
    }
}

impl From<SealError> for Refusal {
    fn from(error: SealError) -> Self {
        tracing::error!(error = causes(&error), "root key");
        Self::new(Code::Integrity, error.to_string())
            .hint("put root.key and server.db back from the same backup; native providers come back from their PKCS#12 backups")
    }
}
