//! Starts `vmseal-disk` as its own user, with one end of a socket pair as descriptor 3 and nothing else of ours; and
//! `vmseal-ublk`, with nothing.
//!
//! Program, mode and user in; a running child out. What is said over the socket is [`crate::job`]'s business and the
//! backend's.

use std::{
    ffi::{CStr, CString, OsString},
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use vmseal_model::control::SETUP_FD;

/// The user that disk processes run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceUser {
    /// User.
    pub uid: u32,
    /// Its group; there are no others.
    pub gid: u32,
}

/// How long a child lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// Killed when the thread that started it ends: a job.
    WithParent,
    /// In a session of its own, whatever becomes of the agent: a keeper.
    Own,
}

/// Why a disk process did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// The user is not there.
    #[error("there is no user {name}, as which disk processes run; create it or set disk_user in agent.toml")]
    NoUser {
        /// Its name.
        name: String,
    },
    /// The user database failed.
    #[error("cannot look up the user {name}")]
    Lookup {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The program.
    #[error("cannot start {}", program.display())]
    Start {
        /// Its path.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ServiceUser {
    /// The user of that name. `None` stands for this process's own user: if the name is empty, or if this process is
    /// not root and could not change anyway.
    ///
    /// # Errors
    ///
    /// [`SpawnError::NoUser`], [`SpawnError::Lookup`].
    pub fn find(name: &str) -> Result<Option<Self>, SpawnError> {
        // SAFETY: geteuid has no arguments and cannot fail.
        if name.is_empty() || unsafe { libc::geteuid() } != 0 {
            return Ok(None);
        }
        let no_user = || SpawnError::NoUser { name: name.to_owned() };
        let name_c = CString::new(name).map_err(|_| no_user())?;
        lookup(&name_c)
            .map_err(|source| SpawnError::Lookup { name: name.to_owned(), source })?
            .map(Some)
            .ok_or_else(no_user)
    }
}

fn lookup(name: &CStr) -> io::Result<Option<ServiceUser>> {
    // Grows up to this many bytes; entries are far smaller.
    const MOST: usize = 1 << 20;
    let mut buffer = vec![0 as libc::c_char; 4096];
    loop {
        // SAFETY: all-zero is a valid passwd: null pointers and numbers.
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found: *mut libc::passwd = std::ptr::null_mut();
        // SAFETY: `name` is terminated, `entry`, `buffer` with its own length and `found` outlive the call.
        let code = unsafe {
            libc::getpwnam_r(name.as_ptr(), &raw mut entry, buffer.as_mut_ptr(), buffer.len(), &raw mut found)
        };
        match code {
            0 if found.is_null() => return Ok(None),
            0 => return Ok(Some(ServiceUser { uid: entry.pw_uid, gid: entry.pw_gid })),
            libc::ERANGE if buffer.len() < MOST => buffer.resize(buffer.len() * 4, 0),
            libc::EINTR => {}
            code => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

/// Starts `program mode` with `setup` as descriptor 3.
///
/// # Errors
///
/// [`SpawnError::Start`].
pub fn spawn(
    program: &Path,
    mode: &str,
    setup: UnixStream,
    user: Option<ServiceUser>,
    lifetime: Lifetime,
    stderr: Stdio,
) -> Result<Child, SpawnError> {
    let start = || -> io::Result<Child> {
        // The standard library tells a failing exec through a pipe; were that pipe descriptor 3, dup2 would close it.
        let _taken = occupy(SETUP_FD)?;
        let from = setup.as_raw_fd();
        let mut command = Command::new(program);
        command
            .arg(mode)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        // SAFETY: between fork and exec only async-signal-safe calls are made, and nothing is allocated.
        unsafe {
            command.pre_exec(move || prepare_child(from, user, lifetime));
        }
        command.spawn()
    };
    start().map_err(|source| SpawnError::Start { program: program.to_owned(), source })
}

/// Starts `program args` as this process's own user in a session of its own, with nothing of ours open. What it says is on
/// the child's standard output.
///
/// # Errors
///
/// [`SpawnError::Start`].
pub fn spawn_apart(program: &Path, args: &[OsString], stderr: Stdio) -> Result<Child, SpawnError> {
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr);
    // SAFETY: between fork and exec only async-signal-safe calls are made, and nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            let check = |failed: bool| if failed { Err(io::Error::last_os_error()) } else { Ok(()) };
            let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_long;
            let all = (SETUP_FD as libc::c_long, u32::MAX as libc::c_long);
            check(libc::syscall(libc::SYS_close_range, all.0, all.1, flags) < 0)?;
            check(libc::setsid() < 0)
        });
    }
    command.spawn().map_err(|source| SpawnError::Start { program: program.to_owned(), source })
}

