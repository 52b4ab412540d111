//! A process that may lock no more memory is told so, with the limit and what to do; nothing falls back.
//!
//! One test in a program of its own: it takes rights away from the process.

use vmseal_keys::{SecretBytes, SecretError, SecretShare};

/// Takes CAP_IPC_LOCK away, with which the limit would not count, and sets the limit.
fn limit_locked_memory(bytes: u64) {
    const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    const CAP_IPC_LOCK: u32 = 14;
    let header = [CAPABILITY_VERSION_3, 0];
    // Effective, permitted, inheritable; twice, for capabilities 0 to 31 and 32 to 63.
    let mut data = [0u32; 6];
    // SAFETY: header and data have the layout capget(2) wants for version 3, pid 0 is this thread.
    assert_eq!(unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()) }, 0);
    data[..3].iter_mut().for_each(|set| *set &= !(1 << CAP_IPC_LOCK));
    // SAFETY: as above, and the data is only read.
    assert_eq!(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }, 0);
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: the pointer is to a whole rlimit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) }, 0);
}

#[test]
fn limit_on_locked_memory_is_named_and_what_was_there_stays() {
    let before = SecretBytes::<32>::take_from(&mut { *b"VMSEAL-TEST-SECRET-limit-0123456" });
    limit_locked_memory(64 << 10);
    let mut held = Vec::new();
    let error = loop {
        match SecretBytes::<4096>::try_zeroed() {
            Ok(secret) => held.push(secret),
            Err(error) => break error,
        }
        assert!(held.len() <= 16, "64 KiB hold no more than 16 times 4 KiB");
    };
    assert!(matches!(error, SecretError::Limit { limit: 65_536, .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("RLIMIT_MEMLOCK") && text.contains("65536") && text.contains("LimitMEMLOCK="),
        "{text}"
    );
    assert!(matches!(SecretShare::create(1 << 20), Err(SecretError::Limit { .. })));
    assert_eq!(before.expose(), b"VMSEAL-TEST-SECRET-limit-0123456");
    // What is given back can be had again.
    held.pop();
    assert!(SecretBytes::<4096>::try_zeroed().is_ok());
}
