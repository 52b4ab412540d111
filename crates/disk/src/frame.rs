//! One frame over a unix stream socket: a length (u32, little-endian), that many bytes of JSON, and file descriptors
//! that travel with its first byte (SCM_RIGHTS).
//!
//! Blocking, and bounded before anything is decoded: [`MAX_FRAME`] bytes, [`MAX_FDS`] descriptors, which arrive
//! close-on-exec. Descriptors that come with any later byte of a frame are closed by the kernel.

use std::{
    io::{self, Read, Write},
    mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use serde::{Serialize, de::DeserializeOwned};
use vmseal_model::control::MAX_FRAME;

use crate::descriptors;

/// Most descriptors with one frame: the kernel's own limit (SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// Room for the ancillary data of [`MAX_FDS`] descriptors, in words so that it is aligned as `cmsghdr` must be.
// SAFETY: CMSG_SPACE is arithmetic on its argument only.
const ANCILLARY_WORDS: usize =
    (unsafe { libc::CMSG_SPACE((MAX_FDS * mem::size_of::<RawFd>()) as u32) } as usize).div_ceil(8);

/// Why a frame could not be sent or received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`].
    #[error("frame of {bytes} bytes; at most {MAX_FRAME} are allowed")]
    TooLong {
        /// What it says it is.
        bytes: usize,
    },
    /// More than [`MAX_FDS`] descriptors, or more than there was room for.
    #[error("frame with too many descriptors; at most {MAX_FDS} are allowed")]
    TooManyDescriptors,
    /// The other end closed in the middle.
    #[error("frame cut short")]
    Truncated,
    /// Not the JSON that was expected.
    #[error("frame is not what was expected")]
    Json(#[source] serde_json::Error),
    /// The socket failed.
    #[error("control socket failed")]
    Socket(#[source] io::Error),
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Socket(error),
        }
    }
}

/// A frame nobody has looked into yet.
#[derive(Debug)]
pub struct RawFrame {
    /// Its JSON.
    pub body: Vec<u8>,
    /// Its descriptors, in order.
    pub fds: Vec<OwnedFd>,
}

/// Sends a message with descriptors.
///
/// # Errors
///
/// [`FrameError`]; the other end may have got a part.
pub fn send<T: Serialize>(
    socket: &UnixStream,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), FrameError> {
    send_raw(socket, &serde_json::to_vec(message).map_err(FrameError::Json)?, fds)
}

/// Sends bytes that are a frame's JSON already.
///
/// # Errors
///
/// As [`send`].
pub fn send_raw(socket: &UnixStream, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
    if body.len() > MAX_FRAME {
        return Err(FrameError::TooLong { bytes: body.len() });
    }
    if fds.len() > MAX_FDS {
        return Err(FrameError::TooManyDescriptors);
    }
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(body);
    let sent = send_with_fds(socket, &bytes, fds)?;
    let mut socket = socket;
    Ok(socket.write_all(bytes.get(sent..).unwrap_or_default())?)
}

/// Receives a message and its descriptors; `None` if the other end closed between frames.
///
/// # Errors
///
/// [`FrameError`]; descriptors that came are closed.
pub fn receive<T: DeserializeOwned>(socket: &UnixStream) -> Result<Option<(T, Vec<OwnedFd>)>, FrameError> {
    let Some(frame) = receive_raw(socket)? else { return Ok(None) };
    let message = serde_json::from_slice(&frame.body).map_err(FrameError::Json)?;
    Ok(Some((message, frame.fds)))
}

/// Receives a frame without looking into its JSON; `None` if the other end closed between frames.
///
/// # Errors
///
/// As [`receive`].
pub fn receive_raw(socket: &UnixStream) -> Result<Option<RawFrame>, FrameError> {
    let mut length = [0u8; 4];
    let (got, fds) = receive_with_fds(socket, &mut length)?;
    if got == 0 {
        return Ok(None);
    }
    let mut socket = socket;
    socket.read_exact(length.get_mut(got..).unwrap_or_default())?;
    let bytes = u32::from_le_bytes(length) as usize;
    if bytes > MAX_FRAME {
        return Err(FrameError::TooLong { bytes });
    }
    let mut body = vec![0; bytes];
    socket.read_exact(&mut body)?;
    Ok(Some(RawFrame { body, fds }))
}

