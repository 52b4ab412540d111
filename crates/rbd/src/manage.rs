//! What is done to an image without serving it: looked at, read from, made, renamed, removed. No lock is taken.
//!
//! For the agent, which does not load librbd itself. Output is lines of `name value`; see `docs/formats/store-helper.md`.

use std::{
    ffi::{CStr, CString, c_char, c_int},
    fmt::Write as _,
    mem, ptr,
};

use crate::{
    cluster::{Cluster, ClusterError},
    library::{Handle, Watcher},
};

/// Features of a new image: layering, exclusive-lock, object-map, fast-diff, deep-flatten, which is Ceph's default.
const FEATURES: u64 = 1 | LOCK | 8 | 16 | 32;
/// `RBD_FEATURE_EXCLUSIVE_LOCK`.
const LOCK: u64 = 4;
/// Most watchers that are told.
const WATCHERS: usize = 16;
/// Bytes of an image's id.
const ID: usize = 128;

/// An image that is looked at.
struct Open<'a> {
    cluster: &'a Cluster,
    image: Handle,
}

impl<'a> Open<'a> {
    fn new(cluster: &'a Cluster, name: &CStr) -> Result<Self, ClusterError> {
        let mut image = ptr::null_mut();
        // SAFETY: an open pool, a NUL-terminated name, a place for the handle.
        let result = unsafe {
            (cluster.library().rbd_open_read_only)(cluster.pool(), name.as_ptr(), &mut image, ptr::null())
        };
        cluster.check_there("opening the image", result)?;
        Ok(Self { cluster, image })
    }

    fn bytes(&self) -> Result<u64, ClusterError> {
        let mut bytes = 0;
        // SAFETY: an open image and a place for the answer.
        let result = unsafe { (self.cluster.library().rbd_get_size)(self.image, &mut bytes) };
        self.cluster.check("asking the size", result)?;
        Ok(bytes)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // SAFETY: open, and nobody else knows it.
        unsafe { (self.cluster.library().rbd_close)(self.image) };
    }
}

/// What there is to know of an image, as lines: `id`, `bytes`, `created_ns`, `modified_ns`, `snapshots`, `lock` (1 if it
/// can be locked), `watcher` (once for each client that has it open for writing).
///
/// # Errors
///
/// [`ClusterError::Absent`] among others.
pub fn info(cluster: &Cluster, name: &CStr) -> Result<String, ClusterError> {
    let open = Open::new(cluster, name)?;
    let (lib, image) = (cluster.library(), open.image);
    let mut id = [0 as c_char; ID];
    let (mut created, mut modified) = (zero_time(), zero_time());
    let (mut features, mut snapshots) = (0, 0);
    let mut watchers = [const { Watcher { addr: ptr::null_mut(), id: 0, cookie: 0 } }; WATCHERS];
    let mut count = WATCHERS;
    // SAFETY: an open image, and places for the answers as long as said. No list of snapshots is asked for, only how
    // many there are; the watchers' strings are copied before they are given back as they came.
    let (id, watchers) = unsafe {
        cluster.check("asking the image's id", (lib.rbd_get_id)(image, id.as_mut_ptr(), ID))?;
        cluster.check("asking when it was made", (lib.rbd_get_create_timestamp)(image, &mut created))?;
        cluster.check("asking when it was written", (lib.rbd_get_modify_timestamp)(image, &mut modified))?;
        cluster.check("asking its features", (lib.rbd_get_features)(image, &mut features))?;
        match (lib.rbd_snap_list)(image, ptr::null_mut(), &mut snapshots) {
            // It wants room for them and for an end mark.
            result if result == -libc::ERANGE => snapshots = (snapshots - 1).max(0),
            result => cluster.check("listing its snapshots", result)?,
        }
        cluster.check(
            "asking who has it open",
            (lib.rbd_watchers_list)(image, watchers.as_mut_ptr(), &mut count),
        )?;
        let text = |at: *const c_char| CStr::from_ptr(at).to_string_lossy().into_owned();
        let told = watchers[..count.min(WATCHERS)].iter().filter(|w| !w.addr.is_null());
        let told: Vec<String> = told.map(|w| text(w.addr)).collect();
        (lib.rbd_watchers_list_cleanup)(watchers.as_mut_ptr(), count.min(WATCHERS));
        (text(id.as_ptr()), told)
    };
    let mut lines = format!(
        "id {id}\nbytes {}\ncreated_ns {}\nmodified_ns {}\nsnapshots {snapshots}\nlock {}\n",
        open.bytes()?,
        nanoseconds(&created),
        nanoseconds(&modified),
        u8::from(features & LOCK != 0),
    );
    for watcher in watchers {
        let _ = writeln!(lines, "watcher {watcher}");
    }
    Ok(lines)
}

fn zero_time() -> libc::timespec {
    // SAFETY: plain data.
    unsafe { mem::zeroed() }
}

fn nanoseconds(time: &libc::timespec) -> i128 {
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

/// Bytes of an image as it is now, whoever has it open; fewer where it ends.
///
/// # Errors
///
/// [`ClusterError`].
pub fn read(cluster: &Cluster, name: &CStr, offset: u64, length: usize) -> Result<Vec<u8>, ClusterError> {
    let open = Open::new(cluster, name)?;
    let within = open.bytes()?.saturating_sub(offset).min(length as u64) as usize;
    let mut bytes = vec![0; within];
    // SAFETY: an open image and a buffer as long as said.
    let got = unsafe {
        (cluster.library().rbd_read)(open.image, offset, within, bytes.as_mut_ptr().cast::<c_char>())
    };
    match usize::try_from(got) {
        Ok(got) => bytes.truncate(got),
        Err(_) => return Err(cluster.failed("reading the image", i32::try_from(-got).unwrap_or(libc::EIO))),
    }
    Ok(bytes)
}

/// Makes an image, thin and with an exclusive lock to be had.
///
/// # Errors
///
/// EEXIST if there is one of that name; [`ClusterError`].
pub fn create(cluster: &Cluster, name: &CStr, bytes: u64) -> Result<(), ClusterError> {
    // 0: objects of the default size.
    let mut order: c_int = 0;
    // SAFETY: an open pool, a NUL-terminated name, a place for the order.
    let result = unsafe {
        (cluster.library().rbd_create2)(cluster.pool(), name.as_ptr(), bytes, FEATURES, &mut order)
    };
    cluster.check("making the image", result)
}

/// Gives an image another name in its pool.
///
/// # Errors
///
/// EEXIST if that is taken; [`ClusterError`].
pub fn rename(cluster: &Cluster, name: &CStr, to: &CString) -> Result<(), ClusterError> {
    // SAFETY: an open pool and NUL-terminated names.
    let result = unsafe { (cluster.library().rbd_rename)(cluster.pool(), name.as_ptr(), to.as_ptr()) };
    cluster.check_there("renaming the image", result)
}

/// Removes an image that nobody has open and that has no snapshots.
///
/// # Errors
///
/// EBUSY, ENOTEMPTY; [`ClusterError`].
pub fn remove(cluster: &Cluster, name: &CStr) -> Result<(), ClusterError> {
    // SAFETY: an open pool and a NUL-terminated name.
    let result = unsafe { (cluster.library().rbd_remove)(cluster.pool(), name.as_ptr()) };
    cluster.check_there("removing the image", result)
}
