//! Round keys of one XTS key, for kernels of our own: in secret memory, each as often side by side as the widest
//! register holds, so that a round reads them from there and nowhere else.

use std::{
    arch::x86_64::{
        __m128i, _mm_aesimc_si128, _mm_aeskeygenassist_si128, _mm_load_si128, _mm_loadu_si128,
        _mm_shuffle_epi32, _mm_slli_si128, _mm_store_si128, _mm_xor_si128,
    },
    io,
};

use crate::memory::{PAGE, Page, Protection};

/// Rounds of AES-256, and so round keys less one.
const ROUNDS: usize = 14;
/// Bytes of one round key as it lies here: four times itself.
const WIDE: usize = 64;
/// Bytes of one schedule.
const SCHEDULE: usize = (ROUNDS + 1) * WIDE;
const ENCRYPT: usize = 0;
const DECRYPT: usize = SCHEDULE;
const TWEAK: usize = 2 * SCHEDULE;
const _: () = assert!(3 * SCHEDULE <= PAGE);

/// The three schedules: data key in both directions, tweak key.
pub(crate) struct Schedules {
    page: Page,
}

// SAFETY: written once, before anybody else has it; from then on it is only read.
unsafe impl Sync for Schedules {}

impl Schedules {
    /// Expands a key: data key, then tweak key.
    ///
    /// # Safety
    ///
    /// The processor has AES-NI.
    #[target_feature(enable = "aes,sse2")]
    pub(crate) unsafe fn new(key: &[u8; 64]) -> io::Result<Self> {
        let schedules = Self { page: Page::new()? };
        // SAFETY: the page has room for three schedules; both halves of the key are 32 bytes.
        unsafe {
            expand(key.as_ptr(), schedules.at(ENCRYPT));
            expand(key.as_ptr().add(32), schedules.at(TWEAK));
            let (from, to) = (schedules.at(ENCRYPT), schedules.at(DECRYPT));
            for round in 0..=ROUNDS {
                let mut word = get(from, ROUNDS - round);
                if round != 0 && round != ROUNDS {
                    word = _mm_aesimc_si128(word);
                }
                put(to, round, word);
            }
        }
        Ok(schedules)
    }

    /// Round keys of the data key; in decryption's order and form if asked.
    pub(crate) fn data(&self, encrypt: bool) -> *const u8 {
        self.at(if encrypt { ENCRYPT } else { DECRYPT })
    }

    /// Round keys of the tweak key.
    pub(crate) fn tweak(&self) -> *const u8 {
        self.at(TWEAK)
    }

    /// How the page they lie in is protected.
    pub(crate) fn protection(&self) -> Protection {
        self.page.protection()
    }

    fn at(&self, offset: usize) -> *mut u8 {
        // SAFETY: offsets are within the page.
        unsafe { self.page.base().as_ptr().add(offset) }
    }
}

/// # Safety
///
/// `schedule` is one of the page's.
#[inline]
#[target_feature(enable = "sse2")]
unsafe fn get(schedule: *const u8, round: usize) -> __m128i {
    // SAFETY: rounds are at most ROUNDS; each is aligned.
    unsafe { _mm_load_si128(schedule.add(round * WIDE).cast()) }
}

/// # Safety
///
/// As [`get`].
#[inline]
#[target_feature(enable = "sse2")]
unsafe fn put(schedule: *mut u8, round: usize, word: __m128i) {
    for copy in 0..WIDE / 16 {
        // SAFETY: as in `get`.
        unsafe { _mm_store_si128(schedule.add(round * WIDE + copy * 16).cast(), word) };
    }
}

/// FIPS 197, key expansion of AES-256. Round keys are read back from the page, so that no array of them is elsewhere.
///
/// # Safety
///
/// 32 bytes of key, a schedule of the page.
#[target_feature(enable = "aes,sse2")]
unsafe fn expand(key: *const u8, schedule: *mut u8) {
    // SAFETY: passed on.
    unsafe {
        put(schedule, 0, _mm_loadu_si128(key.cast()));
        put(schedule, 1, _mm_loadu_si128(key.add(16).cast()));
        macro_rules! step {
            ($round:literal, $constant:literal) => {
                let assist = _mm_aeskeygenassist_si128::<$constant>(get(schedule, $round - 1));
                put(schedule, $round, mix(get(schedule, $round - 2), _mm_shuffle_epi32::<0xff>(assist)));
                if $round < ROUNDS {
                    let assist = _mm_aeskeygenassist_si128::<0>(get(schedule, $round));
                    put(
                        schedule,
                        $round + 1,
                        mix(get(schedule, $round - 1), _mm_shuffle_epi32::<0xaa>(assist)),
                    );
                }
            };
        }
        step!(2, 0x01);
        step!(4, 0x02);
        step!(6, 0x04);
        step!(8, 0x08);
        step!(10, 0x10);
        step!(12, 0x20);
        step!(14, 0x40);
    }
}

#[inline]
#[target_feature(enable = "sse2")]
fn mix(word: __m128i, with: __m128i) -> __m128i {
    let word = _mm_xor_si128(word, _mm_slli_si128::<4>(word));
    let word = _mm_xor_si128(word, _mm_slli_si128::<8>(word));
    _mm_xor_si128(word, with)
}
