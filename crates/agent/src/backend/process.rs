//! A process of ours, such as a keeper: a handle that never means another one, although its pid may be given away again.
//!
//! A pid in, a pidfd kept. Only processes of the user they run as are taken on trust from a pid that somebody told us,
//! since the handle can kill.

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

/// The process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    handle: OwnedFd,
}

impl Process {
    /// The process with this pid now.
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: numbers only; on success the descriptor is new and ours alone.
        let handle = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0 as libc::c_long);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd as i32)
        };
        Ok(Self { pid, handle })
    }

    /// The process, if it runs as `uid`; for a pid that was told and not got from our own fork.
    pub(crate) fn open_of(pid: i32, uid: u32) -> io::Result<Self> {
        if pid <= 1 {
            return Err(io::Error::other("it is no process of ours"));
        }
        let process = Self::open(pid)?;
        // Read after the handle was got: if the process ended between the two, the handle says so.
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let real = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        let real = real.and_then(|uids| uids.split_whitespace().next()?.parse::<u32>().ok());
        if real == Some(uid) { Ok(process) } else { Err(io::Error::other("it runs as another user")) }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until it has ended; false if it has not by then.
    pub(crate) fn wait_until(&self, deadline: Option<Instant>) -> bool {
        loop {
            let timeout = deadline.map_or(-1, |d| {
                let left = d.saturating_duration_since(Instant::now());
                // Rounded up, so that the last look is not before the deadline.
                i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
            });
            let mut poll = libc::pollfd { fd: self.handle.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd, valid during the call, with a descriptor that is open.
            let ready = unsafe { libc::poll(&mut poll, 1, timeout) };
            if ready > 0 {
                return true;
            }
            let interrupted = ready < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
            if !interrupted && deadline.is_some_and(|d| Instant::now() >= d) {
                return false;
            }
        }
    }

    /// Waits so long.
    pub(crate) fn wait_for(&self, timeout: Duration) -> bool {
        self.wait_until(Some(Instant::now() + timeout))
    }

    /// Ends it at once; its worker goes with it. One that has ended already is no error.
    pub(crate) fn kill(&self) {
        self.signal(libc::SIGKILL);
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        self.signal(libc::SIGTERM);
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: an open pidfd, a signal's number, no signal information.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.handle.as_raw_fd() as libc::c_long,
                libc::c_long::from(signal),
                0 as libc::c_long,
                0 as libc::c_long,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn killed_process_is_seen_to_end() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        assert!(!process.wait_for(Duration::ZERO));
        process.kill();
        assert!(process.wait_until(None));
        child.wait().unwrap();
        process.kill();
    }

    #[test]
    fn told_pid_must_be_of_the_user() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id() as i32;
        // SAFETY: takes nothing and cannot fail.
        let uid = unsafe { libc::getuid() };
        assert!(Process::open_of(pid, uid).is_ok());
        assert!(Process::open_of(pid, uid + 1).is_err());
        assert!(Process::open_of(1, 0).is_err());
        assert!(Process::open_of(-1, uid).is_err());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
