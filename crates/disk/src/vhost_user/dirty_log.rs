//! The dirty log of a live migration: a bit for each 4 KiB of guest memory that was written to, in memory shared with
//! the front end, which reads and clears it at any time.

use std::{
    os::fd::BorrowedFd,
    sync::atomic::{AtomicU8, Ordering},
};

use super::mapping::{Mapping, MappingError};

/// Bytes a bit stands for (vhost-user specification, "Migration").
const PAGE: u64 = 4096;

/// A log in use.
#[derive(Debug)]
pub struct DirtyLog(Mapping);

impl DirtyLog {
    /// Maps a log.
    ///
    /// # Errors
    ///
    /// [`MappingError`].
    pub fn of_file(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, MappingError> {
        Mapping::of_file(file, offset, len).map(Self)
    }

    /// Marks `len` bytes of the guest; false if the log does not reach that far.
    #[must_use]
    pub fn mark(&self, guest: u64, len: u64) -> bool {
        let Some(last) = len.checked_sub(1) else { return true };
        let Some(end) = guest.checked_add(last) else { return false };
        let (first, last) = (guest / PAGE, end / PAGE);
        if last / 8 >= self.0.len() as u64 {
            return false;
        }
        for page in first..=last {
            // SAFETY: `page / 8` is within the mapping, as checked for the last one; both ends use it atomically.
            let byte = unsafe { AtomicU8::from_ptr(self.0.start().add((page / 8) as usize)) };
            // Whoever sees the bit sees what was written before.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
        true
    }

    /// Whether the front end took it away.
    pub fn is_lost(&self) -> bool {
        self.0.is_lost()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::{super::mapping::sealed_memory, *};

    #[test]
    fn every_page_that_is_touched_is_marked_and_no_other() {
        let file = sealed_memory(c"log", 4).unwrap();
        let log = DirtyLog::of_file(file.as_fd(), 0, 4).unwrap();
        assert!(log.mark(4096, 1));
        assert!(log.mark(3 * 4096 - 1, 2));
        assert!(log.mark(9 * 4096, 4096));
        assert!(log.mark(31 * 4096 + 4095, 1));
        assert!(log.mark(7 * 4096, 0));
        for (guest, len) in [(32 * 4096, 1), (31 * 4096, 4097), (u64::MAX, 1), (1, u64::MAX), (0, u64::MAX)] {
            assert!(!log.mark(guest, len), "{len} at {guest}");
        }
        // SAFETY: four bytes are mapped.
        let bytes = unsafe { log.0.start().cast::<[u8; 4]>().read_volatile() };
        assert_eq!(bytes, [0b1110, 0b10, 0, 0x80]);
    }
}
