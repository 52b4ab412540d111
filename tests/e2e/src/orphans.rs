//! Takes in what daemons leave: a QEMU or disk process whose parent died becomes this process's child and is reaped at
//! once, as an init would. Where init is slow at it, libvirtd waits for its dead QEMUs by the second.
//!
//! Touches no child that this process started itself.

use std::{fs, sync::Once, thread, time::Duration};

/// How the names of programs begin that daemonize: libvirtd's QEMUs, of every target, and the agent's disk processes.
const DAEMONS: [&str; 3] = ["qemu-system-", "vmseal-disk", "vmseal-rbd"];

/// Begins, once a process.
pub(crate) fn take_in() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: takes a number; the attribute is this process's own.
        if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } == 0 {
            thread::spawn(|| {
                loop {
                    reap();
                    thread::sleep(Duration::from_millis(30));
                }
            });
        }
    });
}

fn reap() {
    let own = std::process::id().to_string();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let stat = fs::read_to_string(process.path().join("stat")).unwrap_or_default();
        let Some((name, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')) else {
            continue;
        };
        let mut words = rest.split_whitespace();
        if DAEMONS.iter().any(|daemon| name.starts_with(daemon))
            && words.next() == Some("Z")
            && words.next() == Some(&own)
        {
            let mut status = 0;
            // SAFETY: `status` outlives the call; it is a child that has ended.
            unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        }
    }
}
