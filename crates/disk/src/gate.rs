//! The gate every request of a volume passes: open, for readers, or shut. Who shuts it can wait until nobody is inside.
//!
//! A lane is inside from the moment it may take a request until it rests with nothing under way, everything answered. So
//! a shut gate with nobody inside means: nothing of this process reaches the store, and nothing that was done is still to
//! be told. What is kept out is told by a bell when the gate opens.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use crate::flush_gate::Bell;

/// How far it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Way {
    /// Nobody passes.
    Shut = 0,
    /// Who only reads does.
    Reading = 1,
    /// Everybody does.
    Open = 2,
}

/// One volume's gate.
pub(crate) struct Gate {
    way: AtomicU8,
    passes: Mutex<Vec<Arc<Pass>>>,
    left: Condvar,
}

impl Default for Gate {
    fn default() -> Self {
        Self { way: AtomicU8::new(Way::Open as u8), passes: Mutex::default(), left: Condvar::new() }
    }
}

/// One lane's.
pub(crate) struct Pass {
    inside: AtomicBool,
    bell: Bell,
}

impl Gate {
    pub(crate) fn way(&self) -> Way {
        // Sequentially consistent, as everything here: see `enter`.
        match self.way.load(Ordering::SeqCst) {
            0 => Way::Shut,
            1 => Way::Reading,
            _ => Way::Open,
        }
    }

    /// Opens or shuts it. Who is inside stays there until it rests.
    pub(crate) fn set(&self, way: Way) {
        self.way.store(way as u8, Ordering::SeqCst);
        for pass in &*self.passes() {
            pass.bell.ring();
        }
    }

    /// Waits until nobody is inside; false if that takes longer than until `deadline`.
    pub(crate) fn wait_until_left(&self, deadline: Instant) -> bool {
        let mut passes = self.passes();
        while passes.iter().any(|pass| pass.inside.load(Ordering::SeqCst)) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let wait = left.min(Duration::from_secs(1));
            passes = self.left.wait_timeout(passes, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// A pass for another lane.
    pub(crate) fn pass(&self) -> io::Result<Arc<Pass>> {
        let pass = Arc::new(Pass { inside: AtomicBool::new(false), bell: Bell::new()? });
        self.passes().push(pass.clone());
        Ok(pass)
    }

    /// Takes a pass back.
    pub(crate) fn forget(&self, pass: &Arc<Pass>) {
        let mut passes = self.passes();
        pass.inside.store(false, Ordering::SeqCst);
        passes.retain(|other| !Arc::ptr_eq(other, pass));
        drop(passes);
        self.left.notify_all();
    }

    /// Whether a lane that needs so much may take a request now. It is inside then.
    pub(crate) fn enter(&self, pass: &Pass, needs: Way) -> bool {
        if pass.inside.load(Ordering::Relaxed) {
            // Only this lane takes itself out. But no more is to be taken in through a gate that was shut meanwhile.
            return self.way() >= needs;
        }
        // It says so before it looks, and who shuts the gate shuts it before he looks who is inside: one sees the other.
        pass.inside.store(true, Ordering::SeqCst);
        if self.way() >= needs {
            return true;
        }
        self.leave(pass);
        false
    }

    /// The lane has nothing under way and nothing left to answer.
    pub(crate) fn leave(&self, pass: &Pass) {
        if !pass.inside.load(Ordering::Relaxed) {
            return;
        }
        pass.inside.store(false, Ordering::SeqCst);
        if self.way() != Way::Open {
            // Under the lock, so that it is not missed between a look and the wait.
            drop(self.passes());
            self.left.notify_all();
        }
    }

    fn passes(&self) -> MutexGuard<'_, Vec<Arc<Pass>>> {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass {
    /// Forgets rings so far: what the gate looks like is to be asked after this.
    pub(crate) fn hush(&self) {
        self.bell.hush();
    }
}

impl AsFd for Pass {
    /// Readable once the gate was moved.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;
    use crate::descriptors::ready;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[test]
    fn who_shuts_it_waits_for_those_inside_and_nobody_comes_after() {
        let gate = Gate::default();
        let (one, other) = (gate.pass().unwrap(), gate.pass().unwrap());
        assert!(gate.enter(&one, Way::Open));
        gate.set(Way::Shut);
        assert!(!gate.enter(&other, Way::Reading) && !gate.enter(&one, Way::Open), "taken in by a shut gate");
        assert!(!gate.wait_until_left(soon()), "one is still inside");
        thread::scope(|scope| {
            let waits = scope.spawn(|| gate.wait_until_left(Instant::now() + Duration::from_secs(20)));
            gate.leave(&one);
            assert!(waits.join().unwrap());
        });
        one.hush();
        gate.set(Way::Reading);
        assert_eq!(ready([Some(one.as_fd())], Some(Duration::ZERO)), [true]);
        assert!(gate.enter(&one, Way::Reading) && !gate.enter(&other, Way::Open));
        gate.forget(&one);
        assert!(gate.wait_until_left(soon()));
    }

    #[test]
    fn what_is_done_inside_is_over_when_the_gate_is_shut_and_left() {
        let gate = Gate::default();
        let counts: [std::sync::atomic::AtomicU64; 2] = Default::default();
        thread::scope(|scope| {
            let (stop, stopped) = mpsc::channel::<()>();
            for count in &counts {
                let (gate, pass, stop) = (&gate, gate.pass().unwrap(), stop.clone());
                scope.spawn(move || {
                    while stop.send(()).is_ok() {
                        if gate.enter(&pass, Way::Open) {
                            // Not atomic on purpose: nobody else may be at it.
                            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                        }
                        gate.leave(&pass);
                    }
                });
            }
            drop(stop);
            for _ in 0..500 {
                gate.set(Way::Shut);
                assert!(gate.wait_until_left(Instant::now() + Duration::from_secs(20)));
                let before: Vec<_> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
                stopped.try_iter().take(10).for_each(drop);
                let after: Vec<_> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
                assert_eq!(before, after, "something went on behind a shut gate");
                gate.set(Way::Open);
                stopped.recv().unwrap();
            }
            drop(stopped);
        });
    }
}
