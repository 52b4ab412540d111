//! Secret memory that passes from one process to another as a file descriptor.
//!
//! In goes a length, or a descriptor that came over SCM_RIGHTS; out comes the mapped region. It does not lay out what
//! lies inside (`model::control` does), and dropping it zeroes nothing: the other process may still need it. The
//! kernel clears `memfd_secret` pages when the last holder is gone.

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use zeroize::Zeroize;

use crate::{
    mapping::{self, Mapping},
    secret::{Protection, SecretError},
};

/// A region of secret memory behind a descriptor that can be passed on.
pub struct SecretShare {
    fd: OwnedFd,
    mapping: Mapping,
    len: usize,
    protection: Protection,
}

impl SecretShare {
    /// A new region of `len` zero bytes. Its descriptor closes on exec, its size never changes.
    ///
    /// # Errors
    ///
    /// [`SecretError::Limit`] names RLIMIT_MEMLOCK and what to do.
    pub fn create(len: usize) -> Result<Self, SecretError> {
        Self::create_as(mapping::probe(), len)
    }

    fn create_as(protection: Protection, len: usize) -> Result<Self, SecretError> {
        if len == 0 {
            return Err(SecretError::Empty);
        }
        let whole = len.next_multiple_of(mapping::page_size());
        let fd = match protection {
            Protection::MemfdSecret => mapping::secret_fd(whole)?,
            Protection::Mlock => mapping::locked_fd(whole)?,
        };
        let mapping = Mapping::of_fd(&fd, whole, protection)?;
        Ok(Self { fd, mapping, len, protection })
    }

    /// The region behind a descriptor another process made with [`SecretShare::create`].
    ///
    /// # Errors
    ///
    /// [`SecretError::NotAShare`] if it is something else, is too short, or could shrink.
    pub fn from_fd(fd: OwnedFd, len: usize) -> Result<Self, SecretError> {
        if len == 0 {
            return Err(SecretError::Empty);
        }
        let Some((protection, bytes)) = mapping::identify(fd.as_fd())? else {
            return Err(SecretError::NotAShare { wanted: len });
        };
        if bytes < len as u64 {
            return Err(SecretError::NotAShare { wanted: len });
        }
        let mapping = Mapping::of_fd(&fd, len.next_multiple_of(mapping::page_size()), protection)?;
        Ok(Self { fd, mapping, len, protection })
    }

    /// The bytes. Whoever made the region has finished writing before it passes the descriptor on.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` bytes are mapped and initialised for the life of `self`; the protocol has one writer, which
        // writes before it passes the descriptor on.
        unsafe { std::slice::from_raw_parts(self.mapping.base().as_ptr(), self.len) }
    }

    /// The bytes, to be written before the descriptor is passed on.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` forbids any other access in this process.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.base().as_ptr(), self.len) }
    }

    /// Zeroes the region, for every process that has it.
    pub fn wipe(&mut self) {
        self.as_mut_slice().zeroize();
    }

    /// The descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Another descriptor of the same region, close-on-exec.
    ///
    /// # Errors
    ///
    /// As `dup(2)`.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// How the region is protected.
    pub fn protection(&self) -> Protection {
        self.protection
    }
}

impl fmt::Debug for SecretShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretShare({} bytes, {})", self.len, self.protection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_is_the_same_behind_a_passed_descriptor() {
        for protection in [mapping::probe(), Protection::Mlock] {
            let mut share = SecretShare::create_as(protection, 384).unwrap();
            assert_eq!(share.protection(), protection);
            assert!(share.as_slice().iter().all(|b| *b == 0));
            share.as_mut_slice()[128..146].copy_from_slice(b"VMSEAL-TEST-SECRET");
            let other = SecretShare::from_fd(share.try_clone_fd().unwrap(), 384).unwrap();
            drop(share);
            assert_eq!(&other.as_slice()[128..146], b"VMSEAL-TEST-SECRET");
            assert_eq!(other.as_slice().len(), 384);
            assert_eq!(other.protection(), protection);
        }
    }

    #[test]
    fn wiped_region_is_zero_for_both() {
        let mut share = SecretShare::create(64).unwrap();
        share.as_mut_slice().fill(9);
        let other = SecretShare::from_fd(share.try_clone_fd().unwrap(), 64).unwrap();
        share.wipe();
        assert!(other.as_slice().iter().all(|b| *b == 0));
    }

    #[test]
    fn descriptor_that_is_no_share_or_too_short_is_refused() {
        let file: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
        assert!(matches!(SecretShare::from_fd(file, 64), Err(SecretError::NotAShare { .. })));
        let share = SecretShare::create(64).unwrap();
        let fd = share.try_clone_fd().unwrap();
        assert!(matches!(SecretShare::from_fd(fd, 1 << 20), Err(SecretError::NotAShare { .. })));
        assert!(matches!(SecretShare::create(0), Err(SecretError::Empty)));
    }

    #[test]
    fn descriptor_closes_on_exec() {
        use std::os::fd::AsRawFd;
        for protection in [mapping::probe(), Protection::Mlock] {
            let share = SecretShare::create_as(protection, 1).unwrap();
            // SAFETY: F_GETFD takes no argument.
            let flags = unsafe { libc::fcntl(share.as_fd().as_raw_fd(), libc::F_GETFD) };
            assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        }
    }
}
