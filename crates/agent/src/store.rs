//! The agent's own copies of key records: one file a VM, `<state dir>/records/<vm id>.json`. Format:
//! `docs/formats/record-store.md`.
//!
//! Records and bindings in, durable files out. An answer is given only after the bytes, the name and the directory are on
//! the medium; a failing fsync is an error and what it was about counts as not written. Nothing is verified here but
//! that a file is as it was written. Epochs never go down: what lies here is also the lowest epoch accepted at a start.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vmseal_model::{
    class::DiskClass,
    id::{DiskId, DomainUuid, VmId},
    record::MAX_RECORD_LEN,
    state::InnerFormat,
};

/// Version of the files.
const VERSION: u32 = 1;
/// Most bytes of a file that are read.
const MAX_FILE: u64 = 64 << 20;

/// A VM's records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredVm {
    /// The VM.
    pub vm: VmId,
    /// The libvirt UUID it is bound to.
    pub domain: DomainUuid,
    /// Its disks, retired ones too, in the order they came.
    pub disks: Vec<StoredDisk>,
}

/// One disk's record and what is needed to find its volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredDisk {
    /// Name in the guest.
    pub target: String,
    /// The disk.
    pub disk: DiskId,
    /// Path of the volume.
    pub source: String,
    /// Path of a detached header.
    pub header: Option<String>,
    /// What lies inside.
    pub format: InnerFormat,
    /// How it is presented.
    pub class: DiskClass,
    /// The key record, encoded.
    #[serde(serialize_with = "to_base64", deserialize_with = "from_base64")]
    pub record: Vec<u8>,
    /// Its epoch.
    pub epoch: u64,
    /// Accepted without a floor to hold it against.
    pub epoch_unverified: bool,
    /// The disk is no longer encrypted, or never came to be; the record is kept for what may still lie elsewhere.
    pub retired: bool,
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file or directory.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not as it was written.
    #[error(
        "the record file {} is damaged ({reason}); its VM starts from the copies in the LUKS2 headers of its disks, in \
         the domain's metadata and on the server; do not delete the file before that",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Going back is not possible.
    #[error("disk {disk} has epoch {have} here; a record with epoch {given} is older and is not taken")]
    EpochTooOld {
        /// The disk.
        disk: DiskId,
        /// What is here.
        have: u64,
        /// What was to be put.
        given: u64,
    },
    /// A disk belongs to one VM for ever.
    #[error("disk {disk} belongs to VM {owner}, not to VM {vm}")]
    OtherVm {
        /// The disk.
        disk: DiskId,
        /// Whose it is.
        owner: VmId,
        /// Who was to get it.
        vm: VmId,
    },
    /// A libvirt UUID stands for one VM.
    #[error("libvirt's domain {domain} is bound to VM {owner}, not to VM {vm}; see: vmseal vm adopt")]
    OtherDomain {
        /// The domain.
        domain: DomainUuid,
        /// Whose it is.
        owner: VmId,
        /// Who was to get it.
        vm: VmId,
    },
    /// Nothing there.
    #[error("the agent's store has no disk {disk} of VM {vm}")]
    NoDisk {
        /// The VM.
        vm: VmId,
        /// The disk.
        disk: DiskId,
    },
}

/// The store. One per state directory and process.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    vms: Mutex<BTreeMap<VmId, StoredVm>>,
    damaged: Vec<StoreError>,
}