/// Sends a first part of `bytes` with all of `fds`; gives how many bytes went.
pub(crate) fn send_with_fds(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, FrameError> {
    let mut ancillary = [0u64; ANCILLARY_WORDS];
    let mut part = libc::iovec { iov_base: bytes.as_ptr() as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: msghdr is plain data; all zero is its empty value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let payload = mem::size_of_val(fds);
        debug_assert_eq!(payload, fds.len() * mem::size_of::<RawFd>());
        message.msg_control = ancillary.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE and CMSG_LEN are arithmetic. `ancillary` holds CMSG_SPACE of MAX_FDS descriptors,
        // aligned, and fds.len() <= MAX_FDS was checked, so the first header and its data lie inside. BorrowedFd is
        // repr(transparent) over RawFd, so the slice is an array of ints.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(payload as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload as u32) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(header), payload);
        }
    }
    loop {
        // SAFETY: `message` points at `part`, `bytes` and `ancillary`, which outlive the call; sendmsg only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => retry_if_interrupted()?,
        }
    }
}

/// Receives up to `bytes.len()` bytes and whatever descriptors come with them.
pub(crate) fn receive_with_fds(
    socket: &UnixStream,
    bytes: &mut [u8],
) -> Result<(usize, Vec<OwnedFd>), FrameError> {
    let mut ancillary = [0u64; ANCILLARY_WORDS];
    let received = descriptors::receive_with_fds(socket.as_fd(), bytes, &mut ancillary)?;
    if received.truncated {
        return Err(FrameError::TooManyDescriptors);
    }
    Ok((received.bytes, received.fds))
}

fn retry_if_interrupted() -> Result<(), FrameError> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error.into()) }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::fd::{AsFd, AsRawFd},
        thread,
    };

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_frame_arrives_with_its_descriptors_in_order_and_close_on_exec() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        send(&a, &"hello", &[null.as_fd(), writer.as_fd()]).unwrap();
        send(&a, &"again", &[]).unwrap();
        let (text, fds) = receive::<String>(&b).unwrap().unwrap();
        assert_eq!((text.as_str(), fds.len()), ("hello", 2));
        for fd in &fds {
            // SAFETY: F_GETFD reads a flag of an open descriptor.
            assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) }, libc::FD_CLOEXEC);
        }
        File::from(fds.into_iter().nth(1).unwrap()).write_all(b"x").unwrap();
        drop(writer);
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert_eq!(got, "x");
        let (text, fds) = receive::<String>(&b).unwrap().unwrap();
        assert_eq!((text.as_str(), fds.len()), ("again", 0));
    }

    #[test]
    fn the_largest_frame_with_the_most_descriptors_arrives() {
        let (a, b) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        let body = vec![b' '; MAX_FRAME];
        let sender = thread::spawn(move || {
            let fds = vec![null.as_fd(); MAX_FDS];
            send_raw(&a, &body, &fds).unwrap();
        });
        let frame = receive_raw(&b).unwrap().unwrap();
        sender.join().unwrap();
        assert_eq!((frame.body.len(), frame.fds.len()), (MAX_FRAME, MAX_FDS));
    }

    #[test]
    fn what_is_too_long_is_refused_on_both_sides() {
        let (a, mut b) = UnixStream::pair().unwrap();
        assert!(matches!(send_raw(&a, &vec![0; MAX_FRAME + 1], &[]), Err(FrameError::TooLong { .. })));
        b.write_all(&(MAX_FRAME as u32 + 1).to_le_bytes()).unwrap();
        assert!(matches!(receive_raw(&a), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn an_end_between_frames_is_not_an_end_within_one() {
        let (a, b) = UnixStream::pair().unwrap();
        drop(a);
        assert!(receive_raw(&b).unwrap().is_none());
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[9, 0, 0, 0, b'x']).unwrap();
        drop(a);
        assert!(matches!(receive_raw(&b), Err(FrameError::Truncated)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_receiver_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(&bytes).unwrap();
            drop(a);
            while let Ok(Some(_)) = receive::<vmseal_model::control::ControlRequest>(&b) {}
        }
    }
}
