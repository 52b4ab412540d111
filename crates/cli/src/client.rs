//! The public API from the client's side: one request at a time, over the server's unix socket or pinned HTTPS.
//!
//! Answers are bounded in size and time. An answer that is no success becomes a [`CliError`] with the problem's text,
//! hint and exit code. Nothing here prints.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    Method, Request, StatusCode,
    body::Bytes,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    runtime::Runtime,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use vmseal_api::{join::SERVER_NAME, paths, problem::Problem, secret_text::SecretText};
use vmseal_model::refusal::Code;
use zeroize::Zeroizing;

use crate::{error::CliError, pin, server_url::ServerUrl};

/// Most bytes of an answer.
const MAX_ANSWER_BYTES: usize = 64 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the server is, and as whom it is spoken to.
#[derive(Clone)]
pub(crate) enum Endpoint {
    /// The socket on the server's machine; the kernel says who calls.
    Socket(PathBuf),
    /// Elsewhere.
    Remote {
        /// Its address.
        url: ServerUrl,
        /// Trusts its CA only.
        tls: Arc<ClientConfig>,
        /// The session.
        token: Option<SecretText>,
    },
}

/// A client.
pub(crate) struct Client {
    endpoint: Endpoint,
    runtime: Runtime,
}

/// The body of a successful answer. May hold a secret, so it has no `Debug` and zeroes itself.
pub(crate) struct Answer(Zeroizing<Vec<u8>>);

impl Answer {
    /// As JSON, with whatever a newer server adds.
    pub(crate) fn json(&self) -> Result<serde_json::Value, CliError> {
        serde_json::from_slice(&self.0).map_err(|_| Self::unreadable())
    }

    /// As one of the API's types.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, CliError> {
        serde_json::from_slice(&self.0).map_err(|_| Self::unreadable())
    }

    // What serde says may quote the answer, and the answer may hold a token.
    fn unreadable() -> CliError {
        CliError::failed("the server's answer is not what this version expects")
            .hint("use the vmseal command of the server's version: vmseal --version; vmseal status")
    }
}

