use std::os::unix::fs::symlink;

use super::*;
use crate::scratch::Scratch;

/// A host on which everything is right, below a scratch directory.
struct Lab {
    scratch: Scratch,
    config: AgentConfig,
}

impl Lab {
    fn new() -> Self {
        let config = AgentConfig {
            disk_binary: Some("/usr/libexec/vmseal/vmseal-disk".into()),
            ublk_binary: Some("/usr/libexec/vmseal/vmseal-ublk".into()),
            ..AgentConfig::default()
        };
        let lab = Self { scratch: Scratch::new(), config };
        lab.write("/proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        lab.write("/sys/module/apparmor/parameters/enabled", "Y\n");
        lab.write(QEMU_RULES, "  #include <abstractions/base>\n");
        lab.write(OUR_RULES, include_str!("../../../../deploy/apparmor/vmseal"));
        lab.program("/etc/libvirt/hooks/qemu.d/50-vmseal", 0o755);
        lab.program("/usr/libexec/vmseal/vmseal-disk", 0o755);
        lab.program("/usr/libexec/vmseal/vmseal-ublk", 0o755);
        lab.write("/dev/ublk-control", "");
        lab.write("/etc/udev/rules.d/60-vmseal.rules", "KERNEL==\"ublkb*\"");
        lab.write(
            "/etc/passwd",
            "root:x:0:0::/root:/bin/sh\nvmseal-disk:x:990:990::/nonexistent:/usr/sbin/nologin\n",
        );
        lab.write("/etc/group", "root:x:0:\nlibvirt-qemu:x:64055:\n");
        lab
    }

    fn at(&self, path: &str) -> PathBuf {
        self.scratch.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn program(&self, path: &str, mode: u32) {
        self.write(path, "");
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(mode)).unwrap();
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.at(path)).unwrap();
    }

    fn link(&self, to: &str, path: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(to, path).unwrap();
    }

    fn swap_on(&self, areas: &[&str]) {
        let lines: String = areas.iter().map(|area| format!("{area}  partition\t1\t0\t-2\n")).collect();
        self.write("/proc/swaps", &format!("Filename\tType\tSize\tUsed\tPriority\n{lines}"));
    }

    fn device_on(&self, device: &str, below: &[&str]) {
        for name in below {
            self.link("..", &format!("/sys/block/{device}/slaves/{name}"));
        }
    }

    /// Findings but for that of this kernel's secret memory.
    fn findings(&self) -> Vec<Warning> {
        let mut all = findings(&self.config, self.scratch.path());
        all.retain(|warning| warning.code != "secret-memory-weak");
        all
    }

    fn codes(&self) -> Vec<String> {
        self.findings().into_iter().map(|warning| warning.code).collect()
    }

    /// The one finding.
    fn only(&self, code: &str) -> Warning {
        let mut all = self.findings();
        assert!(all.len() == 1 && all[0].code == code, "{all:?}");
        assert!(!all[0].hint.is_empty());
        all.remove(0)
    }
}

#[test]
fn nothing_is_found_where_all_is_right() {
    assert_eq!(Lab::new().codes(), [""; 0]);
}

#[test]
fn host_without_ublk_is_amiss_where_it_has_disks_that_need_it() {
    let lab = Lab::new();
    let root = lab.scratch.path();
    assert_eq!(of_devices(root, 3), None);
    lab.remove("/dev/ublk-control");
    lab.remove("/etc/udev/rules.d/60-vmseal.rules");
    lab.remove("/usr/libexec/vmseal/vmseal-ublk");
    lab.write("/proc/sys/kernel/osrelease", "6.1.0\n");
    assert_eq!((lab.codes(), of_devices(root, 0)), (Vec::new(), None));
    let found = of_devices(root, 3).unwrap();
    assert!(
        found.message.starts_with("3 disks here") && found.message.contains("6.1.0 has no module"),
        "{found:?}"
    );
}

