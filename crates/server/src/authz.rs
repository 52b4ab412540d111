//! Who may do what: every endpoint passes through [`allow`] with the name of its operation.
//!
//! In go the caller and a row of `vmseal_model::operation`; out comes a [`Permit`], without which nothing can be
//! changed: a [`Change`] is a transaction whose commit writes the audit entry and, where the client asked for it, the
//! answer to give again. A refusal is audited too, whether it was the caller's roles or the state of the object.

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
};

use axum::http::StatusCode;
use serde::Serialize;
use sqlx::SqliteConnection;
use vmseal_model::{
    operation::{self, ObjectKind, Operation, Privilege, ROLES},
    refusal::Code,
};

use crate::{
    audit::{DONE, Entry},
    http::{
        answer::{Answer, Stop},
        call::Call,
    },
    refusal::{Refusal, shown},
    server::Server,
    store::{StoreError, Write, host, idempotency, idempotency::StoredAnswer, user, user::Grant, vm},
};

/// What the sealed answers are sealed for.
const ANSWER: &str = "idempotent-answer";

/// As whom a request comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// Root, or the server's own user, on the server's machine.
    LocalRoot,
    /// A user with a session.
    User(String),
    /// Anybody.
    Nobody,
}

impl Caller {
    /// As the audit names it.
    pub fn who(&self) -> String {
        match self {
            Self::LocalRoot => "local root".into(),
            Self::User(name) => format!("user:{name}"),
            Self::Nobody => "nobody".into(),
        }
    }
}

/// Whether one of these grants gives `privilege` on the object at `path`: a role on a path holds on all below it.
fn holds(grants: &[Grant], privilege: Privilege, path: &str) -> bool {
    grants.iter().any(|grant| {
        let above = grant.path == "/"
            || path
                .strip_prefix(grant.path.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        above && ROLES.iter().any(|role| role.name == grant.role && (role.holds)(privilege))
    })
}

/// Decides whether the caller may do `operation` on the object of this name, and gives the answer that was given
/// before if this is the same request again.
pub(crate) async fn allow(
    server: &Arc<Server>,
    call: &Call,
    operation: &str,
    object: &str,
) -> Result<Permit, Stop> {
    let row = operation::find(operation).expect("every endpoint names a row of the operation table");
    if call.caller == Caller::Nobody {
        return Err(Refusal::new(Code::Unauthenticated, "this needs a session")
            .hint("run `vmseal login`, or on the server's machine work as root")
            .into());
    }
    let mut db = server.store.read().await?;
    let path = path_of(&mut db, row.object, object).await?;
    let allowed = match &call.caller {
        Caller::LocalRoot => true,
        Caller::User(name) => holds(&user::grants(&mut db, name).await?, row.privilege, &path),
        Caller::Nobody => false,
    };
    let permit =
        Permit { server: Arc::clone(server), who: call.caller.who(), row, path, request: call.request_id()? };
    if !allowed {
        drop(db);
        let refusal =
            Refusal::new(Code::Forbidden, format!("{} may not {} on {}", permit.who, row.name, permit.path))
                .hint("an administrator can give you a role that may");
        permit.note(&refusal).await?;
        return Err(refusal.into());
    }
    if let Some(answer) = permit.given_before(&mut db).await? {
        return Err(Stop::Again(answer));
    }
    Ok(permit)
}

/// The path of an object, under its own name if it is known by several.
async fn path_of(db: &mut SqliteConnection, kind: ObjectKind, name: &str) -> Result<String, StoreError> {
    let name = shown(name).replace('/', "%2F");
    Ok(match kind {
        ObjectKind::Root => "/".into(),
        ObjectKind::Provider => format!("/providers/{name}"),
        ObjectKind::Task => format!("/tasks/{name}"),
        ObjectKind::Host => match host::find(db, &name).await? {
            Some(host) => format!("/hosts/{}", host.name),
            None => format!("/hosts/{name}"),
        },
        ObjectKind::Vm => match vm::find(db, &name).await?.as_slice() {
            [one] => format!("/vms/{}", shown(&one.name).replace('/', "%2F")),
            _ => format!("/vms/{name}"),
        },
    })
}

/// A request that may be sent again.
#[derive(Debug, Clone)]
pub(crate) struct RequestId {
    /// The client's key for it.
    pub(crate) key: String,
    /// Keyed digest of all of it: the same key for another request is a fault of the client.
    pub(crate) fingerprint: String,
}

/// That the caller may do one operation on one object.
#[must_use = "what came of it has to be settled"]
pub(crate) struct Permit {
    server: Arc<Server>,
    who: String,
    row: &'static Operation,
    path: String,
    request: Option<RequestId>,
}

impl Permit {
    /// As the audit names the caller.
    pub(crate) fn who(&self) -> &str {
        &self.who
    }

    /// Begins the change.
    pub(crate) async fn begin(&self) -> Result<Change<'_>, Refusal> {
        Ok(Change { write: self.server.store.write().await?, path: self.path.clone(), permit: self })
    }

    /// Hands over what came of it; a refusal is written to the audit first.
    pub(crate) async fn settle(self, outcome: Result<Answer, Refusal>) -> Result<Answer, Stop> {
        match outcome {
            Ok(answer) => Ok(answer),
            Err(refusal) => {
                if !self.row.audit.is_empty() {
                    self.note(&refusal).await?;
                }
                // Two of the same at once: the other one was first, and its answer is the answer.
                if refusal.code == Code::Conflict {
                    let mut db = self.server.store.read().await?;
                    if let Some(answer) = self.given_before(&mut db).await? {
                        return Ok(answer);
                    }
                }
                Err(refusal.into())
            }
        }
    }

    async fn note(&self, refusal: &Refusal) -> Result<(), Refusal> {
        let verb = if self.row.audit.is_empty() { self.row.name } else { self.row.audit };
        // What is wrong with a request is told to the caller only: it may quote what was meant to be secret.
        let detail = if refusal.code == Code::BadRequest { "" } else { &refusal.detail };
        let entry =
            Entry { who: &self.who, verb, object: &self.path, outcome: refusal.code.as_str(), detail };
        let mut write = self.server.store.write().await?;
        write.audit(&entry).await?;
        Ok(write.commit().await?)
    }

    async fn given_before(&self, db: &mut SqliteConnection) -> Result<Option<Answer>, Refusal> {
        let Some(request) = &self.request else { return Ok(None) };
        let now_ms = self.server.clock.now_ms();
        let Some(stored) = idempotency::get(db, &self.who, &request.key, now_ms).await? else {
            return Ok(None);
        };
        if stored.fingerprint != request.fingerprint {
            return Err(Refusal::new(Code::Conflict, "this idempotency key was used for another request")
                .hint("use a new key for a new request"));
        }
        let status = u16::try_from(stored.status).ok().and_then(|s| StatusCode::from_u16(s).ok());
        let about = request.fingerprint.as_bytes();
        let body = self.server.sealer.open(ANSWER, about, &stored.sealed_body)?;
        Ok(Some(Answer::of(status.unwrap_or(StatusCode::OK), body.to_vec())))
    }
}

