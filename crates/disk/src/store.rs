//! Where ciphertext lies: bytes at offsets, holes, and a flush that can fail.
//!
//! [`FileStore`] is a regular file or a block device behind a descriptor somebody else opened and locked. It knows
//! neither ciphers nor headers.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{FileExt, FileTypeExt},
    },
    sync::Arc,
};

use crate::{aligned::Aligned, remote::Link};

/// A run of bytes that is all data or all hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where it ends.
    pub end: u64,
    /// Whether nothing is stored there.
    pub hole: bool,
}

/// Bytes at offsets.
pub trait Store: Send + Sync {
    /// Bytes stored.
    fn len(&self) -> io::Result<u64>;
    /// Whether nothing is stored.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Reads until `buf` is full or the store ends; gives how much.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// Writes all of `buf`, making the store longer where needed.
    fn write_at(&self, at: u64, buf: &[u8]) -> io::Result<()>;
    /// Makes everything written so far durable, the length too.
    fn flush(&self) -> io::Result<()>;
    /// Gives the space back; what is read there afterwards is unspecified. Doing nothing is correct.
    fn punch(&self, at: u64, len: u64) -> io::Result<()>;
    /// The run that begins at `at`; its end may be past `end`. Saying "data" is always correct.
    fn run_at(&self, at: u64, end: u64) -> Run;

    /// Reads into pieces of memory that others may change meanwhile; gives how much.
    ///
    /// # Safety
    ///
    /// Each piece is valid for writing while the call lasts.
    unsafe fn read_pieces(&self, at: u64, pieces: &[libc::iovec]) -> io::Result<usize> {
        let mut done = 0;
        for piece in pieces {
            let mut own = vec![0; piece.iov_len];
            let got = self.read_at(at + done as u64, &mut own)?;
            // SAFETY: the caller vouches for the piece; `own` is another allocation.
            unsafe { std::ptr::copy_nonoverlapping(own.as_ptr(), piece.iov_base.cast(), got) };
            done += got;
            if got < piece.iov_len {
                break;
            }
        }
        Ok(done)
    }

    /// The descriptor, where asynchronous I/O on it pays: it does not where every access is a copy of memory.
    fn ring_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The way to the helper, where that keeps the bytes.
    fn link(&self) -> Option<&Arc<Link>> {
        None
    }

    /// The file, where the bytes are in one.
    fn file(&self) -> Option<&File> {
        None
    }

    /// Takes the room from `from` to `to`, of which nothing is used yet.
    fn reserve(&self, _from: u64, _to: u64) -> io::Result<()> {
        Ok(())
    }

    /// Ends at `end` again, after [`Store::reserve`]. Best effort.
    fn give_back(&self, _end: u64) {}

    /// Forgets what was read before, for another host may have written since. Best effort.
    fn forget_cached(&self) {}

    /// What memory and offsets must be multiples of. (1, 1) where the page cache is in between.
    fn alignment(&self) -> Alignment {
        Alignment::default()
    }
}

impl<S: Store + ?Sized> Store for Arc<S> {
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        (**self).read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> io::Result<()> {
        (**self).write_at(at, buf)
    }

    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        (**self).punch(at, len)
    }

    fn run_at(&self, at: u64, end: u64) -> Run {
        (**self).run_at(at, end)
    }

    unsafe fn read_pieces(&self, at: u64, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller's promise is the same.
        unsafe { (**self).read_pieces(at, pieces) }
    }

    fn ring_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).ring_fd()
    }

    fn link(&self) -> Option<&Arc<Link>> {
        (**self).link()
    }

    fn alignment(&self) -> Alignment {
        (**self).alignment()
    }
}

/// What a store asks of each access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    /// Of addresses in memory.
    pub memory: usize,
    /// Of offsets and lengths.
    pub offset: u64,
}

impl Default for Alignment {
    fn default() -> Self {
        Self { memory: 1, offset: 1 }
    }
}

/// A file or block device.
pub struct FileStore {
    file: File,
    alignment: Alignment,
    in_memory: bool,
}

