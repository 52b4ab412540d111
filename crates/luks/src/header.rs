//! A header that has passed every check and the policy. There is no other way to have one.
//!
//! In goes a file; out comes a [`Header`], which says little: what a disk must look like is in its key record.

use vmseal_keys::Dek;
use vmseal_model::id::DiskId;

use crate::{
    describe::Description,
    error::{Defect, LuksError, quoted},
    json::Json,
    metadata::{MAX_TOKENS, Metadata, SegmentKind},
    policy::{self, Kind},
    rewrite,
    source::HeaderFile,
    token::VmsealToken,
};

/// An accepted LUKS2 header of a volume at rest.
#[derive(Debug, Clone)]
pub struct Header {
    pub(crate) metadata: Metadata,
    disk: DiskId,
    unit_bytes: u32,
    payload_offset: u64,
}

impl Header {
    /// Reads and judges the header of a file. Repairs nothing.
    ///
    /// # Errors
    ///
    /// [`LuksError::Refused`] for what the format allows and we do not; [`LuksError::Reencrypting`]; and as
    /// [`repair`](crate::repair).
    pub fn read(file: &(impl HeaderFile + ?Sized), detached: bool) -> Result<Self, LuksError> {
        Self::judge(rewrite::load(file, detached)?.metadata)
    }

    pub(crate) fn judge(metadata: Metadata) -> Result<Self, LuksError> {
        match policy::check(&metadata).map_err(LuksError::Refused)? {
            Kind::Plain => {}
            Kind::Reencrypting => return Err(LuksError::Reencrypting),
        }
        let uuid = metadata.binary.uuid();
        let disk = uuid.parse().map_err(|_| LuksError::Uuid { uuid: quoted(&uuid) })?;
        let segment = metadata.segments.get(&0);
        let Some((offset, SegmentKind::Crypt { sector_size, .. })) = segment.map(|s| (s.offset, &s.kind))
        else {
            return Err(LuksError::Refused(Defect::new("segments.0 is no crypt segment")));
        };
        let unit_bytes = u32::try_from(*sector_size)
            .map_err(|_| LuksError::Refused(Defect::new("segments.0.sector_size is too large")))?;
        Ok(Self { disk, unit_bytes, payload_offset: offset, metadata })
    }

    /// The header's UUID: the disk's id.
    pub fn uuid(&self) -> DiskId {
        self.disk
    }

    /// Bytes of a data unit.
    pub fn unit_bytes(&self) -> u32 {
        self.unit_bytes
    }

    /// Where data begins, in bytes.
    pub fn payload_offset(&self) -> u64 {
        self.payload_offset
    }

    /// The key records in it, if there are any; candidates only.
    pub fn token(&self) -> Option<VmsealToken> {
        VmsealToken::find(self.metadata.json.get("tokens")?)
    }

    /// Whether a copy is damaged or old and should be repaired.
    pub fn needs_repair(&self) -> bool {
        self.metadata.needs_repair
    }

    /// Whether this is the key the header was made for.
    pub fn digest_matches(&self, dek: &Dek) -> bool {
        self.key_matches(dek.data_key())
    }

    pub(crate) fn key_matches(&self, key: &[u8; 64]) -> bool {
        crate::digest::matches(&self.metadata, key)
    }

    /// What it says, for people.
    pub fn describe(&self) -> Description {
        Description::of(&self.metadata)
    }

    /// Replaces our token in both copies, the other metadata as it is; reads back.
    ///
    /// # Errors
    ///
    /// As [`Header::read`]; [`LuksError::Full`] and [`LuksError::Frozen`] before anything is written;
    /// [`LuksError::Io`] and [`LuksError::ReadBack`] after, with at least one whole copy, old or new, in the file.
    pub fn write_token(
        file: &(impl HeaderFile + ?Sized),
        detached: bool,
        token: &VmsealToken,
    ) -> Result<(), LuksError> {
        let loaded = rewrite::load(file, detached)?;
        policy::check(&loaded.metadata).map_err(LuksError::Refused)?;
        let mut json: Json = loaded.metadata.json.clone();
        let stored = json.object_mut("tokens").and_then(|tokens| token.store(tokens, MAX_TOKENS));
        if stored.is_none() {
            return Err(LuksError::Frozen(Defect::new("all its tokens are taken")));
        }
        rewrite::replace(file, &loaded, &json)
    }
}
