//! A connection to a Ceph cluster and a pool of it, as one user. Names in, handles out; closed when dropped.
//!
//! The key of the user is read by librados itself, out of the keyring: it is no argument and passes no hand of ours.

use std::{
    ffi::{CStr, CString, c_int},
    io, ptr,
};

use crate::library::{Handle, Library, LibraryError};

/// Seconds that a cluster may take to answer where nobody said another number.
pub const PATIENCE_S: u32 = 60;

/// Which cluster, pool and image, and as whom.
#[derive(Debug, Clone)]
pub struct ImageName {
    /// Pool.
    pub pool: CString,
    /// Namespace within it, or none.
    pub namespace: Option<CString>,
    /// Image.
    pub image: CString,
    /// Ceph user without `client.`.
    pub user: CString,
    /// Configuration file; none for the usual places.
    pub conf: Option<CString>,
    /// Monitors, in place of the configuration's.
    pub monitors: Option<CString>,
    /// Keyring, in place of the configuration's.
    pub keyring: Option<CString>,
    /// Seconds the cluster may take to answer.
    pub patience_s: u32,
}

impl ImageName {
    /// Pool and image, for messages.
    pub fn shown(&self) -> String {
        let namespace =
            self.namespace.as_ref().map_or(String::new(), |n| format!("{}/", n.to_string_lossy()));
        format!("{}/{namespace}{}", self.pool.to_string_lossy(), self.image.to_string_lossy())
    }
}

/// Why the cluster did not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// No library.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The cluster cannot be had.
    #[error("no connection to the Ceph cluster of {image} as client.{user} ({cause}): {advice}")]
    Unreachable {
        /// Pool and image.
        image: String,
        /// As whom.
        user: String,
        /// Ceph's reason.
        cause: io::Error,
        /// What to look at.
        advice: &'static str,
    },
    /// The image is not there.
    #[error("there is no image {image}: look at `rbd ls`")]
    Absent {
        /// Pool and image.
        image: String,
    },
    /// Something failed on the way.
    #[error("{doing} failed for {image} as client.{user}: {cause}{}", advice(cause))]
    Failed {
        /// What was tried.
        doing: &'static str,
        /// Pool and image.
        image: String,
        /// As whom.
        user: String,
        /// Ceph's reason.
        cause: io::Error,
    },
}

fn advice(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; it needs the capabilities `mon 'profile rbd'` and `osd 'profile rbd pool=POOL'`: see `ceph auth get`"
        }
        _ => "",
    }
}

/// A connection with a pool.
pub struct Cluster {
    library: Library,
    cluster: Handle,
    pool: Handle,
    shown: String,
    user: String,
}

// SAFETY: librados handles may be used from any thread, and by several at a time.
unsafe impl Send for Cluster {}
// SAFETY: as above; the fields themselves do not change once connected.
unsafe impl Sync for Cluster {}

impl Cluster {
    /// Connects to the cluster of an image and opens its pool.
    ///
    /// # Errors
    ///
    /// [`ClusterError`].
    pub fn connect(name: &ImageName) -> Result<Self, ClusterError> {
        let mut this = Self {
            library: Library::load()?,
            cluster: ptr::null_mut(),
            pool: ptr::null_mut(),
            shown: name.shown(),
            user: name.user.to_string_lossy().into_owned(),
        };
        this.open(name)?;
        Ok(this)
    }

    /// Every handle is set as soon as it exists, so that a failure later gives it back by `drop`.
    fn open(&mut self, name: &ImageName) -> Result<(), ClusterError> {
        let patience = CString::new(name.patience_s.to_string()).expect("digits");
        // SAFETY: strings are NUL-terminated and outlive the calls; handles go to fields of this value, and each call
        // gets one that an earlier call made.
        unsafe {
            let lib = &self.library;
            let result = (lib.rados_create)(&mut self.cluster, name.user.as_ptr());
            self.check("preparing a connection", result)?;
            let conf = name.conf.as_ref().map_or(ptr::null(), |conf| conf.as_ptr());
            match (lib.rados_conf_read_file)(self.cluster, conf) {
                // Who names the monitors needs no file.
                result if result == -libc::ENOENT && name.conf.is_none() && name.monitors.is_some() => {}
                result => self.check("reading the Ceph configuration", result)?,
            }
            let options: [(&CStr, Option<&CStr>); 6] = [
                (c"mon_host", name.monitors.as_deref()),
                (c"keyring", name.keyring.as_deref()),
                (c"client_mount_timeout", Some(&patience)),
                // What is answered must be on the cluster: a volatile cache would die with this process.
                (c"rbd_cache", Some(c"false")),
                (c"rbd_persistent_cache_mode", Some(c"disabled")),
                // A lock that is broken without this would let the old holder's late writes through.
                (BLOCKLIST, Some(c"true")),
            ];
            for (option, value) in options {
                let Some(value) = value else { continue };
                let result = (lib.rados_conf_set)(self.cluster, option.as_ptr(), value.as_ptr());
                // A release that does not know a cache has none.
                if result == -libc::ENOENT && option != BLOCKLIST {
                    continue;
                }
                self.check("setting what the lock and the cache do", result)?;
            }
            let result = (lib.rados_connect)(self.cluster);
            if result < 0 {
                return Err(self.unreachable(io::Error::from_raw_os_error(-result)));
            }
            let result = (lib.rados_ioctx_create)(self.cluster, name.pool.as_ptr(), &mut self.pool);
            self.check("opening the pool", result)?;
            if let Some(namespace) = &name.namespace {
                (lib.rados_ioctx_set_namespace)(self.pool, namespace.as_ptr());
            }
        }
        Ok(())
    }

    fn unreachable(&self, cause: io::Error) -> ClusterError {
        let advice = match cause.raw_os_error() {
            Some(libc::ETIMEDOUT) => "its monitors do not answer from this host; try: ceph -s",
            Some(libc::EPERM | libc::EACCES) => {
                "the cluster does not know that key; compare with: ceph auth get"
            }
            Some(libc::ENOENT) => {
                "no monitor or no keyring is named where this process looks: see docs/operate/ceph.md"
            }
            _ => "see whether `ceph -s` works as that user on this host",
        };
        ClusterError::Unreachable { image: self.shown.clone(), user: self.user.clone(), cause, advice }
    }

    /// The functions.
    pub(crate) fn library(&self) -> &Library {
        &self.library
    }

    /// The pool.
    pub(crate) fn pool(&self) -> Handle {
        self.pool
    }

    /// Pool and image, for messages.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    pub(crate) fn failed(&self, doing: &'static str, errno: c_int) -> ClusterError {
        let cause = io::Error::from_raw_os_error(errno);
        ClusterError::Failed { doing, image: self.shown.clone(), user: self.user.clone(), cause }
    }

    pub(crate) fn check(&self, doing: &'static str, result: c_int) -> Result<(), ClusterError> {
        if result < 0 { Err(self.failed(doing, -result)) } else { Ok(()) }
    }

    /// As [`Cluster::check`], where ENOENT means the image itself.
    pub(crate) fn check_there(&self, doing: &'static str, result: c_int) -> Result<(), ClusterError> {
        if result == -libc::ENOENT {
            return Err(ClusterError::Absent { image: self.shown.clone() });
        }
        self.check(doing, result)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SAFETY: each handle is null or open, and this value is the only one that knows it; images are closed before.
        unsafe {
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
