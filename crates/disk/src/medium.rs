//! What a job works on, by its descriptor: a file, a block device, or an image behind a store helper.
//!
//! The descriptor says which. Beside [`Store`] it is what a job needs of its clear side and of a comparison.

use std::{fs::File, io, os::fd::OwnedFd};

use crate::{
    remote::RemoteStore,
    store::{Alignment, FileStore, Run, Store, StoreError},
};

/// One side of a job.
pub enum Medium {
    /// A file or block device.
    File(FileStore),
    /// An image behind a helper.
    Remote(RemoteStore),
}

impl Medium {
    /// What is behind this descriptor. `owner` is the uid that set this process up; see [`RemoteStore::new`].
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub fn new(fd: OwnedFd, read_only: bool, owner: u32) -> Result<Self, StoreError> {
        if RemoteStore::is_meant_by(&fd) {
            return Ok(Self::Remote(RemoteStore::new(fd, owner, None)?));
        }
        Ok(Self::File(FileStore::new(File::from(fd), read_only)?))
    }

    fn store(&self) -> &dyn Store {
        match self {
            Self::File(store) => store,
            Self::Remote(store) => store,
        }
    }

    /// Has the next read come from the medium. An image behind a helper has no cache here.
    pub fn forget_cached(&self) {
        if let Self::File(store) = self {
            store.forget_cached();
        }
    }

    /// Makes a range read as zeros without storing them. False if it could not, and zeros must be written: a discard on
    /// RBD may leave parts of the range as they are.
    pub fn make_hole(&self, at: u64, len: u64) -> bool {
        match self {
            Self::File(store) => store.make_hole(at, len),
            Self::Remote(_) => false,
        }
    }

    /// Makes it at least this long. An image has its length from the start.
    ///
    /// # Errors
    ///
    /// The file system's; ENOSPC if an image is shorter.
    pub fn extend_to(&self, len: u64) -> io::Result<()> {
        match self {
            Self::File(store) => store.extend_to(len),
            Self::Remote(store) if store.len()? >= len => Ok(()),
            Self::Remote(_) => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// Makes data and everything about it durable.
    ///
    /// # Errors
    ///
    /// The store's.
    pub fn sync_all(&self) -> io::Result<()> {
        match self {
            Self::File(store) => store.sync_all(),
            Self::Remote(store) => store.flush(),
        }
    }
}

impl Store for Medium {
    fn len(&self) -> io::Result<u64> {
        self.store().len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.store().read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> io::Result<()> {
        self.store().write_at(at, buf)
    }

    fn flush(&self) -> io::Result<()> {
        self.store().flush()
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.store().punch(at, len)
    }

    fn run_at(&self, at: u64, end: u64) -> Run {
        self.store().run_at(at, end)
    }

    fn alignment(&self) -> Alignment {
        self.store().alignment()
    }
}
