//! What a crash left: bytes that are mostly shared with other crashes of the same log.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::{fd::FromRawFd, unix::fs::FileExt},
    sync::Arc,
};

/// What a disk writes whole or not at all.
pub(crate) const SECTOR: u64 = 512;

/// The bytes of a store after a crash. Reads and seeks as a file does.
#[derive(Debug, Clone)]
pub struct Image {
    pub(crate) under: Arc<Vec<u8>>,
    /// Whole sectors that differ.
    pub(crate) over: BTreeMap<u64, [u8; SECTOR as usize]>,
    pub(crate) len: u64,
    pub(crate) at: u64,
}

impl Image {
    pub(crate) fn new(under: Arc<Vec<u8>>) -> Self {
        let len = under.len() as u64;
        Self { under, over: BTreeMap::new(), len, at: 0 }
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A range; shorter where the image ends.
    pub fn range(&self, from: u64, len: u64) -> Vec<u8> {
        let end = from.saturating_add(len).min(self.len);
        if end <= from {
            return Vec::new();
        }
        let mut out = vec![0; (end - from) as usize];
        let under = self.under.get(from as usize..).unwrap_or_default();
        let shared = under.len().min(out.len());
        out[..shared].copy_from_slice(&under[..shared]);
        for (sector, bytes) in self.over.range(from / SECTOR..end.div_ceil(SECTOR)) {
            let at = sector * SECTOR;
            let (begin, stop) = (at.max(from), (at + SECTOR).min(end));
            out[(begin - from) as usize..(stop - from) as usize]
                .copy_from_slice(&bytes[(begin - at) as usize..(stop - at) as usize]);
        }
        out
    }

    /// Whether any byte of a range differs from the bytes it shares with other crashes.
    pub fn differs_within(&self, from: u64, end: u64) -> bool {
        self.over.range(from / SECTOR..end.div_ceil(SECTOR)).next().is_some()
    }

    /// A file in memory with these bytes, for what wants a file; holes where there are zeros.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn to_file(&self) -> io::Result<File> {
        // SAFETY: the name is NUL-terminated; the descriptor is new and ours alone.
        let file = unsafe {
            let fd = libc::memfd_create(c"crash".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(fd)
        };
        file.set_len(self.len)?;
        let mut at = 0;
        while at < self.len {
            let piece = self.range(at, 64 << 10);
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(&piece, at)?;
            }
            at += piece.len() as u64;
        }
        Ok(file)
    }

    pub(crate) fn put(&mut self, sector: u64, bytes: [u8; SECTOR as usize]) {
        self.over.insert(sector, bytes);
    }

    /// A sector as it is, zeros where the image ends.
    pub(crate) fn sector(&self, sector: u64) -> [u8; SECTOR as usize] {
        let mut out = [0; SECTOR as usize];
        let there = self.range(sector * SECTOR, SECTOR);
        out[..there.len()].copy_from_slice(&there);
        out
    }
}

impl Read for Image {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let bytes = self.range(self.at, buf.len() as u64);
        buf[..bytes.len()].copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}

impl Seek for Image {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
