//! Root's rights, down to those that a warden needs.

use std::io;

/// To make and end devices.
const CAP_SYS_ADMIN: u32 = 21;
/// To connect to the disk's socket, which is not root's.
const CAP_DAC_OVERRIDE: u32 = 1;
/// The third version of the capability calls: two words of 32 bits for each set.
const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// Drops every capability but two, and forbids to get any by an exec.
///
/// # Errors
///
/// The kernel's: one of the two is not there.
pub fn keep_needed() -> io::Result<()> {
    let check = |result: i64| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    let header = CapabilityHeader { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let kept = 1 << CAP_SYS_ADMIN | 1 << CAP_DAC_OVERRIDE;
    // Effective, permitted, inheritable; then the same of the upper 32.
    let sets = [kept, kept, 0, 0, 0, 0u32];
    // SAFETY: integers only, but for capset, which reads a header of 8 and sets of 24 bytes.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0).into())?;
        check(libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()))
    }
}
