//! Against a server in this process: a CA, its certificate for `vmseal-server`, and a gate that does as it is told.

use std::{path::Path, pin::Pin};

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, IsCa, Issuer, KeyPair,
};
use tokio::sync::mpsc::{Receiver, Sender, channel as queue};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, ServerTlsConfig},
};
use vmseal_api::agent::v1::{
    JoinReply, JoinRequest, KeysAvailable, Welcome,
    agent_gate_server::{AgentGate, AgentGateServer},
};
use vmseal_model::id::{HostId, TaskId};

use super::*;
use crate::{
    join::{JoinError, Joined, join},
    ports::{TaskReport, TaskSink},
    scratch::Scratch,
};

const HOST: HostId = HostId::from_bytes([7; 16]);
const LONG: Duration = Duration::from_secs(20);

/// A CA and the server's certificate.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    ca_sha256: String,
    chain_pem: String,
    key_pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name.push(DnType::CommonName, "test CA");
        let ca_key = KeyPair::generate().unwrap();
        let certificate = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().unwrap();
        let server = CertificateParams::new(vec![SERVER_NAME.to_owned()]).unwrap();
        let server = server.signed_by(&key, &issuer).unwrap();
        Self {
            ca_sha256: digest(&SHA256, certificate.der())
                .as_ref()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect(),
            ca_pem: certificate.pem(),
            chain_pem: server.pem() + &certificate.pem(),
            key_pem: key.serialize_pem(),
            issuer,
        }
    }

    fn token(&self, address: &str, secret: &str) -> String {
        let claims = serde_json::json!({"address": address, "ca_sha256": self.ca_sha256, "secret": secret});
        format!("vmseal1.{}", URL_SAFE_NO_PAD.encode(claims.to_string()))
    }
}

type Opened = (Sender<Result<ToAgent, Status>>, Streaming<FromAgent>);

/// Serves joins with the secret `good`; gives every session to the test.
struct Gate {
    authority: Arc<Authority>,
    sessions: Sender<Opened>,
}

#[tonic::async_trait]
impl AgentGate for Gate {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let request = request.into_inner();
        if request.secret != "good" {
            return Err(Status::permission_denied("the join token is unknown"));
        }
        let csr = CertificateSigningRequestParams::from_pem(&request.csr_pem).unwrap();
        let certificate_pem = csr.signed_by(&self.authority.issuer).unwrap().pem();
        let ca_pem = self.authority.ca_pem.clone();
        Ok(Response::new(JoinReply { host_id: HOST.to_string(), certificate_pem, ca_pem }))
    }

    type SessionStream = Pin<Box<dyn Stream<Item = Result<ToAgent, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<FromAgent>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        if request.peer_certs().is_none_or(|certs| certs.is_empty()) {
            return Err(Status::unauthenticated("no certificate"));
        }
        let (down, answers) = queue(16);
        self.sessions
            .send((down, request.into_inner()))
            .await
            .map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// A server on a port of its own; gone with the runtime.
async fn serve(authority: &Arc<Authority>) -> (String, Receiver<Opened>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sessions, opened) = queue(4);
    let gate = Gate { authority: Arc::clone(authority), sessions };
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(&authority.chain_pem, &authority.key_pem))
        .client_ca_root(Certificate::from_pem(&authority.ca_pem))
        .client_auth_optional(true);
    let server = Server::builder().tls_config(tls).unwrap().add_service(AgentGateServer::new(gate));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, opened)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn start(state_dir: &Path) -> (Arc<Uplink>, Arc<Keyring>, mpsc::Receiver<ServerEvent>) {
    let uplink = Arc::new(Uplink::new("not connected yet"));
    let keyring = Arc::new(Keyring::new(Arc::clone(&uplink)).unwrap());
    let (events, heard) = mpsc::channel();
    let session = Session {
        state_dir: state_dir.to_owned(),
        libvirt_uri: "test:///default".into(),
        uplink: Arc::clone(&uplink),
        keyring: Arc::clone(&keyring),
        floors: Arc::new(Floors::new(Arc::clone(&uplink))),
        warnings: Arc::new(Vec::new),
        events,
    };
    session.start().unwrap();
    (uplink, keyring, heard)
}

/// Takes the next session at the server and answers its hello.
async fn welcome(opened: &mut Receiver<Opened>) -> (Opened, Hello) {
    let (down, mut up) = opened.recv().await.unwrap();
    let Some(from_agent::Body::Hello(hello)) = up.next().await.unwrap().unwrap().body else {
        panic!("a hello")
    };
    let welcome = to_agent::Body::Welcome(Welcome { server_id: "s".into(), version: "0".into() });
    down.send(Ok(ToAgent { body: Some(welcome) })).await.unwrap();
    ((down, up), hello)
}

