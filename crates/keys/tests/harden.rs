//! A hardened process leaves no core and cannot be traced by its own user.
//!
//! One test in a program of its own: it changes the process.

#[test]
fn hardened_process_dumps_no_core() {
    vmseal_keys::harden_process().unwrap();
    let mut limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
    // SAFETY: the pointer is to a whole rlimit.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_CORE, &mut limit) }, 0);
    assert_eq!((limit.rlim_cur, limit.rlim_max), (0, 0));
    // SAFETY: PR_GET_DUMPABLE takes no argument.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }, 0);
}
