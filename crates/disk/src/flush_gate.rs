//! Flushes of one volume, one at a time, and a failure that is never forgotten.
//!
//! The kernel tells a failed write-back to one caller only. A second flush that ran beside the first would hear
//! "durable" about pages that were lost: so there is never a second one, and after a failure there is no good one.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, FromRawFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::{latch::FlushLatch, log};

/// Whether a flush may begin.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    /// It may; [`FlushGate::end`] must follow.
    Now,
    /// Another is under way; the bell rings when it has ended.
    Later,
    /// One failed, and this one counts as failed too.
    Failed,
}

/// The gate every flush of a volume goes through.
#[derive(Default)]
pub(crate) struct FlushGate {
    state: Mutex<State>,
    freed: Condvar,
    /// Set and asked while the state is held.
    failed: FlushLatch,
}

#[derive(Default)]
struct State {
    busy: bool,
    waiting: Vec<Arc<Bell>>,
}

impl FlushGate {
    /// A gate that is shut already if a flush failed in an earlier worker.
    pub(crate) fn new(failed: FlushLatch) -> Self {
        Self { failed, ..Self::default() }
    }

    /// Asks to flush; rings `bell` later if it has to wait.
    pub(crate) fn begin(&self, bell: &Arc<Bell>) -> Begun {
        let mut state = self.state();
        if self.failed.is_set() {
            return Begun::Failed;
        }
        if state.busy {
            if !state.waiting.iter().any(|waiting| Arc::ptr_eq(waiting, bell)) {
                state.waiting.push(bell.clone());
            }
            return Begun::Later;
        }
        state.busy = true;
        Begun::Now
    }

    /// Flushes by `flush` as soon as no other does; gives whether everything is durable.
    pub(crate) fn flush_by(&self, flush: impl FnOnce() -> io::Result<()>) -> bool {
        let mut state = self.state();
        while state.busy {
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if self.failed.is_set() {
            return false;
        }
        state.busy = true;
        drop(state);
        self.end(flush())
    }

    /// Says how a flush that had begun has ended; gives whether everything is durable.
    pub(crate) fn end(&self, result: io::Result<()>) -> bool {
        let mut state = self.state();
        if let Err(error) = result {
            self.failed.set();
            log::line(format_args!(
                "flush failed, and every later one of this disk counts as failed until the VM is started again: {error}"
            ));
        }
        state.busy = false;
        for bell in state.waiting.drain(..) {
            bell.ring();
        }
        let durable = !self.failed.is_set();
        drop(state);
        self.freed.notify_one();
        durable
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes a thread that waits in the kernel for a descriptor.
pub(crate) struct Bell(File);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no pointers; the descriptor is new and ours alone.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// A full counter has rung already, so no failure matters.
    pub(crate) fn ring(&self) {
        let _ = (&self.0).write_all(&1u64.to_ne_bytes());
    }

    /// Forgets that it rang.
    pub(crate) fn hush(&self) {
        let _ = (&self.0).read_exact(&mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rung(bell: &Bell) -> bool {
        (&bell.0).read_exact(&mut [0; 8]).is_ok()
    }

    #[test]
    fn one_flush_at_a_time_and_the_next_is_called() {
        let gate = FlushGate::default();
        let (first, second) = (Arc::new(Bell::new().unwrap()), Arc::new(Bell::new().unwrap()));
        assert_eq!(gate.begin(&first), Begun::Now);
        assert_eq!(gate.begin(&second), Begun::Later);
        assert!(!rung(&second));
        assert!(gate.end(Ok(())));
        assert!(rung(&second) && !rung(&first));
        assert_eq!(gate.begin(&second), Begun::Now);
        assert!(gate.end(Ok(())));
    }

    #[test]
    fn failure_is_told_to_everybody_ever_after() {
        let gate = FlushGate::default();
        let bell = Arc::new(Bell::new().unwrap());
        assert_eq!(gate.begin(&bell), Begun::Now);
        assert!(!gate.end(Err(io::Error::from_raw_os_error(libc::EIO))));
        assert_eq!(gate.begin(&bell), Begun::Failed);
        assert!(!gate.flush_by(|| panic!("a flush after a failed one")));
    }

    #[test]
    fn failure_of_an_earlier_worker_counts() {
        let latch = FlushLatch::own();
        latch.set();
        let gate = FlushGate::new(latch);
        assert_eq!(gate.begin(&Arc::new(Bell::new().unwrap())), Begun::Failed);
        assert!(!gate.flush_by(|| panic!("a flush after a failed one")));
    }

    #[test]
    fn waiting_thread_flushes_when_the_other_has_ended() {
        let gate = FlushGate::default();
        let bell = Arc::new(Bell::new().unwrap());
        assert_eq!(gate.begin(&bell), Begun::Now);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| gate.flush_by(|| Ok(())));
            assert!(gate.end(Ok(())));
            assert!(waits.join().unwrap());
        });
    }
}