#[test]
fn host_joins_once_and_keeps_its_key() {
    let (scratch, runtime, authority) = (Scratch::new(), runtime(), Arc::new(Authority::new()));
    runtime.block_on(async {
        let (address, _opened) = serve(&authority).await;
        let token = authority.token(&address, "good");
        assert_eq!(join(&token, scratch.path()).await.unwrap(), Joined::Now(HOST));
        let key = HostIdentity::load(scratch.path()).unwrap().unwrap().key_pem;
        assert_eq!(join(&token, scratch.path()).await.unwrap(), Joined::Before(HOST));
        assert_eq!(HostIdentity::load(scratch.path()).unwrap().unwrap().key_pem, key);
        let other = Authority::new().token(&address, "good");
        assert!(matches!(join(&other, scratch.path()).await, Err(JoinError::OtherServer { .. })));
    });
}

#[test]
fn server_with_another_ca_gets_no_secret() {
    let (scratch, runtime, authority) = (Scratch::new(), runtime(), Arc::new(Authority::new()));
    runtime.block_on(async {
        let (address, _opened) = serve(&authority).await;
        let token = Authority::new().token(&address, "good");
        assert!(matches!(join(&token, scratch.path()).await, Err(JoinError::Authority { .. })));
        let refused = join(&authority.token(&address, "bad"), scratch.path()).await.unwrap_err();
        assert!(refused.to_string().contains("the join token is unknown"), "{refused}");
    });
    assert!(HostIdentity::load(scratch.path()).unwrap().is_none());
}

#[test]
fn token_that_is_none_says_what_is_wrong() {
    let (scratch, runtime) = (Scratch::new(), runtime());
    let good = Authority::new().token("127.0.0.1:1", "good");
    let no_address = Authority::new().token("here", "good");
    for (token, reason) in [
        ("", "vmseal1."),
        (&good[..good.len() - 9], "cut off"),
        (no_address.as_str(), "no address"),
        (&good, "cannot be reached"),
    ] {
        let error = runtime.block_on(join(token, scratch.path())).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(!error.contains("good"), "{error}");
    }
}

#[test]
fn session_greets_passes_messages_both_ways_and_comes_back() {
    let (scratch, runtime, authority) = (Scratch::new(), runtime(), Arc::new(Authority::new()));
    let (address, mut opened) = runtime.block_on(serve(&authority));
    runtime.block_on(join(&authority.token(&address, "good"), scratch.path())).unwrap();
    let (uplink, keyring, heard) = start(scratch.path());

    let ((down, mut up), hello) = runtime.block_on(welcome(&mut opened));
    assert_eq!((hello.protocol, hello.session_public_key), (PROTOCOL, keyring.session_public_key().to_vec()));
    assert_eq!(heard.recv_timeout(LONG), Ok(ServerEvent::Connected));

    let report = TaskReport {
        task: TaskId::from_bytes([2; 16]),
        state: vmseal_model::task::TaskState::Running,
        step: "vda copied".into(),
        done_bytes: 1,
        total_bytes: 2,
        message: String::new(),
        code: None,
        hint: String::new(),
    };
    uplink.report(report);
    let Some(from_agent::Body::TaskEvent(event)) = runtime.block_on(up.next()).unwrap().unwrap().body else {
        panic!("a task event")
    };
    assert_eq!(event.step, "vda copied");

    let available = to_agent::Body::KeysAvailable(KeysAvailable { provider: "main".into() });
    let command = Command { id: "c".into(), ..Default::default() };
    for body in [available, to_agent::Body::Command(command.clone())] {
        runtime.block_on(down.send(Ok(ToAgent { body: Some(body) }))).unwrap();
    }
    assert_eq!(heard.recv_timeout(LONG), Ok(ServerEvent::KeysAvailable(Some("main".parse().unwrap()))));
    assert_eq!(heard.recv_timeout(LONG), Ok(ServerEvent::Command(Box::new(command))));

    drop((down, up));
    assert_eq!(heard.recv_timeout(LONG), Ok(ServerEvent::Lost));
    let ((_down, mut up), _) = runtime.block_on(welcome(&mut opened));
    assert_eq!(heard.recv_timeout(LONG), Ok(ServerEvent::Connected));
    // What the task said last is said again.
    assert!(runtime.block_on(up.next()).unwrap().is_ok());
}

#[test]
fn host_that_has_not_joined_says_so_and_waits() {
    let scratch = Scratch::new();
    let (uplink, _keyring, _heard) = start(scratch.path());
    let said = || match uplink.send(from_agent::Body::Inventory(Default::default())) {
        Err(down) => down.reason,
        Ok(()) => panic!("there is no session"),
    };
    while !said().contains("has not joined") {
        thread::yield_now();
    }
}
