//! One image, opened under its exclusive lock and held until dropped.
//!
//! The lock is taken by name (`rbd_lock_acquire`), so another client that wants it is refused and not given it. Who
//! breaks it blocklists the holder: whatever that one still sends is refused by the OSDs, and it is told ESHUTDOWN.
//! librbd's cache is off: what was answered is on the cluster, and a helper that dies loses nothing.

use std::{
    ffi::{CStr, CString, c_char, c_int},
    ptr,
};

use crate::{
    cluster::{Cluster, ClusterError, ImageName},
    library::{Callback, Handle, Library},
};

/// `RBD_LOCK_MODE_EXCLUSIVE`.
const EXCLUSIVE: c_int = 0;

/// What may be done about a lock that somebody else holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TakeOver {
    /// Nothing: the holder is respected.
    No,
    /// Breaks it and blocklists the holder, if that is this one. What a supervisor orders after it saw that one end.
    From(String),
    /// Breaks it and blocklists the holder, whoever that is: after the host that had it was fenced.
    Anybody,
}

/// Why an image could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Library, cluster or image.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// Somebody else has it.
    #[error(
        "image {image} is in use: {owner} holds its exclusive lock; nothing was written. Take it over only when that \
         host is off or fenced (--take-over)"
    )]
    Held {
        /// Pool and image.
        image: String,
        /// Who.
        owner: String,
    },
    /// It has no such lock.
    #[error(
        "image {image} has no exclusive lock: switch it on with `rbd feature enable {image} exclusive-lock`"
    )]
    NoLock {
        /// Pool and image.
        image: String,
    },
}

/// An open image.
pub struct Image {
    image: Handle,
    bytes: u64,
    // Closed after the image.
    cluster: Cluster,
}

// SAFETY: librbd handles may be used from any thread, and by several at a time.
unsafe impl Send for Image {}
// SAFETY: as above; the fields themselves do not change while the image is shared.
unsafe impl Sync for Image {}

impl Image {
    /// Opens an image and takes its lock.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; nothing was written.
    pub fn open(name: &ImageName, take_over: &TakeOver) -> Result<Self, ImageError> {
        let mut this = Self::look_at(name)?;
        this.lock(take_over)?;
        let mut bytes = 0;
        // SAFETY: an open image and a place for the answer.
        let result = unsafe { (this.library().rbd_get_size)(this.image, &mut bytes) };
        this.check("asking the size", result)?;
        this.bytes = bytes;
        Ok(this)
    }

    /// Takes the lock from whoever has it, keeps that client from writing, and gives the lock back; who it was.
    ///
    /// # Errors
    ///
    /// [`ImageError`].
    pub fn fence(name: &ImageName) -> Result<Option<String>, ImageError> {
        let this = Self::look_at(name)?;
        let owner = this.owner()?;
        this.lock(&TakeOver::Anybody)?;
        Ok(owner)
    }

    /// Without the lock.
    fn look_at(name: &ImageName) -> Result<Self, ImageError> {
        let mut this = Self { image: ptr::null_mut(), bytes: 0, cluster: Cluster::connect(name)? };
        // SAFETY: an open pool, a NUL-terminated name, a place for the handle, which `drop` closes.
        let result = unsafe {
            (this.library().rbd_open)(this.cluster.pool(), name.image.as_ptr(), &mut this.image, ptr::null())
        };
        this.cluster.check_there("opening the image", result)?;
        Ok(this)
    }

