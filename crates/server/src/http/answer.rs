//! What an endpoint answers.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use vmseal_model::refusal::Code;

use crate::{digest::sha256_hex, refusal::Refusal, store::StoreError};

/// A good answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    status: StatusCode,
    body: Vec<u8>,
    etag: Option<String>,
}

impl Answer {
    /// JSON.
    pub(crate) fn json<T: Serialize>(status: StatusCode, body: &T) -> Result<Self, Refusal> {
        let body = serde_json::to_vec(body)
            .map_err(|_| Refusal::new(Code::Failed, "the answer could not be written as JSON"))?;
        Ok(Self::of(status, body))
    }

    /// JSON, 200.
    pub(crate) fn ok<T: Serialize>(body: &T) -> Result<Self, Refusal> {
        Self::json(StatusCode::OK, body)
    }

    /// JSON that was written before.
    pub(crate) fn of(status: StatusCode, body: Vec<u8>) -> Self {
        Self { status, body, etag: None }
    }

    /// The same with the object's tag.
    pub(crate) fn tagged(mut self, etag: String) -> Self {
        self.etag = Some(etag);
        self
    }

    /// Its body.
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // Answers hold tokens and backups.
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(etag) = self.etag.and_then(|tag| HeaderValue::from_str(&tag).ok()) {
            headers.insert(header::ETAG, etag);
        }
        response
    }
}

/// The entity tag of an object (RFC 9110 §8.8.3).
pub(crate) fn etag<T: Serialize>(object: &T) -> String {
    let bytes = serde_json::to_vec(object).unwrap_or_default();
    let digest = sha256_hex(&bytes);
    format!("\"{}\"", &digest[..32])
}

/// Why a handler ends before its end.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Refused.
    Refused(Refusal),
    /// It was done before: the same answer again.
    Again(Answer),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Refused(error.into())
    }
}

impl IntoResponse for Stop {
    fn into_response(self) -> Response {
        match self {
            Self::Refused(refusal) => refusal.into_response(),
            Self::Again(answer) => answer.into_response(),
        }
    }
}

/// What handlers give.
pub(crate) type Outcome = Result<Answer, Stop>;
