//! The process that holds a VM's keys and serves its disks.
//!
//! Born of a keeper, with one socket on which the setup comes; ends with its keeper, on the order to end, or on
//! SIGTERM. What goes wrong otherwise ends it too, and the keeper starts another.

use std::{
    os::unix::net::{UnixListener, UnixStream},
    sync::{Arc, Mutex},
    thread,
};

use vmseal_model::control::Setup;

use crate::{
    EXIT_DONE, EXIT_FAILED, EXIT_SETUP,
    control::{self, Worker},
    descriptors::{block_signals, is_unix_listener},
    engine, frame, lane, log, sandbox,
    setup::{self, Prepared},
};

/// Runs the worker to its end; gives the exit code. `keeper` is the process that must be its parent, `owner` the uid
/// that set the keeper up.
pub fn run(socket: UnixStream, keeper: i32, owner: u32) -> i32 {
    // SAFETY: integers only. The signal comes when the parent ends; a parent that ended before this line is seen by
    // the pid of the parent, which is another then.
    let orphan =
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 || libc::getppid() != keeper };
    if orphan {
        log::line(format_args!("worker has no keeper: process {keeper} is not its parent"));
        return EXIT_SETUP;
    }
    // Blocked before any thread is started, so that only the main thread takes them.
    let signals = match block_signals(&[libc::SIGTERM, libc::SIGINT]) {
        Ok(signals) => signals,
        Err(error) => return failed(format_args!("worker cannot block signals: {error}"), EXIT_FAILED),
    };
    // SAFETY: ignoring a signal installs no handler. A file that may not grow further answers EFBIG instead.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let (setup, fds) = match frame::receive_raw(&socket) {
        Ok(Some(frame)) => (frame.body, frame.fds),
        Ok(None) => return failed(format_args!("worker got no setup"), EXIT_FAILED),
        Err(error) => return failed(format_args!("worker got no setup: {error}"), EXIT_FAILED),
    };
    // Its other end tells the keeper when the last request of this process is over.
    match socket.try_clone() {
        Ok(witness) => lane::uring::keep_while_requests_last(witness.into()),
        Err(error) => return failed(format_args!("worker cannot keep its socket: {error}"), EXIT_FAILED),
    }
    // Kept apart for the case that the setup is bad: then it is the way to say so.
    let control = fds.get(1).filter(|fd| is_unix_listener(*fd)).and_then(|fd| fd.try_clone().ok());
    let prepared = serde_json::from_slice::<Setup>(&setup)
        .map_err(|error| format!("setup cannot be read: {error}"))
        .and_then(|setup| setup::prepare(&setup, fds, owner).map_err(|error| with_causes(&error)));
    match prepared {
        Ok(prepared) => {
            drop(control);
            serve(prepared, socket, keeper, owner, &signals)
        }
        Err(message) => {
            log::line(format_args!("cannot serve: {message}"));
            // It still reads what comes on the control socket.
            if let Some(control) = control.filter(|_| sandbox::enter(None, None).is_ok()) {
                control::tell_refusal(&UnixListener::from(control), owner, &message);
            }
            EXIT_SETUP
        }
    }
}

fn failed(text: std::fmt::Arguments<'_>, code: i32) -> i32 {
    log::line(text);
    code
}

/// An error and its causes on one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn serve(
    prepared: Prepared,
    keeper_socket: UnixStream,
    keeper: i32,
    owner: u32,
    signals: &libc::sigset_t,
) -> i32 {
    // Headers stay open as long as this function runs, which is as long as the worker serves.
    let Prepared { vm, domain, control, policy, exports, custody, headers: _headers, page } = prepared;
    let sandbox = match sandbox::enter(policy.directory(), Some(page.clone())) {
        Ok(sandbox) => sandbox,
        Err(error) => {
            return failed(format_args!("worker has no sandbox: {}", with_causes(&error)), EXIT_FAILED);
        }
    };
    log::line(format_args!("{}", sandbox::describe(&sandbox)));
    let policy = Arc::new(policy);
    let mut served = Vec::new();
    let mut listeners = Vec::new();
    for (export, listener) in exports {
        let export = Arc::new(export);
        served.push(export.clone());
        listeners.push((export, listener));
    }
    let worker = Arc::new(Worker {
        vm,
        domain,
        keeper_pid: keeper,
        owner,
        keeper: Mutex::new(keeper_socket),
        sandbox,
        exports: served,
        custody,
        page,
    });
    let phase = worker.custody.phase();
    log::line(format_args!("{phase}: {} disks of VM {vm} (domain {domain})", listeners.len()));
    worker.custody.watch();
    for (export, listener) in listeners {
        let policy = policy.clone();
        let name = format!("accept-{}", export.target());
        let started = thread::Builder::new()
            .name(name)
            .spawn(move || -> () { engine::accept_for(&listener, &export, &policy) });
        if let Err(error) = started {
            return failed(format_args!("cannot start a thread: {error}"), EXIT_FAILED);
        }
    }
    let for_control = worker.clone();
    let started = thread::Builder::new()
        .name("control".into())
        .spawn(move || -> () { control::serve(&control, &for_control) });
    if let Err(error) = started {
        return failed(format_args!("cannot start a thread: {error}"), EXIT_FAILED);
    }
    // A keeper that is gone has sent a signal that ends this process.
    if let Err(error) = worker.say_serves() {
        log::line(format_args!("cannot tell the keeper that disks are served: {}", with_causes(&error)));
    }
    wait_for_signal(signals);
    log::line(format_args!("ending on a signal"));
    let _ = worker.make_ready_to_end(true);
    EXIT_DONE
}

fn wait_for_signal(signals: &libc::sigset_t) {
    // SAFETY: `signals` is a valid set; the siginfo argument may be null.
    while unsafe { libc::sigwaitinfo(signals, std::ptr::null_mut()) } < 0 {}
}
