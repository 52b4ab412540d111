//! The descriptors a process is born with: 0 to 2, and the setup socket on 3. Everything else is closed at once, so
//! that nothing an agent forgot to mark close-on-exec lives on beside keys.

use std::{
    io, mem,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd},
        unix::net::UnixStream,
    },
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

/// Whether the other end of a socket closed its side.
pub fn hung_up(socket: &UnixStream) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one pollfd, valid for the call, which returns at once.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready == 1 && poll.revents & (libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR) != 0
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
