//! Block devices of the host, in a guest whose kernel has ublk_drv. What is done there: `src/bin/ublk_guest`.

use std::{
    fs::{self, File},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use vmseal_e2e::{lab, rounds, shell};

/// Boot, the guest's fixed part, and what an emulated processor takes longer on a busy machine.
const BESIDE: Duration = Duration::from_secs(280);

#[test]
fn block_device_of_the_host_survives_its_worker_and_its_warden() {
    let made = lab::target_dir().join("lab-ublk");
    let programs = ["vmseal-disk", "vmseal-ublk", "ublk_guest"].map(lab::bin);
    shell::must(Command::new(lab::tree().join("tests/lab/ublk-guest.sh")).arg(&made).args(&programs));
    let seconds = rounds(10, 600);
    let console = made.join("console");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "768", "-display", "none"]);
    qemu.args(["-nodefaults", "-no-reboot", "-serial", &format!("file:{}", console.display())]);
    qemu.arg("-kernel").arg(made.join("vmlinuz")).arg("-initrd").arg(made.join("initrd"));
    let bench = rounds(0, 1);
    let append = format!("console=ttyS0 quiet panic=-1 vmseal.seconds={seconds} vmseal.bench={bench}");
    qemu.args(["-append", &append]);
    // The second one is slow.
    let volumes = [(80u64 << 20, ""), (16 << 20, ",throttling.iops-total=40")].map(|(bytes, more)| {
        let path = made.join(format!("volume-{bytes}-{}", std::process::id()));
        File::create(&path).unwrap().set_len(bytes).unwrap();
        let drive = format!("file={},format=raw,if=virtio,cache=none,discard=unmap{more}", path.display());
        qemu.args(["-drive", &drive]);
        path
    });
    let mut qemu =
        qemu.stdin(Stdio::null()).spawn().expect("qemu-system-x86_64 is installed: run tests/lab/setup.sh");
    let began = Instant::now();
    let limit = Duration::from_secs(seconds as u64) + BESIDE;
    let ended = shell::wait_within(&mut qemu, limit);
    if ended.is_none() {
        qemu.kill().unwrap();
        qemu.wait().unwrap();
    }
    volumes.iter().for_each(|volume| fs::remove_file(volume).unwrap());
    let said = String::from_utf8_lossy(&fs::read(&console).unwrap()).replace('\r', "");
    let verdict = said.lines().find(|line| line.starts_with("UBLK-VERDICT"));
    assert!(
        verdict.is_some_and(|line| line.starts_with("UBLK-VERDICT good")),
        "after {:?}, in time: {}; the guest says:\n{said}",
        began.elapsed(),
        ended.is_some()
    );
    println!("{said}\nin {:?}", began.elapsed());
}
