//! The time, as the server uses it: milliseconds since 1970. Tests set it forward; nothing sets it back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

/// The system's clock, plus what a test added.
#[derive(Debug, Clone, Default)]
pub struct Clock(Arc<AtomicI64>);

impl Clock {
    /// Milliseconds since 1970.
    pub fn now_ms(&self) -> i64 {
        let system = match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
            // A machine whose clock stands before 1970 counts from there.
            Err(_) => 0,
        };
        system.saturating_add(self.0.load(Ordering::Relaxed))
    }

    /// Lets time pass at once.
    pub fn advance_ms(&self, ms: i64) {
        self.0.fetch_add(ms.max(0), Ordering::Relaxed);
    }
}
