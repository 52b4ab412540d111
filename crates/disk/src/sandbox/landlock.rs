//! Landlock: no file by name, no TCP, nothing outwards that the kernel knows to forbid.
//!
//! The version of its interface (ABI) is asked for, and everything that version can forbid is forbidden. What was
//! opened before stays usable. Source: <https://docs.kernel.org/userspace-api/landlock.html>.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

const CREATE_RULESET_VERSION: u32 = 1;
const RULE_PATH_BENEATH: u32 = 1;
const ACCESS_FS_READ_FILE: u64 = 1 << 2;

#[repr(C)]
#[derive(Default)]
struct RulesetAttributes {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: i32,
}

impl RulesetAttributes {
    /// Everything that an ABI can forbid, and how many bytes of this its kernel knows.
    fn of(abi: u32) -> (Self, usize) {
        let fs: u64 = match abi {
            1 => (1 << 13) - 1,
            2 => (1 << 14) - 1,     // moves between directories
            3 | 4 => (1 << 15) - 1, // truncation
            _ => (1 << 16) - 1,     // ioctl on devices
        };
        let attributes = Self {
            handled_access_fs: fs,
            handled_access_net: if abi >= 4 { 0b11 } else { 0 }, // bind and connect of TCP
            scoped: if abi >= 6 { 0b11 } else { 0 },             // abstract unix sockets, signals
        };
        let bytes = match abi {
            ..4 => 8,
            4 | 5 => 16,
            _ => 24,
        };
        (attributes, bytes)
    }
}

/// The version of this kernel's landlock; 0 if it has none or it is switched off.
///
/// # Errors
///
/// The kernel's, other than that.
pub fn abi() -> io::Result<u32> {
    // SAFETY: no attributes, as this flag demands.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0 as libc::size_t,
            CREATE_RULESET_VERSION,
        )
    };
    match u32::try_from(abi) {
        Ok(abi) => Ok(abi),
        Err(_) => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(0),
            error => Err(error),
        },
    }
}

/// Confines the calling thread and those it starts; gives the ABI, 0 if this kernel has no landlock.
///
/// # Errors
///
/// The kernel's.
pub(super) fn enter(readable: Option<BorrowedFd<'_>>) -> io::Result<u32> {
    let abi = abi()?;
    if abi == 0 {
        return Ok(0);
    }
    let (attributes, bytes) = RulesetAttributes::of(abi);
    // SAFETY: `bytes` of `attributes`, which is at least as long; on success the descriptor is new and ours alone.
    let ruleset = unsafe {
        let fd = libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, bytes, 0u32);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd as i32)
    };
    if let Some(directory) = readable {
        let beneath = PathBeneath { allowed_access: ACCESS_FS_READ_FILE, parent_fd: directory.as_raw_fd() };
        // SAFETY: the rule is read during the call; both descriptors are open.
        let added = unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                ruleset.as_raw_fd(),
                RULE_PATH_BENEATH,
                &raw const beneath,
                0u32,
            )
        };
        if added != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: an open descriptor and no flag.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) } {
        0 => Ok(abi),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_kernels_are_asked_for_more_in_the_bytes_they_know() {
        let bits = |abi| {
            let (attributes, bytes) = RulesetAttributes::of(abi);
            (
                attributes.handled_access_fs.count_ones(),
                attributes.handled_access_net,
                attributes.scoped,
                bytes,
            )
        };
        assert_eq!(bits(1), (13, 0, 0, 8));
        assert_eq!(bits(3), (15, 0, 0, 8));
        assert_eq!(bits(4), (15, 3, 0, 16));
        assert_eq!(bits(5), (16, 3, 0, 16));
        assert_eq!(bits(6), (16, 3, 3, 24));
        assert_eq!(bits(99), bits(6));
    }
}
