//! Keeps a VM's worker alive and, for it, what a worker is made of: one frame and its descriptors, both opaque.
//!
//! It parses nothing and maps nothing, so that what a guest or a client sends can never reach it; of its worker it hears
//! single bytes. It stays the program it was started from, whatever its workers are upgraded to. It outlives the agent
//! (own session; what happens on the setup socket after the setup does not matter), and no worker outlives it.

use std::{
    fs::File,
    io::{self, Read},
    mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd},
        unix::{
            net::UnixStream,
            process::{CommandExt, ExitStatusExt},
        },
    },
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

use vmseal_model::control::SETUP_FD;

use crate::{
    EXIT_DONE, EXIT_FAILED, EXIT_SETUP, EXIT_STOPPED, EXIT_UPGRADE,
    descriptors::{block_signals, peer_of, ready},
    frame::{self, RawFrame},
    latch::SharedPage,
    log,
    notice::{self, Notice},
    program::{Program, Programs},
    sandbox::{network, privileges},
};

/// A worker that lived this long had started well: the next restart is immediate again.
const LIVED_WELL: Duration = Duration::from_secs(10);
/// The wait before the second restart; it doubles from there.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// How long a dead worker's requests may last before a line is worth it.
const PATIENCE_MS: libc::c_int = 1000;
/// How long a worker from a new program may take until it serves.
const TRIAL: Duration = Duration::from_secs(5);
/// How long a new worker may take to pick up its setup.
const HAND_OVER: Duration = Duration::from_secs(10);

/// Runs the keeper to its end; gives the exit code.
pub fn run(setup: UnixStream) -> i32 {
    // SAFETY: setsid has no arguments. It fails only where this process leads a group already, which is as good.
    unsafe { libc::setsid() };
    let signals = match Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]) {
        Ok(signals) => signals,
        Err(error) => return failed(format_args!("keeper cannot block signals: {error}")),
    };
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    // Where it may; whether it did is seen by the worker.
    let _ = network::leave();
    if let Err(error) = privileges::drop_all() {
        return failed(format_args!("keeper cannot drop its privileges: {error}"));
    }
    // The maker of the setup socket is the agent; only its uid and root may give orders later.
    let owner = match peer_of(&setup) {
        Ok(peer) => peer.uid,
        Err(error) => return failed(format_args!("keeper cannot see who started it: {error}")),
    };
    let mut frame = match frame::receive_raw(&setup) {
        Ok(Some(frame)) => frame,
        Ok(None) => return failed(format_args!("keeper got no setup: the agent closed the socket")),
        Err(error) => return failed(format_args!("keeper got no setup: {error}")),
    };
    match SharedPage::create() {
        Ok(page) => frame.fds.push(page),
        Err(error) => return failed(format_args!("keeper has no memory to share: {error}")),
    }
    // `setup` stays open: the agent sees this process end by its end of file. Nothing is read from it again.
    keep(&frame, owner, &signals)
}

fn failed(text: std::fmt::Arguments<'_>) -> i32 {
    log::line(text);
    EXIT_SETUP
}

fn keep(frame: &RawFrame, owner: u32, signals: &Signals) -> i32 {
    let mut backoff = Backoff::default();
    let mut programs = Programs::default();
    // A setup that was good once is not bad now: what a later worker finds wrong may pass, and a guest waits for it.
    let mut was_good = false;
    loop {
        let started = Instant::now();
        match start_worker(frame, owner, programs.choose()) {
            Ok((worker, socket)) => {
                let mut attendance =
                    Attendance { worker, socket, deaf: false, served: false, told_to_end: false };
                let status = attendance.attend(signals, &mut programs, owner);
                let pid = attendance.worker.id();
                // Also before this keeper ends: its descriptors are the lock on the volumes.
                wait_for_requests(&attendance.socket, pid);
                was_good |= attendance.served;
                match status {
                    _ if attendance.told_to_end => return EXIT_DONE,
                    Ok(status) => match status.code() {
                        // Whatever it ends with, it is the program that is on trial, not the setup.
                        _ if programs.on_trial() => {
                            log::line(format_args!(
                                "worker {pid} ended before it served ({})",
                                cause(status)
                            ));
                        }
                        Some(EXIT_DONE) => return EXIT_DONE,
                        Some(EXIT_SETUP) if !was_good => return EXIT_SETUP,
                        Some(EXIT_UPGRADE) => log::line(format_args!("worker {pid} made room for the next")),
                        _ => log::line(format_args!("worker {pid} died ({})", cause(status))),
                    },
                    Err(error) => {
                        log::line(format_args!("keeper cannot wait for worker {pid}: {error}"));
                        return EXIT_FAILED;
                    }
                }
            }
            Err(error) => log::line(format_args!("worker does not start: {error}")),
        }
        if programs.fall_back() {
            log::line(format_args!("the new program does not serve: going back to the one before"));
            continue;
        }
        if programs.has_next() {
            log::line(format_args!("starting a worker from the new program"));
            continue;
        }
        let wait = backoff.after(started.elapsed());
        log::line(format_args!("starting a new worker in {} ms", wait.as_millis()));
        if !wait.is_zero() && signals.told_to_end_within(wait) {
            return EXIT_DONE;
        }
    }
}

