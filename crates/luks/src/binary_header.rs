//! The first 4096 bytes of a metadata copy: magic, size, sequence number, checksum. Numbers are big-endian.
//!
//! In go 4096 bytes and their JSON area; out comes a [`BinaryHeader`] whose checksum was right. It reads no JSON.

use aws_lc_rs::digest::{Context, SHA256};

use crate::error::{Judged, quoted, reject};

/// Bytes of the binary header; the JSON area follows.
pub const BINARY_HEADER_LEN: usize = 4096;
/// Magic of the primary copy, at byte 0. LUKS1 has the same.
pub const PRIMARY_MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Magic of the secondary copy, right behind the primary.
pub const SECONDARY_MAGIC: [u8; 6] = *b"SKUL\xba\xbe";
/// Sizes of a copy (binary header and JSON area) that the format knows, hence places where a secondary can be.
pub const COPY_SIZES: [u64; 9] =
    [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];

/// Where each field is. Names as in the specification, §3.1.
mod field {
    use std::ops::Range;

    pub(super) const MAGIC: Range<usize> = 0..6;
    pub(super) const VERSION: Range<usize> = 6..8;
    pub(super) const HDR_SIZE: Range<usize> = 8..16;
    pub(super) const SEQID: Range<usize> = 16..24;
    pub(super) const LABEL: Range<usize> = 24..72;
    pub(super) const CSUM_ALG: Range<usize> = 72..104;
    pub(super) const SALT: Range<usize> = 104..168;
    pub(super) const UUID: Range<usize> = 168..208;
    pub(super) const SUBSYSTEM: Range<usize> = 208..256;
    pub(super) const HDR_OFFSET: Range<usize> = 256..264;
    /// SHA-256 takes the first 32 of 64 bytes.
    pub(super) const CSUM: Range<usize> = 448..512;
}

/// Which of the two copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Primary,
    /// At this offset, which is also the size of a copy.
    Secondary(u64),
}

impl Place {
    pub(crate) fn offset(self) -> u64 {
        match self {
            Self::Primary => 0,
            Self::Secondary(offset) => offset,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary(_) => "secondary",
        }
    }

    fn magic(self) -> [u8; 6] {
        match self {
            Self::Primary => PRIMARY_MAGIC,
            Self::Secondary(_) => SECONDARY_MAGIC,
        }
    }
}

/// A binary header. Bytes that no field covers are kept.
#[derive(Clone, PartialEq, Eq)]
pub struct BinaryHeader {
    bytes: Box<[u8; BINARY_HEADER_LEN]>,
}

/// What a new binary header says.
pub(crate) struct NewBinaryHeader<'a> {
    pub(crate) place: Place,
    pub(crate) copy_bytes: u64,
    pub(crate) sequence: u64,
    pub(crate) salt: &'a [u8; 64],
    pub(crate) uuid: &'a str,
    pub(crate) subsystem: &'a str,
}

impl BinaryHeader {
    /// A header without its checksum, which [`BinaryHeader::sealed`] adds.
    pub(crate) fn new(new: &NewBinaryHeader<'_>) -> Self {
        let mut header = Self { bytes: Box::new([0; BINARY_HEADER_LEN]) };
        header.put(field::VERSION, &2u16.to_be_bytes());
        header.put(field::HDR_SIZE, &new.copy_bytes.to_be_bytes());
        header.put(field::CSUM_ALG, b"sha256");
        header.put(field::UUID, new.uuid.as_bytes());
        header.put(field::SUBSYSTEM, new.subsystem.as_bytes());
        header.for_place(new.place, new.sequence, new.salt)
    }

    /// The same header in the other place, or with another sequence number; without its checksum.
    pub(crate) fn for_place(&self, place: Place, sequence: u64, salt: &[u8; 64]) -> Self {
        let mut header = self.clone();
        header.put(field::MAGIC, &place.magic());
        header.put(field::HDR_OFFSET, &place.offset().to_be_bytes());
        header.put(field::SEQID, &sequence.to_be_bytes());
        header.put(field::SALT, salt);
        header
    }

    /// The whole copy: this header with its checksum, then the JSON area.
    pub(crate) fn sealed(mut self, json_area: &[u8]) -> Vec<u8> {
        let sum = checksum(&self.bytes, json_area);
        self.put(field::CSUM, &[0; 64]);
        self.put(field::CSUM, &sum);
        [&self.bytes[..], json_area].concat()
    }

    /// Bytes that claim, by their magic, to be the head of the copy at `place`.
    pub(crate) fn claimed(bytes: &[u8], place: Place) -> Option<Self> {
        let bytes: &[u8; BINARY_HEADER_LEN] = bytes.try_into().ok()?;
        (bytes[field::MAGIC] == place.magic()).then(|| Self { bytes: Box::new(*bytes) })
    }

