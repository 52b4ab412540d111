//! Plays the agent: makes volumes, keys and listeners, starts a keeper, asks its worker who it is.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::Command,
};

use vmseal_disk::frame::{self, FrameError};
use vmseal_keys::{Dek, SecretShare, key_check, random_bytes};
use vmseal_model::{
    control::{
        CONTROL_VERSION, ControlReply, ControlRequest, DiskSetup, ExportKind, KEY_SLOT_BYTES, SETUP_FD, Setup,
    },
    id::{DiskId, DomainUuid, VmId},
};

use crate::{
    error::{BenchError, Trying},
    image::{self, DISK_BYTES, PAYLOAD_OFFSET},
    place::Scratch,
    process::Process,
};

/// Data units, as a disk with 512-byte sectors has them.
pub(crate) const UNIT: usize = 512;

/// A volume of ours.
pub(crate) struct Disk {
    setup: DiskSetup,
    socket: PathBuf,
    file: PathBuf,
    /// The very description the worker uses.
    data: File,
    key: [u8; 64],
}

impl Disk {
    /// The name of its export.
    pub(crate) fn name(&self) -> String {
        self.setup.disk.to_string()
    }

    /// Where its worker listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where its ciphertext lies.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// Its data key.
    pub(crate) fn key(&self) -> &[u8; 64] {
        &self.key
    }

    /// Whether the worker goes around the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        // SAFETY: F_GETFL takes no argument.
        let flags = unsafe { libc::fcntl(self.data.as_raw_fd(), libc::F_GETFL) };
        flags >= 0 && flags & libc::O_DIRECT != 0
    }
}

/// All that a keeper is started with.
pub(crate) struct Plan {
    setup: Setup,
    disks: Vec<Disk>,
    keys: SecretShare,
    control: UnixListener,
    directory: File,
    listeners: Vec<UnixListener>,
    control_path: PathBuf,
    log: PathBuf,
}

impl Plan {
    /// Volumes below `volumes`, sockets in `sockets`. `name` keeps several apart.
    pub(crate) fn new(
        name: &str,
        kinds: &[ExportKind],
        volumes: &Path,
        sockets: &Scratch,
    ) -> Result<Self, BenchError> {
        let keyed = |error| BenchError::peer("key memory", error);
        let random = || random_bytes().map_err(|error| BenchError::peer("random numbers", error));
        let vm = VmId::from_random(random()?);
        let mut keys = SecretShare::create(kinds.len() * KEY_SLOT_BYTES).map_err(keyed)?;
        let (mut disks, mut listeners) = (Vec::new(), Vec::new());
        for (slot, kind) in kinds.iter().enumerate() {
            let disk = DiskId::from_random(random()?);
            let dek = Dek::generate().map_err(keyed)?;
            let payload = dek.payload();
            keys.as_mut_slice()[slot * KEY_SLOT_BYTES..][..payload.len()].copy_from_slice(payload);
            let target = format!("vd{}", (b'a' + slot as u8) as char);
            let file = volumes.join(format!("{name}-{target}.img"));
            let socket = sockets.join(&format!("{name}-{target}.sock"));
            let data = image::create(&file, PAYLOAD_OFFSET)?;
            listeners.push(UnixListener::bind(&socket).trying(|| format!("binding {}", socket.display()))?);
            let check = key_check(payload, vm, disk);
            let setup = DiskSetup {
                disk,
                target,
                key_slot: slot as u32,
                key_check: check.iter().map(|byte| format!("{byte:02x}")).collect(),
                unit_bytes: UNIT as u32,
                payload_offset: PAYLOAD_OFFSET,
                detached_header: false,
                presented_bytes: DISK_BYTES,
                grows: false,
                read_only: false,
                discard: true,
                export: *kind,
                serial: String::new(),
            };
            let mut key = [0; 64];
            key.copy_from_slice(&payload[..64]);
            disks.push(Disk { setup, socket, file, data, key });
        }
        let control_path = sockets.join(&format!("{name}-control.sock"));
        let setup = Setup {
            host: None,
            waiting: false,
            version: CONTROL_VERSION,
            vm,
            domain: DomainUuid::from_random(random()?),
            pid_file: String::new(),
            disks: disks.iter().map(|disk| disk.setup.clone()).collect(),
        };
        Ok(Self {
            setup,
            disks,
            keys,
            control: UnixListener::bind(&control_path).trying(|| "binding a control socket".to_owned())?,
            directory: File::open(sockets.path()).trying(|| "opening the sockets' directory".to_owned())?,
            listeners,
            control_path,
            log: sockets.join(&format!("{name}.log")),
        })
    }

    /// Its disks.
    pub(crate) fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// Starts a keeper. It listens already: who connects waits for the worker to accept.
    pub(crate) fn start(&self) -> Result<Process, BenchError> {
        let (ours, theirs) = UnixStream::pair().trying(|| "making a setup socket".to_owned())?;
        let mut command = Command::new(beside("vmseal-disk")?);
        command.arg("keeper");
        let fd = theirs.as_raw_fd();
        // SAFETY: dup2 and fcntl are async-signal-safe; `fd` is open until after the spawn.
        unsafe {
            command.pre_exec(move || {
                let done =
                    if fd == SETUP_FD { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, SETUP_FD) };
                if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        let keeper = Process::start(command, self.log.clone())?;
        let mut fds: Vec<BorrowedFd<'_>> =
            vec![self.keys.as_fd(), self.control.as_fd(), self.directory.as_fd()];
        for (disk, listener) in self.disks.iter().zip(&self.listeners) {
            fds.extend([disk.data.as_fd(), listener.as_fd()]);
        }
        frame::send(&ours, &self.setup, &fds).map_err(|error| keeper.broken(&error.to_string()))?;
        Ok(keeper)
    }
}

/// A keeper and its worker.
pub(crate) struct Keeper {
    plan: Plan,
    process: Process,
    worker: i32,
}

impl Keeper {
    /// Starts them; they answer when this returns.
    pub(crate) fn start(plan: Plan) -> Result<Self, BenchError> {
        let process = plan.start()?;
        let ask = || -> Result<_, FrameError> {
            let stream = UnixStream::connect(&plan.control_path)?;
            frame::send(&stream, &ControlRequest::Status, &[])?;
            frame::receive(&stream)
        };
        match ask() {
            Ok(Some((ControlReply::Status(status), _))) => {
                Ok(Self { worker: status.worker_pid, plan, process })
            }
            Ok(_) => Err(process.broken("gives no status")),
            Err(error) => Err(process.broken(&FrameError::to_string(&error))),
        }
    }

    /// Keeper and worker.
    pub(crate) fn pids(&self) -> Vec<i32> {
        vec![self.process.pid(), self.worker]
    }

    /// Its disks, in the order of the plan.
    pub(crate) fn disks(&self) -> &[Disk] {
        &self.plan.disks
    }

    /// Connects to one of them.
    pub(crate) fn connect(&mut self, disk: usize) -> Result<UnixStream, BenchError> {
        self.process.connect(&self.plan.disks[disk].socket)
    }
}

/// A program built with this one.
pub(crate) fn beside(name: &str) -> Result<PathBuf, BenchError> {
    let here = std::env::current_exe().trying(|| "finding this program".to_owned())?;
    let path = here.with_file_name(name);
    if path.exists() {
        return Ok(path);
    }
    let why = format!("{} is not there: build it first", path.display());
    Err(BenchError::Program { program: name.to_owned(), why })
}
