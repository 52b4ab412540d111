//! A real keeper and worker over volumes in test stores, as the agent starts them.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use vmseal_disk::frame;
use vmseal_keys::{SecretShare, random_bytes};
use vmseal_model::{
    control::{CONTROL_VERSION, ControlReply, ControlRequest, DiskStatus, KEY_SLOT_BYTES, SETUP_FD, Setup},
    id::DomainUuid,
};

use crate::{nbd_client::Client, volume::Volume};

/// How long something may take that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// The program under test, beside this one's own directory: `cargo build -p vmseal-disk` puts it there.
///
/// # Panics
///
/// If it is not there.
pub fn program() -> PathBuf {
    let own = std::env::current_exe().expect("this program has a path");
    let place = own.parent().and_then(Path::parent).map(|profile| profile.join("vmseal-disk"));
    let place = place.filter(|path| path.is_file());
    place.unwrap_or_else(|| {
        panic!("no vmseal-disk beside {}: run `cargo build -p vmseal-disk`", own.display())
    })
}

/// A directory below the system's temporary one (paths of sockets are short) that goes away.
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new one.
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vmseal-store-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).expect("a scratch directory");
        Self(path)
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running keeper, whose worker serves some volumes.
pub struct DiskProcess {
    keeper: Child,
    /// The agent's end of the setup socket.
    _setup: UnixStream,
    scratch: Scratch,
    sockets: Vec<PathBuf>,
}

impl DiskProcess {
    /// Starts it with volumes of one VM, each with its opened file.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn start(volumes: &[(&Volume, &File)]) -> Self {
        let scratch = Scratch::new();
        let (keeper, setup_socket) = spawn_keeper(&scratch.path("log"));
        let disks = volumes.iter().zip(0..).map(|((volume, _), slot)| volume.setup(slot)).collect();
        let vm = volumes.first().expect("a volume").0.vm;
        let domain = DomainUuid::from_random(random_bytes().expect("randomness"));
        let setup = Setup {
            version: CONTROL_VERSION,
            vm,
            domain,
            pid_file: String::new(),
            host: None,
            waiting: false,
            disks,
        };
        let mut keys = SecretShare::create(volumes.len() * KEY_SLOT_BYTES).expect("secret memory");
        for (slot, (volume, _)) in volumes.iter().enumerate() {
            keys.as_mut_slice()[slot * KEY_SLOT_BYTES..][..96].copy_from_slice(&volume.payload);
        }
        let control = UnixListener::bind(scratch.path("control.sock")).expect("a socket");
        let directory = File::open(&scratch.0).expect("a directory");
        let sockets: Vec<_> = (0..volumes.len()).map(|n| scratch.path(&format!("{n}.sock"))).collect();
        let listeners: Vec<_> =
            sockets.iter().map(|path| UnixListener::bind(path).expect("a socket")).collect();
        let mut fds: Vec<BorrowedFd<'_>> = vec![keys.as_fd(), control.as_fd(), directory.as_fd()];
        for ((_, file), listener) in volumes.iter().zip(&listeners) {
            fds.extend([file.as_fd(), listener.as_fd()]);
        }
        frame::send(&setup_socket, &setup, &fds).expect("the keeper takes its setup");
        Self { keeper, _setup: setup_socket, scratch, sockets }
    }

    /// A connection to one of the disks.
    ///
    /// # Errors
    ///
    /// The socket's, or a greeting that ended.
    pub fn connect(&self, disk: usize) -> io::Result<Client> {
        Client::connect(&self.sockets[disk])
    }

    /// A connection, tried again while a worker is being replaced.
    ///
    /// # Panics
    ///
    /// If none is to be had.
    pub fn connect_again(&self, disk: usize) -> Client {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.connect(disk) {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < until, "no connection: {error}\n{}", self.log()),
            }
        }
    }

    /// What the worker says of itself; asks again if it died meanwhile.
    ///
    /// # Panics
    ///
    /// If it does not answer.
    pub fn status(&self) -> DiskStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            let stream = UnixStream::connect(self.scratch.path("control.sock")).expect("the control socket");
            let sent = frame::send(&stream, &ControlRequest::Status, &[]);
            match sent.and_then(|()| frame::receive(&stream)) {
                Ok(Some((ControlReply::Status(status), _))) => return status,
                other => assert!(Instant::now() < until, "no status: {other:?}\n{}", self.log()),
            }
        }
    }

    /// Kills the worker; it may take until what it does in a store is released.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn kill_worker(&self) -> Pidfd {
        let pid = self.status().worker_pid;
        let fd = Pidfd::open(pid);
        kill(pid, libc::SIGKILL);
        fd
    }

    /// Kills the keeper, and with it the worker, and waits for the keeper; gives the worker.
    ///
    /// # Panics
    ///
    /// If they cannot be killed.
    pub fn kill_keeper(&mut self) -> Pidfd {
        let worker = Pidfd::open(self.status().worker_pid);
        self.keeper.kill().expect("our own child");
        self.keeper.wait().expect("our own child");
        worker
    }

    /// Waits until keeper or worker said something.
    ///
    /// # Panics
    ///
    /// If they do not.
    pub fn wait_for_log(&self, text: &str) {
        let until = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < until, "nobody said {text:?}:\n{}", self.log());
            std::thread::yield_now();
        }
    }

    /// What keeper and worker said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.scratch.path("log")).unwrap_or_default()
    }
}

impl Drop for DiskProcess {
    fn drop(&mut self) {
        // The worker dies with its keeper.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        if std::thread::panicking() {
            let _ = io::stderr().write_all(self.log().as_bytes());
        }
    }
}

/// `vmseal-disk keeper` with one end of a socket pair as descriptor 3; gives the other end.
fn spawn_keeper(log: &Path) -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let mut command = Command::new(program());
    let log = File::create(log).expect("a log");
    command.arg("keeper").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let fd = theirs.as_raw_fd();
    // SAFETY: these calls are async-signal-safe; `fd` is open until after the spawn. The keeper does not outlive the
    // thread that started it, whatever ends a test.
    unsafe {
        command.pre_exec(move || {
            let kept =
                if fd == SETUP_FD { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, SETUP_FD) };
            if kept < 0 || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    (command.spawn().expect("vmseal-disk starts"), ours)
}

/// Sends a signal to a process of this test's.
///
/// # Panics
///
/// If there is no such process.
pub fn kill(pid: i32, signal: i32) {
    assert!(pid > 1);
    // SAFETY: the pid is that of a process this test started, which is its only use.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "{}", io::Error::last_os_error());
}

/// A process, whosever child it is.
pub struct Pidfd(std::os::fd::OwnedFd);

impl Pidfd {
    /// The process with this number.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn open(pid: i32) -> Self {
        use std::os::fd::{FromRawFd, OwnedFd};
        // SAFETY: integers; the descriptor is new and ours alone.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32;
            assert!(fd >= 0, "process {pid}: {}", io::Error::last_os_error());
            Self(OwnedFd::from_raw_fd(fd))
        }
    }

    /// Whether it ends within that time.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, valid for the call.
        unsafe { libc::poll(&raw mut poll, 1, limit.as_millis() as i32) == 1 }
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// If that does not come.
    pub fn wait(&self) {
        assert!(self.ends_within(PATIENCE), "the process is still there");
    }
}
