//! From a setup frame and its descriptors to exports that can be served. Nothing is trusted: every count, size, flag
//! and key is checked before the first byte of a volume is touched.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::Arc,
};

use vmseal_keys::{Dek, SecretError, SecretShare, key_check};
use vmseal_model::{
    control::{CONTROL_VERSION, DiskSetup, KEY_SLOT_BYTES, OLDEST_CONTROL_VERSION, Phase, Setup},
    id::{DiskId, DomainUuid, VmId},
};
use vmseal_xts::{Cipher, XtsError};

use crate::{
    custody::{Custody, Kept},
    descriptors::is_unix_listener,
    export::Export,
    latch::{FlushLatch, SharedPage},
    peer::PeerPolicy,
    remote::RemoteStore,
    store::{FileStore, Store, StoreError},
    volume::{Layout, Volume, VolumeError},
};

/// More disks than their descriptors fit into one frame are not possible; this bounds key slots too.
pub const MAX_DISKS: usize = 124;
/// XTS under one key: 2^44 blocks of 16 bytes (DESIGN §4).
pub(crate) const MAX_PRESENTED: u64 = 16 << 44;

/// Why a setup cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// Made by another release.
    #[error(
        "setup has version {found}, this vmseal-disk speaks {OLDEST_CONTROL_VERSION} to {CONTROL_VERSION}: restart the agent after an upgrade"
    )]
    Version {
        /// What it has.
        found: u32,
    },
    /// Something is missing, superfluous or impossible.
    #[error("setup is wrong: {0}")]
    Malformed(&'static str),
    /// Descriptors do not match the disks.
    #[error("setup came with {found} descriptors instead of {expected}")]
    Descriptors {
        /// How many came.
        found: usize,
        /// How many its disks need.
        expected: usize,
    },
    /// A disk's values are impossible.
    #[error("disk {target} ({disk}): {defect}")]
    Disk {
        /// Its target.
        target: String,
        /// Which.
        disk: DiskId,
        /// What is wrong.
        defect: DiskDefect,
    },
    /// The key memory cannot be used.
    #[error("key memory cannot be used")]
    KeyMemory(#[source] SecretError),
    /// The keeper's page cannot be used.
    #[error("the keeper's page cannot be used")]
    SharedPage(#[source] io::Error),
}

/// What is wrong with one disk of a setup.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskDefect {
    /// A value out of its range.
    #[error("{0}")]
    Value(&'static str),
    /// The key in the slot is not the one of the record.
    #[error("the key does not match the record's key check; nothing was read or written")]
    KeyCheck,
    /// The key cannot be used.
    #[error("the key cannot be used: {0}")]
    Key(XtsError),
    /// The data or header descriptor cannot be used.
    #[error("the volume {0}")]
    Store(StoreError),
    /// The header's descriptor cannot be used.
    #[error("the detached header {0}")]
    Header(StoreError),
    /// The volume is too short, or cannot be measured.
    #[error("{0}")]
    Volume(VolumeError),
}

/// A setup that can be served.
pub struct Prepared {
    /// The VM.
    pub vm: VmId,
    /// Its libvirt UUID.
    pub domain: DomainUuid,
    /// Where orders come from.
    pub control: UnixListener,
    /// Who may use the disks.
    pub policy: PeerPolicy,
    /// The disks and where their clients come from.
    pub exports: Vec<(Export, UnixListener)>,
    /// Whose the volumes are that are written. Detached headers are kept open here, for the locks on them.
    pub custody: Arc<Custody>,
    /// Other detached headers.
    pub headers: Vec<OwnedFd>,
    /// What workers of this keeper tell the next one.
    pub page: Arc<SharedPage>,
}

/// Checks a setup and makes of it what is served. `owner` is the uid that set this process up.
///
/// # Errors
///
/// [`SetupError`]. Trying again with the same setup does not help.
pub fn prepare(setup: &Setup, mut fds: Vec<OwnedFd>, owner: u32) -> Result<Prepared, SetupError> {
    if !(OLDEST_CONTROL_VERSION..=CONTROL_VERSION).contains(&setup.version) {
        return Err(SetupError::Version { found: setup.version });
    }
    if setup.waiting && setup.host.is_none() {
        return Err(SetupError::Malformed(
            "it waits for volumes of another host and does not say which host this is",
        ));
    }
    if setup.disks.is_empty() || setup.disks.len() > MAX_DISKS {
        return Err(SetupError::Malformed("it names no disk, or too many"));
    }
    let expected = 4 + setup.disks.iter().map(|disk| 2 + usize::from(disk.detached_header)).sum::<usize>();
    if fds.len() != expected {
        return Err(SetupError::Descriptors { found: fds.len(), expected });
    }
    // The keeper's own, behind everything the agent gave it.
    let page = fds.pop().ok_or(SetupError::Descriptors { found: 0, expected })?;
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or(SetupError::Descriptors { found: 0, expected });
    let (keys, control, directory) = (next()?, listener(next()?)?, next()?);
    let policy = PeerPolicy::new(directory, &setup.pid_file, owner)
        .ok_or(SetupError::Malformed("the pid file's name is not a plain file name"))?;
    let keys = KeyMemory::map(keys, &setup.disks)?;
    let page = SharedPage::map(page.as_fd()).map_err(SetupError::SharedPage)?;
    let phase = page.phase().unwrap_or(if setup.waiting { Phase::Waiting } else { Phase::Serving });
    let away = !matches!(phase, Phase::Serving | Phase::Drained);
    let (mut exports, mut kept, mut headers) = (Vec::new(), Vec::new(), Vec::new());
    for (at, disk) in setup.disks.iter().enumerate() {
        // A worker before this one may have made it larger.
        let presented_bytes = page.presented(at).unwrap_or(0).max(disk.presented_bytes);
        let disk = &DiskSetup { presented_bytes, ..disk.clone() };
        if setup.disks.iter().take(at).any(|other| other.disk == disk.disk) {
            return Err(defect(disk)(DiskDefect::Value("it is named twice")));
        }
        let data = next()?;
        let mut header = if disk.detached_header { Some(next()?) } else { None };
        let listener = listener(next()?)?;
        let latch = FlushLatch::shared(page.clone(), at);
        let volume =
            open_volume(disk, setup, &keys, data, (owner, away)).map_err(defect(disk))?.latched(latch);
        let export =
            Export::new(disk.disk, disk.target.clone(), disk.export, volume).with_serial(&disk.serial);
        if !disk.read_only {
            // Whoever has no host writes no owner block, and may pass anything for a header.
            let header = header.take_if(|_| setup.host.is_some()).map(File::from);
            let header = header.map(|file| FileStore::new(file, false)).transpose();
            let header = header.map_err(|error| defect(disk)(DiskDefect::Header(error)))?;
            let (target, volume) = (disk.target.clone(), export.volume().clone());
            kept.push(Kept { disk: disk.disk, target, volume, header });
        }
        headers.extend(header);
        exports.push((export, listener));
    }
    let custody = Custody::new(setup.host, setup.waiting, page.clone(), kept);
    Ok(Prepared { vm: setup.vm, domain: setup.domain, control, policy, exports, custody, headers, page })
}

fn defect(disk: &DiskSetup) -> impl Fn(DiskDefect) -> SetupError + use<> {
    let (target, disk) = (disk.target.clone(), disk.disk);
    move |defect| SetupError::Disk { target: target.clone(), disk, defect }
}

/// A descriptor as a listening socket that blocks.
pub(crate) fn listener(fd: OwnedFd) -> Result<UnixListener, SetupError> {
    if !is_unix_listener(&fd.as_fd()) {
        return Err(SetupError::Malformed("a descriptor that should be a listening unix socket is not"));
    }
    let listener = UnixListener::from(fd);
    listener
        .set_nonblocking(false)
        .map_err(|_| SetupError::Malformed("a listening socket cannot be made blocking"))?;
    Ok(listener)
}

fn open_volume(
    disk: &DiskSetup,
    setup: &Setup,
    keys: &KeyMemory,
    data: OwnedFd,
    (owner, away): (u32, bool),
) -> Result<Volume, DiskDefect> {
    let layout = layout_of(disk)?;
    let cipher =
        Cipher::new(keys.dek(disk, setup.vm)?.data_key(), layout.unit as usize).map_err(DiskDefect::Key)?;
    if RemoteStore::is_meant_by(&data) {
        if layout.grows {
            return Err(DiskDefect::Value("a volume behind a store helper cannot grow"));
        }
        // Where another host has the lock no helper can have it.
        let bytes = away.then_some(layout.payload_offset + layout.presented);
        let store = RemoteStore::new(data, owner, bytes).map_err(|error| DiskDefect::Store(error.into()))?;
        return Volume::new(Box::new(store), cipher, layout).map_err(DiskDefect::Volume);
    }
    let mut store = FileStore::new(File::from(data), disk.read_only).map_err(DiskDefect::Store)?;
    // The description is this VM's alone (its keeper, its workers): nobody else's I/O is changed by it.
    store.go_direct(layout.unit);
    let store: Box<dyn Store> = Box::new(store);
    Volume::new(store, cipher, layout).map_err(DiskDefect::Volume)
}

/// A disk's layout, its values checked against one another.
pub(crate) fn layout_of(disk: &DiskSetup) -> Result<Layout, DiskDefect> {
    let unit = u64::from(disk.unit_bytes);
    if unit != 512 && unit != 4096 {
        return Err(DiskDefect::Value("the data unit is neither 512 nor 4096 bytes"));
    }
    if !disk.payload_offset.is_multiple_of(4096) || disk.payload_offset > 1 << 40 {
        return Err(DiskDefect::Value("the payload offset is impossible"));
    }
    if disk.presented_bytes == 0 || !disk.presented_bytes.is_multiple_of(unit) {
        return Err(DiskDefect::Value("the presented size is not a number of data units"));
    }
    if disk.presented_bytes > MAX_PRESENTED {
        return Err(DiskDefect::Value("the disk has more than 2^44 cipher blocks, too many for one key"));
    }
    Ok(Layout {
        unit,
        payload_offset: disk.payload_offset,
        presented: disk.presented_bytes,
        grows: disk.grows,
        read_only: disk.read_only,
        discard: disk.discard,
    })
}

/// The key memory, mapped.
pub(crate) struct KeyMemory(SecretShare);

impl KeyMemory {
    /// Maps as many slots as the disks name.
    pub(crate) fn map(fd: OwnedFd, disks: &[DiskSetup]) -> Result<Self, SetupError> {
        let slots = disks.iter().map(|disk| disk.key_slot as usize + 1).max().unwrap_or(0);
        if slots > MAX_DISKS {
            return Err(SetupError::Malformed("a key slot's number is too large"));
        }
        SecretShare::from_fd(fd, slots * KEY_SLOT_BYTES).map(Self).map_err(SetupError::KeyMemory)
    }

    /// The key of a disk, once its key check says that it is the one.
    pub(crate) fn dek(&self, disk: &DiskSetup, vm: VmId) -> Result<Dek, DiskDefect> {
        let expected = parse_hex(&disk.key_check)
            .ok_or(DiskDefect::Value("the key check is not 64 hexadecimal digits"))?;
        let start = disk.key_slot as usize * KEY_SLOT_BYTES;
        let payload = self
            .0
            .as_slice()
            .get(start..start + Dek::LEN)
            .ok_or(DiskDefect::Value("the key slot is outside the key memory"))?;
        if key_check(payload, vm, disk.disk) != expected {
            return Err(DiskDefect::KeyCheck);
        }
        Dek::from_payload_slice(payload).ok_or(DiskDefect::Value("the key slot is too short"))
    }
}

/// 64 lowercase hexadecimal digits.
fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use vmseal_model::control::ExportKind;

    use super::*;

    fn disk() -> DiskSetup {
        DiskSetup {
            disk: DiskId::from_random([1; 16]),
            target: "vda".into(),
            key_slot: 0,
            key_check: "00".repeat(32),
            unit_bytes: 512,
            payload_offset: 16 << 20,
            detached_header: false,
            presented_bytes: 1 << 20,
            grows: false,
            read_only: false,
            discard: false,
            export: ExportKind::default(),
            serial: String::new(),
        }
    }

    #[test]
    fn impossible_layouts_are_refused() {
        assert!(layout_of(&disk()).is_ok());
        let changes: [fn(&mut DiskSetup); 6] = [
            |disk| disk.unit_bytes = 1024,
            |disk| disk.payload_offset = 100,
            |disk| disk.payload_offset = u64::MAX - 4095,
            |disk| disk.presented_bytes = 0,
            |disk| disk.presented_bytes = 1000,
            |disk| disk.presented_bytes = MAX_PRESENTED + 512,
        ];
        for change in changes {
            let mut disk = disk();
            change(&mut disk);
            assert!(layout_of(&disk).is_err(), "{disk:?}");
        }
    }

    #[test]
    fn key_is_had_only_with_its_key_check() {
        let vm = VmId::from_random([2; 16]);
        let mut disk = DiskSetup { key_slot: 1, ..disk() };
        let dek = Dek::generate().unwrap();
        let mut share = SecretShare::create(2 * KEY_SLOT_BYTES).unwrap();
        share.as_mut_slice()[KEY_SLOT_BYTES..][..96].copy_from_slice(dek.payload());
        let map =
            |disk: &DiskSetup| KeyMemory::map(share.try_clone_fd().unwrap(), std::slice::from_ref(disk));
        let check = key_check(dek.payload(), vm, disk.disk);
        disk.key_check = check.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(map(&disk).unwrap().dek(&disk, vm).unwrap().payload(), dek.payload());
        let other_vm = VmId::from_random([3; 16]);
        assert!(matches!(map(&disk).unwrap().dek(&disk, other_vm), Err(DiskDefect::KeyCheck)));
        let other_slot = DiskSetup { key_slot: 0, ..disk.clone() };
        assert!(matches!(map(&other_slot).unwrap().dek(&other_slot, vm), Err(DiskDefect::KeyCheck)));
        let outside = DiskSetup { key_slot: 9999, ..disk.clone() };
        assert!(map(&outside).is_err());
        let upper = DiskSetup { key_check: disk.key_check.to_uppercase(), ..disk };
        assert!(map(&upper).unwrap().dek(&upper, vm).is_err());
    }
}
