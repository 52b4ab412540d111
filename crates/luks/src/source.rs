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

/// Where a header lies: a file, or whatever else has bytes at offsets.
pub trait HeaderFile {
    /// Length in bytes; for a block device its size.
    fn byte_len(&self) -> io::Result<u64>;
    /// Fills `out` from `offset`, or fails; with `UnexpectedEof` where it ends before.
    fn get(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;
    /// Writes all of it.
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Returns when what was put is on the medium.
    fn settle(&self) -> io::Result<()>;
}

/// Its cursor stays, unless it is a block device.
impl HeaderFile for File {
    fn byte_len(&self) -> io::Result<u64> {
        let about = self.metadata()?;
        // A device's metadata has no size.
        if about.is_file() {
            Ok(about.len())
        } else {
            let mut file = self;
            file.seek(SeekFrom::End(0))
        }
    }

    fn get(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(out, offset)
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn settle(&self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Such a place, to be read.
pub(crate) struct AtFile<'a, F: ?Sized>(pub &'a F);

impl<F: HeaderFile + ?Sized> Source for AtFile<'_, F> {
    fn len(&mut self) -> io::Result<u64> {
        self.0.byte_len()
    }

    fn read_at(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.get(offset, out)
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
