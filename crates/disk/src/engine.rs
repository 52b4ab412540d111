//! Threads: one that accepts for each disk, one for each connection. All of them sleep in the kernel when idle.

use std::{
    os::unix::net::{UnixListener, UnixStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use vmseal_model::control::ExportKind;

use crate::{
    export::{Export, MAX_CONNECTIONS},
    log, nbd,
    peer::{self, PeerPolicy},
    ublk, vhost_user,
    worker::with_causes,
};

/// Most connections of one disk that are being looked at or served.
const MAX_THREADS: usize = 2 * MAX_CONNECTIONS;
/// Pause after an accept that failed (no descriptor, no memory), so that it does not turn into a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts for one disk for ever.
pub fn accept_for(listener: &UnixListener, export: &Arc<Export>, policy: &PeerPolicy) -> ! {
    let threads = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match export.next_client(listener) {
            Ok(stream) => stream,
            Err(error) => {
                log::line(format_args!("{}: cannot accept: {error}", export.target()));
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let admitted = match export.kind() {
            // QEMU has the block device; on the socket is who made it.
            ExportKind::Ublk => peer::admit_root(&stream),
            _ => policy.admit(&stream),
        };
        let pid = match admitted {
            Ok(pid) => pid,
            Err(error) => {
                export.refuse(format_args!("{error}"));
                continue;
            }
        };
        if threads.fetch_add(1, Ordering::AcqRel) >= MAX_THREADS {
            threads.fetch_sub(1, Ordering::AcqRel);
            export.refuse(format_args!("process {pid} connects too often"));
            continue;
        }
        let (export, guard) = (export.clone(), ThreadCount(threads.clone()));
        let started = thread::Builder::new().name(format!("nbd-{}", export.target())).spawn(move || {
            let _guard = guard;
            serve(&stream, &export, pid);
        });
        // The closure, and with it stream and count, is dropped where no thread was to be had.
        if let Err(error) = started {
            log::line(format_args!("cannot start a thread for process {pid}: {error}"));
        }
    }
}

struct ThreadCount(Arc<AtomicUsize>);

impl Drop for ThreadCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve(stream: &UnixStream, export: &Arc<Export>, pid: i32) {
    let admission = match export.admit(pid, stream) {
        Ok(admission) => admission,
        Err(error) => return export.refuse(format_args!("{error}")),
    };
    export.tell(format_args!("process {pid} connected"));
    let outcome = match export.kind() {
        ExportKind::Ublk => ublk::serve(stream, export).map_err(|error| with_causes(&error)),
        ExportKind::VhostUser => vhost_user::serve(stream, export).map_err(|error| with_causes(&error)),
        ExportKind::Nbd => nbd::serve(stream, export).map_err(|error| with_causes(&error)),
    };
    match outcome {
        Ok(()) => export.tell(format_args!("process {pid} disconnected")),
        Err(error) => export.tell(format_args!("process {pid}: {error}")),
    }
    drop(admission);
}
