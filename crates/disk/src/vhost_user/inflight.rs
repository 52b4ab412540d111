//! Which requests are in flight, in memory that outlives this process: the front end keeps it and gives it to whoever
//! serves the disk next (vhost-user specification, "Inflight I/O tracking", split queues).
//!
//! A part per queue: 16 bytes of head, then 16 bytes per descriptor. A request is marked before it is worked on, its
//! mark goes after the driver can see that it is used; what happens if this process dies in between is settled by
//! [`InflightQueue::recover`]. The last 64 bytes of the area are ours: what the guest set in the configuration space,
//! which would be forgotten otherwise.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering},
};

use super::mapping::Mapping;

/// Each queue's part begins at a multiple of this.
const ALIGNMENT: u64 = 64;
const HEAD: usize = 16;
const ENTRY: usize = 16;
/// Offsets within a part's head.
const VERSION: usize = 8;
const COUNT: usize = 10;
const BATCH: usize = 12;
const USED: usize = 14;
/// Offsets within an entry.
const NEXT: usize = 6;
const COUNTER: usize = 8;
/// The layout's version in the specification.
const LAYOUT: u16 = 1;
/// What stands in front of our own bytes.
const OURS: u64 = u64::from_le_bytes(*b"vmseal\x01\0");
const OUR_BYTES: u64 = 64;

/// Why an area cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum InflightError {
    /// No queues, too many, or queues of an impossible size.
    #[error("in-flight area for {queues} queues of {size}")]
    Shape {
        /// How many.
        queues: u16,
        /// How large.
        size: u16,
    },
    /// Not at a multiple of eight.
    #[error("in-flight area lies askew")]
    Askew,
    /// Shorter than its queues need.
    #[error("in-flight area is too short")]
    TooShort,
    /// Made by somebody else, for other queues, or damaged.
    #[error("in-flight area of queue {0} is not one of ours")]
    Foreign(u16),
}

/// Bytes of an area.
pub fn area_len(queues: u16, size: u16) -> u64 {
    part_len(size) * u64::from(queues) + OUR_BYTES
}

fn part_len(size: u16) -> u64 {
    (HEAD as u64 + ENTRY as u64 * u64::from(size)).next_multiple_of(ALIGNMENT)
}

/// An area that is mapped.
#[derive(Debug, Clone)]
pub struct InflightArea {
    mapping: Arc<Mapping>,
    queues: u16,
    size: u16,
}

impl InflightArea {
    /// Takes an area over; parts nobody ever wrote to are made ready.
    ///
    /// # Errors
    ///
    /// [`InflightError`].
    pub fn new(mapping: Mapping, queues: u16, size: u16) -> Result<Self, InflightError> {
        if queues == 0 || !size.is_power_of_two() {
            return Err(InflightError::Shape { queues, size });
        }
        if (mapping.len() as u64) < part_len(size) * u64::from(queues) {
            return Err(InflightError::TooShort);
        }
        if !(mapping.start() as usize).is_multiple_of(8) {
            return Err(InflightError::Askew);
        }
        let area = Self { mapping: Arc::new(mapping), queues, size };
        for index in 0..queues {
            let part = area.part(index);
            match (part.half(VERSION).load(Ordering::Relaxed), part.half(COUNT).load(Ordering::Relaxed)) {
                (0, 0) => {
                    part.half(COUNT).store(size, Ordering::Relaxed);
                    part.half(VERSION).store(LAYOUT, Ordering::Release);
                }
                (LAYOUT, count) if count == size => {}
                _ => return Err(InflightError::Foreign(index)),
            }
        }
        Ok(area)
    }

    fn part(&self, index: u16) -> InflightQueue {
        let start = self.mapping.start().wrapping_add((part_len(self.size) * u64::from(index)) as usize);
        InflightQueue { _mapping: self.mapping.clone(), start, size: self.size, counter: 0 }
    }

    /// The part of a queue of `size` descriptors, if there is one that fits.
    pub fn queue(&self, index: u16, size: u16) -> Option<InflightQueue> {
        (index < self.queues && size <= self.size).then(|| self.part(index))
    }

