//! Frames of `vmseal_model::control` on a unix stream socket, descriptors included.
//!
//! Values and descriptors in, bytes out, and back. Knows nothing of what they mean. A reply comes within the
//! deadline or not at all.

use std::{
    io::{self, IoSlice, Read, Write},
    mem,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::Path,
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};
use vmseal_model::control::{ControlReply, ControlRequest, MAX_FRAME};

use crate::peer;

/// Most descriptors one frame may carry: the kernel's SCM_MAX_FD.
pub const MAX_FDS: usize = 253;

/// Why a frame did not pass.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The socket.
    #[error("the disk process does not answer")]
    Io(#[from] io::Error),
    /// Longer than allowed.
    #[error("a frame of {bytes} bytes, at most {MAX_FRAME} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// More descriptors than the kernel passes at once.
    #[error("{fds} descriptors in one frame, at most {MAX_FDS} are allowed")]
    TooManyFds {
        /// How many.
        fds: usize,
    },
    /// Not what was expected.
    #[error("the disk process sent something else than a control frame")]
    Json(#[from] serde_json::Error),
}

/// Sends `value`, with `fds` travelling along with its first byte.
///
/// # Errors
///
/// [`FrameError`]; after one the socket is of no more use.
pub fn send(socket: &UnixStream, value: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
    let json = serde_json::to_vec(value)?;
    if json.len() > MAX_FRAME {
        return Err(FrameError::TooLong { bytes: json.len() });
    }
    let mut bytes = Vec::with_capacity(json.len() + 4);
    bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&json);
    let sent = if fds.is_empty() { 0 } else { send_with_fds(socket, &bytes, fds)? };
    (&*socket).write_all(&bytes[sent..])?;
    Ok(())
}

/// Receives one frame; the length is believed only up to [`MAX_FRAME`]. Waits as long as the socket's time-out says.
///
/// # Errors
///
/// [`FrameError::Io`] with `UnexpectedEof` if the other side has gone.
pub fn receive<T: DeserializeOwned>(socket: &UnixStream) -> Result<T, FrameError> {
    let mut len = [0u8; 4];
    (&*socket).read_exact(&mut len)?;
    let bytes = u32::from_le_bytes(len) as usize;
    if bytes > MAX_FRAME {
        return Err(FrameError::TooLong { bytes });
    }
    let mut json = vec![0u8; bytes];
    (&*socket).read_exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

/// Asks the process behind `path` one question; gives up at `deadline`.
///
/// # Errors
///
/// [`FrameError::Io`] if nobody listens, or nobody answers in time.
pub fn ask(path: &Path, request: &ControlRequest, deadline: Instant) -> Result<ControlReply, FrameError> {
    ask_with(path, request, &[], deadline)
}

/// The same with descriptors.
///
/// # Errors
///
/// As [`ask`].
pub fn ask_with(
    path: &Path,
    request: &ControlRequest,
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<ControlReply, FrameError> {
    let left = || -> Result<Duration, io::Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    };
    let socket = connect(path, left()?)?;
    // The agent makes these sockets listen; what another user put there is not a disk process of ours.
    if !peer::is_trusted(&socket)? {
        return Err(FrameError::Io(io::ErrorKind::PermissionDenied.into()));
    }
    socket.set_write_timeout(Some(left()?))?;
    send(&socket, request, fds)?;
    socket.set_read_timeout(Some(left()?))?;
    receive(&socket)
}

/// Connects, and waits no longer than `timeout` for room in the listener's queue; the standard library would wait
/// for ever.
fn connect(path: &Path, timeout: Duration) -> Result<UnixStream, io::Error> {
    let name = path.as_os_str().as_bytes();
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    if name.len() >= address.sun_path.len() || name.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::AF_UNIX as _;
    for (to, from) in address.sun_path.iter_mut().zip(name) {
        *to = *from as _;
    }
    // SAFETY: no pointers; on success the descriptor is new and belongs to nobody else.
    let socket = unsafe {
        match libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) {
            -1 => return Err(io::Error::last_os_error()),
            fd => UnixStream::from_raw_fd(fd),
        }
    };
    // The kernel bounds connect() on a unix socket by the send time-out.
    socket.set_write_timeout(Some(timeout))?;
    // SAFETY: `address` is a sockaddr_un with a terminated path, and its own size is passed.
    let connected = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of_val(&address) as libc::socklen_t,
        )
    };
    if connected == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// One sendmsg with the descriptors; gives the bytes that went out.
