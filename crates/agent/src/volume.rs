//! A volume opened for use: locked, its header compared with the key record, its length enough.
//!
//! Path, record and key in; an open, locked file and its part of a process's setup out. The record says what the volume
//! must be, the header only confirms it. It reads no data and decides no epoch: the record was verified by whoever
//! has the key.

mod remote;

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use vmseal_keys::{Dek, key_check};
use vmseal_luks::{ClaimError, Header, HeaderFile, LuksError, OwnerBlock, OwnerError, VmsealToken, repair};
use vmseal_model::{
    control::{DiskSetup, ExportKind},
    id::{DiskId, HostId, VmId},
    record::{HeaderKind, KeyRecord, Subject},
    refusal::Code,
};

pub use self::remote::{open, token_of};
use crate::{
    lock::{Claim, LockError, claim_header, claim_soon},
    rbd::{RbdError, Served},
};

/// Why a volume is not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// The file cannot be opened or read.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory, device, pipe or symbolic link.
    #[error("{} is not a regular file", path.display())]
    NotRegular {
        /// Which.
        path: PathBuf,
    },
    /// It is an RBD image that cannot be had.
    #[error(transparent)]
    Rbd(#[from] RbdError),
    /// Somebody else has it.
    #[error("{} is {lock}", path.display())]
    Locked {
        /// Which.
        path: PathBuf,
        /// By whom, as far as the kernel tells.
        #[source]
        lock: LockError,
    },
    /// The LUKS2 header is damaged or refused.
    #[error("the header of {} cannot be used", path.display())]
    Header {
        /// Where it lies.
        path: PathBuf,
        /// What is wrong.
        source: LuksError,
    },
    /// The header is sound, and of something else.
    #[error("{}: its header has {what} {found}, its key record {expected}", path.display())]
    Mismatch {
        /// Where the header lies.
        path: PathBuf,
        /// Which value.
        what: &'static str,
        /// In the header.
        found: String,
        /// In the record.
        expected: String,
    },
    /// The key is not the volume's.
    #[error("{} was not made with the key of disk {disk}", path.display())]
    WrongKey {
        /// Where the header lies.
        path: PathBuf,
        /// Whose key it was.
        disk: DiskId,
    },
    /// Shorter than the record says.
    #[error("{} is truncated: it holds {stored} bytes of the disk, its key record says {expected}", path.display())]
    Truncated {
        /// Which.
        path: PathBuf,
        /// Bytes behind the header.
        stored: u64,
        /// Bytes that must be there.
        expected: u64,
    },
    /// The owner block cannot be read now.
    #[error("whose {} is cannot be read; nothing was done, try again", path.display())]
    OwnerUnread {
        /// Where the block lies.
        path: PathBuf,
        /// Why.
        source: OwnerError,
    },
    /// The owner block says nothing.
    #[error(
        "whose {} is cannot be known: make sure that no other host uses it, then have its owner block written anew by \
         `vmseal vm repair`", path.display()
    )]
    Owner {
        /// Where the block lies.
        path: PathBuf,
        /// Why.
        source: OwnerError,
    },
    /// It was given to another host.
    #[error("{} is on its way to another host", path.display())]
    Elsewhere {
        /// Where the block lies.
        path: PathBuf,
        /// To whom.
        source: ClaimError,
    },
    /// Another host had it while the guest of this one ran.
    #[error("the guest cannot go on with {}", path.display())]
    Since {
        /// Where the block lies.
        path: PathBuf,
        /// Who.
        source: ClaimError,
    },
    /// A record of a home, or one that says another kind of header than was given.
    #[error("the key record is not one of {}: {reason}", path.display())]
    OtherKind {
        /// The volume.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
}

impl VolumeError {
    /// The code of the refusal.
    pub fn code(&self) -> Code {
        match self {
            Self::Locked { lock: LockError::InUse { .. }, .. } | Self::Elsewhere { .. } => Code::VolumeInUse,
            Self::Since { .. } => Code::Conflict,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Code::NotFound,
            Self::NotRegular { .. } => Code::UnsupportedDisk,
            Self::Rbd(error) => error.code(),
            Self::Io { .. } | Self::Locked { .. } | Self::OwnerUnread { .. } => Code::Failed,
            _ => Code::Integrity,
        }
    }

    /// What to do next; empty where there is nothing to name.
    pub fn hint(&self) -> String {
        match self {
            Self::Rbd(error) => error.hint(),
            _ => String::new(),
        }
    }
}

