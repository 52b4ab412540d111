//! Frames to and from the worker: a length (u32, little-endian) and that many bytes of JSON; a descriptor travels with the
//! first byte.

use std::{
    io::{self, Read, Write},
    mem,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::net::UnixStream,
    },
};

use vmseal_model::{
    control::MAX_FRAME,
    ublk::{WardenSays, WorkerSays},
};

/// Why nothing could be said or heard.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TalkError {
    /// The connection ended.
    #[error("the connection to the worker ended")]
    Ended,
    /// It failed.
    #[error("the connection to the worker failed")]
    Io(#[source] io::Error),
    /// Not what a worker says.
    #[error(
        "the worker says what this warden does not understand; install one release of vmseal on this host"
    )]
    Unknown(#[source] serde_json::Error),
    /// Longer than any message.
    #[error("the worker says {bytes} bytes at once")]
    TooLong {
        /// How many.
        bytes: usize,
    },
}

impl From<io::Error> for TalkError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Self::Ended
            }
            _ => Self::Io(error),
        }
    }
}

/// Says something, with a descriptor or without.
///
/// # Errors
///
/// [`TalkError`].
pub fn say(stream: &UnixStream, what: &WardenSays, fd: Option<&impl AsFd>) -> Result<(), TalkError> {
    let body = serde_json::to_vec(what).map_err(TalkError::Unknown)?;
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(body);
    let sent = match fd {
        Some(fd) => send_with_fd(stream, &bytes, fd.as_fd().as_raw_fd())?,
        None => 0,
    };
    let mut stream = stream;
    Ok(stream.write_all(bytes.get(sent..).unwrap_or_default())?)
}

/// Hears the next message.
///
/// # Errors
///
/// [`TalkError`].
pub fn hear(stream: &UnixStream) -> Result<WorkerSays, TalkError> {
    let mut stream = stream;
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let bytes = u32::from_le_bytes(length) as usize;
    if bytes > MAX_FRAME {
        return Err(TalkError::TooLong { bytes });
    }
    let mut body = vec![0; bytes];
    stream.read_exact(&mut body)?;
    serde_json::from_slice(&body).map_err(TalkError::Unknown)
}

/// Sends a first part of `bytes` with a descriptor; gives how many bytes went.
fn send_with_fd(stream: &UnixStream, bytes: &[u8], fd: RawFd) -> io::Result<usize> {
    const FD_BYTES: u32 = mem::size_of::<RawFd>() as u32;
    // In words, so that it is aligned as `cmsghdr` must be.
    let mut ancillary = [0u64; 8];
    let mut part = libc::iovec { iov_base: bytes.as_ptr() as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: msghdr is plain data; all zero is its empty value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = ancillary.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE of one descriptor is 24 bytes, which `ancillary` has, aligned: the header and its data lie inside.
    unsafe {
        message.msg_controllen = libc::CMSG_SPACE(FD_BYTES) as _;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(FD_BYTES) as _;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
    }
    loop {
        // SAFETY: `message` points at `part`, `bytes` and `ancillary`, which outlive the call; sendmsg only reads them.
        let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_that_babbles_is_not_listened_to() {
        let talk = |bytes: &[u8]| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(bytes).unwrap();
            drop(theirs);
            hear(&ours)
        };
        let frame = |text: &str| [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
        assert_eq!(talk(&frame(r#"{"say":"serving"}"#)).unwrap(), WorkerSays::Serving);
        assert!(matches!(talk(&[]), Err(TalkError::Ended)));
        assert!(matches!(talk(&[9, 0, 0, 0, b'{']), Err(TalkError::Ended)));
        assert!(matches!(talk(&[255; 4]), Err(TalkError::TooLong { .. })));
        assert!(matches!(talk(&frame(r#"{"say":"sing"}"#)), Err(TalkError::Unknown(_))));
    }

    #[test]
    fn what_is_said_arrives_with_its_descriptor() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        say(&ours, &WardenSays::Keep, Some(&ours)).unwrap();
        say(&ours, &WardenSays::Started, None::<&UnixStream>).unwrap();
        drop(ours);
        let mut heard = Vec::new();
        (&theirs).read_to_end(&mut heard).unwrap();
        let text = String::from_utf8_lossy(&heard);
        assert!(text.contains(r#"{"say":"keep"}"#) && text.ends_with(r#"{"say":"started"}"#), "{text}");
    }
}
