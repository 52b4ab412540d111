//! Memory at a page boundary, as O_DIRECT wants it. Taken from the kernel when made and given back when dropped; pages
//! nobody touched take no room.

use std::{io, ptr::NonNull, slice};

/// Bytes of zeros at a page boundary.
pub(crate) struct Aligned {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and this handle is its only owner.
unsafe impl Send for Aligned {}

impl Aligned {
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let len = len.max(1);
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let aligned = Self { base, len };
        // What passes through may be plaintext: it stays out of core dumps.
        // SAFETY: the range is exactly this mapping.
        unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_DONTDUMP) };
        Ok(aligned)
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The first `len` bytes, at most all.
    pub(crate) fn first(&mut self, len: usize) -> &mut [u8] {
        // SAFETY: the mapping is readable and writable for `self.len` bytes, and borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.base.as_ptr(), len.min(self.len)) }
    }

    /// Gives the pages back; the content is zeros afterwards.
    pub(crate) fn release(&self) {
        // SAFETY: the range is exactly this private mapping.
        unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, libc::MADV_DONTNEED) };
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: the range is exactly this mapping, and nothing borrows it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_page_and_is_zero_again_once_released() {
        let mut memory = Aligned::new(10_000).unwrap();
        assert!((memory.base() as usize).is_multiple_of(4096));
        assert_eq!(memory.first(20_000).len(), 10_000);
        memory.first(10_000).fill(7);
        memory.release();
        assert!(memory.first(10_000).iter().all(|byte| *byte == 0));
    }
}
