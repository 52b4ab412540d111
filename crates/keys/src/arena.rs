//! Hands out small pieces of secret memory, many to a mapping.
//!
//! In goes a size of at most [`MAX_PIECE`] bytes; out comes a [`Piece`], zeroed when taken and zeroed when given
//! back. Mappings are never returned: a process needs as many as it has once had keys at the same time.

use std::{
    ptr::NonNull,
    sync::{Mutex, MutexGuard, PoisonError},
};

use zeroize::Zeroize;

use crate::{
    mapping::{self, Mapping},
    secret::SecretError,
};

/// Largest piece.
pub(crate) const MAX_PIECE: usize = 4096;
const SLOT: usize = 64;
const CHUNK: usize = 16 << 10;
const SLOTS: usize = CHUNK / SLOT;

struct Chunk {
    mapping: Mapping,
    taken: [bool; SLOTS],
}

struct Arena {
    chunks: Vec<Chunk>,
}

static ARENA: Mutex<Arena> = Mutex::new(Arena { chunks: Vec::new() });

fn arena() -> MutexGuard<'static, Arena> {
    // The book-keeping is whole after every statement, so a panic elsewhere does not spoil it.
    ARENA.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Arena {
    fn grow(&mut self) -> Result<(), SecretError> {
        let mapping = Mapping::private(mapping::probe(), CHUNK)?;
        self.chunks.push(Chunk { mapping, taken: [false; SLOTS] });
        Ok(())
    }

    fn find(&self, count: usize) -> Option<(usize, usize)> {
        self.chunks.iter().enumerate().find_map(|(index, chunk)| {
            let first = chunk.taken.windows(count).position(|run| run.iter().all(|taken| !taken))?;
            Some((index, first))
        })
    }

    fn free_slots(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.taken.iter().filter(|taken| !**taken).count()).sum()
    }
}

/// A piece of secret memory that nobody else has.
pub(crate) struct Piece {
    at: NonNull<u8>,
    chunk: usize,
    first: usize,
    count: usize,
}

// SAFETY: a piece is exclusively owned memory of the process; it is tied to no thread.
unsafe impl Send for Piece {}
// SAFETY: `&Piece` allows reading only.
unsafe impl Sync for Piece {}

impl Piece {
    /// A piece of at least `bytes` bytes, all zero.
    pub(crate) fn take(bytes: usize) -> Result<Self, SecretError> {
        debug_assert!(bytes <= MAX_PIECE);
        let count = bytes.div_ceil(SLOT).max(1);
        let mut arena = arena();
        let (chunk, first) = match arena.find(count) {
            Some(place) => place,
            None => {
                arena.grow()?;
                (arena.chunks.len() - 1, 0)
            }
        };
        let taken = &mut arena.chunks[chunk];
        taken.taken[first..first + count].fill(true);
        // SAFETY: first + count ≤ SLOTS, so the result is inside the chunk's mapping.
        let at = unsafe { taken.mapping.base().add(first * SLOT) };
        Ok(Self { at, chunk, first, count })
    }

    /// The bytes.
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the slots are mapped for the life of the process, initialised (the kernel zeroes pages), and ours
        // alone until drop; `&self` forbids writing meanwhile.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.count * SLOT) }
    }

    /// The bytes, to be written.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` forbids any other access meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.count * SLOT) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.as_mut_slice().zeroize();
        arena().chunks[self.chunk].taken[self.first..self.first + self.count].fill(false);
    }
}

/// Maps memory ahead, so that `bytes` more bytes of keys need no system call.
pub(crate) fn reserve(bytes: usize) -> Result<(), SecretError> {
    let mut arena = arena();
    while arena.free_slots() < bytes.div_ceil(SLOT) {
        arena.grow()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn piece_is_zeroed_before_another_gets_it() {
        let mut piece = Piece::take(200).unwrap();
        piece.as_mut_slice().fill(0xa5);
        let (chunk, first) = (piece.chunk, piece.first);
        drop(piece);
        // Other tests may take the slots first; whoever has them now or later finds zeros, so look until they are ours.
        let mut held = Vec::new();
        for _ in 0..64 * SLOTS {
            let piece = Piece::take(200).unwrap();
            assert!(piece.as_slice().iter().all(|b| *b == 0));
            if (piece.chunk, piece.first) == (chunk, first) {
                return;
            }
            held.push(piece);
            if held.len() > SLOTS {
                held.clear();
            }
        }
    }

    #[test]
    fn pieces_never_overlap() {
        let pieces: Vec<Piece> = (1..200).map(|n| Piece::take(n * 7 % 500 + 1).unwrap()).collect();
        let mut spans: Vec<(usize, usize)> =
            pieces.iter().map(|p| (p.as_slice().as_ptr() as usize, p.as_slice().len())).collect();
        spans.sort_unstable();
        assert!(spans.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
    }

    #[test]
    fn reserved_memory_is_there() {
        reserve(40_000).unwrap();
        assert!(!arena().chunks.is_empty());
    }
}
