//! Memory for payloads, at page boundaries, kept for the next request and given back when there is none.

use std::io;

use crate::aligned::Aligned;

/// Sizes that are kept, and how many of each.
const CLASSES: [(usize, usize); 3] = [(16 << 10, 64), (256 << 10, 8), (2 << 20, 2)];
/// What may be out at a time. A single request of any allowed length is let through.
const BUDGET: usize = 64 << 20;

/// After so many small ones in a row large ones are not wanted any more.
const SMALL_NOW: u32 = 64;

/// Buffers of one connection.
#[derive(Default)]
pub(super) struct Buffers {
    free: [Vec<Aligned>; CLASSES.len()],
    out: usize,
    small_in_a_row: u32,
}

/// One of them. Its content is whatever was there.
pub(super) struct Buffer {
    memory: Aligned,
    capacity: usize,
    length: usize,
}

impl Buffer {
    pub(super) fn base(&self) -> *mut u8 {
        self.memory.base()
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.memory.first(self.length)
    }
}

impl Buffers {
    /// Whether another request should be taken up.
    pub(super) fn has_room(&self) -> bool {
        self.out < BUDGET
    }

    /// A buffer of this length.
    ///
    /// # Errors
    ///
    /// No memory.
    pub(super) fn take(&mut self, length: usize) -> io::Result<Buffer> {
        let class = CLASSES.iter().position(|(size, _)| length <= *size);
        let capacity = class.map_or(length, |class| CLASSES[class].0);
        self.small_in_a_row = if class == Some(0) { self.small_in_a_row.saturating_add(1) } else { 0 };
        if self.small_in_a_row == SMALL_NOW {
            self.free[1..].iter_mut().for_each(Vec::clear);
        }
        let memory = match class.and_then(|class| self.free[class].pop()) {
            Some(memory) => memory,
            None => Aligned::new(capacity)?,
        };
        self.out += capacity;
        Ok(Buffer { memory, capacity, length })
    }

    /// Takes one back.
    pub(super) fn give_back(&mut self, buffer: Buffer) {
        self.out -= buffer.capacity;
        if let Some(class) = CLASSES.iter().position(|(size, _)| buffer.capacity == *size)
            && self.free[class].len() < CLASSES[class].1
        {
            self.free[class].push(buffer.memory);
        }
    }

    /// Whether there is memory here that an idle connection should not hold.
    pub(super) fn keep_much(&self) -> bool {
        self.free[1..].iter().any(|free| !free.is_empty())
    }

    /// Gives back what nobody uses.
    pub(super) fn release(&mut self) {
        self.free = Default::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_is_bounded_and_what_comes_back_is_kept_within_limits() {
        let mut buffers = Buffers::default();
        let mut buffer = buffers.take(5000).unwrap();
        buffer.bytes().fill(1);
        assert_eq!((buffer.len(), buffer.bytes().len()), (5000, 5000));
        let base = buffer.base();
        buffers.give_back(buffer);
        assert!(!buffers.keep_much());
        let again = buffers.take(16384).unwrap();
        assert_eq!(again.base(), base);
        buffers.give_back(again);
        let large: Vec<_> = (0..3).map(|_| buffers.take(32 << 20).unwrap()).collect();
        assert!(!buffers.has_room());
        large.into_iter().for_each(|buffer| buffers.give_back(buffer));
        assert!(buffers.has_room() && !buffers.keep_much());
        let some: Vec<_> = (0..20).map(|_| buffers.take(200_000).unwrap()).collect();
        some.into_iter().for_each(|buffer| buffers.give_back(buffer));
        assert_eq!(buffers.free[1].len(), 8);
        assert!(buffers.keep_much());
        buffers.release();
        assert!(!buffers.keep_much());
        let one = buffers.take(200_000).unwrap();
        buffers.give_back(one);
        for _ in 0..SMALL_NOW {
            assert!(buffers.keep_much());
            let small = buffers.take(512).unwrap();
            buffers.give_back(small);
        }
        assert!(!buffers.keep_much());
    }
}
