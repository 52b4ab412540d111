//! Reading at an offset, from a file without moving its cursor, or from anything that reads and seeks.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

/// Bytes with a length.
pub(crate) trait Source {
    /// Length in bytes; for a block device its size.
    fn len(&mut self) -> io::Result<u64>;
    /// Fills `out` from `offset`, or fails.
    fn read_at(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()>;
}

/// A file, read by `pread`. Its cursor stays, unless it is a block device.
pub(crate) struct AtFile<'a>(pub &'a File);

impl Source for AtFile<'_> {
    fn len(&mut self) -> io::Result<u64> {
        let about = self.0.metadata()?;
        // A device's metadata has no size.
        if about.is_file() { Ok(about.len()) } else { self.0.seek(SeekFrom::End(0)) }
    }

    fn read_at(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }
}

/// Whatever reads and seeks.
pub(crate) struct AtCursor<'a, T>(pub &'a mut T);

impl<T: Read + Seek> Source for AtCursor<'_, T> {
    fn len(&mut self) -> io::Result<u64> {
        self.0.seek(SeekFrom::End(0))
    }

    fn read_at(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.seek(SeekFrom::Start(offset))?;
        self.0.read_exact(out)
    }
}
