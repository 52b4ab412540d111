//! The processes that serve the disks of VMs: started with open volumes and keys, asked, ended, and watched.
//!
//! Locked files and keys in; sockets that QEMU can use out. A keeper lives in a session of its own and needs the agent
//! for nothing; an agent that comes back takes it on again. Which VM should have one is decided elsewhere; one that
//! ends though nobody asked is reported. What is done to one VM is done in order.

mod owner;
pub(crate) mod process;
mod upgrade;
mod warden;

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use vmseal_keys::{Dek, SecretError, SecretShare};
use vmseal_model::{
    class::DiskClass,
    control::{CONTROL_VERSION, ControlReply, ControlRequest, DiskStatus, KEY_SLOT_BYTES, Setup},
    id::{DomainUuid, HostId},
    refusal::Code,
};

pub use self::owner::repair_owner_blocks;
use self::{
    owner::{release, release_images},
    process::Process,
    upgrade::{is_outdated, upgrade},
    warden::Wardens,
};
use crate::{
    accounts,
    causes::causes,
    config::AgentConfig,
    control_frame::{self, FrameError},
    identity::JoinedHost,
    rbd::{Location, Served, Tool},
    socket_dir::{self, DiskSocket, Owner, SocketDirError},
    spawn::{Lifetime, ServiceUser, SpawnError, spawn},
    start::plan::{Plan, PlannedDisk},
    tasks::Refusal,
    volume::OpenVolume,
};

/// How long a new process may take to be ready.
const READY: Duration = Duration::from_secs(4);
/// How long a question may take.
const ANSWER: Duration = Duration::from_secs(2);
/// How long an end may take before it is enforced.
const END: Duration = Duration::from_secs(5);
/// Keeps the kernel from ending a disk process before the VMs it serves.
const OOM_SCORE: &str = "-900";

/// A keeper ended though nobody asked it to.
#[derive(Debug, Clone)]
pub struct BackendLost {
    /// What it served.
    pub plan: Arc<Plan>,
}

/// What a process is started for.
#[derive(Debug, Clone, Copy)]
pub enum Why {
    /// QEMU will start, unless libvirt has given up by then: a process that is there is from an earlier run, and ended.
    Starts {
        /// When libvirt gives up.
        until: Instant,
    },
    /// QEMU runs and lost its process: one that is there is the one it uses, and stays.
    Runs,
}

impl Why {
    fn check(self) -> Result<(), BackendError> {
        match self {
            Self::Starts { until } if Instant::now() >= until => Err(BackendError::TooLate),
            _ => Ok(()),
        }
    }
}