impl Client {
    /// A client; connects when something is asked.
    pub(crate) fn new(endpoint: Endpoint) -> Result<Self, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| CliError::failed(format!("cannot set up I/O: {e}")))?;
        Ok(Self { endpoint, runtime })
    }

    /// Runs something asynchronous beside the requests, such as waiting for Ctrl-C.
    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Connects, and checks who is there; sends nothing.
    pub(crate) fn greet(&self) -> Result<(), CliError> {
        let greeting = async {
            match &self.endpoint {
                Endpoint::Socket(path) => connecting(UnixStream::connect(path)).await.map(drop),
                Endpoint::Remote { url, tls, .. } => handshake(url, tls.clone()).await.map(drop),
            }
        };
        self.runtime.block_on(greeting).map_err(|f| self.explain(f))
    }

    /// GET.
    pub(crate) fn get(&self, path: &str) -> Result<Answer, CliError> {
        self.exchange(Method::GET, path, None)
    }

    /// POST with a body.
    pub(crate) fn post(&self, path: &str, body: &impl Serialize) -> Result<Answer, CliError> {
        // Room for all of it at once: it may hold a password, and a vector that grows leaves copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(64 << 10));
        serde_json::to_writer(&mut *bytes, body).expect("the API's types become JSON");
        self.exchange(Method::POST, path, Some(Bytes::from_owner(bytes)))
    }

    /// POST without a body.
    pub(crate) fn post_empty(&self, path: &str) -> Result<Answer, CliError> {
        self.exchange(Method::POST, path, None)
    }

    /// DELETE.
    pub(crate) fn delete(&self, path: &str) -> Result<Answer, CliError> {
        self.exchange(Method::DELETE, path, None)
    }

    fn exchange(&self, method: Method, path: &str, body: Option<Bytes>) -> Result<Answer, CliError> {
        let key = (method == Method::POST).then(idempotency_key).transpose()?;
        let once = || {
            let request = self.request(&method, path, body.clone(), key.as_deref())?;
            self.runtime.block_on(self.send(request))
        };
        match once() {
            // A GET changes nothing, a POST with a key is done once: a server that was just restarted is asked again.
            Err(Failure::Dropped(_)) if method != Method::DELETE => once().map_err(|f| self.explain(f)),
            other => other.map_err(|f| self.explain(f)),
        }
    }

    fn request(
        &self,
        method: &Method,
        path: &str,
        body: Option<Bytes>,
        key: Option<&str>,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = Request::builder().method(method).uri(path);
        match &self.endpoint {
            Endpoint::Socket(_) => request = request.header(HOST, "localhost"),
            Endpoint::Remote { url, token, .. } => {
                request = request.header(HOST, url.authority());
                if let Some(token) = token {
                    let bearer = Zeroizing::new(format!("Bearer {}", token.expose()));
                    let mut bearer = HeaderValue::from_str(&bearer).map_err(|_| Failure::Request)?;
                    bearer.set_sensitive(true);
                    request = request.header(AUTHORIZATION, bearer);
                }
            }
        }
        if let Some(key) = key {
            request = request.header(paths::IDEMPOTENCY_KEY, key);
        }
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request.body(Full::new(body.unwrap_or_default())).map_err(|_| Failure::Request)
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Answer, Failure> {
        match &self.endpoint {
            Endpoint::Socket(path) => {
                let stream = connecting(UnixStream::connect(path)).await?;
                converse(stream, request).await
            }
            Endpoint::Remote { url, tls, .. } => {
                let stream = handshake(url, tls.clone()).await?;
                converse(stream, request).await
            }
        }
    }

    fn explain(&self, failure: Failure) -> CliError {
        let place = match &self.endpoint {
            Endpoint::Socket(path) => path.display().to_string(),
            Endpoint::Remote { url, .. } => url.to_string(),
        };
        match (failure, &self.endpoint) {
            (Failure::Connect(e), Endpoint::Socket(path)) => no_socket(path, &e),
            (Failure::Connect(e), Endpoint::Remote { .. }) if pin::is_other_peer(&e) => CliError::coded(
                Code::Integrity,
                format!("{place} did not prove to be the server that was accepted at login: {e}"),
            )
            .hint("if the server was set up anew, compare its CA fingerprint and sign in again: vmseal logout --forget-server, then vmseal login --server URL"),
            (Failure::Connect(e), _) => {
                CliError::coded(Code::ServerUnreachable, format!("no server at {place}: {e}"))
                    .hint("check the address, the network and: systemctl status vmseal-server")
            }
            (Failure::Dropped(e), _) => CliError::coded(
                Code::ServerUnreachable,
                format!("the server at {place} ended the connection before it answered: {e}"),
            )
            .hint("look at: journalctl -u vmseal-server"),
            (Failure::Slow(limit), _) => CliError::coded(
                Code::ServerUnreachable,
                format!("the server at {place} did not answer within {} s", limit.as_secs()),
            )
            .hint("look at: journalctl -u vmseal-server"),
            (Failure::TooLong, _) => {
                CliError::failed(format!("the answer of {place} has more than {MAX_ANSWER_BYTES} bytes"))
            }
            (Failure::Request, _) => CliError::usage("a name or token holds characters that HTTP cannot carry"),
            (Failure::Own(e), _) => e,
            (Failure::Answer { status, body }, endpoint) => problem(status, &body, endpoint),
        }
    }
}

/// The chain that a server shows, its CA last. Nothing of ours is sent, not even a request.
pub(crate) fn look_at_chain(url: &ServerUrl) -> Result<Vec<Vec<u8>>, CliError> {
    let client =
        Client::new(Endpoint::Remote { url: url.clone(), tls: pin::danger_look_only()?, token: None })?;
    let Endpoint::Remote { tls, .. } = &client.endpoint else { unreachable!("made a line above") };
    let stream = client.block_on(handshake(url, tls.clone())).map_err(|f| client.explain(f))?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    Ok(chain.iter().map(|cert| cert.to_vec()).collect())
}

