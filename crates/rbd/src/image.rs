//! One image, opened under its exclusive lock and held until dropped.
//!
//! The lock is taken by name (`rbd_lock_acquire`), so another client that wants it is refused and not given it. Who
//! breaks it blocklists the holder: whatever that one still sends is refused by the OSDs, and it is told ESHUTDOWN.
//! librbd's cache is off: what was answered is on the cluster, and a helper that dies loses nothing.

use std::{
    ffi::{CStr, CString, c_char, c_int},
    io, ptr,
};

use crate::library::{Callback, Handle, Library, LibraryError};

/// `RBD_LOCK_MODE_EXCLUSIVE`.
const EXCLUSIVE: c_int = 0;

/// Which image, and as whom.
#[derive(Debug, Clone)]
pub struct ImageName {
    /// Pool.
    pub pool: CString,
    /// Namespace within it, or none.
    pub namespace: Option<CString>,
    /// Image.
    pub image: CString,
    /// Ceph user without `client.`; its keyring is found by the configuration.
    pub user: CString,
    /// Configuration file; none for the usual places.
    pub conf: Option<CString>,
}

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
    /// No library.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// Something failed on the way.
    #[error("{doing} failed for {image}: {cause}")]
    Failed {
        /// What was tried.
        doing: &'static str,
        /// Pool and image.
        image: String,
        /// Ceph's reason.
        cause: io::Error,
    },
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
    library: Library,
    cluster: Handle,
    pool: Handle,
    image: Handle,
    bytes: u64,
    shown: String,
}

// SAFETY: librados and librbd handles may be used from any thread, and by several at a time.
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
        let shown = format!("{}/{}", name.pool.to_string_lossy(), name.image.to_string_lossy());
        let mut this = Self {
            library: Library::load()?,
            cluster: ptr::null_mut(),
            pool: ptr::null_mut(),
            image: ptr::null_mut(),
            bytes: 0,
            shown,
        };
        this.connect(name)?;
        this.lock(take_over)?;
        let mut bytes = 0;
        // SAFETY: an open image and a place for the answer.
        let result = unsafe { (this.library.rbd_get_size)(this.image, &mut bytes) };
        this.check("asking the size", result)?;
        this.bytes = bytes;
        Ok(this)
    }

    /// Every handle is set as soon as it exists, so that a failure later gives it back by `drop`.
    fn connect(&mut self, name: &ImageName) -> Result<(), ImageError> {
        // SAFETY: strings are NUL-terminated and outlive the calls; handles go to fields of this value, and each call
        // gets one that an earlier call made.
        unsafe {
            let lib = &self.library;
            let result = (lib.rados_create)(&mut self.cluster, name.user.as_ptr());
            self.check("preparing a connection", result)?;
            let conf = name.conf.as_ref().map_or(ptr::null(), |conf| conf.as_ptr());
            let result = (lib.rados_conf_read_file)(self.cluster, conf);
            self.check("reading the Ceph configuration", result)?;
            let options = [
                // What is answered must be on the cluster: a volatile cache would die with this process.
                (c"rbd_cache", c"false"),
                (c"rbd_persistent_cache_mode", c"disabled"),
                // A lock that is broken without this would let the old holder's late writes through.
                (BLOCKLIST, c"true"),
            ];
            for (option, value) in options {
                let result = (lib.rados_conf_set)(self.cluster, option.as_ptr(), value.as_ptr());
                // A release that does not know a cache has none.
                if result == -libc::ENOENT && option != BLOCKLIST {
                    continue;
                }
                self.check("setting what the lock and the cache do", result)?;
            }
            let result = (lib.rados_connect)(self.cluster);
            self.check("connecting to the cluster", result)?;
            let result = (lib.rados_ioctx_create)(self.cluster, name.pool.as_ptr(), &mut self.pool);
            self.check("opening the pool", result)?;
            if let Some(namespace) = &name.namespace {
                (lib.rados_ioctx_set_namespace)(self.pool, namespace.as_ptr());
            }
            let result = (lib.rbd_open)(self.pool, name.image.as_ptr(), &mut self.image, ptr::null());
            self.check("opening the image", result)
        }
    }

    fn lock(&self, take_over: &TakeOver) -> Result<(), ImageError> {
        if let Some(owner) = self.owner()? {
            let may = match take_over {
                TakeOver::No => false,
                TakeOver::From(expected) => *expected == owner,
                TakeOver::Anybody => true,
            };
            if !may {
                return Err(ImageError::Held { image: self.shown.clone(), owner });
            }
            let name =
                CString::new(owner.as_str()).map_err(|_| self.failed("reading the lock", libc::EINVAL))?;
            // SAFETY: an open image and a NUL-terminated string.
            match unsafe { (self.library.rbd_lock_break)(self.image, EXCLUSIVE, name.as_ptr()) } {
                0 => crate::line(format_args!(
                    "{}: took the lock from {owner}, which is blocklisted",
                    self.shown
                )),
                // It is somebody else's by now, or free: taking it says which.
                result if matches!(-result, libc::ENOENT | libc::EBUSY) => {}
                result => self.check("breaking the lock", result)?,
            }
        }
        // SAFETY: an open image.
        match unsafe { (self.library.rbd_lock_acquire)(self.image, EXCLUSIVE) } {
            0 => Ok(()),
            result if matches!(-result, libc::EBUSY | libc::EROFS | libc::EAGAIN) => {
                let owner = self.owner()?.unwrap_or_else(|| "another client".into());
                Err(ImageError::Held { image: self.shown.clone(), owner })
            }
            result if -result == libc::EINVAL => Err(ImageError::NoLock { image: self.shown.clone() }),
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
            let lib = &self.library;
            let result = (lib.rbd_lock_get_owners)(self.image, &mut mode, owners.as_mut_ptr(), &mut count);
            match -result {
                libc::ENOENT => return Ok(None),
                libc::EINVAL => return Err(ImageError::NoLock { image: self.shown.clone() }),
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
        &self.shown
    }

    pub(crate) fn library(&self) -> &Library {
        &self.library
    }

    pub(crate) fn handle(&self) -> Handle {
        self.image
    }

    /// A completion that calls `done` with `argument`.
    pub(crate) fn completion(&self, argument: *mut libc::c_void, done: Callback) -> Result<Handle, c_int> {
        let mut completion = ptr::null_mut();
        // SAFETY: a place for the handle; the argument is only passed on.
        let result = unsafe { (self.library.rbd_aio_create_completion)(argument, done, &mut completion) };
        if result < 0 { Err(-result) } else { Ok(completion) }
    }

    fn failed(&self, doing: &'static str, errno: c_int) -> ImageError {
        ImageError::Failed { doing, image: self.shown.clone(), cause: io::Error::from_raw_os_error(errno) }
    }

    fn check(&self, doing: &'static str, result: c_int) -> Result<(), ImageError> {
        if result < 0 { Err(self.failed(doing, -result)) } else { Ok(()) }
    }
}

impl Drop for Image {
    /// Gives the lock back too.
    fn drop(&mut self) {
        // SAFETY: each handle is null or open, and this value is the only one that knows it.
        unsafe {
            if !self.image.is_null() {
                (self.library.rbd_close)(self.image);
            }
            if !self.pool.is_null() {
                (self.library.rados_ioctx_destroy)(self.pool);
            }
            if !self.cluster.is_null() {
                (self.library.rados_shutdown)(self.cluster);
            }
        }
    }
}

const BLOCKLIST: &CStr = c"rbd_blocklist_on_break_lock";
