//! Runs in the guest that `tests/lab/ublk-guest.sh` makes: disks as block devices of that Linux, whose servers are killed.
//! The last line on the console is the verdict, which `tests/ublk.rs` reads.

mod load;
mod stage;

use std::{
    fs::{self, File},
    os::{fd::AsFd, unix::process::CommandExt},
    panic,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use vmseal_model::control::{ControlReply, ControlRequest};

use stage::{PATIENCE, Stage, Warden, kill, wait_for};

const VOLUME: &str = "/dev/vda";
const BYTES: u64 = 64 << 20;
/// Does some hundred requests a second.
const SLOW_VOLUME: &str = "/dev/vdb";
const SLOW_BYTES: u64 = 8 << 20;
/// A worker has to have done so much before it is killed.
const WORK: u64 = 2 << 20;

/// What was done.
#[derive(Debug, Default)]
struct Counts {
    runs: usize,
    turns: usize,
    workers: usize,
    wardens: usize,
    upgrades: usize,
    both: usize,
    cut_off: usize,
    /// Recoveries that had been cut off and were begun anew.
    refilled: usize,
    written: u64,
}

fn main() {
    let asked = fs::read_to_string("/proc/cmdline").unwrap();
    let value = |name: &str| {
        asked.split_whitespace().find_map(|word| word.strip_prefix(name)?.parse::<u64>().ok()).unwrap_or(0)
    };
    let (seconds, bench) = (value("vmseal.seconds="), value("vmseal.bench="));
    let outcome = panic::catch_unwind(|| run(Duration::from_secs(seconds), bench > 0));
    match outcome {
        Ok(counts) => println!("UBLK-VERDICT good {counts:?}"),
        Err(_) => {
            for path in ["/run/stage/log", "/run/slow/log", "/run/warden.log", "/tmp/fio.log"] {
                println!("--- {path}\n{}", fs::read_to_string(path).unwrap_or_default());
            }
            println!("--- kernel\n{}", kernel_log());
            who_waits_where();
            println!("UBLK-VERDICT bad");
        }
    }
}

fn run(least: Duration, bench: bool) -> Counts {
    fs::write("/proc/sys/kernel/printk", "1").unwrap();
    println!("kernel {}", fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim());
    let nobody = PathBuf::from("/run/nobody.sock");
    let said = Warden::start(vmseal_model::id::DiskId::from_bytes([1; 16]), &nobody).err().unwrap();
    assert!(said.contains("nobody listens"), "{said}");

    let stage = Stage::start("stage", VOLUME, BYTES);
    let status = stage.status();
    println!("secret memory: {}; sandbox: {:?}", status.secret_memory, status.sandbox);
    assert!(status.sandbox.seccomp && status.sandbox.landlock > 0, "the worker has no sandbox");
    let warden = Warden::start(stage.disk, &stage.socket()).unwrap();
    looks_like_the_disk(&warden);
    host_keeps_off(&warden);
    load::must_discard_and_zero(&warden.link);
    load::must_find_a_wrong_byte(&warden.link);
    println!("a wrong byte is found, zeros and discards arrive, {:?} after boot", uptime());
    let said = Warden::start(stage.disk, &stage.socket()).err().unwrap();
    assert!(said.contains("looks after disk"), "{said}");
    let mut other = Command::new("/bin/vmseal-ublk");
    other.uid(900);
    let said = Warden::start_as(other, stage.disk, &stage.socket()).err().unwrap();
    assert!(said.contains("made by root"), "{said}");

    full_queues_survive();
    let mut counts = Counts::default();
    let mut warden = Some(warden);
    let began = Instant::now();
    // Each way to die at least once.
    while began.elapsed() < least || counts.runs == 0 || counts.cut_off == 0 {
        let device = warden.as_ref().unwrap().link.clone();
        let mut fio = load::start(&device);
        loop {
            if let Some(status) = fio.try_wait().unwrap() {
                load::must_be_content(status);
                break;
            }
            kill_somebody(&stage, &mut warden, &mut counts, &mut fio);
        }
        counts.runs += 1;
        println!("{:?} {counts:?}", began.elapsed());
    }
    let warden = warden.unwrap();
    if bench {
        for depth in [1, 16] {
            let raw = load::reads_per_second(Path::new(VOLUME), depth);
            let ours = load::reads_per_second(&warden.link, depth);
            println!(
                "reads of 4 KiB a second, {depth} at a time: {raw} of the volume, {ours} of the block device"
            );
        }
    }

    // The disk process does not end under a device that is there.
    let reply = stage.ask(&ControlRequest::Stop { force: false }, &[]);
    assert!(matches!(&reply, ControlReply::Refused { message } if message.contains("in use")), "{reply:?}");
    // In order: nothing is left.
    let device = warden.device();
    assert!(warden.end().success());
    nothing_is_left(&device);
    // The disk is still there, and is made a device again; its keeper's end is the device's too.
    let warden = Warden::start(stage.disk, &stage.socket()).unwrap();
    let device = warden.device();
    assert_eq!(stage.status().sandbox.stopped, 0, "the sandbox stopped a worker");
    let log = stage.kill();
    assert!(warden.wait().success());
    nothing_is_left(&device);
    let died = log.matches("died (signal 9)").count();
    assert_eq!(died, counts.workers, "other workers died than were killed:\n{log}");

    let kernel = kernel_log();
    for bad in ["I/O error", "WARNING", "BUG", "Oops", "blocked for more", "Call Trace"] {
        assert!(!kernel.contains(bad), "the kernel says {bad}");
    }
    assert!(Command::new("/bin/rmmod").arg("ublk_drv").status().unwrap().success(), "the driver is in use");
    let said = Warden::start(vmseal_model::id::DiskId::from_bytes([1; 16]), &nobody).err().unwrap();
    assert!(said.contains("modprobe ublk_drv"), "{said}");
    let wardens = fs::read_to_string("/run/warden.log").unwrap();
    counts.refilled = wardens.matches("it is begun anew").count();
    counts
}

/// A worker that dies while storage is slow and no queue has room for another request.
fn full_queues_survive() {
    let stage = Stage::start("slow", SLOW_VOLUME, SLOW_BYTES);
    let mut patient = Command::new("/bin/vmseal-ublk");
    patient.args(["--linger", "600"]);
    let warden = Warden::start_as(patient, stage.disk, &stage.socket()).unwrap();
    let inflight = format!("/sys/block/{}/inflight", warden.device());
    let mut fio = load::start_deep(&warden.link);
    let worker = stage.status().worker_pid;
    wait_for("full queues", || {
        let text = fs::read_to_string(&inflight).unwrap();
        let under_way: u32 = text.split_whitespace().map(|number| number.parse::<u32>().unwrap()).sum();
        // A queue has 32. Which of the two a request goes to is the kernel's choice: both need not be full at once.
        (under_way >= 32).then_some(())
    });
    // The worker has taken them, and waits for storage.
    thread::sleep(Duration::from_millis(50));
    kill(worker, libc::SIGKILL);
    let killed = Instant::now();
    wait_for("a worker that serves", || {
        let disk = stage.status().disks.remove(0);
        (disk.read_bytes + disk.written_bytes > 0).then_some(())
    });
    let stalled = killed.elapsed();
    // The driver would notice by itself after 30 s.
    assert!(stalled < Duration::from_secs(20), "the device stood still for {stalled:?}");
    load::must_be_content(fio.wait().unwrap());
    // Without a keeper it waits as long as it was told to, and ends in order meanwhile too.
    stage.kill();
    wait_for("a warden that waits for another keeper", || {
        fs::read_to_string("/run/warden.log").unwrap().contains("waits 600 s for the next").then_some(())
    });
    let device = warden.device();
    assert!(fs::exists(format!("/dev/{device}")).unwrap(), "the device did not wait");
    assert!(warden.end().success());
    assert!(!fs::exists(format!("/dev/{device}")).unwrap(), "{device} is left");
    println!("full queues stand still for {stalled:?}; {:?} after boot", uptime());
}

/// Waits until the worker has worked, and kills it, or the warden, or both, in turn.
fn kill_somebody(
    stage: &Stage,
    warden: &mut Option<Warden>,
    counts: &mut Counts,
    fio: &mut std::process::Child,
) {
    let end = Instant::now() + PATIENCE;
    let worker = loop {
        let status = stage.status();
        if status.disks[0].written_bytes >= WORK {
            counts.written += status.disks[0].written_bytes >> 20;
            break status.worker_pid;
        }
        if fio.try_wait().unwrap().is_some() {
            return;
        }
        assert!(Instant::now() < end, "nothing is written any more");
        thread::sleep(Duration::from_millis(20));
    };
    let again = |warden: &mut Option<Warden>| {
        let before = warden.take().unwrap();
        let device = before.device();
        before.kill();
        let next = Warden::start(stage.disk, &stage.socket()).unwrap();
        assert_eq!(next.device(), device, "a new device instead of the one that is there");
        *warden = Some(next);
    };
    let turn = counts.turns;
    counts.turns += 1;
    match turn % 6 {
        0 | 2 => kill(worker, libc::SIGKILL),
        1 => {
            again(warden);
            counts.wardens += 1;
            // Its end was nobody's matter.
            assert_eq!(stage.status().worker_pid, worker);
            return;
        }
        5 => {
            let program = File::open("/bin/vmseal-disk").unwrap();
            let reply = stage.ask(&ControlRequest::Upgrade, &[program.as_fd()]);
            assert_eq!(reply, ControlReply::Upgrading);
            counts.upgrades += 1;
            return;
        }
        3 => {
            kill(worker, libc::SIGKILL);
            again(warden);
            counts.wardens += 1;
            counts.both += 1;
        }
        _ => {
            // And the next one a moment after it is there, which is somewhere in the recovery, each time elsewhere.
            kill(worker, libc::SIGKILL);
            let next =
                wait_for("another worker", || Some(stage.status().worker_pid).filter(|pid| *pid != worker));
            thread::sleep(Duration::from_millis(turn as u64 * 7 % 40));
            kill(next, libc::SIGKILL);
            again(warden);
            counts.workers += 1;
            counts.wardens += 1;
            counts.cut_off += 1;
        }
    }
    counts.workers += 1;
}

fn looks_like_the_disk(warden: &Warden) {
    let device = warden.device();
    let about = |name: &str| {
        let text = fs::read_to_string(format!("/sys/block/{device}/{name}")).unwrap();
        text.trim().to_owned()
    };
    assert_eq!(about("size"), (BYTES / 512).to_string());
    assert_eq!(about("queue/logical_block_size"), "512");
    assert_eq!((about("queue/write_cache"), about("queue/fua")), ("write back".into(), "1".into()));
    assert_eq!(about("ro"), "0");
    let queues = fs::read_dir(format!("/sys/block/{device}/mq")).unwrap().count();
    assert_eq!(queues, 2, "one queue for each processor");
    assert_eq!(about("queue/nr_requests"), "32", "no request is spared");
    for name in ["queue/discard_max_bytes", "queue/write_zeroes_max_bytes"] {
        assert_ne!(about(name), "0", "{name}");
    }
    assert!(Path::new(&format!("/run/vmseal-ublk/{device}")).exists(), "no mark for udev");
    // What looks like a partition stays what the guest made of it: the host's kernel does not look.
    let mut first = [0u8; 512];
    first[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0]);
    first[510..].copy_from_slice(&[0x55, 0xaa]);
    let disk = fs::OpenOptions::new().write(true).open(&warden.link).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &first, 0).unwrap();
    drop(disk);
    let _ = Command::new("/bin/blockdev").arg("--rereadpt").arg(&warden.link).output().unwrap();
    assert!(!Path::new(&format!("/sys/block/{device}/{device}p1")).exists(), "the host sees a partition");
}