#[test]
fn ublk_without_its_program_or_its_rules_is_found() {
    let lab = Lab::new();
    lab.program("/usr/libexec/vmseal/vmseal-ublk", 0o644);
    lab.only("ublk-program-missing");
    lab.program("/usr/libexec/vmseal/vmseal-ublk", 0o755);
    lab.remove("/etc/udev/rules.d/60-vmseal.rules");
    lab.only("ublk-udev-rules-missing");
}

#[test]
fn libvirt_guests_that_suspends_is_found_with_its_file() {
    let lab = Lab::new();
    lab.write(
        "/usr/lib/libvirt/libvirt-guests.sh",
        "URIS=\"default\"\nON_SHUTDOWN=\"shutdown\"\n    ON_SHUTDOWN=suspend\n",
    );
    lab.write("/etc/default/libvirt-guests", "#ON_SHUTDOWN=suspend\n");
    assert_eq!(lab.codes(), [""; 0], "Debian shuts guests down unless told otherwise");
    lab.write("/etc/default/libvirt-guests", "ON_SHUTDOWN=shutdown\n  ON_SHUTDOWN='suspend' # quick\n");
    let found = lab.only("libvirt-guests-suspend");
    assert!(found.message.contains("ON_SHUTDOWN=suspend in /etc/default/libvirt-guests"), "{found:?}");
    lab.link("/dev/null", GUESTS_UNIT);
    assert_eq!(lab.codes(), [""; 0], "a masked unit does nothing");
}

#[test]
fn libvirt_guests_that_says_nothing_does_what_its_script_does() {
    let lab = Lab::new();
    lab.write("/etc/sysconfig/libvirt-guests", "# nothing\n");
    let found = lab.only("libvirt-guests-suspend");
    assert!(found.message.contains("not set in /etc/sysconfig/libvirt-guests"), "{found:?}");
    lab.write("/usr/libexec/libvirt-guests.sh", "ON_SHUTDOWN=shutdown\n");
    assert_eq!(lab.codes(), [""; 0]);
    lab.write("/usr/libexec/libvirt-guests.sh", "ON_SHUTDOWN=\"suspend\"\n");
    lab.only("libvirt-guests-suspend");
}

#[test]
fn swap_in_clear_is_found_by_its_name() {
    let lab = Lab::new();
    lab.swap_on(&["/dev/sda3", "/srv/my\\040swap"]);
    let found = lab.only("clear-swap");
    assert!(found.message.contains("/dev/sda3, /srv/my swap"), "{found:?}");
}

#[test]
fn swap_on_dm_crypt_is_none_of_it() {
    let lab = Lab::new();
    lab.write("/sys/block/dm-1/dm/uuid", "CRYPT-PLAIN-swap\n");
    lab.link("../dm-1", "/dev/mapper/swap");
    lab.swap_on(&["/dev/dm-1", "/dev/mapper/swap"]);
    assert_eq!(lab.codes(), [""; 0]);
    // A logical volume over LUKS, and one of whose two disks only one is encrypted.
    lab.write("/sys/block/dm-2/dm/uuid", "LVM-abc\n");
    lab.device_on("dm-2", &["dm-1"]);
    lab.swap_on(&["/dev/dm-2"]);
    assert_eq!(lab.codes(), [""; 0]);
    lab.device_on("dm-2", &["sdb1"]);
    lab.only("clear-swap");
    lab.write("/sys/block/dm-1/dm/uuid", "CRYPT-INTEGRITY-swap\n");
    lab.swap_on(&["/dev/dm-1"]);
    lab.only("clear-swap");
}

#[test]
fn devices_on_themselves_end() {
    let lab = Lab::new();
    lab.device_on("dm-1", &["dm-1"]);
    lab.swap_on(&["/dev/dm-1"]);
    lab.only("clear-swap");
}

