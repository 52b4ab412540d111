//! The sandbox as a process meets it that was taken over: each way out is tried in a process of its own, by system
//! call and through a ring.

use std::{
    fs::{self, File},
    io::{self, Read},
    net::TcpListener,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use io_uring::{IoUring, opcode, squeue, types};
use vmseal_disk::{
    EXIT_STOPPED,
    lane::uring::OPCODES,
    latch::SharedPage,
    sandbox::{self, network, ring},
};

use crate::{
    nbd_client::*,
    rig::{MIB, Plan, Rig, Spec, kill, pattern, wait_gone},
};

const SURVIVED: i32 = 77;

/// Runs `work` in a forked process; gives its exit code, or minus its signal, and what it wrote to standard error.
fn forked(work: impl FnOnce()) -> (i32, String) {
    let (mut reader, writer) = io::pipe().unwrap();
    // SAFETY: the child has one thread; it makes system calls and allocates (which glibc's fork allows), touches
    // nothing another thread of the parent may have locked, and ends by _exit.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            libc::dup2(writer.as_raw_fd(), 2);
            work();
            libc::_exit(SURVIVED);
        }
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) };
        (code, text)
    }
}

/// In the child: the sandbox, or an exit code that no test expects.
fn enter(pid_files: Option<&File>) {
    if sandbox::enter(pid_files.map(AsFd::as_fd), None).is_err() {
        // SAFETY: ends the process.
        unsafe { libc::_exit(99) };
    }
}

/// In the child: to the parent, past what the test harness catches.
fn say(text: &str) {
    // SAFETY: bytes of a string.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

/// In the child: ends it with what came of an attempt, as a small positive number.
fn tell(result: i64) -> ! {
    let errno = if result < 0 { io::Error::last_os_error().raw_os_error().unwrap_or(98) } else { 0 };
    // SAFETY: ends the process.
    unsafe { libc::_exit(errno) }
}

#[test]
fn each_way_out_by_system_call_is_stopped_and_reported() {
    let path = c"/etc/passwd";
    let (null, zero) = (std::ptr::null::<u8>(), 0 as libc::c_long);
    let attempts: [(&str, libc::c_long, [libc::c_long; 4]); 17] = [
        ("openat2", libc::SYS_openat2, [libc::AT_FDCWD.into(), path.as_ptr() as _, null as _, 24]),
        ("socket inet", libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0, 0]),
        ("socket unix", libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0]),
        ("socket netlink", libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0, 0]),
        ("connect", libc::SYS_connect, [3, null as _, 0, 0]),
        ("execve", libc::SYS_execve, [path.as_ptr() as _, null as _, null as _, 0]),
        ("fork", libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0]),
        ("unshare", libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [libc::PTRACE_ATTACH.into(), 1, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [1, 0, 0, 0]),
        ("kill", libc::SYS_kill, [1, zero, 0, 0]),
        ("tgkill of another", libc::SYS_tgkill, [1, 1, 0, 0]),
        ("mmap exec", libc::SYS_mmap, [0, 4096, libc::c_long::from(libc::PROT_EXEC | libc::PROT_READ), 34]),
        ("unlinkat", libc::SYS_unlinkat, [libc::AT_FDCWD.into(), path.as_ptr() as _, 0, 0]),
        ("fchmod", libc::SYS_fchmod, [2, 0o777, 0, 0]),
        ("bpf", libc::SYS_bpf, [0, 0, 0, 0]),
        ("dumpable", libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0, 0]),
    ];
    for (name, call, [a, b, c, d]) in attempts {
        let page = SharedPage::create().unwrap();
        let (code, text) = forked(|| {
            let page = SharedPage::map(page.as_fd()).ok();
            if sandbox::enter(None, page).is_ok() {
                // SAFETY: none of these calls writes into memory, and the process has nothing to lose.
                unsafe { libc::syscall(call, a, b, c, d, -1 as libc::c_long, 0 as libc::c_long) };
            }
        });
        assert_eq!(code, EXIT_STOPPED, "{name}: {text}");
        assert!(text.contains(&format!("stopped: system call {call} is not allowed")), "{name}: {text}");
        assert_eq!(SharedPage::map(page.as_fd()).unwrap().stopped(), (1, Some(call as u32)), "{name}");
    }
}

