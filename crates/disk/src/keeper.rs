//! Keeps a VM's worker alive and, for it, what a worker is made of: one frame and its descriptors, both opaque.
//!
//! It parses nothing and maps nothing, so that what a guest or a client sends can never reach it. It outlives the
//! agent (own session; what happens on the setup socket after the setup does not matter), and no worker outlives it.

use std::{
    io, mem,
    os::{
        fd::{AsFd, AsRawFd},
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
    EXIT_DONE, EXIT_FAILED, EXIT_SETUP, EXIT_STOPPED,
    descriptors::{block_signals, peer_of},
    frame::{self, RawFrame},
    latch::SharedPage,
    log,
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
/// How long a new worker may take to pick up its setup.
const HAND_OVER: Duration = Duration::from_secs(10);

/// Runs the keeper to its end; gives the exit code.
pub fn run(setup: UnixStream) -> i32 {
    // SAFETY: setsid has no arguments. It fails only where this process leads a group already, which is as good.
    unsafe { libc::setsid() };
    let signals = match block_signals(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]) {
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

/// A worker that lived so long had taken its setup: one that has not says so at once and waits a minute to be heard.
const LIVED: Duration = Duration::from_secs(90);

fn failed(text: std::fmt::Arguments<'_>) -> i32 {
    log::line(text);
    EXIT_SETUP
}

fn keep(frame: &RawFrame, owner: u32, signals: &libc::sigset_t) -> i32 {
    let mut backoff = Backoff::default();
    // A setup that was good once is not bad now: what a later worker finds wrong may pass, and a guest waits for it.
    let mut was_good = false;
    loop {
        let started = Instant::now();
        match start_worker(frame, owner) {
            Ok((mut worker, witness)) => {
                let (status, told_to_end) = wait_for(&mut worker, signals);
                // Also before this keeper ends: its descriptors are the lock on the volumes.
                wait_for_requests(&witness, worker.id());
                match status {
                    _ if told_to_end => return EXIT_DONE,
                    Ok(status) if status.code() == Some(EXIT_DONE) => return EXIT_DONE,
                    Ok(status) if status.code() == Some(EXIT_SETUP) && !was_good => return EXIT_SETUP,
                    Ok(status) => log::line(format_args!("worker {} died ({})", worker.id(), cause(status))),
                    Err(error) => {
                        log::line(format_args!("keeper cannot wait for worker {}: {error}", worker.id()));
                        return EXIT_FAILED;
                    }
                }
            }
            Err(error) => log::line(format_args!("worker does not start: {error}")),
        }
        was_good |= started.elapsed() >= LIVED;
        let wait = backoff.after(started.elapsed());
        log::line(format_args!("starting a new worker in {} ms", wait.as_millis()));
        if !wait.is_zero() && matches!(next_signal(signals, Some(wait)), Some(libc::SIGTERM | libc::SIGINT)) {
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

/// Starts a worker from this very program (also if its file was replaced meanwhile) and hands it the setup.
///
/// The other end of the socket stays open in the worker, and in the kernel while requests of it are under way.
fn start_worker(frame: &RawFrame, owner: u32) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    // SAFETY: getpid has no arguments.
    let keeper = unsafe { libc::getpid() };
    let mut command = Command::new("/proc/self/exe");
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

/// Waits for the worker's end; passes a wish to end on to it: first politely, the second time by SIGKILL.
fn wait_for(worker: &mut Child, signals: &libc::sigset_t) -> (io::Result<ExitStatus>, bool) {
    let mut told_to_end = false;
    loop {
        match worker.try_wait() {
            Ok(Some(status)) => return (Ok(status), told_to_end),
            Ok(None) => {}
            Err(error) => return (Err(error), told_to_end),
        }
        if let Some(libc::SIGTERM | libc::SIGINT) = next_signal(signals, None) {
            let signal = if told_to_end { libc::SIGKILL } else { libc::SIGTERM };
            told_to_end = true;
            // SAFETY: the worker is our child and not yet waited for, so the pid is its own.
            unsafe { libc::kill(worker.id() as libc::pid_t, signal) };
        }
    }
}

/// Waits for one of the blocked signals, at most `limit` long; `None` when interrupted or over.
fn next_signal(signals: &libc::sigset_t, limit: Option<Duration>) -> Option<libc::c_int> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.map(|left| libc::timespec {
            tv_sec: left.as_secs() as libc::time_t,
            tv_nsec: left.subsec_nanos() as libc::c_long,
        });
        let limit = left.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: `signals` and `limit` are valid for the call; the siginfo argument may be null.
        let signal = unsafe { libc::sigtimedwait(signals, std::ptr::null_mut(), limit) };
        match signal {
            // While waiting for time to pass, an old child's signal is no reason to stop.
            libc::SIGCHLD if deadline.is_some() => {}
            signal if signal > 0 => return Some(signal),
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return None,
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
