//! A request: who sends it, and what is in it.
//!
//! The body of a request is read only after its sender is known; [`crate::authz::allow`] decides before it is parsed.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, StatusCode, Uri, header, request::Parts},
};
use serde::de::DeserializeOwned;
use vmseal_api::paths;

use super::answer::etag;
use crate::{
    authz::{Caller, RequestId},
    digest::sha256_hex,
    refusal::Refusal,
    server::Server,
    store::user,
};
use vmseal_model::refusal::Code;

/// Where a connection comes from; put into every request by the listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    /// The local socket, with the peer's user.
    Local {
        /// User id.
        uid: u32,
    },
    /// The network.
    Remote,
}

/// A request.
pub(crate) struct Call {
    /// Who sends it.
    pub(crate) caller: Caller,
    /// Digest of its token.
    pub(crate) token: Option<String>,
    peer: Peer,
    server: Arc<Server>,
    headers: HeaderMap,
    uri: Uri,
    method: String,
    body: Bytes,
}

impl Call {
    /// The same request as it would be now: its session may have ended.
    pub(crate) async fn again(&self) -> Result<Self, Refusal> {
        Ok(Self {
            caller: caller(&self.server, self.token.as_deref(), self.peer).await?,
            token: self.token.clone(),
            peer: self.peer,
            server: Arc::clone(&self.server),
            headers: self.headers.clone(),
            uri: self.uri.clone(),
            method: self.method.clone(),
            body: self.body.clone(),
        })
    }

    /// Its body.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        serde_json::from_slice(&self.body).map_err(|error| {
            Refusal::bad_request(format!("the request's JSON is not as it should be: {error}"))
        })
    }

    /// Its query.
    pub(crate) fn query<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        match Query::<T>::try_from_uri(&self.uri) {
            Ok(Query(query)) => Ok(query),
            Err(error) => Err(Refusal::bad_request(format!("the query is not as it should be: {error}"))),
        }
    }

    /// What tells it from others, if it may be sent again.
    pub(crate) fn request_id(&self) -> Result<Option<RequestId>, Refusal> {
        let Some(key) = self.headers.get(paths::IDEMPOTENCY_KEY) else { return Ok(None) };
        let good = |key: &&str| (1..=128).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic());
        let key = key.to_str().ok().filter(good).ok_or_else(|| {
            Refusal::bad_request("an idempotency key is 1 to 128 printable characters without spaces")
        })?;
        let target = format!("{} {}", self.method, self.uri);
        let fingerprint = self.server.fingerprint(&[target.as_bytes(), &self.body]);
        Ok(Some(RequestId { key: key.to_owned(), fingerprint }))
    }

    /// Refuses if the client wants the object to be as it was, and it is not.
    pub(crate) fn if_match<T: serde::Serialize>(&self, object: &T) -> Result<(), Refusal> {
        let Some(wanted) = self.headers.get(header::IF_MATCH) else { return Ok(()) };
        let wanted = wanted.to_str().unwrap_or_default();
        let tag = etag(object);
        if wanted == "*" || wanted.split(',').any(|one| one.trim() == tag) {
            return Ok(());
        }
        Err(Refusal::new(Code::Conflict, "the object changed since you looked at it")
            .hint("look again, then decide")
            .status(StatusCode::PRECONDITION_FAILED))
    }

    fn token(headers: &HeaderMap) -> Option<String> {
        let text = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, token) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| sha256_hex(token.trim().as_bytes()))
    }
}

impl FromRequest<Arc<Server>> for Call {
    type Rejection = Refusal;

    async fn from_request(request: Request, server: &Arc<Server>) -> Result<Self, Refusal> {
        let headers = request.headers().clone();
        let (uri, method) = (request.uri().clone(), request.method().to_string());
        let peer = request.extensions().get::<Peer>().copied().unwrap_or(Peer::Remote);
        let token = Self::token(&headers);
        let caller = caller(server, token.as_deref(), peer).await?;
        let body = if caller == Caller::Nobody && uri.path() != paths::LOGIN {
            Bytes::new()
        } else {
            Bytes::from_request(request, server).await.map_err(|rejection| {
                let status = rejection.status();
                Refusal::bad_request(rejection.body_text()).status(status)
            })?
        };
        Ok(Self { caller, token, peer, server: Arc::clone(server), headers, uri, method, body })
    }
}

/// Who a request comes from.
async fn caller(server: &Server, token: Option<&str>, peer: Peer) -> Result<Caller, Refusal> {
    Ok(match (token, peer) {
        // A token decides, even for root: who names somebody wants to be that one.
        (Some(token), _) => {
            let mut db = server.store.read().await?;
            match user::of_session(&mut db, token, server.clock.now_ms()).await? {
                Some(name) => Caller::User(name),
                None => Caller::Nobody,
            }
        }
        (None, Peer::Local { uid }) if uid == 0 || uid == server.own_uid => Caller::LocalRoot,
        (None, _) => Caller::Nobody,
    })
}

/// The name in a path.
pub(crate) struct Name(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(rejection) => Err(Refusal::bad_request(rejection.body_text())),
        }
    }
}