#[test]
fn file_to_be_opened_by_name_is_refused_and_reported_and_after_a_few_the_process_ends() {
    let page = SharedPage::create().unwrap();
    let open = |times: u32| {
        forked(|| {
            let page = SharedPage::map(page.as_fd()).ok();
            if sandbox::enter(None, page).is_ok() {
                for _ in 1..times {
                    // SAFETY: a path that ends in a zero.
                    unsafe { libc::open(c"/etc/passwd".as_ptr(), libc::O_RDONLY) };
                }
                // SAFETY: as above.
                tell(unsafe { libc::open(c"/etc/passwd".as_ptr(), libc::O_RDONLY) }.into())
            }
        })
    };
    let call = libc::SYS_openat;
    let (code, text) = open(1);
    assert_eq!(code, libc::EACCES, "{text}");
    assert!(text.contains(&format!("stopped: system call {call} is not allowed")), "{text}");
    assert_eq!(SharedPage::map(page.as_fd()).unwrap().stopped(), (1, Some(call as u32)));
    assert_eq!(open(9).0, EXIT_STOPPED);
    assert_eq!(SharedPage::map(page.as_fd()).unwrap().stopped(), (10, Some(call as u32)));
}

#[test]
fn the_report_cannot_be_switched_off() {
    let (code, _) = forked(|| {
        enter(None);
        // SAFETY: setting a signal to be ignored installs no handler.
        unsafe { libc::signal(libc::SIGSYS, libc::SIG_IGN) };
    });
    assert_eq!(code, -libc::SIGSYS);
}

#[test]
fn only_files_of_the_given_directory_are_read() {
    let scratch = crate::rig::Scratch::new();
    fs::write(scratch.path("vm.pid"), "1").unwrap();
    let directory = File::open(&scratch.0).unwrap();
    let outside = scratch.0.to_str().unwrap().to_owned() + "/../../etc/passwd\0";
    let own = scratch.path("vm.pid").to_str().unwrap().to_owned() + "\0";
    let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW;
    let attempt = |path: &str, flags: i32| {
        forked(|| {
            enter(Some(&directory));
            // SAFETY: a path that ends in a zero.
            tell(unsafe { libc::openat(directory.as_raw_fd(), path.as_ptr().cast(), flags) }.into())
        })
    };
    assert_eq!(attempt("vm.pid\0", flags).0, 0);
    assert_eq!(attempt(&own, flags).0, 0, "by its whole path it is the same file");
    if sandbox::landlock::abi().unwrap() == 0 {
        return crate::tools::missing("landlock");
    }
    for path in ["/etc/passwd\0", "../../etc/passwd\0", &outside, "/proc/self/maps\0", ".\0"] {
        assert_eq!(attempt(path, flags).0, libc::EACCES, "{path}");
    }
    for flags in [flags | libc::O_RDWR, flags | libc::O_CREAT] {
        let (code, text) = attempt("vm.pid\0", flags);
        assert_eq!(code, libc::EACCES);
        assert!(text.contains("stopped: system call"), "{text}");
    }
}

/// What an entry of a ring came to: 0 or more, or minus an error number.
fn carry_out(ring: &mut IoUring, entry: &squeue::Entry) -> i32 {
    // SAFETY: what the entry points at outlives this call, which waits for its end.
    unsafe { ring.submission().push(entry).unwrap() };
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}

fn disabled_ring() -> IoUring {
    IoUring::builder().setup_r_disabled().build(8).unwrap()
}

/// Entries that leave a process.
fn ways_out() -> [(&'static str, squeue::Entry); 4] {
    let fixed = squeue::Flags::FIXED_FILE;
    let open = || {
        opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).flags(libc::O_RDONLY).build()
    };
    let socket = || opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
    [
        ("openat", open()),
        ("openat, marked", open().flags(fixed)),
        ("socket", socket()),
        ("socket, marked", socket().flags(fixed)),
    ]
}

