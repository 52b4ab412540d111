//! Runs one pass of `vmseal-disk job` and says how far it is.
//!
//! A locked volume, a key and a clear file in; progress and at the end a hash out. The key goes as secret memory, files
//! as descriptors. The child is killed and waited for in every case: when this returns, nobody writes any more. What
//! is durable is the child's word, after its flush.

use std::{
    io::{self, BufRead, BufReader},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    process::{Child, ChildStderr, ExitStatus, Stdio},
    thread,
};

use vmseal_keys::{Dek, SecretError, SecretShare};
use vmseal_model::{
    control::{CONTROL_VERSION, Job, JobEvent, JobSetup, KEY_SLOT_BYTES},
    id::VmId,
};

use crate::{
    control_frame::{self, FrameError},
    spawn::{Lifetime, ServiceUser, SpawnError, spawn},
    volume::OpenVolume,
};

/// Milliseconds between two looks at whether the job is still wanted.
const LOOK_MS: i32 = 100;
/// Most bytes of a line of the child's log that are kept.
const MAX_LINE: usize = 1000;

/// The program that runs jobs.
#[derive(Debug, Clone)]
pub struct JobProgram {
    /// `vmseal-disk`.
    pub path: PathBuf,
    /// As whom.
    pub user: Option<ServiceUser>,
}

/// One pass.
pub struct JobOrder<'a> {
    /// The VM.
    pub vm: VmId,
    /// What to do.
    pub job: Job,
    /// The volume.
    pub volume: &'a OpenVolume,
    /// Its key.
    pub dek: &'a Dek,
    /// The clear file; not for [`Job::Zero`].
    pub other: Option<BorrowedFd<'a>>,
    /// Bytes of plaintext it is about.
    pub bytes: u64,
    /// Where to begin.
    pub from: u64,
}

/// Why a pass did not end well. What was reported durable is durable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// It did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// No memory for the key.
    #[error("no secret memory for the key")]
    Secret(#[from] SecretError),
    /// The socket.
    #[error("cannot speak to the job process")]
    Frame(#[from] FrameError),
    /// The system.
    #[error("cannot watch the job process")]
    Io(#[from] io::Error),
    /// It says why.
    #[error("{message}")]
    Failed {
        /// Its words.
        message: String,
    },
    /// It ended without a word.
    #[error("the job process ended ({status}){}", last_line(stderr))]
    Died {
        /// How.
        status: ExitStatus,
        /// The last line of its log.
        stderr: String,
    },
    /// The caller no longer wants it.
    #[error("stopped")]
    Unwanted,
}

fn last_line(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!(": {stderr}") }
}

/// What the caller says to each report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GoOn {
    /// Yes.
    Yes,
    /// End it.
    No,
}

impl JobProgram {
    /// Runs the pass to its end; gives the hash of [`Job::Verify`], else an empty text.
    ///
    /// `durable` is called at every report, with where it is durable; `wanted` often, and ends the pass by saying no.
    ///
    /// # Errors
    ///
    /// [`JobError`]; an error of `durable` ends the pass and comes back as it is.
    pub fn run<E: From<JobError>>(
        &self,
        order: &JobOrder<'_>,
        mut durable: impl FnMut(u64) -> Result<(), E>,
        wanted: impl Fn() -> GoOn,
    ) -> Result<String, E> {
        let mut running = self.start(order)?;
        loop {
            if wanted() == GoOn::No {
                return Err(JobError::Unwanted.into());
            }
            match running.event().map_err(E::from)? {
                None => {}
                Some(JobEvent::Progress { durable: bytes }) => durable(bytes.min(order.bytes))?,
                Some(JobEvent::Done { sha256 }) => return Ok(sha256),
                Some(JobEvent::Failed { message }) => return Err(JobError::Failed { message }.into()),
            }
        }
    }

    fn start(&self, order: &JobOrder<'_>) -> Result<Running, JobError> {
        let mut keys = SecretShare::create(KEY_SLOT_BYTES)?;
        keys.as_mut_slice()[..Dek::LEN].copy_from_slice(order.dek.payload());
        let mut disk = order.volume.setup.clone();
        disk.key_slot = 0;
        let setup = JobSetup {
            version: CONTROL_VERSION,
            vm: order.vm,
            disk,
            job: order.job,
            bytes: order.bytes,
            from: order.from,
        };
        let (ours, theirs) = UnixStream::pair()?;
        let mut child = spawn(&self.path, "job", theirs, self.user, Lifetime::WithParent, Stdio::piped())?;
        let log = child.stderr.take().map(keep_last_line);
        let running = Running { child, socket: ours, log, ended: None };
        let mut fds = vec![keys.as_fd(), order.volume.data.as_fd()];
        fds.extend(order.other);
        // A child that died at once closes its end; its log says more than the broken pipe.
        match control_frame::send(&running.socket, &setup, &fds) {
            Err(FrameError::Io(_)) => Ok(running),
            other => other.map(|()| running).map_err(JobError::from),
        }
    }
}

struct Running {
    child: Child,
    socket: UnixStream,
    log: Option<thread::JoinHandle<String>>,
    ended: Option<ExitStatus>,
}

impl Running {
    /// The next event, or none yet.
    fn event(&mut self) -> Result<Option<JobEvent>, JobError> {
        let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that outlives the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, LOOK_MS) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(None) } else { Err(error.into()) };
        }
        if ready == 0 {
            return Ok(None);
        }
        match control_frame::receive(&self.socket) {
            Ok(event) => Ok(Some(event)),
            // Its end is closed: it is gone.
            Err(FrameError::Io(_)) => {
                self.end();
                let stderr = self.log.take().and_then(|log| log.join().ok()).unwrap_or_default();
                let status = self.ended.ok_or(JobError::Unwanted)?;
                Err(JobError::Died { status, stderr })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Kills it if it still runs, and waits: after this nothing of it writes.
    fn end(&mut self) {
        if self.ended.is_some() {
            return;
        }
        // It may have ended by itself a moment ago, or still be saying why.
        if let Ok(Some(status)) = self.child.try_wait() {
            self.ended = Some(status);
            return;
        }
        let _ = self.child.kill();
        self.ended = self.child.wait().ok();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// Reads the child's log to its end, passes each line on and gives the last one.
fn keep_last_line(stderr: ChildStderr) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut last = String::new();
        for line in BufReader::new(stderr).split(b'\n') {
            let Ok(line) = line else { break };
            let text = String::from_utf8_lossy(&line[..line.len().min(MAX_LINE)]);
            let text: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            if !text.is_empty() {
                tracing::info!(target: "vmseal_disk", "{text}");
                last = text;
            }
        }
        last
    })
}