fn send_with_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, FrameError> {
    if fds.len() > MAX_FDS {
        return Err(FrameError::TooManyFds { fds: fds.len() });
    }
    let payload = mem::size_of_val(fds) as u32;
    // SAFETY: CMSG_SPACE only computes a size.
    let space = unsafe { libc::CMSG_SPACE(payload) } as usize;
    // u64 elements, so that the buffer is aligned as cmsghdr demands.
    let mut control = vec![0u64; space.div_ceil(8)];
    let mut slice = IoSlice::new(bytes);
    // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = (&raw mut slice).cast();
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = space as _;
    // SAFETY: `message` describes a control buffer of CMSG_SPACE(payload) bytes that outlives this block, so the first
    // header exists, lies in it, aligned, and has room for `payload` bytes of data; RawFd is a plain integer.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(payload) as _;
        let data: *mut RawFd = libc::CMSG_DATA(header).cast();
        for (i, fd) in fds.iter().enumerate() {
            data.add(i).write_unaligned(fd.as_raw_fd());
        }
    }
    loop {
        // SAFETY: the socket is open, `message` and all it points to live until the call returns; IoSlice has the
        // layout of iovec (documented), and the kernel only reads through it.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        if sent >= 0 {
            return Ok(sent as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_reads_back() {
        let (a, b) = UnixStream::pair().unwrap();
        let request = ControlRequest::Stop { force: true };
        send(&a, &request, &[]).unwrap();
        assert_eq!(receive::<ControlRequest>(&b).unwrap(), request);
    }

    #[test]
    fn length_over_the_limit_is_refused_before_anything_is_read() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(receive::<ControlRequest>(&b), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn garbage_is_no_frame() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(b"\x04\0\0\0{{{{").unwrap();
        assert!(matches!(receive::<ControlReply>(&b), Err(FrameError::Json(_))));
    }

    #[test]
    fn peer_that_closes_early_is_an_error() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(b"\x40\0\0\0{").unwrap();
        drop(a);
        assert!(matches!(receive::<ControlReply>(&b), Err(FrameError::Io(_))));
    }

    #[test]
    fn descriptors_travel_with_the_frame() {
        use std::os::fd::{AsFd, OwnedFd};
        let (a, b) = UnixStream::pair().unwrap();
        let (passed, other_end) = UnixStream::pair().unwrap();
        send(&a, &ControlRequest::Status, &[passed.as_fd(), a.as_fd()]).unwrap();
        drop(passed);

        let mut bytes = [0u8; 256];
        let mut control = [0u64; 8];
        let mut slice = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: all-zero is a valid msghdr; the pointers set below outlive the call.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = &mut slice;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = mem::size_of_val(&control) as _;
        // SAFETY: as above; on success the first header, if any, lies in `control`, and holds descriptors nobody else owns.
        let (len, first) = unsafe {
            let len = libc::recvmsg(b.as_raw_fd(), &mut message, 0);
            let header = libc::CMSG_FIRSTHDR(&message);
            assert!(!header.is_null());
            assert_eq!((*header).cmsg_len as u32, libc::CMSG_LEN(8));
            let fds: *const RawFd = libc::CMSG_DATA(header).cast();
            drop(OwnedFd::from_raw_fd(fds.add(1).read_unaligned()));
            (len, OwnedFd::from_raw_fd(fds.read_unaligned()))
        };
        assert_eq!(&bytes[..len as usize], b"\x10\0\0\0{\"ask\":\"status\"}");
        (&UnixStream::from(first)).write_all(b"!").unwrap();
        let mut byte = [0u8];
        (&other_end).read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"!");
    }
}
