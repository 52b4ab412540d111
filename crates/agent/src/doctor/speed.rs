//! What makes disks slower on this host than they need be: the kernel's io_uring and the CPU's AES in, findings out.
//!
//! Nothing here is wrong with the data: each has a slower way that does the same.

use std::io;

use vmseal_api::agent::v1::Warning;

use super::{Host, warning};

const DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";
const GROUP: &str = "/proc/sys/kernel/io_uring_group";

/// io_uring that the disk process may not use.
pub(super) fn io_uring(host: &Host<'_>) -> Option<Warning> {
    let (why, hint) = match host.read(DISABLED).as_deref().map(str::trim) {
        Some("2") => {
            ("kernel.io_uring_disabled is 2", "sysctl kernel.io_uring_disabled=0, and in /etc/sysctl.d")
        }
        // Then only CAP_SYS_ADMIN, which the disk process has not, and one group.
        Some("1") if !is_in_group(host) => (
            "kernel.io_uring_disabled is 1",
            "sysctl kernel.io_uring_group=GID, with the id of the disk process's group, and in /etc/sysctl.d",
        ),
        Some("0" | "1") => return None,
        // A kernel that does not say has it or has it not.
        _ if host.is_this_host() && is_missing() => {
            ("this kernel has none", "boot a kernel with CONFIG_IO_URING")
        }
        _ => return None,
    };
    warning(
        "io-uring-off",
        format!("io_uring is switched off ({why}): disks use the slower pread and pwrite engine"),
        hint.to_owned(),
    )
}

/// Whether the group that may use it is the disk user's own.
fn is_in_group(host: &Host<'_>) -> bool {
    let user = &host.config.disk_user;
    let entry = |text: String| {
        let line = text.lines().find(|line| line.split(':').next() == Some(user))?.to_owned();
        line.split(':').nth(3).map(str::to_owned)
    };
    let allowed = host.read(GROUP).map(|group| group.trim().to_owned());
    allowed.is_some() && allowed == host.read("/etc/passwd").and_then(entry)
}

fn is_missing() -> bool {
    // SAFETY: no entries and no parameters: the kernel refuses before it looks at either, and makes nothing.
    let made = unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, std::ptr::null_mut::<u8>()) };
    made < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS)
}

/// A CPU without AES. One without VAES is slower and nothing that can be put right: `docs/design/xts.md`.
pub(super) fn cipher(host: &Host<'_>) -> Option<Warning> {
    let cpus = host.read("/proc/cpuinfo")?;
    // x86 calls them flags, ARM features; of all CPUs that are alike one is enough.
    let line = |name: &str| cpus.lines().find_map(|l| l.strip_prefix(name)?.trim_start().strip_prefix(':'));
    let flags = line("flags").or_else(|| line("Features"))?;
    if flags.split_whitespace().any(|flag| flag == "aes") {
        return None;
    }
    warning(
        "no-aes",
        "this CPU offers no AES instructions: encrypted disks are slow and cost much CPU".to_owned(),
        "switch AES on in the firmware; in a VM, pass the host's CPU through".to_owned(),
    )
}
