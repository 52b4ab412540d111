//! The order to end, as a descriptor, and waiting for it together with others.

use std::{
    fs::File,
    io::{self, Read},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd},
    time::Duration,
};

/// SIGTERM and SIGINT, blocked so that they wait here.
pub struct Signals {
    file: File,
    asked: bool,
}

/// What a wait ended with.
#[derive(Debug, PartialEq, Eq)]
pub enum Woken {
    /// This process is to end. So every later wait says too.
    Asked,
    /// The descriptor with this place can be read, or has ended.
    Ready(usize),
    /// The time is over.
    Over,
}

impl Signals {
    /// Blocks them, in this thread and those it starts.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn block() -> io::Result<Self> {
        // SAFETY: sigset_t is plain data that sigemptyset initialises; the calls touch only `set`. The descriptor is new
        // and ours alone. Ignoring a signal installs no handler.
        unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGTERM);
            libc::sigaddset(&mut set, libc::SIGINT);
            if libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { file: File::from_raw_fd(fd), asked: false })
        }
    }

    /// Waits for one of these descriptors, for the order to end, or until the time is over. The order comes first.
    pub fn wait<const N: usize>(
        &mut self,
        fds: [Option<BorrowedFd<'_>>; N],
        limit: Option<Duration>,
    ) -> Woken {
        if self.asked {
            return Woken::Asked;
        }
        // A negative descriptor is passed over.
        let one = |fd: Option<BorrowedFd<'_>>| libc::pollfd {
            fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut polls: Vec<_> = fds.into_iter().chain([Some(self.file.as_fd())]).map(one).collect();
        let limit = limit.map_or(-1, |limit| limit.as_millis().min(60_000) as libc::c_int);
        // SAFETY: as many as said. On an error, which is an interruption, no field is changed.
        unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, limit) };
        if polls.last().is_some_and(|poll| poll.revents != 0) {
            let mut info = [0; mem::size_of::<libc::signalfd_siginfo>()];
            self.asked = (&self.file).read_exact(&mut info).is_ok();
            if self.asked {
                return Woken::Asked;
            }
        }
        let ready = polls.iter().take(N).position(|poll| poll.revents != 0);
        ready.map_or(Woken::Over, Woken::Ready)
    }
}

/// Has standard output go nowhere: whoever waited for a line on it hears that no other comes.
///
/// # Errors
///
/// The kernel's.
pub fn close_stdout() -> io::Result<()> {
    let nowhere = File::options().write(true).open("/dev/null")?;
    // SAFETY: both descriptors are open; nothing in this process owns standard output.
    if unsafe { libc::dup2(nowhere.as_raw_fd(), libc::STDOUT_FILENO) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