#[test]
fn zram_is_memory_unless_it_writes_back() {
    let lab = Lab::new();
    lab.swap_on(&["/dev/zram0"]);
    lab.write("/sys/block/zram0/backing_dev", "none\n");
    assert_eq!(lab.codes(), [""; 0]);
    lab.write("/sys/block/zram0/backing_dev", "/dev/sdb\n");
    lab.only("clear-swap");
}

#[test]
fn swap_file_is_as_safe_as_the_device_below_it() {
    let lab = Lab::new();
    lab.write("/swapfile", "");
    lab.swap_on(&["/swapfile"]);
    lab.only("clear-swap");
    let number = {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(lab.at("/swapfile")).unwrap().dev()
    };
    let number = format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number));
    lab.link("../../devices/virtual/block/dm-7", &number);
    lab.write("/sys/block/dm-7/dm/uuid", "CRYPT-LUKS2-abc-root\n");
    assert_eq!(lab.codes(), [""; 0]);
}

#[test]
fn missing_apparmor_rule_is_found_where_apparmor_confines_qemu() {
    let mut lab = Lab::new();
    lab.remove(OUR_RULES);
    lab.only("apparmor-rule-missing");
    lab.write(OUR_RULES, include_str!("../../../../deploy/apparmor/vmseal"));
    lab.config.run_dir = "/srv/run".into();
    let found = lab.only("apparmor-rule-missing");
    assert!(found.message.contains("does not name /srv/run"), "{found:?}");
    lab.write("/sys/module/apparmor/parameters/enabled", "N\n");
    assert_eq!(lab.codes(), [""; 0]);
    lab.write("/sys/module/apparmor/parameters/enabled", "Y\n");
    lab.remove(QEMU_RULES);
    assert_eq!(lab.codes(), [""; 0], "libvirt came without AppArmor");
}

#[test]
fn missing_hook_is_found_and_so_is_one_that_cannot_run() {
    let lab = Lab::new();
    lab.program("/etc/libvirt/hooks/qemu.d/50-vmseal", 0o644);
    lab.only("hook-not-executable");
    lab.remove("/etc/libvirt/hooks/qemu.d/50-vmseal");
    let found = lab.only("hook-missing");
    assert!(found.message.contains("/etc/libvirt/hooks/qemu.d/50-vmseal"), "{found:?}");
}

#[test]
fn missing_disk_program_is_found() {
    let lab = Lab::new();
    lab.program("/usr/libexec/vmseal/vmseal-disk", 0o600);
    lab.only("disk-program-missing");
    lab.remove("/usr/libexec/vmseal/vmseal-disk");
    let found = lab.only("disk-program-missing");
    assert!(found.message.contains("/usr/libexec/vmseal/vmseal-disk"), "{found:?}");
}

#[test]
fn missing_user_and_group_are_found_by_name() {
    let mut lab = Lab::new();
    lab.config.disk_user = "vmseal-dis".into();
    lab.config.qemu_group = "qemu".into();
    let found = lab.findings();
    assert_eq!(lab.codes(), ["disk-user-missing", "qemu-group-missing"]);
    assert!(
        found[0].message.contains("vmseal-dis,") && found[1].message.contains("group qemu,"),
        "{found:?}"
    );
    // Nobody else is meant: the agent's own user serves.
    (lab.config.disk_user, lab.config.qemu_group) = (String::new(), String::new());
    assert_eq!(lab.codes(), [""; 0]);
}

#[test]
fn this_host_is_asked_for_names_that_its_files_lack() {
    let config = AgentConfig {
        disk_user: "root".into(),
        qemu_group: "vmseal-no-such-group".into(),
        ..AgentConfig::default()
    };
    let codes: Vec<String> = findings(&config, Path::new("/")).into_iter().map(|w| w.code).collect();
    assert!(!codes.contains(&"disk-user-missing".to_owned()), "{codes:?}");
    assert!(codes.contains(&"qemu-group-missing".to_owned()), "{codes:?}");
}

