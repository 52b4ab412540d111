//! What a device of ours is known by: the link `/dev/vmseal/<disk-id>`, a mark for udev's rule that keeps the host off it,
//! a lock so that a disk has one warden.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink},
    },
    path::{Path, PathBuf},
};

use vmseal_model::id::DiskId;

/// Where links are.
pub const LINKS: &str = "/dev/vmseal";
/// Where locks and marks are. Root's alone, other than `/run/vmseal`.
pub const RUN: &str = "/run/vmseal-ublk";

/// Why a disk's names cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NamesError {
    /// There is another warden.
    #[error("process {pid} looks after disk {disk} already")]
    Held {
        /// The disk.
        disk: DiskId,
        /// Which process.
        pid: String,
    },
    /// A directory of ours is somebody else's.
    #[error("{path} is not a directory of root's that only root writes to: remove it")]
    NotOurs {
        /// Which.
        path: PathBuf,
    },
    /// A file cannot be made, read or removed.
    #[error("{path} cannot be used")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The names of one disk; nobody else uses them meanwhile.
pub struct Names {
    disk: DiskId,
    links: PathBuf,
    run: PathBuf,
    lock: PathBuf,
    /// Locked as long as it is open.
    _held: File,
}

impl Names {
    /// Takes them.
    ///
    /// # Errors
    ///
    /// [`NamesError`].
    pub fn take(disk: DiskId) -> Result<Self, NamesError> {
        Self::take_at(disk, Path::new(LINKS), Path::new(RUN))
    }

    fn take_at(disk: DiskId, links: &Path, run: &Path) -> Result<Self, NamesError> {
        directory(links)?;
        directory(run)?;
        let lock = run.join(format!("{disk}.lock"));
        let held = hold(&lock, disk)?;
        Ok(Self { disk, links: links.into(), run: run.into(), lock, _held: held })
    }

    /// Where the block device is found.
    pub fn link(&self) -> PathBuf {
        self.links.join(self.disk.to_string())
    }

    /// What the driver keeps of us with a device: the disk, as far as it fits.
    pub fn driver_mark(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.disk.to_bytes();
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    /// Keeps the host off a device that is about to appear.
    ///
    /// # Errors
    ///
    /// The file system's.
    pub fn mark(&self, device: u32) -> Result<(), NamesError> {
        let path = self.mark_of(device);
        fs::write(&path, format!("{}\n", self.disk)).map_err(at(&path))
    }

    /// Takes the mark away.
    pub fn remove_mark(&self, device: u32) {
        let _ = fs::remove_file(self.mark_of(device));
    }

    /// Has the link point to a device.
    ///
    /// # Errors
    ///
    /// The file system's.
    pub fn point_to(&self, device: u32) -> Result<(), NamesError> {
        let (link, new) = (self.link(), self.links.join(format!(".{}", self.disk)));
        let _ = fs::remove_file(&new);
        symlink(format!("../ublkb{device}"), &new).map_err(at(&new))?;
        fs::rename(&new, &link).map_err(at(&link))
    }

    /// Removes link, mark and lock. What is not there is no matter.
    pub fn remove(&self, device: Option<u32>) {
        let _ = fs::remove_file(self.link());
        if let Some(device) = device {
            self.remove_mark(device);
        }
        // While it is held: who opened it meanwhile sees that it has no name any more.
        let _ = fs::remove_file(&self.lock);
    }

    /// The directories too, unless another disk has something there.
    pub fn remove_directories(&self) {
        let _ = fs::remove_dir(&self.links);
        let _ = fs::remove_dir(&self.run);
    }

    fn mark_of(&self, device: u32) -> PathBuf {
        self.run.join(format!("ublkb{device}"))
    }
}

/// Numbers of the ublk devices this host has.
pub fn devices() -> Vec<u32> {
    let names = fs::read_dir("/dev").into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut numbers: Vec<u32> =
        names.filter_map(|name| name.to_str()?.strip_prefix("ublkc")?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

fn directory(path: &Path) -> Result<(), NamesError> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(path)(error)),
        _ => {}
    }
    let about = fs::symlink_metadata(path).map_err(at(path))?;
    if !about.is_dir() || about.uid() != 0 || about.mode() & 0o022 != 0 {
        return Err(NamesError::NotOurs { path: path.into() });
    }
    Ok(())
}

fn hold(path: &Path, disk: DiskId) -> Result<File, NamesError> {
    loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o644);
        let mut file = options.custom_flags(libc::O_NOFOLLOW).open(path).map_err(at(path))?;
        // SAFETY: no pointers; the descriptor is open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(at(path)(error));
            }
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            return Err(NamesError::Held { disk, pid: pid.trim().to_owned() });
        }
        // The one before may have removed it between our opening and its end.
        let ours = file.metadata().map_err(at(path))?.ino();
        if fs::symlink_metadata(path).is_ok_and(|named| named.ino() == ours) {
            file.set_len(0).map_err(at(path))?;
            file.write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(at(path))?;
            return Ok(file);
        }
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> NamesError + use<> {
    let path = path.to_owned();
    move |source| NamesError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_has_one_warden_and_its_names_go_with_it() {
        // SAFETY: no arguments.
        if unsafe { libc::geteuid() } != 0 {
            return eprintln!("skipped: directories must be root's");
        }
        let scratch = std::env::temp_dir().join(format!("vmseal-ublk-names-{}", std::process::id()));
        fs::create_dir(&scratch).unwrap();
        let (links, run) = (scratch.join("links"), scratch.join("run"));
        let disk = DiskId::from_bytes([7; 16]);
        let take = || Names::take_at(disk, &links, &run);
        let names = take().unwrap();
        match take() {
            Err(NamesError::Held { pid, .. }) => assert_eq!(pid, std::process::id().to_string()),
            other => panic!("taken twice: {:?}", other.err()),
        }
        assert_eq!(names.driver_mark(), 0x0707_0707_0707_0707);
        names.mark(5).unwrap();
        names.point_to(5).unwrap();
        names.point_to(6).unwrap();
        assert_eq!(fs::read_link(names.link()).unwrap(), Path::new("../ublkb6"));
        names.remove(Some(5));
        drop(names);
        let again = take().unwrap();
        again.remove(None);
        again.remove_directories();
        assert!(!links.exists() && !run.exists());
        fs::create_dir(&links).unwrap();
        fs::set_permissions(&links, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(matches!(take(), Err(NamesError::NotOurs { .. })));
        fs::remove_dir_all(&scratch).unwrap();
    }
}