    fn lock(&self, take_over: &TakeOver) -> Result<(), ImageError> {
        if let Some(owner) = self.owner()? {
            let may = match take_over {
                TakeOver::No => false,
                TakeOver::From(expected) => *expected == owner,
                TakeOver::Anybody => true,
            };
            if !may {
                return Err(ImageError::Held { image: self.shown().into(), owner });
            }
            let name =
                CString::new(owner.as_str()).map_err(|_| self.failed("reading the lock", libc::EINVAL))?;
            // SAFETY: an open image and a NUL-terminated string.
            match unsafe { (self.library().rbd_lock_break)(self.image, EXCLUSIVE, name.as_ptr()) } {
                0 => crate::line(format_args!(
                    "{}: took the lock from {owner}, which is blocklisted",
                    self.shown()
                )),
                // It is somebody else's by now, or free: taking it says which.
                result if matches!(-result, libc::ENOENT | libc::EBUSY) => {}
                result => self.check("breaking the lock", result)?,
            }
        }
        // SAFETY: an open image.
        match unsafe { (self.library().rbd_lock_acquire)(self.image, EXCLUSIVE) } {
            0 => Ok(()),
            result if matches!(-result, libc::EBUSY | libc::EROFS | libc::EAGAIN) => {
                let owner = self.owner()?.unwrap_or_else(|| "another client".into());
                Err(ImageError::Held { image: self.shown().into(), owner })
            }
            result if -result == libc::EINVAL => Err(ImageError::NoLock { image: self.shown().into() }),
            result => self.check("taking the exclusive lock", result),
        }
    }

    /// Who holds the lock.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoLock`], or the cluster's.
    pub fn owner(&self) -> Result<Option<String>, ImageError> {
        let mut mode = 0;
        let mut owners = [ptr::null_mut::<c_char>(); 1];
        let mut count = owners.len();
        // SAFETY: an open image; as many places as said. The strings are copied and then given back as they came.
        unsafe {
            let lib = self.library();
            let result = (lib.rbd_lock_get_owners)(self.image, &mut mode, owners.as_mut_ptr(), &mut count);
            match -result {
                libc::ENOENT => return Ok(None),
                libc::EINVAL => return Err(ImageError::NoLock { image: self.shown().into() }),
                _ => self.check("asking who holds the lock", result)?,
            }
            let owner = (count > 0 && !owners[0].is_null())
                .then(|| CStr::from_ptr(owners[0]).to_string_lossy().into_owned());
            (lib.rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), count);
            Ok(owner)
        }
    }

    /// Bytes of the image.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pool and image, for messages.
    pub fn shown(&self) -> &str {
        self.cluster.shown()
    }

    pub(crate) fn library(&self) -> &Library {
        self.cluster.library()
    }

    pub(crate) fn handle(&self) -> Handle {
        self.image
    }

    /// A completion that calls `done` with `argument`.
    pub(crate) fn completion(&self, argument: *mut libc::c_void, done: Callback) -> Result<Handle, c_int> {
        let mut completion = ptr::null_mut();
        // SAFETY: a place for the handle; the argument is only passed on.
        let result = unsafe { (self.library().rbd_aio_create_completion)(argument, done, &mut completion) };
        if result < 0 { Err(-result) } else { Ok(completion) }
    }

    fn failed(&self, doing: &'static str, errno: c_int) -> ImageError {
        self.cluster.failed(doing, errno).into()
    }

    fn check(&self, doing: &'static str, result: c_int) -> Result<(), ImageError> {
        Ok(self.cluster.check(doing, result)?)
    }

    /// Whether these bytes lie at this place: whoever had the image meanwhile has changed them.
    ///
    /// # Errors
    ///
    /// The cluster's.
    pub fn has(&self, offset: u64, expected: &[u8]) -> Result<bool, ImageError> {
        let mut found = vec![0; expected.len()];
        // SAFETY: an open image and a buffer as long as said.
        let got = unsafe {
            (self.library().rbd_read)(self.image, offset, found.len(), found.as_mut_ptr().cast::<c_char>())
        };
        if got < 0 {
            return Err(self.failed("reading the owner block", i32::try_from(-got).unwrap_or(libc::EIO)));
        }
        Ok(found == expected)
    }
}

impl Drop for Image {
    /// Gives the lock back too.
    fn drop(&mut self) {
        if !self.image.is_null() {
            // SAFETY: open, and this value is the only one that knows it.
            unsafe { (self.library().rbd_close)(self.image) };
        }
    }
}
