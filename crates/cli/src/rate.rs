//! How fast bytes are done, over the last seconds, and when the rest will be.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Long enough to be steady, short enough to show a stall.
const WINDOW: Duration = Duration::from_secs(10);
/// Below this there is no rate yet, only noise.
const SHORTEST: Duration = Duration::from_secs(1);

/// What was seen in the last [`WINDOW`].
#[derive(Debug, Default)]
pub(crate) struct Rate {
    seen: VecDeque<(Instant, u64)>,
}

impl Rate {
    /// So many bytes were done by then. Fewer than before is another pass: it is counted on its own.
    pub(crate) fn add(&mut self, now: Instant, done_bytes: u64) {
        if self.seen.back().is_some_and(|(_, before)| done_bytes < *before) {
            self.seen.clear();
        }
        self.seen.push_back((now, done_bytes));
        // One sample older than the window stays, so that it is always covered.
        while self.seen.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW) {
            self.seen.pop_front();
        }
    }

    /// Bytes a second; `None` while it is too early to tell.
    pub(crate) fn bytes_per_second(&self) -> Option<u64> {
        let ((first, from), (last, to)) = (self.seen.front()?, self.seen.back()?);
        let elapsed = last.duration_since(*first);
        (elapsed >= SHORTEST).then(|| ((to - from) as f64 / elapsed.as_secs_f64()) as u64)
    }
}

/// `23 s`, `4 min`, `1 h 5 min`.
pub(crate) fn duration(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds / 60),
        _ => format!("{} h {} min", seconds / 3_600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_counts_what_was_done_while_watching() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut rate = Rate::default();
        rate.add(at(0), 1 << 40);
        assert_eq!(rate.bytes_per_second(), None);
        rate.add(at(2_000), (1 << 40) + 2_000);
        assert_eq!(rate.bytes_per_second(), Some(1_000));
        // It stands still: the rate falls to nothing within the window.
        for second in 3..=14 {
            rate.add(at(second * 1_000), (1 << 40) + 2_000);
        }
        assert_eq!(rate.bytes_per_second(), Some(0));
        // A second pass over the same bytes.
        rate.add(at(15_000), 10);
        assert_eq!(rate.bytes_per_second(), None);
        rate.add(at(17_000), 20);
        assert_eq!(rate.bytes_per_second(), Some(5));
    }

    #[test]
    fn duration_is_told_in_the_units_people_wait_in() {
        assert_eq!(
            [0, 119, 120, 7_199, 7_200, 11_100].map(duration),
            ["0 s", "119 s", "2 min", "119 min", "2 h 0 min", "3 h 5 min"]
        );
    }
}
