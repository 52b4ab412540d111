//! A LUKS2 header around any JSON, its checksums right: what an attacker can make as well.
//!
//! Written from the specification and not with the crate's own writer, so that a mistake there does not hide here.

use std::io::{self, Cursor, Read, Seek, SeekFrom};

use aws_lc_rs::digest::{SHA256, digest};

/// Both copies, of `copy_bytes` each.
pub(crate) fn header(json: &[u8], copy_bytes: usize, sequence: u64) -> Vec<u8> {
    assert!(json.len() < copy_bytes - 4096, "the JSON fits");
    let copy = |magic: &[u8; 6], offset: usize| {
        let mut bytes = vec![0; copy_bytes];
        bytes[..6].copy_from_slice(magic);
        bytes[6..8].copy_from_slice(&2u16.to_be_bytes());
        bytes[8..16].copy_from_slice(&(copy_bytes as u64).to_be_bytes());
        bytes[16..24].copy_from_slice(&sequence.to_be_bytes());
        bytes[72..78].copy_from_slice(b"sha256");
        bytes[168..204].copy_from_slice(b"6f1c2a54-8a1e-4a0f-9c55-0d1f2e3a4b5c");
        bytes[256..264].copy_from_slice(&(offset as u64).to_be_bytes());
        bytes[4096..4096 + json.len()].copy_from_slice(json);
        let sum = digest(&SHA256, &bytes);
        bytes[448..480].copy_from_slice(sum.as_ref());
        bytes
    };
    [copy(b"LUKS\xba\xbe", 0), copy(b"SKUL\xba\xbe", copy_bytes)].concat()
}

/// A volume: these bytes, then zeros up to a length.
pub(crate) struct Volume {
    head: Cursor<Vec<u8>>,
    bytes: u64,
}

impl Volume {
    pub(crate) fn new(head: Vec<u8>, bytes: u64) -> Self {
        Self { head: Cursor::new(head), bytes }
    }
}

impl Read for Volume {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = self.bytes.saturating_sub(self.head.position());
        let len = left.min(out.len() as u64) as usize;
        let at = self.head.position();
        let copied = self.head.read(&mut out[..len])?;
        out[copied..len].fill(0);
        self.head.set_position(at + len as u64);
        Ok(len)
    }
}

impl Seek for Volume {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::End(by) => self.bytes.saturating_add_signed(by),
            SeekFrom::Current(by) => self.head.position().saturating_add_signed(by),
        };
        self.head.set_position(at);
        Ok(at)
    }
}
