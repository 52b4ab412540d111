//! Whether this kernel can keep a disk process from opening files by name.

use vmseal_api::agent::v1::Warning;

use super::warning;

/// Asks for the version of landlock's interface, not for a set of rules.
const VERSION: u32 = 1;

/// What is wrong with this kernel.
pub(super) fn finding() -> Option<Warning> {
    // SAFETY: no attributes, as the flag demands.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0 as libc::size_t, VERSION)
    };
    of(version)
}

/// The finding for a version; negative where there is no landlock.
pub(super) fn of(version: libc::c_long) -> Option<Warning> {
    if version > 0 {
        return None;
    }
    warning(
        "no-landlock",
        "this kernel has no landlock: a disk process that was taken over could open files by name".to_owned(),
        "boot with landlock in lsm= on the kernel's command line, or a kernel with CONFIG_SECURITY_LANDLOCK"
            .to_owned(),
    )
}