#[test]
fn locked_memory_in_place_of_secret_memory_is_found() {
    assert_eq!(secret_memory(Protection::MemfdSecret), None);
    assert_eq!(secret_memory(Protection::Mlock).unwrap().code, "secret-memory-weak");
}

#[test]
fn kernel_without_landlock_is_found() {
    assert_eq!(landlock::of(1), None);
    assert_eq!(landlock::of(-1).unwrap().code, "no-landlock");
}

#[test]
fn io_uring_that_the_disk_process_may_not_use_is_found() {
    let lab = Lab::new();
    let set = |disabled: &str, group: &str| {
        lab.write("/proc/sys/kernel/io_uring_disabled", disabled);
        lab.write("/proc/sys/kernel/io_uring_group", group);
    };
    set("0\n", "-1\n");
    assert_eq!(lab.codes(), [""; 0]);
    set("2\n", "990\n");
    let found = lab.only("io-uring-off");
    assert!(found.message.contains("io_uring_disabled is 2") && found.message.contains("pread"), "{found:?}");
    set("1\n", "-1\n");
    assert!(lab.only("io-uring-off").hint.contains("io_uring_group"));
    set("1\n", "990\n");
    assert_eq!(lab.codes(), [""; 0], "the disk user's own group may");
}

#[test]
fn cpu_without_aes_is_named() {
    let lab = Lab::new();
    let cpu = |line: &str| lab.write("/proc/cpuinfo", &format!("processor\t: 0\n{line}\n\nprocessor\t: 1\n"));
    for good in [
        "flags\t\t: fpu aes avx2 vaes vpclmulqdq",
        "flags\t\t: fpu aes avx2",
        "Features\t: fp asimd aes pmull sha1 sha2",
        "isa\t: rv64imafdc",
    ] {
        cpu(good);
        assert_eq!(lab.codes(), [""; 0], "{good}");
    }
    for bad in ["flags\t\t: fpu avx2", "Features\t: fp asimd"] {
        cpu(bad);
        lab.only("no-aes");
    }
}

#[test]
fn host_without_ceph_lacks_nothing_and_one_with_it_hears_what_is_missing() {
    let mut lab = Lab::new();
    let finding = |lab: &Lab| {
        rbd::finding(&Host { config: &lab.config, root: lab.scratch.path() })
            .map(|w| (w.code, w.message, w.hint))
    };
    assert_eq!(finding(&lab), None);
    lab.config.rbd_binary = Some("/usr/libexec/vmseal/vmseal-rbd".into());
    lab.config.ceph_conf = Some("/etc/ceph/ceph.conf".into());
    let code = |lab: &Lab| finding(lab).unwrap().0;
    assert_eq!(code(&lab), "rbd-program-missing");
    lab.program("/usr/libexec/vmseal/vmseal-rbd", 0o755);
    assert_eq!(code(&lab), "rbd-user-missing");
    lab.write("/etc/passwd", "vmseal-rbd:x:991:991::/nonexistent:/usr/sbin/nologin\n");
    let (code_, message, hint) = finding(&lab).unwrap();
    assert_eq!(
        (code_.as_str(), message.as_str(), hint.as_str()),
        (
            "librbd-missing",
            "librados.so.2 is not installed: no disk on Ceph RBD can be served",
            "apt install librados2"
        )
    );
    lab.write("/usr/lib/x86_64-linux-gnu/librados.so.2", "");
    assert_eq!(finding(&lab).unwrap().2, "apt install librbd1");
    lab.write("/usr/lib/x86_64-linux-gnu/librbd.so.1", "");
    assert_eq!(code(&lab), "ceph-file-missing");
    lab.write("/etc/ceph/ceph.conf", "");
    assert_eq!(finding(&lab), None);
    // One that held an image once is looked at without any configuration.
    lab.config.ceph_conf = None;
    lab.write("/var/lib/vmseal/agent/rbd/x.json", "{}");
    lab.remove("/usr/lib/x86_64-linux-gnu/librbd.so.1");
    assert_eq!(code(&lab), "librbd-missing");
}