/// Why there is no backend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// One is there and has a client.
    #[error("its disks are still being served: {reason}")]
    InUse {
        /// In the disk process's words.
        reason: String,
    },
    /// One is there and says nothing.
    #[error("the disk process of the VM does not answer")]
    Silent(#[source] FrameError),
    /// Directory or sockets.
    #[error(transparent)]
    Sockets(#[from] SocketDirError),
    /// The program.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// A file.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Secret memory.
    #[error("there is no memory for the keys")]
    Memory(#[from] SecretError),
    /// It did not take its setup.
    #[error("the disk process did not take its setup; see {}", log.display())]
    NotTaken {
        /// Its log.
        log: PathBuf,
        /// Why.
        source: FrameError,
    },
    /// It took it and says no.
    #[error("the disk process refused: {reason}")]
    Refused {
        /// In its words.
        reason: String,
    },
    /// A disk that is to be a block device of the host is none.
    #[error("disk {target} gets no block device (ublk): {reason}")]
    NoDevice {
        /// The domain's name.
        name: String,
        /// The disk.
        target: String,
        /// Why, in one line.
        reason: String,
    },
    /// Nobody waits for it any longer.
    #[error("it took too long; nothing was started")]
    TooLate,
    /// Another VM's.
    #[error("the disk process on the VM's socket serves another VM or other disks")]
    OtherVm,
}

impl From<BackendError> for Refusal {
    fn from(error: BackendError) -> Self {
        let code = match &error {
            BackendError::InUse { .. } => Code::VolumeInUse,
            BackendError::Refused { .. } => Code::Failed,
            BackendError::OtherVm => Code::Conflict,
            _ => Code::HostNotReady,
        };
        let hint = match &error {
            BackendError::InUse { .. } => {
                "a QEMU is connected still: wait for it to end, or see which: ss -xp".to_owned()
            }
            BackendError::NoDevice { name, target, .. } => format!(
                "vmseal doctor says what the host lacks; without ublk, from the next start on: vmseal disk set --class \
                 compatible {name} {target}"
            ),
            BackendError::Silent(_) | BackendError::OtherVm => {
                "if no QEMU of this VM runs, end that process: ss -xlp names it by its control.sock"
                    .to_owned()
            }
            BackendError::TooLate => "start the VM again".to_owned(),
            BackendError::Memory(_) => {
                "raise LimitMEMLOCK of vmseal-agent, or end what uses up the memory".to_owned()
            }
            _ => "vmseal doctor says what the host lacks".to_owned(),
        };
        Self::new(code, causes(&error)).hint(hint)
    }
}

/// All disk processes of the host.
pub struct Backends {
    config: Arc<AgentConfig>,
    slots: Mutex<HashMap<DomainUuid, Arc<Slot>>>,
    generations: AtomicU64,
    /// Where the host's files are, `/` but for tests.
    root: PathBuf,
    lost: mpsc::Sender<BackendLost>,
}

/// One VM's place. Its lock is held while something is done to the VM's process.
#[derive(Default)]
struct Slot {
    keeper: Mutex<Option<Keeper>>,
    wardens: Mutex<Wardens>,
}

struct Keeper {
    generation: u64,
    process: Arc<Process>,
    plan: Arc<Plan>,
    since: Instant,
    /// The images of its disks that are behind helpers.
    images: Mutex<Vec<Served>>,
}

impl Backends {
    /// No processes yet; `lost` hears of those that end by themselves.
    pub fn new(config: Arc<AgentConfig>, lost: mpsc::Sender<BackendLost>) -> Self {
        let (slots, generations) = (Mutex::default(), AtomicU64::new(0));
        Self { config, slots, generations, root: "/".into(), lost }
    }

    /// Starts the process for `plan` and waits until it is ready. What becomes of one that is there already, and until
    /// when it is wanted, says `why`. `open` gives the volumes and keys in the plan's order; it runs when nothing of
    /// ours holds them.
    ///
    /// # Errors
    ///
    /// What `open` said, or [`BackendError`]: nothing is left behind then.
    pub fn start<E: From<BackendError>>(
        &self,
        plan: Plan,
        why: Why,
        open: impl FnOnce() -> Result<Vec<(OpenVolume, Dek)>, E>,
    ) -> Result<(), E> {
        let slot = self.slot(plan.domain);
        let mut keeper = lock(&slot.keeper);
        why.check()?;
        // One that an earlier agent started is known by its socket only.
        if keeper.is_none()
            && let Some((process, status)) = self.find(&plan)?
        {
            if matches!(why, Why::Runs) && !serves(&status, &plan) {
                return Err(BackendError::OtherVm.into());
            }
            let images = self.images_of(&plan);
            *keeper = Some(self.watch(plan.clone(), process, None, images, &slot));
        }
        if keeper.is_some() && matches!(why, Why::Runs) {
            return Ok(self.have_devices(&plan, &slot)?);
        }
        if let Some(old) = keeper.take() {
            match self.end(&old, false) {
                Ok(()) => {}
                Err(error) => {
                    *keeper = Some(old);
                    return Err(error.into());
                }
            }
        }
        if matches!(why, Why::Starts { .. }) {
            // A guest that runs keeps its devices while its keeper is away.
            self.end_devices(plan.domain, &slot, false)?;
            self.check_devices(&plan)?;
        }
        let volumes = open()?;
        match self.launch(&plan, &volumes) {
            Ok((process, child)) => {
                let images = volumes.into_iter().filter_map(|(volume, _)| volume.remote.map(Served::keep));
                let started = self.watch(plan.clone(), process, Some(child), images.collect(), &slot);
                let made = self.have_devices(&plan, &slot).and_then(|()| why.check());
                if let (Err(error), Why::Starts { .. }) = (&made, why) {
                    tracing::debug!(domain = %plan.domain, "ended what was begun: {}", causes(error));
                    self.end(&started, true)?;
                } else {
                    *keeper = Some(started);
                }
                Ok(made?)
            }
            Err(error) => {
                self.remove_sockets(plan.domain);
                Err(error.into())
            }
        }
    }

    /// Takes on a process that serves this plan already, with the wardens of its block devices; one that is missing is
    /// started again. True if there is such a process.
    ///
    /// # Errors
    ///
    /// [`BackendError::Silent`] if one is there and does not answer, [`BackendError::OtherVm`], [`BackendError::NoDevice`].
    pub fn adopt(&self, plan: &Plan) -> Result<bool, BackendError> {
        let slot = self.slot(plan.domain);
        let mut keeper = lock(&slot.keeper);
        if let Some(keeper) = &*keeper {
            self.have_images(keeper);
            self.have_devices(plan, &slot)?;
            return Ok(true);
        }
        let Some((process, status)) = self.find(plan)? else { return Ok(false) };
        if !serves(&status, plan) {
            return Err(BackendError::OtherVm);
        }
        tracing::info!(domain = %plan.domain, keeper = process.pid(), "took on the disk process of VM '{}'", plan.name);
        *keeper = Some(self.watch(plan.clone(), process, None, self.images_of(plan), &slot));
        let devices = self.have_devices(plan, &slot);
        self.replace_outdated(plan, &status);
        devices.map(|()| true)
    }

    /// Has a worker of an older program make room for one of the installed program. It serves either way.
    fn replace_outdated(&self, plan: &Plan, status: &DiskStatus) {
        let program = self.config.disk_program();
        if !is_outdated(status, &program) {
            return;
        }
        let name = &plan.name;
        match upgrade(&self.config.control_socket(plan.domain), &program) {
            Ok(()) => {
                tracing::info!(domain = %plan.domain, "the disk process of VM '{name}' goes on from {}", program.display());
            }
            Err(error) => {
                tracing::warn!(domain = %plan.domain, "the disk process of VM '{name}' stays version {}: {}", status.version, causes(&error));
            }
        }
    }

    /// How the process of a domain is; none if there is none, or it does not say.
    pub fn status(&self, domain: DomainUuid) -> Option<DiskStatus> {
        // Without the slot's lock: a start or an end that takes its time must not hold up an inventory.
        match control_frame::ask(
            &self.config.control_socket(domain),
            &ControlRequest::Status,
            Instant::now() + ANSWER,
        ) {
            Ok(ControlReply::Status(status)) => Some(status),
            _ => None,
        }
    }

    /// Domains with a process that this agent knows.
    pub fn domains(&self) -> Vec<DomainUuid> {
        let slots: Vec<_> =
            lock(&self.slots).iter().map(|(domain, slot)| (*domain, Arc::clone(slot))).collect();
        // A slot that is locked is being worked on, by a start or an end.
        let has_one = |slot: &Slot| slot.keeper.try_lock().is_ok_and(|keeper| keeper.is_some());
        slots.into_iter().filter(|(_, slot)| has_one(slot)).map(|(domain, _)| domain).collect()
    }

    /// Ends what serves a domain that had no QEMU at `moment`: its process, one that an earlier agent left, or only
    /// sockets. What was started later is for a start that came later, and stays.
    pub fn clear_out(&self, domain: DomainUuid, moment: Instant) {
        let slot = self.slot(domain);
        let mut keeper = lock(&slot.keeper);
        match keeper.take() {
            Some(younger) if younger.since >= moment => *keeper = Some(younger),
            Some(old) => {
                tracing::info!(%domain, "ending a disk process that no VM uses");
                if let Err(error) = self.end(&old, true) {
                    tracing::error!(%domain, "{}", causes(&error));
                    *keeper = Some(old);
                }
            }
            None => {
                if let Err(error) = self.end_devices(domain, &slot, true) {
                    tracing::error!(%domain, "{}", causes(&error));
                }
                self.end_unknown(domain);
            }
        }
    }

    /// Ends a process that an earlier agent left. By its sockets alone it is found, so they stay while it may live.
    fn end_unknown(&self, domain: DomainUuid) {
        let path = self.config.control_socket(domain);
        let ask = |request| control_frame::ask(&path, &request, Instant::now() + ANSWER);
        match ask(ControlRequest::Status) {
            Ok(ControlReply::Status(status)) => {
                tracing::info!(%domain, "ending a disk process that no VM uses");
                let process = self.process(status.keeper_pid);
                let _ = ask(ControlRequest::Stop { force: true });
                if let Ok(process) = process
                    && !process.wait_for(END)
                {
                    process.kill();
                    process.wait_for(END);
                }
                self.remove_sockets(domain);
            }
            // It says why it cannot serve, and ends.
            Ok(_) => self.remove_sockets(domain),
            Err(FrameError::Io(e)) if nobody_there(&e) => self.remove_sockets(domain),
            Err(error) => {
                let error = BackendError::Silent(error);
                tracing::error!(%domain, "a disk process that no VM uses stays: {}", causes(&error));
            }
        }
    }

    /// The process behind the control socket of a plan's domain.
    fn find(&self, plan: &Plan) -> Result<Option<(Process, DiskStatus)>, BackendError> {
        let path = self.config.control_socket(plan.domain);
        let until = Instant::now() + ANSWER;
        let status = loop {
            match control_frame::ask(&path, &ControlRequest::Status, until) {
                Ok(ControlReply::Status(status)) => break status,
                // It says why it cannot serve, and ends.
                Ok(_) => return Ok(None),
                // A worker that ended while it was asked; a keeper that listens on has the next one answer.
                Err(FrameError::Io(e)) if was_cut_off(&e) && Instant::now() < until => {}
                Err(FrameError::Io(e)) if nobody_there(&e) => return Ok(None),
                Err(error) => return Err(BackendError::Silent(error)),
            }
        };
        if status.domain != plan.domain {
            return Err(BackendError::OtherVm);
        }
        // One that ended between its answer and now is none.
        Ok(self.process(status.keeper_pid).ok().map(|process| (process, status)))
    }

    /// Whose name stands in owner blocks.
    fn host(&self) -> Option<HostId> {
        JoinedHost::load(&self.config.state_dir).ok().flatten().map(|joined| joined.host)
    }

    /// A keeper by the pid it told.
    fn process(&self, pid: i32) -> io::Result<Process> {
        let user = ServiceUser::find(&self.config.disk_user).ok().flatten();
        // SAFETY: takes nothing and cannot fail.
        let own = || unsafe { libc::geteuid() };
        Process::open_of(pid, user.map_or_else(own, |user| user.uid))
    }

    fn launch(&self, plan: &Plan, volumes: &[(OpenVolume, Dek)]) -> Result<(Process, Child), BackendError> {
        let user = ServiceUser::find(&self.config.disk_user)?;
        let owner = user.map(|user| Owner {
            uid: user.uid,
            gid: accounts::group(&self.config.qemu_group).unwrap_or(user.gid),
        });
        let mut keys = SecretShare::create(volumes.len() * KEY_SLOT_BYTES)?;
        for (slot, (_, dek)) in keys.as_mut_slice().chunks_exact_mut(KEY_SLOT_BYTES).zip(volumes) {
            slot[..Dek::LEN].copy_from_slice(dek.payload());
        }
        let socket = |disk: &PlannedDisk| match disk.class {
            DiskClass::Ublk => {
                DiskSocket { path: self.config.ublk_socket(plan.domain, &disk.target), for_root: true }
            }
            DiskClass::Compatible | DiskClass::Fast => {
                DiskSocket { path: self.config.disk_socket(plan.domain, &disk.target), for_root: false }
            }
        };
        let sockets: Vec<DiskSocket> = plan.disks.iter().map(socket).collect();
        let listeners = socket_dir::create(&self.config, plan.domain, &sockets, owner)?;
        let pid_files = socket_dir::open_dir(&self.config.libvirt_run_dir)?;
        let (log, log_path) = self.open_log(plan.domain)?;

        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| BackendError::Io { action, path, source }
        };
        let program = self.config.disk_program();
        let (setup, theirs) = UnixStream::pair().map_err(io("make a socket for", &program))?;
        let mut child = spawn(&program, "keeper", theirs, user, Lifetime::Own, Stdio::from(log))?;
        let process = match Process::open(child.id().cast_signed()) {
            Ok(process) => process,
            Err(source) => {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(BackendError::Io { action: "watch", path: program, source });
            }
        };
        let frame = Setup {
            version: CONTROL_VERSION,
            vm: plan.vm,
            domain: plan.domain,
            pid_file: format!("{}.pid", plan.name),
            disks: volumes.iter().map(|(volume, _)| volume.setup.clone()).collect(),
            host: volumes.iter().find_map(|(volume, _)| volume.holder),
            waiting: false,
        };
        let mut fds: Vec<BorrowedFd<'_>> = vec![keys.as_fd(), listeners.control.as_fd(), pid_files.as_fd()];
        for ((volume, _), listener) in volumes.iter().zip(&listeners.disks) {
            fds.push(volume.data.as_fd());
            fds.extend(volume.header.as_ref().map(File::as_fd));
            fds.push(listener.as_fd());
        }
        if accounts::is_root() {
            // Less protection is no reason to have no disks.
            let _ = fs::write(format!("/proc/{}/oom_score_adj", process.pid()), OOM_SCORE);
        }
        let handed_over = setup
            .set_write_timeout(Some(READY))
            .map_err(FrameError::from)
            .and_then(|()| control_frame::send(&setup, &frame, &fds));
        // Ours go now: if the process ends, whoever waits on its sockets must see that.
        drop(fds);
        drop((listeners, keys));
        let ready = handed_over
            .map_err(|source| BackendError::NotTaken { log: log_path.clone(), source })
            .and_then(|()| self.wait_until_ready(plan, log_path));
        if let Err(error) = ready {
            process.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok((process, child))
    }

    fn wait_until_ready(&self, plan: &Plan, log: PathBuf) -> Result<(), BackendError> {
        let path = self.config.control_socket(plan.domain);
        match control_frame::ask(&path, &ControlRequest::Status, Instant::now() + READY) {
            Ok(ControlReply::Status(status)) if status.domain == plan.domain && status.vm == plan.vm => {
                Ok(())
            }
            Ok(ControlReply::Refused { message }) => Err(BackendError::Refused { reason: message }),
            Ok(_) => Err(BackendError::OtherVm),
            Err(source) => Err(BackendError::NotTaken { log, source }),
        }
    }

    /// Ends a keeper, after its wardens; only with `force` while QEMU is connected.
    fn end(&self, keeper: &Keeper, force: bool) -> Result<(), BackendError> {
        let domain = keeper.plan.domain;
        self.end_devices(domain, &self.slot(domain), force)?;
        let ask = ControlRequest::Stop { force };
        let answer = control_frame::ask(&self.config.control_socket(domain), &ask, Instant::now() + ANSWER);
        match answer {
            Ok(ControlReply::Refused { message }) if !force => {
                return Err(BackendError::InUse { reason: message });
            }
            // Without an answer only an end that must be is enforced.
            Err(error) if !force && !keeper.process.wait_for(Duration::ZERO) => {
                return Err(BackendError::Silent(error));
            }
            _ => {}
        }
        if !keeper.process.wait_for(END) {
            tracing::warn!(%domain, keeper = keeper.process.pid(), "the disk process did not end; killed it");
            keeper.process.kill();
            keeper.process.wait_for(END);
        }
        self.remove_sockets(domain);
        let host = self.host();
        release(&keeper.plan, host);
        release_images(&keeper.images, Some(&keeper.plan), host);
        Ok(())
    }

    /// Has the end of a keeper waited for, and reported if nobody asked for it.
    fn watch(
        &self,
        plan: Plan,
        process: Process,
        child: Option<Child>,
        images: Vec<Served>,
        slot: &Arc<Slot>,
    ) -> Keeper {
        let generation = self.generations.fetch_add(1, Ordering::Relaxed);
        let (plan, process) = (Arc::new(plan), Arc::new(process));
        let keeper = Keeper {
            generation,
            process: Arc::clone(&process),
            plan: Arc::clone(&plan),
            since: Instant::now(),
            images: Mutex::new(images),
        };
        let (slot, lost) = (Arc::clone(slot), self.lost.clone());
        let wait = move || {
            process.wait_until(None);
            // Only our own child leaves something to be waited for.
            let status = child.and_then(|mut child| child.wait().ok());
            let mut keeper = lock(&slot.keeper);
            if keeper.as_ref().is_some_and(|keeper| keeper.generation == generation) {
                let ended = keeper.take();
                // Whoever starts it again opens the images anew.
                ended.iter().for_each(|ended| release_images(&ended.images, None, None));
                let how = status.map_or("ended".to_owned(), |status| format!("ended: {status}"));
                tracing::error!(domain = %plan.domain, keeper = process.pid(), "the disk process of VM '{}' {how}", plan.name);
                let _ = lost.send(BackendLost { plan });
            }
        };
        if let Err(error) = thread::Builder::new().name("keeper-watch".to_owned()).spawn(wait) {
            tracing::error!(domain = %keeper.plan.domain, "the disk process is not watched: {error}");
        }
        keeper
    }

    /// Has helpers watched that could not be when their disk process was taken on.
    fn have_images(&self, keeper: &Keeper) {
        let mut images = lock(&keeper.images);
        if images.is_empty() {
            *images = self.images_of(&keeper.plan);
        }
    }

    /// The images of a disk process that an earlier run of the agent started, watched over again.
    fn images_of(&self, plan: &Plan) -> Vec<Served> {
        let at =
            |disk: &PlannedDisk| Location::of_path(&disk.source)?.ok().map(|at| (disk.disk.to_string(), at));
        let images: Vec<_> = plan.disks.iter().filter_map(at).collect();
        if images.is_empty() {
            return Vec::new();
        }
        match Tool::new(&self.config) {
            Ok(tool) => images.iter().map(|(name, at)| Served::adopt(&tool, at, name)).collect(),
            Err(error) => {
                tracing::error!(domain = %plan.domain, "the helpers of its images are not watched: {error}");
                Vec::new()
            }
        }
    }

    fn open_log(&self, domain: DomainUuid) -> Result<(File, PathBuf), BackendError> {
        let dir = &self.config.log_dir;
        let path = dir.join(format!("disk-{domain}.log"));
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| BackendError::Io { action, path, source }
        };
        DirBuilder::new().recursive(true).mode(0o750).create(dir).map_err(io("make", dir))?;
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o640).custom_flags(libc::O_NOFOLLOW).open(&path);
        Ok((file.map_err(io("open", &path))?, path))
    }

    fn remove_sockets(&self, domain: DomainUuid) {
        if let Err(error) = socket_dir::remove(&self.config, domain) {
            tracing::warn!("{}", causes(&error));
        }
    }

    fn slot(&self, domain: DomainUuid) -> Arc<Slot> {
        Arc::clone(lock(&self.slots).entry(domain).or_default())
    }
}

fn serves(status: &DiskStatus, plan: &Plan) -> bool {
    let one = |disk: &PlannedDisk| status.disks.iter().any(|served| served.disk == disk.disk);
    status.vm == plan.vm && plan.disks.iter().all(one)
}

fn was_cut_off(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof)
}

fn nobody_there(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, NotADirectory, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | UnexpectedEof | NotADirectory)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
