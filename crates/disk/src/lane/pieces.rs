//! Walks a request's memory from front to back, in pieces as the store takes them.

use super::Segment;

/// Where in a request's memory the next piece begins.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Place {
    segment: usize,
    within: usize,
}

/// Puts the memory of the next `length` bytes into `pieces` and moves on. There must be as much.
pub(super) fn take(segments: &[Segment], place: &mut Place, length: usize, pieces: &mut Vec<libc::iovec>) {
    pieces.clear();
    let mut left = length;
    while left > 0 {
        let Some(segment) = segments.get(place.segment) else { return };
        let here = (segment.len - place.within).min(left);
        if here > 0 {
            // SAFETY: within the segment, which the front vouches for.
            let base = unsafe { segment.base.add(place.within) };
            pieces.push(libc::iovec { iov_base: base.cast(), iov_len: here });
        }
        left -= here;
        place.within += here;
        if place.within == segment.len {
            *place = Place { segment: place.segment + 1, within: 0 };
        }
    }
}

/// Whether all pieces can go to the store as they are: whole units, at addresses it takes.
pub(super) fn suit(pieces: &[libc::iovec], unit: usize, address: usize) -> bool {
    pieces.iter().all(|p| p.iov_len.is_multiple_of(unit) && (p.iov_base as usize).is_multiple_of(address))
}

/// Takes `length` bytes off the front: they were read.
pub(super) fn advance(pieces: &mut Vec<libc::iovec>, mut length: usize) {
    let mut whole = 0;
    for piece in pieces.iter_mut() {
        if length < piece.iov_len {
            // SAFETY: within the piece.
            piece.iov_base = unsafe { piece.iov_base.cast::<u8>().add(length) }.cast();
            piece.iov_len -= length;
            break;
        }
        length -= piece.iov_len;
        whole += 1;
    }
    pieces.drain(..whole);
}

/// Copies the pieces' memory one after another to `to`.
///
/// # Safety
///
/// The pieces are valid for reading, `to` for writing as much in all; they do not overlap.
pub(super) unsafe fn gather(pieces: &[libc::iovec], to: *mut u8) {
    let mut at = 0;
    for piece in pieces {
        // SAFETY: passed on.
        unsafe { std::ptr::copy_nonoverlapping(piece.iov_base.cast::<u8>(), to.add(at), piece.iov_len) };
        at += piece.iov_len;
    }
}

/// Copies from `from` into the pieces, one after another.
///
/// # Safety
///
/// The pieces are valid for writing, `from` for reading as much in all; they do not overlap.
pub(super) unsafe fn scatter(from: *const u8, pieces: &[libc::iovec]) {
    let mut at = 0;
    for piece in pieces {
        // SAFETY: passed on.
        unsafe { std::ptr::copy_nonoverlapping(from.add(at), piece.iov_base.cast::<u8>(), piece.iov_len) };
        at += piece.iov_len;
    }
}

/// Fills the pieces with zeros.
///
/// # Safety
///
/// The pieces are valid for writing.
pub(super) unsafe fn zero(pieces: &[libc::iovec]) {
    for piece in pieces {
        // SAFETY: passed on.
        unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_the_segments_and_can_be_shortened() {
        let mut memory = [0u8; 100];
        let base = memory.as_mut_ptr();
        let at = |offset: usize, len| Segment { base: base.wrapping_add(offset), len };
        let segments = [at(0, 10), at(20, 0), at(30, 30)];
        let (mut place, mut pieces) = (Place::default(), Vec::new());
        let spans = |pieces: &[libc::iovec]| -> Vec<(usize, usize)> {
            pieces.iter().map(|p| (p.iov_base as usize - base as usize, p.iov_len)).collect()
        };
        take(&segments, &mut place, 4, &mut pieces);
        assert_eq!(spans(&pieces), [(0, 4)]);
        take(&segments, &mut place, 16, &mut pieces);
        assert_eq!(spans(&pieces), [(4, 6), (30, 10)]);
        advance(&mut pieces, 8);
        assert_eq!(spans(&pieces), [(32, 8)]);
        take(&segments, &mut place, 99, &mut pieces);
        assert_eq!(spans(&pieces), [(40, 20)]);
        assert!(suit(&pieces, 10, 1) && !suit(&pieces, 8, 1));
    }
}