/// A volume that is open and locked. The locks live with the descriptions, in whatever process they are passed to.
#[derive(Debug)]
pub struct OpenVolume {
    /// The data, and the header if that is attached; with an image behind a helper the socket where that is served.
    pub data: File,
    /// The header, if it is detached.
    pub header: Option<File>,
    /// How a process is to serve it.
    pub setup: DiskSetup,
    /// Bytes of the disk that are stored now; at least what the record says.
    pub stored_bytes: u64,
    /// The helper that has the image's lock, where it is one.
    pub remote: Option<Served>,
    /// The host that has it by [`OpenVolume::hold`].
    pub holder: Option<HostId>,
    /// Where the owner block lies, for messages.
    owner_path: PathBuf,
}

impl OpenVolume {
    /// Writes into the owner block that this host, if it has an id, holds the volume.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Owner`] or [`VolumeError::Elsewhere`]: the volume is on its way to another host, or may be; it must
    /// not be used. That the block cannot be written is no error: the lock decides.
    pub fn hold(&mut self, host: Option<HostId>) -> Result<(), VolumeError> {
        if self.setup.read_only {
            return Ok(());
        }
        let path = self.owner_path.clone();
        let block = self.owner()?.started_by(host);
        self.held(host, &block.map_err(|source| VolumeError::Elsewhere { path, source })?);
        Ok(())
    }

    /// The same for a guest that runs here already and whose disk process was lost: nobody had the lock in between.
    ///
    /// # Errors
    ///
    /// As [`OpenVolume::hold`], and [`VolumeError::Since`]: another host had the volume. It must not be used.
    pub fn hold_again(&mut self, host: Option<HostId>) -> Result<(), VolumeError> {
        if self.setup.read_only {
            return Ok(());
        }
        let path = self.owner_path.clone();
        let block = self.owner()?.gone_on_by(host);
        self.held(host, &block.map_err(|source| VolumeError::Since { path, source })?);
        Ok(())
    }

    fn held(&mut self, host: Option<HostId>, block: &OwnerBlock) {
        self.holder = host;
        if host.is_some()
            && let Err(error) = self.write_owner(block).and_then(|()| self.remember_owner(block))
        {
            tracing::warn!("the owner block of {} is not written: {error}", self.owner_path.display());
        }
    }

    /// Writes into the owner block that nobody holds it.
    ///
    /// # Errors
    ///
    /// As [`OpenVolume::owner`]. That the block cannot be written is no error.
    pub fn release(&self) -> Result<(), VolumeError> {
        let _ = self.write_owner(&self.owner()?.released());
        Ok(())
    }

    /// What the owner block says.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Owner`] if it is damaged in both copies.
    pub fn owner(&self) -> Result<OwnerBlock, VolumeError> {
        let unreadable = |error: io::Error| OwnerError::Unreadable { kind: error.kind() };
        let block = self.with_owner_file(|file| OwnerBlock::read(file)).map_err(unreadable);
        let block = block.and_then(|block| block);
        let path = self.owner_path.clone();
        block.map_err(|source| match source {
            OwnerError::Unreadable { .. } => VolumeError::OwnerUnread { path, source },
            source => VolumeError::Owner { path, source },
        })
    }

    fn write_owner(&self, block: &OwnerBlock) -> io::Result<()> {
        self.with_owner_file(|file| block.write(file))?
    }

    /// A helper that is started again makes sure that nobody else held it meanwhile.
    fn remember_owner(&self, block: &OwnerBlock) -> io::Result<()> {
        self.remote.as_ref().map_or(Ok(()), |served| served.remember_owner(&block.encode()))
    }

    /// Something with the owner block: through the helper, where there is one.
    fn with_owner_file<T>(&self, work: impl FnOnce(&dyn HeaderFile) -> T) -> io::Result<T> {
        match &self.remote {
            Some(served) => Ok(work(&served.channel()?)),
            None => Ok(work(&self.owner_file()?)),
        }
    }

    /// The file with the owner block, opened anew: whoever was handed [`OpenVolume::data`] may have switched O_DIRECT on
    /// for that description, and then only aligned memory may be read into or written from. Locks are of the old one.
    fn owner_file(&self) -> io::Result<File> {
        let file = self.header.as_ref().unwrap_or(&self.data);
        let write = !self.setup.read_only;
        OpenOptions::new().read(true).write(write).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
    }
}

