//! Plays the agent: makes key memory, volumes, listeners and a setup, starts a keeper, asks its worker.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::FileExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use vmseal_disk::frame;
use vmseal_keys::{Dek, SecretShare, key_check, random_bytes};
use vmseal_model::{
    control::{
        CONTROL_VERSION, ControlReply, ControlRequest, DiskSetup, DiskStatus, ExportKind, KEY_SLOT_BYTES,
        SETUP_FD, Setup,
    },
    id::{DiskId, DomainUuid, HostId, VmId},
};
use vmseal_xts::Cipher;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_vmseal-disk");
pub(crate) const MIB: u64 = 1 << 20;

/// A directory that goes away.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    /// Under the system's temporary directory: paths of unix sockets are short.
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vmseal-disk-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A disk to be made.
#[derive(Clone)]
pub(crate) struct Spec {
    pub(crate) presented: u64,
    /// Bytes of payload its file has at the start.
    pub(crate) stored: u64,
    pub(crate) unit: u32,
    pub(crate) payload_offset: u64,
    pub(crate) grows: bool,
    pub(crate) read_only: bool,
    pub(crate) discard: bool,
    pub(crate) detached_header: bool,
    /// Where its file lies, if not in the rig's own directory.
    pub(crate) directory: Option<PathBuf>,
}

impl Spec {
    /// A raw disk of fixed size.
    pub(crate) fn fixed(bytes: u64) -> Self {
        Self {
            presented: bytes,
            stored: bytes,
            unit: 512,
            payload_offset: 16 * MIB,
            grows: false,
            read_only: false,
            discard: true,
            detached_header: false,
            directory: None,
        }
    }

    /// A volume for qcow2: nothing stored, `bytes` shown.
    pub(crate) fn growing(bytes: u64) -> Self {
        Self { stored: 0, grows: true, ..Self::fixed(bytes) }
    }
}

/// A disk that was made.
pub(crate) struct Disk {
    pub(crate) id: DiskId,
    pub(crate) setup: DiskSetup,
    pub(crate) file: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) payload: [u8; 96],
    /// Where a store's helper connects to; takes the file's place.
    pub(crate) store: Option<OwnedFd>,
    /// Its detached header, where that is a real one.
    pub(crate) header: Option<PathBuf>,
}

impl Disk {
    /// A disk in `directory`, its key in the slot with this number.
    pub(crate) fn make(directory: &Path, target: &str, slot: u32, vm: VmId, spec: &Spec) -> Self {
        let id = DiskId::from_random(random_bytes().unwrap());
        let payload = *Dek::generate().unwrap().payload();
        let file = spec.directory.as_deref().unwrap_or(directory).join(format!("{target}.img"));
        let volume = File::create(&file).unwrap();
        volume.set_len(spec.payload_offset + spec.stored).unwrap();
        if !spec.grows {
            // As after an encryption: every unit was written.
            let mut zeros = vec![0; spec.stored as usize];
            cipher(&payload, spec.unit).encrypt(0, &mut zeros).unwrap();
            volume.write_all_at(&zeros, spec.payload_offset).unwrap();
        }
        let setup = DiskSetup {
            disk: id,
            target: target.into(),
            key_slot: slot,
            key_check: hex(&key_check(&payload, vm, id)),
            unit_bytes: spec.unit,
            payload_offset: spec.payload_offset,
            detached_header: spec.detached_header,
            presented_bytes: spec.presented,
            grows: spec.grows,
            read_only: spec.read_only,
            discard: spec.discard,
            export: ExportKind::default(),
            serial: String::new(),
        };
        Self {
            id,
            setup,
            file,
            socket: directory.join(format!("{target}.sock")),
            payload,
            store: None,
            header: None,
        }
    }

    pub(crate) fn open(&self) -> File {
        if let Some(store) = &self.store {
            return store.try_clone().unwrap().into();
        }
        OpenOptions::new().read(true).write(!self.setup.read_only).open(&self.file).unwrap()
    }

    /// Ciphertext as it lies in the file.
    pub(crate) fn stored(&self) -> Vec<u8> {
        fs::read(&self.file).unwrap().split_off(self.setup.payload_offset as usize)
    }

    /// What the file holds, decrypted by other means than the server's.
    pub(crate) fn stored_plain(&self) -> Vec<u8> {
        let mut bytes = self.stored();
        bytes.truncate(bytes.len() - bytes.len() % self.setup.unit_bytes as usize);
        cipher(&self.payload, self.setup.unit_bytes).decrypt(0, &mut bytes).unwrap();
        bytes
    }

