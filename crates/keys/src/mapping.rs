//! Pages that hold keys: mapped by `memfd_secret(2)`, or locked in RAM and kept out of core dumps.
//!
//! In goes a length; out comes a mapping that other processes, root among them, cannot read (`memfd_secret`) or that
//! at least never reaches swap or a core file. What lies in it is the business of `arena` and `share`.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::OnceLock,
};

use crate::secret::{Protection, SecretError};

/// `f_type` of a `memfd_secret` file (`include/uapi/linux/magic.h`).
const SECRETMEM_MAGIC: i64 = 0x5345_434d;

/// A mapping of whole pages, unmapped on drop.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; whoever holds `Mapping` decides about aliasing.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives out a pointer only; access through it is synchronised by the holder.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed pages of this process alone, not inherited by a child.
    pub(crate) fn private(protection: Protection, len: usize) -> Result<Self, SecretError> {
        match protection {
            Protection::MemfdSecret => Self::of_fd(&secret_fd(len)?, len, protection),
            Protection::Mlock => {
                let mapping = Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
                mapping.lock()?;
                mapping.advise(libc::MADV_DONTDUMP)?;
                mapping.advise(libc::MADV_WIPEONFORK)?;
                Ok(mapping)
            }
        }
    }

    /// The pages of a descriptor made by [`secret_fd`] or [`locked_fd`], here or in another process.
    pub(crate) fn of_fd(fd: &impl AsRawFd, len: usize, protection: Protection) -> Result<Self, SecretError> {
        let mapping = Self::map(len, libc::MAP_SHARED, fd.as_raw_fd())?;
        if protection == Protection::Mlock {
            mapping.lock()?;
            mapping.advise(libc::MADV_DONTDUMP)?;
        }
        // A shared mapping cannot be wiped in a child, so the child does not get it at all.
        mapping.advise(libc::MADV_DONTFORK)?;
        Ok(mapping)
    }

    fn map(len: usize, flags: i32, fd: i32) -> Result<Self, SecretError> {
        // SAFETY: a new mapping at an address of the kernel's choice; no memory of ours is touched.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(refused("mmap", len));
        }
        let base = NonNull::new(base.cast()).ok_or(SecretError::Kernel {
            call: "mmap",
            source: io::Error::from_raw_os_error(libc::ENOMEM),
        })?;
        Ok(Self { base, len })
    }

    fn lock(&self) -> Result<(), SecretError> {
        // SAFETY: the range is exactly this mapping.
        match unsafe { libc::mlock(self.base.as_ptr().cast(), self.len) } {
            0 => Ok(()),
            _ => Err(refused("mlock", self.len)),
        }
    }

    fn advise(&self, advice: i32) -> Result<(), SecretError> {
        // SAFETY: the range is exactly this mapping; none of the advices used here changes its content.
        match unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, advice) } {
            0 => Ok(()),
            _ => Err(SecretError::Kernel { call: "madvise", source: io::Error::last_os_error() }),
        }
    }

    /// First byte.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is exactly this mapping, and no reference into it outlives its holder.
        // A failure leaves the pages mapped, which is no harm; drop has nobody to tell.
        let _ = unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Which protection this kernel gives; found out once, by mapping and touching one page.
pub(crate) fn probe() -> Protection {
    static FOUND: OnceLock<Protection> = OnceLock::new();
    *FOUND.get_or_init(|| match Mapping::private(Protection::MemfdSecret, page_size()) {
        Ok(_) => Protection::MemfdSecret,
        // A limit is no answer about the kernel: the same limit holds for mlock, and its error says what to do.
        Err(SecretError::Limit { .. }) => Protection::MemfdSecret,
        Err(_) => Protection::Mlock,
    })
}

/// A `memfd_secret` descriptor of `len` bytes, close-on-exec. Its size can never change again.
pub(crate) fn secret_fd(len: usize) -> Result<OwnedFd, SecretError> {
    // SAFETY: no pointers; the kernel returns a descriptor that is ours alone, or -1.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
    let Some(fd) = fd else {
        return Err(SecretError::Kernel { call: "memfd_secret", source: io::Error::last_os_error() });
    };
    // SAFETY: the descriptor was just made and has no other owner.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    set_size(&fd, len)?;
    Ok(fd)
}

