//! Eventfds the front end gave us: one tells us of new chains, others are told by us.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A descriptor that can only be an eventfd or the like: anonymous inodes have no file type. What can block or fail in
/// other ways (files, sockets, terminals) is refused.
pub(super) fn is_eventfd(fd: &OwnedFd) -> bool {
    // SAFETY: stat is plain data; the kernel fills it.
    unsafe {
        let mut stat: libc::stat = mem::zeroed();
        libc::fstat(fd.as_raw_fd(), &mut stat) == 0 && stat.st_mode & libc::S_IFMT == 0
    }
}

/// An eventfd that is told. It may be exchanged while a queue runs.
#[derive(Debug, Clone, Default)]
pub(super) struct Notifier(Arc<Mutex<Option<OwnedFd>>>);

impl Notifier {
    /// Uses this one from now on. It blocks nobody any more, as QEMU's do not: one that is full must not hold up a queue.
    pub(super) fn set(&self, fd: Option<OwnedFd>) {
        if let Some(fd) = &fd {
            // SAFETY: flags of a descriptor that is open.
            unsafe {
                let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
                libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK);
            }
        }
        *self.fd() = fd;
    }

    /// Tells; a front end that polls, or went away, is not told.
    pub(super) fn tell(&self) {
        if let Some(fd) = &*self.fd() {
            ring(fd.as_fd());
        }
    }

    fn fd(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds one to an eventfd. That it is full means that it was told already.
fn ring(fd: BorrowedFd<'_>) {
    let one = 1u64.to_ne_bytes();
    loop {
        // SAFETY: eight bytes of our own.
        let wrote = unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        if wrote >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}
