//! The system calls of an engine, its threads, its memory and its log. A new one is added here with what needs it.

use std::os::fd::{AsRawFd, BorrowedFd};

use libc::c_long;

use super::seccomp::{Demand, Rule, Verdict};

/// Those that are allowed whatever their arguments: they act on descriptors, memory and threads that are there.
const PLAIN: &[c_long] = &[
    // Volumes and clients.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmmsg,
    libc::SYS_sendmmsg,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_setup,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_close,
    // Memory: of the process, shared with a guest, and secret.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    // Threads, time, randomness.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_membarrier,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

/// What a lane registers with its ring. Personalities (9) are not among it.
const RING_REGISTRATIONS: &[u32] = &[
    0,  // buffers
    1,  // and back
    2,  // descriptors
    3,  // and back
    4,  // an eventfd that says when a ublk device has something
    6,  // change of descriptors
    8,  // what the kernel can do
    11, // restrictions
    12, // enable
];

/// In a thread's flags: any namespace of its own.
const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;
const THREAD: i32 = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;

/// PR_SET_VMA: the C library names its memory so.
const PR_SET_VMA: u32 = 0x5356_4d41;

/// All rules. `pid_files` is the directory in which files may be opened.
pub(super) fn rules(pid_files: Option<BorrowedFd<'_>>) -> Vec<Rule> {
    use Verdict::Allow;
    let rule = |call, demands: &[Demand], verdict| Rule { call, demands: demands.to_vec(), verdict };
    let mut rules: Vec<Rule> = PLAIN.iter().map(|call| rule(*call, &[], Allow)).collect();
    let empty_path = Demand::masked(2, libc::AT_EMPTY_PATH as u32, libc::AT_EMPTY_PATH as u32);
    let no_exec = Demand::masked(2, libc::PROT_EXEC as u32, 0);
    let sigsys = Demand::is(0, libc::SIGSYS as u32);
    rules.extend([
        rule(libc::SYS_mmap, &[no_exec], Allow),
        rule(libc::SYS_mprotect, &[no_exec], Allow),
        // Only what a descriptor says of itself.
        rule(libc::SYS_statx, &[empty_path], Allow),
        rule(libc::SYS_newfstatat, &[Demand { argument: 3, ..empty_path }], Allow),
        rule(libc::SYS_clone, &[Demand::masked(0, (THREAD | NAMESPACES) as u32, THREAD as u32)], Allow),
        // Its flags lie in memory, where no filter sees them. The C library uses the older call then.
        rule(libc::SYS_clone3, &[], Verdict::Errno(libc::ENOSYS as u32)),
        // Who takes the report away has something to hide.
        rule(libc::SYS_rt_sigaction, &[sigsys], Verdict::Kill),
        rule(libc::SYS_rt_sigaction, &[], Allow),
        // The end by abort.
        rule(libc::SYS_tgkill, &[Demand::is(0, std::process::id())], Allow),
        rule(libc::SYS_prctl, &[Demand::is(0, libc::PR_SET_NAME as u32)], Allow),
        rule(libc::SYS_prctl, &[Demand::is(0, PR_SET_VMA)], Allow),
        // Blocking or not.
        rule(libc::SYS_ioctl, &[Demand::is(1, libc::FIONBIO as u32)], Allow),
    ]);
    rules.extend(
        RING_REGISTRATIONS
            .iter()
            .map(|what| rule(libc::SYS_io_uring_register, &[Demand::is(1, *what)], Allow)),
    );
    if let Some(directory) = pid_files {
        // An absolute path leaves the directory: that is for landlock to see.
        let flags = libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_LARGEFILE;
        let writing = !(flags as u32);
        rules.push(rule(
            libc::SYS_openat,
            &[Demand::is(0, directory.as_raw_fd() as u32), Demand::masked(2, writing, 0)],
            Allow,
        ));
    }
    rules
}