/// Opens and locks a volume in a file and holds it against its record.
///
/// Order: file, lock, header against record, key, length. A header of which one copy is damaged is repaired from the
/// other, unless `read_only`. A read-only volume may be opened by others for reading too.
///
/// # Errors
///
/// [`VolumeError`]; nothing stays open or locked.
pub fn open_locked(
    source: &Path,
    header: Option<&Path>,
    record: &KeyRecord,
    dek: &Dek,
    target: &str,
    key_slot: u32,
    read_only: bool,
) -> Result<OpenVolume, VolumeError> {
    let subject = DiskSubject::of(record, source, header)?;
    let data = open_regular(source, !read_only)?;
    let locked = |path: &Path| {
        let path = path.to_owned();
        move |lock| VolumeError::Locked { path, lock }
    };
    // With a detached header byte 15 MiB of the data file is data; the range is locked there all the same.
    claim_soon(&data, if read_only { Claim::Reading } else { Claim::Volume }).map_err(locked(source))?;
    let header_file = match header {
        Some(path) => {
            let file = open_regular(path, !read_only)?;
            claim_header(&file, read_only).map_err(locked(path))?;
            Some(file)
        }
        None => None,
    };
    let (file, path) = (header_file.as_ref().unwrap_or(&data), header.unwrap_or(source));
    check_header(file, path, header.is_some(), &subject, dek, read_only)?;

    let len = length(&data, source)?;
    let (setup, stored_bytes) = subject
        .setup(record, len, (target, key_slot, read_only, header_file.is_some()))
        .map_err(|stored| {
            let (path, expected) = (source.to_owned(), record.state.stored_bytes);
            VolumeError::Truncated { path, stored, expected }
        })?;
    let owner_path = path.to_owned();
    Ok(OpenVolume { data, header: header_file, setup, stored_bytes, remote: None, holder: None, owner_path })
}

/// What a record says of its volume.
struct DiskSubject {
    vm: VmId,
    disk: DiskId,
    unit_bytes: u32,
    payload_offset: u64,
    key_check: [u8; 32],
}

impl DiskSubject {
    fn of(record: &KeyRecord, source: &Path, header: Option<&Path>) -> Result<Self, VolumeError> {
        let other = |reason| VolumeError::OtherKind { path: source.to_owned(), reason };
        let Subject::Disk { disk, header: kind, unit, payload_offset } = record.head.subject else {
            return Err(other("it is a home's"));
        };
        match (kind, header) {
            (HeaderKind::Attached, None) | (HeaderKind::Detached, Some(_)) => {}
            (HeaderKind::Detached, None) => return Err(other("it says the header is detached")),
            _ => return Err(other("it says the header is attached")),
        }
        let (vm, key_check) = (record.head.vm, record.head.key_check);
        Ok(Self { vm, disk, unit_bytes: unit.get(), payload_offset, key_check })
    }

    /// How a process is to serve a volume of so many bytes, and how many of the disk's are stored.
    ///
    /// # Errors
    ///
    /// How many are, if that is fewer than the record says.
    fn setup(
        &self,
        record: &KeyRecord,
        len: u64,
        (target, key_slot, read_only, detached_header): (&str, u32, bool, bool),
    ) -> Result<(DiskSetup, u64), u64> {
        let stored = len.saturating_sub(self.payload_offset);
        let (expected, presented) = (record.state.stored_bytes, record.state.presented_bytes);
        if stored < expected {
            return Err(stored);
        }
        let setup = DiskSetup {
            disk: self.disk,
            target: target.to_owned(),
            key_slot,
            key_check: hex(&self.key_check),
            unit_bytes: self.unit_bytes,
            payload_offset: self.payload_offset,
            detached_header,
            presented_bytes: presented,
            grows: presented > expected,
            read_only,
            discard: !read_only,
            export: ExportKind::default(),
            serial: String::new(),
        };
        // A whole number of units: what is more was never written by a worker.
        let stored_bytes = (stored - stored % u64::from(self.unit_bytes)).min(presented);
        Ok((setup, stored_bytes))
    }
}

