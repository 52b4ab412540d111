//! A volume wherever it lies: in a file, or in an RBD image behind a helper.
//!
//! The location decides which. An image is locked by its helper; its header is held against the record through that, and
//! while we have it the record in it is brought up to date: nobody can write there once a disk process is served.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use vmseal_keys::Dek;
use vmseal_luks::{HEADER_BYTES, HeaderFile};
use vmseal_model::{id::DiskId, record::KeyRecord};

use super::{
    DiskSubject, OpenVolume, VolumeError, check_header, open_locked, record_in, token_record, write_record,
};
use crate::{
    config::AgentConfig,
    rbd::{Location, RbdError, Served, Tool, channel::Channel},
};

/// Bytes from the beginning of an image with both copies of a header's metadata, which is as much as is read of it.
const METADATA: u64 = 2 * vmseal_luks::METADATA_BYTES;

/// Opens and locks a volume and holds it against its record, as [`open_locked`] does.
///
/// # Errors
///
/// [`VolumeError`]; nothing stays open or locked.
#[allow(clippy::too_many_arguments)]
pub fn open(
    config: &AgentConfig,
    source: &Path,
    header: Option<&Path>,
    record: &KeyRecord,
    dek: &Dek,
    target: &str,
    key_slot: u32,
    read_only: bool,
) -> Result<OpenVolume, VolumeError> {
    let Some(location) = Location::of_path(source) else {
        return open_locked(source, header, record, dek, target, key_slot, read_only);
    };
    let subject = DiskSubject::of(record, source, header)?;
    if header.is_some() {
        let reason = "a volume on RBD has its header with it";
        return Err(VolumeError::OtherKind { path: source.to_owned(), reason });
    }
    let location = location?;
    let served = Served::open(&Tool::new(config)?, &location, &subject.disk.to_string())?;
    let io = |source| RbdError::Io { action: "read the header", image: location.name(), source };
    let channel = served.channel().map_err(io)?;
    check_header(&channel, source, false, &subject, dek, read_only)?;
    if !read_only {
        update_record(&channel, source, &subject, record)?;
    }
    let (setup, stored_bytes) =
        subject.setup(record, channel.bytes(), (target, key_slot, read_only, false)).map_err(|stored| {
            let (path, expected) = (source.to_owned(), record.state.stored_bytes);
            VolumeError::Truncated { path, stored, expected }
        })?;
    drop(channel);
    let socket =
        served.listener().ok_or(io::ErrorKind::NotConnected.into()).and_then(|l| l.try_clone_to_owned());
    let data = File::from(socket.map_err(io)?);
    let owner_path = PathBuf::from(served.location().to_string());
    Ok(OpenVolume { data, header: None, setup, stored_bytes, remote: Some(served), holder: None, owner_path })
}

/// Writes the record that is used into the header where another lies, unless that one is newer: then the agent's store was
/// put back from a backup, and only what verified was used. It is left, as in files.
fn update_record(
    channel: &Channel,
    source: &Path,
    subject: &DiskSubject,
    record: &KeyRecord,
) -> Result<(), VolumeError> {
    let there = record_in(channel, false, subject.disk);
    let epoch =
        there.as_deref().and_then(|there| KeyRecord::decode(there).ok()).map(|there| there.state.epoch);
    if there.is_some_and(|there| there == record.encode()) {
        return Ok(());
    }
    if epoch.is_some_and(|epoch| epoch > record.state.epoch) {
        tracing::warn!(disk = %subject.disk, "the record in its LUKS2 header is newer than the one that is used");
        return Ok(());
    }
    write_record(channel, source, false, subject.disk, &record.encode())?;
    tracing::info!(disk = %subject.disk, "the record in a LUKS2 header was repaired");
    Ok(())
}

/// The record in a volume's LUKS2 header, as [`token_record`] gives it. Of an image it is read as a client of its own,
/// whoever has the lock.
pub fn token_of(config: &AgentConfig, source: &Path, header: Option<&Path>, disk: DiskId) -> Option<Vec<u8>> {
    let location = match Location::of_path(source) {
        None => return token_record(source, header, disk),
        Some(location) => location.ok()?,
    };
    let read = Tool::new(config).and_then(|tool| tool.read(&location, 0, METADATA));
    let bytes =
        read.inspect_err(|error| tracing::warn!("the header of {source:?} is not read: {error}")).ok()?;
    record_in(&Beginning(bytes), false, disk)
}

/// The beginning of a volume, to be read.
struct Beginning(Vec<u8>);

impl HeaderFile for Beginning {
    fn byte_len(&self) -> io::Result<u64> {
        // What follows is there, and not looked at.
        Ok(HEADER_BYTES)
    }

    fn get(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let there = self.0.get(at..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn put(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}
