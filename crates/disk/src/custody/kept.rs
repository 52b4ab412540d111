//! One volume that changes hands: its lock, and its owner block as it is on the medium.

use std::{io, sync::Arc};

use vmseal_luks::{HeaderFile, OwnerBlock};
use vmseal_model::{control::Ownership, id::DiskId};

use super::CustodyError;
use crate::{
    lock,
    store::{FileStore, Store},
    volume::Volume,
};

/// A volume that is written, and where its owner block lies.
pub struct Kept {
    /// The disk.
    pub disk: DiskId,
    /// Its target, for messages.
    pub target: String,
    /// The volume.
    pub volume: Arc<Volume>,
    /// Its header, if that is another file.
    pub header: Option<FileStore>,
}

/// Where a volume's owner block lies.
struct Medium<'a>(&'a dyn Store);

impl HeaderFile for Medium<'_> {
    fn byte_len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn get(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let whole = self.0.read_at(at, out)? == out.len();
        if whole { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(at, bytes)
    }
    fn settle(&self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Kept {
    /// Without its helper a network store answers nobody, and an order would wait for ever.
    pub(super) fn reach(&self) -> Result<(), CustodyError> {
        let link = self.volume.store().link();
        if link.is_some_and(|link| !link.is_connected()) {
            return Err(CustodyError::NoHelper { target: self.target() });
        }
        Ok(())
    }

    fn medium(&self) -> Medium<'_> {
        match &self.header {
            Some(header) => Medium(header),
            None => Medium(self.volume.store()),
        }
    }

    pub(super) fn target(&self) -> String {
        self.target.clone()
    }

    /// Reads the block from the medium, not from what this host remembers of it.
    pub(super) fn block(&self) -> Result<OwnerBlock, CustodyError> {
        self.reach()?;
        let medium = self.medium();
        medium.0.forget_cached();
        OwnerBlock::read(&medium).map_err(|cause| CustodyError::Block { target: self.target(), cause })
    }

    pub(super) fn write(&self, block: &OwnerBlock) -> Result<Ownership, CustodyError> {
        self.reach()?;
        let written = block.write(&self.medium());
        written.map_err(|cause| CustodyError::Write { target: self.target(), cause })?;
        Ok(self.ownership(block))
    }

    pub(super) fn ownership(&self, block: &OwnerBlock) -> Ownership {
        let lock_of_helper = self.volume.store().link().is_some();
        Ownership { disk: self.disk, generation: block.generation, lock_of_helper }
    }

    pub(super) fn lock(&self) -> Result<(), CustodyError> {
        self.reach()?;
        let Some(data) = self.volume.store().file() else { return Ok(()) };
        let header = self.header.as_ref().and_then(|header| header.file());
        lock::take(data, header).map_err(|cause| CustodyError::Lock { target: self.target(), cause })
    }

    pub(super) fn unlock(&self) {
        if let Some(data) = self.volume.store().file() {
            lock::give_back(data, self.header.as_ref().and_then(|header| header.file()));
        }
    }

    /// Whether its lock keeps no other host out.
    pub(super) fn is_unarbitrated(&self) -> bool {
        let file = self.volume.store().file();
        file.is_some_and(|file| file.metadata().is_ok_and(|metadata| !metadata.is_file()))
    }
}
