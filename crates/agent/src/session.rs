//! The stream to the server: kept up by itself, messages in both directions, mutual TLS 1.3.
//!
//! Keys and floors go straight to who waits for them; everything else is an event on a channel. Runs tokio on a thread
//! of its own, so that nothing else in the agent has to know it. What a command means is not decided here.

use std::{
    error::Error,
    io,
    path::PathBuf,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Streaming,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use vmseal_api::{
    agent::{
        PROTOCOL,
        v1::{
            Command, FromAgent, Hello, ToAgent, Warning, agent_gate_client::AgentGateClient, from_agent,
            to_agent,
        },
    },
    join::SERVER_NAME,
};
use vmseal_keys::random_bytes;
use vmseal_model::id::ProviderId;

use crate::{
    causes::causes,
    floors::Floors,
    identity::{HostIdentity, hostname},
    keyring::Keyring,
    uplink::{QUEUE, Uplink},
};

/// Longest pause between two tries, and the first.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// How long connecting, and then the server's welcome, may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How often a silent connection is tried, and how long that may take.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// What the server wants, other than what somebody waits for.
#[derive(Debug, Clone, PartialEq)]
pub enum ServerEvent {
    /// A session stands: say what is here.
    Connected,
    /// It is gone.
    Lost,
    /// Do something.
    Command(Box<Command>),
    /// Keys that were missing may be had again; of all providers if none is named.
    KeysAvailable(Option<ProviderId>),
}

/// What a session needs.
pub struct Session {
    /// Where the host's certificate lies; a host that has not joined is waited for.
    pub state_dir: PathBuf,
    /// libvirt's URI, for the hello.
    pub libvirt_uri: String,
    /// What goes up.
    pub uplink: Arc<Uplink>,
    /// Who waits for keys.
    pub keyring: Arc<Keyring>,
    /// Who waits for floors.
    pub floors: Arc<Floors>,
    /// Findings of the host's doctor, for the hello.
    pub warnings: Arc<dyn Fn() -> Vec<Warning> + Send + Sync>,
    /// Gets everything else.
    pub events: mpsc::Sender<ServerEvent>,
}

impl Session {
    /// Begins to connect, on a thread of its own.
    ///
    /// # Errors
    ///
    /// If there can be no thread.
    pub fn start(self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new()
            .name("server-session".to_owned())
            .spawn(move || runtime.block_on(self.run()))?;
        Ok(())
    }

    async fn run(self) {
        let mut pause = PAUSE.0;
        let mut said = String::new();
        loop {
            let reason = match self.connect().await {
                Ok((address, out, answers)) => {
                    pause = PAUSE.0;
                    said.clear();
                    tracing::info!("session with the server at {address}");
                    self.uplink.opened(out);
                    let _ = self.events.send(ServerEvent::Connected);
                    let reason = format!("the session with {address} broke: {}", self.listen(answers).await);
                    self.uplink.closed(&reason);
                    let _ = self.events.send(ServerEvent::Lost);
                    reason
                }
                Err(reason) => {
                    self.uplink.closed(&reason);
                    reason
                }
            };
            self.keyring.session_lost(&reason);
            self.floors.session_lost();
            // The same reason is not written down every five seconds.
            if reason != said {
                tracing::warn!("{reason}; trying again");
                said = reason;
            }
            sleep(jittered(pause)).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Connects and greets; gives the server's address, the way up and the way down once the server said welcome.
    async fn connect(
        &self,
    ) -> Result<(String, tokio::sync::mpsc::Sender<FromAgent>, Streaming<ToAgent>), String> {
        let identity = HostIdentity::load(&self.state_dir)
            .map_err(|e| causes(&e))?
            .ok_or("this host has not joined a server; make a token with 'vmseal host add' and give it to 'vmseal-agent join'")?;
        self.keyring.set_host(identity.host.host);
        let address = identity.host.server.clone();
        let failed = |e: &dyn Error| format!("the vmseal server at {address} does not answer: {}", causes(e));
        let channel =
            channel(&identity.host.server, &identity.ca_pem, Some(&identity)).map_err(|e| failed(&*e))?;
        let channel =
            timeout(ANSWER, channel.connect()).await.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;

        let (out, queue) = tokio::sync::mpsc::channel(QUEUE);
        let hello = FromAgent { body: Some(from_agent::Body::Hello(self.hello())) };
        out.try_send(hello).map_err(|e| failed(&e))?;
        let mut client = AgentGateClient::<Channel>::new(channel);
        let opened =
            timeout(ANSWER, client.session(ReceiverStream::new(queue))).await.map_err(|e| failed(&e))?;
        let refused =
            |status: tonic::Status| format!("the vmseal server at {address} refused: {}", status.message());
        let mut answers = opened.map_err(refused)?.into_inner();
        match timeout(ANSWER, answers.message()).await.map_err(|e| failed(&e))?.map_err(refused)? {
            Some(ToAgent { body: Some(to_agent::Body::Welcome(_)) }) => Ok((address, out, answers)),
            Some(_) => {
                Err(format!("the server at {address} did not say welcome first; is it a vmseal server?"))
            }
            None => Err(format!("the vmseal server at {address} closed the session at once; see its log")),
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            hostname: hostname(),
            session_public_key: self.keyring.session_public_key().to_vec(),
            secret_memory: vmseal_keys::protection().to_string(),
            libvirt_uri: self.libvirt_uri.clone(),
            warnings: (self.warnings)(),
        }
    }

    /// Passes on what comes down until the stream ends; says why it did.
    async fn listen(&self, mut answers: Streaming<ToAgent>) -> String {
        loop {
            match answers.message().await {
                Ok(Some(message)) => self.heard(message),
                Ok(None) => return "the server closed it".to_owned(),
                Err(status) => return status.message().to_owned(),
            }
        }
    }

    fn heard(&self, message: ToAgent) {
        match message.body {
            Some(to_agent::Body::KeyGrant(grant)) => self.keyring.granted(&grant),
            Some(to_agent::Body::KeyRefused(refusal)) => self.keyring.refused(&refusal),
            Some(to_agent::Body::FloorReply(reply)) => self.floors.answered(reply),
            Some(to_agent::Body::Command(command)) => {
                let _ = self.events.send(ServerEvent::Command(Box::new(command)));
            }
            Some(to_agent::Body::KeysAvailable(keys)) => {
                let _ = self.events.send(ServerEvent::KeysAvailable(keys.provider.parse().ok()));
            }
            // A welcome again, or something a newer server says.
            Some(to_agent::Body::Welcome(_)) | None => {}
        }
    }
}

/// A connection to be, which accepts exactly the certificates of this CA; with the host's own certificate if it has one.
pub(crate) fn channel(
    server: &str,
    ca_pem: &str,
    identity: Option<&HostIdentity>,
) -> Result<Endpoint, Box<dyn Error + Send + Sync>> {
    let mut tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca_pem)).domain_name(SERVER_NAME);
    if let Some(identity) = identity {
        tls = tls.identity(Identity::from_pem(&identity.certificate_pem, &identity.key_pem));
    }
    Ok(Endpoint::from_shared(format!("https://{server}"))?
        .tls_config(tls)?
        .connect_timeout(ANSWER)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .keep_alive_while_idle(true))
}

/// Half to all of a pause, so that many hosts do not come back in one moment.
fn jittered(pause: Duration) -> Duration {
    let [byte] = random_bytes::<1>().unwrap_or([255]);
    pause / 2 + pause / 2 * u32::from(byte) / 255
}

#[cfg(test)]
mod tests;
