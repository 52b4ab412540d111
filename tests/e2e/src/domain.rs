//! XML of the test guests: emulated, one CPU, kernel and initramfs given directly, console on a socket.

use std::path::{Path, PathBuf};

/// A guest to define.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// Target, path, format of each disk.
    pub disks: Vec<(String, PathBuf, String)>,
    /// Folder of its console socket; QEMU's user must own it.
    pub serial: PathBuf,
    /// Folder with `vmlinuz` and `initrd.gz`.
    pub image: PathBuf,
    /// Memory.
    pub memory_mib: u32,
}

impl Guest {
    /// The console's socket.
    pub fn console(&self) -> PathBuf {
        self.serial.join(&self.name)
    }

    /// libvirt's XML of it.
    pub fn xml(&self) -> String {
        let disks: String =
            self.disks.iter().map(|(target, path, format)| disk_xml(target, path, format)).collect();
        format!(
            "<domain type='qemu'>\n  <name>{name}</name>\n  <memory unit='MiB'>{memory}</memory>\n  <vcpu>1</vcpu>\n  \
             <os>\n    <type arch='x86_64' machine='q35'>hvm</type>\n    <kernel>{image}/vmlinuz</kernel>\n    \
             <initrd>{image}/initrd.gz</initrd>\n    <cmdline>console=ttyS0 quiet panic=-1</cmdline>\n  </os>\n  \
             <cpu mode='custom' match='exact'><model fallback='allow'>qemu64</model>\
             <feature policy='require' name='aes'/></cpu>\n  <features><acpi/></features>\n  \
             <on_poweroff>destroy</on_poweroff>\n  <on_crash>destroy</on_crash>\n  <devices>\n{disks}    \
             <serial type='unix'><source mode='bind' path='{console}'/><target port='0'/></serial>\n    \
             <controller type='usb' model='none'/>\n    <memballoon model='none'/>\n  </devices>\n</domain>\n",
            name = self.name,
            memory = self.memory_mib,
            image = self.image.display(),
            console = self.console().display(),
        )
    }
}

/// One virtio disk from a file.
pub fn disk_xml(target: &str, path: &Path, format: &str) -> String {
    format!(
        "    <disk type='file' device='disk'><driver name='qemu' type='{format}' cache='none' discard='unmap'/>\
         <source file='{}'/><target dev='{target}' bus='virtio'/><serial>VS-{target}</serial></disk>\n",
        path.display()
    )
}
