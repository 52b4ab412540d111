//! The agent in the place of a disk process, for a moment: reads and writes a volume's header through its helper.
//!
//! A listening socket in, bytes at offsets out. The helper connects again when this is dropped, to whoever listens then.
//! Its memory is read and written by system calls and never mapped. Messages: `docs/formats/store-helper.md`.

use std::{
    cell::RefCell,
    ffi::CString,
    fs::File,
    io, mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::Path,
    time::{Duration, Instant},
};

use vmseal_luks::HeaderFile;
use vmseal_model::store_helper::{MAX_BATCH, MESSAGE_BYTES, StoreMessage, StoreOp};

/// Bytes of one transfer.
const TRANSFER: usize = 1 << 20;

/// A connection to the helper.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    memory: File,
    bytes: u64,
    /// One request at a time.
    asking: RefCell<()>,
}

impl Channel {
    /// Takes the helper that connects to `listener` next and runs as one of `users`.
    ///
    /// # Errors
    ///
    /// `TimedOut` if none comes in time; the kernel's.
    pub fn accept(listener: BorrowedFd<'_>, users: &[u32], patience: Duration) -> io::Result<Self> {
        let until = Instant::now() + patience;
        loop {
            wait_readable(listener, until)?;
            // SAFETY: no address is asked for; on success the descriptor is new and ours alone.
            let socket = unsafe {
                let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
                let fd = libc::accept4(listener.as_raw_fd(), address, length, libc::SOCK_CLOEXEC);
                if fd < 0 {
                    return Err(io::Error::last_os_error());
                }
                OwnedFd::from_raw_fd(fd)
            };
            if !users.contains(&peer_uid(&socket)?) {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            set_timeout(&socket, patience)?;
            // One that was ended may have knocked before the one that is there now.
            let Ok((hello, memory)) = receive_hello(&socket) else { continue };
            if hello != StoreMessage::hello(hello.offset) {
                return Err(io::Error::other("the store helper is of another release: install both of one"));
            }
            if send(&socket, &hello.encode()).is_ok() {
                return Ok(Self { socket, memory, bytes: hello.offset, asking: RefCell::new(()) });
            }
        }
    }

    /// Bytes of the store.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn ask(&self, op: StoreOp, offset: u64, length: usize) -> io::Result<()> {
        let _one = self.asking.try_borrow_mut().map_err(|_| io::ErrorKind::ResourceBusy)?;
        let length = u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let request = StoreMessage { token: offset, op, flags: 0, errno: 0, offset, length, buffer: 0 };
        send(&self.socket, &request.encode())?;
        let mut packet = [0; MESSAGE_BYTES * MAX_BATCH];
        // SAFETY: as many bytes as the buffer has.
        let got = unsafe { libc::recv(self.socket.as_raw_fd(), packet.as_mut_ptr().cast(), packet.len(), 0) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        match packet.get(..got).and_then(StoreMessage::decode_packet).as_deref() {
            Some([reply]) if (StoreMessage { errno: 0, ..*reply }) == request => match reply.errno {
                0 => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno.cast_signed())),
            },
            None if got == 0 => Err(io::Error::other("the store helper ended")),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl HeaderFile for Channel {
    fn byte_len(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn get(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (index, piece) in out.chunks_mut(TRANSFER).enumerate() {
            self.ask(StoreOp::Read, offset + (index * TRANSFER) as u64, piece.len())?;
            self.memory.read_exact_at(piece, 0)?;
        }
        Ok(())
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for (index, piece) in bytes.chunks(TRANSFER).enumerate() {
            self.memory.write_all_at(piece, 0)?;
            self.ask(StoreOp::Write, offset + (index * TRANSFER) as u64, piece.len())?;
        }
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        self.ask(StoreOp::Flush, 0, 0)
    }
}

/// A new listening socket that keeps packets apart, for helpers of `user`: the disk process looks at whose it is.
///
/// # Errors
///
/// The kernel's.
pub fn listen(path: &Path, user: Option<u32>) -> io::Result<OwnedFd> {
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    let name = path.as_os_str().as_bytes();
    if name.len() >= address.sun_path.len() || name.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::AF_UNIX as _;
    for (to, from) in address.sun_path.iter_mut().zip(name) {
        *to = *from as _;
    }
    let path_c = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: the descriptor is new and ours alone; the address has the length that is said; the path is terminated. The
    // directory is root's, so the name means the socket that was bound.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let length = mem::size_of_val(&address) as libc::socklen_t;
        check(libc::bind(fd, (&raw const address).cast(), length))?;
        check(libc::chmod(path_c.as_ptr(), 0o600))?;
        if let Some(user) = user {
            check(libc::fchown(fd, user, u32::MAX))?;
            check(libc::lchown(path_c.as_ptr(), user, u32::MAX))?;
        }
        check(libc::listen(fd, 8))?;
        Ok(socket)
    }
}

fn wait_readable(fd: BorrowedFd<'_>, until: Instant) -> io::Result<()> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let timeout = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        // SAFETY: one pollfd, valid during the call.
        if unsafe { libc::poll(&mut poll, 1, timeout) } > 0 {
            return Ok(());
        }
    }
}

fn peer_uid(socket: &OwnedFd) -> io::Result<u32> {
    // SAFETY: all-zero is a valid ucred, and its own size is passed.
    unsafe {
        let mut peer: libc::ucred = mem::zeroed();
        let mut length = mem::size_of_val(&peer) as libc::socklen_t;
        let result = libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        );
        if result == 0 { Ok(peer.uid) } else { Err(io::Error::last_os_error()) }
    }
}

fn set_timeout(socket: &OwnedFd, timeout: Duration) -> io::Result<()> {
    let time = libc::timeval { tv_sec: timeout.as_secs().max(1).cast_signed(), tv_usec: 0 };
    // SAFETY: a timeval with its own size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const time).cast(),
            mem::size_of_val(&time) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn send(socket: &OwnedFd, packet: &[u8]) -> io::Result<()> {
    // SAFETY: as many bytes as the slice has.
    let sent = unsafe {
        libc::send(socket.as_fd().as_raw_fd(), packet.as_ptr().cast(), packet.len(), libc::MSG_NOSIGNAL)
    };
    if sent == packet.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The helper's first message, and the memory that comes with it.
fn receive_hello(socket: &OwnedFd) -> io::Result<(StoreMessage, File)> {
    let (mut bytes, mut control) = ([0; MESSAGE_BYTES], [0u64; 8]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid msghdr; every pointer put into it outlives the call. A descriptor in the control message
    // is new and ours alone; there is room for one header with a few of them, and only the first is looked for.
    unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(mem::size_of::<i32>() as u32) as _;
        let got = libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC);
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() || (*header).cmsg_type != libc::SCM_RIGHTS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let memory = File::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().read_unaligned());
        let hello = StoreMessage::decode(&bytes).filter(|_| got as usize == MESSAGE_BYTES);
        hello.map(|hello| (hello, memory)).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}
