//! The agents' gate: joining, and the one stream each host keeps. Protocol: `docs/formats/agent-protocol.md`.
//!
//! A host is who the digest of its certificate says; what it writes about itself counts for nothing. Its messages are
//! handled in the order in which they come.

mod inventory;
mod join;
mod listen;
mod session;
pub mod sessions;

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use vmseal_api::agent::v1::{
    FromAgent, JoinReply, JoinRequest,
    agent_gate_server::{AgentGate, AgentGateServer},
};
use vmseal_model::id::HostId;

use crate::{
    digest::sha256_hex,
    refusal::causes,
    server::Server,
    store::{StoreError, host},
};
pub(crate) use listen::serve;
use sessions::Outgoing;

/// Most a host may send in one message: an inventory of thousands of disks.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// A host that proved who it is.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) id: HostId,
    pub(crate) name: String,
}

impl Host {
    /// As the audit names it.
    pub(crate) fn who(&self) -> String {
        format!("host:{}", self.name)
    }
}

/// The service.
struct Gate {
    server: Arc<Server>,
}

impl Gate {
    fn service(server: Arc<Server>) -> AgentGateServer<Self> {
        AgentGateServer::new(Self { server }).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// The host of the connection's certificate, which TLS has checked to be one of ours.
    async fn identify<T>(&self, request: &Request<T>) -> Result<Host, Status> {
        let certificates = request.peer_certs();
        let certificate = certificates
            .as_ref()
            .and_then(|chain| chain.first())
            .ok_or_else(|| Status::unauthenticated("a session needs the certificate that joining gave"))?;
        let digest = sha256_hex(certificate);
        let mut db = self.server.store.read().await.map_err(failed)?;
        match host::of_certificate(&mut db, &digest).await.map_err(failed)? {
            Some((id, name)) => {
                let id = id.parse().map_err(|_| failed(StoreError::row("host id", &id)))?;
                Ok(Host { id, name })
            }
            None => Err(Status::permission_denied("this host was removed: join again with a new token")),
        }
    }
}

#[tonic::async_trait]
impl AgentGate for Gate {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        join::join(&self.server, request.into_inner()).await.map(Response::new)
    }

    type SessionStream = ReceiverStream<Outgoing>;

    async fn session(
        &self,
        request: Request<Streaming<FromAgent>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let host = self.identify(&request).await?;
        let (session, stream): (_, mpsc::Receiver<Outgoing>) = self.server.sessions.open();
        let server = Arc::clone(&self.server);
        tokio::spawn(session::run(server, host, session, request.into_inner()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

fn failed(error: StoreError) -> Status {
    tracing::error!(error = causes(&error), "database, at the agents' gate");
    Status::internal(error.to_string())
}