fn cause(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("signal {signal}"),
        (_, Some(EXIT_STOPPED)) => "stopped by its sandbox".into(),
        (_, Some(code)) => format!("exit code {code}"),
        _ => "unknown cause".into(),
    }
}

/// Starts a worker and hands it the setup.
///
/// The other end of the socket stays open in the worker, and in the kernel while requests of it are under way.
fn start_worker(frame: &RawFrame, owner: u32, program: &Program) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    // SAFETY: getpid has no arguments.
    let keeper = unsafe { libc::getpid() };
    let mut command = Command::new(program.path());
    command.arg0("vmseal-disk").arg("worker").arg(keeper.to_string()).arg(owner.to_string()).env_clear();
    let socket = theirs.as_raw_fd();
    // SAFETY: the closure runs in the child between fork and exec and makes only async-signal-safe system calls; it
    // touches no memory of the parent but the integer `socket` and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            if socket == SETUP_FD {
                check(libc::fcntl(socket, libc::F_SETFD, 0))?;
            } else {
                check(libc::dup2(socket, SETUP_FD))?;
            }
            let mut none: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()))
        });
    }
    let mut worker = command.spawn()?;
    drop(theirs);
    let handed = ours.set_write_timeout(Some(HAND_OVER)).map_err(frame::FrameError::from).and_then(|()| {
        let fds: Vec<_> = frame.fds.iter().map(AsFd::as_fd).collect();
        frame::send_raw(&ours, &frame.body, &fds)
    });
    if let Err(error) = handed {
        // A worker that died before it read its setup is seen by its exit status; one that hangs is ended here.
        log::line(format_args!("worker {} did not take its setup: {error}", worker.id()));
        let _ = worker.kill();
    }
    Ok((worker, ours))
}

