//! Whether the destination of a large copy is far away, in no cache, found out by reading a little of it.
//!
//! That decides how it is best written: near memory through the caches, far memory past them, as the system's memcpy does
//! with sizes that cannot be near. Sizes of requests say nothing here: a buffer that is used again and again and a
//! guest's pages have the same. A wrong answer costs time and changes no byte.

use std::{
    arch::asm,
    sync::atomic::{AtomicU8, Ordering},
};

/// Ticks of the time stamp counter in which no read from main memory is done, while one from any cache is: it runs at 2
/// to 4 GHz wherever VAES is, main memory is 75 ns and more away, the caches of one socket 30 ns at most.
const FAR: u64 = 150;
/// Copies that are taken for far after one that was. A look at far memory costs half a microsecond, at near memory little.
const ANSWER_HOLDS: u8 = 15;

/// What was found, of one cipher's destinations.
#[derive(Debug, Default)]
pub(crate) struct Distance {
    far_copies_left: AtomicU8,
}

impl Distance {
    /// Whether `len` bytes at `base` are far. Threads may disturb each other's counting, which does no harm.
    ///
    /// # Safety
    ///
    /// They are a page or more, and can be read; others may change them meanwhile.
    pub(crate) unsafe fn is_far(&self, base: *const u8, len: usize) -> bool {
        let left = self.far_copies_left.load(Ordering::Relaxed);
        if left > 0 {
            self.far_copies_left.store(left - 1, Ordering::Relaxed);
            return true;
        }
        // SAFETY: passed on.
        let far = unsafe { look(base, len) };
        if far {
            self.far_copies_left.store(ANSWER_HOLDS, Ordering::Relaxed);
        }
        far
    }
}

/// # Safety
///
/// As [`Distance::is_far`].
unsafe fn look(base: *const u8, len: usize) -> bool {
    const PAGE: usize = 4096;
    const LINE: usize = 64;
    // Places that no prefetcher expects: a fixed step from request to request would be learnt.
    // SAFETY: every x86-64 processor with VAES has a time stamp counter.
    let random =
        (base as usize ^ unsafe { std::arch::x86_64::_rdtsc() } as usize).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let page = (random >> 32) % (len / PAGE) * PAGE;
    let first = (random >> 20) % (PAGE / LINE) * LINE;
    // Not next to the first, which would bring it.
    let second = (first + PAGE / 4 + (random >> 26) % (PAGE / 2 / LINE) * LINE) % PAGE;
    // SAFETY: both are within a page of the range. The first read finds the page in the page tables, which may take as
    // long as main memory does; the second one tells.
    unsafe {
        ticks_to_read(base.add(page + first));
        ticks_to_read(base.add(page + second)) > FAR
    }
}

/// # Safety
///
/// The byte can be read.
unsafe fn ticks_to_read(at: *const u8) -> u64 {
    let (before, after): (u64, u64);
    // SAFETY: reads one byte that the caller vouches for; the fences only order what is around it.
    unsafe {
        asm!(
            "lfence",
            "rdtsc",
            "lfence",
            "shl rdx, 32",
            "lea {before}, [rax + rdx]",
            "movzx eax, byte ptr [{at}]",
            "lfence",
            "rdtsc",
            "shl rdx, 32",
            "lea {after}, [rax + rdx]",
            at = in(reg) at,
            before = out(reg) before,
            after = out(reg) after,
            out("rax") _,
            out("rdx") _,
            options(nostack, readonly),
        );
    }
    after.saturating_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_at_hand_is_near_and_the_answer_far_holds_for_some_copies() {
        let buffer = vec![1u8; 64 << 10];
        let touch = || std::hint::black_box(&buffer).iter().map(|byte| u64::from(*byte)).sum::<u64>();
        // Another process may take the core between the touch and the look, so: at least once in many tries.
        let near = (0..100).any(|_| {
            std::hint::black_box(touch());
            // SAFETY: the buffer is that long.
            !unsafe { look(buffer.as_ptr(), buffer.len()) }
        });
        assert!(near, "what was just read is far");

        let distance = Distance { far_copies_left: AtomicU8::new(2) };
        for left in [1, 0] {
            // SAFETY: as above.
            assert!(unsafe { distance.is_far(buffer.as_ptr(), buffer.len()) });
            assert_eq!(distance.far_copies_left.load(Ordering::Relaxed), left);
        }
    }
}
