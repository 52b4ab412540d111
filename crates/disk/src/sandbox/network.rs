//! A network that leads nowhere.

use std::{fs, io, os::fd::AsRawFd, os::fd::FromRawFd, os::fd::OwnedFd};

/// Moves the calling thread, and what it starts, into a network namespace of its own.
///
/// # Errors
///
/// EPERM for who lacks CAP_SYS_ADMIN.
pub fn leave() -> io::Result<()> {
    // SAFETY: a flag.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether any interface of this network namespace is up; true if that cannot be seen. A namespace nobody set up has
/// only interfaces that are down, the loopback among them.
pub fn has_interface_up() -> bool {
    let Ok(text) = fs::read_to_string("/proc/self/net/dev") else { return true };
    // SAFETY: integers; on success the descriptor is new and ours alone.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return true;
        }
        OwnedFd::from_raw_fd(fd)
    };
    let names = text.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim()));
    names.into_iter().any(|name| is_up(&socket, name))
}

fn is_up(socket: &OwnedFd, name: &str) -> bool {
    // SAFETY: plain data; all zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return true;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the request names an interface and ends in a zero; the kernel fills in the flags.
    unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) != 0
            || i32::from(request.ifr_ifru.ifru_flags) & libc::IFF_UP != 0
    }
}