#[test]
fn restricted_ring_does_block_io_on_its_own_descriptors_and_nothing_else() {
    let scratch = crate::rig::Scratch::new();
    fs::write(scratch.path("volume"), b"hello").unwrap();
    let volume = File::open(scratch.path("volume")).unwrap();
    let mut bytes = [0u8; 5];
    let mut results = Vec::new();
    // The way a lane's ring goes: made and filled first, then restricted.
    let (code, text) = forked(|| {
        enter(None);
        let mut uring = disabled_ring();
        uring.submitter().register_files(&[volume.as_raw_fd()]).unwrap();
        // SAFETY: the ring's descriptor is open as long as `uring` lives.
        ring::restrict(unsafe { BorrowedFd::borrow_raw(uring.as_raw_fd()) }, &OPCODES, 0).unwrap();
        let to = bytes.as_mut_ptr();
        results.push(carry_out(&mut uring, &opcode::Read::new(types::Fixed(0), to, 5).build()));
        let unlisted = types::Fd(volume.as_raw_fd());
        results.push(carry_out(&mut uring, &opcode::Read::new(unlisted, to, 5).build()));
        for (_, entry) in ways_out() {
            results.push(carry_out(&mut uring, &entry));
        }
        // Nothing more can be registered, nor the restrictions be taken back.
        let personality = uring.submitter().register_files(&[1]).is_err();
        let mut text: Vec<String> = results.iter().map(i32::to_string).collect();
        text.push(format!("{} {}", &bytes == b"hello", personality));
        say(&text.join(" "));
    });
    assert_eq!(code, SURVIVED, "{text}");
    let denied = -libc::EACCES;
    assert_eq!(text.trim(), format!("5 {denied} {denied} {denied} {denied} {denied} true true"));
}

#[test]
fn a_ring_of_its_own_making_reaches_nothing_either() {
    if sandbox::landlock::abi().unwrap() < 4 {
        return crate::tools::missing("landlock 4");
    }
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let (code, text) = forked(|| {
        enter(None);
        let mut uring = IoUring::new(8).unwrap();
        let [(_, open), _, (_, socket), _] = ways_out();
        let opened = carry_out(&mut uring, &open);
        let fd = carry_out(&mut uring, &socket);
        // SAFETY: plain data.
        let mut to: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        to.sin_family = libc::AF_INET as u16;
        to.sin_port = port.to_be();
        to.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
        let size = size_of::<libc::sockaddr_in>() as u32;
        let connect = opcode::Connect::new(types::Fd(fd), (&raw const to).cast(), size).build();
        say(&format!("{opened} {}", carry_out(&mut uring, &connect)));
    });
    assert_eq!(code, SURVIVED, "{text}");
    assert_eq!(text.trim(), format!("{0} {0}", -libc::EACCES));
}

#[test]
fn a_network_of_its_own_has_no_interface_up() {
    assert!(network::has_interface_up(), "this test has a network");
    // SAFETY: geteuid has no arguments.
    if unsafe { libc::geteuid() } != 0 {
        return crate::tools::missing("root, for a network namespace");
    }
    let (code, _) = forked(|| {
        network::leave().unwrap();
        tell(if network::has_interface_up() { -1 } else { 0 });
    });
    assert_eq!(code, 0);
}

#[test]
fn worker_says_what_walls_stand_around_it() {
    let rig = Rig::with(Spec::fixed(MIB));
    let status = rig.status();
    let sandbox = &status.sandbox;
    assert!(sandbox.seccomp);
    assert_eq!(sandbox.landlock, sandbox::landlock::abi().unwrap());
    // SAFETY: geteuid has no arguments.
    assert_eq!(sandbox.network, unsafe { libc::geteuid() } == 0);
    assert_eq!((sandbox.stopped, sandbox.last_stopped), (0, None));
    for pid in [status.worker_pid, status.keeper_pid] {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_start_matches(':').trim().to_owned()
        };
        assert_eq!(field("NoNewPrivs"), "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set} of {pid}");
        }
        assert_eq!(field("Seccomp:"), if pid == status.worker_pid { "2" } else { "0" });
    }
    assert!(rig.log().contains("sandbox with landlock"), "{}", rig.log());
}

#[test]
fn worker_that_was_stopped_is_replaced_and_the_next_one_says_so() {
    let rig = Plan::new(&[Spec::fixed(MIB)]).start();
    let worker = rig.status().worker_pid;
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &pattern(1, 4096), FUA).unwrap();
    // What the kernel does when a worker makes a call that is not on the list.
    kill(worker, libc::SIGSYS);
    wait_gone(worker);
    let status = rig.status();
    assert_ne!(status.worker_pid, worker);
    assert_eq!(status.sandbox.stopped, 1);
    assert!(status.sandbox.last_stopped.is_some());
    let log = rig.log();
    assert!(log.contains(&format!("vmseal-disk[{worker}] stopped: system call")), "{log}");
    assert!(log.contains(&format!("worker {worker} died (stopped by its sandbox)")), "{log}");
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert!(client.read(0, 4096).unwrap() == pattern(1, 4096));
}
