//! The socket of the front end: whole messages in, answers out, descriptors with both; and the channel on which the
//! front end hears of us.
//!
//! Descriptors arrive close-on-exec. What is more than [`message::MAX_FDS`] of them is closed by the kernel, and the
//! connection ends.

use std::{
    io::{self, Read},
    mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use vhost::vhost_user::message::BackendReq;

use super::{
    VhostUserError,
    message::{self, HEADER, Header, MAX_FDS},
};

/// Room for the ancillary data of [`MAX_FDS`] descriptors, in words so that it is aligned as `cmsghdr` must be.
// SAFETY: CMSG_SPACE is arithmetic on its argument only.
const ANCILLARY_WORDS: usize =
    (unsafe { libc::CMSG_SPACE((MAX_FDS * mem::size_of::<RawFd>()) as u32) } as usize).div_ceil(8);

/// A message as it came.
pub(super) struct Incoming {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// Waits for a message; `None` at the end.
pub(super) fn receive(stream: &UnixStream) -> Result<Option<Incoming>, VhostUserError> {
    let mut bytes = [0; HEADER];
    let (got, fds) = receive_first(stream, &mut bytes)?;
    if got == 0 {
        return Ok(None);
    }
    let mut reader = stream;
    let rest = bytes.get_mut(got..).unwrap_or_default();
    reader.read_exact(rest)?;
    let header = Header::parse(&bytes)?;
    let mut body = vec![0; header.len];
    reader.read_exact(&mut body)?;
    Ok(Some(Incoming { header, body, fds }))
}

/// What comes first, and the descriptors that came with its first byte.
fn receive_first(
    stream: &UnixStream,
    bytes: &mut [u8; HEADER],
) -> Result<(usize, Vec<OwnedFd>), VhostUserError> {
    let mut ancillary = [0u64; ANCILLARY_WORDS];
    let received = crate::descriptors::receive_with_fds(stream.as_fd(), bytes, &mut ancillary)?;
    if received.truncated {
        return Err(VhostUserError::TooManyDescriptors);
    }
    Ok((received.bytes, received.fds))
}

/// Sends an answer, with a descriptor if there is one.
pub(super) fn send(
    stream: &UnixStream,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), VhostUserError> {
    let mut rest = bytes;
    let mut fd = fd;
    while !rest.is_empty() {
        let sent = send_some(stream, rest, fd, 0)?;
        rest = rest.get(sent..).unwrap_or_default();
        fd = None;
    }
    Ok(())
}

fn send_some(
    stream: &UnixStream,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
    flags: libc::c_int,
) -> io::Result<usize> {
    let mut ancillary = [0u64; 4];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: a msghdr of zeros is a valid empty one.
    let mut head: libc::msghdr = unsafe { mem::zeroed() };
    head.msg_iov = &mut part;
    head.msg_iovlen = 1;
    if let Some(fd) = fd {
        head.msg_control = ancillary.as_mut_ptr().cast();
        // SAFETY: the macros do arithmetic on `head` and its buffer, which has room for one header and one descriptor.
        unsafe {
            head.msg_controllen = libc::CMSG_SPACE(mem::size_of::<RawFd>() as u32) as usize;
            let header = libc::CMSG_FIRSTHDR(&head);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(mem::size_of::<RawFd>() as u32) as usize;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd.as_raw_fd());
        }
    }
    loop {
        // SAFETY: `head` describes `bytes` and `ancillary`, valid for the call, which does not write to them.
        let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &head, libc::MSG_NOSIGNAL | flags) };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// The way on which the front end hears of us.
#[derive(Debug)]
pub(super) struct BackendChannel(UnixStream);

impl BackendChannel {
    /// `None` if it is no socket.
    pub(super) fn new(fd: OwnedFd) -> Option<Self> {
        let stream = UnixStream::from(fd);
        crate::descriptors::peer_of(&stream).is_ok().then_some(Self(stream))
    }

    /// Tells that the configuration space changed. Never waits: a front end that does not listen does not get it.
    pub(super) fn tell_config_changed(&self) -> io::Result<()> {
        let bytes = message::frame(BackendReq::CONFIG_CHANGE_MSG.into(), 0, &[]);
        match send_some(&self.0, &bytes, None, libc::MSG_DONTWAIT)? {
            sent if sent == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}
