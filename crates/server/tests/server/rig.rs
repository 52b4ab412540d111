//! A server in this process, and an administrator's client for its socket and its port.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, StatusCode, body::Bytes, body::Incoming, header};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::TlsConnector;
use vmseal_api::{
    join::SERVER_NAME,
    login::Session,
    paths,
    problem::Problem,
    provider::{Provider, ProviderBackup},
};
use vmseal_server::{
    clock::Clock,
    config::ServerConfig,
    server::{self, Running, Server, StartError},
};

/// Opens a backup.
pub(crate) const PASSWORD: &str = "VMSEAL-TEST-SECRET-backup";
/// A user's.
pub(crate) const USER_PASSWORD: &str = "VMSEAL-TEST-SECRET-user";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A server on directories of its own.
pub(crate) struct Rig {
    pub(crate) dir: PathBuf,
    pub(crate) config: ServerConfig,
    pub(crate) clock: Clock,
    running: Option<Running>,
}

impl Rig {
    pub(crate) async fn start() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("vmseal-server-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let local = "127.0.0.1:0".parse().unwrap();
        let config = ServerConfig {
            state_dir: dir.join("state"),
            run_dir: dir.join("run"),
            https_listen: local,
            agent_listen: local,
            public_address: "127.0.0.1".into(),
            root_key_file: PathBuf::new(),
        };
        let clock = Clock::default();
        let running = server::start(&config, clock.clone()).await.unwrap();
        Self { dir, config, clock, running: Some(running) }
    }

    pub(crate) fn running(&self) -> &Running {
        self.running.as_ref().expect("the rig's server runs")
    }

    pub(crate) fn server(&self) -> &Arc<Server> {
        &self.running().server
    }

    pub(crate) async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop().await;
        }
    }

    pub(crate) async fn start_again(&mut self) -> Result<(), StartError> {
        self.running = Some(server::start(&self.config, self.clock.clone()).await?);
        Ok(())
    }

    /// As root on the server's machine: the tests run as the server's own user.
    pub(crate) fn root(&self) -> Client<'_> {
        Client { rig: self, way: Way::Local, token: None, headers: Vec::new() }
    }

    /// Over the network, as nobody.
    pub(crate) fn remote(&self) -> Client<'_> {
        Client { way: Way::Remote, ..self.root() }
    }

    /// Over the network, in a new session of this user.
    pub(crate) async fn login(&self, name: &str, password: &str) -> Client<'_> {
        let asked = json!({"name": name, "password": password});
        let session: Session = self.remote().post(paths::LOGIN, &asked).await.good();
        Client { token: Some(session.token.expose().to_owned()), ..self.remote() }
    }

    /// Makes a provider and takes it through its backup.
    pub(crate) async fn provider(&self, name: &str) -> ProviderBackup {
        let root = self.root();
        let new = json!({"name": name, "kind": "native"});
        let made: Provider = root.post(paths::PROVIDERS, &new).await.good();
        assert!(!made.usable);
        self.back_up(name).await
    }

    /// Takes a provider through its backup.
    pub(crate) async fn back_up(&self, name: &str) -> ProviderBackup {
        let root = self.root();
        let export = paths::fill(paths::PROVIDER_EXPORT, name);
        let backup: ProviderBackup = root.post(&export, &json!({"password": PASSWORD})).await.good();
        let confirm = paths::fill(paths::PROVIDER_CONFIRM_BACKUP, name);
        let sent = json!({"p12": backup.p12, "password": PASSWORD});
        let confirmed: Provider = root.post(&confirm, &sent).await.good();
        assert!(confirmed.usable);
        backup
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[derive(Clone, Copy)]
enum Way {
    Local,
    Remote,
}

/// Sends requests, each over a connection of its own.
#[derive(Clone)]
pub(crate) struct Client<'a> {
    rig: &'a Rig,
    way: Way,
    token: Option<String>,
    headers: Vec<(&'static str, String)>,
}

impl Client<'_> {
    pub(crate) fn header(&self, name: &'static str, value: &str) -> Self {
        let mut client = self.clone();
        client.headers.push((name, value.to_owned()));
        client
    }

    pub(crate) fn token(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    /// Its session's token.
    pub(crate) fn shown_token(&self) -> String {
        self.token.clone().unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Answered {
        self.send(Method::GET, path, Vec::new()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answered {
        self.send(Method::DELETE, path, Vec::new()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &impl Serialize) -> Answered {
        self.send(Method::POST, path, serde_json::to_vec(body).unwrap()).await
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> Answered {
        let response = self.open(method, path, body).await;
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answered { status: head.status, headers: head.headers, body }
    }

    /// The answer's head, its body still to come.
    pub(crate) async fn open(&self, method: Method, path: &str, body: Vec<u8>) -> Response<Incoming> {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "vmseal");
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        match self.way {
            Way::Local => {
                exchange(UnixStream::connect(&self.rig.running().socket).await.unwrap(), request).await
            }
            Way::Remote => exchange(self.tls().await, request).await,
        }
    }

    async fn tls(&self) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(self.rig.server().ca.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(self.rig.running().https).await.unwrap();
        let name = ServerName::try_from(SERVER_NAME).unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }
}

async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> Response<Incoming>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender.send_request(request).await.unwrap()
}

/// An answer, whole.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) status: StatusCode,
    pub(crate) headers: hyper::HeaderMap,
    pub(crate) body: Bytes,
}

impl Answered {
    /// What it says, which must be good.
    #[track_caller]
    pub(crate) fn good<T: DeserializeOwned>(&self) -> T {
        assert!(self.status.is_success(), "{}: {}", self.status, String::from_utf8_lossy(&self.body));
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The problem it tells, which must have this code.
    #[track_caller]
    pub(crate) fn refused(&self, code: &str) -> Problem {
        let text = String::from_utf8_lossy(&self.body);
        assert!(!self.status.is_success(), "{}: {text}", self.status);
        assert_eq!(self.headers[header::CONTENT_TYPE], Problem::CONTENT_TYPE, "{text}");
        let problem: Problem = serde_json::from_slice(&self.body).unwrap();
        assert_eq!(problem.code, code, "{text}");
        assert_eq!(problem.status, self.status.as_u16());
        problem
    }

    pub(crate) fn value(&self) -> Value {
        self.good()
    }
}