enum Failure {
    Connect(io::Error),
    Dropped(hyper::Error),
    Slow(Duration),
    TooLong,
    Request,
    Own(CliError),
    Answer { status: StatusCode, body: Zeroizing<Vec<u8>> },
}

impl From<CliError> for Failure {
    fn from(error: CliError) -> Self {
        Self::Own(error)
    }
}

async fn connecting<T>(connect: impl Future<Output = io::Result<T>>) -> Result<T, Failure> {
    timeout(CONNECT_TIMEOUT, connect)
        .await
        .map_err(|_| Failure::Slow(CONNECT_TIMEOUT))?
        .map_err(Failure::Connect)
}

async fn handshake(
    url: &ServerUrl,
    tls: Arc<ClientConfig>,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, Failure> {
    // Every server certificate of a vmseal CA carries this name, so an address or alias of the server needs none.
    let name = ServerName::try_from(SERVER_NAME).expect("a DNS name");
    connecting(async {
        let stream = TcpStream::connect((url.host.as_str(), url.port)).await?;
        TlsConnector::from(tls).connect(name, stream).await
    })
    .await
}

async fn converse<S>(stream: S, request: Request<Full<Bytes>>) -> Result<Answer, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let talk = async {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(Failure::Dropped)?;
        let driver = tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(Failure::Dropped)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
        driver.abort();
        let body = body.map_err(|e| match e.downcast::<hyper::Error>() {
            Ok(e) => Failure::Dropped(*e),
            Err(e) if e.is::<LengthLimitError>() => Failure::TooLong,
            Err(e) => Failure::Connect(io::Error::other(e)),
        })?;
        let body = Zeroizing::new(Vec::from(body.to_bytes()));
        if status.is_success() { Ok(Answer(body)) } else { Err(Failure::Answer { status, body }) }
    };
    timeout(ANSWER_TIMEOUT, talk).await.map_err(|_| Failure::Slow(ANSWER_TIMEOUT))?
}

fn no_socket(path: &Path, error: &io::Error) -> CliError {
    let place = path.display();
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            CliError::coded(Code::ServerUnreachable, format!("no server answers on {place}")).hint(
                "start it with: systemctl start vmseal-server; for one elsewhere: vmseal login --server URL",
            )
        }
        ErrorKind::PermissionDenied => {
            CliError::coded(Code::Forbidden, format!("{place} is for root on the server's machine"))
                .hint("use sudo, or sign in as a user: vmseal login --server URL")
        }
        _ => CliError::coded(Code::ServerUnreachable, format!("cannot connect to {place}: {error}")),
    }
}

fn problem(status: StatusCode, body: &[u8], endpoint: &Endpoint) -> CliError {
    let Ok(problem) = serde_json::from_slice::<Problem>(body) else {
        // Not our server's: a proxy, or something else that listens there.
        let code = if status.is_server_error() { Code::ServerUnreachable } else { Code::Failed };
        return CliError::coded(code, format!("the answer was {status} and says no more"))
            .hint("is this a vmseal server, and is nothing in between?");
    };
    let error = CliError::coded(problem.code(), problem.detail).details(problem.details);
    let remote = matches!(endpoint, Endpoint::Remote { .. });
    let error = match (Code::from_word(&problem.code), status) {
        (None, status) if status.is_client_error() => error.with_exit(crate::error::REFUSED),
        _ => error,
    };
    match problem.hint {
        Some(hint) => error.hint(hint),
        None if status == StatusCode::UNAUTHORIZED && remote => error.hint("sign in: vmseal login"),
        None => error,
    }
}

fn idempotency_key() -> Result<String, CliError> {
    let bytes = vmseal_keys::random_bytes::<16>()
        .map_err(|e| CliError::failed(format!("the system gives no random numbers: {e}")))?;
    Ok(vmseal_model::id::TaskId::from_random(bytes).to_string())
}
