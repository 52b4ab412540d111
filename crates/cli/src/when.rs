//! Times for people: how long ago in lists, UTC where the moment matters. JSON carries milliseconds since 1970.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970, now.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// `3 min ago`; `-` for a time that is not known (0).
pub(crate) fn ago(then_ms: i64, now_ms: i64) -> String {
    if then_ms <= 0 {
        return "-".to_owned();
    }
    match now_ms.saturating_sub(then_ms) / 1000 {
        i64::MIN..=4 => "now".to_owned(),
        s @ 5..=119 => format!("{s} s ago"),
        s @ 120..=7_199 => format!("{} min ago", s / 60),
        s @ 7_200..=172_799 => format!("{} h ago", s / 3_600),
        s => format!("{} d ago", s / 86_400),
    }
}

/// `2026-11-24 08:50:12 UTC`; `-` for a time that is not known (0).
pub(crate) fn utc(ms: i64) -> String {
    if ms <= 0 {
        return "-".to_owned();
    }
    let seconds = ms / 1000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02} UTC", second % 60)
}

/// Date of a day counted from 1970-01-01. Source: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms",
/// `civil_from_days`.
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_is_told_in_one_unit() {
        let now = 1_000_000_000_000;
        for (seconds, text) in [
            (-30, "now"),
            (0, "now"),
            (59, "59 s ago"),
            (180, "3 min ago"),
            (7_200, "2 h ago"),
            (86_400 * 5, "5 d ago"),
        ] {
            assert_eq!(ago(now - seconds * 1000, now), text);
        }
        assert_eq!(ago(0, now), "-");
        assert_eq!(ago(1, i64::MAX), "106751991167 d ago");
    }

    #[test]
    fn date_is_the_calendars() {
        assert_eq!(utc(951_782_400_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_795_510_212_345), "2026-11-24 08:50:12 UTC");
        assert_eq!(utc(4_107_542_400_000), "2100-03-01 00:00:00 UTC");
        assert_eq!(utc(0), "-");
        assert!(utc(i64::MAX).ends_with("UTC"));
    }
}