    /// Checks everything that does not need the JSON area.
    pub(crate) fn check_fields(&self, place: Place) -> Judged {
        if self.version() != 2 {
            reject!("version {} is not 2", self.version());
        }
        if !COPY_SIZES.contains(&self.copy_bytes()) {
            reject!("hdr_size {} is none of the sizes LUKS2 has", self.copy_bytes());
        }
        if self.be64(field::HDR_OFFSET) != place.offset() {
            reject!(
                "it says it stands at byte {}, and stands at {}",
                self.be64(field::HDR_OFFSET),
                place.offset()
            );
        }
        if place != Place::Primary && self.copy_bytes() != place.offset() {
            reject!("hdr_size {} is not its distance {} from the primary", self.copy_bytes(), place.offset());
        }
        let algorithm = &self.bytes[field::CSUM_ALG];
        match algorithm.iter().position(|&b| b == 0) {
            None => reject!("the name of its checksum is not terminated"),
            Some(end) if &algorithm[..end] != b"sha256" => {
                reject!("its checksum {} is not sha256", quoted(&String::from_utf8_lossy(&algorithm[..end])))
            }
            Some(_) => Ok(()),
        }
    }

    /// Checks the checksum over this and the JSON area.
    pub(crate) fn check_sum(&self, json_area: &[u8]) -> Judged {
        if self.bytes[field::CSUM][..32] != checksum(&self.bytes, json_area) {
            reject!("its checksum is wrong");
        }
        Ok(())
    }

    /// LUKS version; 1 means that all other fields mean nothing.
    pub fn version(&self) -> u16 {
        u16::from_be_bytes([self.bytes[6], self.bytes[7]])
    }

    /// Bytes of one copy: this header and the JSON area (`hdr_size`).
    pub fn copy_bytes(&self) -> u64 {
        self.be64(field::HDR_SIZE)
    }

    /// Sequence number (`seqid`): the copy with the higher one counts.
    pub fn sequence(&self) -> u64 {
        self.be64(field::SEQID)
    }

    /// Label, up to its first NUL.
    pub fn label(&self) -> String {
        self.text(field::LABEL)
    }

    /// UUID as it stands there, up to its first NUL.
    pub fn uuid(&self) -> String {
        self.text(field::UUID)
    }

    /// Subsystem, which we set to `vmseal`.
    pub fn subsystem(&self) -> String {
        self.text(field::SUBSYSTEM)
    }

    fn text(&self, range: std::ops::Range<usize>) -> String {
        let bytes = &self.bytes[range];
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    }

    fn be64(&self, range: std::ops::Range<usize>) -> u64 {
        u64::from_be_bytes(self.bytes[range].try_into().expect("fields of eight bytes"))
    }

    /// Writes at the start of a field; callers give no more than fits.
    fn put(&mut self, range: std::ops::Range<usize>, value: &[u8]) {
        self.bytes[range][..value.len()].copy_from_slice(value);
    }
}

impl std::fmt::Debug for BinaryHeader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BinaryHeader")
            .field("uuid", &self.uuid())
            .field("sequence", &self.sequence())
            .field("copy_bytes", &self.copy_bytes())
            .finish_non_exhaustive()
    }
}

/// SHA-256 over header (its checksum field as zeros) and JSON area.
fn checksum(header: &[u8; BINARY_HEADER_LEN], json_area: &[u8]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(&header[..field::CSUM.start]);
    context.update(&[0; 64]);
    context.update(&header[field::CSUM.end..]);
    context.update(json_area);
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(place: Place) -> BinaryHeader {
        BinaryHeader::new(&NewBinaryHeader {
            place,
            copy_bytes: 0x4000,
            sequence: 7,
            salt: &[9; 64],
            uuid: "00112233-4455-6677-8899-aabbccddeeff",
            subsystem: "vmseal",
        })
    }

    #[test]
    fn fields_read_back_and_the_checksum_covers_every_byte() {
        let area = vec![0u8; 0x3000];
        let bytes = header(Place::Secondary(0x4000)).sealed(&area);
        let read = |bytes: &[u8]| {
            let header = BinaryHeader::claimed(&bytes[..4096], Place::Secondary(0x4000)).expect("magic");
            header.check_fields(Place::Secondary(0x4000))?;
            header.check_sum(&bytes[4096..])?;
            Judged::Ok(header)
        };
        let good = read(&bytes).unwrap();
        assert_eq!((good.sequence(), good.copy_bytes()), (7, 0x4000));
        assert_eq!(good.uuid(), "00112233-4455-6677-8899-aabbccddeeff");
        // Bytes 480 to 511 pad the checksum and are outside it by the format.
        for at in (6..480).chain([512, 4095, 4096, 0x3fff]) {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(read(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn copy_in_the_wrong_place_is_refused() {
        let bytes = header(Place::Secondary(0x4000)).sealed(&[0; 0x3000]);
        let there = BinaryHeader::claimed(&bytes[..4096], Place::Secondary(0x8000)).unwrap();
        assert!(there.check_fields(Place::Secondary(0x8000)).is_err());
        assert!(BinaryHeader::claimed(&bytes[..4096], Place::Primary).is_none());
        assert!(BinaryHeader::claimed(&bytes[..4095], Place::Secondary(0x4000)).is_none());
    }
}
