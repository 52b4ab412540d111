//! `make demo`: the main job on this machine, everything real: server, agent and a private libvirtd, a key provider with
//! its backup, a small Linux guest that was clear and is encrypted. Lets the guest write, looks whether the words are
//! anywhere in clear, kills what can be killed, recovers the key with stock tools. One line of evidence each; leaves it
//! running.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use vmseal_e2e::{
    house::{self, BACKUP_PASSWORD, House, path},
    lab::{self, Lab},
    libvirtd, scan, shell,
};

const NAME: &str = "demo";
const MARKER: &str = "THE-GUEST-WROTE-THIS-7f3a";
const EARLIER: &str = "THE-GUEST-HAD-THIS-BEFORE-91c4";

fn home() -> PathBuf {
    lab::target_dir().join("demo")
}

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("up") => up(),
        Some("down") => {
            down();
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: demo up | down");
            ExitCode::from(2)
        }
    }
}

/// Prints evidence, and remembers whether any failed.
struct Evidence {
    begin: Instant,
    failed: bool,
}

impl Evidence {
    fn line(&mut self, holds: bool, words: &str) {
        let seconds = self.begin.elapsed().as_secs_f32();
        println!("{} {words}  ({seconds:.1} s)", if holds { "✓" } else { "✗" });
        self.failed |= !holds;
    }
}

