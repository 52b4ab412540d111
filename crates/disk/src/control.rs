//! The control socket of a worker: how it is, and the order to end.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use vmseal_model::{
    control::{ControlReply, ControlRequest, DiskStatus, SandboxStatus},
    id::{DomainUuid, VmId},
};

use crate::{
    custody::Custody,
    export::Export,
    frame::{self, FrameError},
    latch::SharedPage,
    log::{self, Throttle},
    notice, peer, resize,
    worker::with_causes,
};

/// Most control connections at a time.
const MAX_CONTROL: usize = 8;
/// How long a connection may stay silent.
const SILENCE: Duration = Duration::from_secs(600);
/// How long requests in flight may take to end when their client is cut off.
const CUT: Duration = Duration::from_secs(5);
/// How long a worker with a bad setup waits to tell somebody.
const TELL: Duration = Duration::from_secs(60);
/// How long the one it tells may take to ask.
const ASK: Duration = Duration::from_secs(5);
/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a worker is, as control requests see it.
pub struct Worker {
    /// The VM.
    pub vm: VmId,
    /// Its libvirt UUID.
    pub domain: DomainUuid,
    /// Its keeper's process.
    pub keeper_pid: i32,
    /// The uid that set it up.
    pub owner: u32,
    /// The way to its keeper.
    pub keeper: Mutex<UnixStream>,
    /// What walls stand around it.
    pub sandbox: SandboxStatus,
    /// Its disks.
    pub exports: Vec<Arc<Export>>,
    /// Whose those are that are written.
    pub custody: Arc<Custody>,
    /// What the next worker is told.
    pub page: Arc<SharedPage>,
}

impl Worker {
    /// What it is and serves.
    pub fn status(&self) -> DiskStatus {
        DiskStatus {
            vm: self.vm,
            domain: self.domain,
            version: env!("CARGO_PKG_VERSION").into(),
            worker_pid: std::process::id().cast_signed(),
            keeper_pid: self.keeper_pid,
            secret_memory: vmseal_keys::protection().to_string(),
            sandbox: self.sandbox.clone(),
            phase: self.custody.phase(),
            disks: self.exports.iter().map(|export| export.status()).collect(),
        }
    }

    /// Tells the keeper that this worker serves.
    ///
    /// # Errors
    ///
    /// The keeper is gone.
    pub fn say_serves(&self) -> Result<(), FrameError> {
        notice::say_serves(&self.keeper())
    }

    /// Makes ready for a worker from another program: the keeper has taken it, what clients had asked for is answered,
    /// and nothing more is taken from them.
    ///
    /// # Errors
    ///
    /// One line that says why not; the worker serves on then.
    pub fn make_room(&self, program: Vec<OwnedFd>) -> Result<(), String> {
        let [program] = <[OwnedFd; 1]>::try_from(program).map_err(|_| {
            "an upgrade comes with one descriptor: the new program, opened for reading".to_owned()
        })?;
        // Held to the end: there is one upgrade.
        let keeper = self.keeper();
        notice::ask_upgrade(&keeper, program.as_fd()).map_err(|error| with_causes(&error))?;
        log::line(format_args!("making room for a worker from another program"));
        for export in &self.exports {
            export.stop_listening();
        }
        let deadline = Instant::now() + CUT;
        for export in &self.exports {
            export.finish_connections(deadline);
        }
        Ok(())
    }

    /// Everything that is no more than an order and its outcome. An error is one line that says why not.
    fn carry_out(&self, request: ControlRequest) -> Result<ControlReply, String> {
        let custody = &self.custody;
        let serving = |disks| ControlReply::Serving { disks };
        let outcome = match request {
            ControlRequest::Status => return Ok(ControlReply::Status(self.status())),
            ControlRequest::Drain { limit_ms } => custody.drain(limit_ms).map(|()| ControlReply::Drained),
            ControlRequest::HandOver { to } => {
                custody.hand_over(to).map(|disks| ControlReply::HandedOver { disks })
            }
            ControlRequest::Activate { ended } => custody.activate(ended).map(serving),
            ControlRequest::Resume { ended } => custody.resume(ended).map(serving),
            ControlRequest::Resize { disk, presented_bytes } => {
                let grown = resize::grow(&self.exports, custody, &self.page, disk, presented_bytes);
                let grown = grown.map_err(|error| with_causes(&error))?;
                return Ok(ControlReply::Resized { presented_bytes: grown });
            }
            ControlRequest::Stop { .. } | ControlRequest::Upgrade => {
                return Err("an order to end is not carried out here".into());
            }
        };
        outcome.map_err(|error| with_causes(&error))
    }

