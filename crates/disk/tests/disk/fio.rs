//! fio writes and checks what it wrote, on a disk as QEMU has it, while its workers are killed.
//!
//! fio cannot reconnect; QEMU can. So fio works on a file that `qemu-storage-daemon` shows of the disk, and its NBD
//! driver does as a guest's: waits, connects again, sends again what was not answered.

use std::{
    fs::File,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    rig::{MIB, Rig, Spec, kill},
    tools::tool,
};

/// `qemu-storage-daemon` with the disk as a file.
pub(crate) struct Daemon {
    process: Child,
    pub(crate) mount: std::path::PathBuf,
}

impl Daemon {
    pub(crate) fn start(mut command: Command, rig: &Rig) -> Self {
        let mount = rig.path("disk");
        File::create(&mount).unwrap();
        let node = format!(
            "driver=nbd,node-name=n,server.type=unix,server.path={},export={},reconnect-delay=60,discard=unmap",
            rig.disk().socket.display(),
            rig.disk().id
        );
        let export = format!("type=fuse,id=f,node-name=n,mountpoint={},writable=on", mount.display());
        let process = command
            .args(["--blockdev", &node, "--export", &export])
            .stderr(File::create(rig.path("daemon.log")).unwrap())
            .spawn()
            .unwrap();
        let mut daemon = Self { process, mount };
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::fs::metadata(&daemon.mount).unwrap().len() != rig.disk().setup.presented_bytes {
            let ended = daemon.process.try_wait().unwrap();
            let log = || std::fs::read_to_string(rig.path("daemon.log")).unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "no file of the disk: {}", log());
            std::thread::yield_now();
        }
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        kill(self.process.id() as i32, libc::SIGTERM);
        let _ = self.process.wait();
        let _ = Command::new("umount").arg("--lazy").arg(&self.mount).stderr(Stdio::null()).status();
    }
}

/// fio with random sizes and flushes, checking every block it wrote. Trims of a file it cannot; `guest_fio.rs` has them.
pub(crate) fn fio(mut command: Command, file: &Path, kilobytes: u64, rounds: u64, log: &Path) -> Child {
    command
        .arg("--name=verify")
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--size={kilobytes}k"))
        .arg(format!("--loops={rounds}"))
        .args([
            "--rw=randwrite",
            "--bsrange=512-131072",
            "--blockalign=512",
            "--iodepth=8",
            "--ioengine=io_uring",
        ])
        .args(["--direct=0", "--fsync=32", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"])
        .args(["--verify_backlog=64", "--randrepeat=0", "--verify_state_save=0", "--minimal"])
        .stdout(Stdio::null())
        .stderr(File::create(log).unwrap())
        .spawn()
        .unwrap()
}

#[test]
fn fio_finds_no_fault_while_workers_are_killed() {
    let (Some(qemu), Some(fio_tool)) = (tool("qemu-storage-daemon"), tool("fio")) else { return };
    let soak = std::env::var_os("VMSEAL_SOAK").is_some();
    let (least, kills) = if soak { (Duration::from_secs(600), 150) } else { (Duration::ZERO, 5) };
    let rig = Rig::with(Spec::fixed(32 * MIB));
    let daemon = Daemon::start(qemu, &rig);
    let began = Instant::now();
    let mut fio =
        fio(fio_tool, &daemon.mount, 32 << 10, if soak { 100_000 } else { 6 }, &rig.path("fio.log"));
    let (mut killed, mut written) = (0, 0u64);
    let heard = |name: &str| std::fs::read_to_string(rig.path(name)).unwrap();
    while killed < kills || began.elapsed() < least {
        // Each worker has to work before it goes: eight megabytes of somebody's data.
        let worker = loop {
            let status = rig.status();
            if status.disks[0].written_bytes >= 8 * MIB {
                written += status.disks[0].written_bytes;
                break status.worker_pid;
            }
            let ended = fio.try_wait().unwrap();
            assert!(ended.is_none() || killed >= kills, "fio ended early: {ended:?} {}", heard("fio.log"));
            if ended.is_some() {
                break 0;
            }
        };
        if worker == 0 {
            break;
        }
        kill(worker, libc::SIGKILL);
        killed += 1;
    }
    if soak {
        kill(fio.id() as i32, libc::SIGINT);
    }
    let end = fio.wait().unwrap();
    // An interrupted fio says so by 128, after it has checked what it wrote.
    assert!(end.success() || soak && end.code() == Some(128), "{end:?}: {}", heard("fio.log"));
    assert!(!heard("fio.log").contains("verify"), "{}", heard("fio.log"));
    println!("fio: {} MiB written, {killed} workers killed, {:?}", written / MIB, began.elapsed());
    drop(daemon);
    assert_eq!(rig.log().matches("died (signal 9)").count(), killed, "{}", rig.log());
}
