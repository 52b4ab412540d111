//! Who may write a volume now: the OFD lock on the owner block's bytes, and QEMU's lock bytes, which keep QEMU and
//! `qemu-img` out.
//!
//! The agent takes them before it starts a VM's disk process. Only a volume that changes hands while its process runs is
//! locked and let go here. Locks belong to the open file description, so a worker's are its keeper's too, and the next
//! worker's.

use std::{fs::File, io, os::fd::AsRawFd};

use vmseal_luks::{OWNER_BLOCK_LEN, OWNER_BLOCK_OFFSET, QEMU_LOCK_BYTES};

/// QEMU's permissions that a writer has and denies: consistent read, write, write unchanged, resize.
const PERMISSIONS: u64 = 4;

/// Why a volume cannot be locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody has it.
    #[error("it is in use by another process, which holds its lock")]
    InUse,
    /// The file system has no locks, or it failed.
    #[error("it cannot be locked")]
    Io(#[from] io::Error),
}

/// Takes a volume's data file, and the header if that is another one; both or neither. What is locked already stays so.
///
/// # Errors
///
/// [`LockError`]: nothing is locked then.
pub(crate) fn take(data: &File, header: Option<&File>) -> Result<(), LockError> {
    let taken = take_one(data, true).and_then(|()| header.map_or(Ok(()), |header| take_one(header, false)));
    if taken.is_err() {
        give_back(data, header);
    }
    taken
}

/// Lets both go.
pub(crate) fn give_back(data: &File, header: Option<&File>) {
    for file in [Some(data), header].into_iter().flatten() {
        for (at, len) in ranges() {
            // There is no reason for which a lock is not let go.
            let _ = command(file, libc::F_OFD_SETLK, libc::F_UNLCK, at, len);
        }
    }
}

fn ranges() -> [(u64, u64); 3] {
    let [does, denies] = QEMU_LOCK_BYTES;
    [(OWNER_BLOCK_OFFSET, OWNER_BLOCK_LEN as u64), (does, PERMISSIONS), (denies, PERMISSIONS)]
}

/// Two who come at the same time may both be refused, but both are never let in: QEMU's bytes are taken as read locks
/// first, and then it is looked who else has some.
fn take_one(file: &File, from_qemu: bool) -> Result<(), LockError> {
    let [owner, qemu @ ..] = ranges();
    set(file, libc::F_WRLCK, owner)?;
    if !from_qemu {
        return Ok(());
    }
    for range in qemu {
        set(file, libc::F_RDLCK, range)?;
    }
    for (at, len) in qemu {
        let found = command(file, libc::F_OFD_GETLK, libc::F_WRLCK, at, len)?;
        if libc::c_int::from(found.l_type) != libc::F_UNLCK {
            return Err(LockError::InUse);
        }
    }
    Ok(())
}

fn set(file: &File, kind: libc::c_int, (at, len): (u64, u64)) -> Result<(), LockError> {
    match command(file, libc::F_OFD_SETLK, kind, at, len) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(LockError::InUse)
        }
        Err(error) => Err(error.into()),
    }
}

fn command(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    at: u64,
    len: u64,
) -> io::Result<libc::flock> {
    // SAFETY: all-zero is a valid flock; l_pid must be zero for OFD commands.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // Constants, far below 2^63.
    lock.l_start = at.cast_signed();
    lock.l_len = len.cast_signed();
    loop {
        // SAFETY: `lock` is a flock that outlives the call, as F_OFD_SETLK and F_OFD_GETLK demand.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } == 0 {
            return Ok(lock);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn volume_is_one_descriptions_and_free_again_as_a_whole() {
        let path = std::env::temp_dir().join(format!("vmseal-lock-{}", std::process::id()));
        let open =
            || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        let (data, other, header) = (open(), open(), open());
        take(&data, None).unwrap();
        take(&data, None).expect("taking it again is nothing new");
        assert!(matches!(take(&other, None), Err(LockError::InUse)));
        give_back(&data, None);
        take(&other, None).unwrap();
        give_back(&other, None);
        // Of a volume of two files neither stays locked when the other cannot be had.
        let second = path.with_extension("header");
        let hold =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&second).unwrap();
        let want = OpenOptions::new().read(true).write(true).open(&second).unwrap();
        take_one(&hold, false).unwrap();
        assert!(matches!(take(&header, Some(&want)), Err(LockError::InUse)));
        take(&data, None).unwrap();
        // QEMU writes: it has a read lock on "does write".
        give_back(&data, None);
        command(&other, libc::F_OFD_SETLK, libc::F_RDLCK, QEMU_LOCK_BYTES[0] + 1, 1).unwrap();
        assert!(matches!(take(&data, None), Err(LockError::InUse)));
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&second).unwrap();
    }
}
