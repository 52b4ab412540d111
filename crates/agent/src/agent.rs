//! The agent put together: a configuration in, threads that run until the process ends out.
//!
//! The order matters: tasks that were interrupted hold their VMs before a hook could start one, and the hook's socket
//! is there before libvirtd is asked anything. Neither libvirtd nor the server need be there.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::UnixDatagram,
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver},
    },
    thread,
};

use vmseal_api::agent::v1::Warning;
use vmseal_keys::GrantError;
use vmseal_model::class::DiskClass;

use crate::{
    backend::{BackendLost, Backends},
    commands::{Commands, Fence},
    config::AgentConfig,
    doctor,
    floors::Floors,
    hook_server::{self, ListenError},
    hooks::Hooks,
    identity::{IdentityError, JoinedHost},
    inventory::Inventory,
    keyring::Keyring,
    libvirt::{Libvirt, LoadError},
    ports::{Hypervisor, KeySource, TaskSink},
    reconcile::Reconciler,
    repair::Repairer,
    session::Session,
    start::Starter,
    store::{Store, StoreError},
    tasks::Runner,
    uplink::Uplink,
    wanted::Wanted,
};

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// A file or directory.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is one already.
    #[error("another vmseal-agent works in {}", state_dir.display())]
    Running {
        /// Where.
        state_dir: PathBuf,
    },
    /// The records.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host's identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No secret memory.
    #[error("there is no memory for keys")]
    Keys(#[from] GrantError),
    /// libvirt's library.
    #[error(transparent)]
    Libvirt(#[from] LoadError),
    /// The hook's socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// Runs until the process ends.
///
/// # Errors
///
/// [`AgentError`] if it cannot begin.
pub fn run(config: AgentConfig) -> Result<(), AgentError> {
    let config = Arc::new(config);
    let _one = lock(&config.state_dir)?;
    let store = Arc::new(Store::open(&config.state_dir)?);
    store.damaged().iter().for_each(|error| tracing::error!("{error}"));
    make_dir(&config.run_dir, 0o755)?;

    let uplink = Arc::new(Uplink::new("it has not connected yet"));
    let keyring = Arc::new(Keyring::new(Arc::clone(&uplink))?);
    let floors = Arc::new(Floors::new(Arc::clone(&uplink)));
    let (lost_in, lost) = mpsc::channel();
    let backends = Arc::new(Backends::new(Arc::clone(&config), lost_in));
    let (events_in, events) = mpsc::channel();
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(Libvirt::start(&config.libvirt_uri, events_in)?);
    let wanted = Arc::new(Wanted::open(&config.state_dir));
    keyring.on_late({
        let wanted = Arc::clone(&wanted);
        move || wanted.ring()
    });
    let warnings = warnings(&config, &store);
    let inventory = Arc::new(Inventory::new(
        Arc::clone(&config),
        Arc::clone(&hypervisor),
        Arc::clone(&store),
        Arc::clone(&wanted),
        Arc::clone(&uplink),
        Arc::clone(&warnings),
    ));
    let runner = Arc::new(Runner::new(
        &config,
        Arc::clone(&hypervisor),
        Arc::clone(&keyring) as Arc<dyn KeySource>,
        Arc::clone(&store),
        Arc::clone(&uplink) as Arc<dyn TaskSink>,
    ));
    if let Some(joined) = JoinedHost::load(&config.state_dir)? {
        runner.set_host(joined.host);
        keyring.set_host(joined.host);
    }
    let starter = Arc::new(Starter {
        config: Arc::clone(&config),
        store: Arc::clone(&store),
        keys: Arc::clone(&keyring) as Arc<dyn KeySource>,
        floors: Arc::clone(&floors),
        backends: Arc::clone(&backends),
        uplink: Arc::clone(&uplink),
        host: Box::new({
            let state_dir = config.state_dir.clone();
            move || JoinedHost::load(&state_dir).ok().flatten().map(|joined| joined.host)
        }),
    });

    // From here on it is seen from outside.
    runner.resume_all();
    let hooks = Hooks {
        starter: Arc::clone(&starter),
        backends: Arc::clone(&backends),
        inventory: Arc::clone(&inventory),
        wanted: Arc::clone(&wanted),
        runner: Arc::clone(&runner),
    };
    hook_server::listen(&config.agent_socket(), Arc::new(hooks))?;
    follow_lost(lost, Arc::clone(&wanted))?;
    let changed = {
        let inventory = Arc::clone(&inventory);
        move |domain| {
            inventory.refresh(domain);
            inventory.send();
        }
    };
    wanted
        .work(Arc::clone(&starter), Arc::clone(&hypervisor), Arc::clone(&uplink), changed)
        .map_err(AgentError::Thread)?;
    let reconciler = Arc::new(Reconciler {
        config: Arc::clone(&config),
        hypervisor: Arc::clone(&hypervisor),
        store: Arc::clone(&store),
        backends,
        wanted: Arc::clone(&wanted),
        inventory: Arc::clone(&inventory),
        keyring: Arc::clone(&keyring),
        uplink: Arc::clone(&uplink),
    });
    spawn("reconcile", {
        let reconciler = Arc::clone(&reconciler);
        move || reconciler.follow(&events)
    })?;
    let (server_in, server) = mpsc::channel();
    let session = Session {
        state_dir: config.state_dir.clone(),
        libvirt_uri: config.libvirt_uri.clone(),
        uplink: Arc::clone(&uplink),
        keyring,
        floors,
        warnings,
        events: server_in,
    };
    session.start().map_err(AgentError::Thread)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), keys = %vmseal_keys::protection(), "vmseal-agent is ready");
    tell_systemd("READY=1");
    let commands = Arc::new(Commands {
        fence: Fence::open(&config.state_dir),
        at_work: Mutex::default(),
        repairer: Arc::new(Repairer { starter, reconciler }),
        config,
        hypervisor,
        store,
        runner,
        wanted,
        inventory,
        uplink,
    });
    commands.follow(&server);
    Ok(())
}

