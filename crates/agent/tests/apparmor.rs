//! The AppArmor rule that is shipped, compiled without a kernel by `apparmor_parser`, within libvirt's own rules for
//! QEMU.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// What libvirt writes for every domain.
const PROFILE: &str = "\
#include <tunables/global>
profile libvirt-00112233-4455-6677-8899-aabbccddeeff flags=(attach_disconnected) {
  #include <abstractions/libvirt-qemu>
}
";
const INSTALLED: &str = "/etc/apparmor.d";

fn shipped() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/apparmor/vmseal");
    fs::read_to_string(file).unwrap()
}

/// A copy of this machine's rules, in which ours can lie.
struct Rules(PathBuf);

impl Rules {
    /// `None`, and a word about it, where AppArmor's parser or libvirt's rules are not installed.
    fn copied(name: &str) -> Option<Self> {
        let parser = Command::new("apparmor_parser").arg("--version").output();
        if !parser.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: apparmor_parser is not there (package apparmor)");
            return None;
        }
        if !Path::new(INSTALLED).join("abstractions/libvirt-qemu").exists() {
            eprintln!("skipped: libvirt's rules for QEMU are not there (package libvirt-daemon-system)");
            return None;
        }
        let base =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("apparmor-{name}-{}", std::process::id()));
        let rules = Self(base);
        for dir in ["abi", "abstractions", "tunables"] {
            copy(&Path::new(INSTALLED).join(dir), &rules.0.join(dir));
        }
        // One that is installed here is not the one that is tried.
        let _ = fs::remove_file(rules.ours());
        fs::write(rules.0.join("profile"), PROFILE).unwrap();
        Some(rules)
    }

    /// Where `docs/operate/install.md` puts ours.
    fn ours(&self) -> PathBuf {
        self.0.join("abstractions/libvirt-qemu.d/vmseal")
    }

    fn with(&self, text: &str) -> Output {
        fs::create_dir_all(self.ours().parent().unwrap()).unwrap();
        fs::write(self.ours(), text).unwrap();
        self.compile()
    }

    /// The compiled profile is on standard output.
    fn compile(&self) -> Output {
        let mut parser = Command::new("apparmor_parser");
        parser.args(["--skip-kernel-load", "--skip-cache", "--quiet", "--stdout", "--base"]).arg(&self.0);
        parser.arg(self.0.join("profile")).output().unwrap()
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let Ok(entries) = fs::read_dir(from) else { return };
    for entry in entries {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.as_ref().unwrap().file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(from, to).unwrap();
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn shipped_rule_compiles_within_libvirts_and_becomes_part_of_them() {
    let Some(rules) = Rules::copied("good") else { return };
    let without = rules.compile();
    assert!(without.status.success(), "libvirt's own rules: {}", said(&without));
    let with = rules.with(&shipped());
    assert!(with.status.success(), "{}", said(&with));
    assert!(!with.stdout.is_empty() && with.stdout != without.stdout, "libvirt's rules do not include it");
}

#[test]
fn rule_with_a_syntax_error_does_not_compile() {
    let Some(rules) = Rules::copied("bad") else { return };
    let broken = shipped().replace(" rw,", " rw");
    assert_ne!(broken, shipped());
    let output = rules.with(&broken);
    assert!(!output.status.success());
    assert!(said(&output).contains("syntax error"), "{}", said(&output));
}

#[test]
fn shipped_rule_is_for_the_sockets_that_the_agent_makes() {
    let config = vmseal_agent::config::AgentConfig::default();
    let socket = config.disk_socket("00112233-4455-6677-8899-aabbccddeeff".parse().unwrap(), "vda");
    let rule = "/run/vmseal/libvirt-*/*.sock";
    assert!(shipped().lines().any(|line| line.trim() == format!("{rule} rw,")), "{}", shipped());
    let parts: Vec<&str> = rule.split('*').collect();
    let socket = socket.to_str().unwrap();
    assert!(socket.starts_with(parts[0]) && socket.ends_with(parts[2]), "{socket}");
    assert_eq!(socket.matches('/').count(), rule.matches('/').count());
}

/// libvirt writes a rule for a disk that is a block device itself, for what the name stands for; so ours needs none, which
/// would let each QEMU at the devices of all.
#[test]
fn libvirt_lets_a_qemu_at_the_block_device_that_a_disks_name_stands_for() {
    const HELPER: &str = "/usr/lib/libvirt/virt-aa-helper";
    let is_device = |path: &&str| {
        use std::os::unix::fs::FileTypeExt as _;
        fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
    };
    let Some(device) = ["/dev/loop0", "/dev/vda", "/dev/sda", "/dev/nvme0n1"].into_iter().find(is_device)
    else {
        return eprintln!("skipped: this machine has no block device");
    };
    if !Path::new(HELPER).exists() {
        return eprintln!("skipped: libvirt's AppArmor helper is not there (package libvirt-daemon-system)");
    }
    let name = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ublk-name-{}", std::process::id()));
    let _ = fs::remove_file(&name);
    std::os::unix::fs::symlink(device, &name).unwrap();
    let uuid = "00112233-4455-6677-8899-aabbccddeeff";
    let xml = format!(
        "<domain type='qemu'><name>a</name><uuid>{uuid}</uuid><memory>65536</memory>\
         <os><type arch='x86_64'>hvm</type></os><devices><disk type='block' device='disk'>\
         <driver name='qemu' type='raw' cache='none' io='io_uring'/><source dev='{}'/>\
         <target dev='vda' bus='virtio'/></disk></devices></domain>",
        name.display()
    );
    let mut helper = Command::new(HELPER);
    helper.args(["--dryrun", "-c", "-u", &format!("libvirt-{uuid}")]);
    let mut helper = helper
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut helper.stdin.take().unwrap(), xml.as_bytes()).unwrap();
    let output = helper.wait_with_output().unwrap();
    fs::remove_file(&name).unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), said(&output));
    assert!(text.contains(&format!("\"{device}\" rwk,")), "{text}");
    assert!(!shipped().lines().any(|line| line.trim_start().starts_with("/dev/")), "{}", shipped());
}
