//! fio writes and checks what it wrote on a disk in Ceph, while helpers and workers are killed. Only where Ceph was asked
//! for: `make test-rbd`; in full in `make soak-rbd`.

use std::time::{Duration, Instant};

use crate::{
    fio::{Daemon, fio},
    remote::{Ceph, Helper, plan},
    rig::{MIB, kill},
    tools::tool,
};

#[test]
fn fio_finds_no_fault_in_ceph_while_helpers_and_workers_are_killed() {
    if std::env::var_os("VMSEAL_NEED_CEPH").is_none() {
        println!("skipped: `make test-rbd` has it");
        return;
    }
    let (Some(qemu), Some(fio_tool)) = (tool("qemu-storage-daemon"), tool("fio")) else { return };
    let Some(ceph) = Ceph::start() else { return };
    let soak = std::env::var_os("VMSEAL_SOAK").is_some();
    let (least, kills) = if soak { (Duration::from_secs(600), 100) } else { (Duration::ZERO, 6) };
    let plan = plan(&ceph, 32 * MIB);
    let socket = plan.scratch.path("store.sock");
    let mut helper = Helper::start(&ceph, &socket, None);
    let rig = plan.start();
    let daemon = Daemon::start(qemu, &rig);
    let began = Instant::now();
    let loops = if soak { 100_000 } else { 40 };
    let mut fio = fio(fio_tool, &daemon.mount, 32 << 10, loops, &rig.path("fio.log"));
    let heard = || std::fs::read_to_string(rig.path("fio.log")).unwrap();
    let (mut helpers, mut workers, mut from, mut written) = (0, 0, 0, 0);
    while helpers + workers < kills || began.elapsed() < least {
        // Somebody's data goes through each of them before it is killed.
        let status = loop {
            let status = rig.status();
            if status.disks[0].written_bytes >= from + 2 * MIB {
                break status;
            }
            let ended = fio.try_wait().unwrap();
            assert!(ended.is_none(), "fio ended early: {ended:?} {}", heard());
        };
        let now = status.disks[0].written_bytes;
        written += now - from;
        if (helpers + workers) % 3 == 2 {
            kill(status.worker_pid, libc::SIGKILL);
            (workers, from) = (workers + 1, 0);
        } else {
            helper.kill();
            helper = Helper::start(&ceph, &socket, Some(&helper.owner.clone()));
            (helpers, from) = (helpers + 1, now);
        }
    }
    kill(fio.id() as i32, libc::SIGINT);
    let end = fio.wait().unwrap();
    // An interrupted fio says so by 128, after it has checked what it wrote.
    assert!(end.success() || end.code() == Some(128), "{end:?}: {}", heard());
    assert!(!heard().contains("verify"), "{}", heard());
    println!(
        "fio on RBD: {} MiB written, {helpers} helpers and {workers} workers killed, {:?}",
        written / MIB,
        began.elapsed()
    );
    drop(daemon);
}