/// An ordinary memfd of `len` bytes, close-on-exec, sealed against every change of size.
pub(crate) fn locked_fd(len: usize) -> Result<OwnedFd, SecretError> {
    // SAFETY: the name is a C string; the kernel returns a descriptor that is ours alone, or -1.
    let fd =
        unsafe { libc::memfd_create(c"vmseal-keys".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(SecretError::Kernel { call: "memfd_create", source: io::Error::last_os_error() });
    }
    // SAFETY: the descriptor was just made and has no other owner.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    set_size(&fd, len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an int.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(SecretError::Kernel { call: "fcntl(F_ADD_SEALS)", source: io::Error::last_os_error() });
    }
    Ok(fd)
}

/// What kind of secret memory is behind `fd`, and how many bytes it has; `None` if it is neither kind.
///
/// Only kinds whose size is fixed for good are accepted: a region that shrinks under a mapping is a SIGBUS.
pub(crate) fn identify(fd: BorrowedFd<'_>) -> Result<Option<(Protection, u64)>, SecretError> {
    // SAFETY: all-zero is a valid statfs; the kernel fills it.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is borrowed, so open; the pointer is to a whole statfs.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), &mut fs) } != 0 {
        return Err(SecretError::Kernel { call: "fstatfs", source: io::Error::last_os_error() });
    }
    // SAFETY: all-zero is a valid stat; the kernel fills it.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is borrowed, so open; the pointer is to a whole stat.
    if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
        return Err(SecretError::Kernel { call: "fstat", source: io::Error::last_os_error() });
    }
    let bytes = u64::try_from(stat.st_size).unwrap_or(0);
    if fs.f_type == SECRETMEM_MAGIC {
        return Ok(Some((Protection::MemfdSecret, bytes)));
    }
    // SAFETY: F_GET_SEALS takes no argument.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    let fixed = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    Ok((seals >= 0 && seals & fixed == fixed).then_some((Protection::Mlock, bytes)))
}

/// Bytes of a page.
pub(crate) fn page_size() -> usize {
    // SAFETY: no arguments that could be wrong.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

fn set_size(fd: &OwnedFd, len: usize) -> Result<(), SecretError> {
    let size = libc::off_t::try_from(len).map_err(|_| SecretError::Kernel {
        call: "ftruncate",
        source: io::Error::from_raw_os_error(libc::EFBIG),
    })?;
    // SAFETY: the descriptor is open and ours.
    match unsafe { libc::ftruncate(fd.as_raw_fd(), size) } {
        0 => Ok(()),
        _ => Err(SecretError::Kernel { call: "ftruncate", source: io::Error::last_os_error() }),
    }
}

/// The error of a failed mmap or mlock: the limit, if that is what stood in the way.
fn refused(call: &'static str, bytes: usize) -> SecretError {
    let source = io::Error::last_os_error();
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a whole rlimit.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } == 0;
    let limited = matches!(source.raw_os_error(), Some(libc::EAGAIN | libc::ENOMEM | libc::EPERM));
    if known && limited && limit.rlim_cur != libc::RLIM_INFINITY {
        SecretError::Limit { bytes, limit: limit.rlim_cur }
    } else {
        SecretError::Kernel { call, source }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn locked_pages_are_zeroed_writable_and_sealed_in_size() {
        let len = 2 * page_size();
        for mapping in [
            Mapping::private(Protection::Mlock, len).unwrap(),
            Mapping::of_fd(&locked_fd(len).unwrap(), len, Protection::Mlock).unwrap(),
        ] {
            // SAFETY: the mapping is `len` bytes, alive, and nobody else has it.
            let bytes = unsafe { std::slice::from_raw_parts_mut(mapping.base().as_ptr(), len) };
            assert!(bytes.iter().all(|b| *b == 0));
            bytes[len - 1] = 7;
            assert_eq!(bytes[len - 1], 7);
        }
        let fd = locked_fd(len).unwrap();
        assert_eq!(identify(fd.as_fd()).unwrap(), Some((Protection::Mlock, len as u64)));
        assert!(set_size(&fd, 0).is_err());
    }

    #[test]
    fn ordinary_file_and_unsealed_memfd_are_no_secret_memory() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(identify(file.as_fd()).unwrap(), None);
        // SAFETY: the name is a C string.
        let fd =
            unsafe { libc::memfd_create(c"plain".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        assert!(fd >= 0);
        // SAFETY: just made, no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        assert_eq!(identify(fd.as_fd()).unwrap(), None);
    }

    #[test]
    fn refusal_by_the_limit_names_it_and_what_to_do() {
        let text = SecretError::Limit { bytes: 16384, limit: 8_388_608 }.to_string();
        assert!(
            text.contains("RLIMIT_MEMLOCK") && text.contains("8388608") && text.contains("LimitMEMLOCK"),
            "{text}"
        );
    }
}
