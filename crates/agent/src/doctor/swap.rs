//! Swap that is not encrypted: what the kernel swaps to in, one finding out.
//!
//! Keys are never swapped; the memory of guests is. A device counts as encrypted if it is dm-crypt's, or if all that it
//! lies on is. A file of btrfs, whose device number is of no device, cannot be traced and counts as clear.

use std::{ffi::OsString, fs, os::unix::fs::MetadataExt as _, path::Path};

use vmseal_api::agent::v1::Warning;

use super::{Host, warning};

/// Devices on devices looked through.
const DEEPEST: u32 = 8;

/// Areas that are not encrypted.
pub(super) fn finding(host: &Host<'_>) -> Option<Warning> {
    let swaps = host.read("/proc/swaps")?;
    let areas = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(unescaped);
    let clear: Vec<String> = areas.filter(|area| !is_safe(host, area)).collect();
    if clear.is_empty() {
        return None;
    }
    warning(
        "clear-swap",
        format!("guest memory may be written to {} in clear: swap there is not encrypted", clear.join(", ")),
        "put swap on dm-crypt (crypttab, option swap), use zram, or turn it off: swapoff -a".to_owned(),
    )
}

/// `/proc/swaps` writes blanks and backslashes as three octal digits.
fn unescaped(area: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(area.to_owned(), |area, (code, character)| area.replace(code, character))
}

fn is_safe(host: &Host<'_>, area: &str) -> bool {
    let Some(device) = device(host, area) else { return false };
    match device.strip_prefix("zram") {
        // Memory, unless it has a device that it writes idle pages back to.
        Some(_) => match host.read(format!("/sys/block/{device}/backing_dev")) {
            Some(behind) if behind.trim() != "none" => is_safe(host, behind.trim()),
            _ => true,
        },
        None => is_encrypted(host, &device, DEEPEST),
    }
}

/// The kernel's name of the device that an area is, or lies on.
fn device(host: &Host<'_>, area: &str) -> Option<String> {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    if Path::new(area).starts_with("/dev") {
        // Names such as /dev/mapper/swap are links to the kernel's.
        return name(&fs::read_link(host.at(area)).unwrap_or_else(|_| area.into()));
    }
    let number = host.metadata(area)?.dev();
    let number = format!("{}:{}", libc::major(number), libc::minor(number));
    name(&fs::read_link(host.at("/sys/dev/block").join(number)).ok()?)
}

fn is_encrypted(host: &Host<'_>, device: &str, deepest: u32) -> bool {
    if deepest == 0 {
        return false;
    }
    let dir = format!("/sys/block/{device}");
    let crypt = |uuid: String| {
        // libcryptsetup's names for its devices; these two kinds check and do not encrypt.
        uuid.strip_prefix("CRYPT-")
            .is_some_and(|kind| !kind.starts_with("VERITY-") && !kind.starts_with("INTEGRITY-"))
    };
    if host.read(format!("{dir}/dm/uuid")).is_some_and(crypt) {
        return true;
    }
    let below: Vec<OsString> = match fs::read_dir(host.at(format!("{dir}/slaves"))) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect(),
        Err(_) => Vec::new(),
    };
    !below.is_empty() && below.iter().all(|name| is_encrypted(host, &name.to_string_lossy(), deepest - 1))
}