    /// Our own bytes, if there is room for them.
    fn ours(&self) -> Option<(&AtomicU64, &AtomicU8)> {
        let offset = part_len(self.size) * u64::from(self.queues);
        if (self.mapping.len() as u64) < offset + OUR_BYTES {
            return None;
        }
        let start = self.mapping.start().wrapping_add(offset as usize);
        // SAFETY: within the mapping, which lives as long as `self`, and aligned: so are the area and its parts.
        unsafe { Some((AtomicU64::from_ptr(start.cast()), AtomicU8::from_ptr(start.add(8)))) }
    }

    /// Whether the guest had switched to write-through; `None` if nobody wrote that down.
    pub fn write_through(&self) -> Option<bool> {
        let (mark, value) = self.ours()?;
        (mark.load(Ordering::Acquire) == OURS).then(|| value.load(Ordering::Relaxed) != 0)
    }

    /// Writes it down.
    pub fn remember_write_through(&self, write_through: bool) {
        if let Some((mark, value)) = self.ours() {
            value.store(u8::from(write_through), Ordering::Relaxed);
            mark.store(OURS, Ordering::Release);
        }
    }

    /// Whether the front end took it away.
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }
}

/// One queue's part.
pub struct InflightQueue {
    _mapping: Arc<Mapping>,
    start: *mut u8,
    size: u16,
    counter: u64,
}

// SAFETY: an address in a mapping that is kept; accesses are atomic.
unsafe impl Send for InflightQueue {}

impl InflightQueue {
    fn half(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers stay within the part's head, at even offsets; parts begin at multiples of eight.
        unsafe { AtomicU16::from_ptr(self.start.add(offset).cast()) }
    }

    /// An entry; heads past the end get the last one, which is a guest's own harm.
    fn entry(&self, head: u16) -> *mut u8 {
        self.start.wrapping_add(HEAD + ENTRY * usize::from(head.min(self.size - 1)))
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        // SAFETY: within the entry.
        unsafe { AtomicU8::from_ptr(self.entry(head)) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        // SAFETY: within the entry, aligned as entries are.
        unsafe { AtomicU16::from_ptr(self.entry(head).add(NEXT).cast()) }
    }

    fn count(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as for `next`.
        unsafe { AtomicU64::from_ptr(self.entry(head).add(COUNTER).cast()) }
    }

    /// Settles what a process that died left, given the used index the driver sees.
    ///
    /// Gives the heads of chains that were taken and not used, in the order they were taken in.
    pub fn recover(&mut self, used: u16) -> Vec<u16> {
        let last = self.half(USED).load(Ordering::Acquire);
        if last != used {
            // It died between showing a batch and taking its marks away.
            let mut head = self.half(BATCH).load(Ordering::Relaxed);
            for _ in 0..used.wrapping_sub(last).min(self.size) {
                if head >= self.size {
                    break;
                }
                self.mark(head).store(0, Ordering::Relaxed);
                head = self.next(head).load(Ordering::Relaxed);
            }
            self.half(USED).store(used, Ordering::Release);
        }
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.mark(*head).load(Ordering::Acquire) != 0)
            .map(|head| (self.count(head).load(Ordering::Relaxed), head))
            .collect();
        left.sort_unstable();
        self.counter = left.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        left.into_iter().map(|(_, head)| head).collect()
    }

    /// A chain is taken and will be worked on.
    #[inline]
    pub fn begin(&mut self, head: u16) {
        self.count(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.mark(head).store(1, Ordering::Release);
    }

    /// A chain stands in the used ring, but the driver does not see it yet.
    #[inline]
    pub fn link(&mut self, head: u16) {
        let before = self.half(BATCH).load(Ordering::Relaxed);
        self.next(head).store(before, Ordering::Relaxed);
        self.half(BATCH).store(head, Ordering::Release);
    }

    /// The driver sees these chains as used, and `used` as the index.
    #[inline]
    pub fn settle(&mut self, heads: &[u16], used: u16) {
        for &head in heads {
            self.mark(head).store(0, Ordering::Release);
        }
        self.half(USED).store(used, Ordering::Release);
    }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
