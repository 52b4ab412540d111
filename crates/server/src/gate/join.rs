//! Joining: a secret that works once buys a certificate.

use vmseal_api::agent::v1::{JoinReply, JoinRequest};
use vmseal_keys::random_bytes;
use vmseal_model::id::HostId;
use zeroize::Zeroizing;

use tonic::Status;

use super::failed;
use crate::{
    audit::{DONE, Entry},
    ca::CaError,
    digest::sha256_hex,
    refusal::causes,
    server::Server,
    store::{Write, host, host::NewHost, join_token},
};

/// Names that are words of the API's paths.
const RESERVED: [&str; 1] = ["join-tokens"];

/// Uses the secret up and signs. The secret is checked before anything else of the request is looked at.
pub(super) async fn join(server: &Server, request: JoinRequest) -> Result<JoinReply, Status> {
    let secret = Zeroizing::new(request.secret);
    let id = HostId::from_random(random_bytes().map_err(|e| Status::internal(e.to_string()))?);
    let id_text = id.to_string();
    let mut write = server.store.write().await.map_err(failed)?;
    let now_ms = write.now_ms;
    let good = join_token::use_up(&mut write, &sha256_hex(secret.as_bytes()), &id_text, now_ms)
        .await
        .map_err(failed)?;
    if !good {
        drop(write);
        tracing::warn!("a host tried to join with a token that is unknown, used or too old");
        return Err(Status::permission_denied(
            "the join token is unknown, used or too old: make a new one with `vmseal host add`",
        ));
    }
    let certificate = server.ca.sign_host(&request.csr_pem, id, now_ms).map_err(|error| {
        let text = causes(&error);
        match error {
            CaError::Request(_) | CaError::Algorithm => Status::invalid_argument(text),
            _ => Status::internal(text),
        }
    })?;
    let name = free_name(&mut write, &request.hostname, &id_text).await?;
    let machine_id: String =
        request.machine_id.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
    let new = NewHost {
        id: &id_text,
        name: &name,
        machine_id: &machine_id,
        certificate_sha256: &certificate.sha256,
        certificate_expires_ms: certificate.expires_ms,
    };
    host::insert(&mut write, &new, now_ms).await.map_err(failed)?;
    let who = format!("host:{name}");
    let object = format!("/hosts/{name}");
    let entry = Entry { who: &who, verb: "host.join", object: &object, outcome: DONE, detail: &id_text };
    write.audit(&entry).await.map_err(failed)?;
    write.commit().await.map_err(failed)?;
    tracing::info!(host = name, id = id_text, "a host joined");
    Ok(JoinReply { host_id: id_text, certificate_pem: certificate.pem, ca_pem: server.ca.pem().to_owned() })
}

/// The host name, cleaned; with a number behind it if it is taken.
async fn free_name(write: &mut Write, hostname: &str, id: &str) -> Result<String, Status> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let mut name: String = hostname.chars().filter(|c| plain(*c)).take(64).collect();
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        name = format!("host-{id}");
    }
    for number in 1..1000u32 {
        let tried = if number == 1 { name.clone() } else { format!("{name}-{number}") };
        if !RESERVED.contains(&tried.as_str()) && !host::is_taken(write, &tried).await.map_err(failed)? {
            return Ok(tried);
        }
    }
    Ok(format!("{name}-{id}"))
}
