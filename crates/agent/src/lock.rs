//! Who may touch an image file now: OFD locks of ours, and QEMU's own lock bytes so that QEMU and `qemu-img` keep out.
//!
//! An open file in; a lock that lives as long as that open file description, in whatever process. It waits for nobody
//! but a moment.
//! QEMU's bytes: `block/file-posix.c`, `RAW_LOCK_PERM_BASE` 100 (what a user does) and `RAW_LOCK_SHARED_BASE` 200
//! (what it does not let others do), one byte per permission, taken as *read* locks; who conflicts is found by asking.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

/// Bytes of QEMU's permissions that we take: consistent read, write, write unchanged, resize.
const QEMU_PERMISSIONS: std::ops::RangeInclusive<i64> = 0..=3;
const QEMU_DOES: i64 = 100;
const QEMU_DENIES: i64 = 200;
/// How long a lock is tried for.
pub const PATIENCE: Duration = Duration::from_millis(600);
const PAUSE: Duration = Duration::from_millis(20);
/// Our own range, in the data file and in a detached header: the owner block.
pub const OWNER_RANGE: (i64, i64) = (15 << 20, 4096);

/// Why a file could not be locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody has it.
    #[error("in use by another process{}", holder(*pid))]
    InUse {
        /// Process id, where the kernel tells it: not for OFD locks, which QEMU uses too.
        pid: Option<i32>,
    },
    /// The file system has no locks, or it failed.
    #[error("cannot be locked")]
    Io(#[from] io::Error),
}

fn holder(pid: Option<i32>) -> String {
    pid.map_or(String::new(), |pid| format!(" (pid {pid})"))
}

/// How much of the file its user claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// A volume that is written: nobody else reads or writes it, and no second vmseal opens it.
    Volume,
    /// A volume or image that is only read: nobody writes it.
    Reading,
    /// A clear image that is copied and wiped: nobody else reads or writes it.
    Source,
}

/// Locks a file for as long as its description is open anywhere.
///
/// # Errors
///
/// [`LockError::InUse`]; nothing is left locked then.
pub fn claim(file: &File, claim: Claim) -> Result<(), LockError> {
    let ours = match claim {
        Claim::Volume => Some(libc::F_WRLCK),
        Claim::Reading => Some(libc::F_RDLCK),
        Claim::Source => None,
    };
    if let Some(kind) = ours {
        set(file, kind, OWNER_RANGE.0, OWNER_RANGE.1)?;
    }
    let taken = qemu_bytes(file, claim);
    if taken.is_err() {
        release(file);
    }
    taken
}

/// As [`claim`], but tries for [`PATIENCE`] before it says that somebody has it: a process that is being started has a
/// copy of every lock of ours until it runs its program, and a worker that was told to end takes a moment.
///
/// # Errors
///
/// As [`claim`].
pub fn claim_soon(file: &File, what: Claim) -> Result<(), LockError> {
    let until = Instant::now() + PATIENCE;
    loop {
        match claim(file, what) {
            Err(LockError::InUse { .. }) if Instant::now() < until => thread::sleep(PAUSE),
            other => return other,
        }
    }
}

/// Locks just the owner block's range, for a detached header.
///
/// # Errors
///
/// [`LockError`].
pub fn claim_header(file: &File, read_only: bool) -> Result<(), LockError> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    set(file, kind, OWNER_RANGE.0, OWNER_RANGE.1)
}

/// Takes QEMU's bytes, then looks for others who do what we deny or deny what we do. In this order two who come at
/// the same time both see each other.
fn qemu_bytes(file: &File, claim: Claim) -> Result<(), LockError> {
    let (does, denies): (&[i64], &[i64]) = match claim {
        Claim::Reading => (&[0], &[1, 2, 3]),
        Claim::Volume | Claim::Source => (&[0, 1, 2, 3], &[0, 1, 2, 3]),
    };
    for byte in does {
        set(file, libc::F_RDLCK, QEMU_DOES + byte, 1)?;
    }
    for byte in denies {
        set(file, libc::F_RDLCK, QEMU_DENIES + byte, 1)?;
    }
    for byte in QEMU_PERMISSIONS {
        if does.contains(&byte) {
            find_other(file, QEMU_DENIES + byte)?;
        }
        if denies.contains(&byte) {
            find_other(file, QEMU_DOES + byte)?;
        }
    }
    Ok(())
}

fn release(file: &File) {
    for (at, len) in [OWNER_RANGE, (QEMU_DOES, 4), (QEMU_DENIES, 4)] {
        // The description is about to be closed, which releases everything anyway.
        let _ = command(file, libc::F_OFD_SETLK, libc::F_UNLCK, at, len);
    }
}

