//! Who is at the other end of a unix socket.

use std::{
    io, mem,
    os::{fd::AsRawFd, unix::net::UnixStream},
};

/// Whether the other end is root or this process's own user. Of a socket that we connected to, that is who listens on
/// it, or made it listen before it handed it on.
///
/// # Errors
///
/// The kernel's.
pub fn is_trusted(socket: &UnixStream) -> io::Result<bool> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the socket is open; `peer` and `len` outlive the call and `len` is the size of `peer`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes nothing and cannot fail.
    Ok(peer.uid == 0 || peer.uid == unsafe { libc::geteuid() })
}
