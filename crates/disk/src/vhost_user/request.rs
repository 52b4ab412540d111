//! What a chain of descriptors asks of the disk (VIRTIO 1.2 §5.2.6).
//!
//! In: the memory of a chain. Out: an operation with its range and its memory, or a status that is known at once, and
//! where the status goes. How header, data and status are spread over descriptors is of no matter.

use super::{
    features,
    memory::Piece,
    ring::{Chain, read_pair},
};
use crate::lane::Operation;

/// Carried out.
pub const OK: u8 = 0;
/// Not carried out.
pub const IO_ERROR: u8 = 1;
/// Unknown, or not offered.
pub const UNSUPPORTED: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Bytes of a request's header, and of the range of a discard.
const HEADER: usize = 16;
/// Bytes of a disk's serial number.
pub const ID_LEN: usize = 20;
const SECTOR: u64 = 512;
/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
const UNMAP: u32 = 1;

/// A chain that is no request at all: the queue stops.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RequestError {
    /// Less to read than a header.
    #[error("a request without a header")]
    NoHeader,
    /// Nothing to write a status to.
    #[error("a request without room for its status")]
    NoStatus,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// By the volume. Data are the chain's pieces: readable ones of a write, writable ones of a read.
    Carry {
        /// What.
        operation: Operation,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
    },
    /// The serial number, into the writable pieces.
    Identify,
    /// Nothing; this is the status.
    Answer(u8),
}

/// A request.
#[derive(Debug, Clone, Copy)]
pub struct Parsed {
    /// What is to be done.
    pub command: Command,
    /// Where its status goes.
    pub status: *mut u8,
    /// The same for the guest.
    pub status_guest: u64,
    /// Bytes it may write to, the status included.
    pub writable: u64,
}

/// Most bytes of one read or write. Drivers ask for a few megabytes; a chain could name the same memory over and over, and
/// who stops the queue waits for all of it.
const MAX_DATA: u64 = 1 << 30;

/// Reads a request; what is left in `chain` is its data.
///
/// `accepted` are the features that were agreed on, `fua` whether writes have to be durable.
///
/// # Errors
///
/// [`RequestError`].
pub fn parse(chain: &mut Chain, accepted: u64, fua: bool) -> Result<Parsed, RequestError> {
    let writable = total(&chain.writable);
    let (status, status_guest) = take_last_byte(&mut chain.writable).ok_or(RequestError::NoStatus)?;
    let (kind, sector) = take_pair(&mut chain.readable).ok_or(RequestError::NoHeader)?;
    let data = match kind as u32 {
        IN => Some((Operation::Read, writable - 1)),
        OUT => Some((Operation::Write { fua }, total(&chain.readable))),
        _ => None,
    };
    let command = match (kind as u32, data) {
        (_, Some((operation, len))) => match sector.checked_mul(SECTOR) {
            Some(offset) if len <= MAX_DATA => Command::Carry { operation, offset, len },
            _ => Command::Answer(IO_ERROR),
        },
        (FLUSH, _) => Command::Carry { operation: Operation::Flush, offset: 0, len: 0 },
        (GET_ID, _) => Command::Identify,
        (DISCARD, _) if accepted & features::DISCARD != 0 => ranged(chain, Operation::Discard, 0),
        (WRITE_ZEROES, _) if accepted & features::WRITE_ZEROES != 0 => {
            ranged(chain, Operation::WriteZeroes { fua }, UNMAP)
        }
        _ => Command::Answer(UNSUPPORTED),
    };
    Ok(Parsed { command, status, status_guest, writable })
}

/// A discard or a write of zeros: its range stands in the data. One range, as the configuration space says.
fn ranged(chain: &mut Chain, operation: Operation, allowed: u32) -> Command {
    let limit = match operation {
        Operation::Discard => super::config::MAX_DISCARD_SECTORS,
        _ => super::config::MAX_WRITE_ZEROES_SECTORS,
    };
    let Some((sector, rest)) = take_pair(&mut chain.readable) else { return Command::Answer(IO_ERROR) };
    let (sectors, flags) = (rest as u32, (rest >> 32) as u32);
    if flags & !allowed != 0 {
        return Command::Answer(UNSUPPORTED);
    }
    match sector.checked_mul(SECTOR) {
        Some(offset) if chain.readable.is_empty() && sectors <= limit => {
            Command::Carry { operation, offset, len: u64::from(sectors) * SECTOR }
        }
        _ => Command::Answer(IO_ERROR),
    }
}

fn total(pieces: &[Piece]) -> u64 {
    // At most 2^11 descriptors of 2^32 bytes: no overflow.
    pieces.iter().map(|piece| piece.len as u64).sum()
}

/// Takes the last byte off.
fn take_last_byte(pieces: &mut Vec<Piece>) -> Option<(*mut u8, u64)> {
    let last = pieces.last_mut()?;
    // No piece is empty.
    last.len -= 1;
    let (at, guest) = (last.base.wrapping_add(last.len), last.guest + last.len as u64);
    if last.len == 0 {
        pieces.pop();
    }
    Some((at, guest))
}

/// Takes sixteen bytes off the front, as two little-endian words.
fn take_pair(pieces: &mut Vec<Piece>) -> Option<(u64, u64)> {
    let first = pieces.first_mut()?;
    if first.len >= HEADER {
        // SAFETY: a piece lies in mapped memory, all of it.
        let pair = unsafe { read_pair(first.base) };
        first.base = first.base.wrapping_add(HEADER);
        first.guest += HEADER as u64;
        first.len -= HEADER;
        if first.len == 0 {
            pieces.remove(0);
        }
        return Some(pair);
    }
    if total(pieces) < HEADER as u64 {
        return None;
    }
    let mut bytes = [0u8; HEADER];
    let mut done = 0;
    while done < HEADER {
        let first = pieces.first_mut()?;
        let here = first.len.min(HEADER - done);
        for byte in bytes.iter_mut().skip(done).take(here) {
            // SAFETY: within the piece: `here` bytes are taken off it, one by one.
            *byte = unsafe { first.base.read_volatile() };
            first.base = first.base.wrapping_add(1);
        }
        first.guest += here as u64;
        first.len -= here;
        done += here;
        if first.len == 0 {
            pieces.remove(0);
        }
    }
    // SAFETY: sixteen bytes of our own.
    Some(unsafe { read_pair(bytes.as_ptr()) })
}

/// Copies the serial number into pieces, as far as they go; gives how many bytes.
///
/// # Safety
///
/// The pieces are mapped.
pub(super) unsafe fn write_id(id: &[u8; ID_LEN], pieces: &[Piece]) -> u32 {
    let mut rest = &id[..];
    for piece in pieces {
        let (here, after) = rest.split_at(piece.len.min(rest.len()));
        // SAFETY: the caller vouches for the piece, which is at least as long.
        unsafe { std::ptr::copy_nonoverlapping(here.as_ptr(), piece.base, here.len()) };
        rest = after;
    }
    (ID_LEN - rest.len()) as u32
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
