//! The running server: what its parts share, how it starts, how it stops.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aws_lc_rs::hmac;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{broadcast, watch},
    task::JoinHandle,
};
use vmseal_api::{join::SERVER_NAME, paths, task::Task};
use vmseal_keys::{SecretError, random_bytes};
use vmseal_model::id::HostId;
use vmseal_provider::RootKey;

use crate::{
    audit::AuditKey,
    ca::{Ca, CaError},
    clock::Clock,
    config::ServerConfig,
    digest::hex,
    gate::{self, sessions::Sessions},
    http,
    login::LoginGuard,
    providers::Providers,
    sealing::{RootKeyMissing, Sealer, load_root_key},
    shutdown::Shutdown,
    store::{Store, StoreError, host, meta},
    tls::{self, Presented, TlsError},
};

/// Changes of tasks that a slow watcher may fall behind by.
const EVENTS: usize = 1024;
/// How often the server's certificate is made anew; it is good for a year.
const RENEWAL: Duration = Duration::from_secs(30 * 24 * 3600);

/// What the parts of the server share.
pub struct Server {
    /// The database.
    pub store: Store,
    /// The time.
    pub clock: Clock,
    /// Key providers.
    pub providers: Providers,
    /// Connected hosts.
    pub sessions: Sessions,
    /// Wrong passwords.
    pub logins: LoginGuard,
    /// Certificates.
    pub ca: Ca,
    /// Seals what the server keeps of its own.
    pub sealer: Sealer,
    /// Id of this installation.
    pub server_id: String,
    /// Higher at every start.
    pub fencing_token: u64,
    /// When it was started.
    pub started_ms: i64,
    /// `host:port` by which hosts reach the gate.
    pub gate_address: String,
    /// User this process runs as.
    pub own_uid: u32,
    pub(crate) root: RootKey,
    fingerprint_key: hmac::Key,
    events: broadcast::Sender<Task>,
    stop: watch::Sender<bool>,
}

impl Server {
    /// Tells those who watch that a task changed.
    pub(crate) fn tell(&self, task: Task) {
        // Nobody watching is no error.
        let _ = self.events.send(task);
    }

    /// Changes of tasks from now on.
    pub(crate) fn watch_tasks(&self) -> broadcast::Receiver<Task> {
        self.events.subscribe()
    }

    /// Tells when the server stops.
    pub(crate) fn stopping(&self) -> Shutdown {
        Shutdown::of(&self.stop)
    }

    /// Keyed digest of a request: it tells two apart and tells nothing about what is in them.
    pub(crate) fn fingerprint(&self, parts: &[&[u8]]) -> String {
        let mut context = hmac::Context::with_key(&self.fingerprint_key);
        for part in parts {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        hex(context.sign().as_ref())
    }
}

/// A server that serves.
pub struct Running {
    /// What its parts share.
    pub server: Arc<Server>,
    /// Where the HTTPS API is.
    pub https: SocketAddr,
    /// Where the agents' gate is.
    pub gate: SocketAddr,
    /// The local socket.
    pub socket: PathBuf,
    tasks: Vec<JoinHandle<()>>,
    _lock: File,
}

impl Running {
    /// Stops: lets what is being answered be answered, then closes the database.
    pub async fn stop(self) {
        self.server.stop.send_replace(true);
        self.server.sessions.end_all();
        for task in self.tasks {
            // A part that panicked has ended too.
            let _ = task.await;
        }
        // Best effort: the next start removes a socket that nobody listens on.
        let _ = fs::remove_file(&self.socket);
        self.server.store.close().await;
    }
}

/// Starts a server.
pub async fn start(config: &ServerConfig, clock: Clock) -> Result<Running, StartError> {
    directory(&config.state_dir, 0o700)?;
    directory(&config.run_dir, 0o755)?;
    let lock = lock(&config.state_dir)?;
    let database = config.state_dir.join("server.db");
    let needed = database.exists();
    let root = load_root_key(&config.root_key_path(), needed)?;
    let store = Store::open(&database, AuditKey::of(&root)?, clock.clone()).await?;
    let (server_id, fencing_token) = identify(&store).await?;
    let sealer = Sealer::of(&root)?;
    // Before a host has joined nobody trusts it: a first start that was cut short is gone on with.
    let trusted = host::any(&mut *store.read().await?).await?;
    let ca = Ca::open(&config.state_dir, &sealer, &server_id, trusted, clock.now_ms())?;
    let https_listener = listen(config.https_listen).await?;
    let gate_listener = listen(config.agent_listen).await?;
    let (https, gate) = (address(&https_listener)?, address(&gate_listener)?);
    let public = config.public_host();
    let names = names(&public);
    let presented = Arc::new(Presented::new(&ca, &names, clock.now_ms())?);
    let server = Arc::new(Server {
        providers: Providers::load(&store, &root).await?,
        sessions: Sessions::default(),
        logins: LoginGuard::default(),
        fingerprint_key: hmac::Key::new(hmac::HMAC_SHA256, root.derive("request-fingerprint")?.expose()),
        started_ms: clock.now_ms(),
        gate_address: with_port(&public, gate.port()),
        own_uid: rustix::process::geteuid().as_raw(),
        events: broadcast::Sender::new(EVENTS),
        stop: watch::Sender::new(false),
        store,
        clock,
        ca,
        sealer,
        server_id,
        fencing_token,
        root,
    });
    let socket = config.run_dir.join(paths::API_SOCKET);
    let local = local_socket(&socket)?;
    let router = http::router(Arc::clone(&server));
    let tasks = vec![
        tokio::spawn(http::listen::local(local, router.clone(), server.stopping())),
        tokio::spawn(http::listen::https(
            https_listener,
            tls::https(Arc::clone(&presented))?,
            router,
            server.stopping(),
        )),
        tokio::spawn(gate::serve(
            Arc::clone(&server),
            gate_listener,
            tls::gate(Arc::clone(&presented), &server.ca)?,
            server.stopping(),
        )),
        tokio::spawn(renew(Arc::clone(&server), presented, names)),
    ];
    tracing::info!(%https, %gate, socket = %socket.display(), server_id = server.server_id, "serving");
    Ok(Running { server, https, gate, socket, tasks, _lock: lock })
}

/// Id of the installation, made at the first start, and the token of this one.
async fn identify(store: &Store) -> Result<(String, u64), StartError> {
    let mut write = store.write().await?;
    let id = match meta::get(&mut write, meta::SERVER_ID).await? {
        Some(id) => id,
        None => {
            let id = HostId::from_random(random_bytes()?).to_string();
            meta::set(&mut write, meta::SERVER_ID, &id).await?;
            id
        }
    };
    let last = match meta::get(&mut write, meta::FENCING_TOKEN).await? {
        Some(text) => text.parse().map_err(|_| StoreError::row("fencing token", &text))?,
        None => 0u64,
    };
    // A database from a backup has an old token; the time lifts it over those given out meanwhile.
    let token = last.saturating_add(1).max(u64::try_from(write.now_ms).unwrap_or(0));
    meta::set(&mut write, meta::FENCING_TOKEN, &token.to_string()).await?;
    write.commit().await?;
    Ok((id, token))
}

fn directory(path: &Path, mode: u32) -> Result<(), StartError> {
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|source| StartError::File {
        what: "directory",
        path: path.to_owned(),
        source,
    })
}

