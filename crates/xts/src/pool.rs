//! aws-lc's contexts, which hold the state of the unit at hand, so that each serves one thread at a time.
//!
//! In goes a key, once; then threads borrow. All contexts are made at the beginning: afterwards no system call is needed,
//! which a sandbox may forbid. A thread that finds none waits; more would not help, as there is one for each core.

use std::{
    io,
    sync::{Condvar, Mutex, PoisonError},
    thread::available_parallelism,
};

use crate::{
    context::{Contexts, LibraryFailed},
    memory::Protection,
};

/// Contexts at most: each takes a page of what the process may lock.
const MOST: usize = 4;

/// Contexts of one key.
pub(crate) struct Pool {
    idle: Mutex<Vec<Contexts>>,
    returned: Condvar,
    protection: Protection,
}

impl Pool {
    /// Contexts for as many threads as this machine runs at a time, or as there is secret memory for; at least one.
    pub(crate) fn new(key: &[u8; 64]) -> Result<Result<Self, LibraryFailed>, io::Error> {
        let first = match Contexts::new(key)? {
            Ok(first) => first,
            Err(failed) => return Ok(Err(failed)),
        };
        let protection = first.protection();
        let mut idle = vec![first];
        while idle.len() < available_parallelism().map_or(1, usize::from).min(MOST) {
            let Ok(Ok(contexts)) = Contexts::new(key) else { break };
            idle.push(contexts);
        }
        Ok(Ok(Self { idle: Mutex::new(idle), returned: Condvar::new(), protection }))
    }

    /// Runs `work` with contexts that nobody else has meanwhile.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&Contexts) -> T) -> T {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut idle =
            self.returned.wait_while(idle, |idle| idle.is_empty()).unwrap_or_else(PoisonError::into_inner);
        let contexts = idle.pop().expect("waited until there is one");
        drop(idle);
        let lent = Lent { pool: self, contexts: Some(contexts) };
        work(lent.contexts.as_ref().expect("there until it is given back"))
    }

    /// How their memory is protected.
    pub(crate) fn protection(&self) -> Protection {
        self.protection
    }
}

/// Goes back to the pool however the work ends: were one lost to a panic, others would wait for it for good.
struct Lent<'a> {
    pool: &'a Pool,
    contexts: Option<Contexts>,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(contexts) = self.contexts.take() {
            self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(contexts);
            self.pool.returned.notify_one();
        }
    }
}
