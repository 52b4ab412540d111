//! Lines for the administrator on standard error; the agent sends that to a file per VM.
//!
//! Never a key, never guest data. A log that cannot be written is no reason to stop serving a disk.

use std::{
    fmt,
    io::Write,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Lets a burst of lines through and then one a minute, for what somebody can make happen as often as he likes.
#[derive(Debug, Default)]
pub struct Throttle(Mutex<Burst>);

#[derive(Debug, Default)]
struct Burst {
    /// Lines that were let through lately.
    passed: u32,
    since: Option<Instant>,
    /// Lines that were kept back since the last one.
    kept: u64,
}

/// So many lines at once.
const BURST: u32 = 10;
/// After each of these one more.
const REFILL: Duration = Duration::from_secs(60);

impl Throttle {
    /// Writes the line, or counts it; the next one that is written says how many were not.
    pub fn line(&self, text: fmt::Arguments<'_>) {
        match self.pass(Instant::now()) {
            Some(0) => line(text),
            Some(kept) => line(format_args!("{text} (and {kept} lines like this before)")),
            None => {}
        }
    }

    /// How many lines were kept back before this one, if it is to be written.
    fn pass(&self, now: Instant) -> Option<u64> {
        let mut burst = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *burst.since.get_or_insert(now);
        let refilled = now.saturating_duration_since(since).as_secs() / REFILL.as_secs();
        if refilled > 0 {
            burst.passed = burst.passed.saturating_sub(refilled.try_into().unwrap_or(u32::MAX));
            burst.since = Some(now);
        }
        if burst.passed >= BURST {
            burst.kept += 1;
            return None;
        }
        burst.passed += 1;
        Some(std::mem::take(&mut burst.kept))
    }
}

/// Writes one line: UTC time, program, process, text.
pub fn line(text: fmt::Arguments<'_>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let stamp = utc(now.as_secs());
    // One write per line, so that lines of keeper and worker do not mix. Ignored: see the head of this file.
    let line = format!("{stamp} vmseal-disk[{}] {text}\n", std::process::id());
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// `1970-01-01T00:00:00Z` and so on (civil calendar from days, Howard Hinnant's `civil_from_days`).
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_is_let_through_and_then_a_line_a_minute_that_counts_the_rest() {
        let (throttle, start) = (Throttle::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for _ in 0..BURST {
            assert_eq!(throttle.pass(at(0)), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(throttle.pass(at(59)), None);
        }
        assert_eq!(throttle.pass(at(61)), Some(1000));
        assert_eq!(throttle.pass(at(62)), None);
        for _ in 0..BURST {
            assert!(throttle.pass(at(100_000)).is_some());
        }
        assert_eq!(throttle.pass(at(100_001)), None);
    }

    #[test]
    fn times_are_written_as_utc() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(utc(4_107_542_399), "2100-02-28T23:59:59Z");
    }
}