/// A change in progress. Dropped, it changes nothing.
pub(crate) struct Change<'a> {
    write: Write,
    path: String,
    permit: &'a Permit,
}

impl Change<'_> {
    /// When it began.
    pub(crate) fn now_ms(&self) -> i64 {
        self.write.now_ms
    }

    /// Names the object in the audit that the change made.
    pub(crate) fn on(&mut self, path: String) {
        self.path = path;
    }

    /// Makes it durable together with its audit entry and the answer.
    pub(crate) async fn commit<T: Serialize>(
        mut self,
        status: StatusCode,
        body: &T,
        detail: &str,
    ) -> Result<Answer, Refusal> {
        let answer = Answer::json(status, body)?;
        let Permit { who, row, request, server, .. } = self.permit;
        let entry = Entry { who, verb: row.audit, object: &self.path, outcome: DONE, detail };
        self.write.audit(&entry).await?;
        if let Some(request) = request {
            let about = request.fingerprint.as_bytes();
            let stored = StoredAnswer {
                fingerprint: request.fingerprint.clone(),
                status: i64::from(status.as_u16()),
                sealed_body: server.sealer.seal(ANSWER, about, answer.body())?,
            };
            let now_ms = self.write.now_ms;
            idempotency::insert(&mut self.write, who, &request.key, &stored, now_ms).await.map_err(
                |error| {
                    if error.is_duplicate() {
                        Refusal::new(Code::Conflict, "the same request was being done already")
                    } else {
                        error.into()
                    }
                },
            )?;
        }
        self.write.commit().await?;
        Ok(answer)
    }
}

impl Deref for Change<'_> {
    type Target = SqliteConnection;
    fn deref(&self) -> &SqliteConnection {
        &self.write
    }
}

impl DerefMut for Change<'_> {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.write
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(path: &str) -> Vec<Grant> {
        vec![Grant { role: "Administrator".into(), path: path.into() }]
    }

    #[test]
    fn role_holds_on_its_path_and_below_and_nowhere_else() {
        for path in ["/", "/vms/a", "/providers/x"] {
            assert!(holds(&grant("/"), Privilege::CryptoDecrypt, path));
        }
        assert!(holds(&grant("/vms/a"), Privilege::CryptoDecrypt, "/vms/a"));
        assert!(holds(&grant("/vms"), Privilege::CryptoDecrypt, "/vms/a"));
        assert!(!holds(&grant("/vms/a"), Privilege::CryptoDecrypt, "/vms/ab"));
        assert!(!holds(&grant("/vms/a"), Privilege::CryptoDecrypt, "/"));
        assert!(!holds(&[], Privilege::Read, "/"));
        let unknown = vec![Grant { role: "Unheard".into(), path: "/".into() }];
        assert!(!holds(&unknown, Privilege::Read, "/"));
    }
}
