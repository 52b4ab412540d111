//! The system calls that are left: sockets that are there, unix sockets to connect, memory, threads, time. All others
//! fail with EPERM, and files with EACCES, which a C library that looks for hints takes for an answer.

use std::io;

/// Allowed whatever their arguments.
const PLAIN: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_ppoll,
    libc::SYS_fcntl,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_membarrier,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// PR_SET_VMA: the C library names its memory so.
const PR_SET_VMA: u32 = 0x5356_4d41;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Offsets in seccomp_data; both architectures are little-endian, so the lower half of an argument comes first.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Filters this thread and those it starts; gives whether this kernel can.
///
/// # Errors
///
/// The kernel's, other than that it cannot.
pub(crate) fn enter() -> io::Result<bool> {
    let mut program = program();
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: `filter` points at `program`, which outlives the call and is only read.
    let set =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0u32, &raw const filter) };
    match set {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(false),
            error => Err(error),
        },
    }
}

fn program() -> Vec<libc::sock_filter> {
    let errno = |errno: libc::c_int| libc::SECCOMP_RET_ERRNO | errno as u32;
    let mut program = vec![
        statement(LOAD, ARCHITECTURE_AT),
        jump(ARCHITECTURE, 1, 0),
        statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        statement(LOAD, NUMBER_AT),
    ];
    for call in PLAIN {
        program.extend([jump(*call as u32, 0, 1), statement(RETURN, libc::SECCOMP_RET_ALLOW)]);
    }
    let files = [libc::SYS_openat, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_readlinkat];
    for call in files {
        program.extend([jump(call as u32, 0, 1), statement(RETURN, errno(libc::EACCES))]);
    }
    // Its flags lie in memory, where no filter sees them. The C library uses the older call then.
    program.extend([jump(libc::SYS_clone3 as u32, 0, 1), statement(RETURN, errno(libc::ENOSYS))]);
    let thread = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    for (call, argument, mask, value) in [
        (libc::SYS_socket, 0, u32::MAX, libc::AF_UNIX as u32),
        (libc::SYS_mmap, 2, libc::PROT_EXEC as u32, 0),
        (libc::SYS_mprotect, 2, libc::PROT_EXEC as u32, 0),
        (libc::SYS_clone, 0, (thread | namespaces) as u32, thread as u32),
        (libc::SYS_ioctl, 1, u32::MAX, libc::FIONBIO as u32),
        (libc::SYS_prctl, 0, u32::MAX, libc::PR_SET_NAME as u32),
        (libc::SYS_prctl, 0, u32::MAX, PR_SET_VMA),
        // The end by abort.
        (libc::SYS_tgkill, 0, u32::MAX, std::process::id()),
    ] {
        program.extend([
            jump(call as u32, 0, 5),
            statement(LOAD, ARGUMENTS_AT + 8 * argument),
            statement(AND, mask),
            jump(value, 0, 1),
            statement(RETURN, libc::SECCOMP_RET_ALLOW),
            statement(LOAD, NUMBER_AT),
        ]);
    }
    program.push(statement(RETURN, errno(libc::EPERM)));
    program
}

fn statement(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

fn jump(k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: IF_EQUAL, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel's machine would return; the program must not run off its end.
    fn verdict(call: libc::c_long, arguments: [u32; 3]) -> u32 {
        let (program, mut at, mut value) = (program(), 0, 0u32);
        loop {
            let step = program[at];
            at += 1;
            match step.code {
                LOAD => {
                    value = match step.k {
                        NUMBER_AT => call as u32,
                        ARCHITECTURE_AT => ARCHITECTURE,
                        k => arguments[((k - ARGUMENTS_AT) / 8) as usize],
                    }
                }
                AND => value &= step.k,
                IF_EQUAL => at += usize::from(if value == step.k { step.jt } else { step.jf }),
                RETURN => return step.k,
                other => panic!("instruction {other}"),
            }
        }
    }

    #[test]
    fn unix_sockets_threads_and_plain_memory_are_left_and_nothing_else() {
        let (allow, eperm) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32);
        let thread = (libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u32;
        for (call, arguments, expected) in [
            (libc::SYS_accept4, [0; 3], allow),
            (libc::SYS_socket, [libc::AF_UNIX as u32, 0, 0], allow),
            (libc::SYS_socket, [libc::AF_INET as u32, 0, 0], eperm),
            (libc::SYS_socket, [libc::AF_NETLINK as u32, 0, 0], eperm),
            (libc::SYS_mmap, [0, 0, libc::PROT_READ as u32], allow),
            (libc::SYS_mmap, [0, 0, libc::PROT_EXEC as u32], eperm),
            (libc::SYS_clone, [thread, 0, 0], allow),
            (libc::SYS_clone, [17, 0, 0], eperm),
            (libc::SYS_clone, [thread | libc::CLONE_NEWUSER as u32, 0, 0], eperm),
            (libc::SYS_prctl, [libc::PR_SET_NAME as u32, 0, 0], allow),
            (libc::SYS_prctl, [PR_SET_VMA, 0, 0], allow),
            (libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u32, 1, 0], eperm),
            (libc::SYS_tgkill, [std::process::id(), 0, 0], allow),
            (libc::SYS_tgkill, [1, 0, 0], eperm),
        ] {
            assert_eq!(verdict(call, arguments), expected, "{call} {arguments:?}");
        }
        for call in [
            libc::SYS_execve,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_setuid,
            libc::SYS_kill,
            libc::SYS_unlinkat,
            libc::SYS_openat2,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
            libc::SYS_pidfd_getfd,
            -1,
        ] {
            assert_eq!(verdict(call, [0; 3]), eperm, "{call}");
        }
        assert_eq!(verdict(libc::SYS_openat, [0; 3]), libc::SECCOMP_RET_ERRNO | libc::EACCES as u32);
    }
}