/// One server to a state directory.
fn lock(state_dir: &Path) -> Result<File, StartError> {
    let path = state_dir.join("lock");
    let failed = |source| StartError::File { what: "lock", path: path.clone(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError::Running { state_dir: state_dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, source })
}

fn address(listener: &TcpListener) -> Result<SocketAddr, StartError> {
    listener.local_addr().map_err(|source| StartError::Listen { address: ([0, 0, 0, 0], 0).into(), source })
}

/// The local socket. Everybody may connect: who it is decides what they may do.
fn local_socket(path: &Path) -> Result<UnixListener, StartError> {
    let failed = |source| StartError::File { what: "socket", path: path.to_owned(), source };
    match fs::remove_file(path) {
        // The lock says that no other server listens on it.
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(failed(source)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).map_err(failed)?;
    Ok(listener)
}

/// Names and addresses the server's certificate is good for.
fn names(public: &str) -> Vec<String> {
    let bare = public.trim_start_matches('[').trim_end_matches(']');
    let mut names: Vec<String> =
        [bare, SERVER_NAME, "localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    names.dedup();
    names
}

/// `host:port`, with brackets around an IPv6 address.
fn with_port(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

async fn renew(server: Arc<Server>, presented: Arc<Presented>, names: Vec<String>) {
    let mut stop = server.stopping();
    loop {
        tokio::select! {
            () = tokio::time::sleep(RENEWAL) => {}
            () = stop.begun() => return,
        }
        if let Err(error) = presented.renew(&server.ca, &names, server.clock.now_ms()) {
            tracing::error!(
                error = crate::refusal::causes(&error),
                "the server's certificate was not renewed"
            );
        }
    }
}

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A file or directory.
    #[error("the {what} {path} cannot be used")]
    File {
        /// What it is.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is one already.
    #[error("another vmseal-server runs on {state_dir}")]
    Running {
        /// Its state directory.
        state_dir: PathBuf,
    },
    /// A port.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The root key.
    #[error(transparent)]
    RootKey(#[from] RootKeyMissing),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The authority.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Secret memory or randomness.
    #[error(transparent)]
    Memory(#[from] SecretError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_address_gets_brackets_in_front_of_the_port() {
        assert_eq!(with_port("::1", 7444), "[::1]:7444");
        assert_eq!(with_port("[::1]", 7444), "[::1]:7444");
        assert_eq!(with_port("vms.example", 7444), "vms.example:7444");
        assert_eq!(names("[fe80::2]")[0], "fe80::2");
    }
}
