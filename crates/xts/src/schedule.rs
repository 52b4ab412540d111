//! Round keys of one XTS key, for kernels of our own: in secret memory, each as often side by side as the widest register
//! holds, so that a round reads them from there and nowhere else.
//!
//! They are assembly too: a compiler that does not optimise hands such values over on the stack.

use std::{arch::naked_asm, io};

use crate::memory::{PAGE, Page, Protection};

/// Bytes of one schedule: fifteen round keys, each four times. The assembly knows these three offsets.
const SCHEDULE: usize = 15 * 64;
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
    /// The processor has AES-NI and AVX.
    pub(crate) unsafe fn new(key: &[u8; 64]) -> io::Result<Self> {
        let page = Page::new()?;
        // SAFETY: the page begins on a page boundary, has room for three schedules, and nobody else has it.
        unsafe { expand(key.as_ptr(), page.base().as_ptr()) };
        Ok(Self { page })
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

    fn at(&self, offset: usize) -> *const u8 {
        // SAFETY: offsets are within the page.
        unsafe { self.page.base().as_ptr().add(offset) }
    }
}

/// From 64 bytes of key to three schedules.
///
/// # Safety
///
/// The processor has AES-NI and AVX; `schedules` is on a multiple of 16 and has room for three.
#[unsafe(naked)]
unsafe extern "sysv64" fn expand(key: *const u8, schedules: *mut u8) {
    naked_asm!(include_str!("schedule.s"), "vmseal_schedules", options(raw))
}