/// Runs in the child.
fn prepare_child(setup: i32, user: Option<ServiceUser>, lifetime: Lifetime) -> io::Result<()> {
    let check = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: system calls on descriptors of this process, without pointers. Descriptors from 4 on stay open until exec
    // closes them, the standard library's own among them.
    unsafe {
        check(libc::dup2(setup, SETUP_FD).into())?;
        let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_long;
        check(libc::syscall(
            libc::SYS_close_range,
            (SETUP_FD + 1) as libc::c_long,
            u32::MAX as libc::c_long,
            flags,
        ))?;
        if let Some(user) = user {
            // No network. Only root can; where it cannot either, in a container, the child says so in its status.
            libc::unshare(libc::CLONE_NEWNET);
            // The limit on pinned and locked memory counts all disk processes together, so what one may have says little.
            let all = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
            libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const all);
            check(libc::setgroups(0, std::ptr::null()).into())?;
            check(libc::setresgid(user.gid, user.gid, user.gid).into())?;
            check(libc::setresuid(user.uid, user.uid, user.uid).into())?;
        }
        // After that, for a change of the user clears the parent-death signal.
        match lifetime {
            Lifetime::WithParent => check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL).into()),
            Lifetime::Own => check(libc::setsid().into()),
        }
    }
}

/// Makes sure that descriptor `fd` is taken while the guard lives.
fn occupy(fd: i32) -> io::Result<OwnedFd> {
    let null = File::open("/dev/null")?;
    // SAFETY: the descriptor is open; no pointers.
    let got = unsafe { libc::fcntl(null.as_raw_fd(), libc::F_DUPFD_CLOEXEC, fd) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was made just now and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(got) })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::scratch::Scratch;

    fn script(scratch: &Scratch, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = scratch.path().join("program");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn answer(user: Option<ServiceUser>, lifetime: Lifetime, text: &str) -> String {
        let scratch = Scratch::new();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut child = spawn(&script(&scratch, text), "job", theirs, user, lifetime, Stdio::null()).unwrap();
        let mut out = String::new();
        (&ours).write_all(b"hello\n").unwrap();
        (&ours).read_to_string(&mut out).unwrap();
        assert!(child.wait().unwrap().success());
        out
    }

    #[test]
    fn child_has_the_socket_its_mode_and_nothing_else_of_ours() {
        let _kept_out = File::open("/dev/null").unwrap();
        let text =
            answer(None, Lifetime::WithParent, "read line <&3; echo $1 $line >&3; exec ls /proc/self/fd >&3");
        // The last one is what ls lists by.
        assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["job", "hello", "0", "1", "2", "3", "4"]);
        let env = answer(None, Lifetime::WithParent, "read line <&3; exec cat /proc/self/environ >&3");
        assert!(!env.contains("CARGO") && !env.contains("HOME="), "{env}");
    }

    #[test]
    fn child_runs_as_the_user_without_groups_where_we_are_root() {
        let Some(nobody) = ServiceUser::find("nobody").unwrap() else {
            assert_eq!(ServiceUser::find("no such user").unwrap(), None);
            return;
        };
        let text = answer(
            Some(nobody),
            Lifetime::Own,
            "read line <&3; { id -u; id -G; ps -o sid= -p $$; echo $$; readlink /proc/self/ns/net; } >&3",
        );
        let lines: Vec<_> = text.split_whitespace().collect();
        assert_eq!(lines[0], nobody.uid.to_string());
        assert_eq!(lines[1], nobody.gid.to_string());
        assert_eq!(lines[2], lines[3], "its own session");
        let ours = std::fs::read_link("/proc/self/ns/net").unwrap();
        assert_ne!(Path::new(lines[4]), ours, "its own network");
        assert!(matches!(ServiceUser::find("no such user"), Err(SpawnError::NoUser { .. })));
    }

    #[test]
    fn missing_program_is_named() {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let program = Path::new("/nonexistent/vmseal-disk");
        let error = spawn(program, "job", theirs, None, Lifetime::Own, Stdio::null()).unwrap_err();
        assert!(
            crate::causes::causes(&error).contains("/nonexistent/vmseal-disk: No such file"),
            "{error:?}"
        );
    }
}
