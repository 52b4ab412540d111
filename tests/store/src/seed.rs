//! Randomness that can be had again: a seed in, the same numbers out.
//!
//! A test takes its seed from [`Random::for_test`], which prints it; setting `VMSEAL_TEST_SEED` to what was printed runs
//! the same again.

use std::time::{SystemTime, UNIX_EPOCH};

/// A stream of numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A new seed, or the one in `VMSEAL_TEST_SEED`; printed with the test's name, so that a failure can be had again.
    ///
    /// # Panics
    ///
    /// If `VMSEAL_TEST_SEED` is set and is no number.
    pub fn for_test(name: &str) -> Self {
        let seed = match std::env::var("VMSEAL_TEST_SEED") {
            Ok(text) => text.parse().expect("VMSEAL_TEST_SEED is a decimal number"),
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64),
        };
        println!("{name}: VMSEAL_TEST_SEED={seed}");
        Self::new(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// True `times` out of `of`.
    pub fn chance(&mut self, times: u64, of: u64) -> bool {
        self.below(of) < times
    }
}