/// udev knows nothing of what is on the device, and would without the mark.
fn host_keeps_off(warden: &Warden) {
    let device = warden.device();
    let mark = PathBuf::from(format!("/run/vmseal-ublk/{device}"));
    let udevadm = |arguments: &[&str]| {
        let output = Command::new("/bin/udevadm").args(arguments).output().unwrap();
        assert!(output.status.success(), "udevadm {arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let known = || {
        udevadm(&["trigger", "--action=change", "--settle", &format!("/sys/block/{device}")]);
        udevadm(&["info", "--query=property", &format!("--name=/dev/{device}")])
    };
    let content = ["ID_PART_TABLE_TYPE=dos", "ID_FS_"];
    let guarded = known();
    for said in ["UDISKS_IGNORE=1", "SYSTEMD_READY=0"] {
        assert!(guarded.contains(said), "no {said}:\n{guarded}");
    }
    assert!(!content.iter().any(|it| guarded.contains(it)), "{guarded}");
    let text = fs::read(&mark).unwrap();
    fs::remove_file(&mark).unwrap();
    let unguarded = known();
    assert!(unguarded.contains(content[0]) && !unguarded.contains("UDISKS_IGNORE"), "{unguarded}");
    fs::write(&mark, text).unwrap();
    let again = known();
    assert!(!again.contains(content[0]), "{again}");
}

fn nothing_is_left(device: &str) {
    let number = device.strip_prefix("ublkb").unwrap();
    for path in [
        format!("/dev/{device}"),
        format!("/dev/ublkc{number}"),
        format!("/sys/block/{device}"),
        "/dev/vmseal".into(),
        "/run/vmseal-ublk".into(),
    ] {
        assert!(!fs::exists(&path).unwrap(), "{path} is left");
    }
}

fn kernel_log() -> String {
    let output = Command::new("/bin/dmesg").output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Where processes are in the kernel, and requests in the block layer.
fn who_waits_where() {
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let read = |name: &str| fs::read_to_string(process.path().join(name)).unwrap_or_default();
        let name = read("comm");
        if !["vmseal-", "fio", "kworker", "iou-wrk"].iter().any(|it| name.starts_with(it)) {
            continue;
        }
        for thread in fs::read_dir(process.path().join("task")).into_iter().flatten().flatten() {
            let stack = fs::read_to_string(thread.path().join("stack")).unwrap_or_default();
            let name = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
            if !stack.contains("worker_thread") {
                println!("--- {} {}\n{stack}", thread.path().display(), name.trim());
            }
        }
    }
    let show = Command::new("/bin/sh")
        .args([
            "-c",
            "for f in /sys/kernel/debug/block/ublkb*/state /sys/kernel/debug/block/ublkb*/requeue_list \
            /sys/kernel/debug/block/ublkb*/hctx*/busy /sys/kernel/debug/block/ublkb*/hctx*/state \
            /sys/kernel/debug/block/ublkb*/hctx*/dispatch; do echo $f; cat $f; done",
        ])
        .output()
        .unwrap();
    println!("{}", String::from_utf8_lossy(&show.stdout));
}

fn uptime() -> Duration {
    let text = fs::read_to_string("/proc/uptime").unwrap();
    Duration::from_secs_f64(text.split(' ').next().unwrap().parse().unwrap())
}
