//! Programs that serve: started, watched by their CPU clocks, ended with this one.

use std::{
    fs::{self, File},
    io,
    os::unix::{net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::error::{BenchError, Trying};

/// How long a program may take until it listens.
const READY: Duration = Duration::from_secs(20);
/// How often that is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// A program that serves. It ends with this value.
pub(crate) struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts it; what it says goes into `log`.
    pub(crate) fn start(mut command: Command, log: PathBuf) -> Result<Self, BenchError> {
        let name =
            Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = File::create(&log).trying(|| format!("creating {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        // SAFETY: system calls that take integers only are async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                // A session of its own, as a keeper makes for itself: the kernel shares processors out among sessions,
                // and who has none of its own would be treated as a part of the client.
                libc::setsid();
                match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        let child = command
            .spawn()
            .map_err(|error| BenchError::Program { program: name.clone(), why: error.to_string() })?;
        Ok(Self { child, name, log })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// A connection to a socket it is about to listen on.
    pub(crate) fn connect(&mut self, socket: &Path) -> Result<UnixStream, BenchError> {
        let deadline = Instant::now() + READY;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(stream),
                Err(error) if self.has_ended() || Instant::now() > deadline => {
                    return Err(self.broken(&format!("{}: {error}", socket.display())));
                }
                Err(_) => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// An error that tells what it said last.
    pub(crate) fn broken(&self, what: &str) -> BenchError {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        BenchError::Program { program: self.name.clone(), why: format!("{what}\n{}", log.trim_end()) }
    }

    fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time a process has used, all its threads together (those io_uring made for it too).
pub(crate) fn cpu_seconds(pid: i32) -> Result<f64, BenchError> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // The clock of a process: the complement of its id, and 2 for "scheduler, whole process" (clock_getcpuclockid(3)).
    let clock = (!pid << 3) | 2;
    // SAFETY: the pointer is to a whole timespec.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error()).trying(|| format!("reading the CPU clock of process {pid}"));
    }
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

/// Keeps processes, with all their threads, on one processor; `None` lets them go where they like.
///
/// Threads the kernel made for io_uring stay where they are: it does not let them be moved.
pub(crate) fn keep_on(pids: &[i32], cpu: Option<usize>) -> Result<(), BenchError> {
    for pid in pids {
        let folder = format!("/proc/{pid}/task");
        for thread in fs::read_dir(&folder).trying(|| format!("reading {folder}"))?.flatten() {
            let Ok(thread) = thread.file_name().to_string_lossy().parse() else { continue };
            // SAFETY: a set of processors is an array of integers, all zero is the empty one; it is whole for the call.
            unsafe {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                let all = 0..libc::CPU_SETSIZE as usize;
                all.filter(|each| cpu.is_none_or(|cpu| cpu == *each))
                    .for_each(|each| libc::CPU_SET(each, &mut set));
                libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &set);
            }
        }
    }
    Ok(())
}

/// The processors this one may use.
pub(crate) fn processors() -> Vec<usize> {
    // SAFETY: as above; the kernel fills the set, or leaves it empty.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        set
    };
    // SAFETY: the numbers are within the set.
    (0..libc::CPU_SETSIZE as usize).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) }).collect()
}
