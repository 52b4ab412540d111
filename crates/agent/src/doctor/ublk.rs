//! Whether disks can be block devices of this host (ublk), and whether the host then keeps off them.

use std::path::Path;

use vmseal_api::agent::v1::Warning;

use super::{Host, is_executable, warning};
use crate::ublk;

/// A host that lost ublk, or got its disks from one that has it. Without such disks nothing is wrong: `host show` tells.
pub(super) fn kernel(root: &Path, devices: usize) -> Option<Warning> {
    let why = ublk::missing(root).filter(|_| devices > 0)?;
    warning(
        "no-ublk",
        format!(
            "{devices} disks here are block devices (ublk), and their VMs do not start: this host has none: {why}"
        ),
        "boot a kernel with ublk (Linux 6.1, CONFIG_BLK_DEV_UBLK) and io_uring, or, for each disk: \
         vmseal disk set --class compatible VM DISK"
            .to_owned(),
    )
}

/// Without it a disk that is a block device does not start.
pub(super) fn program(host: &Host<'_>) -> Option<Warning> {
    let program = host.config.ublk_program();
    if ublk::missing(host.root).is_some() || host.metadata(&program).is_some_and(|file| is_executable(&file))
    {
        return None;
    }
    warning(
        "ublk-program-missing",
        format!("{} is missing or not executable: no disk can be a block device (ublk)", program.display()),
        "install vmseal-ublk there, or set ublk_binary in agent.toml".to_owned(),
    )
}

/// Without them this host looks for volume groups and file systems on the disks of its guests.
pub(super) fn rules(host: &Host<'_>) -> Option<Warning> {
    if ublk::missing(host.root).is_some() || ublk::has_udev_rules(host.root) {
        return None;
    }
    warning(
        "ublk-udev-rules-missing",
        "this host has ublk, and vmseal's udev rules are not installed: udev and LVM look into the disks of guests"
            .to_owned(),
        "install vmseal's rules below deploy/udev in /etc/udev/rules.d, then: udevadm control --reload".to_owned(),
    )
}
