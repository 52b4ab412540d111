//! The descriptors a process is born with: 0 to 2, and the setup socket on 3. Everything else is closed at once, so
//! that nothing an agent forgot to mark close-on-exec lives on beside keys.

use std::{
    io, mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use vmseal_model::control::SETUP_FD;

/// Takes the setup socket and closes every descriptor above it.
///
/// # Errors
///
/// Descriptor 3 is not a socket: the program was started by hand.
///
/// # Safety
///
/// To be called first in `main` and once: nothing else in the process may own a descriptor from 3 up.
pub unsafe fn take_setup_socket() -> io::Result<UnixStream> {
    // SAFETY: the caller promises that no descriptor above SETUP_FD has an owner.
    if unsafe { libc::close_range(SETUP_FD as u32 + 1, u32::MAX, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    socket_option::<libc::c_int>(SETUP_FD, libc::SO_TYPE)?;
    // SAFETY: it is an open socket, and by the caller's promise has no other owner.
    let socket = unsafe { UnixStream::from_raw_fd(SETUP_FD) };
    // SAFETY: F_SETFD sets a flag of a descriptor that is open.
    if unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.set_nonblocking(false)?;
    Ok(socket)
}

/// Who is at the other end of a unix socket: for a connection who connected, for a pair who made it.
///
/// # Errors
///
/// Not a unix socket.
pub fn peer_of(socket: &impl AsFd) -> io::Result<libc::ucred> {
    socket_option(socket.as_fd().as_raw_fd(), libc::SO_PEERCRED)
}

/// A handle (pidfd) of the process at the other end of a connection, which never means another.
///
/// # Errors
///
/// Before Linux 6.5 there is none to be had.
pub fn peer_handle(socket: &impl AsFd) -> io::Result<OwnedFd> {
    let fd = socket_option::<libc::c_int>(socket.as_fd().as_raw_fd(), SO_PEERPIDFD)?;
    // SAFETY: the kernel made it for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// From asm/socket.h; the libc crate does not name it.
const SO_PEERPIDFD: libc::c_int = 77;

/// Whether a descriptor is a listening unix stream socket.
pub fn is_unix_listener(socket: &impl AsFd) -> bool {
    is_listener(socket, libc::SOCK_STREAM)
}

/// Whether a descriptor is a listening unix socket that keeps packets apart.
pub fn is_packet_listener(socket: &impl AsFd) -> bool {
    is_listener(socket, libc::SOCK_SEQPACKET)
}

fn is_listener(socket: &impl AsFd, kind: libc::c_int) -> bool {
    let fd = socket.as_fd().as_raw_fd();
    matches!(
        (
            socket_option::<libc::c_int>(fd, libc::SO_DOMAIN),
            socket_option::<libc::c_int>(fd, libc::SO_TYPE),
            socket_option::<libc::c_int>(fd, libc::SO_ACCEPTCONN)
        ),
        (Ok(libc::AF_UNIX), Ok(found), Ok(1)) if found == kind
    )
}

/// What one `recvmsg` gave.
pub(crate) struct Received {
    /// Bytes.
    pub(crate) bytes: usize,
    /// Descriptors that came with them; closed on exec.
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether there were more of these than `ancillary` has room for. They are closed already.
    pub(crate) truncated: bool,
}

/// Receives once, and the descriptors that come with it (SCM_RIGHTS), as many as `ancillary` has room for. It is in words
/// so that it is aligned as `cmsghdr` must be.
pub(crate) fn receive_with_fds(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    ancillary: &mut [u64],
) -> io::Result<Received> {
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data; all zero is its empty value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = ancillary.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(ancillary) as _;
    let bytes = loop {
        // SAFETY: `message` points at `part` (which points at `bytes`) and `ancillary` with their true lengths.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(got) {
            Ok(got) => break got,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel wrote well-formed control messages of msg_controllen bytes into `ancillary`; the CMSG macros
    // walk just these. Each int of an SCM_RIGHTS message is a descriptor this process now owns and nobody else uses.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while let Some(cmsg) = header.as_ref() {
            if cmsg.cmsg_level == libc::SOL_SOCKET && cmsg.cmsg_type == libc::SCM_RIGHTS {
                let payload = cmsg.cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for i in 0..payload / mem::size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    Ok(Received { bytes, fds, truncated: message.msg_flags & libc::MSG_CTRUNC != 0 })
}

/// Whether the other end of a socket closed its side.
pub fn hung_up(socket: &UnixStream) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one pollfd, valid for the call, which returns at once.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready == 1 && poll.revents & (libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR) != 0
}

/// Waits until a bell rings or the other end of a socket closes its side; whether it was that.
pub fn moved_or_hung_up(bell: BorrowedFd<'_>, socket: &UnixStream) -> bool {
    let entry = |fd: RawFd, events| libc::pollfd { fd, events, revents: 0 };
    let mut polls = [entry(bell.as_raw_fd(), libc::POLLIN), entry(socket.as_raw_fd(), libc::POLLRDHUP)];
    loop {
        // SAFETY: as many as said. On an error, which is an interruption, no field is changed.
        unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) };
        let [bell, socket] = &polls;
        if socket.revents != 0 {
            return true;
        }
        if bell.revents != 0 {
            return false;
        }
    }
}

/// Waits until one of the descriptors can be read or has ended; which. Longer limits than a minute are cut to that.
pub fn ready<const N: usize>(fds: [Option<BorrowedFd<'_>>; N], limit: Option<Duration>) -> [bool; N] {
    // A negative descriptor is passed over.
    let mut polls = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    let limit = limit.map_or(-1, |limit| limit.as_micros().div_ceil(1000).min(60_000) as libc::c_int);
    // SAFETY: as many as said. On an error, which is an interruption, no field is changed.
    unsafe { libc::poll(polls.as_mut_ptr(), N as libc::nfds_t, limit) };
    polls.map(|poll| poll.revents != 0)
}

/// A type that is plain bytes to the kernel.
trait Plain: Copy {}
impl Plain for libc::c_int {}
impl Plain for libc::ucred {}

fn socket_option<T: Plain>(fd: libc::c_int, option: libc::c_int) -> io::Result<T> {
    let mut length = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: T is plain data of integers (`Plain` is private and has two implementors); the kernel writes at most
    // `length` bytes, which is the size of T. A closed or foreign descriptor gives an error.
    unsafe {
        let mut value = mem::zeroed::<T>();
        let done = libc::getsockopt(fd, libc::SOL_SOCKET, option, (&raw mut value).cast(), &mut length);
        if done == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
    }
}

/// Blocks signals in the calling thread and those it starts later, to be taken by `sigwaitinfo`.
///
/// # Errors
///
/// The kernel's.
pub fn block_signals(signals: &[libc::c_int]) -> io::Result<libc::sigset_t> {
    // SAFETY: sigset_t is plain data that sigemptyset initialises; the calls touch only `set`.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        for &signal in signals {
            libc::sigaddset(&mut set, signal);
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
            0 => Ok(set),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::net::UnixListener};

    use super::*;

    #[test]
    fn the_maker_of_a_pair_is_its_peer() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = peer_of(&a).unwrap();
        assert_eq!(peer.pid as u32, std::process::id());
        assert!(peer_of(&File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn an_end_that_was_closed_has_hung_up() {
        let (a, b) = UnixStream::pair().unwrap();
        assert!(!hung_up(&a));
        drop(b);
        assert!(hung_up(&a));
    }

    #[test]
    fn only_a_listening_unix_socket_is_a_listener() {
        let path = std::env::temp_dir().join(format!("vmseal-listener-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(is_unix_listener(&listener));
        assert!(!is_unix_listener(&UnixStream::pair().unwrap().0));
        assert!(!is_unix_listener(&File::open("/dev/null").unwrap()));
    }
}
