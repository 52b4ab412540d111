//! Latencies, counted in buckets of at most 1.6 % width: in go nanoseconds, out come quantiles.

/// Buckets of one power of two.
const STEPS: u64 = 64;
const STEP_BITS: u32 = STEPS.ilog2();
/// Longer than this counts as this: 2^36 ns, 69 seconds.
const MOST_BITS: u32 = 36;

/// How many operations took how long.
#[derive(Clone)]
pub(crate) struct Histogram {
    counts: Vec<u32>,
    total: u64,
}

impl Histogram {
    /// Without anything.
    pub(crate) fn new() -> Self {
        Self { counts: vec![0; bucket(1 << MOST_BITS) + 1], total: 0 }
    }

    /// One more that took this long.
    pub(crate) fn add(&mut self, nanoseconds: u64) {
        if let Some(count) = self.counts.get_mut(bucket(nanoseconds.min(1 << MOST_BITS))) {
            *count += 1;
            self.total += 1;
        }
    }

    /// All of another.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// Microseconds within which this share of the operations ended; zero without any.
    pub(crate) fn quantile_us(&self, share: f64) -> f64 {
        let wanted = (self.total as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= wanted && seen > 0 {
                return value(index) as f64 / 1000.0;
            }
        }
        0.0
    }
}

fn bucket(value: u64) -> usize {
    let bits = value.max(1).ilog2();
    let shift = bits.saturating_sub(STEP_BITS);
    (u64::from(shift) * STEPS + (value >> shift)) as usize
}

/// Where a bucket ends.
fn value(index: usize) -> u64 {
    let index = index as u64;
    if index < 2 * STEPS {
        return index;
    }
    let shift = index / STEPS - 1;
    ((index - shift * STEPS + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_a_bucket_that_ends_within_two_percent_of_it() {
        for bits in 0..MOST_BITS {
            for value_in in [1u64 << bits, (1 << bits) + (1 << bits) / 3, (2 << bits) - 1] {
                let end = value(bucket(value_in));
                assert!(end >= value_in && end as f64 <= value_in as f64 * 1.02, "{value_in} -> {end}");
            }
        }
    }

    #[test]
    fn quantile_is_the_value_below_which_that_share_lies() {
        let mut one = Histogram::new();
        for us in 1..=99 {
            one.add(us * 1000);
        }
        let mut all = Histogram::new();
        all.add(5_000_000);
        all.merge(&one);
        assert!((all.quantile_us(0.5) - 50.0).abs() < 1.0, "{}", all.quantile_us(0.5));
        assert!((all.quantile_us(0.99) - 99.0).abs() < 2.0, "{}", all.quantile_us(0.99));
        assert!(all.quantile_us(1.0) >= 5000.0);
        assert_eq!(Histogram::new().quantile_us(0.99), 0.0);
    }
}
