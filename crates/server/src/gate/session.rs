//! One host's stream, from its greeting to its end.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;
use tonic::{Status, Streaming};
use vmseal_api::agent::{
    PROTOCOL,
    v1::{Floor, FloorReply, FloorRequest, FromAgent, Hello, Notice, Warning, Welcome, from_agent, to_agent},
};
use vmseal_api::status::Finding;

use super::{Host, inventory, sessions::Session};
use crate::{
    audit::{DONE, Entry},
    broker, placement,
    refusal::causes,
    server::Server,
    store::{StoreError, binding, floor, from_db, host, host::Greeting},
    tasks,
};

/// How long a host may take for its greeting.
const GREETING: Duration = Duration::from_secs(10);
/// Most findings kept of a host.
const MAX_WARNINGS: usize = 100;
/// Most disks in one question for floors.
const MAX_FLOORS: usize = 10_000;

/// Serves the stream until it ends.
pub(super) async fn run(server: Arc<Server>, host: Host, session: Session, mut stream: Streaming<FromAgent>) {
    let host_id = host.id.to_string();
    match greet(&server, &host, &mut stream).await {
        Ok(session_key) => {
            let welcome = Welcome {
                server_id: server.server_id.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            };
            session.send(to_agent::Body::Welcome(welcome));
            server.sessions.enter(&host_id, &session);
            tracing::info!(host = host.name, "session began");
            if let Err(error) = tasks::send_again(&server, &host_id, &session).await {
                tracing::error!(host = host.name, error = causes(&error), "commands were not sent again");
            }
            let why = listen(&server, &host, &session, &session_key, &mut stream).await;
            server.sessions.leave(&host_id, &session);
            tracing::info!(host = host.name, why, "session ended");
        }
        Err(why) => {
            tracing::warn!(host = host.name, why, "session refused");
            session.refuse(Status::failed_precondition(why));
        }
    }
}

/// Takes the greeting; gives the key that grants are sealed to.
async fn greet(server: &Server, host: &Host, stream: &mut Streaming<FromAgent>) -> Result<[u8; 32], String> {
    let first =
        timeout(GREETING, stream.message()).await.map_err(|_| "no greeting came in time".to_owned())?;
    let hello = match first.map_err(|status| status.message().to_owned())?.and_then(|m| m.body) {
        Some(from_agent::Body::Hello(hello)) => hello,
        _ => return Err("the first message was no greeting".into()),
    };
    if hello.protocol != PROTOCOL {
        return Err(format!("it speaks protocol {}, this server {PROTOCOL}", hello.protocol));
    }
    let key: [u8; 32] = hello
        .session_public_key
        .as_slice()
        .try_into()
        .map_err(|_| "its session key has not 32 bytes".to_owned())?;
    match note(server, host, &hello).await {
        Ok(true) => Ok(key),
        Ok(false) => Err("the host was removed; let it join again".to_owned()),
        Err(error) => Err(causes(&error)),
    }
}

/// Writes down who greeted; false if there is no such host any more.
async fn note(server: &Server, host: &Host, hello: &Hello) -> Result<bool, StoreError> {
    let short = |text: &str| text.chars().take(256).collect::<String>();
    let (version, uri, memory) =
        (short(&hello.version), short(&hello.libvirt_uri), short(&hello.secret_memory));
    let warnings = findings(&hello.warnings);
    let said = Greeting { version: &version, libvirt_uri: &uri, secret_memory: &memory, warnings: &warnings };
    let mut write = server.store.write().await?;
    let now_ms = write.now_ms;
    let known = host::greet(&mut write, &host.id.to_string(), &said, now_ms).await?;
    write.commit().await?;
    Ok(known)
}

/// A host's findings as they are kept: JSON.
pub(super) fn findings(warnings: &[Warning]) -> String {
    let short = |text: &str| text.chars().take(1000).collect::<String>();
    let kept: Vec<Finding> = warnings
        .iter()
        .take(MAX_WARNINGS)
        .map(|w| Finding {
            code: short(&w.code),
            message: short(&w.message),
            hint: short(&w.hint),
            host: None,
        })
        .collect();
    serde_json::to_string(&kept).unwrap_or_else(|_| "[]".into())
}

/// Handles messages, in order, until the stream or the session ends; says why it did.
async fn listen(
    server: &Server,
    host: &Host,
    session: &Session,
    session_key: &[u8; 32],
    stream: &mut Streaming<FromAgent>,
) -> String {
    let mut ended = session.watch();
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            _ = ended.wait_for(|ended| *ended) => {
                return "a newer session took its place, the host was removed, or it did not read".into();
            }
        };
        let body = match message {
            Ok(Some(message)) => message.body,
            Ok(None) => return "the host closed it".into(),
            Err(status) => return status.message().to_owned(),
        };
        let done = match body {
            // A greeting again, or something a newer agent says: neither changes anything.
            None | Some(from_agent::Body::Hello(_)) => Ok(()),
            Some(from_agent::Body::Inventory(all)) => inventory::apply(server, host, all).await,
            Some(from_agent::Body::KeyRequest(request)) => {
                session.send(broker::answer(server, host, session_key, request).await);
                Ok(())
            }
            Some(from_agent::Body::TaskEvent(event)) => tasks::mirror(server, host, event).await,
            Some(from_agent::Body::FloorRequest(request)) => match floors(server, host, request).await {
                Ok(reply) => {
                    session.send(to_agent::Body::FloorReply(reply));
                    Ok(())
                }
                Err(error) => Err(error),
            },
            Some(from_agent::Body::Notice(notice)) => heed(server, host, notice).await,
        };
        if let Err(error) = done {
            // The host connects again and says everything anew.
            tracing::error!(host = host.name, error = causes(&error), "a message was not handled");
            return "the database failed".into();
        }
    }
}

/// Floors of disks whose VMs are, or may be, on this host; of others it learns nothing.
async fn floors(server: &Server, host: &Host, request: FloorRequest) -> Result<FloorReply, StoreError> {
    let mut db = server.store.read().await?;
    let host_id = host.id.to_string();
    let mut floors = Vec::new();
    for disk_id in request.disk_ids.iter().take(MAX_FLOORS) {
        let Some(row) = floor::get(&mut db, disk_id).await? else { continue };
        let here = match binding::of_vm(&mut db, &row.vm_id).await? {
            None => true,
            Some(bound) => {
                placement::of(&mut db, &host_id, &row.vm_id, &bound.domain_uuid).await?.may_be_here()
            }
        };
        if here {
            floors.push(Floor { disk_id: row.disk_id, epoch: from_db(row.epoch), record: row.record });
        }
    }
    Ok(FloorReply { request_id: request.request_id, floors })
}

/// Writes down what an administrator should see.
async fn heed(server: &Server, host: &Host, notice: Notice) -> Result<(), StoreError> {
    let plain: String =
        notice.code.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect();
    tracing::warn!(host = host.name, code = plain, domain = notice.domain_uuid, "{}", notice.message);
    let who = host.who();
    let verb = format!("alarm.{plain}");
    let object = format!("/hosts/{}", host.name);
    let detail = if notice.domain_uuid.is_empty() {
        notice.message
    } else {
        format!("domain {}: {}", notice.domain_uuid, notice.message)
    };
    let mut write = server.store.write().await?;
    write.audit(&Entry { who: &who, verb: &verb, object: &object, outcome: DONE, detail: &detail }).await?;
    write.commit().await
}
