//! Plays the agent in the guest: a volume, its keeper, its warden.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use vmseal_disk::frame;
use vmseal_keys::{Dek, SecretShare, key_check, random_bytes};
use vmseal_model::{
    control::{
        CONTROL_VERSION, ControlReply, ControlRequest, DiskSetup, DiskStatus, ExportKind, KEY_SLOT_BYTES,
        SETUP_FD, Setup,
    },
    id::{DiskId, DomainUuid, VmId},
};

/// Who disk processes are.
const DISK_USER: u32 = 900;
/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A keeper with one disk.
pub(crate) struct Stage {
    keeper: Child,
    _setup: UnixStream,
    directory: PathBuf,
    pub(crate) disk: DiskId,
}

impl Stage {
    /// Serves `bytes` of this device, encrypted, to a warden. What belongs to it is in a directory of that name.
    pub(crate) fn start(name: &str, volume: &str, bytes: u64) -> Self {
        let directory = Path::new("/run").join(name);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        let (vm, disk) = (id(VmId::from_random), id(DiskId::from_random));
        let dek = Dek::generate().unwrap();
        let mut keys = SecretShare::create(KEY_SLOT_BYTES).unwrap();
        keys.as_mut_slice()[..Dek::LEN].copy_from_slice(dek.payload());
        let check = key_check(dek.payload(), vm, disk);
        let setup = Setup {
            version: CONTROL_VERSION,
            vm,
            domain: id(DomainUuid::from_random),
            host: None,
            waiting: false,
            pid_file: String::new(),
            disks: vec![DiskSetup {
                disk,
                target: "vda".into(),
                key_slot: 0,
                key_check: check.iter().map(|byte| format!("{byte:02x}")).collect(),
                unit_bytes: 512,
                payload_offset: 1 << 20,
                detached_header: false,
                presented_bytes: bytes,
                grows: false,
                read_only: false,
                discard: true,
                export: ExportKind::Ublk,
                serial: String::new(),
            }],
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new("/bin/vmseal-disk");
        command.arg("keeper").uid(DISK_USER).gid(DISK_USER).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(directory.join("log")).unwrap());
        let fd = theirs.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe; `fd` is open until after the spawn.
        unsafe {
            command.pre_exec(move || {
                let done =
                    if fd == SETUP_FD { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, SETUP_FD) };
                if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        let keeper = command.spawn().unwrap();
        let control = UnixListener::bind(directory.join("control.sock")).unwrap();
        let listener = UnixListener::bind(directory.join("disk.sock")).unwrap();
        let data = OpenOptions::new().read(true).write(true).open(volume).unwrap();
        let pid_files = File::open(&directory).unwrap();
        let fds: [BorrowedFd<'_>; 5] =
            [keys.as_fd(), control.as_fd(), pid_files.as_fd(), data.as_fd(), listener.as_fd()];
        frame::send(&ours, &setup, &fds).unwrap();
        Self { keeper, _setup: ours, directory, disk }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.join("disk.sock")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap()
    }

    pub(crate) fn status(&self) -> DiskStatus {
        match self.ask(&ControlRequest::Status, &[]) {
            ControlReply::Status(status) => status,
            other => panic!("no status but {other:?}"),
        }
    }

    /// Asks whichever worker there is.
    pub(crate) fn ask(&self, request: &ControlRequest, fds: &[BorrowedFd<'_>]) -> ControlReply {
        wait_for("an answer of the worker", || {
            let stream = UnixStream::connect(self.directory.join("control.sock")).ok()?;
            frame::send(&stream, request, fds).ok()?;
            Some(frame::receive(&stream).ok()??.0)
        })
    }

    /// Kills the keeper, and its worker with it.
    pub(crate) fn kill(mut self) -> String {
        self.keeper.kill().unwrap();
        self.keeper.wait().unwrap();
        self.log()
    }
}

/// A warden that has said that its device is ready.
pub(crate) struct Warden {
    process: Child,
    pub(crate) link: PathBuf,
}

impl Warden {
    /// Starts one; what it said if its device is not ready.
    pub(crate) fn start(disk: DiskId, socket: &Path) -> Result<Self, String> {
        Self::start_as(Command::new("/bin/vmseal-ublk"), disk, socket)
    }

    pub(crate) fn start_as(mut command: Command, disk: DiskId, socket: &Path) -> Result<Self, String> {
        command.args(["--queues", "2", "--depth", "32", "--disk", &disk.to_string(), "--socket"]).arg(socket);
        let log = OpenOptions::new().create(true).append(true).open("/run/warden.log").unwrap();
        let mut process = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut said).unwrap();
        match said.trim().split_once(' ') {
            Some(("ready", link)) => Ok(Self { process, link: link.into() }),
            _ => {
                assert_eq!(process.wait().unwrap().code(), Some(1), "{said}");
                Err(said)
            }
        }
    }

    pub(crate) fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Asks it to end.
    pub(crate) fn end(mut self) -> ExitStatus {
        kill(self.process.id() as i32, libc::SIGTERM);
        self.process.wait().unwrap()
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait(mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }

    /// `ublkb<n>`.
    pub(crate) fn device(&self) -> String {
        fs::canonicalize(&self.link).unwrap().file_name().unwrap().to_str().unwrap().to_owned()
    }
}

pub(crate) fn kill(pid: i32, signal: i32) {
    assert!(pid > 1);
    // SAFETY: a process that this program had started.
    unsafe { libc::kill(pid, signal) };
}

/// Looks again and again, without a better way to hear of it.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what} does not come within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn id<T>(of: fn([u8; 16]) -> T) -> T {
    of(random_bytes().unwrap())
}
