//! `make demo`: the main job on this machine, with everything real: server, agent, a libvirtd of its own, a small
//! Linux guest. Encrypts it, boots it, lets it write, looks whether the words are anywhere in clear, recovers the key
//! with stock tools. One line of evidence each; leaves it running.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use vmseal_e2e::{
    house::{self, BACKUP_PASSWORD, House, path},
    lab::{self, Lab},
    libvirtd, scan, shell,
};

const NAME: &str = "demo";
const MARKER: &str = "THE-GUEST-WROTE-THIS-7f3a";

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
    let house = House::start(Lab::kept(NAME, home()));
    let version = house.libvirtd.must_virsh(&["version", "--daemon"]);
    let versions =
        version.lines().filter_map(|l| l.split_once(": ")).map(|(_, v)| v.trim()).collect::<Vec<_>>();
    evidence.line(true, &format!("server, agent and a private libvirtd run ({})", versions.join(", ")));
    let provider = house.json(&["provider", "show", "main"]);
    evidence.line(
        provider["usable"] == true,
        &format!(
            "key provider 'main' made, its backup {} written and verified",
            house.backup("main").display()
        ),
    );

    let guest = house.guest("web01", &[("vda", "64M", "raw")]);
    let image = guest.disks[0].1.clone();
    shell::must(shell::tool("mke2fs").args(["-q", "-t", "ext4"]).arg(&image));
    house.define(&guest);
    println!("  vmseal vm encrypt web01");
    house.must_vmseal(&["vm", "encrypt", "web01"]);
    let shown = house.json(&["vm", "show", "web01"]);
    evidence.line(shown["coverage"] == "encrypted", "VM web01 with its ext4 disk is encrypted");
    evidence.line(!image.exists(), &format!("the clear image {} is wiped and gone", image.display()));

    println!("  virsh start web01");
    let mut console = house.boot(&guest);
    console.sh(&format!("mount -t ext4 /dev/vda /mnt && echo {MARKER} > /mnt/marker && sync && umount /mnt"));
    evidence.line(true, "the guest boots from libvirt and writes a marker to its disk");
    house.power_off(&guest, &mut console);
    let clear = scan::files_with(&house.lab.state, &[MARKER.as_bytes()]);
    let clear = clear.iter().map(|(p, _)| p.display().to_string()).collect::<Vec<_>>().join(" ");
    evidence.line(
        clear.is_empty(),
        &format!("the marker is in no file below {} {clear}", house.lab.state.display()),
    );
    let mut console = house.boot(&guest);
    let read = console.sh("mount -t ext4 /dev/vda /mnt && cat /mnt/marker && umount /mnt");
    evidence.line(read.contains(MARKER), "after power-off and power-on the guest reads it back");

    recover(&house, &image, &mut evidence);
    try_next(&house);
    let pids = house.leave();
    fs::write(home().join("pids"), pids.map(|p| p.to_string()).join("\n")).expect("own folder");
    if evidence.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn recover(house: &House, image: &Path, evidence: &mut Evidence) {
    let volume = PathBuf::from(format!("{}.vmseal", image.display()));
    let key = house.lab.state.join("recovered.key");
    let password = house.lab.state.join("backup-password");
    house.must_vmseal(&[
        "key",
        "recover",
        "--volume",
        path(&volume),
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
            .arg(&volume),
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
    for line in ["status", "vm show web01", "task list", "audit list", "doctor"] {
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
            shell::until("it ends", std::time::Duration::from_secs(20), || {
                !Path::new(&format!("/proc/{pid}")).exists()
            });
        }
    }
    house::end_disks(&run);
    if state.exists() || run.exists() {
        Lab::remove(NAME, &home());
    }
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
