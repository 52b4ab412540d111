//! Who may connect.
//!
//! To a disk: the QEMU process of this very VM, known by its pid in libvirt's pid file, for every QEMU of a host has
//! the same uid. Without a pid file (jobs, backup sockets, tests): root, and the uid that set this process up. To the
//! control socket: these two only.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use crate::descriptors::peer_of;

/// Longest content of a pid file that is looked at.
const PID_FILE_BYTES: u64 = 32;

/// Why a peer is turned away.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// libvirt's pid file cannot be read: the VM is not running.
    #[error("process {pid} wants the disk, but libvirt's pid file {name} cannot be read: {cause}")]
    NoPidFile {
        /// Who knocks.
        pid: i32,
        /// The file.
        name: String,
        /// Why not.
        cause: io::Error,
    },
    /// Another process than the VM's.
    #[error("process {pid} (uid {uid}) wants the disk; the VM's QEMU is process {expected}")]
    OtherProcess {
        /// Who knocks.
        pid: i32,
        /// As whom.
        uid: u32,
        /// Who may.
        expected: i32,
    },
    /// Another user than the one the socket is for.
    #[error("process {pid} (uid {uid}) may not use this socket")]
    OtherUser {
        /// Who knocks.
        pid: i32,
        /// As whom.
        uid: u32,
    },
    /// The kernel does not say who it is.
    #[error("cannot see who connects")]
    Unknown(#[source] io::Error),
}

/// Who may use a disk.
#[derive(Debug)]
pub enum PeerPolicy {
    /// The process whose pid stands in the file `name` of `directory`.
    QemuPidFile {
        /// libvirt's run directory.
        directory: OwnedFd,
        /// A plain file name.
        name: CString,
    },
    /// Root, and this uid.
    Owner {
        /// The uid that set this process up.
        uid: u32,
    },
}

impl PeerPolicy {
    /// The policy of a setup: a name is a pid file's, none means root and `owner`. `None` if it is no plain file name.
    pub fn new(directory: OwnedFd, pid_file: &str, owner: u32) -> Option<Self> {
        match pid_file {
            "" => Some(Self::Owner { uid: owner }),
            "." | ".." => None,
            name if name.contains('/') || name.len() > 255 => None,
            name => Some(Self::QemuPidFile { directory, name: CString::new(name).ok()? }),
        }
    }

    /// The directory in which a file is read for each connection.
    pub fn directory(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::QemuPidFile { directory, .. } => Some(directory.as_fd()),
            Self::Owner { .. } => None,
        }
    }

    /// The pid of a peer that may use the disk.
    ///
    /// # Errors
    ///
    /// [`PeerError`]: who it is and why not.
    pub fn admit(&self, stream: &UnixStream) -> Result<i32, PeerError> {
        let peer = peer_of(stream).map_err(PeerError::Unknown)?;
        let (pid, uid) = (peer.pid, peer.uid);
        match self {
            Self::Owner { uid: owner } if uid == 0 || uid == *owner => Ok(pid),
            Self::Owner { .. } => Err(PeerError::OtherUser { pid, uid }),
            Self::QemuPidFile { directory, name } => match read_pid(directory, name) {
                Ok(expected) if expected == pid => Ok(pid),
                Ok(expected) => Err(PeerError::OtherProcess { pid, uid, expected }),
                Err(cause) => {
                    Err(PeerError::NoPidFile { pid, name: name.to_string_lossy().into_owned(), cause })
                }
            },
        }
    }
}

/// The pid of a peer that is root: who makes block devices of the host.
///
/// # Errors
///
/// [`PeerError`]: who it is.
pub fn admit_root(stream: &UnixStream) -> Result<i32, PeerError> {
    let peer = peer_of(stream).map_err(PeerError::Unknown)?;
    if peer.uid == 0 { Ok(peer.pid) } else { Err(PeerError::OtherUser { pid: peer.pid, uid: peer.uid }) }
}

/// Whether a peer may use the control socket: root, or who set this process up.
///
/// # Errors
///
/// [`PeerError`]: who it is.
pub fn may_control(stream: &UnixStream, owner: u32) -> Result<(), PeerError> {
    let peer = peer_of(stream).map_err(PeerError::Unknown)?;
    if peer.uid == 0 || peer.uid == owner {
        Ok(())
    } else {
        Err(PeerError::OtherUser { pid: peer.pid, uid: peer.uid })
    }
}

/// The positive decimal number in a file of a directory.
fn read_pid(directory: &OwnedFd, name: &CString) -> io::Result<i32> {
    // O_NONBLOCK: a FIFO put there must not hold up the accept loop.
    let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK;
    // SAFETY: the directory is open and the name is NUL-terminated.
    let fd = unsafe { libc::openat(directory.as_raw_fd(), name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut text = String::new();
    file.take(PID_FILE_BYTES).read_to_string(&mut text)?;
    text.trim()
        .parse()
        .ok()
        .filter(|pid| *pid > 0)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it does not hold a process id"))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vmseal-peer-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
        fn open(&self) -> OwnedFd {
            File::open(&self.0).unwrap().into()
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn only_the_process_in_the_pid_file_is_admitted() {
        let directory = Directory::new("pid");
        let file = directory.0.join("vm.pid");
        let policy = PeerPolicy::new(directory.open(), "vm.pid", 0).unwrap();
        let (stream, _other) = UnixStream::pair().unwrap();
        let own = std::process::id();
        assert!(matches!(policy.admit(&stream), Err(PeerError::NoPidFile { .. })));
        fs::write(&file, format!("{own}\n")).unwrap();
        assert_eq!(policy.admit(&stream).unwrap(), own as i32);
        fs::write(&file, format!("{own}")).unwrap();
        assert_eq!(policy.admit(&stream).unwrap(), own as i32);
        fs::write(&file, "1").unwrap();
        assert!(matches!(policy.admit(&stream), Err(PeerError::OtherProcess { expected: 1, .. })));
        for content in ["", "0", "-5", "x", "99999999999999999999", "1 2"] {
            fs::write(&file, content).unwrap();
            assert!(matches!(policy.admit(&stream), Err(PeerError::NoPidFile { .. })), "{content}");
        }
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/proc/self/stat", &file).unwrap();
        assert!(matches!(policy.admit(&stream), Err(PeerError::NoPidFile { .. })));
    }

    #[test]
    fn pid_file_names_with_a_way_out_are_refused() {
        let directory = Directory::new("name");
        for name in [".", "..", "../x", "/etc/passwd", "a/b", "a\0b"] {
            assert!(PeerPolicy::new(directory.open(), name, 0).is_none(), "{name:?}");
        }
    }

    #[test]
    fn without_a_pid_file_the_owner_is_admitted() {
        let directory = Directory::new("owner");
        let (stream, _other) = UnixStream::pair().unwrap();
        let uid = peer_of(&stream).unwrap().uid;
        assert!(PeerPolicy::new(directory.open(), "", uid).unwrap().admit(&stream).is_ok());
        assert!(may_control(&stream, uid).is_ok());
        let stranger = PeerPolicy::new(directory.open(), "", uid.wrapping_add(1)).unwrap();
        assert_eq!(stranger.admit(&stream).is_ok(), uid == 0);
        assert_eq!(may_control(&stream, uid.wrapping_add(1)).is_ok(), uid == 0);
        assert_eq!(admit_root(&stream).is_ok(), uid == 0);
    }
}