    /// `nbd+unix://` for tools.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.id, self.socket.display())
    }
}

pub(crate) fn cipher(payload: &[u8; 96], unit: u32) -> Cipher {
    Cipher::new(payload[..64].try_into().unwrap(), unit as usize).unwrap()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Key memory with the keys of some disks in their slots.
pub(crate) fn key_memory(disks: &[Disk]) -> SecretShare {
    let mut share = SecretShare::create(disks.len() * KEY_SLOT_BYTES).unwrap();
    for (slot, disk) in disks.iter().enumerate() {
        let at = slot * KEY_SLOT_BYTES;
        share.as_mut_slice()[at..at + 96].copy_from_slice(&disk.payload);
    }
    share
}

/// Starts `vmseal-disk <role>` with one end of a socket pair as descriptor 3; gives the other end.
pub(crate) fn spawn(role: &str, log: &Path) -> (Child, UnixStream) {
    spawn_with(Command::new(BINARY), role, log)
}

/// The same with a command that names another copy of the program, or another user.
pub(crate) fn spawn_with(mut command: Command, role: &str, log: &Path) -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    command.arg(role).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(log).unwrap());
    let fd = theirs.as_raw_fd();
    // SAFETY: dup2 and fcntl are async-signal-safe; `fd` is open until after the spawn.
    unsafe {
        command.pre_exec(move || {
            let done =
                if fd == SETUP_FD { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, SETUP_FD) };
            if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    (command.spawn().unwrap(), ours)
}

/// What is to be started.
pub(crate) struct Plan {
    pub(crate) scratch: Scratch,
    pub(crate) vm: VmId,
    pub(crate) disks: Vec<Disk>,
    pub(crate) pid_file: String,
    /// Whose name goes into owner blocks.
    pub(crate) host: Option<HostId>,
    /// Whether it waits for volumes that are another's.
    pub(crate) waiting: bool,
}

impl Plan {
    pub(crate) fn new(specs: &[Spec]) -> Self {
        let scratch = Scratch::new();
        let vm = VmId::from_random(random_bytes().unwrap());
        let disks = specs
            .iter()
            .enumerate()
            .map(|(i, spec)| {
                let target = format!("vd{}", (b'a' + i as u8) as char);
                Disk::make(&scratch.0, &target, i as u32, vm, spec)
            })
            .collect();
        Self { scratch, vm, disks, pid_file: String::new(), host: None, waiting: false }
    }

    /// The same VM in another process: its files and keys, and sockets of its own.
    pub(crate) fn elsewhere(&self, host: HostId, waiting: bool) -> Self {
        let scratch = Scratch::new();
        let disks = self.disks.iter().map(|disk| Disk {
            setup: disk.setup.clone(),
            file: disk.file.clone(),
            header: disk.header.clone(),
            socket: scratch.path(&format!("{}.sock", disk.setup.target)),
            store: None,
            ..*disk
        });
        let disks = disks.collect();
        Self { scratch, vm: self.vm, disks, pid_file: String::new(), host: Some(host), waiting }
    }

    /// Starts a keeper with it.
    pub(crate) fn start(self) -> Rig {
        self.start_with(Command::new(BINARY))
    }

    pub(crate) fn start_with(self, command: Command) -> Rig {
        let (keeper, setup_socket) = spawn_with(command, "keeper", &self.scratch.path("log"));
        let setup = Setup {
            version: CONTROL_VERSION,
            vm: self.vm,
            domain: DomainUuid::from_random(random_bytes().unwrap()),
            pid_file: self.pid_file.clone(),
            disks: self.disks.iter().map(|disk| disk.setup.clone()).collect(),
            host: self.host,
            waiting: self.waiting,
        };
        let keys = key_memory(&self.disks);
        let control = UnixListener::bind(self.scratch.path("control.sock")).unwrap();
        let directory = File::open(&self.scratch.0).unwrap();
        let files: Vec<(File, Option<File>, UnixListener)> = self
            .disks
            .iter()
            .map(|disk| {
                let header = disk.setup.detached_header.then(|| match &disk.header {
                    Some(path) => OpenOptions::new().read(true).write(true).open(path).unwrap(),
                    None => File::open("/dev/null").unwrap(),
                });
                let data = disk.open();
                if self.host.is_some() && !self.waiting && disk.store.is_none() {
                    assert!(lock(&data, header.as_ref()), "a disk that is to be started is locked");
                }
                (data, header, UnixListener::bind(&disk.socket).unwrap())
            })
            .collect();
        let mut fds: Vec<BorrowedFd<'_>> = vec![keys.as_fd(), control.as_fd(), directory.as_fd()];
        for (data, header, listener) in &files {
            fds.push(data.as_fd());
            fds.extend(header.as_ref().map(AsFd::as_fd));
            fds.push(listener.as_fd());
        }
        frame::send(&setup_socket, &setup, &fds).unwrap();
        Rig { keeper, setup_socket: Some(setup_socket), plan: self }
    }
}

/// A running keeper and worker.
pub(crate) struct Rig {
    pub(crate) keeper: Child,
    /// The agent's end of the setup socket.
    pub(crate) setup_socket: Option<UnixStream>,
    pub(crate) plan: Plan,
}

impl Rig {
    /// One disk.
    pub(crate) fn with(spec: Spec) -> Self {
        Plan::new(&[spec]).start()
    }

    pub(crate) fn disk(&self) -> &Disk {
        &self.plan.disks[0]
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.plan.scratch.path(name)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Asks the worker; asks again if it died meanwhile, for the next one listens on the same socket.
    pub(crate) fn ask(&self, request: &ControlRequest) -> ControlReply {
        self.ask_with(request, &[])
    }

    /// The same, with descriptors.
    pub(crate) fn ask_with(&self, request: &ControlRequest, fds: &[BorrowedFd<'_>]) -> ControlReply {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let stream = UnixStream::connect(self.path("control.sock")).unwrap();
            let sent = frame::send(&stream, request, fds);
            match sent.and_then(|()| frame::receive(&stream)) {
                Ok(Some((reply, _))) => return reply,
                other => assert!(Instant::now() < deadline, "worker does not answer: {other:?}"),
            }
        }
    }

    pub(crate) fn status(&self) -> DiskStatus {
        match self.ask(&ControlRequest::Status) {
            ControlReply::Status(status) => status,
            other => panic!("no status but {other:?}"),
        }
    }

    pub(crate) fn stop(&self, force: bool) -> ControlReply {
        self.ask(&ControlRequest::Stop { force })
    }

    pub(crate) fn wait_for_keeper(&mut self) -> ExitStatus {
        self.keeper.wait().unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // The worker dies with its keeper.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        if std::thread::panicking() {
            let _ = std::io::stderr().write_all(self.log().as_bytes());
        }
    }
}

/// Takes a volume as the agent does: its owner block's bytes and those that QEMU looks at. False if somebody has one.
pub(crate) fn lock(data: &File, header: Option<&File>) -> bool {
    let set = |file: &File, command, kind: i32, start, len| {
        // SAFETY: all-zero is a valid flock; l_pid must be zero for OFD commands.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_start, lock.l_len) = (kind as libc::c_short, start, len);
        // SAFETY: `lock` outlives the call.
        let done = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } == 0;
        done && (command == libc::F_OFD_SETLK || i32::from(lock.l_type) == libc::F_UNLCK)
    };
    set(data, libc::F_OFD_SETLK, libc::F_WRLCK, 15 << 20, 4096)
        && header.is_none_or(|header| set(header, libc::F_OFD_SETLK, libc::F_WRLCK, 15 << 20, 4096))
        && [100, 200].into_iter().all(|at| set(data, libc::F_OFD_SETLK, libc::F_RDLCK, at, 4))
        && [100, 200].into_iter().all(|at| set(data, libc::F_OFD_GETLK, libc::F_WRLCK, at, 4))
}

pub(crate) fn kill(pid: i32, signal: i32) {
    assert!(pid > 1);
    // SAFETY: the pid is that of a keeper or worker this test started, which is its only use.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// Waits until a process is gone; it may be another's child.
pub(crate) fn wait_gone(pid: i32) {
    // SAFETY: pidfd_open takes integers and gives a descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as i32;
    if fd < 0 {
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ESRCH));
        return;
    }
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, valid for the call; the descriptor is closed once.
    let ready = unsafe {
        let ready = libc::poll(&mut poll, 1, 20_000);
        libc::close(fd);
        ready
    };
    assert_eq!(ready, 1, "process {pid} is still there");
}

/// Bytes that look random and can be made again.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
