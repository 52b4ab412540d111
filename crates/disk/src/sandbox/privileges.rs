//! No capability, now or by executing something.

use std::io;

/// The third version of the capability calls: two words of 32 bits for each set.
const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// Drops every capability of the calling thread, and forbids to get any by an exec. Where there are none this is as
/// good.
///
/// # Errors
///
/// The kernel's.
pub fn drop_all() -> io::Result<()> {
    let check = |result: i64| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    let header = CapabilityHeader { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let none = [0u32; 6];
    // SAFETY: integers only, but for capset, which reads a header of 8 and sets of 24 bytes.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0).into())?;
        check(libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()))
    }
}
