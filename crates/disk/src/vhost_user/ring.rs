//! A split virtqueue as its device sees it (VIRTIO 1.2 §2.7): takes heads of chains, walks them, gives used ones back.
//!
//! Nothing of the guest's is believed: indices, lengths and addresses are checked each time they are used, each is read
//! once, and a walk is bounded by the sizes of its tables. No I/O, no descriptors, and no block device in here.

use std::sync::{
    Arc,
    atomic::{AtomicU16, Ordering, fence},
};

use super::memory::{GuestMemory, Piece};

/// Largest queue.
pub const MAX_SIZE: u16 = 1024;
/// Most descriptors of an indirect table.
const MAX_INDIRECT: u32 = 1024;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;
const DESCRIPTOR: u64 = 16;

/// What the driver did that no driver may do. The queue stops.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RingError {
    /// Zero, no power of two, or larger than [`MAX_SIZE`].
    #[error("queue of {0} descriptors")]
    Size(u32),
    /// A part of the ring is not in the guest's memory, or lies askew.
    #[error("the {0} is not in guest memory")]
    Address(&'static str),
    /// More new chains than the queue has descriptors.
    #[error("the available index jumped by {0}")]
    Available(u16),
    /// A descriptor outside the table.
    #[error("descriptor {0} is not in its table")]
    Index(u16),
    /// A chain that does not end.
    #[error("a chain of descriptors has no end")]
    Endless,
    /// A chain that is in use.
    #[error("descriptor {0} was made available twice")]
    Twice(u16),
    /// Memory that is not the guest's.
    #[error("a descriptor points outside guest memory")]
    Memory,
    /// Something to read after something to write.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// A table of descriptors of impossible size, within another one, or not agreed on.
    #[error("an indirect table is not as it must be")]
    Indirect,
}

/// Where the front end says the parts of a ring are, by its own addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
}

/// The memory of one chain: what the device reads, then what it writes.
#[derive(Debug, Default)]
pub struct Chain {
    /// Readable pieces.
    pub readable: Vec<Piece>,
    /// Writable pieces.
    pub writable: Vec<Piece>,
}

impl Chain {
    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }
}

/// One queue.
pub struct Ring {
    memory: Arc<GuestMemory>,
    features: RingFeatures,
    size: u16,
    descriptors: *const u8,
    available: *const u8,
    used: *mut u8,
    next_available: u16,
    /// What the driver had made available when it was last asked.
    known_available: u16,
    next_used: u16,
    published_used: u16,
    /// The published index when the driver was last told, or would have been.
    told_used: u16,
}

// SAFETY: the pointers lie in the regions that `memory` keeps mapped; they belong to the process, not to a thread.
unsafe impl Send for Ring {}

