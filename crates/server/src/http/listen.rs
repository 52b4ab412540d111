//! Where the API is: HTTPS for everybody, a local socket for the machine's root.

use std::{sync::Arc, time::Duration};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::call::Peer;
use crate::shutdown::Shutdown;

/// Connections at a time, of either kind.
const MAX_CONNECTIONS: usize = 1024;
/// A peer that takes longer for a handshake, or for the head of a request, is dropped.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a request may go on when the server stops.
const FAREWELL: Duration = Duration::from_secs(2);
/// Longest head of a request.
const MAX_HEAD: usize = 64 * 1024;

/// Serves the local socket until `stop` changes.
pub(crate) async fn local(listener: UnixListener, router: Router, mut stop: Shutdown) {
    let mut served = Served::new();
    while let Some(permit) = served.turn(&mut stop).await {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.begun() => break,
        };
        let peer = match accepted.and_then(|(stream, _)| Ok((stream.peer_cred()?.uid(), stream))) {
            Ok(peer) => peer,
            Err(error) => {
                not_accepted(&error).await;
                continue;
            }
        };
        let (uid, stream) = peer;
        let router = router.clone().layer(Extension(Peer::Local { uid }));
        served.connections.spawn(serve(stream, router, stop.clone(), permit));
    }
    served.farewell().await;
}

/// Serves HTTPS until `stop` changes.
pub(crate) async fn https(listener: TcpListener, tls: Arc<ServerConfig>, router: Router, mut stop: Shutdown) {
    let acceptor = TlsAcceptor::from(tls);
    let router = router.layer(Extension(Peer::Remote));
    let mut served = Served::new();
    while let Some(permit) = served.turn(&mut stop).await {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.begun() => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                not_accepted(&error).await;
                continue;
            }
        };
        let (acceptor, router, stop) = (acceptor.clone(), router.clone(), stop.clone());
        served.connections.spawn(async move {
            // Only latency is lost if this fails.
            let _ = stream.set_nodelay(true);
            match timeout(PATIENCE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => serve(stream, router, stop, permit).await,
                Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
            }
        });
    }
    served.farewell().await;
}

/// The connections of one listener.
struct Served {
    limit: Arc<Semaphore>,
    connections: JoinSet<()>,
}

impl Served {
    fn new() -> Self {
        Self { limit: Arc::new(Semaphore::new(MAX_CONNECTIONS)), connections: JoinSet::new() }
    }

    /// Waits for room for one more; `None` when the server stops.
    async fn turn(&mut self, stop: &mut Shutdown) -> Option<OwnedSemaphorePermit> {
        while self.connections.try_join_next().is_some() {}
        tokio::select! {
            permit = Arc::clone(&self.limit).acquire_owned() => permit.ok(),
            () = stop.begun() => None,
        }
    }

    async fn farewell(mut self) {
        let all = async { while self.connections.join_next().await.is_some() {} };
        // Those that take longer are cut off when the set is dropped.
        let _ = timeout(FAREWELL, all).await;
    }
}

async fn not_accepted(error: &std::io::Error) {
    tracing::warn!(%error, "a connection was not accepted");
    // Out of descriptors, most likely: waiting lets some be closed.
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn serve<S>(stream: S, router: Router, mut stop: Shutdown, _permit: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop.begun() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended early");
    }
}