fn check_header(
    file: &(impl HeaderFile + ?Sized),
    path: &Path,
    detached: bool,
    subject: &DiskSubject,
    dek: &Dek,
    read_only: bool,
) -> Result<(), VolumeError> {
    let refused = |source| VolumeError::Header { path: path.to_owned(), source };
    let header = Header::read(file, detached).map_err(refused)?;
    let mismatch = |what, found: String, expected: String| {
        if found == expected {
            Ok(())
        } else {
            Err(VolumeError::Mismatch { path: path.to_owned(), what, found, expected })
        }
    };
    mismatch("the disk id", header.uuid().to_string(), subject.disk.to_string())?;
    mismatch("data units of", header.unit_bytes().to_string(), subject.unit_bytes.to_string())?;
    mismatch("its data at byte", header.payload_offset().to_string(), subject.payload_offset.to_string())?;
    let checked = key_check(dek.payload(), subject.vm, subject.disk);
    if checked != subject.key_check || !header.digest_matches(dek) {
        return Err(VolumeError::WrongKey { path: path.to_owned(), disk: subject.disk });
    }
    if header.needs_repair() && !read_only {
        repair(file, detached).map_err(refused)?;
        tracing::warn!(path = %path.display(), "one copy of the LUKS2 header was damaged and is written anew");
    }
    Ok(())
}

/// The record in a volume's LUKS2 header, if there is one of that disk. A candidate: nothing of it is verified, and no
/// lock is taken.
pub fn token_record(source: &Path, header: Option<&Path>, disk: DiskId) -> Option<Vec<u8>> {
    let file = open_regular(header.unwrap_or(source), false).ok()?;
    record_in(&file, header.is_some(), disk)
}

fn record_in(file: &(impl HeaderFile + ?Sized), detached: bool, disk: DiskId) -> Option<Vec<u8>> {
    let found = Header::read(file, detached).ok().filter(|h| h.uuid() == disk)?;
    found.token()?.records.into_iter().find(|bytes| is_of(bytes, disk))
}

/// Writes a record into a volume's LUKS2 header in place of what was there of that disk, both copies, flushed and read
/// back. No lock is taken: whoever calls this holds the volume, or knows that this host does.
///
/// # Errors
///
/// [`VolumeError`]; at least one whole copy of the header, old or new, is there all the time.
pub fn write_token_record(
    source: &Path,
    header: Option<&Path>,
    disk: DiskId,
    record: &[u8],
) -> Result<(), VolumeError> {
    let path = header.unwrap_or(source);
    write_record(&open_regular(path, true)?, path, header.is_some(), disk, record)
}

fn write_record(
    file: &(impl HeaderFile + ?Sized),
    path: &Path,
    detached: bool,
    disk: DiskId,
    record: &[u8],
) -> Result<(), VolumeError> {
    let refused = |source| VolumeError::Header { path: path.to_owned(), source };
    let found = Header::read(file, detached).map_err(refused)?;
    if found.uuid() != disk {
        let (found, expected) = (found.uuid().to_string(), disk.to_string());
        return Err(VolumeError::Mismatch { path: path.to_owned(), what: "the disk id", found, expected });
    }
    let mut records = vec![record.to_vec()];
    let old = found.token().unwrap_or_default().records;
    records.extend(old.into_iter().filter(|bytes| !is_of(bytes, disk)));
    Header::write_token(file, detached, &VmsealToken { records }).map_err(refused)
}

fn is_of(bytes: &[u8], disk: DiskId) -> bool {
    KeyRecord::decode(bytes).is_ok_and(|record| record.head.disk() == disk)
}

/// Opens a regular file, never through a symbolic link of that name, never waiting for a pipe's other end.
pub(crate) fn open_regular(path: &Path, write: bool) -> Result<File, VolumeError> {
    let opened = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path);
    let io = |action| move |source| VolumeError::Io { action, path: path.to_owned(), source };
    let file = match opened {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ELOOP | libc::ENXIO | libc::EISDIR)) => {
            return Err(VolumeError::NotRegular { path: path.to_owned() });
        }
        other => other.map_err(io("open"))?,
    };
    let kind = file.metadata().map_err(io("look at"))?.file_type();
    if !kind.is_file() || kind.is_block_device() {
        return Err(VolumeError::NotRegular { path: path.to_owned() });
    }
    Ok(file)
}

fn length(file: &File, path: &Path) -> Result<u64, VolumeError> {
    let io = |source| VolumeError::Io { action: "look at", path: path.to_owned(), source };
    file.metadata().map(|m| m.len()).map_err(io)
}

/// The bytes of lower- or upper-case hexadecimal digits.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
    let digits = digits.filter(|d| d.len().is_multiple_of(2))?;
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests;
