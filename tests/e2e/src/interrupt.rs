//! A test that is told to end (^C, a time-out of the runner) unwinds, so that everything it started ends with it.

use std::{
    sync::{
        Once,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on signals are noted instead of ending the process.
pub(crate) fn notice() {
    extern "C" fn note(_signal: libc::c_int) {
        ASKED.store(true, Ordering::Relaxed);
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [libc::SIGINT, libc::SIGTERM] {
            // SAFETY: the handler does nothing but store to an atomic.
            unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) };
        }
    });
}

/// Every loop that waits asks here.
///
/// # Panics
///
/// Once there was a signal, unless the thread unwinds already.
pub(crate) fn check() {
    assert!(!ASKED.load(Ordering::Relaxed) || thread::panicking(), "told to end");
}
