//! From root to a user of its own that can get no privilege and open no file. There is no way back.
//!
//! Entered when everything was read and before the first client. What stays: descriptors that are open, unix sockets by
//! name (the export), time. Landlock knows no rule for connecting to a unix socket; by TCP nothing is connected to.

use std::{
    ffi::CString,
    io,
    net::TcpListener,
    os::fd::{FromRawFd, OwnedFd},
};

use crate::seccomp;

/// Why it may not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfineError {
    /// Root without `--user`.
    #[error("it does not serve the network as root; give --user, or start it as a user of its own")]
    Root,
    /// No such user.
    #[error("there is no user {0:?}; create it or change --user")]
    NoUser(String),
    /// Not a listening socket.
    #[error("descriptor {number} is no listening TCP socket: {cause}; see --listen-fd")]
    NoListener {
        /// Its number.
        number: i32,
        /// Why.
        cause: io::Error,
    },
    /// A wall cannot be put up.
    #[error("{what}: {cause}")]
    Wall {
        /// What failed.
        what: &'static str,
        /// The kernel's word.
        cause: io::Error,
    },
}

/// Which walls stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walls {
    /// Version of landlock's interface; 0 if this kernel has none.
    pub landlock: u32,
    /// Whether system calls are filtered.
    pub seccomp: bool,
}

/// No core dump and no tracer: for the private key, before it is read.
///
/// # Errors
///
/// [`ConfineError::Wall`].
pub fn harden() -> Result<(), ConfineError> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a limit that is read during the call.
    wall("core dumps cannot be forbidden", unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) })?;
    undumpable()
}

fn undumpable() -> Result<(), ConfineError> {
    // SAFETY: integers.
    wall("tracing cannot be forbidden", unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })
}

/// The listening TCP socket with this number, which is handed over by it.
///
/// # Errors
///
/// [`ConfineError::NoListener`].
pub fn listener(number: i32) -> Result<TcpListener, ConfineError> {
    let bad = |cause| ConfineError::NoListener { number, cause };
    let is = |option: libc::c_int| -> io::Result<libc::c_int> {
        let (mut value, mut size) = (0, size_of::<libc::c_int>() as libc::socklen_t);
        // SAFETY: an int and its size, filled in by the call.
        let got = unsafe {
            libc::getsockopt(number, libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut size)
        };
        if got == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
    };
    let internet = [libc::AF_INET, libc::AF_INET6].contains(&is(libc::SO_DOMAIN).map_err(bad)?);
    let stream = is(libc::SO_PROTOCOL).map_err(bad)? == libc::IPPROTO_TCP;
    if !internet || !stream || is(libc::SO_ACCEPTCONN).map_err(bad)? == 0 {
        return Err(bad(io::Error::other("it is something else")));
    }
    // SAFETY: the descriptor is open, and was handed over to be ours.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(false).map_err(bad)?;
    Ok(listener)
}

/// Becomes `user`, if it is root, and puts up every wall that this kernel has. One thread only.
///
/// # Errors
///
/// [`ConfineError`]. That a kernel lacks landlock or seccomp is no error.
pub fn enter(user: Option<&str>) -> Result<Walls, ConfineError> {
    // SAFETY: geteuid has no arguments and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        become_user(user.ok_or(ConfineError::Root)?)?;
    }
    // SAFETY: integers.
    wall("new privileges cannot be forbidden", unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    })?;
    // A change of user switches it on again.
    undumpable()?;
    let landlock =
        landlock().map_err(|cause| ConfineError::Wall { what: "landlock cannot be set up", cause })?;
    let seccomp =
        seccomp::enter().map_err(|cause| ConfineError::Wall { what: "seccomp cannot be set up", cause })?;
    Ok(Walls { landlock, seccomp })
}

/// With the groups that the user has: one of them lets it reach the export's socket.
fn become_user(name: &str) -> Result<(), ConfineError> {
    let no_user = || ConfineError::NoUser(name.to_owned());
    let name_c = CString::new(name).map_err(|_| no_user())?;
    // SAFETY: a terminated name; the process has one thread, so the entry stays as long as it is looked at.
    let (uid, gid) = unsafe {
        let entry = libc::getpwnam(name_c.as_ptr());
        if entry.is_null() {
            return Err(no_user());
        }
        ((*entry).pw_uid, (*entry).pw_gid)
    };
    if uid == 0 {
        return Err(ConfineError::Root);
    }
    // SAFETY: a terminated name and integers.
    wall("groups cannot be set", unsafe { libc::initgroups(name_c.as_ptr(), gid) })?;
    // SAFETY: integers.
    wall("the group cannot be set", unsafe { libc::setresgid(gid, gid, gid) })?;
    // SAFETY: integers. With it go all capabilities.
    wall("the user cannot be set", unsafe { libc::setresuid(uid, uid, uid) })
}

fn wall(what: &'static str, result: libc::c_int) -> Result<(), ConfineError> {
    if result == 0 {
        return Ok(());
    }
    Err(ConfineError::Wall { what, cause: io::Error::last_os_error() })
}

#[repr(C)]
struct RulesetAttributes {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// Forbids every file, TCP and signals outwards, as far as the kernel can; gives the version of its interface. Source:
/// <https://docs.kernel.org/userspace-api/landlock.html>.
fn landlock() -> io::Result<u32> {
    const VERSION: u32 = 1;
    // SAFETY: no attributes, as this flag demands.
    let abi = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0 as libc::size_t, VERSION)
    };
    let Ok(abi) = u32::try_from(abi) else {
        return match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(0),
            error => Err(error),
        };
    };
    let (files, bytes): (u32, usize) = match abi {
        1 => (13, 8),
        2 => (14, 8),
        3 => (15, 8),
        4 => (15, 16),
        5 => (16, 16),
        _ => (16, 24),
    };
    let attributes = RulesetAttributes {
        handled_access_fs: (1 << files) - 1,
        handled_access_net: 0b11,
        // Abstract unix sockets and signals.
        scoped: 0b11,
    };
    // SAFETY: `bytes` of `attributes`, which is at least as long; on success the descriptor is new and ours alone, and is
    // an argument of the second call.
    unsafe {
        let fd = libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, bytes, 0u32);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let ruleset = OwnedFd::from_raw_fd(fd as i32);
        if libc::syscall(libc::SYS_landlock_restrict_self, std::os::fd::AsRawFd::as_raw_fd(&ruleset), 0u32)
            != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(abi)
}