/// Takes the state directory for this process alone.
fn lock(state_dir: &Path) -> Result<File, AgentError> {
    make_dir(state_dir, 0o700)?;
    let path = state_dir.join("lock");
    let io = |action| {
        let path = path.clone();
        move |source| AgentError::Io { action, path, source }
    };
    let mut options = OpenOptions::new();
    let file =
        options.write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(io("open"))?;
    // SAFETY: the descriptor is open; no pointers.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } < 0 {
        let error = io::Error::last_os_error();
        return Err(match error.kind() {
            io::ErrorKind::WouldBlock => AgentError::Running { state_dir: state_dir.to_owned() },
            _ => io("lock")(error),
        });
    }
    Ok(file)
}

fn make_dir(path: &Path, mode: u32) -> Result<(), AgentError> {
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|source| AgentError::Io {
        action: "make",
        path: path.to_owned(),
        source,
    })
}

/// The host's findings, also for the disks it has, and what the store found damaged when it was opened.
fn warnings(config: &Arc<AgentConfig>, store: &Arc<Store>) -> Arc<dyn Fn() -> Vec<Warning> + Send + Sync> {
    let config = Arc::clone(config);
    let damaged: Vec<Warning> = store
        .damaged()
        .iter()
        .map(|error| Warning {
            code: "record-file-damaged".to_owned(),
            message: error.to_string(),
            hint: "start its VM, which writes the file anew; the damaged one is kept beside it".to_owned(),
        })
        .collect();
    let (root, store) = (Path::new("/"), Arc::clone(store));
    Arc::new(move || {
        let disks = store.vms().into_iter().flat_map(|vm| vm.disks);
        let devices = disks.filter(|disk| !disk.retired && disk.class == DiskClass::Ublk).count();
        let found = doctor::findings(&config, root).into_iter().chain(doctor::of_devices(root, devices));
        damaged.iter().cloned().chain(found).collect()
    })
}

fn follow_lost(lost: Receiver<BackendLost>, wanted: Arc<Wanted>) -> Result<(), AgentError> {
    spawn("lost", move || {
        while let Ok(BackendLost { plan }) = lost.recv() {
            wanted.lost(plan);
        }
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), AgentError> {
    thread::Builder::new().name(name.to_owned()).spawn(work).map(drop).map_err(AgentError::Thread)
}

/// Tells systemd that libvirtd may start now, where systemd wants to know.
fn tell_systemd(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = UnixDatagram::unbound().and_then(|from| from.send_to(state.as_bytes(), &socket));
    if let Err(error) = told {
        tracing::warn!("systemd is not told '{state}': {error}");
    }
}

/// Whether an agent listens on its socket.
pub fn is_running(config: &AgentConfig) -> bool {
    fs::symlink_metadata(config.agent_socket()).is_ok()
        && std::os::unix::net::UnixStream::connect(config.agent_socket()).is_ok()
}
