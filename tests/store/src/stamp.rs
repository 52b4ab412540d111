//! What tests write: 512-byte blocks that say which block they are, and which write put them there.
//!
//! A block is 32 cells of 16 bytes, as long as a cipher block: place (48 bits), write (48 bits), cell (8 bits), check
//! (24 bits). A block that is torn, misplaced or decrypted with the wrong tweak says so by itself; [`explain`] reads it.

/// Bytes of a block: what a disk writes whole or not at all.
pub const BLOCK: u64 = 512;
const CELL: usize = 16;
const CELLS: usize = BLOCK as usize / CELL;
const LOW_48: u64 = (1 << 48) - 1;

/// Stamped bytes for a write: `blocks` blocks from block `first`, put there by write `write` (not 0).
pub fn stamped(first: u64, blocks: u64, write: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((blocks * BLOCK) as usize);
    for block in first..first + blocks {
        for index in 0..CELLS {
            bytes.extend_from_slice(&cell(block, write, index));
        }
    }
    bytes
}

fn cell(block: u64, write: u64, index: usize) -> [u8; CELL] {
    let mut bytes = [0; CELL];
    bytes[..6].copy_from_slice(&(block & LOW_48).to_le_bytes()[..6]);
    bytes[6..12].copy_from_slice(&(write & LOW_48).to_le_bytes()[..6]);
    bytes[12] = index as u8;
    let mut check = (block & LOW_48).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (write & LOW_48).rotate_left(17);
    check = (check ^ index as u64).wrapping_mul(0xff51_afd7_ed55_8ccd);
    bytes[13..].copy_from_slice(&check.to_be_bytes()[..3]);
    bytes
}

/// Place and write of a cell that is whole, at its place within its block.
fn read_cell(bytes: &[u8], index: usize) -> Option<(u64, u64)> {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let (block, write) = (number(bytes.get(..6)?), number(bytes.get(6..12)?));
    (bytes == cell(block, write, index)).then_some((block, write))
}

/// What the bytes of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A whole block: its place, its write.
    Stamped {
        /// Where it says it belongs.
        block: u64,
        /// Which write put it there.
        write: u64,
    },
    /// Cells of more than one block or write, or whole cells and others.
    Torn {
        /// The first whole cell's place.
        block: u64,
        /// Its write.
        write: u64,
        /// How many of the 32 cells are of that write.
        cells: usize,
    },
    /// Nothing but zeros.
    Zeros,
    /// Nothing that was ever stamped.
    Foreign,
}

/// Reads a block of 512 bytes.
pub fn explain(block: &[u8]) -> Content {
    if block.iter().all(|byte| *byte == 0) {
        return Content::Zeros;
    }
    let cells: Vec<_> = block.chunks(CELL).enumerate().map(|(index, cell)| read_cell(cell, index)).collect();
    let Some((block, write)) = cells.iter().copied().flatten().next() else { return Content::Foreign };
    match cells.iter().filter(|cell| **cell == Some((block, write))).count() {
        CELLS => Content::Stamped { block, write },
        cells => Content::Torn { block, write, cells },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_says_what_it_is_whole_torn_or_foreign() {
        let (old, new) = (stamped(7, 1, 3), stamped(7, 1, 4));
        assert_eq!(explain(&old), Content::Stamped { block: 7, write: 3 });
        assert_eq!(explain(&stamped(6, 2, 4)[512..]), Content::Stamped { block: 7, write: 4 });
        let torn = [&new[..160], &old[160..]].concat();
        assert_eq!(explain(&torn), Content::Torn { block: 7, write: 4, cells: 10 });
        assert_eq!(explain(&[0; 512]), Content::Zeros);
        assert_eq!(explain(&[9; 512]), Content::Foreign);
        // Turned by one cell: every cell is somewhere else than it says.
        let mut turned = old.clone();
        turned.rotate_left(16);
        assert_eq!(explain(&turned), Content::Foreign);
    }
}
