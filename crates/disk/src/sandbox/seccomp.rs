//! Seccomp: a list of system calls, some with demands on their arguments, as a program for the kernel's filter.
//!
//! The first rule that fits decides. What fits none is not carried out and raises SIGSYS, whose handler reports it.
//! Only the lower half of an argument is looked at: what is compared here are ints and flags, of which the kernel
//! ignores the rest.

use std::{io, os::fd::BorrowedFd};

use super::system_calls;

/// A demand on one argument: its bits under `mask` have this value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Demand {
    pub(super) argument: u32,
    pub(super) mask: u32,
    pub(super) value: u32,
}

impl Demand {
    pub(super) fn is(argument: u32, value: u32) -> Self {
        Self { argument, mask: u32::MAX, value }
    }
    pub(super) fn masked(argument: u32, mask: u32, value: u32) -> Self {
        Self { argument, mask, value }
    }
}

/// What is done with a system call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Verdict {
    Allow,
    /// It fails with this error.
    Errno(u32),
    /// The process ends at once.
    Kill,
}

/// One system call, under all of its demands.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub(super) call: libc::c_long,
    pub(super) demands: Vec<Demand>,
    pub(super) verdict: Verdict,
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Offsets in seccomp_data. Both architectures are little-endian: the lower half of an argument comes first.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Installs the filter for every thread of the process; gives whether this kernel has seccomp.
///
/// # Errors
///
/// The kernel's, other than that it lacks it.
pub(super) fn enter(pid_files: Option<BorrowedFd<'_>>) -> io::Result<bool> {
    let mut program = compile(&system_calls::rules(pid_files));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: `filter` points at `program`, which outlives the call and is only read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const filter,
        )
    };
    match result {
        0 => Ok(true),
        // The thread that could not be brought along.
        1.. => Err(io::Error::other("a thread has another filter")),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(false),
            error => Err(error),
        },
    }
}

/// The program: the architecture first, then the rules one after another.
fn compile(rules: &[Rule]) -> Vec<libc::sock_filter> {
    let mut program = vec![
        statement(LOAD, ARCHITECTURE_AT),
        jump(IF_EQUAL, ARCHITECTURE, 1, 0),
        statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        statement(LOAD, NUMBER_AT),
    ];
    for rule in rules {
        let mut body = Vec::new();
        // Jumps to the end of the rule are filled in once its length is known.
        let mut open = Vec::new();
        for demand in &rule.demands {
            body.push(statement(LOAD, ARGUMENTS_AT + 8 * demand.argument));
            if demand.mask != u32::MAX {
                body.push(statement(AND, demand.mask));
            }
            open.push(body.len());
            body.push(jump(IF_EQUAL, demand.value, 0, 0));
        }
        body.push(statement(RETURN, rule.verdict.action()));
        let length = body.len();
        for at in open {
            body[at].jf = (length - at - 1) as u8;
        }
        if !rule.demands.is_empty() {
            body.push(statement(LOAD, NUMBER_AT));
        }
        program.push(jump(IF_EQUAL, rule.call as u32, 0, body.len() as u8));
        program.extend(body);
    }
    program.push(statement(RETURN, libc::SECCOMP_RET_TRAP));
    program
}

impl Verdict {
    fn action(self) -> u32 {
        match self {
            Self::Allow => libc::SECCOMP_RET_ALLOW,
            Self::Errno(errno) => libc::SECCOMP_RET_ERRNO | errno,
            Self::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        }
    }
}

