//! The form of a disk in a definition that is a block device of the host (ublk), and the way into it.
//!
//! A `<disk>` element in, changed; what is set aside for it is put back by another class, as that of a fast disk. Nothing
//! the guest or the administrator sees is lost by it, so there is no obstacle. libvirt itself gives QEMU the device: its
//! owner, its cgroup, its AppArmor rule.

use vmseal_model::{metadata::Aside, state::InnerFormat};

use crate::{
    config::AgentConfig,
    fast_disk::{driver, replace_source},
    xml::Element,
};

/// What `<driver>` must say: past the page cache, which would keep a second copy, many requests at once, and discards
/// passed on.
const DRIVER: [(&str, &str); 2] = [("cache", "none"), ("io", "io_uring")];

/// The last part of a device's path, if it lies where ours do.
pub(crate) fn name(device: &str) -> Option<&str> {
    device.strip_prefix(AgentConfig::UBLK_DIR)?.strip_prefix('/')
}

/// Whether a disk has that form.
pub(crate) fn is_ublk(disk: &Element) -> bool {
    let device = disk.child("source").and_then(|source| source.get("dev"));
    disk.get("type") == Some("block") && device.is_some_and(|device| name(device).is_some())
}

/// Gives a disk that form and that device; what was set aside for it. One that has it already keeps what is set aside of
/// it.
pub(crate) fn enter(disk: &mut Element, device: &str, format: InnerFormat, known: Aside) -> Aside {
    let had_it = is_ublk(disk);
    replace_source(disk, Element::new("source").with("dev", device));
    if had_it {
        return known;
    }
    disk.set("type", "block");
    let driver = driver(disk);
    driver.set("type", format.as_str());
    let mut aside = Aside::new();
    let mut put = |name: &str, value: &str| {
        if driver.get(name) != Some(value) {
            aside.insert(format!("driver.{name}"), driver.get(name).unwrap_or_default().to_owned());
            driver.set(name, value);
        }
    };
    DRIVER.into_iter().for_each(|(name, value)| put(name, value));
    if driver.get("discard").is_none() {
        aside.insert("driver.discard".to_owned(), String::new());
        driver.set("discard", "unmap");
    }
    // Ours as long as it is encrypted: the guest waits while a worker is away.
    driver.set("error_policy", "stop");
    driver.set("rerror_policy", "stop");
    aside
}
