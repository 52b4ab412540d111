//! A disk in memory for the targets that serve one.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    os::unix::net::UnixStream,
    sync::Arc,
};

use vmseal_disk::{
    export::Export,
    store::FileStore,
    volume::{Layout, Volume},
};
use vmseal_keys::Dek;
use vmseal_model::{control::ExportKind, id::DiskId};
use vmseal_xts::Cipher;

/// Bytes it shows.
pub const PRESENTED: u64 = 256 << 10;

/// A disk with a fresh key; half of what it shows is stored. Bits of `choice`: grows or is fixed, read-only.
pub fn export(kind: ExportKind, choice: u8) -> Arc<Export> {
    let grows = choice & 1 == 0;
    let layout = Layout {
        unit: if choice & 4 == 0 { 512 } else { 4096 },
        payload_offset: 4096,
        presented: PRESENTED,
        grows,
        read_only: choice & 2 != 0,
        discard: true,
    };
    let stored = if grows { PRESENTED / 2 } else { PRESENTED };
    let file = memory_file(4096 + stored).expect("memory");
    let store = FileStore::new(file, layout.read_only).expect("a regular file");
    let key = [1; 32].into_iter().chain([0x5a; 64]).collect::<Vec<_>>();
    let dek = Dek::from_payload_slice(&key).expect("96 bytes");
    let cipher = Cipher::new(dek.data_key(), layout.unit as usize).expect("halves differ");
    let volume = Volume::new(Box::new(store), cipher, layout).expect("a whole volume");
    Arc::new(Export::new(disk_id(), "vda".into(), kind, volume))
}

/// The disk's id, which is the export's name.
pub fn disk_id() -> DiskId {
    DiskId::from_random([7; 16])
}

/// An empty file in memory of this length.
///
/// # Errors
///
/// The kernel's.
pub fn memory_file(len: u64) -> io::Result<File> {
    // SAFETY: the name is NUL-terminated; the descriptor is new and ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(len)?;
    Ok(file)
}

/// A counter to wake and to be woken by.
///
/// # Errors
///
/// The kernel's.
pub fn event() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor is new and ours alone.
    unsafe {
        match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
            fd if fd < 0 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Sends bytes with descriptors; gives whether all of them went.
pub fn send_with(stream: &UnixStream, bytes: &[u8], fds: &[i32]) -> bool {
    let mut room = [0u64; 64];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data; `room` holds the header and up to 100 descriptors, aligned as a header must be; the
    // kernel only reads what the message points at, which outlives the call.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        let fds = &fds[..fds.len().min(100)];
        if !fds.is_empty() {
            let len = size_of_val(fds) as u32;
            message.msg_control = room.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(len) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(header).cast(), fds.len());
        }
        libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) == bytes.len() as isize
    }
}
