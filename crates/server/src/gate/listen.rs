//! The gate's port: accepts, shakes hands, hands over to gRPC.

use std::{io, sync::Arc, time::Duration};

use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Server as Grpc;

use super::Gate;
use crate::server::Server;
use crate::shutdown::Shutdown;

/// Handshakes and connections at a time.
const MAX_HANDSHAKES: usize = 256;
/// A peer that takes longer for a handshake is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How often a silent connection is asked whether it lives, and how long it may take to answer.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(10);

/// Serves agents until `stop` changes.
pub(crate) async fn serve(
    server: Arc<Server>,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    mut stop: Shutdown,
) {
    let (connections, incoming) = mpsc::channel::<io::Result<TlsStream<TcpStream>>>(16);
    let accepting = tokio::spawn(accept(listener, tls, connections, stop.clone()));
    let served = Grpc::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_ANSWER))
        // One session, and room for a join.
        .max_concurrent_streams(8)
        .add_service(Gate::service(server))
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), async move {
            // An error means that the sender is gone, which is a stop too.
            stop.begun().await;
        })
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the agents' gate ended");
    }
    accepting.abort();
}

async fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    connections: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
    mut stop: Shutdown,
) {
    let acceptor = TlsAcceptor::from(tls);
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let Ok(permit) = Arc::clone(&handshakes).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.begun() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: waiting lets some be closed.
                tracing::warn!(%error, "a connection at the agents' gate was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, connections) = (acceptor.clone(), connections.clone());
        tokio::spawn(async move {
            let _permit = permit;
            // Only latency is lost if this fails.
            let _ = stream.set_nodelay(true);
            match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => drop(connections.send(Ok(stream)).await),
                Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed at the agents' gate"),
                Err(_) => tracing::debug!(%peer, "TLS handshake took too long at the agents' gate"),
            }
        });
    }
}
