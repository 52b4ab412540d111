//! Lines for the administrator on standard error.
//!
//! Never a key, never what a client reads or writes. What is taken from a certificate or a peer is escaped.

use std::{
    fmt,
    io::{self, Write},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// So many lines at once.
const BURST: u32 = 20;
/// After each of these one more.
const REFILL: Duration = Duration::from_secs(10);

/// Writes one line.
pub fn line(text: fmt::Arguments<'_>) {
    // A log that cannot be written is no reason to stop serving.
    let _ = io::stderr().write_all(format!("vmseal-nbd-tls[{}] {text}\n", std::process::id()).as_bytes());
}

/// Lets a burst of lines through and then one each ten seconds: what anybody on the network can make happen must not fill
/// the log.
#[derive(Debug)]
pub struct Throttle(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    left: u32,
    since: Instant,
    kept: u64,
}

impl Default for Throttle {
    fn default() -> Self {
        Self(Mutex::new(Bucket { left: BURST, since: Instant::now(), kept: 0 }))
    }
}

impl Throttle {
    /// Writes the line, or counts it; the next one that is written says how many were not.
    pub fn line(&self, text: fmt::Arguments<'_>) {
        match self.pass(Instant::now()) {
            Some(0) => line(text),
            Some(kept) => line(format_args!("{text} (and {kept} lines before that were not written)")),
            None => {}
        }
    }

    fn pass(&self, now: Instant) -> Option<u64> {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let refills = now.saturating_duration_since(bucket.since).as_secs() / REFILL.as_secs();
        if refills > 0 {
            bucket.left = BURST.min(bucket.left.saturating_add(refills.try_into().unwrap_or(u32::MAX)));
            bucket.since = now;
        }
        if bucket.left == 0 {
            bucket.kept += 1;
            return None;
        }
        bucket.left -= 1;
        Some(std::mem::take(&mut bucket.kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_passes_and_then_a_line_each_ten_seconds_that_counts_the_rest() {
        let (throttle, start) = (Throttle::default(), Instant::now());
        for _ in 0..BURST {
            assert_eq!(throttle.pass(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(throttle.pass(start), None);
        }
        assert_eq!(throttle.pass(start + REFILL + REFILL / 2), Some(7));
        assert_eq!(throttle.pass(start + REFILL + REFILL / 2), None);
    }
}
