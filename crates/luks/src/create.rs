//! Makes a new header: two copies of the metadata, no keyslots, our token.
//!
//! In go the disk's key, its id, the geometry and the key records; out come bytes to write at the start of the file. It
//! writes nothing itself.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Number;
use vmseal_keys::{Dek, random_bytes};
use vmseal_model::id::DiskId;

use crate::{
    HEADER_BYTES, KEYSLOTS_BYTES, METADATA_BYTES,
    binary_header::{BINARY_HEADER_LEN, BinaryHeader, NewBinaryHeader, Place},
    digest,
    error::LuksError,
    json::Json,
    policy::CIPHER,
    token::VmsealToken,
};

/// Where the data is and how it is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a data unit: 512 or 4096.
    pub unit_bytes: u32,
    /// Where data begins: 16 MiB with an attached header, 0 with a detached one.
    pub payload_offset: u64,
}

impl Geometry {
    /// With the header in the volume itself.
    pub const fn attached(unit_bytes: u32) -> Self {
        Self { unit_bytes, payload_offset: HEADER_BYTES }
    }

    /// With the header in a file of its own.
    pub const fn detached(unit_bytes: u32) -> Self {
        Self { unit_bytes, payload_offset: 0 }
    }

    fn check(&self) -> Result<(), LuksError> {
        let reason = if !matches!(self.unit_bytes, 512 | 4096) {
            "units have 512 or 4096 bytes"
        } else if self.payload_offset != 0 && self.payload_offset < HEADER_BYTES {
            "data begins at 0 or not before 16 MiB"
        } else if !self.payload_offset.is_multiple_of(4096) {
            "data begins at a multiple of 4096 bytes"
        } else {
            return Ok(());
        };
        Err(LuksError::Geometry { unit_bytes: self.unit_bytes, payload_offset: self.payload_offset, reason })
    }
}

/// The random bytes in a header.
#[derive(Debug, Clone)]
pub struct Salts {
    /// Of the two copies, so that they differ.
    pub copies: [[u8; 64]; 2],
    /// Of the digest.
    pub digest: [u8; 32],
}

impl Salts {
    fn random() -> Result<Self, LuksError> {
        Ok(Self { copies: [random_bytes()?, random_bytes()?], digest: random_bytes()? })
    }
}

/// A new header for a disk.
///
/// The result is both copies, 128 KiB; what lies between them and the payload is to be zero.
///
/// # Errors
///
/// [`LuksError::Geometry`], [`LuksError::Full`] when the records do not fit, [`LuksError::Secret`] without randomness.
pub fn create(
    dek: &Dek,
    disk: DiskId,
    geometry: &Geometry,
    token: &VmsealToken,
) -> Result<Vec<u8>, LuksError> {
    create_with(dek, disk, geometry, token, &Salts::random()?)
}

/// As [`create`], with given salts: the same input gives the same bytes.
///
/// # Errors
///
/// As [`create`], but for randomness.
pub fn create_with(
    dek: &Dek,
    disk: DiskId,
    geometry: &Geometry,
    token: &VmsealToken,
    salts: &Salts,
) -> Result<Vec<u8>, LuksError> {
    geometry.check()?;
    let digest = digest::compute(dek.data_key(), &salts.digest, digest::ITERATIONS);
    let json = metadata(geometry, token, &salts.digest, &digest);
    let area = json_area(&json, METADATA_BYTES)?;
    let uuid = disk.to_string();
    let copy = |place, salt: &[u8; 64]| {
        let new = NewBinaryHeader {
            place,
            copy_bytes: METADATA_BYTES,
            sequence: 1,
            salt,
            uuid: &uuid,
            subsystem: "",
        };
        BinaryHeader::new(&new).sealed(&area)
    };
    let primary = copy(Place::Primary, &salts.copies[0]);
    let secondary = copy(Place::Secondary(METADATA_BYTES), &salts.copies[1]);
    Ok([primary, secondary].concat())
}

/// The JSON, filled up with NUL to the area of a copy of `copy_bytes`.
pub(crate) fn json_area(json: &Json, copy_bytes: u64) -> Result<Vec<u8>, LuksError> {
    let mut area = json.to_bytes();
    let limit = copy_bytes as usize - BINARY_HEADER_LEN;
    // At least one NUL ends the JSON.
    if area.len() >= limit {
        return Err(LuksError::Full { bytes: area.len(), limit: limit - 1 });
    }
    area.resize(limit, 0);
    Ok(area)
}

fn metadata(geometry: &Geometry, token: &VmsealToken, salt: &[u8], digest: &[u8]) -> Json {
    let number = |n: u64| Json::Number(Number::from(n));
    let decimal = |n: u64| Json::text(n.to_string());
    let segment = Json::object([
        ("type", Json::text("crypt")),
        ("offset", decimal(geometry.payload_offset)),
        ("size", Json::text("dynamic")),
        ("iv_tweak", Json::text("0")),
        ("encryption", Json::text(CIPHER)),
        ("sector_size", number(geometry.unit_bytes.into())),
    ]);
    let digest = Json::object([
        ("type", Json::text("pbkdf2")),
        ("keyslots", Json::List(Vec::new())),
        ("segments", Json::texts(["0"])),
        ("hash", Json::text("sha256")),
        ("iterations", number(digest::ITERATIONS.into())),
        ("salt", Json::text(STANDARD.encode(salt))),
        ("digest", Json::text(STANDARD.encode(digest))),
    ]);
    let config = Json::object([
        ("json_size", decimal(METADATA_BYTES - BINARY_HEADER_LEN as u64)),
        ("keyslots_size", decimal(KEYSLOTS_BYTES)),
    ]);
    Json::object([
        ("keyslots", Json::Object(Vec::new())),
        ("tokens", Json::object([("0", token.to_json())])),
        ("segments", Json::object([("0", segment)])),
        ("digests", Json::object([("0", digest)])),
        ("config", config),
    ])
}