fn up() -> ExitCode {
    down();
    let mut evidence = Evidence { begin: Instant::now(), failed: false };
    let mut house = House::bare(Lab::kept(NAME, home()));
    house.start_server();
    evidence.line(true, "vmseal-server runs as its own user, with its own CA and audit");
    house.must_vmseal(&["provider", "create", "--native", "main"]);
    let early = house.json(&["provider", "show", "main"]);
    evidence.line(
        early["usable"] == false,
        "key provider 'main' is made, and unusable before its backup is verified",
    );
    house.back_up_provider("main");
    let provider = house.json(&["provider", "show", "main"]);
    let backup = house.backup("main");
    evidence.line(
        provider["usable"] == true,
        &format!("its backup {} is written, read back, verified", backup.display()),
    );

    house.join();
    house.start_agent();
    evidence.line(true, "this host has joined by a one-line token, vmseal-agent is connected");

    let guest = house.guest("web01", &[("vda", "64M", "raw")]);
    let image = &guest.disks[0].1;
    make_file_system(&house, image);
    house.define(&guest);
    let clear = scan::files_with(&house.lab.state, &[EARLIER.as_bytes()]);
    evidence.line(
        !clear.is_empty(),
        "a clear VM 'web01' is there, with a file in its ext4 that anybody can read",
    );
    house.must_vmseal(&["vm", "encrypt", "web01"]);
    let shown = house.json(&["vm", "show", "web01"]);
    let clear = scan::files_with(&house.lab.state, &[EARLIER.as_bytes()]);
    evidence.line(
        shown["coverage"] == "encrypted" && !image.exists() && clear.is_empty(),
        "vmseal vm encrypt web01: copied, compared, switched, the clear image wiped",
    );

    let mut console = house.boot(&guest);
    let read = console.sh("mount -t ext4 /dev/vda /mnt && cat /mnt/earlier");
    evidence.line(read.contains(EARLIER), "virsh start web01: it boots and reads what it had before");
    console.sh(&format!("echo {MARKER} > /mnt/marker && sync"));
    let (keeper, worker) = house.disk_pids("web01").expect("the disk answers");
    shell::must(Command::new("kill").args(["-9", &worker.to_string()]));
    let wrote = console.try_sh("dd if=/dev/zero of=/mnt/more bs=64k count=32 conv=fsync 2>/dev/null");
    let again = house.disk_pids("web01");
    evidence.line(
        wrote.0 == 0 && again.is_some_and(|(k, w)| k == keeper && w != worker),
        "its disk process is killed under I/O: the keeper starts another, the guest sees no error",
    );
    house.kill_agent();
    house.kill_server();
    let wrote =
        console.try_sh("dd if=/dev/zero of=/mnt/more bs=64k count=32 conv=fsync 2>/dev/null && umount /mnt");
    house.start_server();
    house.start_agent();
    evidence.line(wrote.0 == 0, "agent and server are killed: the guest goes on; both are back");
    house.power_off(&guest, &mut console);
    let clear = scan::files_with(&house.lab.state, &[MARKER.as_bytes()]);
    let clear = clear.iter().map(|(p, _)| p.display().to_string()).collect::<Vec<_>>().join(" ");
    evidence.line(
        clear.is_empty(),
        &format!("the guest's marker is in no file below {} {clear}", house.lab.state.display()),
    );
    recover(&house, &PathBuf::from(format!("{}.vmseal", image.display())), &mut evidence);
    let mut console = house.boot(&guest);
    let read = console.sh("mount -t ext4 /dev/vda /mnt && cat /mnt/marker && umount /mnt");
    evidence.line(read.contains(MARKER), "after power-off and power-on the guest reads it back");
    let audit = house.vmseal(&["audit", "verify"]);
    evidence.line(audit.ok(), &format!("vmseal audit verify: {}", audit.stdout.trim()));
    try_next(&house);
    let pids = house.leave().map(|pid| pid.to_string()).join("\n");
    fs::write(home().join("pids"), pids).expect("own folder");
    if evidence.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// An ext4 with one file in it, as any guest's data disk has.
fn make_file_system(house: &House, image: &Path) {
    let files = house.lab.folder("files");
    fs::write(files.join("earlier"), EARLIER).expect("own folder");
    shell::must(shell::tool("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&files).arg(image));
    fs::remove_dir_all(&files).expect("own folder");
}

fn recover(house: &House, volume: &Path, evidence: &mut Evidence) {
    let judged = house.vmseal(&["disk", "inspect", path(volume)]);
    evidence.line(judged.ok() && judged.stdout.contains("accept"), "vmseal disk inspect: accept");
    let key = house.lab.state.join("recovered.key");
    let password = house.lab.state.join("backup-password");
    house.must_vmseal(&[
        "key",
        "recover",
        "--volume",
        path(volume),
        "--backup",
        path(&house.backup("main")),
        "--password-file",
        path(&password),
        "--out",
        path(&key),
    ]);
    let opened = shell::run(
        shell::tool("cryptsetup")
            .args(["open", "--type", "luks2", "--test-passphrase", "--key-size", "512", "--volume-key-file"])
            .arg(&key)
            .arg(volume),
    );
    fs::remove_file(&key).expect("own file");
    evidence.line(opened.ok(), "the key recovered from the backup opens the volume with stock cryptsetup");
    evidence.line(
        scan::files_with(&house.lab.state.join("logs"), &[BACKUP_PASSWORD.as_bytes()]).is_empty(),
        "no secret in any log",
    );
}

fn try_next(house: &House) {
    let wrapper = home().join("vmseal");
    let script = format!(
        "#!/bin/sh\nexec {} --socket {}/api.sock \"$@\"\n",
        lab::bin("vmseal").display(),
        house.lab.run.display()
    );
    fs::write(&wrapper, script).expect("own folder");
    shell::must(shell::tool("chmod").arg("0755").arg(&wrapper));
    println!("\nIt all runs on. To try:");
    println!("  virsh -c '{}' list", libvirtd::uri(&house.lab.run));
    for line in ["status", "vm show web01", "provider show main", "task list", "audit list", "doctor"] {
        println!("  {} {line}", wrapper.display());
    }
    println!(
        "  socat -,rawer UNIX-CONNECT:{}/serial/web01    (the guest's shell)",
        house.lab.state.display()
    );
    println!("  make demo-down    (stops it and removes {})", home().display());
}

fn down() {
    let run = PathBuf::from(format!("/run/vmseal-{NAME}"));
    let pids = fs::read_to_string(home().join("pids")).unwrap_or_default();
    let state = if run.join("state").exists() { run.join("state") } else { home() };
    stop_guests(&run);
    for pid in pids.lines().filter_map(|p| p.parse::<i32>().ok()) {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if ["vmseal-agent", "vmseal-server", "libvirtd"].contains(&name.trim()) {
            shell::run(Command::new("kill").arg(pid.to_string()));
            if !gone_within(pid, Duration::from_secs(20)) {
                eprintln!("{} did not end in 20 s and is killed", name.trim());
                shell::run(Command::new("kill").args(["-9", &pid.to_string()]));
                shell::until("it ends", Duration::from_secs(20), || gone(pid));
            }
        }
    }
    house::end_disks(&run);
    if state.exists() || run.exists() {
        Lab::remove(NAME, &home());
    }
}

fn gone_within(pid: i32, deadline: Duration) -> bool {
    let end = Instant::now() + deadline;
    while !gone(pid) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    gone(pid)
}

/// Whether a process has ended; one that waits to be reaped has.
fn gone(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit(')').next().is_some_and(|s| s.starts_with(" Z")))
}

fn stop_guests(run: &Path) {
    let uri = libvirtd::uri(run);
    if run.join("libvirt/libvirt-sock").exists() {
        let names = shell::run(shell::tool("virsh").args(["-q", "-c", &uri, "list", "--name"])).stdout;
        for name in names.split_whitespace() {
            shell::run(shell::tool("virsh").args(["-q", "-c", &uri, "destroy", name]));
        }
    }
}
