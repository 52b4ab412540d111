//! Makes the file of a new volume: space, header, records in the header.
//!
//! An empty file, key and record in; a volume that opens, without data, durable but for its name. A file gets its name
//! when it is whole, and never takes another's. Which names, and what to do after a crash, is the tasks' business.

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, OpenOptionsExt, PermissionsExt, fchown},
        },
    },
    path::Path,
};

use vmseal_keys::Dek;
use vmseal_luks::{Geometry, LuksError, VmsealToken, create};
use vmseal_model::record::{KeyRecord, Subject};

/// Whose a new file is and who may read it: as the file it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Ownership {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

impl Default for Ownership {
    fn default() -> Self {
        Self { uid: 0, gid: 0, mode: 0o600 }
    }
}

/// Why there is no new volume.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NewVolumeError {
    /// The file system refused.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// No header can be made.
    #[error("cannot make the volume's header")]
    Header(#[from] LuksError),
    /// The record is not a disk's.
    #[error("the key record is no disk's")]
    NoDisk,
}

impl NewVolumeError {
    /// Whether the file system is full, or a quota used up.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)))
    }
}

fn io(action: &'static str) -> impl FnOnce(io::Error) -> NewVolumeError {
    move |source| NewVolumeError::Io { action, source }
}

/// Creates a file that was not there; owner and mode are set before anything is written.
///
/// # Errors
///
/// The file system's; `AlreadyExists` if there is one of that name, whatever it is.
pub fn create_exclusive(path: &Path, ownership: Ownership) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    let set = || -> io::Result<()> {
        fchown(&file, Some(ownership.uid), Some(ownership.gid))?;
        file.set_permissions(std::fs::Permissions::from_mode(ownership.mode & 0o777))
    };
    // An agent that is not root (tests, a user session) keeps the file as its own.
    match set() {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
        other => other?,
    }
    Ok(file)
}

/// Makes the volume in an empty file: all its space, its header with the record in it; flushed.
///
/// # Errors
///
/// [`NewVolumeError`]; the file is of no use then.
pub fn fill(file: &File, dek: &Dek, record: &KeyRecord) -> Result<(), NewVolumeError> {
    let header = header_of(dek, record)?;
    let Subject::Disk { payload_offset, .. } = record.head.subject else {
        return Err(NewVolumeError::NoDisk);
    };
    allocate(file, payload_offset + record.state.stored_bytes)?;
    file.write_all_at(&header, 0).map_err(io("write the volume's header"))?;
    file.sync_all().map_err(io("flush the volume"))
}

/// The beginning of a volume: its header with the record in it.
///
/// # Errors
///
/// [`NewVolumeError::NoDisk`], [`NewVolumeError::Header`].
pub fn header_of(dek: &Dek, record: &KeyRecord) -> Result<Vec<u8>, NewVolumeError> {
    let Subject::Disk { disk, unit, payload_offset, .. } = record.head.subject else {
        return Err(NewVolumeError::NoDisk);
    };
    let geometry = Geometry { unit_bytes: unit.get(), payload_offset };
    Ok(create(dek, disk, &geometry, &VmsealToken { records: vec![record.encode()] })?)
}

/// Gives the file its length and its space.
///
/// # Errors
///
/// [`NewVolumeError::Io`], `ENOSPC` among others.
pub fn allocate(file: &File, bytes: u64) -> Result<(), NewVolumeError> {
    file.set_len(bytes).map_err(io("set the file's length"))?;
    let len =
        libc::off_t::try_from(bytes).map_err(|_| io("reserve space")(io::ErrorKind::FileTooLarge.into()))?;
    if len == 0 {
        return Ok(());
    }
    loop {
        // SAFETY: the descriptor is open; no pointers are passed.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            // File systems without it: every byte is written anyway, so space is only noticed later.
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => return Ok(()),
            _ => return Err(io("reserve space")(error)),
        }
    }
}

/// Gives a file its name, unless something of that name is there; durable when this returns.
///
/// # Errors
///
/// `AlreadyExists`; the file system's.
pub fn rename_exclusive(from: &Path, to: &Path) -> io::Result<()> {
    let c = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput);
    let (from_c, to_c) = (c(from)?, c(to)?);
    let flags = libc::RENAME_NOREPLACE;
    // SAFETY: both are terminated strings that outlive the call.
    let done =
        unsafe { libc::renameat2(libc::AT_FDCWD, from_c.as_ptr(), libc::AT_FDCWD, to_c.as_ptr(), flags) };
    if done != 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
        // A file system without RENAME_NOREPLACE (NFS): a link fails just so if the name is taken.
        std::fs::hard_link(from, to)?;
        std::fs::remove_file(from)?;
    }
    sync_directory(to)
}

/// Flushes the directory a file is in.
///
/// # Errors
///
/// The file system's.
pub fn sync_directory(file: &Path) -> io::Result<()> {
    File::open(file.parent().unwrap_or(Path::new("/")))?.sync_all()
}