fn statement(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel's machine would return; the program must not run off its end.
    fn run(program: &[libc::sock_filter], architecture: u32, call: libc::c_long, arguments: [u64; 6]) -> u32 {
        let (mut at, mut value) = (0, 0u32);
        loop {
            let step = program[at];
            at += 1;
            match step.code {
                LOAD => {
                    value = match step.k {
                        NUMBER_AT => call as u32,
                        ARCHITECTURE_AT => architecture,
                        k => arguments[((k - ARGUMENTS_AT) / 8) as usize] as u32,
                    }
                }
                AND => value &= step.k,
                IF_EQUAL => at += usize::from(if value == step.k { step.jt } else { step.jf }),
                RETURN => return step.k,
                other => panic!("instruction {other}"),
            }
        }
    }

    fn verdict(call: libc::c_long, arguments: [u64; 6]) -> u32 {
        run(&compile(&system_calls::rules(None)), ARCHITECTURE, call, arguments)
    }

    #[test]
    fn what_is_on_the_list_is_allowed_and_the_rest_is_reported() {
        for call in [libc::SYS_read, libc::SYS_pwritev2, libc::SYS_io_uring_enter, libc::SYS_exit_group] {
            assert_eq!(verdict(call, [0; 6]), libc::SECCOMP_RET_ALLOW, "{call}");
        }
        for call in [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_open_by_handle_at,
            libc::SYS_unlinkat,
            libc::SYS_userfaultfd,
            libc::SYS_bpf,
            libc::SYS_mount,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_kill,
            libc::SYS_pidfd_getfd,
            libc::SYS_fchmod,
            -1,
            99_999,
        ] {
            assert_eq!(verdict(call, [0; 6]), libc::SECCOMP_RET_TRAP, "{call}");
        }
    }

    #[test]
    fn arguments_decide_where_the_call_alone_does_not() {
        let (read, exec) = (libc::PROT_READ as u64, libc::PROT_EXEC as u64);
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            assert_eq!(verdict(call, [0, 4096, read, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
            assert_eq!(verdict(call, [0, 4096, read | exec, 0, 0, 0]), libc::SECCOMP_RET_TRAP);
        }
        let thread = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;
        assert_eq!(verdict(libc::SYS_clone, [thread, 0, 0, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(verdict(libc::SYS_clone, [17, 0, 0, 0, 0, 0]), libc::SECCOMP_RET_TRAP);
        let namespace = thread | libc::CLONE_NEWUSER as u64;
        assert_eq!(verdict(libc::SYS_clone, [namespace, 0, 0, 0, 0, 0]), libc::SECCOMP_RET_TRAP);
        let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
        assert_eq!(verdict(libc::SYS_clone3, [0; 6]), enosys, "its flags cannot be seen");
        let sigsys = libc::SIGSYS as u64;
        assert_eq!(verdict(libc::SYS_rt_sigaction, [sigsys, 0, 0, 0, 0, 0]), libc::SECCOMP_RET_KILL_PROCESS);
        assert_eq!(verdict(libc::SYS_rt_sigaction, [7, 0, 0, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
        let own = u64::from(std::process::id());
        assert_eq!(verdict(libc::SYS_tgkill, [own, own, 6, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(verdict(libc::SYS_tgkill, [own + 1, own, 6, 0, 0, 0]), libc::SECCOMP_RET_TRAP);
        assert_eq!(verdict(libc::SYS_io_uring_register, [3, 9, 0, 0, 0, 0]), libc::SECCOMP_RET_TRAP);
        assert_eq!(verdict(libc::SYS_io_uring_register, [3, 6, 0, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(
            verdict(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0]),
            libc::SECCOMP_RET_TRAP
        );
        assert_eq!(verdict(libc::SYS_ioctl, [3, 0x1277, 0, 0, 0, 0]), libc::SECCOMP_RET_TRAP, "BLKDISCARD");
    }

    #[test]
    fn files_are_opened_in_the_given_directory_for_reading_only() {
        use std::os::fd::{AsFd, AsRawFd};
        let directory = std::fs::File::open("/").unwrap();
        let program = compile(&system_calls::rules(Some(directory.as_fd())));
        let open = |at: i32, flags: i32| {
            run(&program, ARCHITECTURE, libc::SYS_openat, [at as u64, 0, flags as u64, 0, 0, 0])
        };
        let fd = directory.as_raw_fd();
        let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        assert_eq!(open(fd, flags), libc::SECCOMP_RET_ALLOW);
        for (at, flags) in
            [(libc::AT_FDCWD, flags), (fd + 1, flags), (fd, flags | libc::O_RDWR), (fd, libc::O_PATH)]
        {
            assert_eq!(open(at, flags), libc::SECCOMP_RET_TRAP);
        }
    }

    #[test]
    fn other_architectures_end_at_once() {
        let program = compile(&system_calls::rules(None));
        assert_eq!(run(&program, 0x4000_0003, libc::SYS_read, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
        assert!(program.len() < 4096, "the kernel takes no more");
    }
}
