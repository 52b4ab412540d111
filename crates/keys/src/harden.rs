//! Keeps a process from being dumped or traced by its own user.

use std::io;

/// Sets RLIMIT_CORE to 0 and PR_SET_DUMPABLE to 0. Call it first in every `main` that may hold a key.
///
/// It does not stop root, and children that exec are dumpable again unless they call it too.
///
/// # Errors
///
/// As `setrlimit(2)` and `prctl(2)`; a process that cannot be hardened should not go on.
pub fn harden_process() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a whole rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: PR_SET_DUMPABLE takes one integer; the unused arguments are zero as prctl(2) wants.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0u64, 0u64, 0u64, 0u64) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
