//! fio on the block device, and requests it does not make.

use std::{
    fs::{File, OpenOptions},
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

/// Where fio's words go.
const LOG: &str = "/tmp/fio.log";

/// fio with random sizes, flushes and trims, checking every block it wrote.
pub(crate) fn start(device: &Path) -> Child {
    let mut command = fio(device);
    command.args(["--direct=1", "--do_verify=1", "--verify=crc32c", "--verify_fatal=1", "--randrepeat=0"]);
    command.args([
        "--name=sizes",
        "--rw=randwrite",
        "--bsrange=512-131072",
        "--blockalign=512",
        "--size=12m",
    ]);
    command.args(["--iodepth=16", "--fsync=32", "--verify_backlog=64"]);
    command.args([
        "--name=trims",
        "--rw=randtrimwrite",
        "--bs=8k",
        "--offset=16m",
        "--size=2m",
        "--iodepth=1",
    ]);
    command.args(["--name=large", "--rw=write", "--bs=1m", "--offset=24m", "--size=16m", "--iodepth=4"]);
    command.args(["--fdatasync=4"]);
    command.spawn().unwrap()
}

/// fio with more requests at a time than all queues have, checked too.
pub(crate) fn start_deep(device: &Path) -> Child {
    let mut command = fio(device);
    command.args(["--direct=1", "--do_verify=1", "--verify=crc32c", "--verify_fatal=1", "--randrepeat=0"]);
    command.args(["--rw=randwrite", "--bs=4k", "--size=200k", "--offset_increment=1m", "--iodepth=128"]);
    command.args(["--cpus_allowed=0-1", "--cpus_allowed_policy=split", "--numjobs=2", "--name=deep"]);
    command.spawn().unwrap()
}

/// What fio says at its end.
pub(crate) fn must_be_content(status: ExitStatus) {
    let said = std::fs::read_to_string(LOG).unwrap_or_default();
    assert!(status.success() && !said.contains("verify:"), "fio: {status:?}\n{said}");
}

/// fio finds a byte that changed behind its back: what shows that the other runs would have.
pub(crate) fn must_find_a_wrong_byte(device: &Path) {
    let run = |only: bool| {
        let mut command = fio(device);
        command.args(["--direct=1", "--name=control", "--rw=write", "--bs=4k", "--size=1m", "--offset=48m"]);
        command.args(["--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--do_verify=1"]);
        if only {
            command.arg("--verify_only");
        }
        command.spawn().unwrap().wait().unwrap()
    };
    must_be_content(run(false));
    must_be_content(run(true));
    let file = OpenOptions::new().read(true).write(true).open(device).unwrap();
    let (mut byte, at) = ([0], (48 << 20) + 123_456);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
    file.sync_all().unwrap();
    let status = run(true);
    let said = std::fs::read_to_string(LOG).unwrap();
    assert!(
        !status.success() && said.contains("verify"),
        "fio does not find a wrong byte: {status:?}\n{said}"
    );
}

/// Random reads of 4 KiB, so many at a time; how many in a second.
pub(crate) fn reads_per_second(device: &Path, depth: u32) -> u64 {
    let mut command = fio(device);
    command.args(["--direct=1", "--name=speed", "--rw=randread", "--bs=4k", "--size=32m"]);
    command.args(["--time_based", "--runtime=5", "--minimal", &format!("--iodepth={depth}")]);
    must_be_content(command.spawn().unwrap().wait().unwrap());
    let said = std::fs::read_to_string(LOG).unwrap();
    // Field 8 of fio's terse output, version 3: reads a second.
    said.lines()
        .find(|line| line.starts_with("3;"))
        .and_then(|line| line.split(';').nth(7)?.parse().ok())
        .unwrap()
}

/// Discards and zeros, by the calls that file systems' tools make.
pub(crate) fn must_discard_and_zero(device: &Path) {
    const BLKDISCARD: libc::c_ulong = 0x1277;
    const BLKZEROOUT: libc::c_ulong = 0x127f;
    let file = OpenOptions::new().read(true).write(true).open(device).unwrap();
    let at = 52u64 << 20;
    file.write_all_at(&[0xaa; 1 << 20], at).unwrap();
    file.sync_all().unwrap();
    for (call, range) in [(BLKZEROOUT, [at, 1 << 19]), (BLKDISCARD, [at + (1 << 19), 1 << 19])] {
        // SAFETY: the call reads two words, which outlive it.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), call, range.as_ptr()) };
        assert_eq!(done, 0, "{call:#x}: {}", std::io::Error::last_os_error());
    }
    let mut zeros = vec![1; 1 << 19];
    file.read_exact_at(&mut zeros, at).unwrap();
    assert!(zeros.iter().all(|byte| *byte == 0), "zeros were not written");
}

fn fio(device: &Path) -> Command {
    let mut command = Command::new("/bin/fio");
    let log = File::create(LOG).unwrap();
    command.stdout(log.try_clone().unwrap()).stderr(log).stdin(Stdio::null()).current_dir("/tmp");
    command.arg(format!("--filename={}", device.display()));
    command.args(["--ioengine=io_uring", "--verify_state_save=0", "--thread", "--exitall_on_error"]);
    command
}