/// Waits until nothing that a dead worker gave to the kernel is under way. A request of it that came late could overwrite
/// what the next worker was told meanwhile, so there is no limit: while storage hangs, the guest waits anyway.
fn wait_for_requests(witness: &UnixStream, worker: u32) {
    let mut poll = libc::pollfd { fd: witness.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    let mut patience = PATIENCE_MS;
    loop {
        // SAFETY: one pollfd, valid for the call.
        match unsafe { libc::poll(&mut poll, 1, patience) } {
            0 => {
                log::line(format_args!(
                    "worker {worker} has ended, and storage still works on what it asked for: waiting"
                ));
                patience = -1;
            }
            ready if ready > 0 => return,
            _ => {}
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A worker that runs, and what it has told.
struct Attendance {
    worker: Child,
    socket: UnixStream,
    /// The worker said what no worker says: it is not listened to any more.
    deaf: bool,
    served: bool,
    told_to_end: bool,
}

impl Attendance {
    /// Waits for the worker's end and hears what it tells. Passes a wish to end on to it: first politely, the second
    /// time by SIGKILL. One whose program is on trial is killed if it takes too long to serve.
    fn attend(&mut self, signals: &Signals, programs: &mut Programs, owner: u32) -> io::Result<ExitStatus> {
        let trial = programs.on_trial().then(|| Instant::now() + TRIAL);
        loop {
            if let Some(status) = self.worker.try_wait()? {
                // What it told last may lie there still.
                while self.hears(Some(Duration::ZERO), None) {
                    self.hear(programs, owner);
                }
                return Ok(status);
            }
            let limit = trial
                .filter(|_| !self.served && !self.told_to_end)
                .map(|until| until.saturating_duration_since(Instant::now()));
            if limit.is_some_and(|limit| limit.is_zero()) {
                self.worker.kill()?;
                return self.worker.wait();
            }
            if self.hears(limit, Some(signals)) {
                self.hear(programs, owner);
            }
            while let Some(signal) = signals.next() {
                if matches!(signal, libc::SIGTERM | libc::SIGINT) {
                    let signal = if self.told_to_end { libc::SIGKILL } else { libc::SIGTERM };
                    self.told_to_end = true;
                    // SAFETY: the worker is our child and not yet waited for, so the pid is its own.
                    unsafe { libc::kill(self.worker.id() as libc::pid_t, signal) };
                }
            }
        }
    }

    /// Waits for a notice, or a signal; whether there is a notice.
    fn hears(&self, limit: Option<Duration>, signals: Option<&Signals>) -> bool {
        let fds = [(!self.deaf).then_some(self.socket.as_fd()), signals.map(AsFd::as_fd)];
        ready(fds, limit)[0]
    }

    fn hear(&mut self, programs: &mut Programs, owner: u32) {
        match notice::receive(&self.socket) {
            Some(Notice::Serves) => {
                self.served = true;
                if programs.on_trial() {
                    log::line(format_args!("worker {} serves from the new program", self.worker.id()));
                }
                programs.confirm();
            }
            Some(Notice::Upgrade(program)) => {
                let offered = programs.offer(program, owner);
                notice::answer(&self.socket, offered.is_ok());
                if let Err(error) = offered {
                    log::line(format_args!("upgrade refused: the program {error}"));
                }
            }
            None => self.deaf = true,
        }
    }
}

/// The signals that are waited for, as a descriptor.
struct Signals(File);

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Signals {
    /// Blocks them, so that they wait here.
    fn block(signals: &[libc::c_int]) -> io::Result<Self> {
        let set = block_signals(signals)?;
        // SAFETY: the set is valid; on success the descriptor is new and ours alone.
        unsafe {
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(File::from_raw_fd(fd))) }
        }
    }

    /// The next one that is there.
    fn next(&self) -> Option<libc::c_int> {
        let mut info = [0; mem::size_of::<libc::signalfd_siginfo>()];
        (&self.0).read_exact(&mut info).ok()?;
        // Its first field.
        let [a, b, c, d, ..] = info;
        Some(u32::from_ne_bytes([a, b, c, d]).cast_signed())
    }

    /// Waits so long, or until an order to end; whether there was one. Ends of children are no matter.
    fn told_to_end_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(signal) = self.next() {
                if matches!(signal, libc::SIGTERM | libc::SIGINT) {
                    return true;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            ready([Some(self.as_fd())], Some(left));
        }
    }
}

/// How long to wait before the next worker.
#[derive(Debug, Default)]
struct Backoff {
    next: Duration,
}

impl Backoff {
    /// The wait after a worker that lived for `lived`.
    fn after(&mut self, lived: Duration) -> Duration {
        if lived >= LIVED_WELL {
            self.next = Duration::ZERO;
        }
        let now = self.next;
        self.next = if now.is_zero() { FIRST_WAIT } else { (now * 2).min(LONGEST_WAIT) };
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_restart_is_immediate_and_later_ones_wait_longer_up_to_two_seconds() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..9).map(|_| backoff.after(Duration::from_secs(1)).as_millis()).collect();
        assert_eq!(waits, [0, 50, 100, 200, 400, 800, 1600, 2000, 2000]);
    }

    #[test]
    fn a_worker_that_lived_long_is_replaced_at_once() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            backoff.after(Duration::ZERO);
        }
        assert_eq!(backoff.after(LIVED_WELL), Duration::ZERO);
        assert_eq!(backoff.after(Duration::ZERO), FIRST_WAIT);
    }
}