fn set(file: &File, kind: libc::c_int, at: i64, len: i64) -> Result<(), LockError> {
    match command(file, libc::F_OFD_SETLK, kind, at, len) {
        Ok(_) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            let other = command(file, libc::F_OFD_GETLK, kind, at, len).ok();
            Err(LockError::InUse { pid: other.map(|lock| lock.l_pid).filter(|pid| *pid > 0) })
        }
        Err(e) => Err(e.into()),
    }
}

fn find_other(file: &File, at: i64) -> Result<(), LockError> {
    let found = command(file, libc::F_OFD_GETLK, libc::F_WRLCK, at, 1)?;
    if libc::c_int::from(found.l_type) == libc::F_UNLCK {
        return Ok(());
    }
    Err(LockError::InUse { pid: Some(found.l_pid).filter(|pid| *pid > 0) })
}

fn command(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    at: i64,
    len: i64,
) -> io::Result<libc::flock> {
    // SAFETY: all-zero is a valid flock; l_pid must be zero for OFD commands.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = at;
    lock.l_len = len;
    loop {
        // SAFETY: `lock` is a flock that outlives the call, as F_OFD_SETLK and F_OFD_GETLK demand.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } == 0 {
            return Ok(lock);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::scratch::Scratch;

    fn image(scratch: &Scratch) -> std::path::PathBuf {
        let path = scratch.path().join("x.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    }

    fn open(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    fn qemu_img(args: &[&str], path: &std::path::Path) -> bool {
        let path = path.to_str().unwrap();
        let args: Vec<_> = args.iter().map(|a| a.replace("IMAGE", path)).collect();
        Command::new("qemu-img").args(&args).output().expect("qemu-img is installed").status.success()
    }

    #[test]
    fn second_claim_is_refused_until_the_first_is_gone() {
        let scratch = Scratch::new();
        let path = image(&scratch);
        for first in [Claim::Volume, Claim::Source, Claim::Reading] {
            for second in [Claim::Volume, Claim::Source] {
                let held = open(&path);
                claim_soon(&held, first).unwrap();
                let other = open(&path);
                assert!(
                    matches!(claim(&other, second), Err(LockError::InUse { .. })),
                    "{first:?} {second:?}"
                );
                drop(held);
                claim_soon(&other, second).unwrap();
            }
        }
        let (a, b) = (open(&path), open(&path));
        claim_soon(&a, Claim::Reading).unwrap();
        claim_soon(&b, Claim::Reading).unwrap();
    }

    #[test]
    fn lock_lives_on_in_a_copy_of_the_descriptor() {
        let scratch = Scratch::new();
        let path = image(&scratch);
        let held = open(&path);
        claim(&held, Claim::Volume).unwrap();
        let copy = held.try_clone().unwrap();
        drop(held);
        assert!(claim(&open(&path), Claim::Volume).is_err());
        drop(copy);
        claim_soon(&open(&path), Claim::Volume).unwrap();
    }

    #[test]
    fn qemu_img_keeps_out_of_a_claimed_file_and_may_read_one_that_is_only_read() {
        let scratch = Scratch::new();
        let path = image(&scratch);
        let copy = ["convert", "-f", "raw", "-O", "raw", "IMAGE", "IMAGE.copy"];
        let resize = ["resize", "-q", "-f", "raw", "IMAGE", "2M"];
        let write = ["dd", "-f", "raw", "-O", "raw", "if=/dev/zero", "of=IMAGE", "bs=512", "count=1"];
        for (what, may_read) in [(Claim::Volume, false), (Claim::Source, false), (Claim::Reading, true)] {
            let held = open(&path);
            claim_soon(&held, what).unwrap();
            // `qemu-img info` of a raw file takes no lock at all, whoever holds it.
            assert_eq!(qemu_img(&copy, &path), may_read, "{what:?}");
            assert!(!qemu_img(&resize, &path), "{what:?}");
            assert!(!qemu_img(&write, &path), "{what:?}");
        }
        assert!(qemu_img(&copy, &path) && qemu_img(&resize, &path));
    }

    #[test]
    fn process_with_classic_lock_is_named() {
        let scratch = Scratch::new();
        let path = image(&scratch);
        // Classic POSIX locks tell their pid; OFD locks of the same range conflict with them across processes.
        let mut child = Command::new("python3")
            .args([
                "-c",
                "import fcntl,sys,os\nf=open(sys.argv[1],'r+b')\nfcntl.lockf(f,fcntl.LOCK_EX,4096,15<<20)\n\
                 print('held',flush=True)\nsys.stdin.read()",
            ])
            .arg(&path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line)
            .unwrap();
        let error = claim(&open(&path), Claim::Volume).unwrap_err();
        assert_eq!(error.to_string(), format!("in use by another process (pid {})", child.id()));
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
