//! Memory between the client's and the store: small buffers that the kernel may have pinned, and large ones that take no
//! room until used.

use std::io;

use crate::aligned::Aligned;

/// Bytes and number of the small ones.
const SMALL: usize = 16 << 10;
const SMALLS: usize = 32;
/// Bytes of a large one, and so the most bytes of a piece.
pub(super) const LARGE: usize = 256 << 10;
const LARGES: usize = 8;

/// The buffers of a lane.
pub(super) struct Bounce {
    small: Buffers,
    large: Buffers,
    /// Whether a large one was used since their memory was given back.
    large_used: bool,
}

/// Equal buffers in one stretch of memory.
struct Buffers {
    memory: Aligned,
    size: usize,
    free: Vec<u16>,
    count: usize,
}

/// One buffer, lent to one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    Small(u16),
    Large(u16),
}

impl Buffers {
    fn new(size: usize, count: usize) -> io::Result<Self> {
        Ok(Self { memory: Aligned::new(size * count)?, size, free: (0..count as u16).rev().collect(), count })
    }

    fn at(&self, slot: u16) -> *mut u8 {
        // SAFETY: slots are below `count`.
        unsafe { self.memory.base().add(usize::from(slot) * self.size) }
    }
}

impl Bounce {
    pub(super) fn new() -> io::Result<Self> {
        let (small, large) = (Buffers::new(SMALL, SMALLS)?, Buffers::new(LARGE, LARGES)?);
        Ok(Self { small, large, large_used: false })
    }

    /// The memory of the small ones, for the kernel to pin.
    pub(super) fn small(&self) -> libc::iovec {
        libc::iovec { iov_base: self.small.memory.base().cast(), iov_len: SMALL * SMALLS }
    }

    /// A buffer of at least this length, which is at most [`LARGE`]; none if all are lent.
    pub(super) fn lend(&mut self, length: usize) -> Option<Slot> {
        if length <= SMALL
            && let Some(slot) = self.small.free.pop()
        {
            return Some(Slot::Small(slot));
        }
        let slot = self.large.free.pop()?;
        self.large_used = true;
        Some(Slot::Large(slot))
    }

    pub(super) fn give_back(&mut self, slot: Slot) {
        match slot {
            Slot::Small(slot) => self.small.free.push(slot),
            Slot::Large(slot) => self.large.free.push(slot),
        }
    }

    pub(super) fn memory(&self, slot: Slot) -> *mut u8 {
        match slot {
            Slot::Small(slot) => self.small.at(slot),
            Slot::Large(slot) => self.large.at(slot),
        }
    }

    /// Whether there is large memory that nobody uses.
    pub(super) fn holds_unused(&self) -> bool {
        self.large_used && self.large.free.len() == self.large.count
    }

    /// Gives the large ones' memory back. None of them is lent.
    pub(super) fn release(&mut self) {
        self.large.memory.release();
        self.large_used = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_lent_once_and_large_ones_are_held_until_released() {
        let mut bounce = Bounce::new().unwrap();
        let slots: Vec<Slot> = std::iter::from_fn(|| bounce.lend(512)).collect();
        assert_eq!(slots.len(), SMALLS + LARGES);
        assert!(slots[..SMALLS].iter().all(|slot| matches!(slot, Slot::Small(_))));
        let mut places: Vec<usize> = slots.iter().map(|slot| bounce.memory(*slot) as usize).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), slots.len());
        assert!(!bounce.holds_unused());
        slots.into_iter().for_each(|slot| bounce.give_back(slot));
        assert!(bounce.holds_unused());
        bounce.release();
        assert!(!bounce.holds_unused());
        assert!(matches!(bounce.lend(SMALL + 1), Some(Slot::Large(_))));
    }
}
