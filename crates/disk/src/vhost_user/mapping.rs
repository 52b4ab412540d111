//! Memory shared with the front end: mapped once checked, unmapped when nobody uses it any more.
//!
//! In: a descriptor, where in it, how much. Out: a range of addresses that stays mapped. The other end may write to it
//! at any time, and may even cut the file short: see [`super::sigbus`].

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::sigbus::Guard;

/// Why memory cannot be mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// Nothing, or more than addresses can name.
    #[error("a shared memory area has an impossible size or offset")]
    Size,
    /// Pipes, sockets, devices and the like.
    #[error("a shared memory area is not a file")]
    Kind,
    /// It would end past the end of its file.
    #[error("a shared memory area is longer than its file")]
    TooShort,
    /// Too many areas in this process.
    #[error("too many shared memory areas")]
    TooMany,
    /// The kernel refuses.
    #[error("a shared memory area cannot be mapped")]
    Map(#[source] io::Error),
}

/// A mapped area.
#[derive(Debug)]
pub struct Mapping {
    /// Where it was asked to begin; the mapping itself may begin earlier, at a page.
    start: *mut u8,
    len: usize,
    base: *mut libc::c_void,
    mapped: usize,
    guard: Option<Guard>,
}

// SAFETY: addresses of shared memory that belongs to the process and not to a thread; accesses through them are volatile
// or atomic, or made by the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a file from `offset`, for reading and writing.
    ///
    /// # Errors
    ///
    /// [`MappingError`].
    pub fn of_file(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, MappingError> {
        let end = offset.checked_add(len).ok_or(MappingError::Size)?;
        let (file_len, page) = shape(file)?;
        if len == 0 || i64::try_from(end).is_err() {
            return Err(MappingError::Size);
        }
        if end > file_len {
            return Err(MappingError::TooShort);
        }
        let before = offset % page;
        let mapped =
            (len + before).checked_next_multiple_of(page).and_then(|size| usize::try_from(size).ok());
        let mapped = mapped.ok_or(MappingError::Size)?;
        let (flags, from) = (libc::MAP_SHARED | libc::MAP_NORESERVE, (offset - before).cast_signed());
        // SAFETY: a new mapping at an address of the kernel's choice; the offset is a multiple of the file's page.
        let base = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), mapped, access, flags, file.as_raw_fd(), from)
        };
        if base == libc::MAP_FAILED {
            return Err(MappingError::Map(io::Error::last_os_error()));
        }
        let start = base.cast::<u8>().wrapping_add(before as usize);
        let mut mapping = Self { start, len: len as usize, base, mapped, guard: None };
        // SAFETY: the range is exactly this mapping. Guest memory stays out of core dumps.
        unsafe { libc::madvise(base, mapped, libc::MADV_DONTDUMP) };
        mapping.guard = Some(Guard::over(base as usize, mapped).ok_or(MappingError::TooMany)?);
        Ok(mapping)
    }

    /// Memory of this process alone, zeroed: for tests and fuzzing.
    ///
    /// # Errors
    ///
    /// [`MappingError::Map`].
    pub fn anonymous(len: usize) -> Result<Self, MappingError> {
        let mapped = len.max(1);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(MappingError::Map(io::Error::last_os_error()));
        }
        Ok(Self { start: base.cast(), len, base, mapped, guard: None })
    }

    /// Its first byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Its bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the other end took memory away that was touched here: what was read and written since is of no value.
    pub fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_lost)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First: the address may be somebody else's as soon as it is unmapped.
        self.guard = None;
        // SAFETY: the range is exactly this mapping, and its owner is gone.
        unsafe { libc::munmap(self.base, self.mapped) };
    }
}

/// A file's length, and the size of its pages.
fn shape(file: BorrowedFd<'_>) -> Result<(u64, u64), MappingError> {
    // SAFETY: stat and statfs are plain data; the kernel fills them.
    let (stat, system) = unsafe {
        let (mut stat, mut system): (libc::stat, libc::statfs) = (mem::zeroed(), mem::zeroed());
        let fd = file.as_raw_fd();
        if libc::fstat(fd, &mut stat) != 0 || libc::fstatfs(fd, &mut system) != 0 {
            return Err(MappingError::Map(io::Error::last_os_error()));
        }
        (stat, system)
    };
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(MappingError::Kind);
    }
    // Huge pages are mapped whole; of everything else the kernel's own page is the unit.
    let page = if system.f_type == libc::HUGETLBFS_MAGIC {
        system.f_bsize.cast_unsigned().max(4096)
    } else {
        page_size()
    };
    Ok((stat.st_size.cast_unsigned(), page))
}

/// Bytes of a page of this machine.
pub(crate) fn page_size() -> u64 {
    // SAFETY: takes a number and gives one.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

/// A new file in memory, `len` bytes of zeros, that nobody can make shorter or longer.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn sealed_memory(name: &std::ffi::CStr, len: u64) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string; the descriptor is new and ours alone.
    let fd = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        std::os::fd::OwnedFd::from_raw_fd(fd)
    };
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    let len = libc::off_t::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: calls on a descriptor that is open, with numbers.
    let done = unsafe {
        libc::ftruncate(fd.as_raw_fd(), len) == 0
            && libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) == 0
    };
    if done { Ok(fd) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn only_files_that_are_long_enough_are_mapped() {
        let file = File::from(sealed_memory(c"test", 3 * 4096).unwrap());
        let map = |offset, len| Mapping::of_file(file.as_fd(), offset, len);
        assert_eq!(map(0, 3 * 4096).unwrap().len(), 3 * 4096);
        assert_eq!(map(100, 8000).unwrap().len(), 8000);
        for (offset, len, wanted) in [
            (0, 3 * 4096 + 1, MappingError::TooShort),
            (3 * 4096, 1, MappingError::TooShort),
            (0, 0, MappingError::Size),
            (u64::MAX, 2, MappingError::Size),
            (1, u64::MAX, MappingError::Size),
            (0, u64::MAX, MappingError::Size),
        ] {
            let got = map(offset, len).unwrap_err();
            assert_eq!(mem::discriminant(&got), mem::discriminant(&wanted), "{len} bytes at {offset}: {got}");
        }
        let directory = File::open("/").unwrap();
        assert!(matches!(Mapping::of_file(directory.as_fd(), 0, 1), Err(MappingError::Kind)));
    }

    #[test]
    fn what_one_writes_the_other_sees() {
        let file = File::from(sealed_memory(c"test", 8192).unwrap());
        let (one, two) = (
            Mapping::of_file(file.as_fd(), 4097, 10).unwrap(),
            Mapping::of_file(file.as_fd(), 0, 8192).unwrap(),
        );
        // SAFETY: within the mappings.
        unsafe {
            one.start().write_volatile(7);
            assert_eq!(two.start().add(4097).read_volatile(), 7);
        }
    }
}
