//! The memory in which the driver describes the requests of one queue.

use std::{
    fs::File,
    io, mem,
    os::fd::AsRawFd,
    ptr::{self, NonNull},
};

use super::abi::{self, IoDesc};

/// One queue's descriptions, mapped for reading.
pub(super) struct Descriptions {
    base: NonNull<IoDesc>,
    bytes: usize,
    depth: u16,
}

impl Descriptions {
    pub(super) fn map(device: &File, queue: u16, depth: u16) -> io::Result<Self> {
        // SAFETY: no pointers.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let bytes = (usize::from(depth) * mem::size_of::<IoDesc>()).next_multiple_of(page);
        let offset = abi::descriptions_offset(queue, page);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                device.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { base, bytes, depth })
    }

    /// The description of the request with this tag. The driver writes it before it hands the request over.
    pub(super) fn of(&self, tag: u16) -> Option<IoDesc> {
        if tag >= self.depth {
            return None;
        }
        // SAFETY: within the mapping, aligned, and any bytes are a description; the kernel may write it meanwhile.
        Some(unsafe { ptr::read_volatile(self.base.as_ptr().add(usize::from(tag))) })
    }
}

impl Drop for Descriptions {
    fn drop(&mut self) {
        // SAFETY: the range is exactly this mapping, and nothing borrows it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