impl Store {
    /// Opens the store under `state_dir`, makes it if it is not there. A damaged file does not keep the others from being
    /// read: see [`Store::damaged`].
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] if the directory cannot be made or read.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let dir = state_dir.join("records");
        let io = |action| move |source| StoreError::Io { action, path: state_dir.join("records"), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io("make"))?;
        let mut store = Self { dir, vms: Mutex::default(), damaged: Vec::new() };
        for entry in fs::read_dir(&store.dir).map_err(io("list"))? {
            let path = entry.map_err(io("list"))?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("json") => match read(&path) {
                    Ok(vm) => {
                        store.lock().insert(vm.vm, vm);
                    }
                    Err(error) => store.damaged.push(error),
                },
                // What a crash left of a write that was never answered.
                Some("tmp") => fs::remove_file(&path).map_err(io("tidy"))?,
                _ => {}
            }
        }
        Ok(store)
    }

    /// Files that could not be read at [`Store::open`]; each error names one and what to do.
    pub fn damaged(&self) -> &[StoreError] {
        &self.damaged
    }

    /// The VM a libvirt UUID is bound to.
    pub fn vm_of_domain(&self, domain: DomainUuid) -> Option<VmId> {
        self.lock().values().find(|vm| vm.domain == domain).map(|vm| vm.vm)
    }

    /// The libvirt UUID a VM is bound to.
    pub fn domain_of_vm(&self, vm: VmId) -> Option<DomainUuid> {
        self.lock().get(&vm).map(|vm| vm.domain)
    }

    /// A VM.
    pub fn vm(&self, vm: VmId) -> Option<StoredVm> {
        self.lock().get(&vm).cloned()
    }

    /// All VMs.
    pub fn vms(&self) -> Vec<StoredVm> {
        self.lock().values().cloned().collect()
    }

    /// A disk and whose it is; retired ones too.
    pub fn disk(&self, disk: DiskId) -> Option<(VmId, StoredDisk)> {
        self.lock()
            .values()
            .find_map(|vm| vm.disks.iter().find(|d| d.disk == disk).map(|found| (vm.vm, found.clone())))
    }

    /// Binds a VM to a libvirt UUID, durably; also the first time it is heard of.
    ///
    /// # Errors
    ///
    /// [`StoreError::OtherDomain`] if the UUID stands for another VM; [`StoreError::Io`].
    pub fn bind(&self, vm: VmId, domain: DomainUuid) -> Result<(), StoreError> {
        self.change(vm, domain, |_| Ok(()))
    }

    /// Puts a disk, new or in place of what was there, durably.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; the store is as before, as far as anybody can know after a failed fsync.
    pub fn put_disk(&self, vm: VmId, domain: DomainUuid, disk: StoredDisk) -> Result<(), StoreError> {
        if let Some((owner, _)) = self.disk(disk.disk).filter(|(owner, _)| *owner != vm) {
            return Err(StoreError::OtherVm { disk: disk.disk, owner, vm });
        }
        self.change(vm, domain, |stored| {
            match stored.disks.iter_mut().find(|d| d.disk == disk.disk) {
                Some(old) if old.epoch > disk.epoch => {
                    return Err(StoreError::EpochTooOld {
                        disk: disk.disk,
                        have: old.epoch,
                        given: disk.epoch,
                    });
                }
                Some(old) => *old = disk,
                None => stored.disks.push(disk),
            }
            Ok(())
        })
    }

    /// Marks a disk retired, durably. Its record stays.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoDisk`], [`StoreError::Io`].
    pub fn retire_disk(&self, vm: VmId, disk: DiskId) -> Result<(), StoreError> {
        let domain = self.domain_of_vm(vm).ok_or(StoreError::NoDisk { vm, disk })?;
        self.change(vm, domain, |stored| {
            let found = stored.disks.iter_mut().find(|d| d.disk == disk);
            found.ok_or(StoreError::NoDisk { vm, disk })?.retired = true;
            Ok(())
        })
    }

    fn change(
        &self,
        vm: VmId,
        domain: DomainUuid,
        edit: impl FnOnce(&mut StoredVm) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut vms = self.lock();
        if let Some(other) = vms.values().find(|v| v.domain == domain && v.vm != vm) {
            return Err(StoreError::OtherDomain { domain, owner: other.vm, vm });
        }
        let old = vms.get(&vm);
        let mut new = old.cloned().unwrap_or(StoredVm { vm, domain, disks: Vec::new() });
        new.domain = domain;
        edit(&mut new)?;
        if old != Some(&new) {
            write(&self.dir, &new)?;
            vms.insert(vm, new);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, StoredVm>> {
        // A panic elsewhere cannot leave it half changed: one insert is the only change.
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file: the checksum is over the compact JSON of `vm`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredFile {
    version: u32,
    sha256: String,
    vm: StoredVm,
}

fn checksum(vm: &StoredVm) -> String {
    let bytes = serde_json::to_vec(vm).expect("strings, numbers and lists always serialise");
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes);
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

fn read(path: &Path) -> Result<StoredVm, StoreError> {
    let damaged = |reason: String| StoreError::Damaged { path: path.to_owned(), reason };
    let io = |source| StoreError::Io { action: "read", path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.len() > MAX_FILE {
        return Err(damaged("it is too long".to_owned()));
    }
    let bytes = fs::read(path).map_err(io)?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    let version = value.get("version").and_then(serde_json::Value::as_u64);
    if version != Some(VERSION.into()) {
        let found = version.map_or("none".to_owned(), |v| v.to_string());
        return Err(damaged(format!("its version is {found}, this program reads {VERSION}")));
    }
    let stored: StoredFile = serde_json::from_value(value).map_err(|e| damaged(e.to_string()))?;
    if stored.sha256 != checksum(&stored.vm) {
        return Err(damaged("its checksum does not match".to_owned()));
    }
    if path.file_stem().and_then(|s| s.to_str()) != Some(&stored.vm.vm.to_string()) {
        return Err(damaged(format!("it holds VM {}", stored.vm.vm)));
    }
    Ok(stored.vm)
}

fn write(dir: &Path, vm: &StoredVm) -> Result<(), StoreError> {
    let path = dir.join(format!("{}.json", vm.vm));
    let tmp = dir.join(format!("{}.tmp", vm.vm));
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| StoreError::Io { action, path, source }
    };
    // A damaged file is somebody's last copy, perhaps; it makes way, it is not overwritten.
    if path.exists() && read(&path).is_err() {
        fs::rename(&path, dir.join(format!("{}.json.damaged", vm.vm))).map_err(io("put aside", &path))?;
    }
    let file = StoredFile { version: VERSION, sha256: checksum(vm), vm: vm.clone() };
    let bytes = serde_json::to_vec_pretty(&file).expect("strings, numbers and lists always serialise");
    let mut out = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&tmp)
        .map_err(io("write", &tmp))?;
    out.write_all(&bytes).map_err(io("write", &tmp))?;
    out.sync_all().map_err(io("flush", &tmp))?;
    fs::rename(&tmp, &path).map_err(io("replace", &path))?;
    File::open(dir).and_then(|d| d.sync_all()).map_err(io("flush", dir))
}

fn to_base64<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(&base64::display::Base64Display::new(bytes, &STANDARD))
}

fn from_base64<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
    let bytes = STANDARD.decode(String::deserialize(d)?).map_err(serde::de::Error::custom)?;
    if bytes.len() > MAX_RECORD_LEN {
        return Err(serde::de::Error::custom("a record is too long"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
