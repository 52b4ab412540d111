//! Where volumes lie: memory, and a disk.

use std::{
    ffi::CString,
    fmt, fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process,
};

use crate::error::{BenchError, Trying};

/// What lies under the volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Medium {
    /// tmpfs: nothing but memory copies to compare with.
    Memory,
    /// A file on a disk, around the page cache.
    Disk,
}

impl Medium {
    pub(crate) const ALL: [Self; 2] = [Self::Memory, Self::Disk];
}

impl fmt::Display for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "tmpfs",
            Self::Disk => "O_DIRECT",
        })
    }
}

/// A directory that goes away, and with it the file system that was mounted for it.
pub(crate) struct Scratch {
    path: PathBuf,
    mounted: bool,
}

impl Scratch {
    /// For sockets and logs, whose paths are short.
    pub(crate) fn short() -> Result<Self, BenchError> {
        Self::below(&std::env::temp_dir())
    }

    /// For volumes of together `bytes` on a medium.
    pub(crate) fn on(medium: Medium, bytes: u64) -> Result<Self, BenchError> {
        let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/lab");
        let shared = Path::new("/dev/shm");
        if medium == Medium::Memory && free_tmpfs_bytes(shared) >= bytes {
            return Self::below(shared);
        }
        fs::create_dir_all(&lab).trying(|| format!("creating {}", lab.display()))?;
        let mut scratch = Self::below(&lab)?;
        if medium == Medium::Memory {
            mount_tmpfs(&scratch.path, bytes).trying(|| {
                "mounting a tmpfs, as /dev/shm has too little room (this needs root)".to_owned()
            })?;
            scratch.mounted = true;
        }
        Ok(scratch)
    }

    fn below(parent: &Path) -> Result<Self, BenchError> {
        let mut number = 0;
        loop {
            let path = parent.join(format!("vmseal-bench-{}-{number}", process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path, mounted: false }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error).trying(|| format!("creating {}", path.display())),
            }
        }
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.mounted
            && let Ok(path) = CString::new(self.path.as_os_str().as_bytes())
        {
            // SAFETY: a NUL-terminated path; the file system is the one mounted by this value.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        }
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// What a tmpfs has free; zero if it is none.
fn free_tmpfs_bytes(path: &Path) -> u64 {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return 0 };
    // SAFETY: all zero is a valid value of this struct of integers.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a NUL-terminated path and a whole struct.
    if unsafe { libc::statfs(path.as_ptr(), &mut found) } != 0 || found.f_type != libc::TMPFS_MAGIC {
        return 0;
    }
    found.f_bavail * found.f_bsize as u64
}

fn mount_tmpfs(path: &Path, bytes: u64) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let options = CString::new(format!("size={bytes},mode=0700"))?;
    // SAFETY: NUL-terminated strings that live until the call returns.
    let done = unsafe {
        libc::mount(c"tmpfs".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