/// Bytes of the aligned buffer through which unaligned ones go.
const BOUNCE: usize = 1 << 20;

/// Why a descriptor cannot carry a volume.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A directory, a pipe, a socket.
    #[error("is neither a regular file nor a block device")]
    Kind,
    /// O_APPEND sends every write to the end.
    #[error("was opened with {flag}")]
    Flag {
        /// Its name.
        flag: &'static str,
    },
    /// Reading or, for a writable disk, writing is not allowed through it.
    #[error("was not opened for {access}")]
    Access {
        /// What is missing.
        access: &'static str,
    },
    /// It cannot be looked at.
    #[error("cannot be examined")]
    Io(#[from] io::Error),
}

impl FileStore {
    /// A store on this descriptor.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: what is wrong with the descriptor.
    pub fn new(file: File, read_only: bool) -> Result<Self, StoreError> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(StoreError::Kind);
        }
        // SAFETY: F_GETFL takes no argument.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error().into());
        }
        if flags & libc::O_APPEND != 0 {
            return Err(StoreError::Flag { flag: "O_APPEND" });
        }
        match flags & libc::O_ACCMODE {
            libc::O_RDWR => {}
            libc::O_RDONLY if read_only => {}
            libc::O_RDONLY => return Err(StoreError::Access { access: "writing" }),
            _ => return Err(StoreError::Access { access: "reading" }),
        }
        let in_memory = lies_in_memory(&file);
        // An earlier worker went around the page cache, and the flag stays with the description.
        let direct = flags & libc::O_DIRECT != 0;
        let careful = Alignment { memory: 4096, offset: 4096 };
        let alignment =
            if direct { direct_alignment(&file).unwrap_or(careful) } else { Alignment::default() };
        Ok(Self { file, alignment, in_memory })
    }

    /// Goes around the page cache from now on, where the medium can in steps of `unit`; gives whether it does.
    ///
    /// The flag belongs to the open file description, so it is for who has that alone.
    pub fn go_direct(&mut self, unit: u64) -> bool {
        let Some(alignment) = direct_alignment(&self.file).filter(|a| a.offset <= unit) else { return false };
        // SAFETY: flags of a descriptor that is open.
        let set = unsafe {
            let flags = libc::fcntl(self.file.as_raw_fd(), libc::F_GETFL);
            flags >= 0 && libc::fcntl(self.file.as_raw_fd(), libc::F_SETFL, flags | libc::O_DIRECT) == 0
        };
        if set {
            self.alignment = alignment;
        }
        set
    }

    fn suits(&self, buf: &[u8]) -> bool {
        (buf.as_ptr() as usize).is_multiple_of(self.alignment.memory)
    }

    /// Makes a regular file at least this long; a block device stays as it is.
    ///
    /// # Errors
    ///
    /// The file system's.
    pub fn extend_to(&self, len: u64) -> io::Result<()> {
        if self.file.metadata()?.is_file() && self.len()? < len { self.file.set_len(len) } else { Ok(()) }
    }

    /// Makes data and everything about the file durable.
    ///
    /// # Errors
    ///
    /// The file system's.
    pub fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Makes a range read as zeros without storing them. False if it could not, and zeros must be written.
    pub fn make_hole(&self, at: u64, len: u64) -> bool {
        self.punch_range(at, len).is_ok()
    }

    fn punch_range(&self, at: u64, len: u64) -> io::Result<()> {
        let (Ok(at), Ok(len)) = (libc::off_t::try_from(at), libc::off_t::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        loop {
            // SAFETY: fallocate works on an open descriptor and takes no pointers.
            let done = unsafe {
                libc::fallocate(
                    self.file.as_raw_fd(),
                    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    at,
                    len,
                )
            };
            if done == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// `lseek` to data or hole from `at`; the file position it moves is used by nobody (all I/O is at offsets).
    fn seek(&self, at: u64, whence: libc::c_int) -> io::Result<u64> {
        let at = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: lseek takes no pointers.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), at, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    }
}

impl Store for FileStore {
    fn len(&self) -> io::Result<u64> {
        // By seeking and not by metadata: that gives 0 for a block device.
        (&self.file).seek(SeekFrom::End(0))
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        if !self.suits(buf) {
            let mut bounce = Aligned::new(buf.len().min(BOUNCE))?;
            for piece in buf.chunks_mut(BOUNCE) {
                let through = bounce.first(piece.len());
                let got = self.read_at(at + done as u64, through)?;
                piece.copy_from_slice(through);
                done += got;
                if got < piece.len() {
                    break;
                }
            }
            return Ok(done);
        }
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, at + done as u64) {
                Ok(0) => break,
                Ok(got) => done += got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> io::Result<()> {
        if self.suits(buf) {
            return self.file.write_all_at(buf, at);
        }
        let mut bounce = Aligned::new(buf.len().min(BOUNCE))?;
        for (index, piece) in buf.chunks(BOUNCE).enumerate() {
            let through = bounce.first(piece.len());
            through.copy_from_slice(piece);
            self.file.write_all_at(through, at + (index * BOUNCE) as u64)?;
        }
        Ok(())
    }

    unsafe fn read_pieces(&self, at: u64, pieces: &[libc::iovec]) -> io::Result<usize> {
        loop {
            let count = pieces.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
            let at = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
            // SAFETY: the caller vouches for the pieces; the kernel checks addresses itself.
            let got = unsafe { libc::preadv(self.file.as_raw_fd(), pieces.as_ptr(), count, at) };
            match usize::try_from(got) {
                Ok(got) => return Ok(got),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn ring_fd(&self) -> Option<BorrowedFd<'_>> {
        (!self.in_memory).then(|| self.file.as_fd())
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    /// A file takes the blocks and becomes longer; where it cannot take them first, writing will. A device that is
    /// shorter has no space left.
    fn reserve(&self, from: u64, to: u64) -> io::Result<()> {
        if !self.file.metadata()?.is_file() {
            let short = self.len()? < to;
            return if short { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) };
        }
        let range = |at: u64| libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput);
        let (at, len) = (range(from)?, range(to - from)?);
        loop {
            // SAFETY: fallocate works on an open descriptor and takes no pointers.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), 0, at, len) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS) => return Ok(()),
                _ => return Err(error),
            }
        }
    }

    fn give_back(&self, end: u64) {
        if self.file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            let _ = self.file.set_len(end);
        }
    }

    fn forget_cached(&self) {
        // SAFETY: advice on an open descriptor; no memory is involved.
        unsafe { libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }

    fn alignment(&self) -> Alignment {
        self.alignment
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        match self.punch_range(at, len) {
            // The medium cannot; a discard is a wish.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENODEV | libc::ENOSYS)
                ) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    fn run_at(&self, at: u64, end: u64) -> Run {
        match self.seek(at, libc::SEEK_DATA) {
            Ok(data) if data > at => Run { end: data, hole: true },
            Ok(_) => Run { end: self.seek(at, libc::SEEK_HOLE).unwrap_or(end).max(at + 1), hole: false },
            // No data from here to the end of the file.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Run { end, hole: true },
            // A medium that does not know (block devices, some network file systems).
            Err(_) => Run { end, hole: false },
        }
    }
}

/// Whether a file's medium is memory: then an access is a copy, and done before anybody could wait for it.
fn lies_in_memory(file: &File) -> bool {
    // SAFETY: statfs is plain data; the kernel fills it.
    unsafe {
        let mut stat: libc::statfs = mem::zeroed();
        libc::fstatfs(file.as_raw_fd(), &mut stat) == 0 && {
            let kind = stat.f_type & 0xffff_ffff;
            kind == libc::TMPFS_MAGIC || kind == RAMFS_MAGIC || kind == libc::HUGETLBFS_MAGIC
        }
    }
}

/// From linux/magic.h; libc does not name it.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
/// From linux/stat.h, since Linux 6.1; libc does not name it everywhere.
const STATX_DIOALIGN: u32 = 0x2000;

/// What O_DIRECT asks of this file; `None` where it cannot be had. Kernels before 6.1 do not say: then nothing is
/// risked and 4096 is asked of both, which every medium takes.
fn direct_alignment(file: &File) -> Option<Alignment> {
    // SAFETY: statx is plain data; the kernel fills it. The empty path means the descriptor itself.
    let stat = unsafe {
        let mut stat: libc::statx = mem::zeroed();
        let flags = libc::AT_EMPTY_PATH;
        (libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, STATX_DIOALIGN, &mut stat) == 0).then_some(stat)
    }?;
    if stat.stx_mask & STATX_DIOALIGN == 0 {
        return Some(Alignment { memory: 4096, offset: 4096 });
    }
    if stat.stx_dio_offset_align == 0 {
        return None;
    }
    // Never below what a sector is to everybody.
    Some(Alignment {
        memory: (stat.stx_dio_mem_align as usize).max(512),
        offset: u64::from(stat.stx_dio_offset_align).max(512),
    })
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    fn scratch(name: &str) -> (std::path::PathBuf, File) {
        let path = std::env::temp_dir().join(format!("vmseal-store-{name}-{}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        (path, file)
    }

    #[test]
    fn reads_stop_at_the_end_and_holes_are_seen() {
        let (path, file) = scratch("holes");
        let store = FileStore::new(file, false).unwrap();
        store.write_at(1 << 20, &[1; 65536]).unwrap();
        assert_eq!(store.len().unwrap(), (1 << 20) + 65536);
        assert_eq!(store.run_at(0, 2 << 20), Run { end: 1 << 20, hole: true });
        assert_eq!(store.run_at(1 << 20, 2 << 20), Run { end: (1 << 20) + 65536, hole: false });
        assert_eq!(store.run_at(3 << 20, 4 << 20), Run { end: 4 << 20, hole: true });
        let mut buf = [0; 8];
        assert_eq!(store.read_at((1 << 20) + 65532, &mut buf).unwrap(), 4);
        store.punch(1 << 20, 65536).unwrap();
        assert_eq!(store.len().unwrap(), (1 << 20) + 65536);
        assert!(store.run_at(0, 2 << 20).hole);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn going_around_the_page_cache_takes_any_memory_and_is_seen_by_the_next_worker() {
        let (path, file) = scratch("direct");
        let mut store = FileStore::new(file.try_clone().unwrap(), false).unwrap();
        let went = store.go_direct(512);
        let bytes: Vec<u8> = (0..BOUNCE + 4096).map(|i| (i / 7) as u8).collect();
        // One byte off: no address that O_DIRECT takes.
        let mut odd = vec![0; bytes.len() + 1];
        odd[1..].copy_from_slice(&bytes);
        store.write_at(512, &odd[1..]).unwrap();
        let next = FileStore::new(file, false).unwrap();
        assert_eq!(next.alignment() != Alignment::default(), went);
        let mut read = vec![0; bytes.len() + 1];
        assert_eq!(next.read_at(512, &mut read[1..]).unwrap(), bytes.len());
        assert!(read[1..] == bytes, "what was written is not what is read");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn descriptors_that_cannot_carry_a_volume_are_refused() {
        let (path, _file) = scratch("flags");
        let open = |options: &mut OpenOptions| options.open(&path).unwrap();
        let mut options = OpenOptions::new();
        let read = |read_only| FileStore::new(open(OpenOptions::new().read(true)), read_only);
        assert!(read(true).is_ok());
        assert!(matches!(read(false), Err(StoreError::Access { access: "writing" })));
        let write_only = open(OpenOptions::new().write(true));
        assert!(matches!(FileStore::new(write_only, false), Err(StoreError::Access { access: "reading" })));
        let append = open(options.read(true).append(true));
        assert!(matches!(FileStore::new(append, false), Err(StoreError::Flag { flag: "O_APPEND" })));
        let directory = File::open("/").unwrap();
        assert!(matches!(FileStore::new(directory, true), Err(StoreError::Kind)));
        std::fs::remove_file(path).unwrap();
    }
}