impl Ring {
    /// A queue at these addresses that goes on at `next_available`; what is used already says the ring itself.
    ///
    /// # Errors
    ///
    /// [`RingError`].
    pub fn new(
        memory: Arc<GuestMemory>,
        at: RingAddresses,
        size: u32,
        features: RingFeatures,
        next_available: u16,
    ) -> Result<Self, RingError> {
        let checked = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= MAX_SIZE);
        let size = checked.ok_or(RingError::Size(size))?;
        let entries = u64::from(size);
        let part = |address: u64, len: u64, align: usize, name| {
            let piece = memory.whole_at_user(address, len).ok_or(RingError::Address(name))?;
            if (piece.base as usize).is_multiple_of(align) {
                Ok(piece.base)
            } else {
                Err(RingError::Address(name))
            }
        };
        let descriptors = part(at.descriptors, DESCRIPTOR * entries, 16, "descriptor table")?;
        // Each with its event index at the end, whether or not that was agreed on: every ring has room for it.
        let available = part(at.available, 6 + 2 * entries, 2, "available ring")?;
        let used = part(at.used, 6 + 8 * entries, 4, "used ring")?;
        let mut ring = Self {
            memory,
            features,
            size,
            descriptors,
            available,
            used,
            next_available,
            known_available: next_available,
            next_used: 0,
            published_used: 0,
            told_used: 0,
        };
        let used = ring.word(ring.used, 2).load(Ordering::Acquire);
        (ring.next_used, ring.published_used, ring.told_used) = (used, used, used);
        Ok(ring)
    }

    /// Its number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Bytes of its used ring. The last two say at which chain we want to be told.
    pub fn used_len(&self) -> u64 {
        6 + 8 * u64::from(self.size)
    }

    /// Index of the next chain to be taken.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Goes on elsewhere: after a crash what was taken and not used is known only from the in-flight area.
    pub fn resume_at(&mut self, next_available: u16) {
        self.next_available = next_available;
        self.known_available = next_available;
    }

    /// The used index the driver sees.
    pub fn published_used(&self) -> u16 {
        self.published_used
    }

    /// The guest's memory it lies in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// A 16-bit field of the available or used ring.
    #[inline]
    fn word(&self, ring: *const u8, offset: usize) -> &AtomicU16 {
        // SAFETY: callers stay within the lengths checked in `new`, at even offsets; the memory stays mapped as long as
        // `self.memory`, and everybody else uses it atomically or is a guest that hurts itself.
        unsafe { AtomicU16::from_ptr(ring.cast_mut().add(offset).cast()) }
    }

    /// The head of the next chain, if there is one.
    ///
    /// # Errors
    ///
    /// [`RingError`].
    #[inline]
    pub fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        if self.next_available == self.known_available {
            self.known_available = self.word(self.available, 2).load(Ordering::Acquire);
            let new = self.known_available.wrapping_sub(self.next_available);
            if new > self.size {
                self.known_available = self.next_available;
                return Err(RingError::Available(new));
            }
            if new == 0 {
                return Ok(None);
            }
        }
        let slot = usize::from(self.next_available & (self.size - 1));
        let head = self.word(self.available, 4 + 2 * slot).load(Ordering::Relaxed);
        if head >= self.size {
            return Err(RingError::Index(head));
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Collects a chain's memory.
    ///
    /// # Errors
    ///
    /// [`RingError`].
    pub fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.clear();
        let (mut table, mut entries) = (self.descriptors, u32::from(self.size));
        let (mut index, mut left, mut indirect) = (head, entries, false);
        loop {
            if u32::from(index) >= entries {
                return Err(RingError::Index(index));
            }
            left = left.checked_sub(1).ok_or(RingError::Endless)?;
            // SAFETY: `table` has `entries` descriptors, all in mapped memory, and `index` is below that.
            let (address, rest) = unsafe { read_pair(table.add(usize::from(index) * DESCRIPTOR as usize)) };
            let (len, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
            if flags & F_INDIRECT != 0 {
                let count = len / DESCRIPTOR as u32;
                let sound = self.features.indirect
                    && !indirect
                    && flags & F_NEXT == 0
                    && len.is_multiple_of(DESCRIPTOR as u32)
                    && (1..=MAX_INDIRECT).contains(&count);
                if !sound {
                    return Err(RingError::Indirect);
                }
                table = self.memory.whole(address, u64::from(len)).ok_or(RingError::Memory)?;
                (entries, left, index, indirect) = (count, count, 0, true);
                continue;
            }
            if flags & F_WRITE != 0 {
                self.add(&mut chain.writable, address, len)?;
            } else if chain.writable.is_empty() {
                self.add(&mut chain.readable, address, len)?;
            } else {
                return Err(RingError::Order);
            }
            if flags & F_NEXT == 0 {
                return Ok(());
            }
            index = next;
        }
    }

    /// Adds a descriptor's memory: one piece, or more where it crosses regions. What follows the last piece without a
    /// gap makes that one longer.
    fn add(&self, pieces: &mut Vec<Piece>, mut guest: u64, len: u32) -> Result<(), RingError> {
        let mut left = u64::from(len);
        while left > 0 {
            let piece = self.memory.piece(guest, left).ok_or(RingError::Memory)?;
            left -= piece.len as u64;
            guest = guest.wrapping_add(piece.len as u64);
            match pieces.last_mut() {
                Some(last)
                    if last.guest + last.len as u64 == piece.guest
                        && std::ptr::eq(last.base.wrapping_add(last.len), piece.base) =>
                {
                    last.len += piece.len;
                }
                _ => pieces.push(piece),
            }
        }
        Ok(())
    }

    /// Gives a chain back, `written` bytes of its memory written to. The driver sees it at the next
    /// [`Ring::publish`]. Gives the place of the entry within the used ring, for the dirty log.
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) -> u64 {
        let offset = 4 + 8 * usize::from(self.next_used & (self.size - 1));
        // SAFETY: entry of the used ring, within the length checked in `new`, four bytes aligned.
        unsafe {
            let entry = self.used.add(offset).cast::<u32>();
            entry.write_volatile(u32::from(head));
            entry.add(1).write_volatile(written);
        }
        self.next_used = self.next_used.wrapping_add(1);
        offset as u64
    }

    /// Chains given back that the driver does not see yet.
    #[inline]
    pub fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published_used)
    }

    /// Lets the driver see what was given back.
    #[inline]
    pub fn publish(&mut self) {
        self.word(self.used, 2).store(self.next_used, Ordering::Release);
        self.published_used = self.next_used;
    }

    /// Whether the driver wants to be told of what was published since it was last told.
    #[inline]
    pub fn must_tell(&mut self) -> bool {
        let (old, new) = (self.told_used, self.published_used);
        if old == new {
            return false;
        }
        // The index must be seen before the driver's wish is read: it does these in the other order.
        fence(Ordering::SeqCst);
        self.told_used = new;
        if self.features.event_idx {
            let wish = self.word(self.available, 4 + 2 * usize::from(self.size)).load(Ordering::Relaxed);
            // Whether `wish` was passed on the way from `old` to `new` (VIRTIO 1.2 §2.7.10, vring_need_event).
            new.wrapping_sub(wish).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.word(self.available, 0).load(Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver to tell when there is a new chain. True if there is one already: then it has to be taken, for
    /// nobody will tell of it.
    #[inline]
    pub fn ask_to_be_told(&mut self) -> bool {
        if self.features.event_idx {
            let place = 4 + 8 * usize::from(self.size);
            self.word(self.used, place).store(self.next_available, Ordering::Relaxed);
        } else {
            self.word(self.used, 0).store(0, Ordering::Relaxed);
        }
        // The wish must be seen before the index is read: the driver does these in the other order.
        fence(Ordering::SeqCst);
        self.word(self.available, 2).load(Ordering::Acquire) != self.next_available
    }

    /// Tells the driver that it need not tell.
    #[inline]
    pub fn ask_for_silence(&mut self) {
        // With event indices the old wish is passed already, which is silence enough.
        if !self.features.event_idx {
            self.word(self.used, 0).store(USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }
}

/// Two little-endian words of guest memory, each read once.
///
/// # Safety
///
/// Sixteen bytes are mapped there.
#[inline]
pub(crate) unsafe fn read_pair(at: *const u8) -> (u64, u64) {
    #[repr(C, packed)]
    #[derive(Clone, Copy)]
    struct Pair(u64, u64);
    // SAFETY: the caller vouches for the memory; a packed type may lie anywhere.
    let Pair(first, second) = unsafe { at.cast::<Pair>().read_volatile() };
    (u64::from_le(first), u64::from_le(second))
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
