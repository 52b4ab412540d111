//! Groups of the host by name, and whether this process may act for others. Users are `spawn`'s business.

use std::{ffi::CString, mem, ptr};

/// Longest entry that is read.
const ENTRY: usize = 64 << 10;

/// The gid of the group of that name; none if there is none, or the name service does not answer.
pub fn group(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    let mut buffer = vec![0; ENTRY];
    // SAFETY: all-zero is a valid group: null pointers.
    let mut entry: libc::group = unsafe { mem::zeroed() };
    let mut found = ptr::null_mut();
    // SAFETY: name is terminated; entry, buffer (with its own length) and found outlive the call.
    let done =
        unsafe { libc::getgrnam_r(name.as_ptr(), &mut entry, buffer.as_mut_ptr(), buffer.len(), &mut found) };
    (done == 0 && !found.is_null()).then_some(entry.gr_gid)
}

/// Whether this process may become another user.
pub fn is_root() -> bool {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_root_is_zero_and_a_made_up_name_is_nobody() {
        assert_eq!(group("root"), Some(0));
        assert_eq!(group("vmseal-no-such-group"), None);
        assert_eq!(group("a\0b"), None);
    }
}
