//! One page for the contexts of one cipher: `memfd_secret(2)`, else locked and kept out of core dumps.
//!
//! Expanded round keys are keys; in the C library's heap a core dump or root would find them.

use std::{
    fmt, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr::NonNull,
};

/// Bytes of the page.
pub(crate) const PAGE: usize = 4096;

/// How round keys are kept from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// `memfd_secret(2)`: no other process reads it, nor does root.
    MemfdSecret,
    /// `mlock(2)`: never in swap or a core file, but root can read it.
    Mlock,
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MemfdSecret => "memfd_secret",
            Self::Mlock => "mlock",
        })
    }
}

/// A zeroed page that only this process reads; zeroed again and unmapped on drop.
pub(crate) struct Page {
    base: NonNull<u8>,
    protection: Protection,
}

// SAFETY: the mapping belongs to the process, not to a thread, and this handle is its only owner.
unsafe impl Send for Page {}

impl Page {
    pub(crate) fn new() -> io::Result<Self> {
        match Self::secret() {
            Err(error) if lacks_secret_memory(&error) => Self::locked(),
            page => page,
        }
    }

    fn secret() -> io::Result<Self> {
        // SAFETY: no pointers; the kernel returns a descriptor that is ours alone, or -1.
        let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the descriptor was just made and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the descriptor is open and ours.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), PAGE as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let page = Self::map(libc::MAP_SHARED, fd.as_raw_fd(), Protection::MemfdSecret)?;
        page.advise(libc::MADV_DONTFORK)?;
        Ok(page)
    }

    fn locked() -> io::Result<Self> {
        let page = Self::map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, Protection::Mlock)?;
        // SAFETY: the range is exactly this mapping.
        if unsafe { libc::mlock(page.base.as_ptr().cast(), PAGE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        page.advise(libc::MADV_DONTDUMP)?;
        page.advise(libc::MADV_WIPEONFORK)?;
        Ok(page)
    }

    fn map(flags: i32, fd: i32, protection: Protection) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; no memory of ours is touched.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { base, protection })
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range is exactly this mapping; none of the advices used here changes its content.
        match unsafe { libc::madvise(self.base.as_ptr().cast(), PAGE, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// First byte; [`PAGE`] bytes are readable and writable until drop.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// How this page is protected.
    pub(crate) fn protection(&self) -> Protection {
        self.protection
    }
}

/// Whether the kernel has no `memfd_secret`, or it is switched off (ENOSYS), or a sandbox forbids it (EPERM). Any other
/// failure is one: no file descriptors, no memory, a limit. Locked memory then would be less than what was promised.
fn lacks_secret_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM))
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the range is exactly this mapping, and what pointed into it is gone before the page is. Cleansing
        // cannot be optimised away; a failed munmap leaves a zeroed page, and drop has nobody to tell.
        unsafe {
            aws_lc_sys::OPENSSL_cleanse(self.base.as_ptr().cast(), PAGE);
            libc::munmap(self.base.as_ptr().cast(), PAGE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_page_are_zeroed_and_writable() {
        let pages = [Page::secret(), Page::locked()];
        assert!(pages[1].is_ok(), "mlock of one page");
        let kinds = [Protection::MemfdSecret, Protection::Mlock];
        for (page, kind) in pages.into_iter().zip(kinds).filter_map(|(page, kind)| Some((page.ok()?, kind))) {
            assert_eq!(page.protection(), kind);
            // SAFETY: PAGE bytes are mapped, and nobody else has them.
            let bytes = unsafe { std::slice::from_raw_parts_mut(page.base().as_ptr(), PAGE) };
            assert!(bytes.iter().all(|b| *b == 0));
            bytes[PAGE - 1] = 1;
        }
    }

    #[test]
    fn only_a_kernel_without_secret_memory_gets_locked_memory() {
        for (code, lacks) in [
            (libc::ENOSYS, true),
            (libc::EPERM, true),
            (libc::EMFILE, false),
            (libc::ENOMEM, false),
            (libc::EAGAIN, false),
        ] {
            assert_eq!(lacks_secret_memory(&io::Error::from_raw_os_error(code)), lacks, "{code}");
        }
        let secret = Page::secret();
        let expected = match &secret {
            Ok(_) => Protection::MemfdSecret,
            Err(error) => {
                assert!(lacks_secret_memory(error), "{error}");
                Protection::Mlock
            }
        };
        assert_eq!(Page::new().unwrap().protection(), expected);
    }
}