    fn keeper(&self) -> MutexGuard<'_, UnixStream> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes ready for the end: no new clients, none left, everything flushed.
    ///
    /// # Errors
    ///
    /// One line that says why not; the worker serves on then. With `force` there is always an end.
    pub fn make_ready_to_end(&self, force: bool) -> Result<(), String> {
        let open = self.exports.iter().find(|export| !export.close(force));
        if let Some(open) = open {
            self.exports.iter().for_each(|export| export.reopen());
            return Err(match (open.status().client_pid, open.seat().device()) {
                (0, Some(device)) => format!("{} is served as /dev/ublkb{device}", open.target()),
                (pid, _) => format!("{} is in use by process {pid}", open.target()),
            });
        }
        for export in &self.exports {
            export.cut_connections(CUT);
        }
        // What is another's is not this process's to flush, and a store without its lock may not answer.
        for export in self.exports.iter().filter(|_| self.custody.is_ours()) {
            if let Err(error) = export.volume().flush() {
                log::line(format_args!("{}: {error} at the end", export.target()));
                if !force {
                    self.exports.iter().for_each(|export| export.reopen());
                    return Err(format!("{}: {error}; what was written last may be lost", export.target()));
                }
            }
        }
        Ok(())
    }
}

/// Answers on the control socket for ever; an order to end ends the process.
pub fn serve(listener: &UnixListener, worker: &Arc<Worker>) -> ! {
    let connections = Arc::new(AtomicUsize::new(0));
    let refusals = Throttle::default();
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::line(format_args!("control: cannot accept: {error}"));
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if let Err(error) = peer::may_control(&stream, worker.owner) {
            refusals.line(format_args!("control: refused: {error}"));
            continue;
        }
        if connections.fetch_add(1, Ordering::AcqRel) >= MAX_CONTROL {
            connections.fetch_sub(1, Ordering::AcqRel);
            refusals.line(format_args!("control: refused: too many connections"));
            continue;
        }
        let (worker, count) = (worker.clone(), Count(connections.clone()));
        let started = thread::Builder::new().name("control".into()).spawn(move || {
            let _count = count;
            answer(&stream, &worker);
        });
        if let Err(error) = started {
            log::line(format_args!("control: cannot start a thread: {error}"));
        }
    }
}

struct Count(Arc<AtomicUsize>);

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn answer(stream: &UnixStream, worker: &Worker) {
    let _ = stream.set_read_timeout(Some(SILENCE));
    let _ = stream.set_write_timeout(Some(ASK));
    loop {
        let reply = match frame::receive(stream) {
            Ok(Some((ControlRequest::Stop { force }, _))) => match worker.make_ready_to_end(force) {
                Ok(()) => {
                    log::line(format_args!("ending as asked"));
                    let _ = frame::send(stream, &ControlReply::Stopping, &[]);
                    crate::end_process(crate::EXIT_DONE);
                }
                Err(message) => ControlReply::Refused { message },
            },
            Ok(Some((ControlRequest::Upgrade, fds))) => match worker.make_room(fds) {
                Ok(()) => {
                    let _ = frame::send(stream, &ControlReply::Upgrading, &[]);
                    crate::end_process(crate::EXIT_UPGRADE);
                }
                Err(message) => ControlReply::Refused { message },
            },
            Ok(Some((request, _))) => match worker.carry_out(request) {
                Ok(reply) => reply,
                Err(message) => ControlReply::Refused { message },
            },
            Ok(None) => return,
            Err(error) => {
                let _ = frame::send(stream, &ControlReply::Refused { message: error.to_string() }, &[]);
                return log::line(format_args!("control: {error}"));
            }
        };
        if let Err(error) = frame::send(stream, &reply, &[]) {
            return log::line(format_args!("control: {error}"));
        }
    }
}

/// Tells the first one who may ask that this worker cannot serve, and why. Gives up after a minute: an agent that
/// died must not leave a process behind that holds the volumes' locks.
pub fn tell_refusal(listener: &UnixListener, owner: u32, message: &str) {
    let deadline = Instant::now() + TELL;
    while let Some(stream) = accept_until(listener, deadline) {
        if let Err(error) = peer::may_control(&stream, owner) {
            log::line(format_args!("control: refused: {error}"));
            continue;
        }
        // The request is read first: closing with it unread would take the answer away from the asker.
        let _ = stream.set_read_timeout(Some(ASK));
        let _ = stream.set_write_timeout(Some(ASK));
        let _ = frame::receive_raw(&stream);
        let _ = frame::send(&stream, &ControlReply::Refused { message: message.into() }, &[]);
        return;
    }
}

fn accept_until(listener: &UnixListener, deadline: Instant) -> Option<UnixStream> {
    use std::os::fd::AsRawFd;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, valid for the call.
        let ready = unsafe { libc::poll(&mut poll, 1, left.as_millis().min(60_000) as libc::c_int) };
        if ready > 0 {
            return listener.accept().ok().map(|(stream, _)| stream);
        }
        if left.is_zero() {
            return None;
        }
    }
}
